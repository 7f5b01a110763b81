//! The one place where the wire meets the domain: `TryFrom` inward, `From` outward.
//!
//! What comes in is checked against every bound of [`crate::limits`] here, once, and is a value of the domain from then on.
//! An error names the field by its path, such as `phases[1].argv[0]: holds a NUL`, so that it can be answered as it is.
//! Nothing here decides what to do: it reads no file, asks no clock and keeps nothing.

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

// What is run.

impl TryFrom<v1::TaskSpec> for TaskSpec {
    type Error = ConvertError;

    fn try_from(spec: v1::TaskSpec) -> Result<Self, ConvertError> {
        let quota = spec.log_quota.unwrap_or_default();
        let or_default = |value: u64, default: u64| if value == 0 { default } else { value };
        let name_error = |field: &'static str| move |error: NameError| ConvertError::new(field, error);
        Ok(Self {
            stream: StreamName::new(&spec.stream).map_err(name_error("stream"))?,
            name: BlockName::new(&spec.name).map_err(name_error("name"))?,
            stream_number: number_in("stream_number", spec.stream_number)?,
            test_number: number_in("test_number", spec.test_number)?,
            files: files_in("files", spec.files)?,
            phases: phases_in(spec.phases)?,
            environment: environment_in(spec.environment)?,
            working_directory: system_text_in(
                "working_directory",
                spec.working_directory,
                limits::PATH_BYTES_MAX,
            )?,
            user: match spec.user {
                user if user.is_empty() => None,
                user => Some(system_text_in("user", user, limits::USER_NAME_BYTES_MAX)?),
            },
            limits: spec.limits.map(ResourceLimits::from).unwrap_or_default(),
            grace: duration_in(
                "grace_duration",
                spec.grace_duration.as_ref(),
                Duration::ZERO..=limits::GRACE_MAX,
            )?
            .unwrap_or(limits::GRACE),
            log_head_bytes: or_default(quota.head_bytes, limits::LOG_HEAD_BYTES),
            log_tail_bytes: or_default(quota.tail_bytes, limits::LOG_TAIL_BYTES),
            expectation: expectation_in("expectation", spec.expectation)?,
            failure_policy: failure_policy_in("failure_policy", spec.failure_policy)?,
            hold: spec.hold,
        })
    }
}

fn files_in(field: &str, files: Vec<v1::ShippedFile>) -> Converted<Vec<ShippedFile>> {
    count_in(field, files.len(), limits::FILES_COUNT_MAX)?;
    let mut inline_bytes = 0;
    let mut seen = HashSet::with_capacity(files.len());
    let mut converted: Vec<ShippedFile> = Vec::with_capacity(files.len());
    for (index, file) in files.into_iter().enumerate() {
        let file =
            ShippedFile::try_from(file).map_err(|error| error.under(format_args!("{field}[{index}]")))?;
        if let FileSource::Inline(content) = &file.source {
            inline_bytes += content.len();
        }
        if !seen.insert((file.place, file.path.clone())) {
            let name = file.path.to_string();
            return Err(ConvertError::new(format!("{field}[{index}].path"), Problem::Twice { name }));
        }
        converted.push(file);
    }
    length_in(&format!("{field}.inline"), inline_bytes, limits::INLINE_FILES_BYTES_MAX)?;
    Ok(converted)
}

/// The secret files of a start: inline only, mode 0600 whatever was asked for.
///
/// # Errors
/// When one is out of bounds or has no content of its own.
pub fn secret_files_in(files: Vec<v1::ShippedFile>) -> Result<Vec<ShippedFile>, ConvertError> {
    let mut files = files_in("secret_files", files)?;
    for (index, file) in files.iter_mut().enumerate() {
        if !matches!(file.source, FileSource::Inline(_)) {
            return Err(ConvertError::new(format!("secret_files[{index}].source"), Problem::SecretNotInline));
        }
        file.mode = 0o600;
    }
    Ok(files)
}

