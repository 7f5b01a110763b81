//! What must hold after every simulation, whatever went wrong: the promises that the README makes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use millstream::{Exit, Outcome, OutcomeKind, Phase, Reason};
use millstream_common::{id::TaskId, sync_client::CONTROLLER_GONE, text};
use sha2::{Digest as _, Sha256};

use crate::{
    hosts::Found,
    ledger::{Book, Life, Part, Verdict},
    plan::{FaultKind, Plan},
    steps::Program,
};

/// Complains about every promise that was broken.
pub(crate) fn check(
    plan: &Plan,
    found: &Found,
    book: &Book,
    states: &[&Path],
    results: &Path,
) -> Vec<String> {
    let mut complaints = Vec::new();
    let scheduled = plan.programs().count();
    if found.outcomes.len() != scheduled {
        complaints.push(format!("{} of {scheduled} tasks have an outcome", found.outcomes.len()));
    }
    for outcome in &found.outcomes {
        let number = outcome.test_number as usize - 1;
        let program = plan.programs().nth(number).unwrap();
        let mut said = of_task(plan, program, outcome, book);
        said.extend(reasons(plan, number, outcome, found));
        complaints.extend(said.into_iter().map(|complaint| format!("{outcome}: {complaint}")));
    }
    for life in book.lives.values().filter(|life| life.begun.values().any(|times| *times > 1)) {
        complaints.push(format!("a program began more than once: {:?}", life.begun));
    }
    complaints.extend(book.troubles.iter().cloned());
    complaints.extend(order_of_streams(plan, book));
    complaints.extend(meetings(book));
    complaints.extend(values(book));
    complaints.extend(of_the_killed(found, book, results));
    if book.running > 0 {
        complaints.push(format!("{} programs run after the end of the test", book.running));
    }
    match &found.left_behind {
        None if plan.kill.is_none() => complaints.extend(states.iter().flat_map(|state| left_in(state))),
        _ => complaints.extend(ownerless(states)),
    }
    if let Some(left) = &found.left_behind
        && plan.faults.is_empty()
    {
        complaints.push(format!("without a fault something was left behind: {left}"));
    }
    complaints
}

/// Exactly once, or told so; nothing lost silently.
fn of_task(plan: &Plan, program: &Program, outcome: &Outcome, book: &Book) -> Vec<String> {
    let mut complaints = Vec::new();
    let none = Life::default();
    let life = book.lives.get(&outcome.task_id).unwrap_or(&none);
    let has_begun = !life.begun.is_empty();
    let failed = life.exits.values().any(|code| *code != 0);
    let left_out = phases(program).find(|phase| life.exits.get(phase) != Some(&0));
    match outcome.kind {
        OutcomeKind::Passed if left_out.is_some() => {
            complaints.push(format!("its phase {} did not come to its end", left_out.unwrap_or(Phase::Run)));
        }
        OutcomeKind::Failed if !failed => complaints.push("none of its programs failed".to_owned()),
        OutcomeKind::Cancelled if has_begun => complaints.push("it was begun".to_owned()),
        _ => {}
    }
    for end in &outcome.phases {
        if let Some(Exit::Code(code)) = end.exit
            && life.exits.get(&end.phase) != Some(&code)
        {
            complaints.push(format!("its phase {} did not end with {code}", end.phase));
        }
    }
    if life.begun.contains_key(&Phase::Run)
        && !program.setup.is_empty()
        && life.exits.get(&Phase::Setup) != Some(&0)
    {
        complaints.push("it ran although its set-up had not passed".to_owned());
    }
    let session_over =
        [Reason::LeaseExpired, Reason::SessionClosed, Reason::SupervisorDied].contains(&outcome.reason);
    if has_begun
        && !program.teardown.is_empty()
        && !life.begun.contains_key(&Phase::Teardown)
        && outcome.kind != OutcomeKind::Lost
        && !session_over
    {
        complaints.push("its tear-down was left out".to_owned());
    }
    complaints.extend(results_of(plan, outcome, life));
    complaints
}

fn phases(program: &Program) -> impl Iterator<Item = Phase> {
    [
        (Phase::Setup, !program.setup.is_empty()),
        (Phase::Run, true),
        (Phase::Teardown, !program.teardown.is_empty()),
    ]
    .into_iter()
    .filter_map(|(phase, is_there)| is_there.then_some(phase))
}

