//! Scripts of events with their transcripts, and properties of a whole board.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use expect_test::{Expect, expect};
use millstream_common::id::{BlockName, TopicName};
use uuid::Uuid;

use super::*;
use crate::sync::topic::{Content, Wanted};

mod hopeless;
mod meetings;
mod properties;
mod topics;

/// `server/1` is the first task of stream `server`.
fn id(name: &str) -> TaskId {
    let mut bytes = [0; 16];
    for (byte, from) in bytes.iter_mut().zip(name.bytes()) {
        *byte = from;
    }
    TaskId::from_uuid(Uuid::from_bytes(bytes))
}

fn speaker(name: &str) -> Speaker {
    match name {
        "main" => Speaker::Main,
        "person" => Speaker::ByHand,
        task => Speaker::Task(id(task)),
    }
}

#[derive(Debug, Clone)]
enum Step {
    Scheduled(String, Option<Vec<String>>, Option<u32>),
    Doing(String, String),
    Ended(String, bool, Option<String>),
    Main(bool),
    Declared(String),
    Enter(String, String, Option<u32>, Option<String>),
    /// Who enters which barrier for all streams and so many more.
    EnterAll(String, String, u32),
    Streams(u32),
    Abort(String, String),
    Reset(String, String),
    Hold(String, String, bool),
    Publish(String, String, Option<String>),
    Await(String, String, u64),
    /// Who subscribes to which topic, from which index on.
    Listen(String, String, u64),
    /// The same, and does nothing else until the next value is there.
    Next(String, String, u64),
    /// Who gives up its last call, and whether the link took it.
    Leave(String, bool),
    Suspend(String),
    Resume(String),
    After(u64),
}

fn tasks(names: &[&str]) -> Vec<Step> {
    names.iter().map(|name| Step::Scheduled((*name).into(), None, None)).collect()
}
fn joins(name: &str, barriers: &[&str]) -> Step {
    let barriers = barriers.iter().map(|barrier| (*barrier).to_owned()).collect();
    Step::Scheduled(name.into(), Some(barriers), None)
}
fn enter(who: &str, barrier: &str, parties: u32) -> Step {
    Step::Enter(who.into(), barrier.into(), Some(parties), None)
}
fn enter_as(who: &str, barrier: &str, parties: u32, token: &str) -> Step {
    Step::Enter(who.into(), barrier.into(), Some(parties), Some(token.into()))
}
fn fails(who: &str) -> Step {
    Step::Ended(who.into(), true, None)
}
fn fails_saying(who: &str, line: &str) -> Step {
    Step::Ended(who.into(), true, Some(line.into()))
}
fn passes(who: &str) -> Step {
    Step::Ended(who.into(), false, None)
}
fn waits_for(who: &str, topic: &str, count: u64) -> Step {
    Step::Await(who.into(), topic.into(), count)
}
fn listens(who: &str, topic: &str, from: u64) -> Step {
    Step::Listen(who.into(), topic.into(), from)
}
fn waits_next(who: &str, topic: &str, from: u64) -> Step {
    Step::Next(who.into(), topic.into(), from)
}
fn publish(who: &str, topic: &str) -> Step {
    Step::Publish(who.into(), topic.into(), None)
}
fn main_waits() -> Step {
    Step::Main(true)
}
fn after(tenths: u64) -> Step {
    Step::After(tenths)
}

struct Script {
    board: Board,
    now: Instant,
    calls: u64,
    last_call: BTreeMap<String, CallId>,
    names: BTreeMap<CallId, String>,
    /// Calls that were not answered.
    open: BTreeMap<CallId, String>,
    told: Vec<String>,
}

fn board() -> Script {
    #[expect(clippy::disallowed_methods, reason = "any instant will do; it never runs")]
    let now = Instant::now();
    Script {
        board: Board::default(),
        now,
        calls: 0,
        last_call: BTreeMap::new(),
        names: BTreeMap::new(),
        open: BTreeMap::new(),
        told: Vec::new(),
    }
}

fn barrier_name(name: &str) -> BarrierName {
    BarrierName::new(name).unwrap()
}

impl Script {
    fn asked(&mut self, who: &str, request: Request) -> Event {
        self.calls += 1;
        let call = CallId(self.calls);
        self.last_call.insert(who.to_owned(), call);
        self.names.insert(call, who.to_owned());
        self.open.insert(call, who.to_owned());
        Event::Asked { call, speaker: speaker(who), request }
    }

    fn awaits(&mut self, who: &str, topic: &str, wanted: Wanted, seconds: u64) -> Event {
        let topic = TopicName::new(topic).unwrap();
        self.asked(who, Request::Await { topic, wanted, timeout: Duration::from_secs(seconds) })
    }

