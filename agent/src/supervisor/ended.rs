//! The record of a session that is over while its results are kept: since when, and whether it was lost.
//!
//! Written by a supervisor that ends because the lease is over, or by the door for one that died; read by the door and by the
//! next one, which keep the results for their time and remove them. Blocking code.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::Duration,
};

use millstream_common::limits;
use serde::{Deserialize, Serialize};

/// Its file in the session's directory.
const ENDED_FILE: &str = "ended.json";
/// Where the kernel tells which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Number of this boot, made by the kernel.
pub(crate) fn boot_id() -> String {
    fs::read_to_string(BOOT_ID).map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// That a session is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// The boot that `since_ms` counts from.
    boot_id: String,
    /// When it was over, in milliseconds since the start of the host.
    since_ms: u64,
    /// Whether its supervisor died; otherwise its lease was over.
    pub(crate) lost: bool,
}

impl Ended {
    /// Over since this moment after the start of the host.
    pub(crate) fn new(since: Duration, lost: bool) -> Self {
        Self { boot_id: boot_id(), since_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX), lost }
    }

    /// When its results have aged, on the clock since the start of the host. What was over before the host was started is
    /// kept for the whole time from the start on.
    pub(crate) fn results_end(&self) -> Duration {
        let since =
            if self.boot_id == boot_id() { Duration::from_millis(self.since_ms) } else { Duration::ZERO };
        since.saturating_add(limits::EXPIRED_RESULTS_KEPT)
    }

    /// Keeps the record in a session's directory: whole or not at all. One that is there stays.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, session_dir: &Path) -> io::Result<()> {
        if Self::read(session_dir).is_some() {
            return Ok(());
        }
        let fresh = session_dir.join(".ended.new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&serde_json::to_vec(self).map_err(io::Error::other)?)?;
        drop(file);
        fs::rename(&fresh, session_dir.join(ENDED_FILE))
    }

    /// The record of a session, when it is over. One that cannot be read is none.
    pub(crate) fn read(session_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(session_dir.join(ENDED_FILE)).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_record_stays_and_one_of_another_boot_counts_from_the_start() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Ended::read(directory.path()), None);
        let first = Ended::new(Duration::from_secs(5), false);
        first.write(directory.path()).unwrap();
        Ended::new(Duration::from_secs(9), true).write(directory.path()).unwrap();
        assert_eq!(Ended::read(directory.path()), Some(first.clone()));
        assert_eq!(first.results_end(), limits::EXPIRED_RESULTS_KEPT + Duration::from_secs(5));
        let older = Ended { boot_id: "another".to_owned(), ..first };
        assert_eq!(older.results_end(), limits::EXPIRED_RESULTS_KEPT);
        fs::write(directory.path().join(ENDED_FILE), "half").unwrap();
        assert_eq!(Ended::read(directory.path()), None);
    }
}
