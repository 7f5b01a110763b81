//! The part of the board that looks at everything at once: who is missing and what it does, which waits can no longer be
//! met, and what is said of that. Pure.

use std::{collections::BTreeSet, time::Instant};

use millstream_common::id::{BarrierName, TaskId};

use super::{Action, Board, Place};
use crate::sync::{
    CallId, Culprit, Speaker,
    barrier::{self, Barrier, Decided, Decision},
    hopeless::{Finding, Wait},
    story, topic,
};

/// Missing tasks named when patience ends.
const EVIDENCE_COUNT_MAX: usize = 3;

impl Board {
    /// Tasks that could still come to a barrier and what they do now, one line each, at most `count_max`.
    #[must_use]
    pub fn missing(&self, barrier: &Barrier, count_max: usize, now: Instant) -> Vec<String> {
        let inside: BTreeSet<Speaker> =
            barrier.meeting().into_iter().flat_map(|meeting| &meeting.arrivals).map(|a| a.speaker).collect();
        self.prospects
            .unfinished(barrier.name())
            .filter(|&(task, may)| may && !inside.contains(&Speaker::Task(task)))
            .take(count_max)
            .filter_map(|(task, _)| {
                self.tasks.get(&task).map(|t| format!("{}: {}", t.label, self.doing(task, now)))
            })
            .collect()
    }

    /// Where a task waits, for how long and for whom, as the rest of a sentence about it; none when it waits nowhere.
    #[must_use]
    pub fn waiting(&self, task: TaskId, now: Instant) -> Option<String> {
        let Place { wait, .. } = self.calls.get(self.tasks.get(&task)?.calls.first()?)?;
        let mut text = self.doing(task, now);
        if let Wait::Barrier(index) = *wait
            && let Some((entered, parties)) = self.counts(*wait)
        {
            text.push_str(&format!(" ({entered} of {parties} entered)"));
            let missing = self.missing(&self.barriers[index].barrier, EVIDENCE_COUNT_MAX, now);
            story::append_missing(&mut text, missing.into_iter());
        }
        Some(text)
    }

    /// Ends every wait that can no longer be met. Each round ends at least one, so it comes to an end.
    pub(super) fn end_hopeless(&mut self, now: Instant, actions: &mut Vec<Action>) {
        loop {
            if self.main.waits == 0 && !self.any_unexpected {
                return;
            }
            let declared = &self.main.declared;
            let main = |barrier: Option<&BarrierName>| barrier.is_some_and(|name| declared.contains(name));
            let Finding { absent, circle } = self.prospects.search(main);
            let mut stories: Vec<(Wait, String, Option<Culprit>)> = Vec::new();
            for wait in absent {
                let (sentence, culprit) = self.tell_absence(wait, now);
                stories.push((wait, sentence, culprit));
            }
            if !circle.is_empty() {
                let told = story::circle(&circle, |wait| self.place_name(wait), |task| self.long(task));
                for link in &circle {
                    let mut sentence = match self.counts(link.wait) {
                        Some((entered, parties)) => format!("{entered} of {parties} entered; {told}"),
                        None => told.clone(),
                    };
                    // Those in the circle might have been met by somebody who has failed: then that one is to blame.
                    let (reason, culprit) = self.absence(link.wait, now);
                    if culprit.is_some() {
                        sentence.push_str("; nor can another that might have: ");
                        sentence.push_str(&reason);
                    }
                    stories.push((link.wait, sentence, culprit));
                }
            }
            if stories.is_empty() {
                return;
            }
            for (wait, sentence, culprit) in stories {
                match wait {
                    Wait::Barrier(index) => {
                        self.feed(index, barrier::Event::FoundHopeless { sentence, culprit }, now, actions);
                    }
                    Wait::Topic(call) => {
                        let call = CallId(call);
                        if let (Some(culprit), Some(Place { speaker: Speaker::Task(task), .. })) =
                            (culprit, self.calls.get(&call))
                        {
                            self.followers.insert(*task, culprit);
                        }
                        self.feed_topics(topic::Event::FoundHopeless { call, sentence }, now, actions);
                    }
                }
            }
        }
    }

