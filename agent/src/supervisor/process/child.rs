//! What a new process does between its making and its program: system calls only.
//!
//! Everything it needs is made before it exists, for it may neither allocate nor take a lock. What it cannot do it tells
//! through a pipe and ends.

use std::{
    ffi::{CStr, CString, c_char, c_int},
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    ptr,
    sync::OnceLock,
};

use super::{Channels, Launch, SpawnError, Step};
use crate::supervisor::kernel::{
    CLONE_CLEAR_SIGHAND, CLONE_INTO_CGROUP, CLONE_PIDFD, CloneArguments, Kernel,
};

/// Descriptors below may be given to the block: what the child itself needs is moved above.
const OWN_DESCRIPTOR_MIN: RawFd = 16;
/// How often a program that is being written is tried again, 5 ms apart: another process that is just being made may
/// hold it open for writing, for as long as it takes to begin its own program.
const BUSY_TRIES_MAX: u32 = 400;
const BUSY_PAUSE_NS: i64 = 5_000_000;

/// Everything the child needs, made before it exists: between fork and exec it may neither allocate nor lock.
pub(super) struct Image {
    candidates: Vec<CString>,
    _argv: Vec<CString>,
    argv_pointers: Vec<*const c_char>,
    _environment: Vec<CString>,
    environment_pointers: Vec<*const c_char>,
    directory: CString,
    ids: Option<(u32, u32)>,
    groups: Vec<u32>,
    moved: Option<(RawFd, RawFd)>,
    null: RawFd,
    stdout: RawFd,
    stderr: RawFd,
    /// What it tells its phases through, and the number that it finds that under.
    reports: Option<(RawFd, RawFd)>,
    joins: Vec<RawFd>,
    report: RawFd,
    gate: Option<RawFd>,
    ignored: &'static [c_int],
    /// How readily the kernel ends it when memory runs out, unless it is as we are.
    kill_score: Option<&'static CStr>,
}

impl Image {
    pub(super) fn new(
        launch: &Launch,
        channels: Channels<'_>,
        joins: Vec<RawFd>,
        report: &OwnedFd,
        gate: Option<&OwnedFd>,
    ) -> Result<Self, SpawnError> {
        let text = |what, bytes: &[u8]| CString::new(bytes).map_err(|_| SpawnError::Nul { what });
        let candidates: Result<Vec<_>, _> =
            launch.candidates().iter().map(|path| text("program", path.as_os_str().as_bytes())).collect();
        let argv: Result<Vec<_>, _> =
            launch.argv.iter().map(|word| text("argument list", word.as_bytes())).collect();
        let environment: Result<Vec<_>, _> = launch
            .environment
            .iter()
            .map(|(name, value)| {
                text("environment", [name.as_bytes(), b"=", value.as_bytes()].concat().as_slice())
            })
            .collect();
        let (argv, environment) = (argv?, environment?);
        let pointers = |texts: &[CString]| {
            texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect::<Vec<*const c_char>>()
        };
        Ok(Self {
            candidates: candidates?,
            argv_pointers: pointers(&argv),
            _argv: argv,
            environment_pointers: pointers(&environment),
            _environment: environment,
            directory: text("working directory", launch.working_directory.as_os_str().as_bytes())?,
            ids: launch.user.as_ref().map(|user| (user.uid, user.gid)),
            groups: launch.user.as_ref().map(|user| user.groups.clone()).unwrap_or_default(),
            moved: launch.moved,
            null: channels.null.as_raw_fd(),
            stdout: channels.stdout.as_raw_fd(),
            stderr: channels.stderr.as_raw_fd(),
            reports: channels.reports.map(|end| end.as_raw_fd()).zip(launch.reports),
            joins,
            report: report.as_raw_fd(),
            gate: gate.map(AsRawFd::as_raw_fd),
            ignored: ignored_signals(),
            kill_score: kill_score(),
        })
    }
}

