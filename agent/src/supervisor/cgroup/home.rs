//! The group that agents make their groups in when it is not their own: it stays while agents come and go.
//!
//! A service manager puts the process of a service into the service's own group. It cannot do so any more once that group
//! hands controllers on to groups below it: as long as limited trees run, an agent could not be started again. So a
//! service manager keeps a second group, by a process that does nothing else, and tells the agent which one it is. Here
//! both keep to one rule: no process lives in that group itself.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use millstream_common::limits;
use rustix::process::Signal;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{Group, Hierarchies, is_writable};

/// Names the group, as it stands in `/proc/self/cgroup`: `/system.slice/millstream-blocks.service`.
pub(crate) const GROUP_VARIABLE: &str = "MILLSTREAM_CONTROL_GROUP";
/// The group below it that whoever keeps it lives in, and the supervisors.
const KEEPERS_GROUP: &str = "supervisors";

/// The directory of the group that this process was told, if it was and may use it.
pub(super) fn told(mounts: &str) -> Option<PathBuf> {
    let told = env::var(GROUP_VARIABLE).ok()?;
    directory(mounts, &told).filter(|path| is_writable(path))
}

fn directory(mounts: &str, told: &str) -> Option<PathBuf> {
    Hierarchies::parse(mounts, &format!("0::{told}\n")).unified
}

/// Says so in the log when this process was told a group that it cannot use.
pub(crate) fn check() {
    let Some(named) = env::var_os(GROUP_VARIABLE) else { return };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if told(&mounts).is_none() {
        warn!(
            group = %named.display(),
            "the control group that {GROUP_VARIABLE} names cannot be used: blocks run in groups below this agent's own; is \
             the unit millstream-blocks running?"
        );
    }
}

/// Makes the group of this process one that agents can use, by moving this process into a group below.
///
/// # Errors
/// When there is no group of version 2, or it is not this process's to divide.
pub(crate) fn keep() -> io::Result<PathBuf> {
    let Some(own) = Hierarchies::find().unified else {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "this host has no writable control group of version 2",
        ));
    };
    enter_keepers(&own)?;
    Ok(own)
}

/// Asks everybody in the groups of agents below this one to end, and waits until they have, as long as a block that is
/// stopped may take. Whoever is left, and what streams have begun meanwhile, the service manager kills.
///
/// # Cancel safety
/// Safe: what was asked to end has been asked.
pub(crate) async fn end_blocks(group: &Path) {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    let is_an_agents = |entry: &fs::DirEntry| {
        entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != KEEPERS_GROUP
    };
    let mut ending = JoinSet::new();
    for agents in entries.filter(is_an_agents).filter_map(|entry| Group::open(entry.path()).ok()) {
        ending.spawn(async move {
            let asked = agents.signal(Signal::TERM);
            match agents.wait_until_empty(limits::GRACE).await {
                Ok(true) if asked == 0 => {}
                Ok(have_ended) => info!(asked, have_ended, "blocks were asked to end"),
                Err(error) => {
                    warn!(%error, asked, "blocks were asked to end; whether they have is not known")
                }
            }
        });
    }
    ending.join_all().await;
}

/// Leaves the agent's own group, if there is another: what ends the agent's group does not end its supervisors.
pub(crate) fn leave_agent() {
    if env::var_os(GROUP_VARIABLE).is_none() {
        return;
    }
    let entered = fs::read_to_string("/proc/self/mountinfo").and_then(|mounts| match told(&mounts) {
        Some(group) => enter_keepers(&group),
        None => Err(io::Error::new(io::ErrorKind::NotFound, "the group is not there")),
    });
    if let Err(error) = entered {
        warn!(%error, "a supervisor stays in the control group of its agent, and ends when that is killed");
    }
}

fn enter_keepers(group: &Path) -> io::Result<()> {
    let below = group.join(KEEPERS_GROUP);
    fs::create_dir_all(&below)?;
    fs::write(below.join("cgroup.procs"), "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_told_group_is_found_below_the_mount() {
        let mounts = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = directory(mounts, "/system.slice/millstream-blocks.service");
        assert_eq!(
            found.as_deref(),
            Some(Path::new("/sys/fs/cgroup/unified/system.slice/millstream-blocks.service"))
        );
        assert_eq!(directory("", "/system.slice"), None);
    }
}
