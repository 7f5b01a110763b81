//! Spawns, signals and reaps the first process of a phase.
//!
//! A process is made by one `clone3` that returns a descriptor for it and lets it be born inside its control group. Signals
//! go by that descriptor. A kernel without ([`super::kernel`]) gives a number alone, which is as good until the process is
//! reaped: before, nobody else can have it, and afterwards nothing here uses it. Nothing here knows of a task, a log or a
//! tree.

mod child;

use std::{
    ffi::c_int,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    ptr,
};

use millstream_common::{outcome::Exit, outcome::Reason, spec::OutputDescriptors, text::printable};
use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, waitid},
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    account::Account,
    kernel::{Kernel, kernel},
    task::Refusal,
};
use child::{Image, make};

/// Where programs are looked up when the task has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// What is to be run, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Program and arguments; at least one.
    pub argv: Vec<String>,
    /// The whole environment.
    pub environment: Vec<(String, String)>,
    /// Absolute.
    pub working_directory: PathBuf,
    /// Whom to become; none to stay.
    pub(crate) user: Option<Account>,
    /// Descriptors of the two outputs when they are moved; 1 and 2 are `/dev/null` then.
    pub(crate) moved: Option<(RawFd, RawFd)>,
    /// Whether it waits before its program until it is let go.
    pub held: bool,
    /// Descriptor on which it tells its phases, if it does.
    pub reports: Option<RawFd>,
}

/// The place of the outputs in a [`Launch`].
pub(crate) const fn moved(output: OutputDescriptors) -> Option<(RawFd, RawFd)> {
    match output {
        OutputDescriptors::Standard => None,
        OutputDescriptors::Moved { stdout, stderr } => Some((stdout, stderr)),
    }
}

/// The descriptor on which a process tells its phases: one that a shell can name and no moved output has.
pub(crate) fn report_descriptor(output: OutputDescriptors) -> RawFd {
    let (stdout, stderr) = moved(output).unwrap_or((1, 2));
    (3..=9).rev().find(|&number| number != stdout && number != stderr).unwrap_or(9)
}

/// Descriptors of a process to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Channels<'a> {
    /// `/dev/null`, open for reading and writing.
    pub(crate) null: BorrowedFd<'a>,
    /// Write end of its output.
    pub(crate) stdout: BorrowedFd<'a>,
    /// Write end of its error output.
    pub(crate) stderr: BorrowedFd<'a>,
    /// Write end of what it tells of its phases.
    pub(crate) reports: Option<BorrowedFd<'a>>,
}

/// Where a process is born.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Placement<'a> {
    /// Directory of its control group of version 2.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
    /// Files of control groups that it enters before its program, by writing `0`.
    pub(crate) joins: &'a [OwnedFd],
}

/// Why no process could be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    /// An argument, variable or path cannot be given to a program.
    #[error("the {what} holds a NUL")]
    Nul {
        /// Which.
        what: &'static str,
    },
    /// No pipe could be made.
    #[error("cannot make a pipe")]
    Pipe(#[source] io::Error),
    /// No process could be made.
    #[error("cannot make a process")]
    Clone(#[source] io::Error),
}

impl SpawnError {
    /// For the record of a task.
    pub(crate) fn refusal(&self, launch: &Launch) -> Refusal {
        let cause = std::error::Error::source(self).map(|source| format!(": {source}")).unwrap_or_default();
        let exhausted = !matches!(self, Self::Nul { .. });
        let reason = if exhausted { Reason::HostExhausted } else { Reason::StartFailed };
        Refusal { reason, detail: format!("failed to start `{}`: {self}{cause}", launch.shown_program()) }
    }
}

impl Launch {
    fn shown_program(&self) -> String {
        printable(self.argv[0].as_bytes(), 256)
    }

    fn search_path(&self) -> &str {
        self.environment.iter().rfind(|(name, _)| name == "PATH").map_or(DEFAULT_PATH, |(_, path)| path)
    }

    /// Every file that the program may be, in the order in which they are tried.
    fn candidates(&self) -> Vec<PathBuf> {
        let program = &self.argv[0];
        if program.contains('/') {
            return vec![program.into()];
        }
        let directories = self.search_path().split(':');
        directories
            .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(program))
            .collect()
    }
}

/// A process that was made.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    /// None where the kernel cannot give it; then the end is told by SIGCHLD.
    pidfd: Option<OwnedFd>,
    report: OwnedFd,
    gate: Option<OwnedFd>,
    reaped: bool,
}

