//! The one place where the wire meets the domain: `TryFrom` inward, `From` outward.
//!
//! What comes in is checked against every bound of [`crate::limits`] here, once, and is a value of the domain from then on.
//! An error names the field by its path, such as `phases[1].argv[0]: holds a NUL`, so that it can be answered as it is.
//! Nothing here decides what to do: it reads no file, asks no clock and keeps nothing.

mod end;
mod log;
mod spec;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Display,
    ops::RangeInclusive,
    str::FromStr,
    time::Duration,
};

use millstream_proto::v1;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::{
    id::{BlockName, IdError, NameError, StreamName},
    limits,
    log::{LogChannel, LogRecord},
    outcome::{
        ArchiveInfo, Exit, Expectation, LeakedProcess, LogTotals, OutcomeKind, Phase, PhaseEnd, Reason,
        TaskEnd,
    },
    spec::{
        BlobDigest, FailurePolicy, FilePlace, FileSource, OutputDescriptors, PathError, PhaseSpec,
        ResourceLimits, SafePath, ShippedFile, TaskSpec,
    },
    text,
};

pub use self::spec::secret_files_in;

/// A message that is not a value of the domain: which field, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConvertError {
    /// The field by its path from the message that was converted.
    pub field: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It has to be set.
    #[error("is missing")]
    Missing,
    /// It has to have at least one byte or entry.
    #[error("is empty")]
    Empty,
    /// It is a number that stands for nothing here: unspecified, or of a newer protocol.
    #[error("holds {value}, which is no known {what}")]
    Unknown {
        /// The kind of thing.
        what: &'static str,
        /// The number that came.
        value: i32,
    },
    /// A text that the kernel would cut.
    #[error("holds a NUL")]
    Nul,
    /// A name of a variable that would be read as name and value.
    #[error("holds a `=`")]
    EqualSign,
    /// Too many bytes.
    #[error("has {length} bytes: at most {limit} are allowed")]
    TooLong {
        /// Bytes given.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Too many entries.
    #[error("has {count} entries: at most {limit} are allowed")]
    TooMany {
        /// Entries given.
        count: usize,
        /// Entries allowed.
        limit: usize,
    },
    /// A number out of its range.
    #[error("is {value}: must be between {lowest} and {highest}")]
    OutOfRange {
        /// The number given.
        value: u64,
        /// The lowest that is allowed.
        lowest: u64,
        /// The highest that is allowed.
        highest: u64,
    },
    /// A span of time out of its range.
    #[error("is {value:?}: must be between {lowest:?} and {highest:?}")]
    SpanOutOfRange {
        /// The span given.
        value: Duration,
        /// The shortest that is allowed.
        lowest: Duration,
        /// The longest that is allowed.
        highest: Duration,
    },
    /// A span of time that goes backward or has an impossible fraction.
    #[error("is no span of time: {seconds} s and {nanos} ns")]
    Span {
        /// Whole seconds as given.
        seconds: i64,
        /// Nanoseconds as given.
        nanos: i32,
    },
    /// An entry that stands twice.
    #[error("`{}` stands twice", name.escape_debug())]
    Twice {
        /// The name that stands twice.
        name: String,
    },
    /// Phases that are not in their order.
    #[error("{phase} comes after {before}: the order is setup, run, teardown, each at most once")]
    Order {
        /// The phase that is out of order.
        phase: Phase,
        /// The one that it follows.
        before: Phase,
    },
    /// There is no phase `run`.
    #[error("have no phase `run`")]
    NoRun,
    /// A command that tells its phases has others beside it.
    #[error("is only for a task of one phase")]
    NotAlone,
    /// Not 64 lower-case hexadecimal digits.
    #[error("is not a digest of 64 lower-case hexadecimal digits")]
    Digest,
    /// A path that has to be absolute.
    #[error("`{}` is not absolute", path.escape_debug())]
    NotAbsolute {
        /// The path as given.
        path: String,
    },
    /// A secret file whose content is not in the message.
    #[error("is not inline: a secret file must be")]
    SecretNotInline,
    /// Two fields of which only one may be set.
    #[error("is set together with `{other}`")]
    Conflict {
        /// The other field.
        other: &'static str,
    },
    /// Two fields that have to agree.
    #[error("has {length} bytes, but {announced} are announced")]
    Length {
        /// Bytes given.
        length: usize,
        /// Bytes announced.
        announced: u64,
    },
    /// A name that is refused.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A number of a task or session that is refused.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A path that is refused.
    #[error(transparent)]
    Path(#[from] PathError),
}

impl ConvertError {
    /// Names a field and what is wrong with it.
    pub fn new(field: impl Into<String>, problem: impl Into<Problem>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    /// The same error as seen from the message around: `path` under `files[3]` becomes `files[3].path`.
    #[must_use]
    pub fn under(self, outer: impl Display) -> Self {
        Self { field: format!("{outer}.{}", self.field), problem: self.problem }
    }
}

type Converted<T> = Result<T, ConvertError>;

macro_rules! wire_enum {
    ($(#[$doc:meta])* $inward:ident, $domain:ty, $wire:ty, $what:literal, [$($variant:ident),* $(,)?]) => {
        impl From<$domain> for $wire {
            fn from(value: $domain) -> Self {
                match value {
                    $(<$domain>::$variant => <$wire>::$variant,)*
                }
            }
        }

        $(#[$doc])*
        ///
        /// # Errors
        /// When the number is unspecified or unknown.
        pub fn $inward(field: &str, number: i32) -> Result<$domain, ConvertError> {
            match <$wire>::try_from(number) {
                $(Ok(<$wire>::$variant) => Ok(<$domain>::$variant),)*
                _ => Err(ConvertError::new(field, Problem::Unknown { what: $what, value: number })),
            }
        }
    };
}

wire_enum!(
    /// A phase from its number.
    phase_in, Phase, v1::Phase, "phase", [Setup, Run, Teardown]
);
wire_enum!(
    /// A kind of outcome from its number.
    outcome_in, OutcomeKind, v1::OutcomeKind, "outcome",
    [Passed, Failed, Killed, TimedOut, Cancelled, Stopped, Error, Lost]
);
wire_enum!(
    /// A reason from its number.
    reason_in, Reason, v1::Reason, "reason",
    [
        Exited, Signaled, PhaseTimeout, Cancelled, Stopped, OutOfMemory, Drained, LeaseExpired, SessionClosed,
        SupervisorDied, HostRebooted, StateCorrupt, FileRefused, StartFailed, UserRefused, LimitsUnavailable,
        HostExhausted, Unreachable, InvalidBlock, TestDeadline, Internal, FailFast,
        Unsupported,
    ]
);
wire_enum!(
    /// An expectation from its number.
    expectation_in, Expectation, v1::Expectation, "expectation", [Pass, Fail, Any]
);
wire_enum!(
    /// A failure policy from its number.
    failure_policy_in, FailurePolicy, v1::FailurePolicy, "failure policy", [Continue, Drain]
);
wire_enum!(
    /// A log channel from its number.
    log_channel_in, LogChannel, v1::LogChannel, "log channel", [Stdout, Stderr, Mark]
);
wire_enum!(
    /// A place for files from its number.
    file_place_in, FilePlace, v1::FilePlace, "place for files", [Work, Private]
);

fn wire<W: From<D> + Into<i32>, D>(value: D) -> i32 {
    W::from(value).into()
}

/// An instant as the wire has it.
#[must_use]
pub fn timestamp(ns_since_1970: u64) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(ns_since_1970 / 1_000_000_000).unwrap_or(i64::MAX),
        nanos: i32::try_from(ns_since_1970 % 1_000_000_000).unwrap_or(0),
    }
}

/// An instant in nanoseconds since 1970. Only people read instants, so one that cannot be said so becomes the nearest one
/// that can.
#[must_use]
pub fn timestamp_ns(timestamp: &prost_types::Timestamp) -> u64 {
    let Ok(seconds) = u64::try_from(timestamp.seconds) else { return 0 };
    let nanos = u64::try_from(timestamp.nanos.clamp(0, 999_999_999)).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// A span of time as the wire has it; the longest that the wire can say when it is longer.
#[must_use]
pub fn duration(span: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(span.subsec_nanos()).unwrap_or(0),
    }
}

/// A span of time from the wire, within `range`; none when it is unset.
///
/// # Errors
/// When it goes backward or is out of its range.
pub fn duration_in(
    field: &str,
    span: Option<&prost_types::Duration>,
    range: RangeInclusive<Duration>,
) -> Result<Option<Duration>, ConvertError> {
    let Some(span) = span else { return Ok(None) };
    let impossible = || ConvertError::new(field, Problem::Span { seconds: span.seconds, nanos: span.nanos });
    let seconds = u64::try_from(span.seconds).map_err(|_| impossible())?;
    let nanos = u32::try_from(span.nanos).map_err(|_| impossible())?;
    if nanos > 999_999_999 {
        return Err(impossible());
    }
    let value = Duration::new(seconds, nanos);
    if !range.contains(&value) {
        let (&lowest, &highest) = (range.start(), range.end());
        return Err(ConvertError::new(field, Problem::SpanOutOfRange { value, lowest, highest }));
    }
    Ok(Some(value))
}

/// A number of a task or session from its text.
///
/// # Errors
/// When the text is not the canonical form of such a number.
pub fn id_in<T: FromStr<Err = IdError>>(field: &str, text: &str) -> Result<T, ConvertError> {
    text.parse().map_err(|error: IdError| ConvertError::new(field, error))
}

/// A digest of a blob from its text.
///
/// # Errors
/// When the text is not 64 lower-case hexadecimal digits.
pub fn blob_digest_in(field: &str, text: &str) -> Result<BlobDigest, ConvertError> {
    BlobDigest::parse(text).ok_or_else(|| ConvertError::new(field, Problem::Digest))
}

/// Digest of a specification: SHA-256 of its encoding. The encoding is the same on both ends because the message has no
/// maps and its fields are written in the order of their numbers.
#[must_use]
pub fn spec_sha256(spec: &v1::TaskSpec) -> String {
    text::hex(&Sha256::digest(spec.encode_to_vec()))
}

fn sha256_in(field: &str, digits: &str) -> Converted<()> {
    let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if digits.len() == 64 && digits.bytes().all(is_digit) {
        Ok(())
    } else {
        Err(ConvertError::new(field, Problem::Digest))
    }
}

fn count_in(field: &str, count: usize, limit: usize) -> Converted<()> {
    if count > limit { Err(ConvertError::new(field, Problem::TooMany { count, limit })) } else { Ok(()) }
}

fn length_in(field: &str, length: usize, limit: usize) -> Converted<()> {
    if length > limit { Err(ConvertError::new(field, Problem::TooLong { length, limit })) } else { Ok(()) }
}

fn number_in(field: &str, value: u32) -> Converted<u32> {
    if value == 0 {
        return Err(ConvertError::new(
            field,
            Problem::OutOfRange { value: 0, lowest: 1, highest: u64::from(u32::MAX) },
        ));
    }
    Ok(value)
}

/// A text that goes to the kernel.
fn system_text_in(field: &str, value: String, limit: usize) -> Converted<String> {
    length_in(field, value.len(), limit)?;
    if value.contains('\0') {
        return Err(ConvertError::new(field, Problem::Nul));
    }
    Ok(value)
}

fn variable_name_in(field: &str, name: String) -> Converted<String> {
    if name.is_empty() {
        return Err(ConvertError::new(field, Problem::Empty));
    }
    let name = system_text_in(field, name, limits::ENVIRONMENT_NAME_BYTES_MAX)?;
    if name.contains('=') {
        return Err(ConvertError::new(field, Problem::EqualSign));
    }
    Ok(name)
}
