//! A single-threaded subreaper for hosts without control groups of version 2.
//!
//! Each task gets one. Whatever its processes start and abandon becomes the shim's child, so that nothing can leave the
//! tree by forking twice. It spawns, signals and reaps on the supervisor's word; when the supervisor is gone it kills the
//! tree and ends. It reads no output and knows nothing of tasks.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicI32, Ordering},
    time::Duration,
};

use millstream_common::{
    clock::{Clock as _, SystemClock},
    limits,
    outcome::{Exit, LeakedProcess},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, WaitId, WaitIdOptions, kill_process, waitid},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    attendant::OutputEnds,
    cgroup::{self, LEAKED_NAMED_MAX},
    process::{Launch, Placement, Process, StartFailure, spawn},
    task::Refusal,
};
use crate::entry::{INHERITED_DESCRIPTOR_MIN, Relaunch, Role};

/// One order or answer: the arguments and environment of a process, with room.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Descriptors that a shim finds open: its orders, the write ends of its tree's outputs, and, where its tree tells its
/// phases, the write end for that.
const ORDERS: RawFd = INHERITED_DESCRIPTOR_MIN;
const STDOUT: RawFd = INHERITED_DESCRIPTOR_MIN + 1;
const STDERR: RawFd = INHERITED_DESCRIPTOR_MIN + 2;
const REPORTS: RawFd = INHERITED_DESCRIPTOR_MIN + 3;
/// Argument of a shim whose tree tells its phases.
const WITH_REPORTS: &str = "reports";

/// What the supervisor says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Make the process of a phase.
    Start {
        /// What to run.
        launch: Box<Launch>,
        /// Control groups of version 1 that it enters.
        joins: Vec<PathBuf>,
    },
    /// Let the held process go.
    Go,
    /// Send a signal to the running phase.
    Signal(i32),
    /// End every process.
    End,
}

/// What the shim says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Told {
    /// The process exists.
    Started {
        /// Its number.
        pid: u32,
    },
    /// No process could be made.
    NotStarted(Refusal),
    /// The process has ended; with the reason when it could not even begin its program.
    Exited {
        /// How.
        exit: Exit,
        /// Why it could not begin.
        failure: Option<StartFailure>,
    },
    /// No process is left, or those that are left cannot be ended.
    Ended {
        /// Those that were left when the phase had ended; the first few.
        leaked: Vec<LeakedProcess>,
        /// Number of all of them.
        leaked_count: u32,
        /// Those that could not be ended.
        survivors: u32,
    },
}

/// Writes a message with its length.
///
/// # Errors
/// When the other end is gone.
fn put(target: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    target.write_all(&encode(message)?)
}

/// A message with its length.
///
/// # Errors
/// When it is too long.
pub(crate) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    Ok([&length.to_be_bytes()[..], &body].concat())
}

/// Takes the next message out of what came so far, if it is complete.
///
/// # Errors
/// When it is too long or cannot be understood.
pub(crate) fn decode<M: DeserializeOwned>(buffer: &mut Vec<u8>) -> io::Result<Option<M>> {
    let Some(header) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = usize::try_from(u32::from_be_bytes(*header)).unwrap_or(usize::MAX);
    if length > MESSAGE_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let Some(body) = buffer.get(4..4 + length) else { return Ok(None) };
    let message = serde_json::from_slice(body)?;
    buffer.drain(..4 + length);
    Ok(Some(message))
}