fn phases_in(phases: Vec<v1::PhaseSpec>) -> Converted<Vec<PhaseSpec>> {
    // Three kinds, each at most once: the order below bounds the count.
    let mut converted: Vec<PhaseSpec> = Vec::with_capacity(phases.len().min(3));
    for (index, phase) in phases.into_iter().enumerate() {
        let phase =
            PhaseSpec::try_from(phase).map_err(|error| error.under(format_args!("phases[{index}]")))?;
        if let Some(before) = converted.last()
            && before.phase >= phase.phase
        {
            let problem = Problem::Order { phase: phase.phase, before: before.phase };
            return Err(ConvertError::new(format!("phases[{index}].phase"), problem));
        }
        converted.push(phase);
    }
    if !converted.iter().any(|phase| phase.phase == Phase::Run) {
        return Err(ConvertError::new("phases", Problem::NoRun));
    }
    if converted.len() > 1
        && let Some(index) = converted.iter().position(|phase| phase.reports_phases)
    {
        return Err(ConvertError::new(format!("phases[{index}].reports_phases"), Problem::NotAlone));
    }
    Ok(converted)
}

fn environment_in(variables: Vec<v1::EnvironmentVariable>) -> Converted<BTreeMap<String, String>> {
    count_in("environment", variables.len(), limits::ENVIRONMENT_COUNT_MAX)?;
    let mut environment = BTreeMap::new();
    for (index, variable) in variables.into_iter().enumerate() {
        let name = variable_name_in(&format!("environment[{index}].name"), variable.name)?;
        let field = format!("environment[{index}].value");
        let value = system_text_in(&field, variable.value, limits::ENVIRONMENT_VALUE_BYTES_MAX)?;
        if environment.contains_key(&name) {
            return Err(ConvertError::new(format!("environment[{index}].name"), Problem::Twice { name }));
        }
        environment.insert(name, value);
    }
    Ok(environment)
}

impl TryFrom<v1::PhaseSpec> for PhaseSpec {
    type Error = ConvertError;

    fn try_from(phase: v1::PhaseSpec) -> Result<Self, ConvertError> {
        let kind = phase_in("phase", phase.phase)?;
        let mut bytes = 0_usize;
        for (index, argument) in phase.argv.iter().enumerate() {
            if argument.contains('\0') {
                return Err(ConvertError::new(format!("argv[{index}]"), Problem::Nul));
            }
            bytes += argument.len() + 1;
        }
        match phase.argv.first() {
            None => return Err(ConvertError::new("argv", Problem::Empty)),
            Some(program) if program.is_empty() => return Err(ConvertError::new("argv[0]", Problem::Empty)),
            Some(_) => length_in("argv", bytes, limits::ARGV_BYTES_MAX)?,
        }
        let span = Duration::from_millis(1)..=limits::WAIT_MAX;
        Ok(Self {
            phase: kind,
            timeout: duration_in("timeout", phase.timeout.as_ref(), span)?,
            output: descriptors_in(phase.stdout_descriptor, phase.stderr_descriptor)?,
            argv: phase.argv,
            reports_phases: phase.reports_phases,
        })
    }
}

fn descriptors_in(stdout: u32, stderr: u32) -> Converted<OutputDescriptors> {
    if stdout == 0 && stderr == 0 {
        return Ok(OutputDescriptors::Standard);
    }
    let descriptor = |field: &str, value: u32| match i32::try_from(value) {
        Ok(number @ 3..=9) => Ok(number),
        _ => Err(ConvertError::new(
            field,
            Problem::OutOfRange { value: u64::from(value), lowest: 3, highest: 9 },
        )),
    };
    let (stdout, stderr) =
        (descriptor("stdout_descriptor", stdout)?, descriptor("stderr_descriptor", stderr)?);
    if stdout == stderr {
        return Err(ConvertError::new("stderr_descriptor", Problem::Twice { name: stderr.to_string() }));
    }
    Ok(OutputDescriptors::Moved { stdout, stderr })
}

impl TryFrom<v1::ShippedFile> for ShippedFile {
    type Error = ConvertError;

    fn try_from(file: v1::ShippedFile) -> Result<Self, ConvertError> {
        use v1::shipped_file::Source;
        let safe_path =
            |field: &str, path: String| SafePath::new(path).map_err(|e| ConvertError::new(field, e));
        let source = match file.source {
            None => return Err(ConvertError::new("source", Problem::Missing)),
            Some(Source::BlobBlake3(digest)) => FileSource::Blob(blob_digest_in("blob_blake3", &digest)?),
            Some(Source::Inline(content)) => {
                length_in("inline", content.len(), limits::INLINE_FILE_BYTES_MAX)?;
                FileSource::Inline(content)
            }
            Some(Source::HostPath(path)) => {
                let path = system_text_in("host_path", path, limits::PATH_BYTES_MAX)?;
                if !path.starts_with('/') {
                    return Err(ConvertError::new("host_path", Problem::NotAbsolute { path }));
                }
                FileSource::HostPath(path)
            }
            Some(Source::LinkTarget(target)) => FileSource::Link(safe_path("link_target", target)?),
        };
        Ok(Self {
            path: safe_path("path", file.path)?,
            place: file_place_in("place", file.place)?,
            mode: if file.mode & 0o777 == 0 { 0o644 } else { file.mode & 0o777 },
            environment_name: match file.environment_name {
                name if name.is_empty() => None,
                name => Some(variable_name_in("environment_name", name)?),
            },
            environment_holds_directory: file.environment_holds_directory,
            source,
        })
    }
}

