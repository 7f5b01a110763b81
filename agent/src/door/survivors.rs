//! What ended sessions have left behind on this host: found, described, watched until it is gone.
//!
//! The kernel tells when a process ends, and nothing here polls; but kernels before Linux 5.3 do not. Whether a host with survivors may still be shared or reserved is
//! decided by the machine of sessions; who may say that they do no harm, in [`super::upkeep`].

use std::{collections::BTreeMap, fs, io, path::Path, time::Duration};

use millstream_common::{id::TaskId, text::printable};
use millstream_proto::v1;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::supervisors::{SessionDirectory, Supervised};
use crate::supervisor::{
    cgroup::{describe, find_marked, mark_of},
    stranger::{Stranger, start_ticks},
};

/// Longest description of one of them.
const WHAT_BYTES_MAX: usize = 256;

/// Who had the session that left something behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// The session.
    pub(crate) session_id: String,
    /// Who had it.
    pub(crate) owner: String,
    /// What the controller called itself.
    pub(crate) client: String,
    /// When the rest of it was found.
    pub(crate) since: String,
}

/// Something that could not be ended or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Survivor {
    /// Its process; zero for anything else.
    pub(crate) pid: u32,
    /// When the process was started, as the kernel counts: with its number it is one process of one boot.
    start_ticks: u64,
    /// Its command line, or a sentence.
    pub(crate) what: String,
    /// Stream and block, when they are known.
    pub(crate) block: String,
    /// Where it comes from.
    pub(crate) origin: Origin,
}

impl Survivor {
    /// As operators see it.
    pub(crate) fn status(&self) -> v1::Survivor {
        v1::Survivor {
            pid: self.pid,
            what: self.what.clone(),
            session_id: self.origin.session_id.clone(),
            owner: self.origin.owner.clone(),
            client: self.origin.client.clone(),
            block: self.block.clone(),
            find_time: self.origin.since.parse().ok(),
        }
    }

    /// In one line, for people: what, and who ran it.
    pub(crate) fn line(&self) -> String {
        let what = match self.pid {
            0 => self.what.clone(),
            pid => format!("process {pid} `{}`", self.what),
        };
        let block = if self.block.is_empty() { String::new() } else { format!(" of {}", self.block) };
        format!("{what}{block} ({}, {})", self.origin.owner, self.origin.client)
    }

    /// Whether both are the same thing, found at different times.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let same_process = (self.pid, self.start_ticks) == (other.pid, other.start_ticks);
        let same_words = self.what == other.what && self.origin.session_id == other.origin.session_id;
        same_process && (self.pid > 0 || same_words)
    }

    /// This very process, if it is still there.
    fn process(&self) -> Option<Stranger> {
        // Held before it is looked at: whoever was started then is who is held.
        let process = Stranger::find(self.pid)?;
        (start_ticks(self.pid) == Some(self.start_ticks)).then_some(process)
    }

    /// Whether it is still there. What is no process is a directory of the session, or was told by somebody who is gone.
    pub(crate) fn is_there(&self, sessions: &Path) -> bool {
        match self.pid {
            0 => sessions.join(&self.origin.session_id).exists(),
            _ => self.process().is_some(),
        }
    }

    /// Kills it once more; done when it is gone. Never, when it cannot be.
    pub(crate) async fn end(&self) {
        if let Some(process) = self.process() {
            // What cannot be killed now is waited for all the same.
            let _refused: io::Result<()> = process.kill();
            process.gone().await;
        }
    }

    /// Done when the process is gone; never for anything else.
    pub(crate) async fn gone(&self) {
        match self.process() {
            Some(process) => process.gone().await,
            None if self.pid == 0 => std::future::pending().await,
            None => {}
        }
    }
}

/// Processes of a session that is over, and whatever else was told. `told` is what its supervisor could not end, as text: a
/// process as its number, its command and ` of STREAM/BLOCK`. Looks through all processes of the host only where no control group tells, or
/// something was told. Blocking.
pub(crate) fn find(supervised: &Supervised, told: &[String], origin: &Origin) -> Vec<Survivor> {
    let directory: &SessionDirectory = &supervised.directory;
    // Each with its block, as far as it is known: the door has forgotten tasks that were released.
    let mut processes: BTreeMap<u32, String> =
        directory.inhabitants().into_iter().map(|pid| (pid, String::new())).collect();
    let has_run = supervised.mirror().received_count() > 0;
    if has_run && (!directory.has_group() || !told.is_empty()) {
        let is_ours =
            |mark: &str| mark.parse().is_ok_and(|task: TaskId| supervised.mirror().get(task).is_some());
        processes.extend(find_marked(is_ours).into_iter().map(|(_, found)| (found.pid, String::new())));
    }
    let mut found = Vec::new();
    for line in told {
        match line.split_once(' ').and_then(|(number, _)| number.parse::<u32>().ok()) {
            Some(pid) => {
                let block = line.rsplit_once(" of ").map_or("", |(_, block)| block);
                processes.insert(pid, printable(block.as_bytes(), WHAT_BYTES_MAX));
            }
            None => {
                let what = printable(line.as_bytes(), WHAT_BYTES_MAX);
                found.push(Survivor {
                    pid: 0,
                    start_ticks: 0,
                    what,
                    block: String::new(),
                    origin: origin.clone(),
                });
            }
        }
    }
    let process = |(pid, told): (u32, String)| {
        let start_ticks = start_ticks(pid)?;
        let task = mark_of(pid).and_then(|mark| mark.parse::<TaskId>().ok());
        let mirror = supervised.mirror();
        let block =
            task.and_then(|task| mirror.get(task)).map(|task| format!("{}/{}", task.stream, task.block));
        let what = printable(describe(pid).command.as_bytes(), WHAT_BYTES_MAX);
        Some(Survivor { pid, start_ticks, what, block: block.unwrap_or(told), origin: origin.clone() })
    };
    found.extend(processes.into_iter().filter_map(process));
    found
}

