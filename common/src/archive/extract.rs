//! Takes an archive apart while it arrives.
//!
//! Everything is created under other names than its own, through handles, never through a link, and renamed only when length
//! and digest of the whole are what was announced. Dropping an [`Extractor`] removes what is not in its place. No directory is
//! made to hold the parts meanwhile: on some file systems removing one takes longer than all else for small results.

use std::{
    fmt,
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, mkdirat, openat, renameat_with, statat, symlinkat},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use super::{
    DATA, WHITEBOARD,
    header::{self, BLOCK_BYTES, Entry, Header, Kind, Pax, Refusal},
};
use crate::{limits, text, tree};

/// Why an archive was not taken in. Nothing of it is in place then.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// An entry that is not allowed.
    #[error("the archive is refused: at byte {position}, entry `{entry}`: {refusal}")]
    Refused {
        /// Where its header begins.
        position: u64,
        /// Its name, as far as it could be read.
        entry: String,
        /// What is wrong with it.
        refusal: Refusal,
    },
    /// The system could not do its part.
    #[error("failed to {attempt} `{}`", path.display())]
    System {
        /// What was attempted.
        attempt: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The archive stopped in the middle.
    #[error("the archive ends after {length} bytes, in the middle of an entry")]
    Unfinished {
        /// Bytes that came.
        length: u64,
    },
    /// Another length than was announced.
    #[error("the archive has {length} bytes, but {expected} were announced")]
    Length {
        /// Bytes that came.
        length: u64,
        /// Bytes announced.
        expected: u64,
    },
    /// Another digest than was announced.
    #[error("the archive has the SHA-256 {digest}, but {expected} was announced")]
    Digest {
        /// Digest of what came.
        digest: String,
        /// Digest announced.
        expected: String,
    },
    /// There are results already.
    #[error("`{}` is there already", path.display())]
    Occupied {
        /// What is in the way.
        path: PathBuf,
    },
    /// It was refused before; what came since was not looked at.
    #[error("the archive was refused before")]
    RefusedBefore,
}

/// What was put in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extracted {
    /// Number of entries.
    pub entries: u64,
    /// Whether there is a whiteboard.
    pub whiteboard: bool,
    /// Whether there is a directory `data`.
    pub data: bool,
}

enum State {
    Header { filled: usize },
    Pax { content: Vec<u8>, left: usize },
    PaxPadding { pax: Pax, left: usize },
    File { file: File, left: u64, padding: usize },
    Padding { left: usize },
    EndMark { filled: usize },
    End,
    Refused,
}

/// Takes in an archive in pieces of any size. Its calls block on the disk.
///
/// Dropping it without [`Extractor::finish`] removes everything it has created.
pub struct Extractor {
    target: PathBuf,
    root: OwnedFd,
    /// What `data` and `whiteboard` are called until they are whole.
    partial_data: String,
    partial_whiteboard: String,
    /// Directories from the root to where the last entry was put: entries come directory by directory, so that each
    /// directory is opened once.
    open: Vec<(Vec<u8>, OwnedFd)>,
    state: State,
    block: Box<[u8; BLOCK_BYTES]>,
    pax: Option<Pax>,
    sha256: Sha256,
    length: u64,
    /// Where the header of the entry at hand begins.
    entry_position: u64,
    content_bytes: u64,
    extracted: Extracted,
    finished: bool,
}

