//! What a supervisor needs of processes: a tree for each task, and the end of whoever has left one.
//!
//! Handed in, so that the same supervisor runs real programs on a host and scripts in a simulation. What is done and when is
//! decided by the machine of a task; nothing here knows of leases, queues or logs.

use std::{fmt, fs::OpenOptions, future::Future, io, os::fd::OwnedFd, path::PathBuf, pin::Pin, sync::Arc};

use millstream_common::{
    id::TaskId,
    outcome::{Exit, LeakedProcess, Reason},
    spec::ResourceLimits,
};

use super::{
    SupervisorConfig,
    attendant::told_in_full,
    cgroup::{self, Hierarchies, LimitGroups},
    tree::Tree,
};
pub use super::{
    attendant::OutputEnds,
    process::{Launch, StartFailure, Step},
    task::Refusal,
};
use crate::entry::Relaunch;

/// Something that a tree does in its own time.
pub type Doing<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Where the processes of tasks come from.
pub trait Processes: Send + Sync + fmt::Debug {
    /// Makes the place in which all phases of a task run. Nothing runs in it yet. What is printed goes to `outputs`, which
    /// the tree lets go of when it is ended.
    ///
    /// # Errors
    /// When there can be no such place, in the words of a task's record.
    fn tree(
        &self,
        task: TaskId,
        limits: &ResourceLimits,
        outputs: OutputEnds,
    ) -> Result<Box<dyn ProcessTree>, Refusal>;

    /// Kills every process that bears the mark of such a task, wherever it has gone, and names it. The mark is the value of
    /// `MILLSTREAM_TASK`.
    fn end_marked(&self, is_ours: &dyn Fn(&str) -> bool) -> Vec<LeakedProcess>;
}

/// The process tree of one task: its phases run in it one after another, and it ends as a whole.
pub trait ProcessTree: Send + Sync + fmt::Debug {
    /// Makes the process of a phase; that it could not be made may also be told by [`ProcessTree::next`].
    fn start<'a>(&'a mut self, launch: &'a Launch) -> Doing<'a, Result<Started, Refusal>>;

    /// Lets a held process begin its program.
    fn let_go(&mut self) -> Doing<'_, ()>;

    /// Sends a signal to the processes of the running phase. The error is what the system says to a signal that is none.
    fn signal(&mut self, signal: i32) -> Doing<'_, io::Result<()>>;

    /// The next thing that happens by itself; never, while no phase runs.
    ///
    /// # Cancel safety
    /// Safe: what has happened and was not told is told next time.
    fn next(&mut self) -> Doing<'_, Happened>;

    /// Ends every process of the tree and lets go of the outputs.
    fn end(&mut self) -> Doing<'_, Ended>;

    /// Whether a process of the tree has been ended for taking too much memory.
    fn out_of_memory(&self) -> bool;

    /// Removes what limited the tree, once nobody is left in it.
    fn remove_limits(&mut self);
}

/// What happens in a tree by itself.
#[derive(Debug)]
pub enum Happened {
    /// The process of the phase exists.
    Started {
        /// Its number.
        pid: u32,
    },
    /// No process could be made.
    NotStarted(Refusal),
    /// The process of the phase has ended.
    Exited {
        /// How.
        exit: Exit,
        /// Why it could not even begin its program.
        failure: Option<StartFailure>,
    },
}

/// Whether a start is known already.
#[derive(Debug)]
pub enum Started {
    /// The process exists.
    Now(u32),
    /// It will be told as something that happened.
    ToldLater,
}

/// What came of ending a tree.
#[derive(Debug, Default)]
pub struct Ended {
    /// How the process of the phase ended, if it had not before.
    pub exit: Option<Exit>,
    /// Processes that were left after the last phase; the first few.
    pub leaked: Vec<LeakedProcess>,
    /// Number of all of them.
    pub leaked_count: u32,
    /// Those that could not be ended.
    pub survivors: u32,
    /// Whether somebody may be left of whom nothing is known here.
    pub uncertain: bool,
}

/// The processes of this host: in control groups where there are some of version 2, else under shims.
#[derive(Debug)]
pub struct HostProcesses {
    relaunch: Relaunch,
    /// The session's control group.
    group: Option<PathBuf>,
    hierarchies: Hierarchies,
    null: Arc<OwnedFd>,
}

impl HostProcesses {
    /// What a supervisor with this configuration starts.
    ///
    /// # Errors
    /// When `/dev/null` cannot be opened.
    pub fn new(config: &SupervisorConfig) -> io::Result<Self> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        Ok(Self {
            relaunch: config.relaunch.clone(),
            group: config.session_cgroup(),
            hierarchies: Hierarchies::find(),
            null: Arc::new(null.into()),
        })
    }
}

impl Processes for HostProcesses {
    fn tree(
        &self,
        task: TaskId,
        limits: &ResourceLimits,
        outputs: OutputEnds,
    ) -> Result<Box<dyn ProcessTree>, Refusal> {
        let exhausted = |what: &str, error: &dyn fmt::Display| Refusal {
            reason: Reason::HostExhausted,
            detail: format!("failed to {what}: {error}"),
        };
        let (name, null) = (task.short(), Arc::clone(&self.null));
        let mut tree = match &self.group {
            Some(session) => Tree::in_group(session.join(format!("t-{name}")), outputs, null)
                .map_err(|error| exhausted("contain the task", &told_in_full(&error)))?,
            None => Tree::under_shim(&self.relaunch, outputs, null)
                .map_err(|error| exhausted("start the shim of the task", &error))?,
        };
        let legacy = LimitGroups::name_of(task);
        let groups =
            LimitGroups::create(&self.hierarchies, tree.group(), &legacy, limits).map_err(|error| {
                Refusal {
                    reason: Reason::LimitsUnavailable,
                    detail: format!("the limits of the block cannot be set: {}", told_in_full(&error)),
                }
            })?;
        tree.limit(groups);
        Ok(Box::new(tree))
    }

    fn end_marked(&self, is_ours: &dyn Fn(&str) -> bool) -> Vec<LeakedProcess> {
        let found = cgroup::find_marked(is_ours).into_iter();
        found
            .map(|(process, described)| {
                // It may have ended by itself, or be another user's now: it is told in either case.
                let _refused: io::Result<()> = process.kill();
                described
            })
            .collect()
    }
}
