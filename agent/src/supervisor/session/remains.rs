//! What an earlier supervisor has left for this one, and what this one leaves.
//!
//! A task that was begun and has no record is lost: it is never begun again.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use millstream_common::{
    convert::spec_sha256,
    id::TaskId,
    outcome::{OutcomeKind, Reason, TaskEnd},
    spec::TaskSpec,
};
use millstream_proto::v1;
use prost::Message as _;
use tracing::{info, warn};

use super::{
    super::{
        attendant::{RECORD_FILE, SPEC_FILE, STARTED_FILE, SharedSpool, task_dir, write_record},
        cgroup::{Group, claim},
        ended::Ended,
        task::Machine,
        workspace,
    },
    Session, Task,
};

impl Session {
    /// Learns of tasks from their directories. One that was begun and has no record is lost: it is never begun again.
    pub(super) fn recover(&mut self) {
        let entries = fs::read_dir(self.config.session_dir.join("tasks")).into_iter().flatten().flatten();
        let ids: Vec<TaskId> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        for id in ids {
            let directory = task_dir(&self.config.session_dir, id);
            let read = |name: &str| fs::read(directory.join(name));
            let wire = read(SPEC_FILE).ok().and_then(|bytes| v1::TaskSpec::decode(&bytes[..]).ok());
            let Some((digest, Ok(spec))) = wire.map(|wire| (spec_sha256(&wire), TaskSpec::try_from(wire)))
            else {
                warn!(task_id = %id, "the specification of an earlier task cannot be read");
                continue;
            };
            let record = read(RECORD_FILE).ok().and_then(|bytes| v1::TaskEnd::decode(&bytes[..]).ok());
            let end = record.unwrap_or_else(|| {
                let begun = directory.join(STARTED_FILE).exists();
                let (outcome, when) = if begun {
                    (OutcomeKind::Lost, "while the task ran")
                } else {
                    (OutcomeKind::Error, "before the task began")
                };
                let detail = format!("the supervisor of the session died {when}");
                let end = v1::TaskEnd::from(&TaskEnd::never_begun(outcome, Reason::SupervisorDied, detail));
                warn!(task_id = %id, %outcome, "an earlier task has no record");
                if let Err(error) = write_record(&*self.around.host.disk, &directory, &end) {
                    warn!(task_id = %id, %error, "terminal record not written");
                }
                end
            });
            let machine = Machine::ended(&spec);
            let task = Task {
                machine,
                spec: Arc::new(spec),
                digest,
                orders: None,
                secret_files: Vec::new(),
                has_spare: false,
                spool: SharedSpool::default(),
                end: Some(Box::new(end)),
                changed_ns: self.around.world.clock.wall_ns(),
            };
            self.tasks.insert(id, task);
        }
    }
}

/// What a session that is over leaves behind.
pub(in crate::supervisor) struct Remains {
    pub(super) group: Option<PathBuf>,
    /// How long whoever is left in the group is waited for once killed: not again, when somebody is known to survive that.
    pub(super) patience: Duration,
    pub(super) session_dir: PathBuf,
    pub(super) results: Option<Results>,
}

/// Results that are kept for a controller that was away.
pub(in crate::supervisor) struct Results {
    /// When the lease was over, since the start of the host.
    pub(super) since: Duration,
    /// Those that were not released.
    pub(super) tasks: BTreeSet<TaskId>,
}

/// What the door serves of a task whose supervisor is gone.
const KEPT_FILES: &[&str] = &[SPEC_FILE, STARTED_FILE, RECORD_FILE, "spool", "archive.tar"];

impl Remains {
    /// Ends and removes the session's control group with whoever is left in it.
    pub(in crate::supervisor) async fn end_group(&self) {
        let Some(Ok(group)) = self.group.clone().map(Group::open) else { return };
        if !group.remove_if_empty() {
            Self::end_inhabited(&group, self.patience).await;
        }
        // Shared with other sessions and their agent: it goes with the last of them.
        if let Some(parent) = group.path().parent() {
            claim::remove_abandoned(parent);
        }
    }

    async fn end_inhabited(group: &Group, patience: Duration) {
        let ending = async {
            group.kill()?;
            group.wait_until_empty(patience).await?;
            group.remove()
        };
        if let Err(error) = ending.await {
            warn!(%error, "the control group of the session is left behind");
        }
    }

    /// Removes what belongs to the tasks, except results that are to be kept; the rest of the directory is the door's.
    /// Blocking.
    pub(in crate::supervisor) fn remove(self) {
        let tasks = self.session_dir.join("tasks");
        match &self.results {
            None => remove(&tasks),
            Some(results) => {
                for entry in fs::read_dir(&tasks).into_iter().flatten().flatten() {
                    let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
                    if id.is_some_and(|id| results.tasks.contains(&id)) {
                        keep_results(&entry.path());
                    } else {
                        remove(&entry.path());
                    }
                }
            }
        }
        for name in ["sync", "bin"] {
            remove(&self.session_dir.join(name));
        }
        if let Some(results) = self.results {
            info!(tasks = results.tasks.len(), "the session is over: its results are kept");
            // Last: whoever finds it knows that all else is done.
            if let Err(error) = Ended::new(results.since, false).write(&self.session_dir) {
                warn!(%error, "the end of the session is not on record");
            }
        } else {
            info!("the session is over");
        }
    }
}

/// Leaves of a task's directory what can still be asked for.
fn keep_results(task_dir: &Path) {
    for entry in fs::read_dir(task_dir).into_iter().flatten().flatten() {
        if !entry.file_name().to_str().is_some_and(|name| KEPT_FILES.contains(&name)) {
            remove(&entry.path());
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = workspace::remove_task(path) {
        warn!(path = %path.display(), %error, "something of the session is left behind");
    }
}
