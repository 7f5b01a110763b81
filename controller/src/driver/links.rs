//! What links say, and what it means for queues and tasks.

use std::sync::Arc;

use millstream_common::{
    id::TaskId,
    outcome::{OutcomeKind, Phase, Reason, TaskEnd},
};

use super::{Driver, LinkPhase, advance, together};
use crate::{
    link::{Order, Report},
    outcome::CausedBy,
    queue::Event,
    streams::StreamShared,
    task::Stage,
};

impl Driver {
    pub(super) fn link_said(&mut self, link: usize, report: Report) {
        match report {
            // Crossed with the order to close the session: what is said of it concerns nobody any more.
            Report::Opened(_)
            | Report::Suspended
            | Report::Resumed
            | Report::Lost { .. }
            | Report::InLine { .. }
                if self.links[link].phase == LinkPhase::Closing => {}
            Report::Opened(opened) => {
                self.links[link].opened = *opened;
                self.topology = None;
                self.links[link].enter(LinkPhase::Up, self.setup.world.clock.now());
                self.links[link].lost = None;
                for stream in self.links[link].streams.clone() {
                    self.write_stream(stream);
                }
                if self.together.awaited(link).is_some() {
                    self.take_on(together::Event::Had { link });
                } else {
                    self.feed_all(link, Event::SessionOpened);
                }
            }
            Report::Suspended => self.session_changed(link, LinkPhase::Suspended, Event::SessionSuspended),
            Report::Resumed => self.session_changed(link, LinkPhase::Up, Event::SessionResumed),
            Report::Lost { why, reason } => self.lost(link, why, reason),
            Report::AttemptFailed { why } => self.links[link].trouble = Some(why),
            Report::InLine { why } => self.links[link].stand_in_line(why, self.setup.world.clock.now()),
            Report::Clock(clock) => self.links[link].opened.clock = clock,
            Report::Uploaded { task, result } => self.uploaded(task, result),
            Report::Accepted { task } => self.of_task(task, |number| Event::Accepted { number }),
            Report::Rejected { task, reason, why } => {
                let end = TaskEnd::never_begun(OutcomeKind::Error, reason, why);
                self.complete(task, end, None);
                self.of_task(task, |number| Event::Rejected { number });
            }
            Report::Staged { task } => self.staged(task),
            Report::Began { task, phase, time_ns } => self.began(task, link, phase, time_ns),
            Report::Ended { task, end } => self.ended(task, *end),
            Report::Arrived { task, problem } => {
                if let Some(end) = self.works.get_mut(&task).and_then(|work| work.end.take()) {
                    self.complete(task, end, problem);
                }
                self.links[link].link.order(Order::Release { task });
            }
            Report::Closed { left_behind, for_good } => {
                if for_good {
                    self.links[link].enter(LinkPhase::Closed, self.setup.world.clock.now());
                } else {
                    self.rested(link, &left_behind);
                }
                self.left_behind.extend(left_behind);
                if self.links.iter().all(|link| link.phase == LinkPhase::Closed) {
                    self.finish_remaining();
                }
            }
        }
    }

    pub(super) fn session_changed(&mut self, link: usize, phase: LinkPhase, event: Event) {
        self.links[link].enter(phase, self.setup.world.clock.now());
        // Queues that have not heard of the session yet are told where it stands when they may begin.
        if self.together.awaited(link).is_none() {
            self.feed_all(link, event);
        }
    }

    fn feed_all(&mut self, link: usize, event: Event) {
        for stream in self.links[link].streams.clone() {
            self.feed(stream, event);
        }
    }

    pub(super) fn lost(&mut self, link: usize, why: String, reason: Reason) {
        self.links[link].enter(LinkPhase::Idle, self.setup.world.clock.now());
        self.debug_line(&format!("{}: session lost: {why}", self.links[link].place));
        self.links[link].lost = Some((why.clone(), reason));
        let streams = self.links[link].streams.clone();
        // Tasks that had ended there: only what they left is missing.
        let ended: Vec<TaskId> = self
            .works
            .iter()
            .filter(|(_, work)| work.end.is_some() && streams.contains(&work.stream))
            .map(|(&task, _)| task)
            .collect();
        for task in ended {
            if let Some(end) = self.works.get_mut(&task).and_then(|work| work.end.take()) {
                self.complete(task, end, Some(why.clone()));
            }
        }
        // First, so that what is scheduled there from now on is not held back.
        self.take_on(together::Event::Failed { link });
        for stream in streams {
            self.feed(stream, Event::SessionLost);
        }
    }

