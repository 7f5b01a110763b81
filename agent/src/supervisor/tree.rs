//! The process tree of one task: its phases are started in it, and it ends as a whole.
//!
//! Two ways to contain it, one behaviour: a control group of version 2, which costs no process, or a shim. What is done
//! and when is not decided here.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use millstream_common::{
    limits,
    outcome::{Exit, Reason},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest, unix::AsyncFd},
    net::UnixStream,
    process::Child,
};
use tracing::warn;

use super::{
    attendant::{OutputEnds, told_in_full},
    cgroup::{self, Group, GroupError, LEAKED_NAMED_MAX, LimitGroups},
    process::{Launch, Placement, Process, spawn, watch},
    processes::{Doing, Ended, Happened, ProcessTree, Started},
    shim::{self, Order, Told},
    task::Refusal,
};
use crate::entry::Relaunch;

/// The tree of one task.
#[derive(Debug)]
pub(crate) struct Tree {
    kind: Kind,
    /// Write ends of the outputs, for phases to come; gone once the tree is being ended.
    ends: Option<OutputEnds>,
    /// `/dev/null`, for reading and writing.
    null: Arc<OwnedFd>,
    /// What limits it besides its own group.
    groups: LimitGroups,
}

#[derive(Debug)]
enum Kind {
    Group { group: Group, process: Option<AsyncFd<Process>> },
    Shim { shim: Child, stream: UnixStream, buffer: Vec<u8>, running: bool, gone: bool },
}

impl Tree {
    /// A tree in a control group of its own.
    ///
    /// # Errors
    /// When the group cannot be made.
    pub(crate) fn in_group(path: PathBuf, ends: OutputEnds, null: Arc<OwnedFd>) -> Result<Self, GroupError> {
        let kind = Kind::Group { group: Group::create(path)?, process: None };
        Ok(Self { kind, ends: Some(ends), null, groups: LimitGroups::default() })
    }

    /// A tree under a shim.
    ///
    /// # Errors
    /// When the shim cannot be started.
    pub(crate) fn under_shim(relaunch: &Relaunch, ends: OutputEnds, null: Arc<OwnedFd>) -> io::Result<Self> {
        let (command, stream) = shim::command(relaunch, &ends)?;
        stream.set_nonblocking(true)?;
        let shim = tokio::process::Command::from(command).spawn()?;
        let stream = UnixStream::from_std(stream)?;
        let kind = Kind::Shim { shim, stream, buffer: Vec::new(), running: false, gone: false };
        // The shim holds the pipes now.
        drop(ends);
        Ok(Self { kind, ends: None, null, groups: LimitGroups::default() })
    }

    /// The control group that contains the tree, where there is one.
    pub(crate) fn group(&self) -> Option<&Group> {
        match &self.kind {
            Kind::Group { group, .. } => Some(group),
            Kind::Shim { .. } => None,
        }
    }

    /// Phases that are started from now on are limited by these groups, too.
    pub(crate) fn limit(&mut self, groups: LimitGroups) {
        self.groups = groups;
    }
}

impl ProcessTree for Tree {
    fn start<'a>(&'a mut self, launch: &'a Launch) -> Doing<'a, Result<Started, Refusal>> {
        Box::pin(async move {
            match &mut self.kind {
                Kind::Group { group, process } => {
                    let ends = self.ends.as_ref().ok_or_else(|| ended_already(launch))?;
                    let joins = self.groups.joins()?;
                    let channels = ends.channels(self.null.as_fd());
                    let placement = Placement { cgroup: Some(group.as_fd()), joins: &joins };
                    let made = spawn(launch, channels, placement).map_err(|error| error.refusal(launch))?;
                    let pid = made.pid();
                    let watched = watch(made, Interest::READABLE).map_err(|error| Refusal {
                        reason: Reason::HostExhausted,
                        detail: format!("the process of `{}` cannot be watched: {error}", launch.argv[0]),
                    })?;
                    *process = Some(watched);
                    Ok(Started::Now(pid))
                }
                Kind::Shim { stream, running, .. } => {
                    let order =
                        Order::Start { launch: Box::new(launch.clone()), joins: self.groups.join_paths() };
                    let sent = match shim::encode(&order) {
                        Ok(bytes) => stream.write_all(&bytes).await,
                        Err(error) => Err(error),
                    };
                    sent.map_err(|error| Refusal {
                        reason: Reason::Internal,
                        detail: format!("the shim of the task cannot be reached: {error}"),
                    })?;
                    *running = true;
                    Ok(Started::ToldLater)
                }
            }
        })
    }

