//! Who has a control group: whoever holds a lock on its directory. The kernel gives the lock back when its holder dies in any
//! way, so that a group that nobody has is known for sure, and the empty ones that a killed agent has left can be removed.
//!
//! Removes only what is empty: removing a group never ends a process. Blocking code; nothing here waits for long.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use millstream_common::clock::Clock;
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, fstat},
    io::Errno,
};
use tracing::{debug, info};

/// How the groups of agents are named; what follows tells their state directories apart.
pub(crate) const AGENT_GROUP: &str = "millstream-";
/// How the groups of sessions in them are named.
pub(crate) const SESSION_GROUP: &str = "s-";
/// Groups of other agents are left alone for this long after they were last seen to change: their agents may be of a version
/// that does not lock them, or about to lock them.
const ABANDONED_MIN: Duration = Duration::from_secs(600);
/// A group that is removed while it is claimed is made again this many times.
const ATTEMPTS_MAX: usize = 8;

/// A group that is in use. Dropping it gives the group up, and removes it if it is empty.
#[derive(Debug)]
pub(crate) struct Claim {
    path: PathBuf,
    _lock: OwnedFd,
}

impl Claim {
    /// Makes a group with those above it, where they are not there, and claims it. Others may claim it too.
    ///
    /// # Errors
    /// When it cannot be made or locked.
    pub(crate) fn make(path: &Path) -> io::Result<Self> {
        for _ in 0..ATTEMPTS_MAX {
            fs::create_dir_all(path)?;
            let lock = match open(path) {
                Ok(lock) => lock,
                // Removed by somebody who took it for abandoned.
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            // Whoever removes groups has the other lock for a moment only.
            while let Err(error) = flock(&lock, FlockOperation::LockShared) {
                if error != Errno::INTR {
                    return Err(error.into());
                }
            }
            if is_the_one_at(&lock, path) {
                return Ok(Self { path: path.to_owned(), _lock: lock });
            }
        }
        Err(io::Error::other("it is removed again and again by somebody else"))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            debug!(group = %self.path.display(), %error, "a control group stays");
        }
    }
}

fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    // Not by path alone: such a descriptor cannot be locked.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

fn is_the_one_at(lock: &OwnedFd, path: &Path) -> bool {
    match (fstat(lock), fs::symlink_metadata(path)) {
        (Ok(locked), Ok(found)) => (locked.st_dev, locked.st_ino) == (found.dev(), found.ino()),
        _ => false,
    }
}

/// Removes a group with those below it as far as they are empty and nobody has claimed them; tells whether it is gone.
pub(crate) fn remove_abandoned(path: &Path) -> bool {
    let lock = match open(path) {
        Ok(lock) => lock,
        Err(error) => return error == Errno::NOENT,
    };
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return false;
    }
    for below in groups_in(path) {
        remove_abandoned(&below);
    }
    match fs::remove_dir(path) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn groups_in(path: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// Removes what killed agents have left: in the group `own`, the groups of sessions that are not among `sessions` (by the
/// names of their groups), and beside it the groups of other agents that nobody has claimed. What is not empty stays.
pub(crate) fn sweep(own: &Path, sessions: &BTreeSet<String>, clock: &dyn Clock) {
    let named = |path: &Path, prefix: &str| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.filter(|name| name.starts_with(prefix)).map(str::to_owned)
    };
    let mut removed = 0_usize;
    for group in groups_in(own) {
        let is_over = named(&group, SESSION_GROUP).is_some_and(|name| !sessions.contains(&name));
        removed += usize::from(is_over && remove_abandoned(&group));
    }
    for group in own.parent().map(groups_in).into_iter().flatten() {
        let is_other = group != own && named(&group, AGENT_GROUP).is_some();
        removed += usize::from(is_other && is_old(&group, clock) && remove_abandoned(&group));
    }
    if removed > 0 {
        info!(removed, "empty control groups of agents and sessions that are no more are removed");
    }
}

