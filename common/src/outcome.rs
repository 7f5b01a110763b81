//! Every way a task can end. Pure.
//!
//! A failed task is a result, not an error: it is described completely here, and neither end needs to ask the other
//! what was meant. The host fills in [`TaskEnd`]; the controller adds where and for whom, and calls it an outcome.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// The parts of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Prepares. When it does not pass, [`Phase::Run`] is skipped.
    Setup,
    /// The block itself; most blocks have this phase alone.
    Run,
    /// Cleans up. Always runs once a phase before it has begun.
    Teardown,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup => "setup",
            Self::Run => "run",
            Self::Teardown => "teardown",
        })
    }
}

/// What came of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeKind {
    /// Every phase ended with exit code 0.
    Passed,
    /// A phase ended with another exit code.
    Failed,
    /// A signal that this system did not send ended a phase, or a limit did.
    Killed,
    /// A phase took longer than its limit.
    TimedOut,
    /// Taken back before its first phase began.
    Cancelled,
    /// Ended on request while it ran; no failure.
    Stopped,
    /// It could not be begun.
    Error,
    /// Nobody can know whether it ran to its end.
    Lost,
}

impl fmt::Display for OutcomeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Killed => "killed",
            Self::TimedOut => "timed out",
            Self::Cancelled => "cancelled",
            Self::Stopped => "stopped",
            Self::Error => "error",
            Self::Lost => "lost",
        })
    }
}

impl OutcomeKind {
    /// Whether such an end is an expected one.
    #[must_use]
    pub fn is_expected(self, expectation: Expectation) -> bool {
        match (expectation, self) {
            (_, Self::Stopped | Self::Cancelled) => true,
            (_, Self::Error | Self::Lost) => false,
            (Expectation::Any, _) | (Expectation::Pass, Self::Passed) => true,
            (Expectation::Pass, _) | (Expectation::Fail, Self::Passed) => false,
            (Expectation::Fail, _) => true,
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $word:literal,)*) => {
        /// Why a task ended as it did: one closed list for hosts, controllers and broken barriers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            /// Every reason, in the order of the list.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The reason as a fixed word for logs and results.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }
    };
}

reasons! {
    /// A process ended by itself.
    Exited = "exited",
    /// A signal from outside this system ended it.
    Signaled = "signaled",
    /// The limit of a phase was reached.
    PhaseTimeout = "phase_timeout",
    /// The controller cancelled it before it began.
    Cancelled = "cancelled",
    /// The controller stopped it.
    Stopped = "stopped",
    /// Memory ran out, or its memory limit was reached.
    OutOfMemory = "out_of_memory",
    /// The task before it ended unexpectedly and the stream's policy is to drain.
    Drained = "drained",
    /// The controller was silent for longer than the lease.
    LeaseExpired = "lease_expired",
    /// The controller closed the session while the task ran.
    SessionClosed = "session_closed",
    /// The supervisor of the session died.
    SupervisorDied = "supervisor_died",
    /// The host was started again.
    HostRebooted = "host_rebooted",
    /// A record of the task cannot be read.
    StateCorrupt = "state_corrupt",
    /// A shipped file could not be put in place.
    FileRefused = "file_refused",
    /// The program could not be started.
    StartFailed = "start_failed",
    /// The user does not exist on the host, or the agent may not become that user.
    UserRefused = "user_refused",
    /// A requested limit cannot be set on this host.
    LimitsUnavailable = "limits_unavailable",
    /// The host has no space or no more processes to give.
    HostExhausted = "host_exhausted",
    /// The host could not be reached in time, or others had it for too long.
    Unreachable = "unreachable",
    /// The block itself is not valid: known before anything was sent.
    InvalidBlock = "invalid_block",
    /// The deadline of the whole test passed.
    TestDeadline = "test_deadline",
    /// Another task ended unexpectedly, and the test fails fast. Only the controller says so.
    FailFast = "fail_fast",
    /// The agent is of a build that lacks what the task needs. Only the controller says so.
    Unsupported = "unsupported",
    /// A bug of this system.
    Internal = "internal",
}

impl Reason {
    /// Whether it is the failure of another task that ended this one or kept it from running.
    #[must_use]
    pub const fn is_consequence(self) -> bool {
        matches!(self, Self::Drained | Self::FailFast)
    }

    /// Whether somebody can have expected an end for this reason. What follows another's failure nobody has, nor what was
    /// ended, or never begun, because the controller was silent for too long.
    #[must_use]
    pub const fn can_be_expected(self) -> bool {
        !self.is_consequence() && !matches!(self, Self::LeaseExpired)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "signal {name}"),
                None => write!(f, "signal {signal}"),
            },
        }
    }
}

/// The usual name of a signal on Linux, such as `SIGKILL`.
#[must_use]
pub const fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        10 => "SIGUSR1",
        11 => "SIGSEGV",
        12 => "SIGUSR2",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        _ => return None,
    })
}