    fn let_go(&mut self) -> Doing<'_, ()> {
        Box::pin(async move {
            match &mut self.kind {
                Kind::Group { process: Some(process), .. } => process.get_mut().let_go(),
                Kind::Group { process: None, .. } => {}
                Kind::Shim { stream, .. } => {
                    if let Err(error) = send(stream, &Order::Go).await {
                        // Its end is told by the next read.
                        warn!(%error, "a shim cannot be reached");
                    }
                }
            }
        })
    }

    fn signal(&mut self, signal: i32) -> Doing<'_, io::Result<()>> {
        Box::pin(async move {
            match &mut self.kind {
                Kind::Group { process: Some(process), .. } => process.get_ref().signal(signal),
                Kind::Group { process: None, .. } => Ok(()),
                Kind::Shim { stream, .. } => send(stream, &Order::Signal(signal)).await,
            }
        })
    }

    fn next(&mut self) -> Doing<'_, Happened> {
        Box::pin(async move {
            match &mut self.kind {
                Kind::Group { process, .. } => {
                    let Some(watched) = process else { return std::future::pending().await };
                    let exit = wait_for(watched).await;
                    let failure = watched.get_ref().failure();
                    *process = None;
                    Happened::Exited { exit, failure }
                }
                Kind::Shim { stream, buffer, running, gone, .. } => {
                    if *gone && !*running {
                        return std::future::pending().await;
                    }
                    loop {
                        let happened = match told(stream, buffer).await {
                            Some(Told::Started { pid }) => Happened::Started { pid },
                            Some(Told::NotStarted(refusal)) => {
                                *running = false;
                                Happened::NotStarted(refusal)
                            }
                            Some(Told::Exited { exit, failure }) => {
                                *running = false;
                                Happened::Exited { exit, failure }
                            }
                            // Only an answer, and nobody asked.
                            Some(Told::Ended { .. }) => continue,
                            None => {
                                *gone = true;
                                if !std::mem::take(running) {
                                    return std::future::pending().await;
                                }
                                // It was killed, and the process with it.
                                Happened::Exited { exit: Exit::Signal(libc::SIGKILL), failure: None }
                            }
                        };
                        return happened;
                    }
                }
            }
        })
    }

    fn end(&mut self) -> Doing<'_, Ended> {
        Box::pin(async move {
            self.ends = None;
            match &mut self.kind {
                Kind::Group { group, process } => end_group(group, process.take()).await,
                Kind::Shim { shim, stream, buffer, running, gone } => {
                    let mut ended = Ended { uncertain: *gone, ..Ended::default() };
                    if !*gone {
                        end_shim(stream, buffer, *running, &mut ended).await;
                    }
                    *running = false;
                    *gone = true;
                    // It ends when nobody talks to it any more; the runtime reaps it.
                    drop(stream.shutdown().await);
                    let ending = tokio::time::timeout(limits::KILL_MAX, shim.wait()).await;
                    if ending.is_err() {
                        ended.uncertain = true;
                    }
                    ended
                }
            }
        })
    }

    fn out_of_memory(&self) -> bool {
        self.groups.out_of_memory()
    }

    fn remove_limits(&mut self) {
        self.groups.remove();
    }
}