    fn event(&mut self, step: &Step) -> Event {
        match step {
            Step::Scheduled(name, joins, group_size) => {
                let (stream, number) = name.split_once('/').unwrap();
                let joins = joins.as_ref().map(|names| names.iter().map(|name| barrier_name(name)).collect());
                let label = SpeakerLabel {
                    stream: StreamName::new(stream).unwrap(),
                    number: number.parse().unwrap(),
                    block: BlockName::new("block").unwrap(),
                };
                Event::TaskScheduled { task: id(name), label, joins, group_size: *group_size }
            }
            Step::Doing(name, text) => Event::TaskProgressed { task: id(name), text: text.clone() },
            Step::Ended(name, unexpected, last_line) => {
                let sentence = if *unexpected { "failed with exit code 1" } else { "passed" };
                let fate = TaskFate {
                    unexpected: *unexpected,
                    sentence: sentence.into(),
                    last_line: last_line.clone(),
                };
                self.open.retain(|_, who| who != name);
                Event::TaskEnded { task: id(name), fate }
            }
            Step::Main(waiting) => Event::MainWaited { waiting: *waiting },
            Step::Declared(name) => Event::MainDeclared { names: vec![barrier_name(name)] },
            Step::Enter(who, barrier, parties, token) => self.asked(
                who,
                Request::Enter {
                    barrier: barrier_name(barrier),
                    parties: parties.map_or(Parties::group(), Parties::Count),
                    timeout: Duration::from_secs(60),
                    token: token.as_deref().map(Into::into),
                    payload: Bytes::new(),
                    display_name: None,
                },
            ),
            Step::EnterAll(who, barrier, more) => self.asked(
                who,
                Request::Enter {
                    barrier: barrier_name(barrier),
                    parties: Parties::All { more: *more },
                    timeout: Duration::from_secs(60),
                    token: None,
                    payload: Bytes::new(),
                    display_name: None,
                },
            ),
            Step::Streams(count) => Event::StreamsDefined { count: *count },
            Step::Abort(who, barrier) => {
                self.asked(who, Request::Abort { barrier: barrier_name(barrier), reason: "enough".into() })
            }
            Step::Reset(who, barrier) => self.asked(who, Request::Reset { barrier: barrier_name(barrier) }),
            Step::Hold(who, barrier, release) => {
                self.asked(who, Request::Hold { barrier: barrier_name(barrier), release: *release })
            }
            Step::Publish(who, topic, token) => self.asked(
                who,
                Request::Publish {
                    topic: TopicName::new(topic).unwrap(),
                    content: Content::Text(format!("from {who}")),
                    token: token.as_deref().map(Into::into),
                },
            ),
            Step::Await(who, topic, count) => self.awaits(who, topic, Wanted::First(*count), 60),
            Step::Listen(who, topic, from) => self.awaits(who, topic, Wanted::From(*from), 3600),
            Step::Next(who, topic, from) => self.awaits(who, topic, Wanted::Next(*from), 3600),
            Step::Leave(who, link_down) => {
                let call = self.last_call.get(who).copied().unwrap_or(CallId(0));
                self.open.remove(&call);
                Event::Left { call, link_down: *link_down }
            }
            Step::Suspend(name) => Event::SessionSuspended { tasks: vec![id(name)] },
            Step::Resume(name) => Event::SessionResumed { tasks: vec![id(name)] },
            Step::After(tenths) => {
                self.now += Duration::from_millis(100 * tenths);
                Event::TimePassed
            }
        }
    }

    fn step(&mut self, step: &Step) {
        let event = self.event(step);
        let mut actions = Vec::new();
        self.board.handle(event, self.now, &mut actions);
        for action in actions {
            let Action::Answer { call, answer } = action;
            self.open.remove(&call);
            self.told.push(format!("{}: {}", self.names[&call], tell(&answer)));
        }
        self.board.assert_invariants();
    }
}

fn tell(answer: &Answer) -> String {
    match answer {
        Answer::Released { decided, arrival } => {
            let meeting = &decided.meeting;
            format!("released from {} {} as {arrival}", meeting.name, meeting.generation)
        }
        Answer::Broken { decided, arrival } => story::broken(decided, *arrival),
        Answer::Indexed(index) => format!("index {index}"),
        Answer::Values(values) => format!("{} values", values.len()),
        Answer::TimedOut(told) => format!("timed out: {told}"),
        Answer::GivenUp(told) => format!("given up: {told}"),
        Answer::Done => "done".into(),
        Answer::Refused(refusal) => format!("refused: {refusal}"),
    }
}

fn check(steps: impl IntoIterator<Item = Step>, expected: &Expect) -> Script {
    let mut script = board();
    for step in steps {
        script.step(&step);
    }
    expected.assert_eq(&(script.told.join("\n") + "\n"));
    script
}

fn script(first: Vec<Step>, then: &[Step]) -> Vec<Step> {
    first.into_iter().chain(then.iter().cloned()).collect()
}