const DIRECTORY: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const NEW_FILE: OFlags =
    OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Extractor {
    /// Begins to extract into `target`, an existing directory.
    ///
    /// # Errors
    /// When no directory can be created in it.
    pub fn new(target: impl Into<PathBuf>) -> Result<Self, ExtractError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let target = target.into();
        let root = openat(CWD, &target, DIRECTORY & !OFlags::NOFOLLOW, Mode::empty())
            .map_err(|error| system("open the directory", &target, error))?;
        let (partial_data, partial_whiteboard) = loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = |part| format!(".partial-{}-{number}.{part}", std::process::id());
            let names = (name(DATA), name(WHITEBOARD));
            let is_free = |name: &str| statat(&root, name, AtFlags::SYMLINK_NOFOLLOW).is_err();
            // What is taken was left by a process that had the same number and was killed.
            if is_free(&names.0) && is_free(&names.1) {
                break names;
            }
        };
        Ok(Self {
            target,
            root,
            partial_data,
            partial_whiteboard,
            open: Vec::new(),
            state: State::Header { filled: 0 },
            block: Box::new([0; BLOCK_BYTES]),
            pax: None,
            sha256: Sha256::new(),
            length: 0,
            entry_position: 0,
            content_bytes: 0,
            extracted: Extracted::default(),
            finished: false,
        })
    }

    /// Bytes taken in so far: from where to go on after an interruption.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Takes in the next bytes.
    ///
    /// # Errors
    /// When the archive is refused or the disk is. The extractor takes nothing more then; drop it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ExtractError> {
        self.sha256.update(bytes);
        let mut rest = bytes;
        while !rest.is_empty() {
            // On an error this stays: nothing is looked at after a refusal.
            let state = std::mem::replace(&mut self.state, State::Refused);
            let before = rest.len();
            self.state = self.step(state, &mut rest)?;
            self.length += (before - rest.len()) as u64;
            if self.length > limits::ARCHIVE_BYTES_MAX {
                self.state = State::Refused;
                return Err(self.refused("", Refusal::TooLarge));
            }
        }
        Ok(())
    }

    /// Ends the archive, compares it with what was announced and moves everything to its place.
    ///
    /// # Errors
    /// When it is not complete or not what was announced, or its place is taken. Nothing is in place then.
    pub fn finish(mut self, expected_length: u64, expected_sha256: &str) -> Result<Extracted, ExtractError> {
        match &self.state {
            State::End => {}
            State::Refused => return Err(ExtractError::RefusedBefore),
            State::EndMark { .. } => return Err(self.refused("", Refusal::HalfEnd)),
            _ => return Err(ExtractError::Unfinished { length: self.length }),
        }
        if self.length != expected_length {
            return Err(ExtractError::Length { length: self.length, expected: expected_length });
        }
        let digest = text::hex(&self.sha256.clone().finalize());
        if digest != expected_sha256 {
            return Err(ExtractError::Digest { digest, expected: expected_sha256.to_owned() });
        }
        self.move_in_place()?;
        self.finished = true;
        Ok(self.extracted)
    }

    fn move_in_place(&self) -> Result<(), ExtractError> {
        let parts = [
            (&self.partial_data, DATA, self.extracted.data),
            (&self.partial_whiteboard, WHITEBOARD, self.extracted.whiteboard),
        ];
        let mut moved: Vec<(&str, &str)> = Vec::new();
        for (partial, name, is_there) in parts {
            if !is_there {
                continue;
            }
            if let Err(error) = renameat_with(&self.root, partial, &self.root, name, RenameFlags::NOREPLACE) {
                for (partial, name) in moved {
                    // Back again: either all of it is in place or nothing.
                    renameat_with(&self.root, name, &self.root, partial, RenameFlags::NOREPLACE).ok();
                }
                let path = self.target.join(name);
                return Err(match error {
                    Errno::EXIST => ExtractError::Occupied { path },
                    error => system("move results to", &path, error),
                });
            }
            moved.push((partial, name));
        }
        Ok(())
    }

    /// The name under which something directly in the archive is created.
    fn partial<'a>(&'a self, name: &'a [u8]) -> &'a [u8] {
        match name {
            name if name == DATA.as_bytes() => self.partial_data.as_bytes(),
            name if name == WHITEBOARD.as_bytes() => self.partial_whiteboard.as_bytes(),
            other => other,
        }
    }

    /// Takes as much of `rest` as belongs to the state.
    fn step(&mut self, state: State, rest: &mut &[u8]) -> Result<State, ExtractError> {
        match state {
            State::Header { filled: 0 } if rest.len() >= BLOCK_BYTES => {
                self.block.copy_from_slice(take(rest, BLOCK_BYTES));
                self.header(0)
            }
            State::Header { filled } => {
                let piece = take(rest, BLOCK_BYTES - filled);
                self.block[filled..filled + piece.len()].copy_from_slice(piece);
                match filled + piece.len() {
                    BLOCK_BYTES => self.header(filled),
                    filled => Ok(State::Header { filled }),
                }
            }
            State::Pax { mut content, left } => {
                let piece = take(rest, left);
                content.extend_from_slice(piece);
                let left = left - piece.len();
                if left > 0 {
                    return Ok(State::Pax { content, left });
                }
                let pax = header::decode_pax(&content).map_err(|refusal| self.refused("", refusal))?;
                Ok(self.after_pax(pax, header::padding(content.len() as u64)))
            }
            State::PaxPadding { pax, left } => {
                let left = self.padding(rest, left)?;
                Ok(self.after_pax(pax, left))
            }
            State::File { mut file, left, padding } => {
                let piece = take(rest, usize::try_from(left).unwrap_or(usize::MAX));
                file.write_all(piece).map_err(|source| ExtractError::System {
                    attempt: "write results in",
                    path: self.target.clone(),
                    source,
                })?;
                match left - piece.len() as u64 {
                    0 if padding == 0 => Ok(State::Header { filled: 0 }),
                    0 => Ok(State::Padding { left: padding }),
                    left => Ok(State::File { file, left, padding }),
                }
            }
            State::Padding { left } => match self.padding(rest, left)? {
                0 => Ok(State::Header { filled: 0 }),
                left => Ok(State::Padding { left }),
            },
            State::EndMark { filled } => {
                let piece = take(rest, BLOCK_BYTES - filled);
                if piece.iter().any(|&byte| byte != 0) {
                    return Err(self.refused("", Refusal::HalfEnd));
                }
                match filled + piece.len() {
                    BLOCK_BYTES => Ok(State::End),
                    filled => Ok(State::EndMark { filled }),
                }
            }
            State::End => Err(self.refused("", Refusal::Trailing)),
            State::Refused => Err(ExtractError::RefusedBefore),
        }
    }

    fn after_pax(&mut self, pax: Pax, padding: usize) -> State {
        if padding > 0 {
            return State::PaxPadding { pax, left: padding };
        }
        self.pax = Some(pax);
        State::Header { filled: 0 }
    }

    fn padding(&self, rest: &mut &[u8], left: usize) -> Result<usize, ExtractError> {
        let piece = take(rest, left);
        if piece.iter().any(|&byte| byte != 0) {
            return Err(self.refused("", Refusal::Padding));
        }
        Ok(left - piece.len())
    }

    /// A header is complete; `filled` of its bytes came before this piece.
    fn header(&mut self, filled: usize) -> Result<State, ExtractError> {
        self.entry_position = self.length - filled as u64;
        if self.block.iter().all(|&byte| byte == 0) {
            return match self.pax {
                None => Ok(State::EndMark { filled: 0 }),
                Some(_) => Err(self.refused("", Refusal::PaxAlone)),
            };
        }
        let shown = || header::shown_name(&self.block);
        match header::decode(&self.block, self.pax.take())
            .map_err(|refusal| self.refused(&shown(), refusal))?
        {
            Header::Pax(size) => {
                let left = usize::try_from(size).expect("a few KiB");
                Ok(State::Pax { content: Vec::with_capacity(left), left })
            }
            Header::Entry(entry) => self.entry(entry),
        }
    }

    fn entry(&mut self, entry: Entry) -> Result<State, ExtractError> {
        let shown = text::printable(&entry.path, limits::PATH_COMPONENT_BYTES_MAX);
        let refused = |this: &Self, refusal| this.refused(&shown, refusal);
        self.extracted.entries += 1;
        if self.extracted.entries > limits::ARCHIVE_ENTRIES_COUNT_MAX {
            return Err(refused(self, Refusal::TooMany));
        }
        let components = header::components(&entry.path).map_err(|refusal| refused(self, refusal))?;
        self.check_place(&components, &entry).map_err(|refusal| refused(self, refusal))?;
        self.content_bytes = self.content_bytes.saturating_add(entry.size);
        if self.content_bytes > limits::ARCHIVE_BYTES_MAX {
            return Err(refused(self, Refusal::TooLarge));
        }
        let (name, parents) = components.split_last().expect("a name has a component");
        if let Err(refusal) = self.open_parents(parents)? {
            return Err(refused(self, refusal));
        }
        let made = match self.open.last() {
            None => create(self.root.as_fd(), self.partial(name), &entry),
            Some((_, parent)) => create(parent.as_fd(), name, &entry),
        };
        match made {
            Ok(None) => Ok(State::Header { filled: 0 }),
            Ok(Some(file)) => {
                let padding = header::padding(entry.size);
                Ok(State::File { file: File::from(file), left: entry.size, padding })
            }
            Err(Errno::EXIST) => Err(refused(self, Refusal::Twice)),
            Err(error) => {
                Err(system("create", &self.target.join(std::ffi::OsStr::from_bytes(&entry.path)), error))
            }
        }
    }

    /// Results are a file `whiteboard` and a directory `data`; links stay inside the latter.
    fn check_place(&mut self, components: &[&[u8]], entry: &Entry) -> Result<(), Refusal> {
        let is_root = components.len() == 1;
        if components[0] == DATA.as_bytes() {
            if is_root && entry.kind != Kind::Directory {
                return Err(Refusal::WrongRoot);
            }
            if entry.kind == Kind::Symlink && !header::link_stays_inside(components.len() - 2, &entry.link) {
                return Err(Refusal::LinkLeaves);
            }
            self.extracted.data = true;
        } else if is_root && components[0] == WHITEBOARD.as_bytes() {
            if !matches!(entry.kind, Kind::File { .. }) || entry.size > limits::WHITEBOARD_BYTES_MAX {
                return Err(Refusal::WrongRoot);
            }
            self.extracted.whiteboard = true;
        } else {
            return Err(Refusal::Place);
        }
        Ok(())
    }

    /// Opens the directories on the way to an entry, component by component, beginning where the last entry was put.
    fn open_parents(&mut self, parents: &[&[u8]]) -> Result<Result<(), Refusal>, ExtractError> {
        let common = self.open.iter().zip(parents).take_while(|((name, _), parent)| name == *parent).count();
        self.open.truncate(common);
        for &parent in &parents[common..] {
            let opened = match self.open.last() {
                None => openat(&self.root, self.partial(parent), DIRECTORY, Mode::empty()),
                Some((_, above)) => openat(above, parent, DIRECTORY, Mode::empty()),
            };
            match opened {
                Ok(directory) => self.open.push((parent.to_vec(), directory)),
                Err(Errno::NOENT) => return Ok(Err(Refusal::NoDirectory)),
                Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Err(Refusal::NotDirectory)),
                Err(error) => return Err(system("open a directory of results in", &self.target, error)),
            }
        }
        Ok(Ok(()))
    }

    fn refused(&self, entry: &str, refusal: Refusal) -> ExtractError {
        ExtractError::Refused { position: self.entry_position, entry: entry.to_owned(), refusal }
    }
}