/// Of these, those that are still there after a while: what was just killed takes a moment to go.
pub(crate) async fn still_there(found: Vec<Survivor>, patience: Duration) -> Vec<Survivor> {
    let mut left = Vec::new();
    let mut waiting = tokio::task::JoinSet::new();
    for survivor in found {
        waiting.spawn(async move {
            match timeout(patience, survivor.gone()).await {
                Ok(()) => None,
                Err(_) => Some(survivor),
            }
        });
    }
    while let Some(waited) = waiting.join_next().await {
        left.extend(waited.ok().flatten());
    }
    left.sort_by_key(|survivor| survivor.pid);
    left
}

/// What the agent keeps about its host across its own restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The boot in which the survivors were found: they do not outlive it.
    pub(crate) boot_id: String,
    /// Why nothing new is taken, if so.
    pub(crate) drain: Option<crate::session::Drain>,
    /// What was left behind.
    pub(crate) survivors: Vec<Survivor>,
}

impl Record {
    const FILE: &str = "host.json";

    /// Reads what an earlier agent has kept; nothing when there is nothing.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn read(state: &Path) -> io::Result<Self> {
        match fs::read(state.join(Self::FILE)) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Keeps it: whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, state: &Path) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        super::supervisors::write_whole(&state.join(Self::FILE), &text)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> (Child, Survivor) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let origin = Origin {
            session_id: "s".to_owned(),
            owner: "millstream://controller/alice".to_owned(),
            client: "a test".to_owned(),
            since: "2026-11-21T22:37:25Z".to_owned(),
        };
        let pid = child.id();
        let start_ticks = start_ticks(pid).unwrap();
        let survivor =
            Survivor { pid, start_ticks, what: "sleep 1000".to_owned(), block: "s/b".to_owned(), origin };
        (child, survivor)
    }

    #[tokio::test]
    async fn a_process_is_there_until_it_ends_and_another_with_its_number_is_not_it() {
        let (mut child, survivor) = sleeper();
        let another = Survivor { start_ticks: survivor.start_ticks + 1, ..survivor.clone() };
        assert!(survivor.is_there(Path::new("/nowhere")));
        assert!(!another.is_there(Path::new("/nowhere")));
        another.end().await;
        let left = still_there(vec![survivor.clone(), another], Duration::ZERO).await;
        assert_eq!(left, std::slice::from_ref(&survivor));
        survivor.end().await;
        // Nobody has reaped it yet: it has ended all the same.
        assert!(!survivor.is_there(Path::new("/nowhere")));
        assert_eq!(still_there(vec![survivor.clone()], Duration::from_secs(30)).await, []);
        child.wait().unwrap();
    }

    #[test]
    fn a_survivor_is_told_with_who_ran_it() {
        let (mut child, survivor) = sleeper();
        child.kill().unwrap();
        child.wait().unwrap();
        let expected =
            format!("process {} `sleep 1000` of s/b (millstream://controller/alice, a test)", child.id());
        assert_eq!(survivor.line(), expected);
        assert_eq!(survivor.status().find_time.unwrap().to_string(), "2026-11-21T22:37:25Z");
    }

    #[test]
    fn what_is_kept_is_found_again() {
        let state = tempfile::tempdir().unwrap();
        assert!(Record::read(state.path()).unwrap().survivors.is_empty());
        let (mut child, survivor) = sleeper();
        child.kill().unwrap();
        child.wait().unwrap();
        let record = Record { survivors: vec![survivor.clone()], ..Record::default() };
        record.write(state.path()).unwrap();
        assert_eq!(Record::read(state.path()).unwrap().survivors, [survivor]);
        fs::write(state.path().join(Record::FILE), "half").unwrap();
        assert!(Record::read(state.path()).is_err());
    }
}
