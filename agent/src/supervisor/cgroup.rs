//! A process tree in a control group: born in it, limited by it, ended by it.
//!
//! Containing a tree and limiting it are two capabilities. Containing needs version 2 alone, wherever it is mounted, and
//! none of its controllers; limiting uses the controllers of version 2 where they are, else those of version 1, else it
//! is refused. Nothing here knows what a task is.

pub(crate) mod claim;

use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use millstream_common::{id::TaskId, limits, outcome::LeakedProcess, spec::ResourceLimits, text::printable};
use rustix::{
    fs::{Mode, OFlags},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::io::Interest;

use super::process::watch;

/// Processes that are named in a record; all are counted.
pub(crate) const LEAKED_NAMED_MAX: usize = 64;
/// Command line of such a process.
const COMMAND_BYTES_MAX: usize = 256 - '…'.len_utf8();
/// Period over which processor time is counted.
const CPU_PERIOD_US: u64 = 100_000;
/// How often a group is read and its processes are killed one by one, on kernels that cannot kill a group.
const KILL_PASSES_MAX: usize = 1_000;

/// Where this process stands in the control groups of its host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hierarchies {
    /// Directory of our own group of version 2.
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
        let mut found = Self::parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        found.unified = found.unified.filter(|path| is_writable(path));
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
            if found.len() > limits::SESSION_TASKS_COUNT_MAX {
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
            let processes = self.processes();
            if processes.is_empty() {
                return;
            }
            for pid in processes {
                let Some(pidfd) = open_process(pid) else { continue };
                // It is still the one that was listed only if it is listed now that the descriptor holds it.
                if self.processes().contains(&pid) {
                    let _gone: Result<(), _> = pidfd_send_signal(&pidfd, Signal::KILL);
                }
            }
        }
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

/// Groups that limit one tree, besides the one that contains it.
#[derive(Debug, Default)]
pub(crate) struct LimitGroups {
    /// Directories that are removed in the end.
    directories: Vec<PathBuf>,
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

/// A descriptor for a process, if it is still there.
pub(crate) fn open_process(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// A process with its command line as text, for people.
pub(crate) fn describe(pid: u32) -> LeakedProcess {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let mut command = read("cmdline");
    while command.last() == Some(&0) {
        command.pop();
    }
    for byte in &mut command {
        if *byte == 0 {
            *byte = b' ';
        }
    }
    if command.is_empty() {
        // It is so young or so dead that only its name is left.
        command = read("comm").trim_ascii_end().to_owned();
    }
    LeakedProcess { pid, command: printable(&command, COMMAND_BYTES_MAX) }
}

/// Finds what has left its containment: every process whose environment marks it as belonging to one of these tasks, as a
/// descriptor that still means it when it is killed, and in words.
pub(crate) fn find_marked(is_ours: impl Fn(&str) -> bool) -> Vec<(OwnedFd, LeakedProcess)> {
    let mut found = Vec::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if pid == std::process::id() {
            continue;
        }
        // Opened before it is looked at: whoever is found by this number is whom the descriptor means.
        let Some(pidfd) = open_process(pid) else { continue };
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mark = environment.split(|&byte| byte == 0).find_map(|variable| variable.strip_prefix(MARK));
        if mark.and_then(|mark| std::str::from_utf8(mark).ok()).is_some_and(&is_ours) {
            found.push((pidfd, describe(pid)));
        }
    }
    found
}

/// The variable that marks every process of a task.
const MARK: &[u8] = b"MILLSTREAM_TASK=";

/// Kills a process that was found by its mark.
pub(crate) fn kill_marked(process: &OwnedFd) {
    // It may have ended by itself since.
    let _gone: Result<(), _> = pidfd_send_signal(process, Signal::KILL);
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw,nsdelegate
";
    const MEMBERSHIPS: &str = "4:memory:/jobs/17\n1:cpu,cpuacct:/\n0::/user.slice/a:b\n";

    #[test]
    fn groups_are_found_wherever_they_are_mounted() {
        let found = Hierarchies::parse(HYBRID, MEMBERSHIPS);
        assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified/user.slice/a:b")));
        assert_eq!(found.memory.as_deref(), Some(Path::new("/sys/fs/cgroup/memory/jobs/17")));
        assert_eq!(found.cpu.as_deref(), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct/")));
        assert_eq!(found.pids, None);
    }

    #[test]
    fn a_mount_of_a_part_shows_that_part_alone() {
        let part = "1 1 0:1 /pods/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let found = Hierarchies::parse(part, "0::/pods/x/inner\n");
        assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/inner")));
        assert_eq!(Hierarchies::parse(part, "0::/elsewhere\n").unified, None);
        assert_eq!(Hierarchies::parse("", ""), Hierarchies::default());
    }

    fn group(name: &str) -> Group {
        let parent = Hierarchies::find().unified.expect("a writable control group of version 2 is mounted");
        Group::create(parent.join(format!("millstream-test-{}-{name}", std::process::id()))).unwrap()
    }

    #[tokio::test]
    #[ignore = "needs root: control groups are its own"]
    async fn who_daemonised_is_listed_and_ends_with_its_group() {
        let group = group("daemon");
        let join = group.path().join("cgroup.procs");
        let script = format!("echo $$ > {}; (setsid sleep 1000 &) ; (setsid sleep 1001 &)", join.display());
        let mut shell = Command::new("sh");
        // Those that stay behind must not hold this test's own outputs.
        shell.args(["-c", &script]).stdout(Stdio::null()).stderr(Stdio::null());
        assert!(shell.status().unwrap().success());
        assert!(!group.remove_if_empty());
        let begun = tokio::time::timeout(Duration::from_secs(10), async {
            loop {
                let mut commands: Vec<_> =
                    group.processes().into_iter().map(|pid| describe(pid).command).collect();
                commands.sort();
                if commands == ["sleep 1000", "sleep 1001"] {
                    break;
                }
                // They are being made: each look is another one.
                tokio::task::yield_now().await;
            }
        });
        let begun = begun.await;
        assert!(!group.wait_until_empty(Duration::from_millis(1)).await.unwrap());
        group.kill().unwrap();
        assert!(begun.is_ok(), "both daemons are listed");
        assert!(group.wait_until_empty(limits::KILL_MAX).await.unwrap());
        assert!(group.remove_if_empty());
    }

    #[test]
    #[ignore = "needs root: control groups are its own"]
    fn groups_that_a_block_has_made_go_too() {
        let group = group("nested");
        fs::create_dir_all(group.path().join("a/b")).unwrap();
        assert!(!group.remove_if_empty());
        group.remove().unwrap();
        assert!(!group.path().exists());
    }

    #[test]
    #[ignore = "needs root: control groups are its own"]
    fn limits_are_set_entered_and_removed() {
        let hierarchies = Hierarchies::find();
        let wanted =
            ResourceLimits { memory_bytes: Some(64 << 20), pids_count: Some(17), cpu_millis: Some(500) };
        let name = format!("millstream-test-{}-limits", std::process::id());
        let container = group("limits");
        let mut groups = LimitGroups::create(&hierarchies, Some(&container), &name, &wanted).unwrap();
        assert_eq!(groups.joins().unwrap().len(), groups.directories.len());
        assert!(!groups.out_of_memory());
        let made = groups.directories.clone();
        groups.remove();
        container.remove().unwrap();
        assert!(made.iter().all(|directory| !directory.exists()));
    }

    #[test]
    fn what_left_its_containment_is_found_by_its_mark() {
        let mark = format!("mark-of-{}", std::process::id());
        let mut child = Command::new("sleep").arg("1000").env("MILLSTREAM_TASK", &mark).spawn().unwrap();
        // The environment is in place once the program has begun; before, the child looks like this test.
        let found = loop {
            let found = find_marked(|found| found == mark);
            if !found.is_empty() {
                break found;
            }
        };
        assert_eq!(found[0].1.command, "sleep 1000");
        kill_marked(&found[0].0);
        assert!(!child.wait().unwrap().success());
    }
}