impl From<v1::ResourceLimits> for ResourceLimits {
    fn from(limits: v1::ResourceLimits) -> Self {
        let limit = |value: u64| (value != 0).then_some(value);
        Self {
            memory_bytes: limit(limits.memory_bytes),
            pids_count: limit(limits.pids_count),
            cpu_millis: limit(limits.cpu_millis),
        }
    }
}

impl From<&TaskSpec> for v1::TaskSpec {
    fn from(spec: &TaskSpec) -> Self {
        let limits = &spec.limits;
        Self {
            stream: spec.stream.to_string(),
            name: spec.name.to_string(),
            stream_number: spec.stream_number,
            test_number: spec.test_number,
            files: spec.files.iter().map(v1::ShippedFile::from).collect(),
            phases: spec.phases.iter().map(v1::PhaseSpec::from).collect(),
            environment: spec
                .environment
                .iter()
                .map(|(name, value)| v1::EnvironmentVariable { name: name.clone(), value: value.clone() })
                .collect(),
            working_directory: spec.working_directory.clone(),
            user: spec.user.clone().unwrap_or_default(),
            limits: (!limits.is_none()).then(|| v1::ResourceLimits {
                memory_bytes: limits.memory_bytes.unwrap_or(0),
                pids_count: limits.pids_count.unwrap_or(0),
                cpu_millis: limits.cpu_millis.unwrap_or(0),
            }),
            grace_duration: Some(duration(spec.grace)),
            log_quota: Some(v1::LogQuota {
                head_bytes: spec.log_head_bytes,
                tail_bytes: spec.log_tail_bytes,
            }),
            expectation: wire::<v1::Expectation, _>(spec.expectation),
            failure_policy: wire::<v1::FailurePolicy, _>(spec.failure_policy),
            hold: spec.hold,
        }
    }
}

impl From<&PhaseSpec> for v1::PhaseSpec {
    fn from(phase: &PhaseSpec) -> Self {
        let (stdout, stderr) = match phase.output {
            OutputDescriptors::Standard => (0, 0),
            OutputDescriptors::Moved { stdout, stderr } => (stdout.unsigned_abs(), stderr.unsigned_abs()),
        };
        Self {
            phase: wire::<v1::Phase, _>(phase.phase),
            argv: phase.argv.clone(),
            timeout: phase.timeout.map(duration),
            stdout_descriptor: stdout,
            stderr_descriptor: stderr,
            reports_phases: phase.reports_phases,
        }
    }
}

impl From<&ShippedFile> for v1::ShippedFile {
    fn from(file: &ShippedFile) -> Self {
        use v1::shipped_file::Source;
        Self {
            path: file.path.to_string(),
            place: wire::<v1::FilePlace, _>(file.place),
            mode: file.mode,
            environment_name: file.environment_name.clone().unwrap_or_default(),
            environment_holds_directory: file.environment_holds_directory,
            source: Some(match &file.source {
                FileSource::Blob(digest) => Source::BlobBlake3(digest.to_string()),
                FileSource::Inline(content) => Source::Inline(content.clone()),
                FileSource::HostPath(path) => Source::HostPath(path.clone()),
                FileSource::Link(target) => Source::LinkTarget(target.to_string()),
            }),
        }
    }
}

// What came of it. Text in a record is for people: it is made safe and cut rather than refused, because a terminal record
// that is thrown away cannot be had again.

impl TryFrom<v1::TaskEnd> for TaskEnd {
    type Error = ConvertError;