/// How one phase ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseEnd {
    /// Which phase.
    pub phase: Phase,
    /// Passed, failed, killed, timed out, stopped or error.
    pub outcome: OutcomeKind,
    /// How its process ended; none when it was never started.
    pub exit: Option<Exit>,
    /// How long it took.
    pub duration: Duration,
}

/// A process that was still there after the last phase and had to be ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeakedProcess {
    /// Its number on the host.
    pub pid: u32,
    /// Its command line as text, made safe to print.
    pub command: String,
}

/// What a task printed, whether it was kept or not.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LogTotals {
    /// Bytes written to standard output.
    pub stdout_bytes: u64,
    /// Bytes written to standard error.
    pub stderr_bytes: u64,
    /// SHA-256 of all bytes of standard output, in lower-case hexadecimal digits.
    pub stdout_sha256: String,
    /// SHA-256 of all bytes of standard error.
    pub stderr_sha256: String,
    /// Position in the spool after the last record.
    pub end_position: u64,
    /// True when the quota was reached.
    pub truncated: bool,
}

/// A sealed archive of results.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveInfo {
    /// Length in bytes.
    pub size_bytes: u64,
    /// SHA-256 of the whole archive, in lower-case hexadecimal digits.
    pub sha256: String,
    /// The archive itself when it is small enough to travel with the record.
    #[serde(skip)]
    pub inline: bytes::Bytes,
}

/// The terminal record of a task, as the host knows it: complete, written once, never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskEnd {
    /// What came of it.
    pub outcome: OutcomeKind,
    /// Why.
    pub reason: Reason,
    /// The phase that decided the outcome; none when none was begun.
    pub phase: Option<Phase>,
    /// How the process of that phase ended.
    pub exit: Option<Exit>,
    /// Evidence for people, one line; may be empty.
    pub detail: String,
    /// When the first phase began, in nanoseconds since 1970 by the host's clock.
    pub start_time_ns: Option<u64>,
    /// When everything had ended, in nanoseconds since 1970 by the host's clock.
    pub end_time_ns: Option<u64>,
    /// From the beginning of the first phase to the end of the last, by a clock that is never set.
    pub run_duration: Duration,
    /// How each begun phase ended, in order.
    pub phases: Vec<PhaseEnd>,
    /// Processes that had to be ended after the last phase; the first 64.
    pub leaked: Vec<LeakedProcess>,
    /// Number of all of them.
    pub leaked_count: u32,
    /// What was printed.
    pub log: LogTotals,
    /// The sealed results; none when the block left none.
    pub archive: Option<ArchiveInfo>,
    /// The last lines of output, oldest first, made safe to print.
    pub last_lines: Vec<String>,
    /// Entries of the output directory that were left out of the archive, with the reason.
    pub skipped: Vec<String>,
}

impl TaskEnd {
    /// The record of a task of which no phase was begun.
    #[must_use]
    pub fn never_begun(outcome: OutcomeKind, reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            outcome,
            reason,
            phase: None,
            exit: None,
            detail: detail.into(),
            start_time_ns: None,
            end_time_ns: None,
            run_duration: Duration::ZERO,
            phases: Vec::new(),
            leaked: Vec::new(),
            leaked_count: 0,
            log: LogTotals::default(),
            archive: None,
            last_lines: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// Whether this end is an expected one: what follows the failure of another task never is, nor what an expired lease
    /// ended.
    #[must_use]
    pub fn is_expected(&self, expectation: Expectation) -> bool {
        self.reason.can_be_expected() && self.outcome.is_expected(expectation)
    }
}

/// Which end of a task is expected. An error or a loss never is; a stop or a cancellation on request always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expectation {
    /// The task should pass.
    #[default]
    Pass,
    /// The task should fail; passing is the unexpected end.
    Fail,
    /// Either is fine.
    Any,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expected_failure_is_no_surprise_and_an_error_always_is() {
        let end = |outcome| TaskEnd::never_begun(outcome, Reason::Exited, "");
        assert!(end(OutcomeKind::Failed).is_expected(Expectation::Fail));
        assert!(!end(OutcomeKind::Passed).is_expected(Expectation::Fail));
        assert!(!end(OutcomeKind::Error).is_expected(Expectation::Any));
        assert!(end(OutcomeKind::Stopped).is_expected(Expectation::Pass));
        let drained = TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::Drained, "");
        assert!(!drained.is_expected(Expectation::Any));
        for kind in [OutcomeKind::Cancelled, OutcomeKind::Killed] {
            let unattended = TaskEnd::never_begun(kind, Reason::LeaseExpired, "");
            assert!(!unattended.is_expected(Expectation::Any) && !unattended.is_expected(Expectation::Fail));
        }
        assert!(!end(OutcomeKind::Lost).is_expected(Expectation::Fail));
    }
}
