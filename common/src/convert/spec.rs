//! What is run, inward and outward.

use super::*;

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