/// What a task printed and left is here, or it is said that it is not.
fn results_of(plan: &Plan, outcome: &Outcome, life: &Life) -> Vec<String> {
    let mut complaints = Vec::new();
    // What its host still had when the session was lost cannot be had any more, and the outcome says so; nor what a supervisor
    // had not written when it died.
    let is_cut = outcome.results_error.is_some()
        && (plan.may_lose_sessions() || outcome.reason == Reason::SupervisorDied);
    if let Some(problem) = &outcome.results_error
        && !is_cut
    {
        complaints.push(format!("its results are not complete: {problem}"));
    }
    if outcome.kind == OutcomeKind::Lost {
        return complaints;
    }
    let log = &outcome.log;
    let outputs = [
        ("stdout", &life.stdout, log.stdout_bytes, &log.stdout_sha256),
        ("stderr", &life.stderr, log.stderr_bytes, &log.stderr_sha256),
    ];
    for (name, written, bytes, sha256) in outputs {
        let came = fs::read(outcome.results.join(name)).unwrap_or_default();
        // What could not be kept is counted and digested all the same.
        let is_marked = log.truncated && plan.has(FaultKind::Full);
        if came != *written && !is_marked && !(is_cut && written.starts_with(&came)) {
            complaints.push(format!("{} of {} bytes of {name} came", came.len(), written.len()));
        }
        if life.begun.is_empty() {
            continue;
        }
        if bytes != written.len() as u64 || *sha256 != text::hex(&Sha256::digest(written)) {
            complaints.push(format!("{bytes} of {} bytes of {name} were counted", written.len()));
        }
    }
    let came: BTreeMap<String, Vec<u8>> = fs::read_dir(outcome.data())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    let told = is_cut || plan.has(FaultKind::Full) && outcome.detail.contains("results");
    if came != life.files && !(told && came.is_empty()) {
        let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        complaints.push(format!("it left {:?} and {:?} came", names(&life.files), names(&came)));
    }
    complaints
}

/// Every end has one reason, which something gave cause for, and says who or what that was.
fn reasons(plan: &Plan, number: usize, outcome: &Outcome, found: &Found) -> Vec<String> {
    let mut complaints = Vec::new();
    let is_caused = match (outcome.kind, outcome.reason) {
        (OutcomeKind::Passed | OutcomeKind::Failed, Reason::Exited) => true,
        (OutcomeKind::Stopped, Reason::Stopped) | (OutcomeKind::Cancelled, Reason::Cancelled) => {
            plan.ends(number)
        }
        (OutcomeKind::Error, Reason::HostExhausted) => plan.has(FaultKind::Full),
        (OutcomeKind::Error | OutcomeKind::Lost, Reason::SupervisorDied) => plan.has(FaultKind::Supervisors),
        (
            OutcomeKind::Killed | OutcomeKind::Lost | OutcomeKind::Error | OutcomeKind::Cancelled,
            Reason::LeaseExpired,
        )
        | (OutcomeKind::Error | OutcomeKind::Lost, Reason::Unreachable) => plan.may_lose_sessions(),
        _ => false,
    };
    if !is_caused {
        complaints.push("nothing has happened that is a reason for this".to_owned());
    }
    let by_itself =
        [OutcomeKind::Passed, OutcomeKind::Cancelled, OutcomeKind::Stopped].contains(&outcome.kind);
    if !by_itself && outcome.detail.is_empty() {
        complaints.push("it says nothing about its cause".to_owned());
    }
    let cancelled = plan.ends(number) && outcome.reason != Reason::LeaseExpired;
    if outcome.is_expected() && !outcome.passed() && !cancelled {
        complaints.push("nobody has expected this".to_owned());
    }
    if let Some(cause) = &outcome.caused_by {
        if outcome.kind != OutcomeKind::Failed {
            complaints.push(format!("it did not end because of {}", cause.task));
        }
        match found.outcomes.iter().find(|other| other.task_id == cause.task_id) {
            None => complaints.push(format!("its cause {} is unknown", cause.task)),
            Some(other) if other.task_id == outcome.task_id => {
                complaints.push("it is its own cause".to_owned());
            }
            Some(_) => {}
        }
    }
    complaints
}

/// In a stream, a task begins after the one before it ended, in the order of their numbers; on a host that a test has for
/// itself nobody else runs.
fn order_of_streams(plan: &Plan, book: &Book) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut running: BTreeMap<(u32, &str), &Part> = BTreeMap::new();
    let mut last: BTreeMap<(u32, &str), (TaskId, Phase)> = BTreeMap::new();
    let mut guests: BTreeMap<usize, BTreeMap<u32, usize>> = BTreeMap::new();
    for event in &book.events {
        let part = &event.part;
        let stream = (part.test, &*part.stream);
        let host = plan.streams[part.stream[1..].parse::<usize>().unwrap()];
        let guests = guests.entry(host).or_default();
        if event.began {
            if let Some(other) = running.insert(stream, part) {
                complaints.push(format!("{part:?} began while this ran: {other:?}"));
            }
            // Identifiers of tasks are made in the order in which they are scheduled.
            let place = (part.task, part.phase);
            if let Some(last) = last.insert(stream, place)
                && last >= place
            {
                complaints.push(format!("{part:?} began after {last:?}"));
            }
            *guests.entry(part.test).or_default() += 1;
            if plan.exclusive && guests.values().filter(|count| **count > 0).count() > 1 {
                complaints.push(format!("{part:?} began on a host that another test had for itself"));
            }
        } else {
            if running.remove(&stream) != Some(part) {
                complaints.push(format!("{part:?} ended and did not run"));
            }
            *guests.entry(part.test).or_default() -= 1;
        }
    }
    complaints
}

