//! Output of one task on disk, in records that can be read from any offset while they are written.
//!
//! The file only grows: a header, then records of (length, channel, offset, time, checksum, data). Readers are told how far
//! it is complete and never look beyond. Once the head quota is full, what follows goes to two tail files that overwrite
//! each other in turn; [`SpoolWriter::finish`] appends what is left of them behind a record that says how much is missing.
//! Every byte is counted and digested whether it is kept or not, so that a cut log can still be proved.
//!
//! It decides nothing about the task: a full disk costs output, which is marked as missing, and never the task itself.
//! Nothing is flushed to the platter, because a session does not survive a reboot.

mod lines;
mod record;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, IoSlice},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use millstream_common::{
    limits,
    log::{LogChannel, LogRecord},
    outcome::{LogTotals, Phase},
    text,
};
use sha2::{Digest as _, Sha256};

use super::disk::{Disk, HostDisk};
use lines::LineTail;
use record::{HEADER, RECORD_HEADER_BYTES, RecordHeader, length_u64};
pub use record::{RECORD_BYTES_MAX, SpoolDamage, SpoolReader};

/// Marks that are remembered when the output around them is dropped: three phases, with room.
const MARKS_COUNT_MAX: usize = 16;

/// How much output is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Bytes kept from the beginning, both outputs together.
    pub head_bytes: u64,
    /// Bytes kept from the end, both outputs together.
    pub tail_bytes: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Self { head_bytes: limits::LOG_HEAD_BYTES, tail_bytes: limits::LOG_TAIL_BYTES }
    }
}

fn create(disk: &dyn Disk, path: &Path) -> io::Result<File> {
    disk.admit(path, HEADER.len())?;
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
    write_all_at(&file, &[&HEADER], 0)?;
    Ok(file)
}

