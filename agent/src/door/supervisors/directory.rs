//! The directory of one session: what the door writes there, what it finds after a supervisor has died, and its removal.
//!
//! Blocking code. Nothing from a peer becomes a path: names are made of numbers that were parsed.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use millstream_common::{
    id::{SessionId, TaskId},
    limits,
    outcome::{OutcomeKind, Reason, TaskEnd},
};
use millstream_proto::{supervisor::v1::TaskChanged, v1};
use prost::Message as _;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use tracing::{error, warn};

use crate::{
    session::{Owner, Secret},
    supervisor::{
        cgroup::{Group, GroupError, Hierarchies, LimitGroups},
        ended::{Ended, boot_id},
    },
};

/// Where all sessions lie under a state directory.
pub(crate) fn sessions_directory(state: &Path) -> PathBuf {
    state.join("sessions")
}

/// What the door keeps of a session, so that the next agent knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// Who has it.
    pub(crate) owner: Owner,
    /// Its secret.
    pub(crate) secret: Secret,
    /// Newest epoch.
    pub(crate) epoch: u64,
    /// Lease in milliseconds.
    pub(crate) lease_ms: u64,
    /// What the controller calls itself.
    pub(crate) client: String,
    /// Whether the host is reserved.
    pub(crate) exclusive: bool,
    /// When it was opened, in nanoseconds since 1970.
    pub(crate) open_time_ns: u64,
    /// The boot in which it lives.
    pub(crate) boot_id: String,
    /// Control group of the session, to be ended with it.
    pub(crate) cgroup: Option<PathBuf>,
}

impl Kept {
    /// The lease.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }
}

/// Where everything of one session lies.
#[derive(Debug, Clone)]
pub(crate) struct SessionDirectory {
    path: PathBuf,
    cgroup: Option<PathBuf>,
}

impl SessionDirectory {
    /// The directory of a session under a state directory; need not exist.
    pub(crate) fn of(state: &Path, session: SessionId, cgroup: Option<PathBuf>) -> Self {
        Self { path: sessions_directory(state).join(session.to_string()), cgroup }
    }

    /// The directory itself.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where a session says which blobs it holds.
    pub(crate) const HELD_BLOBS: &str = "blobs";

    /// Its own such directory: an empty file for each blob.
    pub(crate) fn held_blobs(&self) -> PathBuf {
        self.path.join(Self::HELD_BLOBS)
    }

