//! Takes along what agents on demand have left that were killed and that nobody starts again at their place: the next one of
//! the same user, at whatever place, does it.
//!
//! Nothing is touched that belongs to somebody else, that somebody holds, whose agent lives, or in which a supervisor still
//! waits for its controller.

use std::{
    fs,
    path::{Path, PathBuf},
};

use millstream_common::clock::World;
use tracing::{debug, info, warn};

use super::{NAME_DIGITS, PARENTS, directory::Directory, prefix};
use crate::door::{Door, DoorConfig, DoorError, has_supervisors};

/// Looks for such directories beside the agent's own, and removes them.
pub(super) async fn sweep(own: &Path, config: impl Fn(PathBuf) -> DoorConfig) {
    for parent in PARENTS {
        for path in siblings(Path::new(parent)).into_iter().filter(|path| path != own) {
            match remove(&path, &config).await {
                Ok(true) => info!(directory = %path.display(), "removed what a killed agent had left"),
                Ok(false) => {}
                Err(error) => debug!(directory = %path.display(), %error, "not removed"),
            }
        }
    }
}

/// Directories that are called as this user's are.
fn siblings(parent: &Path) -> Vec<PathBuf> {
    let prefix = prefix();
    let is_one = |name: &str| {
        let digits = name.strip_prefix(&prefix).unwrap_or_default();
        digits.len() == NAME_DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_str().is_some_and(is_one)).map(|entry| entry.path()).collect()
}

/// Removes one, with what its sessions have left on the host. False when somebody has it.
async fn remove(path: &Path, config: &impl Fn(PathBuf) -> DoorConfig) -> Result<bool, DoorError> {
    // Whoever comes meanwhile waits, and then finds another directory or none.
    let Ok(directory) = Directory::open(path) else { return Ok(false) };
    if !directory.try_hold() || !directory.is_current() || has_supervisors(path) {
        return Ok(false);
    }
    // What the next agent there would do: it ends what dead supervisors have left.
    let door = match Door::open(config(path.to_owned()), World::system()).await {
        Err(DoorError::InUse { .. }) => return Ok(false),
        opened => opened?,
    };
    for survivor in door.ending().close_all().await {
        warn!(%survivor, "left behind");
    }
    drop(door);
    fs::remove_dir_all(path)
        .map(|()| true)
        .map_err(|source| DoorError::State { path: path.to_owned(), source })
}
