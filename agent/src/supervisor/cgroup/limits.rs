//! Groups that limit one tree: of version 2 where its controllers are, else of version 1.

use std::{
    fs,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use millstream_common::{id::TaskId, spec::ResourceLimits};

use super::{Group, GroupError, Hierarchies, LimitsSource, claim, failed};

/// Period over which processor time is counted.
const CPU_PERIOD_US: u64 = 100_000;

/// Groups that limit one tree, besides the one that contains it.
#[derive(Debug, Default)]
pub(crate) struct LimitGroups {
    /// Directories that are removed in the end.
    pub(super) directories: Vec<PathBuf>,
    /// Where the number of kills for want of memory is found.
    memory_events: Option<PathBuf>,
}

impl LimitGroups {
    /// Sets the limits of one tree. `name` names new groups of version 1; `container` is the tree's own group.
    ///
    /// # Errors
    /// When the host cannot set one of them.
    pub(crate) fn create(
        hierarchies: &Hierarchies,
        container: Option<&Group>,
        name: &str,
        wanted: &ResourceLimits,
    ) -> Result<Self, GroupError> {
        let mut groups = Self::default();
        if wanted.is_none() {
            return Ok(groups);
        }
        let set = match (hierarchies.limits_source(), container) {
            (LimitsSource::Unified, Some(container)) => groups.set_unified(hierarchies, container, wanted),
            _ => groups.set_legacy(hierarchies, name, wanted),
        };
        match set {
            Ok(()) => Ok(groups),
            Err(error) => {
                groups.remove();
                Err(error)
            }
        }
    }

    fn set_unified(
        &mut self,
        hierarchies: &Hierarchies,
        container: &Group,
        wanted: &ResourceLimits,
    ) -> Result<(), GroupError> {
        let top = hierarchies.unified.as_deref().unwrap_or(Path::new("/"));
        // Controllers reach a group only through all of its ancestors.
        let above: Vec<_> =
            container.path().ancestors().skip(1).take_while(|ancestor| ancestor.starts_with(top)).collect();
        for directory in above.into_iter().rev() {
            write(&directory.join("cgroup.subtree_control"), "+memory +pids +cpu")?;
        }
        let at = |file: &str| container.path().join(file);
        if let Some(bytes) = wanted.memory_bytes {
            write(&at("memory.max"), &bytes.to_string())?;
            // The tree ends as one: half a tree is no result. Swap would only hide the limit.
            write(&at("memory.oom.group"), "1")?;
            let _no_swap: Result<(), _> = write(&at("memory.swap.max"), "0");
            self.memory_events = Some(at("memory.events"));
        }
        if let Some(count) = wanted.pids_count {
            write(&at("pids.max"), &count.to_string())?;
        }
        if let Some(millis) = wanted.cpu_millis {
            write(&at("cpu.max"), &format!("{} {CPU_PERIOD_US}", cpu_quota_us(millis)))?;
        }
        Ok(())
    }

    fn set_legacy(
        &mut self,
        hierarchies: &Hierarchies,
        name: &str,
        wanted: &ResourceLimits,
    ) -> Result<(), GroupError> {
        if let Some(bytes) = wanted.memory_bytes {
            let group = self.make(hierarchies.memory.as_deref(), name, "memory")?;
            write(&group.join("memory.limit_in_bytes"), &bytes.to_string())?;
            self.memory_events = Some(group.join("memory.oom_control"));
        }
        if let Some(count) = wanted.pids_count {
            let group = self.make(hierarchies.pids.as_deref(), name, "processes")?;
            write(&group.join("pids.max"), &count.to_string())?;
        }
        if let Some(millis) = wanted.cpu_millis {
            let group = self.make(hierarchies.cpu.as_deref(), name, "processor time")?;
            write(&group.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
            write(&group.join("cpu.cfs_quota_us"), &cpu_quota_us(millis).to_string())?;
        }
        Ok(())
    }

    fn make(&mut self, parent: Option<&Path>, name: &str, what: &'static str) -> Result<PathBuf, GroupError> {
        let path = parent.ok_or(GroupError::Unavailable { what })?.join(name);
        if !self.directories.contains(&path) {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed("make control group", &path)(error));
                }
                _ => self.directories.push(path.clone()),
            }
        }
        Ok(path)
    }

    /// Files by which a process enters the groups.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub(crate) fn joins(&self) -> Result<Vec<OwnedFd>, GroupError> {
        self.join_paths().iter().map(|path| open_join(path)).collect()
    }

    /// Paths of those files.
    pub(crate) fn join_paths(&self) -> Vec<PathBuf> {
        self.directories.iter().map(|directory| directory.join("cgroup.procs")).collect()
    }

    /// Whether a process of the tree was killed for want of memory.
    pub(crate) fn out_of_memory(&self) -> bool {
        let Some(path) = &self.memory_events else { return false };
        let events = fs::read_to_string(path).unwrap_or_default();
        events.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0")
    }

    /// How the groups of version 1 of a task are named.
    pub(crate) fn name_of(task: TaskId) -> String {
        format!("{}{}", claim::AGENT_GROUP, task.short())
    }

    /// Removes what a killed supervisor has left of the limits of one tree, by the name that it gave to [`Self::create`].
    pub(crate) fn remove_left(hierarchies: &Hierarchies, name: &str) {
        let own = [&hierarchies.memory, &hierarchies.pids, &hierarchies.cpu];
        for directory in own.into_iter().flatten().map(|own| own.join(name)) {
            match fs::remove_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %directory.display(), %error, "control group not removed");
                }
                _ => {}
            }
        }
    }

    /// Removes the groups; nobody may live in them any more.
    pub(crate) fn remove(&mut self) {
        for directory in self.directories.drain(..) {
            if let Err(error) = fs::remove_dir(&directory) {
                tracing::warn!(path = %directory.display(), %error, "control group not removed");
            }
        }
    }
}

/// Opens a file by which a process enters a group.
///
/// # Errors
/// When it cannot be opened.
pub(crate) fn open_join(path: &Path) -> Result<OwnedFd, GroupError> {
    let file = fs::OpenOptions::new().write(true).custom_flags(libc::O_CLOEXEC).open(path);
    file.map(OwnedFd::from).map_err(failed("open", path))
}

const fn cpu_quota_us(millis: u64) -> u64 {
    // The kernel takes no less than a thousandth of a second.
    let quota = millis.saturating_mul(CPU_PERIOD_US / 1_000);
    if quota < 1_000 { 1_000 } else { quota }
}

fn write(path: &Path, text: &str) -> Result<(), GroupError> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(failed("write to", path))
}
