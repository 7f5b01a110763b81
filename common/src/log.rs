//! Output of a task in pieces, and lines made of pieces. Pure.

use bytes::Bytes;

/// Which output a record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogChannel {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A mark of the supervisor, not printed by the block: the beginning of a phase.
    Mark,
}

/// A piece of output, in the order in which it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// Which output.
    pub channel: LogChannel,
    /// Offset of the first byte in that output.
    pub offset: u64,
    /// When it was read, in nanoseconds since 1970 by the host's clock.
    pub read_time_ns: u64,
    /// The bytes: at most [`crate::limits::CHUNK_BYTES`]. For a mark: text.
    pub data: Bytes,
    /// When not zero, this record stands for that many bytes which were not kept; `data` is empty.
    pub skipped_bytes: u64,
}