/// Writes all parts at `position` with as few calls as the kernel allows.
fn write_all_at(file: &File, parts: &[&[u8]], position: u64) -> io::Result<()> {
    let total: usize = parts.iter().map(|part| part.len()).sum();
    let mut written = 0;
    while written < total {
        let mut slices = [IoSlice::new(&[]); 2];
        let mut before = 0;
        for (slice, part) in slices.iter_mut().zip(parts) {
            let from = written.saturating_sub(before).min(part.len());
            *slice = IoSlice::new(&part[from..]);
            before += part.len();
        }
        match rustix::io::pwritev(file, &slices[..parts.len()], position + length_u64(written)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => written += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// One channel: all that came, and how much of it the file accounts for.
#[derive(Debug, Default)]
struct Channel {
    sha256: Sha256,
    bytes: u64,
    /// Offset up to which the main file holds the bytes or says that they are missing.
    accounted: u64,
    lines: LineTail,
}

/// One of the two tail files.
#[derive(Debug)]
struct Segment {
    path: PathBuf,
    file: File,
    position: u64,
    data_bytes: u64,
    /// Marks in the file, to be kept when the file is overwritten.
    marks: Vec<(u64, u64, String)>,
}

/// The tail files: the older one is full, the newer one grows; together they hold at least the tail.
#[derive(Debug)]
struct Tail {
    older: Option<Segment>,
    newer: Segment,
}

/// Writes the output of one task.
///
/// Dropping it leaves the files as they are: what was announced stays readable.
#[derive(Debug)]
pub struct SpoolWriter {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: File,
    position: u64,
    quota: Quota,
    head_left: u64,
    channels: [Channel; 3],
    tail: Option<Tail>,
    /// Marks whose surroundings were dropped, oldest first.
    lost_marks: Vec<(u64, u64, String)>,
    last_lines: VecDeque<Vec<u8>>,
    /// Whether the file says of any byte that it is missing.
    truncated: bool,
    first_error: Option<io::Error>,
    last_time_ns: u64,
}

fn index(channel: LogChannel) -> usize {
    match channel {
        LogChannel::Stdout => 0,
        LogChannel::Stderr => 1,
        LogChannel::Mark => 2,
    }
}

const CHANNELS: [LogChannel; 3] = [LogChannel::Stdout, LogChannel::Stderr, LogChannel::Mark];

impl SpoolWriter {
    /// Begins a spool file; one that is there is overwritten.
    ///
    /// # Errors
    /// When the file cannot be created or its header cannot be written.
    pub fn create(path: impl Into<PathBuf>, quota: Quota) -> io::Result<Self> {
        Self::create_on(Arc::new(HostDisk), path.into(), quota)
    }

    /// The same on a disk that is handed in.
    ///
    /// # Errors
    /// As [`SpoolWriter::create`].
    pub fn create_on(disk: Arc<dyn Disk>, path: PathBuf, quota: Quota) -> io::Result<Self> {
        let file = create(&*disk, &path)?;
        Ok(Self {
            disk,
            path,
            file,
            position: length_u64(HEADER.len()),
            quota,
            head_left: quota.head_bytes,
            channels: Default::default(),
            tail: None,
            lost_marks: Vec::new(),
            last_lines: VecDeque::with_capacity(limits::LAST_LINES_COUNT + 1),
            truncated: false,
            first_error: None,
            last_time_ns: 0,
        })
    }

    /// Takes in output and returns the position after the last complete record: what may be announced to readers. It
    /// stands still while output goes to the tail.
    ///
    /// # Errors
    /// When the bytes could not be written, because the disk is full for example. They are counted and digested all the
    /// same, and a later record says that they are missing: going on is right.
    pub fn append(&mut self, channel: LogChannel, time_ns: u64, data: &[u8]) -> io::Result<u64> {
        let mut outcome = Ok(());
        for piece in data.chunks(limits::CHUNK_BYTES) {
            let state = &mut self.channels[index(channel)];
            let offset = state.bytes;
            state.bytes += length_u64(piece.len());
            state.sha256.update(piece);
            if channel != LogChannel::Mark {
                state.lines.feed(piece, &mut self.last_lines);
            }
            let kept = self.keep(channel, offset, time_ns, piece);
            outcome = outcome.and(kept);
        }
        self.last_time_ns = time_ns;
        match outcome {
            Ok(()) => Ok(self.position),
            Err(error) => {
                // The error goes to the caller once and stays on record for the end of the task.
                self.first_error.get_or_insert_with(|| io::Error::new(error.kind(), error.to_string()));
                Err(error)
            }
        }
    }

    /// Notes that a phase begins. Marks are kept when the output around them is not.
    ///
    /// # Errors
    /// As [`SpoolWriter::append`].
    pub fn mark(&mut self, phase: Phase, time_ns: u64) -> io::Result<u64> {
        self.append(LogChannel::Mark, time_ns, phase.to_string().as_bytes())
    }

    /// Position after the last complete record.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes printed so far, both outputs together, kept or not.
    #[must_use]
    pub fn logged_bytes(&self) -> u64 {
        self.channels[0].bytes + self.channels[1].bytes
    }

    /// The first error in writing, if any output was lost to one.
    #[must_use]
    pub fn first_error(&self) -> Option<&io::Error> {
        self.first_error.as_ref()
    }

    /// The last lines printed, oldest first, unfinished ones included, made safe to print.
    #[must_use]
    pub fn last_lines(&self) -> Vec<String> {
        let unfinished = self.channels.iter().map(|channel| channel.lines.unfinished.as_slice());
        let all: Vec<&[u8]> = self
            .last_lines
            .iter()
            .map(Vec::as_slice)
            .chain(unfinished.filter(|line| !line.is_empty()))
            .collect();
        let first = all.len().saturating_sub(limits::LAST_LINES_COUNT);
        all[first..].iter().map(|line| text::printable(line, limits::LAST_LINE_BYTES_MAX)).collect()
    }

    /// The last line printed, made safe to print.
    #[must_use]
    pub fn last_line(&self) -> Option<String> {
        self.last_lines().pop()
    }

    /// Ends the file: behind the head come a record for what is missing of each channel, marks that fell into the gap, and
    /// the tail. Nothing may be appended afterwards. An error costs output, which is marked as missing, and is kept for
    /// [`SpoolWriter::first_error`].
    pub fn finish(&mut self) -> LogTotals {
        if let Some(tail) = self.tail.take() {
            let appended = self.append_tail(&tail);
            self.remember(appended);
            for segment in tail.older.iter().chain([&tail.newer]) {
                let removed = std::fs::remove_file(&segment.path);
                self.remember(removed);
            }
        }
        for channel in CHANNELS {
            let accounted =
                self.account_until(channel, self.channels[index(channel)].bytes, self.last_time_ns);
            self.remember(accounted);
        }
        let digest = |channel: &Channel| text::hex(&channel.sha256.clone().finalize());
        LogTotals {
            stdout_bytes: self.channels[0].bytes,
            stderr_bytes: self.channels[1].bytes,
            stdout_sha256: digest(&self.channels[0]),
            stderr_sha256: digest(&self.channels[1]),
            end_position: self.position,
            // A channel that is not accounted for to its end could not even be marked: the disk was full to the last.
            truncated: self.truncated
                || self.channels.iter().any(|channel| channel.accounted < channel.bytes),
        }
    }

    fn remember(&mut self, outcome: io::Result<()>) {
        if let Err(error) = outcome {
            self.first_error.get_or_insert(error);
        }
    }

    /// Puts one piece where the quota says: into the head while there is room, then into the tail.
    fn keep(&mut self, channel: LogChannel, offset: u64, time_ns: u64, piece: &[u8]) -> io::Result<()> {
        let in_head = match (channel, &self.tail) {
            (LogChannel::Mark, None) => piece.len(),
            _ => usize::try_from(self.head_left).unwrap_or(usize::MAX).min(piece.len()),
        };
        let (head, rest) = piece.split_at(in_head);
        let mut outcome = Ok(());
        if !head.is_empty() {
            if channel != LogChannel::Mark {
                self.head_left -= length_u64(head.len());
            }
            outcome = self.store(channel, offset, time_ns, head);
        }
        if !rest.is_empty() {
            outcome = outcome.and(self.keep_in_tail(channel, offset + length_u64(in_head), time_ns, rest));
        }
        outcome
    }

    /// Writes a record of the main file, and before it, one for what is missing.
    fn store(&mut self, channel: LogChannel, offset: u64, time_ns: u64, data: &[u8]) -> io::Result<()> {
        self.account_until(channel, offset, time_ns)?;
        let header = RecordHeader { length: data.len(), channel, skipped: false, offset, time_ns };
        self.write_record(&header, data)?;
        self.channels[index(channel)].accounted = offset + length_u64(data.len());
        Ok(())
    }

    /// Writes a record for the bytes between what the file accounts for and `offset`, if there are any.
    fn account_until(&mut self, channel: LogChannel, offset: u64, time_ns: u64) -> io::Result<()> {
        let accounted = self.channels[index(channel)].accounted;
        let missing = offset.saturating_sub(accounted);
        if missing == 0 {
            return Ok(());
        }
        let header = RecordHeader { length: 8, channel, skipped: true, offset: accounted, time_ns };
        self.write_record(&header, &missing.to_le_bytes())?;
        self.channels[index(channel)].accounted = offset;
        self.truncated = true;
        Ok(())
    }

    fn write_record(&mut self, header: &RecordHeader, data: &[u8]) -> io::Result<()> {
        // Written at a position rather than behind what is there: after an error the next record overwrites the torn one.
        self.disk.admit(&self.path, RECORD_HEADER_BYTES + data.len())?;
        write_all_at(&self.file, &[&header.encode(data), data], self.position)?;
        self.position += length_u64(RECORD_HEADER_BYTES + data.len());
        Ok(())
    }

    fn keep_in_tail(
        &mut self,
        channel: LogChannel,
        offset: u64,
        time_ns: u64,
        piece: &[u8],
    ) -> io::Result<()> {
        let tail_bytes = usize::try_from(self.quota.tail_bytes).unwrap_or(usize::MAX);
        let is_mark = channel == LogChannel::Mark;
        if tail_bytes == 0 && !is_mark {
            return Ok(());
        }
        // Of a piece longer than the whole tail only its end can survive.
        let cut = if is_mark { 0 } else { piece.len().saturating_sub(tail_bytes) };
        let (mut offset, mut piece) = (offset + length_u64(cut), &piece[cut..]);
        if self.tail.is_none() {
            self.tail =
                Some(Tail { older: None, newer: Segment::create(&*self.disk, tail_path(&self.path, 0))? });
        }
        let tail = self.tail.as_mut().expect("created above");
        while !piece.is_empty() {
            let room = self.quota.tail_bytes.saturating_sub(tail.newer.data_bytes);
            if room == 0 && !is_mark {
                let first = tail_path(&self.path, 0);
                let path = if tail.newer.path == first { tail_path(&self.path, 1) } else { first };
                let next = Segment::create(&*self.disk, path)?;
                let full = std::mem::replace(&mut tail.newer, next);
                if let Some(oldest) = tail.older.replace(full) {
                    self.lost_marks.extend(oldest.marks);
                }
                continue;
            }
            let take = if is_mark {
                piece.len()
            } else {
                usize::try_from(room).unwrap_or(usize::MAX).min(piece.len())
            };
            let (now, rest) = piece.split_at(take);
            self.disk.admit(&tail.newer.path, RECORD_HEADER_BYTES + now.len())?;
            tail.newer.write(channel, offset, time_ns, now)?;
            offset += length_u64(take);
            piece = rest;
        }
        self.lost_marks.truncate(MARKS_COUNT_MAX);
        Ok(())
    }

    /// Moves what the quota allows from the tail files behind the head.
    fn append_tail(&mut self, tail: &Tail) -> io::Result<()> {
        let in_files = tail.older.as_ref().map_or(0, |older| older.data_bytes) + tail.newer.data_bytes;
        let dropped = in_files.saturating_sub(self.quota.tail_bytes);
        // First from where on each channel is kept, so that what is missing is said before the tail begins.
        let mut first_kept: [Option<u64>; 3] = [None; 3];
        let mut lost_marks = std::mem::take(&mut self.lost_marks);
        for_each_kept(tail, dropped, &mut |record, kept| {
            if kept {
                first_kept[index(record.channel)].get_or_insert(record.offset);
            } else if record.channel == LogChannel::Mark {
                let text = String::from_utf8_lossy(&record.data).into_owned();
                lost_marks.push((record.offset, record.read_time_ns, text));
            }
            Ok(())
        })?;
        let time_ns = self.last_time_ns;
        for channel in [LogChannel::Stdout, LogChannel::Stderr] {
            let until = first_kept[index(channel)].unwrap_or(self.channels[index(channel)].bytes);
            self.account_until(channel, until, time_ns)?;
        }
        for (offset, time_ns, text) in lost_marks {
            self.store(LogChannel::Mark, offset, time_ns, text.as_bytes())?;
        }
        for_each_kept(tail, dropped, &mut |record, kept| {
            if kept {
                self.store(record.channel, record.offset, record.read_time_ns, &record.data)?;
            }
            Ok(())
        })
    }
}

fn tail_path(path: &Path, number: u8) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".tail{number}"));
    name.into()
}

