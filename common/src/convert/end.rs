//! What came of a task, inward and outward. Text in a record is for people: it is made safe and cut rather than refused,
//! because a terminal record that is thrown away cannot be had again.

use super::*;

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
