//! Output on disk in records, read from any offset.