    /// Begins to take hosts together, when the host of this link is one of several that are. True when it is asked for in its
    /// turn, and not now.
    pub(super) fn takes_together(&mut self, link: usize) -> bool {
        if self.together.awaited(link).is_some() {
            return true;
        }
        if self.together.has_begun() {
            return false;
        }
        let shared = Arc::clone(&self.setup.shared);
        let member = |stream: &Arc<StreamShared>| {
            shared.takes_together(stream) && !self.retired.contains_key(&stream.index)
        };
        let members: Vec<_> = shared.streams().into_iter().filter(member).collect();
        if members.iter().all(|stream| stream.reach().describe() != self.links[link].place) {
            return false;
        }
        let mut links: Vec<usize> = members.iter().map(|stream| self.link_of(stream)).collect();
        links.sort_by(|one, other| self.links[*one].place.cmp(&self.links[*other].place));
        links.dedup();
        // Those that are in use already cannot be taken in turn any more.
        links.retain(|link| self.links[*link].phase == LinkPhase::Idle);
        self.take_on(together::Event::Begun { links });
        true
    }

    pub(super) fn take_on(&mut self, event: together::Event) {
        let mut actions = Vec::new();
        self.together.handle(event, &mut actions);
        for action in actions {
            match action {
                together::Action::Ask { link } if self.is_left(link) => {
                    self.take_on(together::Event::Failed { link });
                }
                together::Action::Ask { link } => self.ask_for(link),
                together::Action::Begin { links } => {
                    for link in links {
                        for stream in self.links[link].streams.clone() {
                            self.connect(stream, link);
                        }
                    }
                }
            }
        }
    }

    pub(super) fn ask_for(&mut self, link: usize) {
        let now = self.setup.world.clock.now();
        self.links[link].enter(LinkPhase::Opening, now);
        self.links[link].link.order(Order::Connect);
    }

    pub(super) fn of_task(&mut self, task: TaskId, event: impl FnOnce(u32) -> Event) {
        let Some(work) = self.works.get(&task) else { return };
        let (stream, number) = (work.stream, work.shared.stream_number);
        self.feed(stream, event(number));
    }

    pub(super) fn uploaded(&mut self, task: TaskId, result: Result<(), String>) {
        if let Some(work) = self.works.get_mut(&task) {
            work.sending = None;
        }
        match result {
            Ok(()) => self.of_task(task, |number| Event::Prepared { number }),
            Err(why) => {
                let detail = format!("its files could not be brought to the host: {why}");
                let end = TaskEnd::never_begun(OutcomeKind::Error, Reason::FileRefused, detail);
                self.complete(task, end, None);
                self.of_task(task, |number| Event::Refused { number });
            }
        }
    }

    pub(super) fn staged(&mut self, task: TaskId) {
        if let Some(work) = self.works.get(&task) {
            advance(&work.shared, Stage::Staged);
        }
    }

    pub(super) fn began(&mut self, task: TaskId, link: usize, phase: Option<Phase>, time_ns: u64) {
        let Some(work) = self.works.get_mut(&task) else { return };
        work.phase = phase.map(|phase| (phase, self.setup.world.clock.now()));
        work.request = None;
        let time_ns = self.links[link].opened.clock.to_controller(time_ns);
        advance(&work.shared, Stage::Began { time_ns });
        let phase = phase.unwrap_or(Phase::Run);
        self.setup.sync.task_progress(task, format!("runs its phase {phase}"));
        self.of_task(task, |number| Event::Began { number });
    }

    pub(super) fn ended(&mut self, task: TaskId, mut end: TaskEnd) {
        if self.works.get(&task).is_none_or(|work| work.end.is_some() || work.finishing) {
            return;
        }
        self.settle_cause(task, &mut end);
        let Some(work) = self.works.get_mut(&task) else { return };
        // What follows another's failure cancels nobody: whoever failed has done so.
        let fails = !end.is_expected(work.shared.expectation) && !end.reason.is_consequence();
        let drains = work.drains && fails;
        let path = work.path();
        work.request = None;
        let number = work.shared.stream_number;
        let stream = work.stream;
        self.tell_end(task, &end);
        if let Some(work) = self.works.get_mut(&task) {
            work.end = Some(end);
        }
        if drains && let Some(state) = self.streams.get_mut(&stream) {
            state.drained_by = Some(CausedBy::new(task, path));
        }
        self.feed(stream, Event::Ended { number, drains });
    }
}