impl AsFd for Process {
    /// Readable when the process has ended: for one that was born in a group.
    ///
    /// # Panics
    /// For one that was made where no process can be born in a group.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_ref().expect("who can be born in a group has a descriptor").as_fd()
    }
}

impl AsRawFd for Process {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Process {
    /// Its number, to be shown and never to be used.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets a held process begin its program. On any other it does nothing.
    pub(crate) fn let_go(&mut self) {
        if let Some(gate) = self.gate.take() {
            // A process that is gone cannot be let go: its end is seen elsewhere.
            let _written: Result<usize, _> = rustix::io::write(&gate, &[1]);
        }
    }

    /// Sends a signal to the process and to all in its process group. A process that has ended gets nothing.
    ///
    /// # Errors
    /// When the system refuses, for example for a number that is no signal.
    pub(crate) fn signal(&self, signal: c_int) -> io::Result<()> {
        if self.reaped {
            return Ok(());
        }
        match &self.pidfd {
            None => signal_group(self.pid, signal),
            Some(pidfd) => match send(pidfd.as_fd(), signal, PIDFD_SIGNAL_PROCESS_GROUP) {
                // Before Linux 6.9 no group is known by a descriptor.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => signal_group(self.pid, signal),
                other => other,
            },
        }
        .or_else(|error| match (error.raw_os_error(), &self.pidfd) {
            // It is so young that it leads no group yet, or so old that nobody is left in it.
            (Some(libc::ESRCH), Some(pidfd)) => send(pidfd.as_fd(), signal, 0),
            (Some(libc::ESRCH), None) => signal_one(self.pid, signal),
            _ => Err(error),
        })
        .or_else(|error| if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) })
    }

    /// Takes in how the process ended, if it has ended. Repeating it after that tells nothing.
    ///
    /// # Errors
    /// When the system cannot tell; then nobody ever can.
    pub(crate) fn reap(&mut self) -> io::Result<Option<Exit>> {
        if self.reaped {
            return Ok(None);
        }
        let Some(status) = self.look(WaitIdOptions::empty())? else { return Ok(None) };
        self.reaped = true;
        let signal = status.terminating_signal().map(Exit::Signal);
        Ok(Some(signal.unwrap_or_else(|| Exit::Code(status.exit_status().unwrap_or(-1)))))
    }

    /// Whether it has ended and was not reaped.
    pub(crate) fn has_ended(&self) -> bool {
        !self.reaped && self.look(WaitIdOptions::NOWAIT).is_ok_and(|status| status.is_some())
    }

    /// How it ended, if it has. Only before it is reaped: until then its number is nobody else's.
    fn look(&self, how: WaitIdOptions) -> io::Result<Option<WaitIdStatus>> {
        let number = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(waitid(WaitId::Pid(number), WaitIdOptions::EXITED | WaitIdOptions::NOHANG | how)?)
    }

    /// After its end: why its program could not be started, if it could not.
    pub(crate) fn failure(&self) -> Option<StartFailure> {
        let mut bytes = [0_u8; 8];
        // Complete or nothing: it is written at once, and whoever wrote it is gone.
        let length = rustix::io::read(&self.report, &mut bytes).ok()?;
        let [a, b, c, d, e, f, g, h] = bytes;
        let step = Step::ALL.into_iter().find(|step| step.number() == i32::from_ne_bytes([a, b, c, d]))?;
        (length == bytes.len()).then_some(StartFailure { step, errno: i32::from_ne_bytes([e, f, g, h]) })
    }
}

/// What a process was about to do when it could not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Putting its descriptors in place.
    Descriptors,
    /// Entering the control groups that limit it.
    Limits,
    /// Becoming another user.
    User,
    /// Entering its working directory.
    Directory,
    /// Becoming its program.
    Program,
}

impl Step {
    const ALL: [Self; 5] = [Self::Descriptors, Self::Limits, Self::User, Self::Directory, Self::Program];

    const fn number(self) -> i32 {
        self as i32 + 1
    }
}

/// Why a process could not begin its program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFailure {
    /// What it was about to do.
    pub step: Step,
    /// The system's answer.
    pub errno: i32,
}

impl StartFailure {
    /// For the record of a task: one sentence that names the attempt, the cause and what to do.
    pub(crate) fn refusal(self, launch: &Launch) -> Refusal {
        let program = launch.shown_program();
        let cause = io::Error::from_raw_os_error(self.errno);
        let user = launch.user.as_ref().map_or("root", |user| &user.name);
        let directory = launch.working_directory.display();
        let (reason, detail) = match self.step {
            Step::Descriptors => {
                (Reason::HostExhausted, format!("the outputs of `{program}` cannot be put in place: {cause}"))
            }
            Step::Limits => {
                (Reason::LimitsUnavailable, format!("the limits of `{program}` cannot be set: {cause}"))
            }
            Step::User => (
                Reason::UserRefused,
                format!("cannot become user `{user}`: {cause}; the agent must run as root for that"),
            ),
            Step::Directory => (
                Reason::StartFailed,
                format!("the working directory `{directory}` cannot be entered: {cause}"),
            ),
            Step::Program => (Reason::StartFailed, self.program_sentence(launch, &program, &cause)),
        };
        Refusal { reason, detail }
    }

