//! Records of output, inward and outward.

use super::*;

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
