//! Becomes a program that finds no call which Linux got after 2016: they fail for it, and for all that it starts, as they do there.
//!
//! `below-an-old-kernel PROGRAM [ARGUMENTS…]`. What is refused is listed here, and nothing else is changed: what an old kernel lacks
//! besides calls, such as fields in `/proc`, is there all the same.

use std::{
    env, io,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};

/// Calls that Linux 4.4 lacks. It answers that there is no such call.
const LATER: &[libc::c_long] = &[
    libc::SYS_copy_file_range,         // 4.5
    libc::SYS_preadv2,                 // 4.6
    libc::SYS_pwritev2,                // 4.6
    libc::SYS_pkey_mprotect,           // 4.9
    libc::SYS_statx,                   // 4.11
    libc::SYS_rseq,                    // 4.18
    libc::SYS_pidfd_send_signal,       // 5.1
    libc::SYS_io_uring_setup,          // 5.1
    libc::SYS_open_tree,               // 5.2
    libc::SYS_move_mount,              // 5.2
    libc::SYS_fsopen,                  // 5.2
    libc::SYS_fsmount,                 // 5.2
    libc::SYS_pidfd_open,              // 5.3
    libc::SYS_clone3,                  // 5.3
    libc::SYS_openat2,                 // 5.6
    libc::SYS_pidfd_getfd,             // 5.6
    libc::SYS_faccessat2,              // 5.8
    libc::SYS_close_range,             // 5.9
    libc::SYS_process_madvise,         // 5.10
    libc::SYS_epoll_pwait2,            // 5.11
    libc::SYS_mount_setattr,           // 5.12
    libc::SYS_landlock_create_ruleset, // 5.13
    libc::SYS_futex_waitv,             // 5.16
    libc::SYS_set_mempolicy_home_node, // 5.17
    FCHMODAT2,
];
const FCHMODAT2: libc::c_long = 452; // 6.6

/// A kernel before 5.2 ignores that a descriptor is asked for and makes a process without: who asks is wrong there. No filter
/// can have it ignored, so that it is refused.
const CLONE_PIDFD: u32 = 0x1000;
/// One way to name a process to wait for: 5.4.
const P_PIDFD: u32 = 3;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IS_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const HAS_BITS: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const ANSWER: u32 = libc::BPF_RET | libc::BPF_K;

/// Where the number of the call and the lower half of its first argument lie in what a filter sees.
const NUMBER: u32 = 0;
const FIRST_ARGUMENT: u32 = 16;

fn main() -> ExitCode {
    let mut words = env::args_os().skip(1);
    let Some(program) = words.next() else {
        eprintln!("below-an-old-kernel: name a program");
        return ExitCode::from(2);
    };
    if let Err(error) = filter() {
        eprintln!("below-an-old-kernel: the filter is refused: {error}");
        return ExitCode::FAILURE;
    }
    let error = Command::new(&program).args(words).exec();
    eprintln!("below-an-old-kernel: {}: {error}", program.display());
    ExitCode::FAILURE
}

fn line(code: u32, value: u32, yes: usize, no: usize) -> libc::sock_filter {
    libc::sock_filter {
        code: u16::try_from(code).expect("codes are short"),
        jt: u8::try_from(yes).expect("the filter is short"),
        jf: u8::try_from(no).expect("the filter is short"),
        k: value,
    }
}

fn refuse(error: i32) -> libc::sock_filter {
    line(ANSWER, libc::SECCOMP_RET_ERRNO | error.unsigned_abs(), 0, 0)
}

/// Whoever makes this call with such a first argument is refused.
fn unless(call: libc::c_long, asks: u32, value: u32, error: i32) -> [libc::sock_filter; 5] {
    [
        line(IS_EQUAL, number(call), 0, 4),
        line(LOAD, FIRST_ARGUMENT, 0, 0),
        line(asks, value, 0, 1),
        refuse(error),
        line(LOAD, NUMBER, 0, 0),
    ]
}

fn number(call: libc::c_long) -> u32 {
    u32::try_from(call).expect("numbers of calls are small")
}

#[expect(unsafe_code, reason = "no safe interface installs a filter")]
fn filter() -> io::Result<()> {
    let mut lines = vec![line(LOAD, NUMBER, 0, 0)];
    lines.extend(unless(libc::SYS_waitid, IS_EQUAL, P_PIDFD, libc::EINVAL));
    lines.extend(unless(libc::SYS_clone, HAS_BITS, CLONE_PIDFD, libc::EINVAL));
    for (before, &call) in LATER.iter().enumerate() {
        // To the last line, past those that follow and the one that lets everything else through.
        lines.push(line(IS_EQUAL, number(call), LATER.len() - before, 0));
    }
    lines.push(line(ANSWER, libc::SECCOMP_RET_ALLOW, 0, 0));
    lines.push(refuse(libc::ENOSYS));
    let program = libc::sock_fprog {
        len: u16::try_from(lines.len()).expect("the filter is short"),
        filter: lines.as_mut_ptr(),
    };
    // SAFETY: the filter is as long as said and lives until the calls are over.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
}