    fn program_sentence(self, launch: &Launch, program: &str, cause: &io::Error) -> String {
        let is_path = program.contains('/');
        let found = launch.working_directory.join(&launch.argv[0]);
        match self.errno {
            libc::ENOENT | libc::ENOTDIR if !is_path => {
                let path = printable(launch.search_path().as_bytes(), 512);
                format!("`{program}` is not on this host's PATH ({path}): install it or give its whole path")
            }
            libc::ENOENT if found.exists() => {
                format!("`{program}` exists but the interpreter or loader that it names does not")
            }
            libc::ENOENT | libc::ENOTDIR => {
                format!(
                    "`{program}` does not exist (looked up from `{}`)",
                    launch.working_directory.display()
                )
            }
            libc::EACCES => {
                let user =
                    launch.user.as_ref().map(|user| format!(" by user `{}`", user.name)).unwrap_or_default();
                format!(
                    "`{program}` may not be executed{user}: give it and its directories execute permission"
                )
            }
            libc::ENOEXEC => {
                format!("`{program}` is no program: a script needs a first line such as `#!/bin/sh`")
            }
            libc::E2BIG => format!("`{program}` cannot be started: arguments and environment are too long"),
            _ => format!("`{program}` cannot be started: {cause}"),
        }
    }
}

/// Makes a process that becomes the program, or waits before it.
///
/// That it could not become the program is told by [`Process::failure`] after its end.
///
/// # Errors
/// When no process could be made.
pub(crate) fn spawn(
    launch: &Launch,
    channels: Channels<'_>,
    placement: Placement<'_>,
) -> Result<Process, SpawnError> {
    spawn_on(kernel(), launch, channels, placement)
}

fn spawn_on(
    kernel: &Kernel,
    launch: &Launch,
    channels: Channels<'_>,
    placement: Placement<'_>,
) -> Result<Process, SpawnError> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|error| SpawnError::Pipe(error.into()));
    let (report, report_end) = pipe()?;
    let gate = launch.held.then(pipe).transpose()?;
    let joins = placement.joins.iter().map(AsRawFd::as_raw_fd).collect();
    let image = Image::new(launch, channels, joins, &report_end, gate.as_ref().map(|(end, _)| end))?;
    let (pid, pidfd) = make(&image, placement.cgroup, kernel).map_err(SpawnError::Clone)?;
    Ok(Process { pid, pidfd, report, gate: gate.map(|(_, gate)| gate), reaped: false })
}

/// Has the runtime tell when a descriptor is ready.
///
/// # Errors
/// When the system has no room for it.
#[expect(unsafe_code, reason = "the runtime asks for a promise that the types here keep")]
pub(crate) fn watch<T: AsFd + AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: every type that is watched owns one descriptor, tells that one always, and closes it when it is dropped.
    unsafe { AsyncFd::register_with_interest(inner, interest) }.map_err(|error| error.into_parts().1)
}

const PIDFD_SIGNAL_PROCESS_GROUP: u32 = 1 << 2;
#[expect(unsafe_code, reason = "rustix has no flags for this call, which a process group needs")]
fn send(pidfd: BorrowedFd<'_>, signal: c_int, flags: u32) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed for the call; there is no information block.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            flags,
        )
    };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Only for a group whose leader was not reaped: its number cannot mean anybody else.
fn signal_group(leader: u32, signal: c_int) -> io::Result<()> {
    let Ok(leader @ 2..) = i32::try_from(leader) else { return Ok(()) };
    signal_number(-leader, signal)
}

/// Only for a process that was not reaped: its number cannot mean anybody else.
fn signal_one(pid: u32, signal: c_int) -> io::Result<()> {
    let Ok(pid @ 2..) = i32::try_from(pid) else { return Ok(()) };
    signal_number(pid, signal)
}

#[expect(unsafe_code, reason = "the signal may be any number, which rustix does not take")]
fn signal_number(number: c_int, signal: c_int) -> io::Result<()> {
    // SAFETY: only numbers are passed.
    if unsafe { libc::kill(number, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
