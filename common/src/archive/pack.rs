//! Packs what a task left into an archive.
//!
//! Whoever filled the directory may have been hostile: nothing is opened that is not a regular file or a directory, no link
//! is followed and no mount is entered. Entries come in the order of their names, so the same results are the same bytes.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2, readlinkat,
        statat,
    },
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use super::{
    DATA, WHITEBOARD,
    header::{self, BLOCK_BYTES, Entry, Kind},
};
use crate::{limits, outcome::ArchiveInfo, text};

/// A finished archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Its length and digest, and its bytes when they are few.
    pub info: ArchiveInfo,
    /// What was left out or altered, with the reason: at most 64 lines, the last of which counts what is not named.
    pub skipped: Vec<String>,
}

/// Why results could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The results could not be read.
    #[error("failed to read results in `{}`", path.display())]
    Read {
        /// What was being read.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The archive could not be written.
    #[error("failed to write the archive `{}`", path.display())]
    Write {
        /// The archive.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Bytes that are gathered before they are digested and written: as many as a log has in one piece.
const BUFFER_BYTES: usize = limits::CHUNK_BYTES;

/// Packs the output directory and the whiteboard of a task into `target`, which must not exist. None when nothing was left;
/// then nothing is created. A file that shrinks meanwhile is filled with zeros, one that grows is cut: both are named.
///
/// # Errors
/// When the directory cannot be read at all, or the archive cannot be written. What was written is removed then.
pub fn pack(output_dir: &Path, whiteboard: &Path, target: &Path) -> Result<Option<Packed>, PackError> {
    let mut skipped = Skipped::default();
    let output = open_output(output_dir, &mut skipped)?;
    let whiteboard = open_whiteboard(whiteboard, &mut skipped);
    let entries = match &output {
        Some(directory) => list(directory, output_dir)?,
        None => Vec::new(),
    };
    if entries.is_empty() && whiteboard.is_none() && skipped.lines.is_empty() {
        return Ok(None);
    }
    let write_error = |source| PackError::Write { path: target.to_owned(), source };
    let mut packer =
        Packer { sink: Sink::create(target).map_err(write_error)?, skipped, entries: 0, openat2: true };
    let written = packer.write(output.as_ref(), &entries, whiteboard);
    match written.and_then(|()| packer.sink.finish()) {
        Ok(info) => Ok(Some(Packed { info, skipped: packer.skipped.finish() })),
        Err(source) => {
            // The error that stopped the packing is the one to tell; a rest of it goes with the task's directory.
            std::fs::remove_file(target).ok();
            Err(write_error(source))
        }
    }
}

/// What was left out, for people.
#[derive(Debug, Default)]
struct Skipped {
    lines: Vec<String>,
    unnamed: usize,
}

impl Skipped {
    fn add(&mut self, path: &[u8], reason: &str) {
        if self.lines.len() < limits::SKIPPED_COUNT_MAX {
            let shown = text::printable(path, limits::PATH_COMPONENT_BYTES_MAX);
            self.lines.push(format!("{shown}: {reason}"));
        } else {
            self.unnamed += 1;
        }
    }

    fn finish(mut self) -> Vec<String> {
        if self.unnamed > 0
            && let Some(last) = self.lines.last_mut()
        {
            *last = format!("and {} more", self.unnamed + 1);
        }
        self.lines
    }
}

const READ_FILE: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);
const READ_DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn open_output(path: &Path, skipped: &mut Skipped) -> Result<Option<OwnedFd>, PackError> {
    match openat(CWD, path, READ_DIRECTORY, Mode::empty()) {
        Ok(directory) => Ok(Some(directory)),
        // The block removed it: its right.
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::NOTDIR | Errno::LOOP) => {
            skipped.add(DATA.as_bytes(), "the output directory was replaced by something else");
            Ok(None)
        }
        Err(error) => Err(PackError::Read { path: path.to_owned(), source: error.into() }),
    }
}

fn open_whiteboard(path: &Path, skipped: &mut Skipped) -> Option<(OwnedFd, u64)> {
    // By its type first: opening a device can have effects.
    let stat = match statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return None,
        Err(error) => {
            skipped.add(WHITEBOARD.as_bytes(), &format!("not readable ({})", io::Error::from(error)));
            return None;
        }
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        skipped.add(WHITEBOARD.as_bytes(), "not a regular file");
        return None;
    }
    let size = size_of(&stat);
    match openat(CWD, path, READ_FILE, Mode::empty()) {
        Ok(_) if size == 0 => None,
        Ok(file) => {
            if size > limits::WHITEBOARD_BYTES_MAX {
                skipped.add(WHITEBOARD.as_bytes(), "cut at 1 MiB");
            }
            Some((file, size.min(limits::WHITEBOARD_BYTES_MAX)))
        }
        Err(error) => {
            skipped.add(WHITEBOARD.as_bytes(), &format!("not readable ({})", io::Error::from(error)));
            None
        }
    }
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// Names and types of a directory, in the order of the names.
fn list(directory: &OwnedFd, path: &Path) -> Result<Vec<(CString, FileType)>, PackError> {
    list_entries(directory.as_fd())
        .map_err(|error| PackError::Read { path: path.to_owned(), source: error.into() })
}