/// Forks; the child does not return from here.
#[expect(unsafe_code, reason = "no safe interface makes a process inside a control group")]
pub(super) fn make(
    image: &Image,
    cgroup: Option<BorrowedFd<'_>>,
    kernel: &Kernel,
) -> io::Result<(u32, Option<OwnedFd>)> {
    let mut pidfd: c_int = -1;
    let mut arguments = CloneArguments {
        flags: CLONE_PIDFD | CLONE_CLEAR_SIGHAND,
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        ..CloneArguments::default()
    };
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: both sets are valid for the calls. While all signals are blocked no handler of this process can run in the
    // child, where it would act on descriptors that are shared with us.
    let mut before = unsafe { std::mem::zeroed::<libc::sigset_t>() };
    // SAFETY: as above.
    unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    // SAFETY: the arguments are valid and as long as said. Without a shared address space this is a fork: the child goes
    // on with a copy of this stack and calls `run_child` alone, which keeps to what is safe there and never returns.
    let made = unsafe {
        if kernel.has_births_in_groups {
            let made = libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArguments>());
            if made == 0 {
                run_child(image, kernel)
            }
            made
        } else {
            make_the_old_way(image, kernel)
        }
    };
    let error = io::Error::last_os_error();
    // SAFETY: `before` was filled in above.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
    }
    let Ok(pid @ 1..) = u32::try_from(made) else { return Err(error) };
    // SAFETY: where there is a descriptor, the kernel has just made it for us.
    Ok((pid, (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) })))
}

/// For older kernels, and for sandboxes that refuse `clone3`. Without a descriptor: the oldest ignore that one is asked for.
#[expect(unsafe_code, reason = "see `make`")]
unsafe fn make_the_old_way(image: &Image, kernel: &Kernel) -> libc::c_long {
    let flags = u64::from(libc::SIGCHLD.unsigned_abs());
    // SAFETY: as in `make`.
    unsafe {
        let made = libc::syscall(libc::SYS_clone, flags, 0_u64, 0_u64, 0_u64, 0_u64);
        if made == 0 {
            // No handler of ours may run here when signals are let in again.
            for signal in 1..=64 {
                libc::signal(signal, libc::SIG_DFL);
            }
            run_child(image, kernel)
        }
        made
    }
}

/// The child between fork and exec: system calls only.
#[expect(unsafe_code, reason = "a child of a process with threads may only make system calls")]
unsafe fn run_child(image: &Image, kernel: &Kernel) -> ! {
    // SAFETY: every pointer is into `image`, which lives on the copied stack and heap; every call is safe after fork.
    unsafe {
        let report = raise(image.report);
        let failed = fail_with(report);
        for &signal in image.ignored {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::setsid();
        if let Some(score) = image.kill_score {
            set_kill_score(score);
        }
        for &join in &image.joins {
            if libc::write(join, c"0".as_ptr().cast(), 1) != 1 {
                failed(Step::Limits);
            }
        }
        let gate = image.gate.map_or(-1, |gate| raise(gate));
        if !place_descriptors(image) {
            failed(Step::Descriptors);
        }
        close_all_but(image, report, gate, kernel);
        if gate >= 0 {
            let mut go = 0_u8;
            // Whoever held the other end is gone: nobody will ever let this process go.
            if libc::read(gate, (&raw mut go).cast(), 1) != 1 {
                libc::_exit(0);
            }
            libc::close(gate);
        }
        if let Some((uid, gid)) = image.ids
            && !become_user(uid, gid, &image.groups)
        {
            failed(Step::User);
        }
        if libc::chdir(image.directory.as_ptr()) != 0 {
            failed(Step::Directory);
        }
        // If we die first, this process must not go on: nobody would know what came of it.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        execute(image);
        failed(Step::Program);
        libc::_exit(127)
    }
}

/// Tries every file that the program may be; returns with the error that tells most in `errno`.
#[expect(unsafe_code, reason = "see `run_child`")]
unsafe fn execute(image: &Image) {
    // SAFETY: the lists end with a null pointer and their texts live as long as `image`.
    unsafe {
        let mut answer = libc::ENOENT;
        for candidate in &image.candidates {
            let mut tries = 0;
            loop {
                libc::execve(
                    candidate.as_ptr(),
                    image.argv_pointers.as_ptr(),
                    image.environment_pointers.as_ptr(),
                );
                tries += 1;
                if *libc::__errno_location() != libc::ETXTBSY || tries > BUSY_TRIES_MAX {
                    break;
                }
                let pause = libc::timespec { tv_sec: 0, tv_nsec: BUSY_PAUSE_NS };
                libc::nanosleep(&raw const pause, ptr::null_mut());
            }
            match *libc::__errno_location() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => answer = libc::EACCES,
                other => {
                    answer = other;
                    break;
                }
            }
        }
        *libc::__errno_location() = answer;
    }
}