    /// Holds no blobs any more: nothing of the session will run again.
    pub(crate) fn release_blobs(&self) {
        match fs::remove_dir_all(self.held_blobs()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(directory = %self.path.display(), %error, "shipped files stay held by a session that is over");
            }
            _ => {}
        }
    }

    /// The supervisor's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join("supervisor.sock")
    }

    /// Who lives in the session's control group still; nobody where there is none.
    pub(crate) fn inhabitants(&self) -> Vec<u32> {
        let group = self.cgroup.as_ref().filter(|cgroup| cgroup.exists());
        group
            .and_then(|cgroup| Group::open(cgroup.clone()).ok())
            .map_or_else(Vec::new, |group| group.processes())
    }

    /// Whether its processes are contained by a control group.
    pub(crate) fn has_group(&self) -> bool {
        self.cgroup.is_some()
    }

    fn task(&self, task: TaskId) -> PathBuf {
        self.path.join("tasks").join(task.to_string())
    }

    /// Spool of a task.
    pub(crate) fn spool(&self, task: TaskId) -> PathBuf {
        self.task(task).join("spool")
    }

    /// Archive of a task.
    pub(crate) fn archive(&self, task: TaskId) -> PathBuf {
        self.task(task).join("archive.tar")
    }

    /// Makes the directory; nobody but the agent's user may look into it. Its supervisor lets blocks of other users pass
    /// through it to their own directories.
    pub(crate) fn create(&self) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        fs::DirBuilder::new().recursive(true).mode(0o711).create(self.path.join("tasks"))?;
        write_whole(&self.path.join("boot_id"), boot_id().as_bytes())
    }

    /// Writes what is to be known after a restart: whole or not at all.
    pub(crate) fn keep(&self, kept: &Kept) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(kept).map_err(io::Error::other)?;
        write_whole(&self.path.join("session.json"), &text)
    }

    /// Reads it back.
    pub(crate) fn kept(&self) -> io::Result<Kept> {
        let text = fs::read(self.path.join("session.json"))?;
        serde_json::from_slice(&text).map_err(io::Error::other)
    }

    /// That the session is over, when it is and its supervisor has said so, or this or an earlier door.
    pub(crate) fn ended(&self) -> Option<Ended> {
        Ended::read(&self.path)
    }

    /// Keeps on record that the supervisor died, from this moment after the start of the host on: results age across agents.
    pub(crate) fn record_loss(&self, since: Duration) {
        if let Err(error) = Ended::new(since, true).write(&self.path) {
            warn!(directory = %self.path.display(), %error, "the loss of a session is not on record");
        }
    }

    /// Writes the supervisor's configuration.
    pub(crate) fn write_configuration(&self, configuration: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(configuration).map_err(io::Error::other)?;
        write_whole(&self.path.join("supervisor.json"), &text)
    }

    /// Whether a supervisor lives here: it holds the lock as long as it does, and the kernel gives it back.
    pub(crate) fn is_locked(&self) -> io::Result<bool> {
        let lock = match fs::OpenOptions::new().write(true).open(self.path.join("lock")) {
            Ok(lock) => lock,
            // The directory is gone already, or the supervisor never came so far.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends every process of the session's control group, for a supervisor that cannot do it any more, and waits until they
    /// are gone. Without control groups this is done by each task's own subreaper.
    pub(crate) async fn kill_everything(&self) {
        let Some(cgroup) = &self.cgroup else { return };
        // No task has ever begun when it is not there.
        if !cgroup.exists() {
            return;
        }
        let killing = async {
            let group = Group::open(cgroup.clone())?;
            group.kill()?;
            let is_empty = group.wait_until_empty(limits::KILL_MAX).await?;
            if is_empty {
                group.remove()?;
            }
            Ok::<_, GroupError>(is_empty)
        };
        match killing.await {
            Ok(true) => {}
            Ok(false) => error!(cgroup = %cgroup.display(), "processes of a session survive being killed"),
            Err(error) => warn!(cgroup = %cgroup.display(), %error, "a control group cannot be ended"),
        }
    }

    /// All tasks as their records on disk tell, oldest first. Those without a terminal record get one: whether they ran to
    /// their end cannot be known any more, unless they were never begun.
    pub(crate) fn recover_tasks(&self, reason: Reason) -> Vec<TaskChanged> {
        let Ok(entries) = fs::read_dir(self.path.join("tasks")) else { return Vec::new() };
        let mut tasks: Vec<TaskId> =
            entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        tasks.sort_unstable();
        let hierarchies = Hierarchies::find();
        for task in &tasks {
            LimitGroups::remove_left(&hierarchies, &LimitGroups::name_of(*task));
        }
        tasks.into_iter().map(|task| self.recover(task, reason)).collect()
    }

    fn recover(&self, task: TaskId, reason: Reason) -> TaskChanged {
        let directory = self.task(task);
        let spec =
            fs::read(directory.join("spec.pb")).ok().and_then(|bytes| v1::TaskSpec::decode(&bytes[..]).ok());
        let end = match fs::read(directory.join("end.pb")) {
            Ok(bytes) => {
                v1::TaskEnd::decode(&bytes[..]).map_err(|error| (Reason::StateCorrupt, error.to_string()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err((reason, String::new())),
            Err(error) => Err((Reason::StateCorrupt, error.to_string())),
        };
        let end = end.unwrap_or_else(|(reason, detail)| self.lose(task, spec.as_ref(), reason, detail));
        let (stream, block) = spec.map_or_else(Default::default, |spec| (spec.stream, spec.name));
        TaskChanged {
            task_id: task.to_string(),
            stream,
            block,
            state: v1::TaskState::Finished.into(),
            time: end.end_time,
            spool_position: end.log.as_ref().map_or(0, |log| log.end_position),
            end: Some(end),
            ..TaskChanged::default()
        }
    }

    /// Makes the record of a task that has none, and keeps it.
    fn lose(&self, task: TaskId, spec: Option<&v1::TaskSpec>, reason: Reason, detail: String) -> v1::TaskEnd {
        let directory = self.task(task);
        let begun = directory.join("started").exists();
        let sentence = match reason {
            Reason::SupervisorDied => "the supervisor of the session died",
            Reason::HostRebooted => "the host was started again",
            _ => "the record of the task cannot be read",
        };
        let what = if begun { "while the task ran" } else { "before the task began" };
        let detail =
            if detail.is_empty() { format!("{sentence} {what}") } else { format!("{sentence}: {detail}") };
        // One that has no mark was never begun: that much is certain.
        let outcome = if begun { OutcomeKind::Lost } else { OutcomeKind::Error };
        let mut end = v1::TaskEnd::from(&TaskEnd::never_begun(outcome, reason, detail));
        end.log = Some(self.log_totals(task));
        let name = spec.map_or("", |spec| spec.name.as_str());
        error!(%task, block = name, %reason, "task lost");
        let path = directory.join("end.pb");
        if reason == Reason::StateCorrupt && path.exists() {
            // Kept aside for whoever wants to know what happened to it.
            if let Err(error) = fs::rename(&path, directory.join("end.pb.damaged")) {
                warn!(%task, %error, "a damaged record cannot be put aside");
            }
        }
        if let Err(error) = write_whole(&path, &end.encode_to_vec()) {
            warn!(%task, %error, "the record of a lost task cannot be kept");
        }
        end
    }

    /// What the spool holds: whole records up to where the writer came.
    fn log_totals(&self, task: TaskId) -> v1::LogTotals {
        let mut totals = v1::LogTotals::default();
        let Ok(reader) = crate::supervisor::spool::SpoolReader::open(self.spool(task)) else { return totals };
        let mut position = 0;
        // The end of the file is no boundary of a record; the first torn one ends the log.
        loop {
            match read_one_message(&reader, &self.spool(task), position) {
                Some((records, next)) if next > position && !records.is_empty() => {
                    for record in &records {
                        let length = u64::try_from(record.data.len()).unwrap_or(0) + record.skipped_bytes;
                        let end = record.offset + length;
                        match record.channel {
                            millstream_common::log::LogChannel::Stdout => totals.stdout_bytes = end,
                            millstream_common::log::LogChannel::Stderr => totals.stderr_bytes = end,
                            millstream_common::log::LogChannel::Mark => {}
                        }
                    }
                    position = next;
                }
                _ => break,
            }
        }
        totals.end_position = position;
        totals
    }

    /// Removes the directories of tasks whose supervisor is gone.
    pub(crate) fn remove_tasks(&self, tasks: &[TaskId]) {
        for task in tasks {
            match fs::remove_dir_all(self.task(*task)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => warn!(%task, %error, "the directory of a task cannot be removed"),
            }
        }
    }

    /// Removes everything, the control group included. Repeating it succeeds.
    pub(crate) fn remove(&self) -> io::Result<()> {
        if let Some(cgroup) = &self.cgroup {
            remove_cgroup(cgroup);
        }
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn read_one_message(
    reader: &crate::supervisor::spool::SpoolReader,
    path: &Path,
    position: u64,
) -> Option<(Vec<millstream_common::log::LogRecord>, u64)> {
    let length = fs::metadata(path).ok()?.len();
    let whole = millstream_common::limits::CHUNKS_MESSAGE_BYTES_MAX;
    match reader.read(position, length, whole) {
        Ok(read) => Some(read),
        // The last record is torn: what is before it is taken one by one.
        Err(_) => last_whole_records(reader, position, length),
    }
}

/// The records before a torn one: reads less and less until nothing torn is in reach.
fn last_whole_records(
    reader: &crate::supervisor::spool::SpoolReader,
    position: u64,
    length: u64,
) -> Option<(Vec<millstream_common::log::LogRecord>, u64)> {
    let mut reach = usize::try_from(length.saturating_sub(position)).ok()?;
    reach = reach.min(millstream_common::limits::CHUNKS_MESSAGE_BYTES_MAX);
    while reach > 0 {
        reach /= 2;
        if let Ok((records, next)) = reader.read(position, length, reach)
            && !records.is_empty()
        {
            return Some((records, next));
        }
    }
    None
}

/// Control groups are removed from the leaves; one that still holds processes stays, and the next agent tries again.
fn remove_cgroup(cgroup: &Path) {
    let Ok(entries) = fs::read_dir(cgroup) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    if let Err(error) = fs::remove_dir(cgroup) {
        warn!(cgroup = %cgroup.display(), %error, "a control group cannot be removed");
    }
}

/// Writes a file so that a reader finds the old content or the new, never half.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    io::Write::write_all(&mut file, content)?;
    drop(file);
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use millstream_common::clock::World;

    use super::*;

    fn directory() -> (tempfile::TempDir, SessionDirectory) {
        let state = tempfile::tempdir().unwrap();
        let session = World::system().ids.session_id();
        let directory = SessionDirectory::of(state.path(), session, None);
        directory.create().unwrap();
        (state, directory)
    }

    #[test]
    fn a_task_with_a_mark_and_no_record_is_lost_and_one_with_a_record_keeps_it() {
        let (_state, directory) = directory();
        let ids = World::system().ids;
        let (ended, begun, queued) = (ids.task_id(), ids.task_id(), ids.task_id());
        for task in [ended, begun, queued] {
            fs::create_dir_all(directory.task(task)).unwrap();
        }
        let passed = v1::TaskEnd { outcome: v1::OutcomeKind::Passed.into(), ..v1::TaskEnd::default() };
        fs::write(directory.task(ended).join("end.pb"), passed.encode_to_vec()).unwrap();
        fs::write(directory.task(begun).join("started"), "").unwrap();
        let outcomes = |reason| {
            let tasks = directory.recover_tasks(reason);
            let ends = tasks.iter().map(|task| task.end.clone().unwrap());
            ends.map(|end| (end.outcome(), end.reason())).collect::<Vec<_>>()
        };
        let first = outcomes(Reason::SupervisorDied);
        assert_eq!(first[0].0, v1::OutcomeKind::Passed);
        assert_eq!(first[1], (v1::OutcomeKind::Lost, v1::Reason::SupervisorDied));
        assert_eq!(first[2], (v1::OutcomeKind::Error, v1::Reason::SupervisorDied));
        // The record is written once: a later start of the agent finds the same.
        assert_eq!(outcomes(Reason::HostRebooted), first);
    }

    #[test]
    fn a_damaged_record_is_put_aside() {
        let (_state, directory) = directory();
        let task = World::system().ids.task_id();
        fs::create_dir_all(directory.task(task)).unwrap();
        fs::write(directory.task(task).join("end.pb"), [0xff; 16]).unwrap();
        let end = directory.recover_tasks(Reason::SupervisorDied).remove(0).end.unwrap();
        assert_eq!(end.reason(), v1::Reason::StateCorrupt);
        assert!(directory.task(task).join("end.pb.damaged").exists());
    }

    #[test]
    fn a_lock_that_nobody_holds_means_that_nobody_lives_and_removal_can_be_repeated() {
        let (_state, directory) = directory();
        assert!(!directory.is_locked().unwrap());
        let path = directory.path().join("lock");
        fs::write(&path, "").unwrap();
        assert!(!directory.is_locked().unwrap());
        let held = fs::File::open(&path).unwrap();
        rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
        assert!(directory.is_locked().unwrap());
        drop(held);
        directory.remove().unwrap();
        directory.remove().unwrap();
        assert!(!directory.path().exists());
    }
}