/// A meeting is decided once: nobody is released from one that broke for another.
fn meetings(book: &Book) -> Vec<String> {
    let mut verdicts: BTreeMap<(u32, &str), Vec<&Verdict>> = BTreeMap::new();
    for life in book.lives.values() {
        for (name, verdict) in &life.meetings {
            verdicts.entry((life.test, name)).or_default().push(verdict);
        }
    }
    let mut complaints = Vec::new();
    for ((_, name), verdicts) in verdicts {
        let released: Vec<u32> = verdicts
            .iter()
            .filter_map(|verdict| match verdict {
                Verdict::Released { arrival } => Some(*arrival),
                Verdict::Broken(_) => None,
            })
            .collect();
        for verdict in &verdicts {
            if let Verdict::Broken(why) = verdict
                && !names_somebody(why)
            {
                complaints.push(format!("barrier {name} does not say who broke it: {why}"));
            }
        }
        let places: BTreeSet<u32> = released.iter().copied().collect();
        if places.len() < released.len() {
            complaints.push(format!("barrier {name} gave a place twice: {released:?}"));
        }
        if !released.is_empty() && released.len() < verdicts.len() {
            complaints.push(format!("barrier {name} was split: {verdicts:?}"));
        }
    }
    complaints
}

/// Whether a sentence names a task or the agent that has lost its controller.
fn names_somebody(why: &str) -> bool {
    why.contains("on stream s") || why.contains(CONTROLLER_GONE)
}

/// A topic has one order for all who read it, which is the one that publishers were told, and every value once.
fn values(book: &Book) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut topics: BTreeMap<(u32, &str), BTreeMap<u64, &str>> = BTreeMap::new();
    for life in book.lives.values() {
        let heard = life
            .heard
            .iter()
            .flat_map(|(topic, values)| (0..).zip(values).map(move |(index, value)| (topic, index, value)));
        let published =
            life.published.iter().filter_map(|(topic, value, index)| Some((topic, (*index)?, value)));
        for (topic, index, value) in heard.chain(published) {
            let known = topics.entry((life.test, topic)).or_default();
            if let Some(other) = known.insert(index, value)
                && other != value
            {
                complaints.push(format!("topic {topic} has two values {index}: {other} and {value}"));
            }
        }
    }
    for ((_, topic), values) in topics {
        let distinct: BTreeSet<&str> = values.values().copied().collect();
        if distinct.len() < values.len() {
            complaints.push(format!("topic {topic} has a value twice: {values:?}"));
        }
    }
    complaints
}

/// What a test has put on disk before it was killed is true.
fn of_the_killed(found: &Found, book: &Book, results: &Path) -> Vec<String> {
    let mut complaints = Vec::new();
    for (task, life) in &book.lives {
        if found.outcomes.iter().any(|outcome| outcome.task_id == *task) {
            continue;
        }
        let Some((place, record)) = record_of(&task.to_string(), results) else { continue };
        let kind = record["outcome"].as_str().unwrap_or_default();
        let failed = life.exits.values().any(|code| *code != 0);
        let stdout = fs::read(place.join("stdout")).unwrap_or_default();
        let is_true = match kind {
            "passed" => life.exits.values().all(|code| *code == 0) && life.exits.contains_key(&Phase::Run),
            "failed" => failed,
            _ => true,
        };
        if !is_true {
            complaints.push(format!("{}: {kind}, and it was not: {life:?}", place.display()));
        }
        if (kind == "passed" || kind == "failed")
            && record["results_error"].is_null()
            && stdout != life.stdout
        {
            complaints.push(format!("{}: not what it printed", place.display()));
        }
    }
    complaints
}

/// The directory and the record of a task, if it was written.
fn record_of(task: &str, results: &Path) -> Option<(PathBuf, serde_json::Value)> {
    let list = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let tests = list(results).filter(|path| !path.is_symlink());
    let places = tests
        .flat_map(|test| list(&test.join("streams")).flat_map(|stream| list(&stream)).collect::<Vec<_>>());
    places.into_iter().find_map(|place| {
        let text = fs::read(place.join("result.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
        (record["task_id"] == task).then_some((place, record))
    })
}

/// What is left of sessions in a state directory.
pub(crate) fn left_in(state: &Path) -> Vec<String> {
    sessions(state).map(|path| format!("{} is left behind", path.display())).collect()
}

/// Sessions that nobody owns and that go on all the same: what is left of one that has ended says so.
pub(crate) fn ownerless(states: &[&Path]) -> Vec<String> {
    let sessions = states.iter().flat_map(|state| sessions(state));
    let going_on = sessions.filter(|path| !path.join("ended.json").exists());
    going_on.map(|path| format!("{} goes on and nobody owns it", path.display())).collect()
}

fn sessions(state: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(state.join("sessions")).into_iter().flatten().flatten().map(|entry| entry.path())
}