fn list_entries(directory: BorrowedFd<'_>) -> rustix::io::Result<Vec<(CString, FileType)>> {
    let mut entries = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            entries.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(entries)
}

struct Packer {
    sink: Sink,
    skipped: Skipped,
    entries: u64,
    /// Whether the kernel has `openat2`, which sees every mount; without it only those of another device are seen.
    openat2: bool,
}

impl Packer {
    fn write(
        &mut self,
        output: Option<&OwnedFd>,
        entries: &[(CString, FileType)],
        whiteboard: Option<(OwnedFd, u64)>,
    ) -> io::Result<()> {
        if let Some((file, size)) = whiteboard {
            self.file(WHITEBOARD.as_bytes(), &file, size, false)?;
        }
        if !entries.is_empty()
            && let Some(output) = output
        {
            self.entry(DATA.as_bytes(), Kind::Directory, 0, b"")?;
            let device = fstat(output)?.st_dev;
            let mut path = DATA.as_bytes().to_vec();
            self.directory(output, entries, &mut path, 1, device)?;
        }
        Ok(())
    }

    /// Packs the entries of a directory. Calls itself at most 64 deep.
    fn directory(
        &mut self,
        directory: &OwnedFd,
        entries: &[(CString, FileType)],
        path: &mut Vec<u8>,
        depth: usize,
        device: u64,
    ) -> io::Result<()> {
        let length = path.len();
        for (name, file_type) in entries {
            path.truncate(length);
            path.push(b'/');
            path.extend_from_slice(name.to_bytes());
            if let Err(reason) = self.within_bounds(path, depth) {
                self.skipped.add(path, reason);
                continue;
            }
            let file_type = match file_type {
                FileType::Unknown => match statat(directory, &**name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                    Err(_) => FileType::Unknown,
                },
                known => *known,
            };
            match file_type {
                FileType::RegularFile => match self.open(directory.as_fd(), name, READ_FILE, device) {
                    Ok((file, stat)) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                        let size = size_of(&stat);
                        if size > limits::ARCHIVE_BYTES_MAX.saturating_sub(self.sink.length()) {
                            self.skipped.add(path, "the archive would be larger than 64 GiB");
                        } else {
                            self.file(path, &file, size, stat.st_mode & 0o111 != 0)?;
                        }
                    }
                    Ok(_) => self.skipped.add(path, "replaced while it was packed"),
                    Err(error) => self.unreadable(path, error),
                },
                FileType::Directory => match self.open(directory.as_fd(), name, READ_DIRECTORY, device) {
                    Ok((inner, _)) => match list_entries(inner.as_fd()) {
                        Ok(entries) => {
                            self.entry(path, Kind::Directory, 0, b"")?;
                            self.directory(&inner, &entries, path, depth + 1, device)?;
                        }
                        Err(error) => self.unreadable(path, error),
                    },
                    Err(error) => self.unreadable(path, error),
                },
                FileType::Symlink => match readlinkat(directory, &**name, Vec::new()) {
                    Ok(target) if header::link_stays_inside(depth - 1, target.to_bytes()) => {
                        self.entry(path, Kind::Symlink, 0, target.to_bytes())?;
                    }
                    Ok(target) => {
                        let target = text::printable(target.to_bytes(), limits::PATH_COMPONENT_BYTES_MAX);
                        self.skipped.add(path, &format!("a link that leaves the directory (to {target})"));
                    }
                    Err(error) => self.unreadable(path, error),
                },
                FileType::Fifo => self.skipped.add(path, "a fifo"),
                FileType::Socket => self.skipped.add(path, "a socket"),
                FileType::CharacterDevice | FileType::BlockDevice => self.skipped.add(path, "a device"),
                FileType::Unknown => self.skipped.add(path, "of no known type"),
            }
        }
        path.truncate(length);
        Ok(())
    }

    fn within_bounds(&self, path: &[u8], depth: usize) -> Result<(), &'static str> {
        if self.entries >= limits::ARCHIVE_ENTRIES_COUNT_MAX {
            return Err("more than 1,000,000 entries");
        }
        if depth >= limits::PATH_DEPTH_MAX {
            return Err("deeper than 64 directories");
        }
        if path.len() > limits::PATH_BYTES_MAX {
            return Err("its path is longer than 4,096 bytes");
        }
        Ok(())
    }

    fn open(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &CStr,
        flags: OFlags,
        device: u64,
    ) -> rustix::io::Result<(OwnedFd, Stat)> {
        if self.openat2 {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
            match openat2(directory, name, flags, Mode::empty(), resolve) {
                Err(Errno::NOSYS | Errno::PERM) => self.openat2 = false,
                opened => {
                    let opened = opened?;
                    let stat = fstat(&opened)?;
                    return Ok((opened, stat));
                }
            }
        }
        let opened = openat(directory, name, flags, Mode::empty())?;
        let stat = fstat(&opened)?;
        if stat.st_dev == device { Ok((opened, stat)) } else { Err(Errno::XDEV) }
    }

    fn unreadable(&mut self, path: &[u8], error: Errno) {
        match error {
            Errno::XDEV => self.skipped.add(path, "on another file system"),
            Errno::NOENT | Errno::LOOP | Errno::NOTDIR => {
                self.skipped.add(path, "replaced while it was packed")
            }
            error => self.skipped.add(path, &format!("not readable ({})", io::Error::from(error))),
        }
    }

    fn entry(&mut self, path: &[u8], kind: Kind, size: u64, link: &[u8]) -> io::Result<()> {
        self.entries += 1;
        self.sink.entry(&Entry { path: path.to_vec(), kind, size, link: link.to_vec() })
    }

    fn file(&mut self, path: &[u8], file: &OwnedFd, size: u64, executable: bool) -> io::Result<()> {
        self.entry(path, Kind::File { executable }, size, b"")?;
        match self.sink.content(file, size)? {
            Content::Whole => {}
            Content::Shrank(missing) => {
                self.skipped
                    .add(path, &format!("it shrank while it was packed: the last {missing} bytes are zeros"));
            }
            Content::Grew => {
                if path != WHITEBOARD.as_bytes() {
                    self.skipped.add(path, "it grew while it was packed: cut at its former length");
                }
            }
            Content::Failed(missing, error) => {
                let reason = format!("reading failed ({error}): the last {missing} bytes are zeros");
                self.skipped.add(path, &reason);
            }
        }
        Ok(())
    }
}