impl Segment {
    fn create(disk: &dyn Disk, path: PathBuf) -> io::Result<Self> {
        let file = create(disk, &path)?;
        Ok(Self { path, file, position: length_u64(HEADER.len()), data_bytes: 0, marks: Vec::new() })
    }

    fn write(&mut self, channel: LogChannel, offset: u64, time_ns: u64, data: &[u8]) -> io::Result<()> {
        let header = RecordHeader { length: data.len(), channel, skipped: false, offset, time_ns };
        write_all_at(&self.file, &[&header.encode(data), data], self.position)?;
        self.position += length_u64(RECORD_HEADER_BYTES + data.len());
        if channel == LogChannel::Mark {
            self.marks.push((offset, time_ns, String::from_utf8_lossy(data).into_owned()));
        } else {
            self.data_bytes += length_u64(data.len());
        }
        Ok(())
    }
}

/// Shows every record of the tail files, oldest first: the first `dropped` bytes of output as not kept, the rest as kept. A
/// record that lies across the border is shown in two parts.
fn for_each_kept(
    tail: &Tail,
    mut dropped: u64,
    show: &mut dyn FnMut(LogRecord, bool) -> io::Result<()>,
) -> io::Result<()> {
    for segment in tail.older.iter().chain([&tail.newer]) {
        let reader = SpoolReader { path: segment.path.clone(), file: segment.file.try_clone()? };
        let mut position = 0;
        loop {
            let (records, next) =
                reader.read(position, segment.position, limits::CHUNKS_MESSAGE_BYTES_MAX)?;
            if records.is_empty() {
                break;
            }
            position = next;
            for mut record in records {
                let length = length_u64(record.data.len());
                if record.channel == LogChannel::Mark || dropped == 0 {
                    show(record, dropped == 0)?;
                } else if length <= dropped {
                    dropped -= length;
                    show(record, false)?;
                } else {
                    let cut = usize::try_from(dropped).expect("less than the length of the record");
                    let front = LogRecord { data: record.data.split_to(cut), ..record.clone() };
                    record.offset += dropped;
                    dropped = 0;
                    show(front, false)?;
                    show(record, true)?;
                }
            }
        }
    }
    Ok(())
}
