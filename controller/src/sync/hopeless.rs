//! Which waits can still end well: the count of who can come, kept up to date, and the search for circles. Pure.
//!
//! A task can *act* when it does not wait and no task ahead of it in its stream does. A wait can *end well* when enough
//! parties are there and enough tasks that can act are left; the tasks that it holds can then act too. What is not
//! reached that way from what can act now will never end. The count answers most questions without any search: while
//! even the neediest wait needs no more than can act, nothing is hopeless.
//!
//! A task that *listens* (a subscription that has seen everything) may only be waiting, or do something else meanwhile:
//! nobody can tell. So it is still counted as one that can act, for every wait but its own: what it listens to ends when
//! nobody outside its own stream is left who could publish.
//!
//! Knows no names of tasks for people, no clock and no decision: it says which waits, and which tasks stand in the way.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use millstream_common::id::{BarrierName, TaskId};

/// A wait: the open meeting of a barrier, or one call that waits for a topic. Numbers are the owner's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wait {
    /// The meeting at the barrier with this number.
    Barrier(usize),
    /// A call that waits for a topic.
    Topic(u64),
}

/// What the search found, most certain first: when [`Finding::absent`] is not empty, only those are to be ended before
/// asking again, because whoever they held may then act.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Finding {
    /// Waits for which too few tasks are left, however the others end.
    pub absent: Vec<Wait>,
    /// Waits that hold each other, as a circle: each with a task that it needs and by which next wait that is held.
    pub circle: Vec<Link>,
}

/// One step of a circle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// This wait...
    pub wait: Wait,
    /// ...needs this task...
    pub needs: TaskId,
    /// ...which waits there itself, or is queued behind a task that does...
    pub behind: Option<TaskId>,
    /// ...in this wait, the next of the circle.
    pub held_by: Wait,
}

/// Who can enter what.
#[derive(Debug, Default, Clone)]
struct Counts {
    /// Tasks.
    all: usize,
    /// Tasks that may enter any barrier.
    any: usize,
    /// Tasks that enter only some barriers, by barrier.
    named: BTreeMap<BarrierName, usize>,
}

impl Counts {
    fn add(&mut self, joins: Option<&BTreeSet<BarrierName>>) {
        self.all += 1;
        match joins {
            None => self.any += 1,
            Some(names) => names.iter().for_each(|name| *self.named.entry(name.clone()).or_default() += 1),
        }
    }

