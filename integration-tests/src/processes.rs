//! What runs on this machine, read from `/proc`: for claims about processes that must be gone, and about memory.

use std::fs;

/// Numbers of all live processes; those that only wait to be reaped are gone.
fn live() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|pid| !is_zombie(*pid))
}

fn is_zombie(pid: u32) -> bool {
    // The name may hold spaces and parentheses: what follows the last one is the state.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit(") ").next().is_none_or(|rest| rest.starts_with(['Z', 'X'])))
}

/// Whether a process is there and is not waiting to be reaped.
#[must_use]
pub fn is_live(pid: u32) -> bool {
    !is_zombie(pid)
}

/// Live processes that have `NAME=VALUE` in the environment they were started with.
#[must_use]
pub fn with_variable(variable: &str) -> Vec<u32> {
    live()
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|all| all.split(|&byte| byte == 0).any(|one| one == variable.as_bytes()))
        })
        .collect()
}

/// Live processes one of whose arguments is exactly `argument`.
#[must_use]
pub fn with_argument(argument: &str) -> Vec<u32> {
    live()
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|all| all.split(|&byte| byte == 0).any(|one| one == argument.as_bytes()))
        })
        .collect()
}

/// Live processes whose parent is `pid`.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    live().filter(|child| status_field(*child, "PPid:") == Some(u64::from(pid))).collect()
}

/// Memory that a process holds now.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn resident_bytes(pid: u32) -> u64 {
    status_field(pid, "VmRSS:").expect("the process lives") * 1024
}

/// The most memory that a process has held.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn peak_resident_bytes(pid: u32) -> u64 {
    status_field(pid, "VmHWM:").expect("the process lives") * 1024
}

fn status_field(pid: u32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// Kills a process at once. What is gone already is fine.
pub fn kill(pid: u32) {
    let number = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(handle) =
        number.and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok())
    {
        // The only failure left is that it has ended meanwhile.
        let _ended = rustix::process::pidfd_send_signal(&handle, rustix::process::Signal::KILL);
    }
}

/// Stops a process where it stands, or lets it go on.
///
/// # Panics
/// When there is no such process.
pub fn freeze(pid: u32, frozen: bool) {
    let signal = if frozen { rustix::process::Signal::STOP } else { rustix::process::Signal::CONT };
    let number = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process number");
    rustix::process::kill_process(number, signal).expect("the process lives");
}