/// How to start a shim whose tree writes to these pipes; its orders and answers go through the socket.
///
/// # Errors
/// When the descriptors cannot be made.
#[expect(unsafe_code, reason = "descriptors can be handed over only between fork and exec")]
pub(crate) fn command(relaunch: &Relaunch, ends: &OutputEnds) -> io::Result<(Command, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    // Out of the way of every number that is given a meaning between fork and exec.
    let raise = |descriptor: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(descriptor, REPORTS + 1);
    let mut sources = vec![raise(theirs.as_fd())?, raise(ends.stdout.as_fd())?, raise(ends.stderr.as_fd())?];
    let mut arguments = Vec::new();
    if let Some(reports) = &ends.reports {
        sources.push(raise(reports.as_fd())?);
        arguments.push(OsString::from(WITH_REPORTS));
    }
    drop(theirs);
    let mut command = relaunch.command(Role::Shim, &arguments);
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let hand_over = move || {
        for (from, to) in sources.iter().zip([ORDERS, STDOUT, STDERR, REPORTS]) {
            // SAFETY: only numbers are passed; the command owns the descriptors until it is dropped.
            if unsafe { libc::dup2(from.as_raw_fd(), to) } != to {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure only makes system calls that are safe between fork and exec.
    unsafe {
        command.pre_exec(hand_over);
    }
    Ok((command, ours))
}

/// The role `shim`.
pub(crate) fn main(arguments: Vec<OsString>) -> ExitCode {
    let with_reports = arguments.iter().any(|argument| argument == WITH_REPORTS);
    match Shim::new(with_reports).and_then(|mut shim| shim.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _told: io::Result<()> = writeln!(io::stderr(), "millstream: a shim cannot go on: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Shim {
    orders: UnixStream,
    /// Gone when the tree is being ended: then nobody of ours holds the pipes any more.
    outputs: Option<OutputEnds>,
    null: OwnedFd,
    /// Readable when a child has ended.
    children: OwnedFd,
    process: Option<Process>,
    buffer: Vec<u8>,
}

impl Shim {
    #[expect(unsafe_code, reason = "the descriptors are fixed numbers that this process was given")]
    fn new(with_reports: bool) -> io::Result<Self> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        // It is told to end by its supervisor's silence alone.
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
            // SAFETY: no handler is installed, the signals are ignored.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        // SAFETY: whoever started this role has opened these for it alone, the last where it says so.
        let (orders, stdout, stderr, reports) = unsafe {
            let reports = with_reports.then(|| OwnedFd::from_raw_fd(REPORTS));
            (
                UnixStream::from_raw_fd(ORDERS),
                OwnedFd::from_raw_fd(STDOUT),
                OwnedFd::from_raw_fd(STDERR),
                reports,
            )
        };
        let given = [Some(orders.as_fd()), Some(stdout.as_fd()), Some(stderr.as_fd())];
        for descriptor in given.into_iter().chain([reports.as_ref().map(|end| end.as_fd())]).flatten() {
            rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC)?;
        }
        let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into();
        let children = watch_children()?;
        Ok(Self {
            orders,
            outputs: Some(OutputEnds { stdout, stderr, reports }),
            null,
            children,
            process: None,
            buffer: Vec::new(),
        })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            let [orders, children] = {
                let mut polled =
                    [PollFd::new(&self.orders, PollFlags::IN), PollFd::new(&self.children, PollFlags::IN)];
                match poll(&mut polled, None) {
                    Err(rustix::io::Errno::INTR) => continue,
                    other => other?,
                };
                polled.map(|polled| !polled.revents().is_empty())
            };
            if children {
                self.reap_children()?;
            }
            if orders && !self.take_orders()? {
                self.end_all();
                return Ok(());
            }
        }
    }

    /// Whether the supervisor is still there.
    fn take_orders(&mut self) -> io::Result<bool> {
        let mut piece = [0_u8; 64 * 1024];
        match self.orders.read(&mut piece) {
            Ok(0) | Err(_) => return Ok(false),
            Ok(length) => self.buffer.extend_from_slice(&piece[..length]),
        }
        while let Some(order) = decode(&mut self.buffer)? {
            self.follow(order)?;
        }
        Ok(true)
    }

    fn follow(&mut self, order: Order) -> io::Result<()> {
        match order {
            Order::Start { launch, joins } => {
                let told = match self.start(&launch, &joins) {
                    Ok(pid) => Told::Started { pid },
                    Err(refusal) => Told::NotStarted(refusal),
                };
                self.tell(&told)
            }
            Order::Go => {
                if let Some(process) = &mut self.process {
                    process.let_go();
                }
                Ok(())
            }
            Order::Signal(signal) => {
                if let Some(process) = &self.process {
                    // What is no signal was refused before it came here.
                    let _refused: io::Result<()> = process.signal(signal);
                }
                Ok(())
            }
            Order::End => {
                let told = self.end_all();
                self.tell(&told)
            }
        }
    }

    fn start(&mut self, launch: &Launch, joins: &[PathBuf]) -> Result<u32, Refusal> {
        use millstream_common::outcome::Reason;
        let refused = |detail| Refusal { reason: Reason::LimitsUnavailable, detail };
        let joins: Result<Vec<_>, _> = joins.iter().map(|path| cgroup::open_join(path)).collect();
        let joins = joins.map_err(|error| refused(format!("the limits cannot be set: {error}")))?;
        let Some(ends) = &self.outputs else {
            let detail = "the tree of the task is being ended".to_owned();
            return Err(Refusal { reason: Reason::Internal, detail });
        };
        let channels = ends.channels(self.null.as_fd());
        let placement = Placement { cgroup: None, joins: &joins };
        let process = spawn(launch, channels, placement).map_err(|error| error.refusal(launch))?;
        let pid = process.pid();
        self.process = Some(process);
        Ok(pid)
    }

    fn reap_process(&mut self) -> io::Result<()> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let Some(exit) = process.reap()? else { return Ok(()) };
        let failure = process.failure();
        self.process = None;
        // Nobody may be there to hear it: that is noticed where orders are read, and must not stop the reaping.
        let _unheard: io::Result<()> = self.tell(&Told::Exited { exit, failure });
        Ok(())
    }

    /// Reaps whoever was abandoned, so that no dead process stays behind; tells whether a child is left.
    fn reap_children(&mut self) -> io::Result<bool> {
        // Several signals are one: what is read means that there is something to look at, and nothing more.
        let mut piece = [0_u8; 1024];
        while rustix::io::read(&self.children, &mut piece).is_ok_and(|length| length == piece.len()) {}
        loop {
            let looking = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            match waitid(WaitId::All, looking) {
                Err(rustix::io::Errno::CHILD) => return Ok(false),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(None) => return Ok(true),
                Ok(Some(_)) if self.process.as_ref().is_some_and(Process::has_ended) => {
                    self.reap_process()?
                }
                Ok(Some(_)) => {
                    let _reaped = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?;
                }
            }
        }
    }

    /// Kills everything, until nobody is left or patience is.
    fn end_all(&mut self) -> Told {
        self.outputs = None;
        let all = if self.process.is_none() { descendants() } else { Vec::new() };
        let (mut leaked, mut leaked_count) = named(&all);
        let clock = SystemClock;
        let give_up_at = clock.now() + limits::KILL_MAX;
        let mut survivors = 0;
        loop {
            let killed = children_of(std::process::id());
            for &pid in &killed {
                // A child's number is nobody else's before we have reaped it.
                if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    let _gone: Result<(), _> = kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            if !self.reap_children().unwrap_or(true) {
                break;
            }
            let left = give_up_at.saturating_duration_since(clock.now());
            if left.is_zero() {
                let left = named(&descendants());
                survivors = left.1;
                if leaked.is_empty() {
                    (leaked, leaked_count) = left;
                }
                break;
            }
            // Whoever was reaped has left us its children: they are killed before anybody is waited for.
            if children_of(std::process::id()).iter().all(|pid| killed.contains(pid)) {
                self.wait_for_children(left);
            }
        }
        Told::Ended { leaked, leaked_count, survivors }
    }

    fn wait_for_children(&self, patience: Duration) {
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        let mut polled = [PollFd::new(&self.children, PollFlags::IN)];
        // Woken by a signal it is as good as woken by a child.
        let _ready = poll(&mut polled, Some(&timeout));
    }

    fn tell(&mut self, told: &Told) -> io::Result<()> {
        put(&mut self.orders, told)
    }
}

/// Write end of the pipe that tells of ended children.
static CHILD_ENDED: AtomicI32 = AtomicI32::new(-1);

/// A descriptor that becomes readable when a child has ended. A handler and not a blocked signal: behind a test harness
/// there may be a second thread, which would swallow the signal.
#[expect(unsafe_code, reason = "rustix installs no handlers")]
fn watch_children() -> io::Result<OwnedFd> {
    extern "C" fn on_child_ended(_signal: libc::c_int) {
        // SAFETY: writing to a pipe is safe in a handler. A full pipe says the same; the place of the error is kept for
        // whoever was interrupted.
        unsafe {
            let place = libc::__errno_location();
            let before = *place;
            libc::write(CHILD_ENDED.load(Ordering::Relaxed), c"!".as_ptr().cast(), 1);
            *place = before;
        }
    }
    let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
    let (reader, writer) = rustix::pipe::pipe_with(flags)?;
    CHILD_ENDED.store(writer.into_raw_fd(), Ordering::Relaxed);
    // SAFETY: the action is valid for the call, and the handler keeps to what is safe in one.
    let installed = unsafe {
        let mut action = std::mem::zeroed::<libc::sigaction>();
        action.sa_sigaction = on_child_ended as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_NOCLDSTOP;
        libc::sigaction(libc::SIGCHLD, &raw const action, std::ptr::null_mut())
    };
    if installed == 0 { Ok(reader) } else { Err(io::Error::last_os_error()) }
}

/// Processes in words, the first few, and how many they are.
fn named(processes: &[u32]) -> (Vec<LeakedProcess>, u32) {
    let described = processes.iter().take(LEAKED_NAMED_MAX).map(|&pid| cgroup::describe(pid)).collect();
    (described, u32::try_from(processes.len()).unwrap_or(u32::MAX))
}

/// Everybody below this process, parents first.
fn descendants() -> Vec<u32> {
    let mut found = children_of(std::process::id());
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        let below = children_of(pid);
        found.extend(below.into_iter().filter(|pid| !found.contains(pid)).collect::<Vec<_>>());
    }
    found
}

/// The living and dead children of a process.
fn children_of(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists: Vec<_> = threads.map(|thread| fs::read_to_string(thread.path().join("children"))).collect();
    if lists.iter().any(|list| list.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)) {
        return children_by_parent(pid);
    }
    let words = lists.into_iter().flatten().collect::<Vec<_>>().join(" ");
    words.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// For kernels that keep no lists of children: everybody is asked for its parent.
fn children_by_parent(parent: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything, parentheses included.
    status.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Child;

    use super::*;
    use crate::entry::tests::this_test_binary;

    struct Fixture {
        child: Child,
        orders: UnixStream,
        buffer: Vec<u8>,
        stdout: io::PipeReader,
    }

    impl Fixture {
        fn new() -> Self {
            let (stdout, end) = io::pipe().unwrap();
            let again = || end.try_clone().unwrap().into();
            let ends = OutputEnds { stdout: again(), stderr: again(), reports: Some(again()) };
            let (mut command, orders) = command(&this_test_binary(), &ends).unwrap();
            let child = command.spawn().unwrap();
            Self { child, orders, buffer: Vec::new(), stdout }
        }

        fn order(&mut self, order: &Order) {
            put(&mut self.orders, order).unwrap();
        }

        fn run(&mut self, argv: &[&str]) {
            let launch = Launch {
                argv: argv.iter().map(|&word| word.to_owned()).collect(),
                environment: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
                working_directory: "/".into(),
                user: None,
                moved: None,
                held: false,
                reports: Some(9),
            };
            self.order(&Order::Start { launch: Box::new(launch), joins: Vec::new() });
        }

        fn told(&mut self) -> Told {
            loop {
                if let Some(told) = decode(&mut self.buffer).unwrap() {
                    return told;
                }
                let mut piece = [0; 4096];
                let length = self.orders.read(&mut piece).unwrap();
                assert!(length > 0, "the shim is gone");
                self.buffer.extend_from_slice(&piece[..length]);
            }
        }

        fn line(&mut self) -> String {
            let (mut line, mut byte) = (Vec::new(), [0]);
            while self.stdout.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
                line.push(byte[0]);
            }
            String::from_utf8(line).unwrap()
        }
    }

    fn is_alive(pid: u32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[test]
    fn a_daemon_cannot_leave_the_tree_and_is_named() {
        let mut shim = Fixture::new();
        shim.run(&["bash", "-c", "(setsid bash -c 'echo $BASHPID; exec sleep 1000' &)"]);
        assert!(matches!(shim.told(), Told::Started { .. }));
        let daemon: u32 = shim.line().parse().unwrap();
        assert_eq!(shim.told(), Told::Exited { exit: Exit::Code(0), failure: None });
        assert!(is_alive(daemon));
        shim.order(&Order::End);
        let Told::Ended { leaked, leaked_count: 1, survivors: 0 } = shim.told() else {
            panic!("one is leaked")
        };
        assert_eq!(leaked[0].pid, daemon);
        assert!(!is_alive(daemon));
        drop(shim.orders);
        assert!(shim.child.wait().unwrap().success());
    }

    #[test]
    fn the_tree_ends_with_the_supervisor() {
        let mut shim = Fixture::new();
        shim.run(&["bash", "-c", "(setsid sleep 1000 &); echo $$; trap '' TERM; sleep 1000; sleep 1000"]);
        let Told::Started { pid } = shim.told() else { panic!("it starts") };
        assert_eq!(shim.line(), pid.to_string());
        drop(shim.orders);
        assert!(shim.child.wait().unwrap().success());
        assert!(!is_alive(pid));
        // Everybody who held the pipe is gone.
        assert_eq!(shim.stdout.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn phases_follow_each_other_and_failures_are_told() {
        let mut shim = Fixture::new();
        shim.run(&["no-such-program"]);
        assert!(matches!(shim.told(), Told::Started { .. }));
        let Told::Exited { exit: Exit::Code(127), failure: Some(_) } = shim.told() else {
            panic!("it cannot start")
        };
        shim.run(&["sleep", "1000"]);
        assert!(matches!(shim.told(), Told::Started { .. }));
        shim.order(&Order::Signal(libc::SIGTERM));
        assert_eq!(shim.told(), Told::Exited { exit: Exit::Signal(libc::SIGTERM), failure: None });
        shim.order(&Order::End);
        assert_eq!(shim.told(), Told::Ended { leaked: Vec::new(), leaked_count: 0, survivors: 0 });
    }

    #[test]
    fn a_tree_tells_its_phases() {
        let mut shim = Fixture::new();
        shim.run(&["sh", "-c", "echo begin setup >&9"]);
        assert_eq!(shim.line(), "begin setup");
    }

    #[test]
    fn children_are_found_with_and_without_lists() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        assert!(children_of(std::process::id()).contains(&child.id()));
        assert!(children_by_parent(std::process::id()).contains(&child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