fn ended_already(launch: &Launch) -> Refusal {
    let detail = format!("`{}` cannot be started: the tree of the task is being ended", launch.argv[0]);
    Refusal { reason: Reason::Internal, detail }
}

async fn send(stream: &mut UnixStream, order: &Order) -> io::Result<()> {
    let bytes = shim::encode(order)?;
    stream.write_all(&bytes).await
}

/// The next thing a shim says; nothing when it is gone.
async fn told(stream: &mut UnixStream, buffer: &mut Vec<u8>) -> Option<Told> {
    loop {
        match shim::decode(buffer) {
            Ok(Some(told)) => return Some(told),
            Ok(None) => {}
            Err(error) => {
                warn!(%error, "a shim cannot be understood");
                return None;
            }
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

/// Waits for the end of a process and takes it in.
async fn wait_for(watched: &mut AsyncFd<Process>) -> Exit {
    loop {
        // Only a runtime that goes away makes this fail: then the answer reaches nobody.
        let Ok(mut ready) = watched.readable_mut().await else { return std::future::pending().await };
        match ready.get_inner_mut().reap() {
            Ok(Some(exit)) => return exit,
            Ok(None) => ready.clear_ready(),
            Err(error) => {
                warn!(%error, "a process cannot be waited for");
                return Exit::Signal(libc::SIGKILL);
            }
        }
    }
}

async fn end_group(group: &Group, process: Option<AsyncFd<Process>>) -> Ended {
    let mut ended = Ended::default();
    if process.is_none() {
        // The usual case costs one call: nobody is left.
        if group.remove_if_empty() {
            return ended;
        }
        let left = group.processes();
        ended.leaked = left.iter().take(LEAKED_NAMED_MAX).map(|&pid| cgroup::describe(pid)).collect();
        ended.leaked_count = u32::try_from(left.len()).unwrap_or(u32::MAX);
    }
    if let Err(error) = group.kill() {
        warn!(%error, "a control group cannot be killed");
    }
    if let Some(mut process) = process {
        ended.exit = tokio::time::timeout(limits::KILL_MAX, wait_for(&mut process)).await.ok();
    }
    match group.wait_until_empty(limits::KILL_MAX).await {
        Ok(true) => {}
        Ok(false) => {
            let left = group.processes();
            ended.survivors = u32::try_from(left.len()).unwrap_or(u32::MAX);
            if ended.leaked.is_empty() {
                ended.leaked = left.iter().take(LEAKED_NAMED_MAX).map(|&pid| cgroup::describe(pid)).collect();
                ended.leaked_count = ended.survivors;
            }
            return ended;
        }
        Err(error) => warn!(%error, "a control group cannot be watched"),
    }
    if let Err(error) = group.remove() {
        warn!(%error, "a control group is left behind");
    }
    ended
}

async fn end_shim(stream: &mut UnixStream, buffer: &mut Vec<u8>, mut running: bool, ended: &mut Ended) {
    let ending = async {
        if send(stream, &Order::End).await.is_err() {
            return false;
        }
        loop {
            match told(stream, buffer).await {
                Some(Told::Exited { exit, .. }) if running => {
                    running = false;
                    ended.exit = Some(exit);
                }
                Some(Told::Ended { leaked, leaked_count, survivors }) => {
                    (ended.leaked, ended.leaked_count, ended.survivors) = (leaked, leaked_count, survivors);
                    return true;
                }
                Some(_) => {}
                None => return false,
            }
        }
    };
    // Its own patience and a little for the way.
    let done = tokio::time::timeout(limits::KILL_MAX + limits::DRAIN_MAX, ending).await;
    ended.uncertain |= !done.unwrap_or(false);
}

/// Errors of groups are told with their cause.
impl From<GroupError> for Refusal {
    fn from(error: GroupError) -> Self {
        Self { reason: Reason::HostExhausted, detail: told_in_full(&error) }
    }
}
