//! Which calls of newer kernels this one has: asked once in the life of a process, so that nothing else tries what may fail.
//!
//! A sandbox that refuses a call is as good as a kernel that lacks it. Nothing of what is asked changes anything.

use std::{io, ptr, sync::OnceLock};

use rustix::process::{PidfdFlags, getpid, pidfd_open};

/// What may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Processes can be held and signalled by descriptors: `pidfd_open` and `pidfd_send_signal`, Linux 5.3.
    pub(crate) has_descriptors: bool,
    /// A process can be made with a descriptor, with clean signals and inside a control group: `clone3`, Linux 5.7. Trees are
    /// contained by shims where it cannot.
    pub(crate) has_births_in_groups: bool,
    /// Many files can be closed at once: `close_range`, Linux 5.9.
    pub(crate) has_close_range: bool,
}

/// This kernel.
pub(crate) fn kernel() -> &'static Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    KERNEL.get_or_init(Kernel::ask)
}

impl Kernel {
    /// One of 2016, for tests.
    #[cfg(test)]
    pub(crate) const OLD: Self =
        Self { has_descriptors: false, has_births_in_groups: false, has_close_range: false };

    fn ask() -> Self {
        Self {
            has_descriptors: has_descriptors(),
            has_births_in_groups: has_births_in_groups(),
            has_close_range: has_close_range(),
        }
    }
}

#[expect(unsafe_code, reason = "rustix cannot send the signal 0, which only asks")]
fn has_descriptors() -> bool {
    use std::os::fd::AsRawFd as _;
    let Ok(own) = pidfd_open(getpid(), PidfdFlags::empty()) else { return false };
    // SAFETY: the descriptor lives until the call is over; there is no information block.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, own.as_raw_fd(), 0, ptr::null::<libc::siginfo_t>(), 0)
    };
    sent == 0
}

/// Asks for a process that cannot be: its number is to be read from nowhere. A kernel that knows everything else that is asked
/// for says just that, and one that does not says that the message is too long, or that there is no such call.
#[expect(unsafe_code, reason = "no safe interface makes this call")]
fn has_births_in_groups() -> bool {
    let nowhere = 1;
    let mut arguments = CloneArguments {
        flags: CLONE_PIDFD | CLONE_CLEAR_SIGHAND | CLONE_INTO_CGROUP,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        set_tid: nowhere,
        set_tid_size: 1,
        cgroup: 1,
        ..CloneArguments::default()
    };
    // SAFETY: the arguments are valid and as long as said, and no process can come of them.
    let made = unsafe {
        let made = libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArguments>());
        if made == 0 {
            // Only a kernel that does not read the number could get here, and this is not the process that asked.
            libc::_exit(0);
        }
        made
    };
    made < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

#[expect(unsafe_code, reason = "no safe interface makes this call")]
fn has_close_range() -> bool {
    // SAFETY: only numbers are passed; no process has a descriptor with the last of all numbers.
    unsafe { libc::syscall(libc::SYS_close_range, u32::MAX, u32::MAX, 0) == 0 }
}

pub(super) const CLONE_PIDFD: u64 = 0x1000;
pub(super) const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
pub(super) const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// What `clone3` takes.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct CloneArguments {
    pub(super) flags: u64,
    pub(super) pidfd: u64,
    pub(super) child_tid: u64,
    pub(super) parent_tid: u64,
    pub(super) exit_signal: u64,
    pub(super) stack: u64,
    pub(super) stack_size: u64,
    pub(super) tls: u64,
    pub(super) set_tid: u64,
    pub(super) set_tid_size: u64,
    pub(super) cgroup: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_has_what_its_version_says_or_a_sandbox_refuses_it() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
        let version = (numbers.next().unwrap(), numbers.next().unwrap());
        let filtered = std::fs::read_to_string("/proc/self/status").unwrap().contains("Seccomp:\t2");
        let Kernel { has_descriptors, has_births_in_groups, has_close_range } = *kernel();
        for (has, since) in
            [(has_descriptors, (5, 3)), (has_births_in_groups, (5, 7)), (has_close_range, (5, 9))]
        {
            assert!(has == (version >= since) || (!has && filtered), "{:?} on {release}", kernel());
        }
    }
}