impl fmt::Debug for Extractor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extractor")
            .field("target", &self.target)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

impl Drop for Extractor {
    fn drop(&mut self) {
        if !self.finished {
            self.open.clear();
            self.state = State::Refused;
            for partial in [&self.partial_data, &self.partial_whiteboard] {
                if let Err(error) = tree::remove_tree(&self.target.join(partial)) {
                    tracing::warn!(%error, "a refused archive leaves files behind");
                }
            }
        }
    }
}

/// Creates an entry; returns the file whose content follows.
fn create(parent: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> rustix::io::Result<Option<OwnedFd>> {
    match entry.kind {
        Kind::Directory => mkdirat(parent, name, Mode::from_raw_mode(0o755)).map(|()| None),
        Kind::Symlink => symlinkat(&*entry.link, parent, name).map(|()| None),
        Kind::File { executable } => {
            let mode = Mode::from_raw_mode(if executable { 0o755 } else { 0o644 });
            let file = openat(parent, name, NEW_FILE, mode)?;
            Ok((entry.size > 0).then_some(file))
        }
    }
}

fn take<'a>(rest: &mut &'a [u8], limit: usize) -> &'a [u8] {
    let (piece, behind) = rest.split_at(limit.min(rest.len()));
    *rest = behind;
    piece
}

fn system(attempt: &'static str, path: &Path, error: Errno) -> ExtractError {
    ExtractError::System { attempt, path: path.to_owned(), source: error.into() }
}