/// Puts input and outputs in place.
#[expect(unsafe_code, reason = "see `run_child`")]
unsafe fn place_descriptors(image: &Image) -> bool {
    // SAFETY: only numbers are passed.
    unsafe {
        let (null, stdout, stderr) = (raise(image.null), raise(image.stdout), raise(image.stderr));
        let place = |from: RawFd, to: RawFd| libc::dup2(from, to) == to;
        let reports = image.reports.map(|(from, to)| (raise(from), to));
        let placed = match image.moved {
            None => place(null, 0) && place(stdout, 1) && place(stderr, 2),
            Some((to_stdout, to_stderr)) => {
                place(null, 0)
                    && place(null, 1)
                    && place(null, 2)
                    && place(stdout, to_stdout)
                    && place(stderr, to_stderr)
            }
        };
        placed && reports.is_none_or(|(from, to)| place(from, to))
    }
}

/// The same descriptor with a number that the block is never given; closed when the program begins.
#[expect(unsafe_code, reason = "see `run_child`")]
unsafe fn raise(descriptor: RawFd) -> RawFd {
    if descriptor >= OWN_DESCRIPTOR_MIN {
        return descriptor;
    }
    // SAFETY: only numbers are passed.
    unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, OWN_DESCRIPTOR_MIN) }
}

/// Closes what is not this child's: a held process must not keep alive what others wait to see closed.
#[expect(unsafe_code, reason = "see `run_child`")]
unsafe fn close_all_but(image: &Image, report: RawFd, gate: RawFd, kernel: &Kernel) {
    let (moved_a, moved_b) = image.moved.unwrap_or((-1, -1));
    let told = image.reports.map_or(-1, |(_, to)| to);
    let mut kept = [2, moved_a, moved_b, told, report, gate];
    kept.sort_unstable();
    if !kernel.has_close_range {
        // SAFETY: as this function.
        unsafe { close_listed_but(&kept) };
        return;
    }
    let mut from = 0;
    for number in kept.into_iter().filter(|&number| number >= 2) {
        // Descriptors 0, 1 and 2 are in place already.
        let first = if from == 0 { 3 } else { from };
        if number > first {
            // SAFETY: only numbers are passed; none of them is used any more.
            unsafe { libc::syscall(libc::SYS_close_range, first, number - 1, 0) };
        }
        from = number + 1;
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, from.max(3), u32::MAX, 0) };
}

/// The same one by one, for older kernels: those that the kernel lists as open.
#[expect(unsafe_code, reason = "see `run_child`")]
unsafe fn close_listed_but(kept: &[RawFd]) {
    /// Where the name begins in an entry, and where its length is.
    const NAME: usize = 19;
    const LENGTH: usize = 16;
    // SAFETY: the buffer is as long as said and lives until the calls are over. Closing while listing is fine: the kernel
    // goes on behind the number that it listed last.
    unsafe {
        let list =
            libc::open(c"/proc/self/fd".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC);
        if list < 0 {
            return;
        }
        let mut buffer = [0_u8; 1024];
        loop {
            let length = libc::syscall(libc::SYS_getdents64, list, buffer.as_mut_ptr(), buffer.len());
            let Ok(length @ 1..) = usize::try_from(length) else { break };
            let mut entries = buffer.get(..length).unwrap_or_default();
            while let Some(&[low, high]) = entries.get(LENGTH..NAME - 1) {
                let (entry, rest) =
                    entries.split_at(usize::from(u16::from_ne_bytes([low, high])).min(entries.len()));
                entries = rest;
                let digits =
                    entry.get(NAME..).unwrap_or_default().iter().take_while(|byte| byte.is_ascii_digit());
                let number = digits.fold(0, |number: RawFd, digit| number * 10 + RawFd::from(digit - b'0'));
                // Descriptors 0, 1 and 2 are in place already, and what is no number counts as 0.
                if number > 2 && number != list && !kept.contains(&number) {
                    libc::close(number);
                }
            }
        }
        libc::close(list);
    }
}