    fn try_from(end: v1::TaskEnd) -> Result<Self, ConvertError> {
        let any_span = Duration::ZERO..=Duration::MAX;
        let mut phases = Vec::with_capacity(end.phases.len().min(3));
        count_in("phases", end.phases.len(), 3)?;
        for (index, phase) in end.phases.into_iter().enumerate() {
            phases.push(PhaseEnd::try_from(phase).map_err(|e| e.under(format_args!("phases[{index}]")))?);
        }
        Ok(Self {
            outcome: outcome_in("outcome", end.outcome)?,
            reason: reason_in("reason", end.reason)?,
            phase: if end.phase == 0 { None } else { Some(phase_in("phase", end.phase)?) },
            exit: exit_in(end.exit_code, end.signal)?,
            detail: text::printable(end.detail.as_bytes(), limits::TEXT_BYTES_MAX),
            start_time_ns: end.start_time.as_ref().map(timestamp_ns),
            end_time_ns: end.end_time.as_ref().map(timestamp_ns),
            run_duration: duration_in("run_duration", end.run_duration.as_ref(), any_span)?
                .unwrap_or_default(),
            phases,
            leaked: end
                .leaked
                .into_iter()
                .take(limits::LEAKED_COUNT_MAX)
                .map(|process| LeakedProcess {
                    pid: process.pid,
                    command: text::printable(process.command.as_bytes(), limits::LAST_LINE_BYTES_MAX),
                })
                .collect(),
            leaked_count: end.leaked_count,
            log: end
                .log
                .map(LogTotals::try_from)
                .transpose()
                .map_err(|e| e.under("log"))?
                .unwrap_or_default(),
            archive: end.archive.map(ArchiveInfo::try_from).transpose().map_err(|e| e.under("archive"))?,
            last_lines: end
                .last_lines
                .iter()
                .take(limits::LAST_LINES_COUNT)
                .map(|line| text::printable(line.as_bytes(), limits::LAST_LINE_BYTES_MAX))
                .collect(),
            skipped: end
                .skipped
                .iter()
                .take(limits::SKIPPED_COUNT_MAX)
                .map(|entry| text::printable(entry.as_bytes(), limits::TEXT_BYTES_MAX))
                .collect(),
        })
    }
}

fn exit_in(code: Option<i32>, signal: Option<i32>) -> Converted<Option<Exit>> {
    match (code, signal) {
        (None, None) => Ok(None),
        (Some(code), None) => Ok(Some(Exit::Code(code))),
        (None, Some(signal)) => Ok(Some(Exit::Signal(signal))),
        (Some(_), Some(_)) => Err(ConvertError::new("signal", Problem::Conflict { other: "exit_code" })),
    }
}

fn exit_out(exit: Option<Exit>) -> (Option<i32>, Option<i32>) {
    match exit {
        None => (None, None),
        Some(Exit::Code(code)) => (Some(code), None),
        Some(Exit::Signal(signal)) => (None, Some(signal)),
    }
}

impl TryFrom<v1::PhaseEnd> for PhaseEnd {
    type Error = ConvertError;

    fn try_from(end: v1::PhaseEnd) -> Result<Self, ConvertError> {
        let any_span = Duration::ZERO..=Duration::MAX;
        Ok(Self {
            phase: phase_in("phase", end.phase)?,
            outcome: outcome_in("outcome", end.outcome)?,
            exit: exit_in(end.exit_code, end.signal)?,
            duration: duration_in("duration", end.duration.as_ref(), any_span)?.unwrap_or_default(),
        })
    }
}

impl TryFrom<v1::LogTotals> for LogTotals {
    type Error = ConvertError;

    fn try_from(totals: v1::LogTotals) -> Result<Self, ConvertError> {
        // A task that printed nothing because it never began has no digests.
        for (field, digits) in
            [("stdout_sha256", &totals.stdout_sha256), ("stderr_sha256", &totals.stderr_sha256)]
        {
            if !digits.is_empty() {
                sha256_in(field, digits)?;
            }
        }
        Ok(Self {
            stdout_bytes: totals.stdout_bytes,
            stderr_bytes: totals.stderr_bytes,
            stdout_sha256: totals.stdout_sha256,
            stderr_sha256: totals.stderr_sha256,
            end_position: totals.end_position,
            truncated: totals.truncated,
        })
    }
}

impl TryFrom<v1::ArchiveInfo> for ArchiveInfo {
    type Error = ConvertError;

