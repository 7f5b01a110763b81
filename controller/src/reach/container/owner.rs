//! Which process made a container, as a label of it says, and whether that process still lives.
//!
//! An engine may serve several machines, and several containers of one: of a process that cannot be seen from here nobody
//! may say that it is dead.

use std::{fs, os::unix::fs::MetadataExt as _, process};

/// What the process is told by: the boot of its machine, its namespace of processes, its number there and its start.
pub(super) fn this() -> String {
    format!("{}/{}/{}", here(), process::id(), start(process::id()).unwrap_or_default())
}

/// Whether the process is one of this place that has ended.
pub(super) fn is_dead(owner: &str) -> bool {
    let here = here();
    let process = owner.strip_prefix(&here).and_then(|rest| rest.strip_prefix('/')?.split_once('/'));
    // A machine that does not tell its boot may be any.
    let Some((process, begun)) = process.filter(|_| !here.starts_with('/')) else { return false };
    let Ok(process) = process.parse() else { return false };
    // The number may be another one's by now.
    start(process).is_none_or(|start| start.to_string() != begun)
}

/// The boot and the namespace; nothing here has the same.
fn here() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::metadata("/proc/self/ns/pid").map_or(0, |found| found.ino());
    format!("{}/{namespace}", boot.trim())
}

/// When a process has started, in ticks since the boot; none when there is no such process.
fn start(process: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before it is in brackets and may contain anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_of_this_place_that_has_ended_is_dead() {
        let own = this();
        assert!(!is_dead(&own), "{own}");
        let mut child = process::Command::new("sleep").arg("1000").spawn().unwrap();
        let other = format!("{}/{}/{}", here(), child.id(), start(child.id()).unwrap());
        assert!(!is_dead(&other), "{other}");
        let reused = format!("{}/{}/1", here(), child.id());
        assert!(is_dead(&reused), "{reused}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_dead(&other), "{other}");
        let elsewhere = other.replacen(char::is_numeric, "x", 1);
        for foreign in [elsewhere.as_str(), "", "x", &here()] {
            assert!(!is_dead(foreign), "{foreign}");
        }
    }
}
