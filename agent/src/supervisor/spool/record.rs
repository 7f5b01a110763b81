//! The layout of a spool file, and its reader.
//!
//! A header, then records; see [`super`] for who writes them. Knows no quota and no task.

use std::{fs::File, io, path::PathBuf};

use bytes::Bytes;
use millstream_common::{
    limits,
    log::{LogChannel, LogRecord},
};

/// First bytes of every spool file: what it is, and which version of the layout.
pub(super) const HEADER: [u8; 16] = *b"millstream log\0\x01";
/// Bytes of a record before its data.
pub(super) const RECORD_HEADER_BYTES: usize = 28;
/// The longest record. A read that may take this many bytes always moves on.
pub const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + limits::CHUNK_BYTES;
/// Set in a record's flags when its data is the count of bytes that are missing, not output.
const FLAG_SKIPPED: u8 = 1;
/// Bytes of which checksums are made to find the last records: all that is looked through, many times over.
const CHECKED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// What a spool file holds instead of the record that was expected. Found inside an [`io::Error`] of kind `InvalidData`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the log `{}` is damaged at byte {position}: {what}; its task's output cannot be read any further", path.display())]
pub struct SpoolDamage {
    /// The file.
    pub path: PathBuf,
    /// Where the bad record begins.
    pub position: u64,
    /// What is wrong with it.
    pub what: &'static str,
}

/// What is written before the data of a record.
#[derive(Debug, Clone, Copy)]
pub(super) struct RecordHeader {
    pub(super) length: usize,
    pub(super) channel: LogChannel,
    pub(super) skipped: bool,
    pub(super) offset: u64,
    pub(super) time_ns: u64,
}

impl RecordHeader {
    pub(super) fn encode(&self, data: &[u8]) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        let length = u32::try_from(self.length).expect("a record has at most 256 KiB");
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4] = match self.channel {
            LogChannel::Stdout => 1,
            LogChannel::Stderr => 2,
            LogChannel::Mark => 3,
        };
        bytes[5] = if self.skipped { FLAG_SKIPPED } else { 0 };
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.time_ns.to_le_bytes());
        let checksum = checksum(&bytes[..24], data);
        bytes[24..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a header; the checksum beside it covers the data too and is checked by the caller.
    fn decode(bytes: &[u8; RECORD_HEADER_BYTES]) -> Result<(Self, u32), &'static str> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let channel = match bytes[4] {
            1 => LogChannel::Stdout,
            2 => LogChannel::Stderr,
            3 => LogChannel::Mark,
            _ => return Err("a record of an unknown channel"),
        };
        let skipped = match bytes[5] {
            0 => false,
            FLAG_SKIPPED => true,
            _ => return Err("a record with an unknown flag"),
        };
        let length = usize::try_from(word(0)).unwrap_or(usize::MAX);
        if length > limits::CHUNK_BYTES || (skipped && length != 8) {
            return Err("a record of an impossible length");
        }
        Ok((Self { length, channel, skipped, offset: long(8), time_ns: long(16) }, word(24)))
    }
}

fn checksum(header: &[u8], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(data);
    hasher.finalize()
}

pub(super) fn length_u64(length: usize) -> u64 {
    u64::try_from(length).expect("a length in memory fits into 64 bits")
}

/// Reads a spool file, at any time and from any record.
#[derive(Debug)]
pub struct SpoolReader {
    pub(super) path: PathBuf,
    pub(super) file: File,
}

