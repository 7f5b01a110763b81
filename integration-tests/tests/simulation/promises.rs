//! What must hold after every simulation, whatever went wrong: the promises that the README makes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use millstream_common::text;
use sha2::{Digest as _, Sha256};

use millstream::{Exit, Outcome, OutcomeKind, Reason};

use crate::{
    hosts::Found,
    ledger::{Book, Event, Verdict},
    plan::{Order, Plan},
};

/// Complains about every promise that was broken.
pub(crate) fn check(plan: &Plan, found: &Found, book: &Book, states: &[&Path]) -> Vec<String> {
    let mut complaints = Vec::new();
    let scheduled =
        plan.orders.iter().filter(|order| matches!(order, Order::Run { .. } | Order::Prepare { .. })).count();
    if found.outcomes.len() != scheduled {
        complaints.push(format!("{} of {scheduled} tasks have an outcome", found.outcomes.len()));
    }
    for outcome in &found.outcomes {
        complaints.extend(of_task(plan, outcome, book).map(|complaint| format!("{outcome}: {complaint}")));
    }
    complaints.extend(order_of_streams(found, book));
    complaints.extend(meetings(book));
    if book.running > 0 {
        complaints.push(format!("{} programs run after the end of the test", book.running));
    }
    match &found.left_behind {
        None => complaints.extend(states.iter().flat_map(|state| left_in(state))),
        Some(_) if !plan.faults.is_empty() => {}
        Some(left) => complaints.push(format!("without a fault something was left behind: {left}")),
    }
    complaints
}

/// Exactly once, or told so; no byte lost.
fn of_task<'a>(plan: &Plan, outcome: &'a Outcome, book: &'a Book) -> impl Iterator<Item = String> + use<'a> {
    let mut complaints = Vec::new();
    let life = book.lives.get(&outcome.task_id);
    let begun = life.map_or(0, |life| life.begun);
    let completed = life.is_some_and(|life| life.completed);
    if begun > 1 {
        complaints.push(format!("begun {begun} times"));
    }
    match outcome.kind {
        OutcomeKind::Passed if !completed => complaints.push("it did not come to its end".to_owned()),
        OutcomeKind::Failed if begun == 0 => complaints.push("it was never begun".to_owned()),
        OutcomeKind::Cancelled if begun > 0 => complaints.push("it was begun".to_owned()),
        OutcomeKind::Error if outcome.reason == Reason::HostExhausted && plan.may_fill_disks() => {}
        OutcomeKind::Error | OutcomeKind::Lost if !plan.may_lose_sessions() => {
            complaints.push("no fault was long enough for this".to_owned());
        }
        _ => {}
    }
    if matches!(outcome.exit, Some(Exit::Code(0))) && !completed {
        complaints.push("its program did not end by itself".to_owned());
    }
    if outcome.reason == Reason::TestDeadline || outcome.reason == Reason::Internal {
        complaints.push("this must not happen".to_owned());
    }
    // What its host still had when the session was lost cannot be had any more, and the outcome says so.
    let is_cut = outcome.results_error.is_some() && plan.may_lose_sessions();
    if let Some(problem) = &outcome.results_error
        && !is_cut
    {
        complaints.push(format!("its results are not complete: {problem}"));
    }
    if let Some(life) = life
        && outcome.kind != OutcomeKind::Lost
    {
        let log = &outcome.log;
        let outputs = [
            ("stdout", &life.stdout, log.stdout_bytes, &log.stdout_sha256),
            ("stderr", &life.stderr, log.stderr_bytes, &log.stderr_sha256),
        ];
        for (name, written, bytes, sha256) in outputs {
            let came = fs::read(outcome.results.join(name)).unwrap_or_default();
            // What could not be kept is counted and digested all the same.
            let is_marked = log.truncated && plan.may_fill_disks();
            if came != *written && !is_marked && !(is_cut && written.starts_with(&came)) {
                complaints.push(format!("{} of {} bytes of {name} came", came.len(), written.len()));
            }
            if bytes != written.len() as u64 || *sha256 != text::hex(&Sha256::digest(written)) {
                complaints.push(format!("{bytes} of {} bytes of {name} were counted", written.len()));
            }
        }
    }
    complaints.into_iter()
}

/// In a stream, a task begins after the one before it ended, in the order of their numbers.
fn order_of_streams(found: &Found, book: &Book) -> Vec<String> {
    let numbers: BTreeMap<_, _> =
        found.outcomes.iter().map(|outcome| (outcome.task_id, outcome.stream_number)).collect();
    let mut complaints = Vec::new();
    for (stream, events) in &book.order {
        let (mut running, mut last) = (None, 0);
        for event in events {
            match *event {
                Event::Began(task) => {
                    let number = numbers.get(&task).copied().unwrap_or_default();
                    if let Some(other) = running.replace(task) {
                        complaints.push(format!("on {stream}, {task} began while {other} ran"));
                    }
                    if number <= last {
                        complaints.push(format!("on {stream}, number {number} began after number {last}"));
                    }
                    last = number;
                }
                Event::Ended(task) => {
                    if running.take() != Some(task) {
                        complaints.push(format!("on {stream}, {task} ended and did not run"));
                    }
                }
            }
        }
    }
    complaints
}

/// A meeting is decided once: nobody is released from one that broke for another.
fn meetings(book: &Book) -> Vec<String> {
    let mut verdicts: BTreeMap<&str, Vec<&Verdict>> = BTreeMap::new();
    for (name, verdict) in book.lives.values().flat_map(|life| &life.meetings) {
        verdicts.entry(name).or_default().push(verdict);
    }
    let mut complaints = Vec::new();
    for (name, verdicts) in verdicts {
        let released: Vec<u32> = verdicts
            .iter()
            .filter_map(|verdict| match verdict {
                Verdict::Released { arrival } => Some(*arrival),
                Verdict::Broken(_) => None,
            })
            .collect();
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

/// What is left of sessions in a state directory.
pub(crate) fn left_in(state: &Path) -> Vec<String> {
    let entries = fs::read_dir(state.join("sessions")).into_iter().flatten().flatten();
    entries.map(|entry| format!("{} is left behind", entry.path().display())).collect()
}