    fn try_from(archive: v1::ArchiveInfo) -> Result<Self, ConvertError> {
        sha256_in("sha256", &archive.sha256)?;
        let (value, highest) = (archive.size_bytes, limits::ARCHIVE_BYTES_MAX);
        if value > highest {
            return Err(ConvertError::new("size_bytes", Problem::OutOfRange { value, lowest: 0, highest }));
        }
        let length = archive.inline.len();
        if length != 0 && u64::try_from(length) != Ok(archive.size_bytes) {
            return Err(ConvertError::new(
                "inline",
                Problem::Length { length, announced: archive.size_bytes },
            ));
        }
        let limit = usize::try_from(limits::ARCHIVE_INLINE_BYTES_MAX).expect("64 KiB");
        length_in("inline", length, limit)?;
        Ok(Self { size_bytes: archive.size_bytes, sha256: archive.sha256, inline: archive.inline })
    }
}

impl From<&TaskEnd> for v1::TaskEnd {
    fn from(end: &TaskEnd) -> Self {
        let (exit_code, signal) = exit_out(end.exit);
        Self {
            outcome: wire::<v1::OutcomeKind, _>(end.outcome),
            reason: wire::<v1::Reason, _>(end.reason),
            phase: end.phase.map_or(0, wire::<v1::Phase, _>),
            exit_code,
            signal,
            detail: end.detail.clone(),
            start_time: end.start_time_ns.map(timestamp),
            end_time: end.end_time_ns.map(timestamp),
            run_duration: Some(duration(end.run_duration)),
            phases: end.phases.iter().map(v1::PhaseEnd::from).collect(),
            leaked: end
                .leaked
                .iter()
                .map(|process| v1::LeakedProcess { pid: process.pid, command: process.command.clone() })
                .collect(),
            leaked_count: end.leaked_count,
            log: Some(v1::LogTotals {
                stdout_bytes: end.log.stdout_bytes,
                stderr_bytes: end.log.stderr_bytes,
                stdout_sha256: end.log.stdout_sha256.clone(),
                stderr_sha256: end.log.stderr_sha256.clone(),
                end_position: end.log.end_position,
                truncated: end.log.truncated,
            }),
            archive: end.archive.as_ref().map(|archive| v1::ArchiveInfo {
                size_bytes: archive.size_bytes,
                sha256: archive.sha256.clone(),
                inline: archive.inline.clone(),
            }),
            last_lines: end.last_lines.clone(),
            skipped: end.skipped.clone(),
        }
    }
}

impl From<&PhaseEnd> for v1::PhaseEnd {
    fn from(end: &PhaseEnd) -> Self {
        let (exit_code, signal) = exit_out(end.exit);
        Self {
            phase: wire::<v1::Phase, _>(end.phase),
            outcome: wire::<v1::OutcomeKind, _>(end.outcome),
            exit_code,
            signal,
            duration: Some(duration(end.duration)),
        }
    }
}

impl TryFrom<v1::LogRecord> for LogRecord {
    type Error = ConvertError;

    fn try_from(record: v1::LogRecord) -> Result<Self, ConvertError> {
        length_in("data", record.data.len(), limits::CHUNK_BYTES)?;
        if record.skipped_bytes != 0 && !record.data.is_empty() {
            return Err(ConvertError::new("skipped_bytes", Problem::Conflict { other: "data" }));
        }
        let length = record.skipped_bytes.max(u64::try_from(record.data.len()).unwrap_or(u64::MAX));
        let highest = u64::MAX - length;
        if record.offset > highest {
            return Err(ConvertError::new(
                "offset",
                Problem::OutOfRange { value: record.offset, lowest: 0, highest },
            ));
        }
        Ok(Self {
            channel: log_channel_in("channel", record.channel)?,
            offset: record.offset,
            read_time_ns: match &record.read_time {
                Some(time) => timestamp_ns(time),
                None => return Err(ConvertError::new("read_time", Problem::Missing)),
            },
            data: record.data,
            skipped_bytes: record.skipped_bytes,
        })
    }
}

impl From<LogRecord> for v1::LogRecord {
    fn from(record: LogRecord) -> Self {
        Self {
            channel: wire::<v1::LogChannel, _>(record.channel),
            offset: record.offset,
            read_time: Some(timestamp(record.read_time_ns)),
            data: record.data,
            skipped_bytes: record.skipped_bytes,
        }
    }
}

impl From<&LogRecord> for v1::LogRecord {
    fn from(record: &LogRecord) -> Self {
        record.clone().into()
    }
}

#[cfg(test)]
mod tests;
