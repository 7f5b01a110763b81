//! A process tree in a control group: born in it, limited by it, ended by it.
//!
//! Containing a tree and limiting it are two capabilities. Containing needs version 2 alone, wherever it is mounted, and
//! none of its controllers; limiting uses the controllers of version 2 where they are, else those of version 1, else it
//! is refused. Nothing here knows what a task is.

pub(crate) mod claim;
pub(crate) mod home;
mod limits;
mod marked;
#[cfg(test)]
mod tests;

use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use millstream_common::limits::SESSION_TASKS_COUNT_MAX;
use rustix::{
    fs::{Mode, OFlags},
    process::Signal,
};
use tokio::io::Interest;

pub(crate) use self::{
    limits::{LimitGroups, open_join},
    marked::{describe, find_marked, mark_of},
};
use super::{kernel::kernel, process::watch, stranger::Stranger};

/// Processes that are named in a record; all are counted.
pub(crate) const LEAKED_NAMED_MAX: usize = 64;
/// How often a group is read and its processes are killed one by one, on kernels that cannot kill a group.
const KILL_PASSES_MAX: usize = 1_000;

/// Where this process stands in the control groups of its host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hierarchies {
    /// Directory of our own group of version 2, or of the one that we were told to use instead, where processes can be born
    /// in groups.
    pub(crate) unified: Option<PathBuf>,
    /// Directories of our own groups of version 1: memory, pids, cpu.
    memory: Option<PathBuf>,
    pids: Option<PathBuf>,
    cpu: Option<PathBuf>,
}

/// How trees are limited on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitsSource {
    /// By controllers of version 2.
    Unified,
    /// By controllers of version 1.
    Legacy,
    /// Not at all.
    None,
}

/// Why a tree cannot be contained or limited.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GroupError {
    /// A file or directory of a group.
    #[error("cannot {attempt} `{}`", path.display())]
    File {
        /// What was attempted.
        attempt: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No controller for what was asked.
    #[error("this host offers no control group that limits {what}")]
    Unavailable {
        /// What is to be limited.
        what: &'static str,
    },
}