/// Whether nothing in a group has changed for a while. What cannot be looked at is not old.
fn is_old(group: &Path, clock: &dyn Clock) -> bool {
    let changed_s = |path: &Path| fs::symlink_metadata(path).map(|found| found.mtime()).ok();
    let newest = groups_in(group).map(|below| changed_s(&below)).chain([changed_s(group)]);
    let Some(newest_s) = newest.collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().max()) else {
        return false;
    };
    let newest = Duration::from_secs(u64::try_from(newest_s).unwrap_or(0));
    Duration::from_nanos(clock.wall_ns()).saturating_sub(newest) > ABANDONED_MIN
}

#[cfg(test)]
mod tests {
    use millstream_common::clock::SystemClock;

    use super::*;

    /// Directories do as groups: a file in one stands for a process.
    fn tree(groups: &[&str]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        groups.iter().for_each(|group| fs::create_dir_all(top.path().join(group)).unwrap());
        top
    }

    fn left(top: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut waiting = vec![top.to_owned()];
        while let Some(group) = waiting.pop() {
            for below in groups_in(&group) {
                found.push(below.strip_prefix(top).unwrap().to_str().unwrap().to_owned());
                waiting.push(below);
            }
        }
        found.sort();
        found
    }

    fn make_old(path: &Path) {
        let long_ago = fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
        fs::File::open(path).unwrap().set_times(long_ago).unwrap();
    }

    #[test]
    fn what_a_killed_agent_has_left_is_removed_and_what_lives_stays() {
        let top = tree(&[
            "millstream-own/s-over/t-1/made-by-a-block",
            "millstream-own/s-open/t-1",
            "millstream-own/s-held/t-1",
            "millstream-own/other",
            "millstream-dead/s-1/t-1",
            "millstream-dead-with-a-session/s-1/t-1",
            "millstream-dead-with-a-process/s-1/t-1",
            "millstream-live",
            "millstream-young",
            "somebody-else",
        ]);
        let at = |path: &str| top.path().join(path);
        fs::write(at("millstream-dead-with-a-process/s-1/t-1/process"), "").unwrap();
        let claims = ["millstream-own/s-held", "millstream-dead-with-a-session/s-1", "millstream-live"];
        let claims: Vec<_> = claims.map(|group| Claim::make(&at(group)).unwrap()).into();
        for group in left(top.path()) {
            if !group.contains("young") {
                make_old(&at(&group));
            }
        }
        let open = BTreeSet::from(["s-open".to_owned()]);
        sweep(&at("millstream-own"), &open, &SystemClock);
        assert_eq!(
            left(top.path()),
            [
                "millstream-dead-with-a-process",
                "millstream-dead-with-a-process/s-1",
                "millstream-dead-with-a-process/s-1/t-1",
                "millstream-dead-with-a-session",
                "millstream-dead-with-a-session/s-1",
                "millstream-dead-with-a-session/s-1/t-1",
                "millstream-live",
                "millstream-own",
                "millstream-own/other",
                "millstream-own/s-held",
                "millstream-own/s-held/t-1",
                "millstream-own/s-open",
                "millstream-own/s-open/t-1",
                "millstream-young",
                "somebody-else",
            ]
        );
        drop(claims);
        assert!(!at("millstream-live").exists(), "whoever has an empty group removes it");
    }

    #[test]
    fn a_group_can_be_claimed_by_many_and_is_removed_by_none_of_the_others() {
        let top = tree(&[]);
        let path = top.path().join("a/b");
        let (first, second) = (Claim::make(&path).unwrap(), Claim::make(&path).unwrap());
        assert!(!remove_abandoned(&path));
        fs::create_dir(path.join("below")).unwrap();
        drop(first);
        assert!(!remove_abandoned(&path));
        drop(second);
        assert!(remove_abandoned(&path) && remove_abandoned(&path));
    }
}
