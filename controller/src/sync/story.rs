//! Sentences that tell who, where, why and how long ago. Pure.
//!
//! What people and blocks read when a wait ends badly is made here, and nothing is decided here.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use millstream_common::{
    id::{BarrierName, TaskId},
    limits,
    text::{counted, printable, spoken},
};

use super::{
    Culprit,
    barrier::{Decided, Meeting},
    board::TaskFate,
    hopeless::{Link, Wait},
};

/// A task that is over.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Who it was.
    pub culprit: Culprit,
    /// Its long name, such as `task 1-netserver on stream server`.
    pub long: String,
    /// What became of it.
    pub fate: TaskFate,
    /// When that was heard.
    pub at: Instant,
    /// The only barriers it took part in.
    pub joins: Option<BTreeSet<BarrierName>>,
    /// Whether it ended after a barrier was broken under it.
    pub follower: bool,
}

impl Ended {
    fn could_enter(&self, barrier: Option<&BarrierName>) -> bool {
        match (barrier, &self.joins) {
            (Some(name), Some(names)) => names.contains(name),
            _ => true,
        }
    }

    fn told(&self, now: Instant) -> String {
        let ago = spoken(now.duration_since(self.at));
        let mut told = format!("{} {}, {ago} ago", self.long, self.fate.sentence);
        if let Some(line) = &self.fate.last_line {
            told.push_str(&format!(
                " (last line: `{}`)",
                printable(line.as_bytes(), limits::LAST_LINE_BYTES_MAX)
            ));
        }
        told
    }
}

/// A party's task ended while it waited.
#[must_use]
pub fn died(meeting: Option<&Meeting>, ended: &Ended, now: Instant) -> String {
    let told = ended.told(now);
    match meeting {
        Some(meeting) => {
            format!("{} of {} entered; one of them is gone: {told}", meeting.arrivals.len(), meeting.parties)
        }
        None => told,
    }
}

/// Too few can come: `2 of 3 entered; the third can no longer come: …`.
#[must_use]
pub fn too_few(entered: usize, parties: u32, left: usize, reason: &str) -> String {
    let missing = (parties as usize).saturating_sub(entered);
    let who = match (missing, left) {
        (1, _) => format!("the {} can no longer come", ordinal(parties)),
        (_, 0) => format!("the other {missing} can no longer come"),
        (_, left) => format!("of the other {missing} only {left} can still come"),
    };
    format!("{entered} of {parties} entered; {who}: {reason}")
}

/// Why nobody is left for a barrier, or for a topic when no name is given, and whose end that was.
#[must_use]
pub fn absence(
    barrier: Option<&BarrierName>,
    unexpected: &VecDeque<Ended>,
    ended: &VecDeque<Ended>,
    unfinished: usize,
    now: Instant,
) -> (String, Option<Culprit>) {
    // Those that did not merely follow another's failure first, the latest of them first.
    let mut roots: Vec<&Ended> = unexpected.iter().rev().filter(|task| task.could_enter(barrier)).collect();
    roots.sort_by_key(|task| task.follower);
    if let Some(root) = roots.first() {
        let mut told: Vec<String> = roots.iter().take(TOLD_COUNT_MAX).map(|task| task.told(now)).collect();
        if roots.len() > TOLD_COUNT_MAX {
            told.push(format!("and {} more failed", counted(roots.len() - TOLD_COUNT_MAX, "task")));
        }
        return (told.join("; "), Some(root.culprit.clone()));
    }
    let last = ended.iter().rev().find(|task| task.could_enter(barrier));
    let told = match (last, barrier) {
        (Some(last), _) => {
            format!("every other task that could have is over, the last was {}", last.told(now))
        }
        (None, Some(_)) if unfinished > 1 => {
            "no other task takes part in this barrier, and main starts no more".to_owned()
        }
        (None, None) if unfinished > 1 => {
            "the others of its stream run when it has ended, and main starts no more".to_owned()
        }
        (None, _) => "there is no other task, and main starts no more".to_owned(),
    };
    (told, None)
}

/// Waits that hold each other.
#[must_use]
pub fn circle(links: &[Link], place: impl Fn(Wait) -> String, task: impl Fn(TaskId) -> String) -> String {
    if let [Link { wait, needs, behind: Some(front), held_by }] = links
        && wait == held_by
    {
        let (needs, front) = (task(*needs), task(*front));
        return format!("nobody else can come: {needs} is queued behind {front}, which waits here itself");
    }
    let steps: Vec<String> = links
        .iter()
        .map(|link| {
            let (here, needs, next) = (place(link.wait), task(link.needs), place(link.held_by));
            match link.behind {
                None => format!("{here} needs {needs}, which waits at {next}"),
                Some(front) => {
                    format!(
                        "{here} needs {needs}, which is queued behind {}, which waits at {next}",
                        task(front)
                    )
                }
            }
        })
        .collect();
    format!("the tasks wait for each other in a circle: {}", steps.join("; "))
}

/// What a task does, as half a sentence.
#[must_use]
pub fn doing(
    waits: Option<(String, Instant)>,
    progress: Option<&(String, Instant)>,
    suspended: bool,
    now: Instant,
) -> String {
    let mut told = match (waits, progress) {
        (Some((place, since)), _) => {
            format!("{place} for {}", spoken(now.duration_since(since)))
        }
        (None, Some((text, since))) => format!("{text}, told {} ago", spoken(now.duration_since(*since))),
        (None, None) => "has not begun".to_owned(),
    };
    if suspended {
        told.push_str("; its host does not answer");
    }
    told
}

/// Puts the missing ones behind a sentence.
pub fn append_missing(sentence: &mut String, missing: impl Iterator<Item = String>) {
    let missing: Vec<String> = missing.collect();
    if missing.is_empty() {
        sentence.push_str("; no unfinished task is left that could have come");
    } else {
        sentence.push_str("; missing: ");
        sentence.push_str(&missing.join("; "));
    }
}

/// Puts what the culprit was last known to do behind a sentence.
pub fn append_doing(sentence: &mut String, text: &str, ago: Duration) {
    sentence.push_str(&format!("; last known of it, {} ago: {text}", spoken(ago)));
}

/// What one party is told of a break.
#[must_use]
pub fn broken(decided: &Decided, arrival: Option<u32>) -> String {
    let meeting = &decided.meeting;
    let sentence = decided.as_break().map_or("", |cause| cause.sentence.as_str());
    match arrival.and_then(|number| meeting.arrivals.get(number as usize).map(|party| (number, party))) {
        Some((number, party)) => format!(
            "barrier `{}` broke in generation {}: {sentence}; {} had waited {}",
            meeting.name,
            meeting.generation,
            party.label,
            spoken(decided.waited(number))
        ),
        None => format!(
            "barrier `{}` is broken since generation {}, until main or a person resets it: {sentence}",
            meeting.name, meeting.generation
        ),
    }
}

/// Ended tasks told in one sentence.
const TOLD_COUNT_MAX: usize = 3;

/// `first`, `second`, … `tenth`, then `11th`.
fn ordinal(number: u32) -> String {
    const WORDS: [&str; 11] = [
        "zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
        "tenth",
    ];
    if let Some(word) = WORDS.get(number as usize) {
        return (*word).to_owned();
    }
    let suffix = match (number % 10, number % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{number}{suffix}")
}