/// A process may always be made easier to kill. Where that fails, it is as hard to kill as we are, and runs all the same.
#[expect(unsafe_code, reason = "see `run_child`")]
unsafe fn set_kill_score(score: &CStr) {
    // SAFETY: both texts live until the calls are over.
    unsafe {
        let file = libc::open(KILL_SCORE_FILE.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file >= 0 {
            libc::write(file, score.as_ptr().cast(), score.count_bytes());
            libc::close(file);
        }
    }
}

/// Raw calls: those of the C library would ask all threads of a process that has none here to follow.
#[expect(unsafe_code, reason = "see `run_child`")]
unsafe fn become_user(uid: u32, gid: u32, groups: &[u32]) -> bool {
    // SAFETY: the list is as long as said.
    unsafe {
        libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) == 0
            && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
            && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
    }
}

/// A way to tell what failed, with the system's answer, and to end.
#[expect(unsafe_code, reason = "see `run_child`")]
fn fail_with(report: RawFd) -> impl Fn(Step) {
    move |step| {
        // SAFETY: the bytes live until the call is over.
        unsafe {
            let mut bytes = [0_u8; 8];
            let (a, b) = bytes.split_at_mut(4);
            a.copy_from_slice(&step.number().to_ne_bytes());
            b.copy_from_slice(&(*libc::__errno_location()).to_ne_bytes());
            libc::write(report, bytes.as_ptr().cast(), bytes.len());
            libc::_exit(127);
        }
    }
}

/// Signals that this process ignores: a program would go on ignoring them. Rust itself ignores SIGPIPE.
#[expect(unsafe_code, reason = "no safe interface tells what a signal does")]
fn ignored_signals() -> &'static [c_int] {
    static IGNORED: OnceLock<Vec<c_int>> = OnceLock::new();
    IGNORED.get_or_init(|| {
        let is_ignored = |&signal: &c_int| {
            // SAFETY: with no new action the call only fills in the old one, which is valid for it.
            unsafe {
                let mut action = std::mem::zeroed::<libc::sigaction>();
                libc::sigaction(signal, ptr::null(), &raw mut action) == 0
                    && action.sa_sigaction == libc::SIG_IGN
            }
        };
        (1..=64).filter(is_ignored).collect()
    })
}

/// Where a process says how readily it is killed when memory runs out.
const KILL_SCORE_FILE: &CStr = c"/proc/self/oom_score_adj";

/// What a block gets when we were made hard to kill: when memory runs out, blocks go first.
fn kill_score() -> Option<&'static CStr> {
    static OWN: OnceLock<Option<&'static CStr>> = OnceLock::new();
    *OWN.get_or_init(|| {
        let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        kill_score_beside(&own)
    })
}

fn kill_score_beside(own: &str) -> Option<&'static CStr> {
    own.trim().parse::<i32>().is_ok_and(|own| own < 0).then_some(c"0")
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::fd::AsFd as _};

    use super::*;
    use crate::supervisor::kernel::kernel;

    #[test]
    fn blocks_are_easier_to_kill_than_agents_that_were_made_hard_to_kill() {
        assert_eq!(kill_score_beside("-900\n"), Some(c"0"));
        assert_eq!(kill_score_beside("0\n"), None);
        assert_eq!(kill_score_beside("300\n"), None);
    }

    #[test]
    fn a_process_gets_the_score_that_it_is_to_have() {
        let launch = Launch {
            argv: vec!["cat".to_owned(), "/proc/self/oom_score_adj".to_owned()],
            environment: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
            working_directory: "/".into(),
            user: None,
            moved: None,
            held: false,
            reports: None,
        };
        let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let (_report, report_end) = io::pipe().unwrap();
        let channels =
            Channels { null: null.as_fd(), stdout: writer.as_fd(), stderr: writer.as_fd(), reports: None };
        let mut image = Image::new(&launch, channels, Vec::new(), &report_end.into(), None).unwrap();
        // Any process may raise its own; lowering it takes a privilege that a test may lack.
        image.kill_score = Some(c"321");
        make(&image, None, kernel()).unwrap();
        drop(writer);
        let mut told = String::new();
        reader.read_to_string(&mut told).unwrap();
        assert_eq!(told, "321\n");
    }
}