    fn remove(&mut self, joins: Option<&BTreeSet<BarrierName>>) {
        self.all -= 1;
        match joins {
            None => self.any -= 1,
            Some(names) => {
                for name in names {
                    if let Some(count) = self.named.get_mut(name) {
                        *count -= 1;
                        if *count == 0 {
                            self.named.remove(name);
                        }
                    }
                }
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        self.all += other.all;
        self.any += other.any;
        for (name, count) in &other.named {
            *self.named.entry(name.clone()).or_default() += count;
        }
    }

    fn separate(&mut self, other: &Self) {
        self.all -= other.all;
        self.any -= other.any;
        for (name, count) in &other.named {
            if let Some(mine) = self.named.get_mut(name) {
                *mine -= count;
                if *mine == 0 {
                    self.named.remove(name);
                }
            }
        }
    }

    fn able(&self, wanted: &Wanted) -> usize {
        match &wanted.barrier {
            None => self.all,
            Some(name) => self.any + self.named.get(name).copied().unwrap_or(0),
        }
    }
}

/// Unfinished tasks of one stream, in order.
#[derive(Debug, Default)]
struct Line {
    tasks: BTreeMap<u64, TaskId>,
    /// Position of the last task that was heard: those before it are over, even if their end is not yet known here.
    front: u64,
    /// Tasks from `front` on.
    counts: Counts,
    /// Waits of the task at `front`.
    waits: Vec<Wait>,
}

#[derive(Debug)]
struct Member {
    line: usize,
    position: u64,
    joins: Option<BTreeSet<BarrierName>>,
}

/// What a wait needs.
#[derive(Debug)]
struct Wanted {
    /// Name of the barrier; none for a topic.
    barrier: Option<BarrierName>,
    /// Parties or values that are missing, as a number of tasks that must act.
    need: usize,
    /// A break point keeps it open: whatever it holds may go on when a person says so.
    held: bool,
    /// Tasks that it holds, or the one that listens.
    members: Vec<TaskId>,
    /// It holds nobody.
    listens: bool,
}

/// The unfinished tasks of a scope and the waits that hold them.
#[derive(Debug, Default)]
pub struct Prospects {
    members: HashMap<TaskId, Member>,
    lines: Vec<Line>,
    /// Of all lines that nothing holds.
    free: Counts,
    /// Of all lines.
    total: Counts,
    waits: BTreeMap<Wait, Wanted>,
    by_need: BTreeSet<(usize, Wait)>,
    /// Those that hold nobody. Each needs one task that can act.
    listening: BTreeSet<Wait>,
}

impl Prospects {
    /// A task was put behind the others of its stream; `line` numbers the streams from 0.
    pub fn task_came(
        &mut self,
        task: TaskId,
        line: usize,
        position: u64,
        joins: Option<BTreeSet<BarrierName>>,
    ) {
        while self.lines.len() <= line {
            self.lines.push(Line::default());
        }
        let place = &mut self.lines[line];
        if place.tasks.insert(position, task).is_some() || position < place.front {
            return;
        }
        place.counts.add(joins.as_ref());
        self.total.add(joins.as_ref());
        if place.waits.is_empty() {
            self.free.add(joins.as_ref());
        }
        self.members.insert(task, Member { line, position, joins });
    }

    /// A task was heard: those ahead of it in its stream are over.
    pub fn task_spoke(&mut self, task: TaskId) {
        let Some(member) = self.members.get(&task) else { return };
        let place = &mut self.lines[member.line];
        if member.position <= place.front {
            return;
        }
        if place.waits.is_empty() {
            self.free.separate(&place.counts);
        }
        self.total.separate(&place.counts);
        for passed in place.tasks.range(place.front..member.position).map(|(_, task)| task) {
            place.counts.remove(self.members[passed].joins.as_ref());
        }
        place.front = member.position;
        place.waits.clear();
        self.free.merge(&place.counts);
        self.total.merge(&place.counts);
    }

    /// A task ended.
    pub fn task_ended(&mut self, task: TaskId) {
        let Some(member) = self.members.remove(&task) else { return };
        let place = &mut self.lines[member.line];
        place.tasks.remove(&member.position);
        if member.position < place.front {
            return;
        }
        if place.waits.is_empty() {
            self.free.separate(&place.counts);
        }
        self.total.separate(&place.counts);
        place.counts.remove(member.joins.as_ref());
        if member.position == place.front {
            place.waits.clear();
        }
        self.total.merge(&place.counts);
        if place.waits.is_empty() {
            self.free.merge(&place.counts);
        }
    }

    /// A wait is open and needs so many tasks to act. `barrier` is its name, or none for a topic.
    pub fn wait_needs(&mut self, wait: Wait, barrier: Option<&BarrierName>, need: usize, held: bool) {
        let wanted = self.waits.entry(wait).or_insert_with(|| Wanted {
            barrier: barrier.cloned(),
            need: 0,
            held: false,
            members: Vec::new(),
            listens: false,
        });
        self.by_need.remove(&(wanted.need, wait));
        wanted.need = need;
        wanted.held = held;
        self.by_need.insert((need, wait));
    }

    /// A task waits there. After [`Self::wait_needs`].
    pub fn task_waits(&mut self, task: TaskId, wait: Wait) {
        self.task_spoke(task);
        let Some(wanted) = self.waits.get_mut(&wait) else { return };
        wanted.members.push(task);
        let Some(member) = self.members.get(&task) else { return };
        let place = &mut self.lines[member.line];
        if member.position != place.front {
            return;
        }
        if place.waits.is_empty() {
            self.free.separate(&place.counts);
        }
        place.waits.push(wait);
    }

    /// Somebody listens for a value, and may do something else meanwhile; none: it is not a task.
    pub fn listener_came(&mut self, wait: Wait, task: Option<TaskId>) {
        if let Some(task) = task {
            self.task_spoke(task);
        }
        let members = task.into_iter().collect();
        self.waits.insert(wait, Wanted { barrier: None, need: 1, held: false, members, listens: true });
        self.listening.insert(wait);
    }

    /// A task does not wait there any more, while the wait goes on.
    pub fn task_left(&mut self, task: TaskId, wait: Wait) {
        if let Some(wanted) = self.waits.get_mut(&wait)
            && let Some(place) = wanted.members.iter().position(|&member| member == task)
        {
            wanted.members.swap_remove(place);
            self.unhold(task, wait);
        }
    }

    /// A wait is over: whoever it held can act.
    pub fn wait_ended(&mut self, wait: Wait) {
        let Some(wanted) = self.waits.remove(&wait) else { return };
        if wanted.listens {
            self.listening.remove(&wait);
            return;
        }
        self.by_need.remove(&(wanted.need, wait));
        for task in wanted.members {
            self.unhold(task, wait);
        }
    }

    fn unhold(&mut self, task: TaskId, wait: Wait) {
        let Some(member) = self.members.get(&task) else { return };
        let place = &mut self.lines[member.line];
        if member.position != place.front {
            return;
        }
        if let Some(at) = place.waits.iter().position(|&held| held == wait) {
            place.waits.swap_remove(at);
            if place.waits.is_empty() {
                self.free.merge(&place.counts);
            }
        }
    }

    /// Unfinished tasks that could enter this barrier, or publish, if nothing held them, less those that it holds.
    #[must_use]
    pub fn left_for(&self, wait: Wait) -> usize {
        self.waits.get(&wait).map_or(0, |wanted| self.potential(wanted))
    }

    /// Unfinished tasks in order, with whether they may enter this barrier.
    pub fn unfinished<'a>(&'a self, barrier: &'a BarrierName) -> impl Iterator<Item = (TaskId, bool)> + 'a {
        let may = move |task: &TaskId| {
            self.members
                .get(task)
                .is_some_and(|member| member.joins.as_ref().is_none_or(|names| names.contains(barrier)))
        };
        self.lines
            .iter()
            .flat_map(|line| line.tasks.range(line.front..).map(|(_, task)| task))
            .map(move |task| (*task, may(task)))
    }

    /// Looks for waits that cannot end well. `main_can_help` says whether main can still send whoever is missing.
    #[must_use]
    pub fn search(&self, main_can_help: impl Fn(Option<&BarrierName>) -> bool) -> Finding {
        let neediest = self.by_need.last().map_or(0, |&(need, _)| need);
        if neediest <= self.free.any && self.listeners_are_served() {
            return Finding::default();
        }
        let stuck = self.stuck(&main_can_help);
        if stuck.is_empty() {
            return Finding::default();
        }
        let absent: Vec<Wait> = stuck
            .iter()
            .copied()
            .filter(|wait| self.potential(&self.waits[wait]) < self.waits[wait].need)
            .collect();
        let circle = if absent.is_empty() { self.circle(&stuck) } else { Vec::new() };
        Finding { absent, circle }
    }

    /// Whether it is plain that somebody is left for every listener: of two lines that can act, one is another's.
    fn listeners_are_served(&self) -> bool {
        let can_act = |line: &&Line| line.waits.is_empty() && line.counts.all > 0;
        self.listening.is_empty() || self.lines.iter().filter(can_act).take(2).count() == 2
    }

    /// The line of whoever listens there, if it is a task that has not been passed.
    fn line_of_listener(&self, wanted: &Wanted) -> Option<&Line> {
        let member = wanted.members.first().filter(|_| wanted.listens)?;
        let member = self.members.get(member)?;
        let line = &self.lines[member.line];
        (member.position == line.front).then_some(line)
    }

    /// Waits that are not reached from what can act now.
    fn stuck(&self, main_can_help: &impl Fn(Option<&BarrierName>) -> bool) -> BTreeSet<Wait> {
        let mut able = self.free.clone();
        let listening = self.listening.iter().copied();
        let mut open: Vec<Wait> = self.by_need.iter().map(|&(_, wait)| wait).chain(listening).collect();
        let mut ended: HashSet<Wait> = HashSet::new();
        loop {
            let before = open.len();
            open.retain(|&wait| {
                let wanted = &self.waits[&wait];
                let own = self
                    .line_of_listener(wanted)
                    .filter(|line| line.waits.iter().all(|held| ended.contains(held)))
                    .map_or(0, |line| line.counts.all);
                let ends = wanted.held
                    || able.able(wanted) - own >= wanted.need
                    || main_can_help(wanted.barrier.as_ref());
                if ends {
                    ended.insert(wait);
                    for line in self.lines_held_by(wanted, wait) {
                        if line.waits.iter().all(|held| ended.contains(held)) {
                            able.merge(&line.counts);
                        }
                    }
                }
                !ends
            });
            if open.is_empty() || open.len() == before {
                return open.into_iter().collect();
            }
        }
    }

    /// Lines that this wait holds, each once.
    fn lines_held_by<'a>(&'a self, wanted: &'a Wanted, wait: Wait) -> impl Iterator<Item = &'a Line> {
        let mut seen = HashSet::new();
        wanted.members.iter().filter_map(move |task| {
            let member = self.members.get(task)?;
            let line = &self.lines[member.line];
            let holds = member.position == line.front && line.waits.contains(&wait);
            (holds && seen.insert(member.line)).then_some(line)
        })
    }

    /// Tasks that could act for this wait if nothing held them.
    fn potential(&self, wanted: &Wanted) -> usize {
        if wanted.listens {
            return self.total.all - self.line_of_listener(wanted).map_or(0, |line| line.counts.all);
        }
        let mut seen = HashSet::new();
        let inside = wanted.members.iter().filter(|task| {
            self.members.get(*task).is_some_and(|member| {
                let counted = member.position >= self.lines[member.line].front;
                let joins = match (&wanted.barrier, &member.joins) {
                    (Some(name), Some(names)) => names.contains(name),
                    _ => true,
                };
                counted && joins && seen.insert(**task)
            })
        });
        self.total.able(wanted) - inside.count()
    }

    /// Follows who needs whom until it comes back to where it was.
    fn circle(&self, stuck: &BTreeSet<Wait>) -> Vec<Link> {
        let Some(&start) = stuck.first() else { return Vec::new() };
        let mut path: Vec<Link> = Vec::new();
        let mut at = start;
        loop {
            let Some(link) = self.next_link(at, stuck) else { return Vec::new() };
            let next = link.held_by;
            path.push(link);
            if let Some(begin) = path.iter().position(|link| link.wait == next) {
                return path.split_off(begin);
            }
            at = next;
        }
    }

    /// A task that this wait needs and another one holds; one that is queued behind its own parties if there is none.
    fn next_link(&self, wait: Wait, stuck: &BTreeSet<Wait>) -> Option<Link> {
        let wanted = &self.waits[&wait];
        let inside: HashSet<TaskId> = wanted.members.iter().copied().collect();
        let mut own = None;
        for line in &self.lines {
            let Some(&held_by) = line.waits.iter().find(|held| stuck.contains(held)) else { continue };
            let Some((_, &front)) = line.tasks.range(line.front..).next() else { continue };
            let mut candidates = line.tasks.range(line.front..).map(|(_, task)| *task);
            let may = |task: &TaskId| match (&wanted.barrier, &self.members[task].joins) {
                (Some(name), Some(names)) => names.contains(name),
                _ => true,
            };
            let Some(needs) = candidates.find(|task| !inside.contains(task) && may(task)) else { continue };
            let link = Link { wait, needs, behind: (needs != front).then_some(front), held_by };
            if held_by != wait {
                return Some(link);
            }
            own.get_or_insert(link);
        }
        own
    }
}