/// What became of a file while it was read.
enum Content {
    Whole,
    Shrank(u64),
    Grew,
    Failed(u64, io::Error),
}

/// The archive: gathers, digests and writes.
struct Sink {
    file: File,
    sha256: Sha256,
    written: u64,
    buffer: Vec<u8>,
}

impl Sink {
    fn create(target: &Path) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
        Ok(Self { file, sha256: Sha256::new(), written: 0, buffer: Vec::with_capacity(BUFFER_BYTES) })
    }

    fn length(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sha256.update(&self.buffer);
        self.file.write_all(&self.buffer)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Flushes when the buffer is full; returns how much fits into it.
    fn make_room(&mut self) -> io::Result<usize> {
        if self.buffer.len() == self.buffer.capacity() {
            self.flush()?;
        }
        Ok(self.buffer.capacity() - self.buffer.len())
    }

    fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        // A header with two long PAX values is the largest thing that is put into the buffer at once.
        if self.buffer.len() + 4 * limits::PATH_BYTES_MAX > BUFFER_BYTES {
            self.flush()?;
        }
        header::encode(entry, &mut self.buffer);
        Ok(())
    }

    fn zeros(&mut self, mut count: u64) -> io::Result<()> {
        while count > 0 {
            let room = self.make_room()?;
            let now = usize::try_from(count).unwrap_or(usize::MAX).min(room);
            self.buffer.resize(self.buffer.len() + now, 0);
            count -= now as u64;
        }
        Ok(())
    }

    /// Reads exactly `size` bytes of a file straight into the buffer.
    fn content(&mut self, file: &OwnedFd, size: u64) -> io::Result<Content> {
        let mut left = size;
        let mut outcome = Content::Whole;
        while left > 0 {
            self.make_room()?;
            let before = self.buffer.len();
            match rustix::io::read(file, rustix::buffer::spare_capacity(&mut self.buffer)) {
                Ok(0) => {
                    outcome = Content::Shrank(left);
                    break;
                }
                Ok(count) => {
                    let count = count as u64;
                    if count > left {
                        let kept = usize::try_from(left).expect("less than what was read");
                        self.buffer.truncate(before + kept);
                        outcome = Content::Grew;
                    }
                    left = left.saturating_sub(count);
                }
                Err(Errno::INTR) => {}
                Err(error) => {
                    outcome = Content::Failed(left, error.into());
                    break;
                }
            }
        }
        self.zeros(left + header::padding(size) as u64)?;
        Ok(outcome)
    }

    fn finish(&mut self) -> io::Result<ArchiveInfo> {
        self.zeros(2 * BLOCK_BYTES as u64)?;
        let fits = self.length() <= limits::ARCHIVE_INLINE_BYTES_MAX;
        let inline =
            if fits && self.written == 0 { Bytes::copy_from_slice(&self.buffer) } else { Bytes::new() };
        self.flush()?;
        let sha256 = text::hex(&self.sha256.clone().finalize());
        Ok(ArchiveInfo { size_bytes: self.written, sha256, inline })
    }
}