impl SpoolReader {
    /// Opens a spool file.
    ///
    /// # Errors
    /// When it cannot be opened, or is none ([`SpoolDamage`] inside).
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let reader = Self { file: File::open(&path)?, path };
        let mut header = [0; HEADER.len()];
        let read = rustix::io::pread(&reader.file, &mut header, 0)?;
        if read < header.len() || header != HEADER {
            return Err(reader.damage(0, "it does not begin like a log of this version"));
        }
        Ok(reader)
    }

    /// Reads whole records from `position`, which is zero or one that an earlier call returned, and returns them with the
    /// position behind the last one. Looks at no byte from `limit` on: the position that the writer has announced. Takes at
    /// most `max_bytes` of the file; none is returned when not even one record fits into them, which cannot happen with
    /// [`RECORD_BYTES_MAX`] or more unless everything has been read.
    ///
    /// The data of all records share the one buffer that was read.
    ///
    /// # Errors
    /// When the file cannot be read, or a record is torn or damaged ([`SpoolDamage`] inside).
    pub fn read(&self, position: u64, limit: u64, max_bytes: usize) -> io::Result<(Vec<LogRecord>, u64)> {
        let position = position.max(length_u64(HEADER.len()));
        let wanted = usize::try_from(limit.saturating_sub(position)).unwrap_or(usize::MAX).min(max_bytes);
        let buffer = self.read_bytes(position, wanted)?;
        let ends_early = buffer.len() < wanted;
        let mut records = Vec::new();
        let mut at = 0;
        while let Some((record, end)) = self.record(&buffer, at, position, limit, ends_early)? {
            records.push(record);
            at = end;
        }
        Ok((records, position + length_u64(at)))
    }

    /// A position from which the last records can be read, at most `max_bytes` before `limit`: the first that a chain of sound
    /// records leads from to `limit`. It is `limit` itself when not even one record fits.
    ///
    /// Records do not say where the one before them begins, so that the chain is looked for from its end. What a block prints may
    /// look like records, too; that costs no more than some of its own lines, and a bounded time.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn last_records(&self, limit: u64, max_bytes: usize) -> io::Result<u64> {
        let first = length_u64(HEADER.len());
        let begin = limit.saturating_sub(length_u64(max_bytes)).max(first);
        if begin == first {
            return Ok(first);
        }
        let buffer = self.read_bytes(begin, usize::try_from(limit - begin).unwrap_or(max_bytes))?;
        let mut leads_to_end = vec![false; buffer.len() + 1];
        leads_to_end[buffer.len()] = true;
        let (mut found, mut left) = (buffer.len(), CHECKED_BYTES_MAX);
        for at in (0..=buffer.len().saturating_sub(RECORD_HEADER_BYTES)).rev() {
            let Some(header) = buffer[at..].first_chunk() else { continue };
            let Ok((record, expected)) = RecordHeader::decode(header) else { continue };
            let data_at = at + RECORD_HEADER_BYTES;
            let end = data_at + record.length;
            if end > buffer.len() || !leads_to_end[end] || record.length >= left {
                continue;
            }
            left -= record.length;
            if checksum(&buffer[at..data_at - 4], &buffer[data_at..end]) == expected {
                leads_to_end[at] = true;
                found = at;
            }
        }
        Ok(begin + length_u64(found))
    }

    /// The record that begins `at` in the buffer, which was read from `position`, and where it ends; none when it does not
    /// fit into the buffer and more of the file can be read.
    fn record(
        &self,
        buffer: &Bytes,
        at: usize,
        position: u64,
        limit: u64,
        ends_early: bool,
    ) -> io::Result<Option<(LogRecord, usize)>> {
        let damage = |what| self.damage(position + length_u64(at), what);
        let cut_off = |length: usize| match position + length_u64(at + length) > limit {
            true => Err(damage("a record goes beyond the end that was announced")),
            false => Ok(None),
        };
        if at == buffer.len() {
            return match ends_early {
                true => Err(damage("the file ends before the end that was announced")),
                false => Ok(None),
            };
        }
        if ends_early && buffer.len() - at < RECORD_HEADER_BYTES {
            return Err(damage("a record is cut off"));
        }
        let Some(header) = buffer[at..].first_chunk() else { return cut_off(RECORD_HEADER_BYTES) };
        let (record, expected) = RecordHeader::decode(header).map_err(damage)?;
        let data_at = at + RECORD_HEADER_BYTES;
        let end = data_at + record.length;
        if end > buffer.len() {
            return if ends_early { Err(damage("a record is cut off")) } else { cut_off(end - at) };
        }
        if checksum(&buffer[at..data_at - 4], &buffer[data_at..end]) != expected {
            return Err(damage("a record does not match its checksum"));
        }
        let data = buffer.slice(data_at..end);
        let (data, skipped_bytes) = match (record.skipped, data.first_chunk()) {
            (true, Some(count)) => (Bytes::new(), u64::from_le_bytes(*count)),
            _ => (data, 0),
        };
        let (channel, offset, read_time_ns) = (record.channel, record.offset, record.time_ns);
        Ok(Some((LogRecord { channel, offset, read_time_ns, data, skipped_bytes }, end)))
    }

    fn read_bytes(&self, position: u64, wanted: usize) -> io::Result<Bytes> {
        let mut buffer = Vec::with_capacity(wanted);
        while buffer.len() < wanted {
            let from = position + length_u64(buffer.len());
            match rustix::io::pread(&self.file, rustix::buffer::spare_capacity(&mut buffer), from) {
                Ok(0) => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        buffer.truncate(wanted);
        Ok(Bytes::from(buffer))
    }

    fn damage(&self, position: u64, what: &'static str) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, SpoolDamage { path: self.path.clone(), position, what })
    }
}