    /// Why too few are left for a wait, and whose end that was.
    fn tell_absence(&self, wait: Wait, now: Instant) -> (String, Option<Culprit>) {
        let left = self.prospects.left_for(wait);
        let (reason, culprit) = self.absence(wait, now);
        match self.counts(wait) {
            Some((entered, parties)) => (story::too_few(entered, parties, left, &reason), culprit),
            None => (format!("nobody is left who could publish: {reason}"), culprit),
        }
    }

    /// Whose end leaves a wait without others, and in words.
    fn absence(&self, wait: Wait, now: Instant) -> (String, Option<Culprit>) {
        let name = match wait {
            Wait::Barrier(index) => Some(self.barriers[index].barrier.name()),
            Wait::Topic(_) => None,
        };
        story::absence(name, &self.unexpected, &self.ended, self.tasks.len(), now)
    }

    fn counts(&self, wait: Wait) -> Option<(usize, u32)> {
        let Wait::Barrier(index) = wait else { return None };
        let meeting = self.barriers[index].barrier.meeting()?;
        Some((meeting.arrivals.len(), meeting.parties))
    }

    fn place_name(&self, wait: Wait) -> String {
        match wait {
            Wait::Barrier(index) => format!("barrier `{}`", self.barriers[index].barrier.name()),
            Wait::Topic(call) => self
                .topics
                .awaited(CallId(call))
                .map_or_else(String::new, |wait| format!("topic `{}`", wait.topic)),
        }
    }

    fn long(&self, task: TaskId) -> String {
        self.tasks.get(&task).map_or_else(|| "a task".to_owned(), |t| t.long.clone())
    }

    /// What a task does now, as half a sentence.
    fn doing(&self, task: TaskId, now: Instant) -> String {
        let Some(task) = self.tasks.get(&task) else { return "has ended".to_owned() };
        // What it only listens to says the least.
        let listens = |call: &CallId| self.topics.awaited(*call).is_some_and(|w| w.wanted.listens());
        let call = task.calls.iter().find(|call| !listens(call)).or(task.calls.first());
        let waits = call.and_then(|call| {
            let place = self.calls.get(call)?;
            let (verb, since) = match place.wait {
                Wait::Barrier(index) => ("waits at", self.barriers[index].barrier.arrival(*call)?.entered),
                Wait::Topic(_) if listens(call) => ("listens to", self.topics.awaited(*call)?.began),
                Wait::Topic(_) => ("waits at", self.topics.awaited(*call)?.began),
            };
            Some((format!("{verb} {}", self.place_name(place.wait)), since))
        });
        story::doing(waits, task.doing.as_ref(), task.suspended, now)
    }

    /// Puts what only the board knows behind the sentence of a break, before it is told to anybody.
    pub(super) fn add_evidence(&self, index: usize, decided: &mut Decided, now: Instant) {
        let Decision::Broken(cause) = &mut decided.decision else { return };
        match cause.cause {
            barrier::Cause::TimedOut => {
                let inside: BTreeSet<Speaker> = decided.meeting.arrivals.iter().map(|a| a.speaker).collect();
                let name = self.barriers[index].barrier.name();
                let missing = self
                    .prospects
                    .unfinished(name)
                    .filter(|&(task, may)| may && !inside.contains(&Speaker::Task(task)))
                    .take(EVIDENCE_COUNT_MAX)
                    .map(|(task, _)| format!("{} {}", self.long(task), self.doing(task, now)));
                story::append_missing(&mut cause.sentence, missing);
            }
            barrier::Cause::Lost | barrier::Cause::Aborted | barrier::Cause::OtherCount => {
                if let Some(task) = cause.culprit.as_ref().and_then(Culprit::task)
                    && let Some((text, since)) = self.tasks.get(&task).and_then(|t| t.doing.as_ref())
                {
                    story::append_doing(&mut cause.sentence, text, now.duration_since(*since));
                }
            }
            barrier::Cause::Died | barrier::Cause::Hopeless => {}
        }
    }
}