fn failed(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GroupError {
    move |source| GroupError::File { attempt, path: path.to_owned(), source }
}

impl Hierarchies {
    /// Asks the system.
    #[must_use]
    pub fn find() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let mounts = read("/proc/self/mountinfo");
        let mut found = Self::parse(&mounts, &read("/proc/self/cgroup"));
        found.unified = home::told(&mounts).or(found.unified).filter(|path| is_writable(path));
        if !kernel().has_births_in_groups {
            found.unified = None;
        }
        for group in [&mut found.memory, &mut found.pids, &mut found.cpu] {
            *group = group.take().filter(|path| is_writable(path));
        }
        found
    }

    fn parse(mounts: &str, memberships: &str) -> Self {
        let mut found = Self::default();
        for mount in mounts.lines().filter_map(Mount::parse) {
            let own = |controller: &str| {
                let path = memberships.lines().find_map(|line| membership(line, controller))?;
                mount.directory_of(path)
            };
            match mount.kind {
                "cgroup2" => found.unified = found.unified.or_else(|| own("")),
                "cgroup" => {
                    let has = |controller| mount.options.split(',').any(|option| option == controller);
                    for (controller, group) in
                        [("memory", &mut found.memory), ("pids", &mut found.pids), ("cpu", &mut found.cpu)]
                    {
                        if group.is_none() && has(controller) {
                            *group = own(controller);
                        }
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Whether trees can be contained by a group.
    #[must_use]
    pub fn can_contain(&self) -> bool {
        self.unified.is_some()
    }

    /// How trees can be limited.
    #[must_use]
    pub fn limits_source(&self) -> LimitsSource {
        let has_all = |path: &PathBuf| {
            let offered = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
            ["memory", "pids", "cpu"]
                .iter()
                .all(|wanted| offered.split_whitespace().any(|word| word == *wanted))
        };
        if self.unified.as_ref().is_some_and(has_all) {
            LimitsSource::Unified
        } else if self.memory.is_some() || self.pids.is_some() || self.cpu.is_some() {
            LimitsSource::Legacy
        } else {
            LimitsSource::None
        }
    }
}

/// One line of `/proc/self/mountinfo`.
struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, _source, options) = (right.next()?, right.next()?, right.next().unwrap_or_default());
        Some(Self { root, point, kind, options })
    }

    /// Where the group with this path is found under this mount, if it is.
    fn directory_of(&self, path: &str) -> Option<PathBuf> {
        let below = if self.root == "/" { path } else { path.strip_prefix(self.root)? };
        Some(Path::new(self.point).join(below.trim_start_matches('/')))
    }
}

/// The path of our group for a controller, or for version 2 when it is empty, in one line of `/proc/self/cgroup`.
fn membership<'a>(line: &'a str, controller: &str) -> Option<&'a str> {
    let mut fields = line.splitn(3, ':');
    let (_number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let is_ours = if controller.is_empty() {
        controllers.is_empty()
    } else {
        controllers.split(',').any(|name| name == controller)
    };
    is_ours.then_some(path)
}

fn is_writable(directory: &Path) -> bool {
    rustix::fs::access(directory, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).is_ok()
}

/// A group of version 2 that holds one tree.
#[derive(Debug)]
pub(crate) struct Group {
    path: PathBuf,
    directory: OwnedFd,
}

impl AsFd for Group {
    /// What a process is born into.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Group {
    /// Makes the group; one that is there already is taken over.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn create(path: PathBuf) -> Result<Self, GroupError> {
        match rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(failed("make control group", &path)(error.into())),
        }
        Self::open(path)
    }

    /// Opens a group that is there.
    ///
    /// # Errors
    /// When it is not.
    pub(crate) fn open(path: PathBuf) -> Result<Self, GroupError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|error| failed("open control group", &path)(error.into()))?;
        Ok(Self { path, directory })
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the group if nobody lives in it, and tells whether it is gone: the quickest way to ask.
    pub(crate) fn remove_if_empty(&self) -> bool {
        match rustix::fs::rmdir(&self.path) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => true,
            Err(_) => false,
        }
    }

    /// Who lives in the group and in those that the block has made below it.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut found = Vec::new();
        for directory in self.with_descendants() {
            let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            found.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|&pid| pid != 0));
        }
        found
    }

    /// The group's directory and those below, parents first.
    fn with_descendants(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = found.get(next).cloned() {
            next += 1;
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            found.extend(below.map(|entry| entry.path()));
            if found.len() > SESSION_TASKS_COUNT_MAX {
                break;
            }
        }
        found
    }

    /// Kills all who live in the group, at once and without any chance to escape by forking.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn kill(&self) -> Result<(), GroupError> {
        let path = self.path.join("cgroup.kill");
        match fs::OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write_all(b"1")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.kill_one_by_one();
                Ok(())
            }
            other => other.map_err(failed("kill the processes of", &path)),
        }
    }

    /// For kernels before 5.14. Bounded: who forks faster than this is left to be reported.
    fn kill_one_by_one(&self) {
        for _ in 0..KILL_PASSES_MAX {
            if self.signal(Signal::KILL) == 0 {
                return;
            }
        }
    }

    /// Sends a signal to each who lives in the group now, and tells how many they were.
    pub(crate) fn signal(&self, signal: Signal) -> usize {
        let processes = self.processes();
        for &pid in &processes {
            let Some(process) = Stranger::find(pid) else { continue };
            // It is still the one that was listed only if it is listed now that it is held.
            if self.processes().contains(&pid) {
                // Who cannot be killed is looked at again, and reported in the end.
                let _refused: io::Result<()> = process.signal(signal);
            }
        }
        processes.len()
    }

    /// Waits until nobody lives in the group, at most `patience`, and tells whether that is so.
    ///
    /// # Errors
    /// When the group's events cannot be read.
    ///
    /// # Cancel safety
    /// Safe: it changes nothing.
    pub(crate) async fn wait_until_empty(&self, patience: Duration) -> Result<bool, GroupError> {
        let path = self.path.join("cgroup.events");
        let file = match fs::File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            other => other.map_err(failed("open", &path))?,
        };
        let events = watch(file, Interest::PRIORITY).map_err(failed("watch", &path))?;
        let watching = async {
            loop {
                // Reading arms the next notification, so that none is lost between the two.
                if !is_populated(events.get_ref()).map_err(failed("read", &path))? {
                    return Ok(true);
                }
                let mut changed = events.ready(Interest::PRIORITY).await.map_err(failed("watch", &path))?;
                changed.clear_ready();
            }
        };
        tokio::time::timeout(patience, watching).await.unwrap_or(Ok(false))
    }

    /// Removes the group with those that the block has made below it.
    ///
    /// # Errors
    /// When somebody lives in it.
    pub(crate) fn remove(&self) -> Result<(), GroupError> {
        for directory in self.with_descendants().iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove control group", directory)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn is_populated(mut file: &fs::File) -> io::Result<bool> {
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text.lines().any(|line| line == "populated 1"))
}
