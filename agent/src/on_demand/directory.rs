//! The private directory of an agent on demand, and the lock that settles who may do something there.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use rustix::fs::FlockOperation;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Sockets below it would have too long a path.
    #[error("the path `{}` is longer than {most} bytes", path.display())]
    TooLong {
        /// The directory.
        path: PathBuf,
        /// The most that fits.
        most: usize,
    },
    /// It cannot be made or opened.
    #[error("failed to make the private directory `{}`: {}", path.display(), millstream_common::tls::reason(source))]
    Make {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else made it, or can reach into it.
    #[error("`{}` is there already and belongs to another user, or others can write to it: remove it", path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
    },
    /// Another process holds it and does nothing.
    #[error("`{}` is held by another process that starts an agent there and does not finish", path.display())]
    Held {
        /// The directory.
        path: PathBuf,
    },
}

/// A directory that this user alone can read and write. Blocks of other users, which root may run, pass through it.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
}

impl Directory {
    /// Makes the directory, unless it is there.
    pub(super) fn make(path: &Path) -> Result<Self, DirectoryError> {
        let mode = if rustix::process::geteuid().is_root() { 0o711 } else { 0o700 };
        match DirBuilder::new().mode(mode).create(path) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(DirectoryError::Make { path: path.to_owned(), source })
            }
            _ => Self::open(path),
        }
    }

    /// Opens a directory that is there, and makes sure that nobody else has a say in it.
    pub(super) fn open(path: &Path) -> Result<Self, DirectoryError> {
        let failed = |source| DirectoryError::Make { path: path.to_owned(), source };
        // What is opened is what is judged: no link is followed, and nothing can take its place in between.
        let opened =
            fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path);
        let handle = match opened {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP | libc::EACCES)) =>
            {
                return Err(DirectoryError::NotPrivate { path: path.to_owned() });
            }
            other => other.map_err(failed)?,
        };
        let found = handle.metadata().map_err(failed)?;
        let is_mine = found.uid() == rustix::process::geteuid().as_raw();
        if !is_mine || found.permissions().mode() & 0o066 != 0 {
            return Err(DirectoryError::NotPrivate { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned(), handle })
    }

    /// Waits until nobody else holds the directory, and holds it until this is dropped.
    pub(super) fn hold(self, most: Duration) -> Result<Self, DirectoryError> {
        let failed = |source| DirectoryError::Make { path: self.path.clone(), source };
        let handle = self.handle.try_clone().map_err(failed)?;
        // The kernel waits without a bound; the thread does, too, and is left behind when that takes too long.
        let (held, holding) = mpsc::sync_channel(1);
        thread::spawn(move || {
            let locked = rustix::fs::flock(&handle, FlockOperation::LockExclusive);
            // As long as this copy of it were open, nobody else could hold the directory.
            drop(handle);
            let _given_up: Result<(), _> = held.send(locked);
        });
        match holding.recv_timeout(most) {
            Ok(locked) => locked.map_err(|error| failed(error.into()))?,
            Err(_) => return Err(DirectoryError::Held { path: self.path }),
        }
        Ok(self)
    }

    /// Holds the directory if nobody else does.
    pub(super) fn try_hold(&self) -> bool {
        rustix::fs::flock(&self.handle, FlockOperation::NonBlockingLockExclusive).is_ok()
    }

    /// Lets others hold it.
    pub(super) fn let_go(&self) {
        // There is nothing that an unlock could fail of but a wrong descriptor.
        let _unlocked = rustix::fs::flock(&self.handle, FlockOperation::Unlock);
    }

    /// Whether its path still leads to it.
    pub(super) fn is_current(&self) -> bool {
        let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        matches!((self.handle.metadata(), fs::symlink_metadata(&self.path)), (Ok(a), Ok(b)) if same(&a, &b))
    }
}

/// A file that only this user can read, to append to.
pub(super) fn private_file(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Reads to the end of a pipe, or as much as there may be.
pub(super) fn read_within(
    pipe: impl Read + Send + 'static,
    bytes_max: u64,
    most: Duration,
) -> io::Result<Vec<u8>> {
    let (read, reading) = mpsc::sync_channel(1);
    thread::spawn(move || {
        let mut said = Vec::new();
        let end = pipe.take(bytes_max).read_to_end(&mut said);
        let _given_up: Result<(), _> = read.send(end.map(|_| said));
    });
    reading.recv_timeout(most).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_made_or_can_reach_into_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        Directory::make(&path).unwrap();
        for mode in [0o720, 0o704, 0o777] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = Directory::make(&path).unwrap_err();
            assert!(matches!(error, DirectoryError::NotPrivate { .. }), "{mode:o}: {error}");
        }
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(parent.path(), &link).unwrap();
        assert!(matches!(Directory::make(&link), Err(DirectoryError::NotPrivate { .. })));
        let file = parent.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(Directory::make(&file), Err(DirectoryError::NotPrivate { .. })));
    }

    #[test]
    fn one_holds_it_and_learns_when_it_was_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let held = Directory::make(&path).unwrap().hold(Duration::from_secs(20)).unwrap();
        let other = Directory::make(&path).unwrap();
        assert!(!other.try_hold());
        fs::remove_dir(&path).unwrap();
        drop(held);
        assert!(other.try_hold() && !other.is_current());
        assert!(Directory::make(&path).unwrap().is_current());
    }
}
