//! Files shipped by controllers, kept by their digest and shared by all tasks of a host.
//!
//! A blob is stored under its BLAKE3 digest, only after its content was checked, and never changed afterwards. Executables
//! are hard-linked into the directories of tasks, so that a large test binary costs nothing to place; everything else is
//! copied. A block that may write to anything could write into the store through such a link: blobs carry a fixed time of
//! modification, and one that has another is no longer one. Knows neither tasks nor sessions.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use millstream_common::{limits, spec::BlobDigest};
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
        Uid, linkat, openat, renameat, statat, unlinkat, utimensat,
    },
    io::Errno,
};

/// Why a blob could not be stored or used.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// It is not in the store.
    #[error("blob {digest} is not on this host: upload it and start the task again")]
    Missing {
        /// The blob.
        digest: BlobDigest,
    },
    /// More bytes were announced than a blob may have.
    #[error("blob {digest} has {size_bytes} bytes: at most {} are allowed", limits::BLOB_BYTES_MAX)]
    TooLarge {
        /// The blob.
        digest: BlobDigest,
        /// Bytes announced.
        size_bytes: u64,
    },
    /// It does not fit beside the blobs that sessions need.
    #[error(
        "blob {digest} of {size_bytes} bytes does not fit: {used_bytes} of {limit_bytes} bytes are taken by files that open \
         sessions need; end sessions on this host, then send it again"
    )]
    NoRoom {
        /// The blob.
        digest: BlobDigest,
        /// Bytes announced.
        size_bytes: u64,
        /// Bytes that are taken.
        used_bytes: u64,
        /// Bytes that all blobs may have together.
        limit_bytes: u64,
    },
    /// What arrived has another length.
    #[error("blob {digest} arrived with {arrived} bytes, but {announced} were announced: send it again")]
    Length {
        /// The blob.
        digest: BlobDigest,
        /// Bytes that arrived, as far as they were looked at.
        arrived: u64,
        /// Bytes announced.
        announced: u64,
    },
    /// What arrived has another digest.
    #[error("blob {digest} arrived with the digest {arrived}: send it again")]
    Digest {
        /// The blob.
        digest: BlobDigest,
        /// Digest of what arrived.
        arrived: BlobDigest,
    },
    /// The store's directory cannot be used.
    #[error("failed to use the blob store `{}`: check that the agent may write there and that there is space", path.display())]
    Store {
        /// The directory, or a file in it.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It could not be put into a task's directory.
    #[error("failed to put blob {digest} in place")]
    Place {
        /// The blob.
        digest: BlobDigest,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Who owns what is put in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Number of the user.
    pub uid: u32,
    /// Number of the user's group.
    pub gid: u32,
}

impl Owner {
    pub(crate) fn ids(self) -> (Option<Uid>, Option<Gid>) {
        (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))
    }
}

/// The store. Clones share it.
#[derive(Debug, Clone)]
pub struct Blobs {
    path: Arc<Path>,
    directory: Arc<OwnedFd>,
}

/// What an eviction removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Evicted {
    /// Number of blobs removed.
    pub count: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of what is still there.
    pub kept_bytes: u64,
}

/// One second after the epoch: no file that was written to has it.
const UNTOUCHED: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Prefix of files that are still arriving.
const ARRIVING: &str = ".arriving-";

impl Blobs {
    /// Opens the store, and makes its directory when it is not there.
    ///
    /// # Errors
    /// When the directory can neither be opened nor be made.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, BlobError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let path = path.into();
        let failed = |source| BlobError::Store { path: path.clone(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, &path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        Ok(Self { path: path.into(), directory: Arc::new(directory) })
    }

    /// Whether a blob is there, whole and as it was stored.
    #[must_use]
    pub fn contains(&self, digest: &BlobDigest) -> bool {
        statat(&*self.directory, digest.to_string(), AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| is_untouched(&stat))
    }

    /// Which of these blobs are not there, in the same order. Those that are there count as used now.
    #[must_use]
    pub fn missing(&self, digests: &[BlobDigest]) -> Vec<BlobDigest> {
        digests.iter().filter(|digest| !self.contains(digest) || !self.touch(digest)).copied().collect()
    }

    fn touch(&self, digest: &BlobDigest) -> bool {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        };
        utimensat(&*self.directory, digest.to_string(), &times, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Begins to store a blob of `size_bytes`.
    ///
    /// # Errors
    /// When it is too large, or no file can be made.
    pub fn begin(&self, digest: BlobDigest, size_bytes: u64) -> Result<ArrivingBlob, BlobError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        if size_bytes > limits::BLOB_BYTES_MAX {
            return Err(BlobError::TooLarge { digest, size_bytes });
        }
        let name = format!("{ARRIVING}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        // A file of that name was left by a process that had the same number and was killed.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&*self.directory, &name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| BlobError::Store { path: self.path.join(&name), source: error.into() })?;
        Ok(ArrivingBlob {
            blobs: self.clone(),
            name,
            file: file.into(),
            digest,
            size_bytes,
            arrived: 0,
            hasher: blake3::Hasher::new(),
            stored: false,
        })
    }

    /// Puts a blob under `name` into the directory `into`: an executable as a hard link of mode 0555 where that is possible,
    /// everything else as a copy with this mode and owner.
    ///
    /// # Errors
    /// When the blob is not there any more, the name is taken, or the disk is full.
    pub fn place(
        &self,
        digest: &BlobDigest,
        into: BorrowedFd<'_>,
        name: &OsStr,
        mode: u32,
        owner: Option<Owner>,
    ) -> Result<(), BlobError> {
        let digest = *digest;
        let failed = |source: io::Error| BlobError::Place { digest, source };
        let stored = digest.to_string();
        match statat(&*self.directory, &stored, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if is_untouched(&stat) => {}
            Ok(_) => {
                // It was written to, so it must neither be used nor be in the way of a good one.
                unlinkat(&*self.directory, &stored, AtFlags::empty())
                    .map_err(|error| failed(error.into()))?;
                return Err(BlobError::Missing { digest });
            }
            Err(Errno::NOENT) => return Err(BlobError::Missing { digest }),
            Err(error) => return Err(failed(error.into())),
        }
        self.touch(&digest);
        if mode & 0o111 != 0 {
            match linkat(&*self.directory, &stored, into, name, AtFlags::empty()) {
                Ok(()) => return Ok(()),
                // Another file system, too many links, or links that are forbidden: a copy serves.
                Err(Errno::XDEV | Errno::MLINK | Errno::PERM | Errno::NOTSUP) => {}
                Err(Errno::NOENT) => return Err(BlobError::Missing { digest }),
                Err(error) => return Err(failed(error.into())),
            }
        }
        let source = match openat(&*self.directory, &stored, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        {
            Ok(source) => source,
            Err(Errno::NOENT) => return Err(BlobError::Missing { digest }),
            Err(error) => return Err(failed(error.into())),
        };
        // The kernel copies by itself, and on some file systems shares the blocks instead.
        create_file(into, name, mode, owner)
            .and_then(|mut copy| io::copy(&mut File::from(source), &mut copy))
            .map_err(failed)?;
        Ok(())
    }

    /// Removes what is still arriving: for an agent that starts, when nothing can be.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn remove_unfinished(&self) -> Result<(), BlobError> {
        let failed = |error: Errno| BlobError::Store { path: self.path.to_path_buf(), source: error.into() };
        for entry in Dir::read_from(&*self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_bytes().starts_with(ARRIVING.as_bytes()) {
                match unlinkat(&*self.directory, entry.file_name(), AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        Ok(())
    }

    /// Removes blobs that were not used for [`limits::BLOB_AGE_MAX`], then the least recently used ones until at most
    /// `limit_bytes` are left; never one that is held. `now_ns` is the wall clock, which the file system stamps with. What
    /// tasks have is not touched.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn evict(
        &self,
        limit_bytes: u64,
        now_ns: u64,
        is_held: impl Fn(&BlobDigest) -> bool,
    ) -> Result<Evicted, BlobError> {
        let failed = |error: Errno| BlobError::Store { path: self.path.to_path_buf(), source: error.into() };
        let mut blobs = Vec::new();
        for entry in Dir::read_from(&*self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let Some(digest) = name.to_str().ok().and_then(BlobDigest::parse) else { continue };
            if let Ok(stat) = statat(&*self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                blobs.push((used_ns(&stat), size_of(&stat), digest));
            }
        }
        blobs.sort_unstable();
        let mut evicted = Evicted { kept_bytes: blobs.iter().map(|blob| blob.1).sum(), ..Evicted::default() };
        for (used_ns, size, digest) in blobs {
            let age = Duration::from_nanos(now_ns.saturating_sub(used_ns));
            let is_too_old = age > limits::BLOB_AGE_MAX;
            let is_too_much = evicted.kept_bytes > limit_bytes;
            if (is_too_old || is_too_much)
                && !is_held(&digest)
                && unlinkat(&*self.directory, digest.to_string(), AtFlags::empty()).is_ok()
            {
                evicted.count += 1;
                evicted.bytes += size;
                evicted.kept_bytes -= size;
            }
        }
        Ok(evicted)
    }
}

/// Makes a new file with exactly this mode and owner. `mode` counts whatever the process's umask is.
pub(crate) fn create_file(
    into: BorrowedFd<'_>,
    name: &OsStr,
    mode: u32,
    owner: Option<Owner>,
) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(mode);
    let file = openat(into, name, flags, mode)?;
    if let Some(owner) = owner {
        let (uid, gid) = owner.ids();
        rustix::fs::fchown(&file, uid, gid)?;
    }
    if mode.intersects(Mode::RWXG | Mode::RWXO) {
        rustix::fs::fchmod(&file, mode)?;
    }
    Ok(file.into())
}

fn is_untouched(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && stat.st_mtime == UNTOUCHED.tv_sec
        && stat.st_mtime_nsec == 0
}

fn used_ns(stat: &Stat) -> u64 {
    let seconds = u64::try_from(stat.st_atime).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(stat.st_atime_nsec)
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// A blob that is arriving. Dropping it forgets what has arrived.
#[derive(Debug)]
pub struct ArrivingBlob {
    blobs: Blobs,
    name: String,
    file: File,
    digest: BlobDigest,
    size_bytes: u64,
    arrived: u64,
    hasher: blake3::Hasher,
    stored: bool,
}

impl ArrivingBlob {
    /// Takes in the next bytes.
    ///
    /// # Errors
    /// When they are more than was announced, or the disk is full.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.arrived = self.arrived.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        if self.arrived > self.size_bytes {
            return Err(self.wrong_length());
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|source| self.store_error(source))
    }

    /// Ends the blob, checks it and stores it. Returns whether it was there already.
    ///
    /// # Errors
    /// When its length or digest is not what was announced. It is not stored then.
    pub fn finish(mut self) -> Result<bool, BlobError> {
        if self.arrived != self.size_bytes {
            return Err(self.wrong_length());
        }
        let arrived = BlobDigest::from_bytes(*self.hasher.finalize().as_bytes());
        if arrived != self.digest {
            return Err(BlobError::Digest { digest: self.digest, arrived });
        }
        if self.blobs.contains(&self.digest) {
            return Ok(true);
        }
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            last_modification: UNTOUCHED,
        };
        let directory = self.blobs.directory.as_fd();
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(0o555))
            .and_then(|()| rustix::fs::futimens(&self.file, &times))
            .and_then(|()| renameat(directory, &self.name, directory, self.digest.to_string()))
            .map_err(|error| self.store_error(error.into()))?;
        self.stored = true;
        Ok(false)
    }

    fn wrong_length(&self) -> BlobError {
        BlobError::Length { digest: self.digest, arrived: self.arrived, announced: self.size_bytes }
    }

    fn store_error(&self, source: io::Error) -> BlobError {
        BlobError::Store { path: self.blobs.path.join(&self.name), source }
    }
}

impl Drop for ArrivingBlob {
    fn drop(&mut self) {
        if !self.stored
            && let Err(error) = unlinkat(&*self.blobs.directory, &self.name, AtFlags::empty())
        {
            tracing::warn!(file = %self.name, %error, "an unfinished blob stays until the next start");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt as _};

    use super::*;

    fn store() -> (tempfile::TempDir, Blobs) {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path().join("blobs")).unwrap();
        fs::create_dir(dir.path().join("work")).unwrap();
        (dir, blobs)
    }

    fn put(blobs: &Blobs, content: &[u8]) -> BlobDigest {
        let digest = BlobDigest::of(content);
        let mut blob = blobs.begin(digest, content.len() as u64).unwrap();
        content.chunks(3).for_each(|piece| blob.write(piece).unwrap());
        assert!(!blob.finish().unwrap());
        digest
    }

    fn place(
        dir: &tempfile::TempDir,
        blobs: &Blobs,
        digest: &BlobDigest,
        name: &str,
        mode: u32,
    ) -> Result<PathBuf, BlobError> {
        let work = File::open(dir.path().join("work")).unwrap();
        blobs.place(digest, work.as_fd(), name.as_ref(), mode, None)?;
        Ok(dir.path().join("work").join(name))
    }

    #[test]
    fn a_blob_is_there_only_when_it_is_what_was_announced() {
        let (dir, blobs) = store();
        let digest = BlobDigest::of(b"content");
        assert_eq!(blobs.missing(&[digest]), [digest]);
        let mut wrong = blobs.begin(digest, 7).unwrap();
        wrong.write(b"CONTENT").unwrap();
        assert!(matches!(wrong.finish(), Err(BlobError::Digest { .. })));
        let mut short = blobs.begin(digest, 7).unwrap();
        short.write(b"cont").unwrap();
        assert!(matches!(short.finish(), Err(BlobError::Length { arrived: 4, announced: 7, .. })));
        let mut long = blobs.begin(digest, 6).unwrap();
        assert!(matches!(long.write(b"content"), Err(BlobError::Length { .. })));
        drop(long);
        assert!(matches!(blobs.begin(digest, u64::MAX), Err(BlobError::TooLarge { .. })));
        assert_eq!(fs::read_dir(dir.path().join("blobs")).unwrap().count(), 0, "nothing half stays");
        put(&blobs, b"content");
        assert!(blobs.missing(&[digest]).is_empty());
        let mut again = blobs.begin(digest, 7).unwrap();
        again.write(b"content").unwrap();
        assert!(again.finish().unwrap(), "storing it again succeeds");
    }

    #[test]
    fn executables_are_linked_and_other_files_are_copied() {
        let (dir, blobs) = store();
        let digest = put(&blobs, b"#!/bin/sh\n");
        let linked = fs::metadata(place(&dir, &blobs, &digest, "tool", 0o755).unwrap()).unwrap();
        assert_eq!((linked.mode() & 0o777, linked.nlink()), (0o555, 2));
        let copied = fs::metadata(place(&dir, &blobs, &digest, "file", 0o666).unwrap()).unwrap();
        assert_eq!((copied.mode() & 0o777, copied.nlink()), (0o666, 1));
        let error = place(&dir, &blobs, &digest, "tool", 0o755).unwrap_err();
        assert!(matches!(error, BlobError::Place { .. }), "a name that is taken: {error}");
    }

    #[test]
    fn a_blob_that_was_written_to_is_none() {
        let (dir, blobs) = store();
        let digest = put(&blobs, b"#!/bin/sh\n");
        let tool = place(&dir, &blobs, &digest, "tool", 0o755).unwrap();
        fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        fs::write(&tool, "#!/bin/false\n").unwrap();
        assert!(!blobs.contains(&digest));
        assert!(matches!(place(&dir, &blobs, &digest, "other", 0o755), Err(BlobError::Missing { .. })));
        put(&blobs, b"#!/bin/sh\n");
        assert_eq!(fs::read(place(&dir, &blobs, &digest, "other", 0o755).unwrap()).unwrap(), b"#!/bin/sh\n");
    }

    #[test]
    fn what_is_old_or_too_much_goes_and_what_is_held_stays() {
        let (dir, blobs) = store();
        let digests: Vec<BlobDigest> = (0..4_u8).map(|number| put(&blobs, &[number; 100])).collect();
        let now_s: i64 = 4_000_000_000;
        let ages = [limits::BLOB_AGE_MAX.as_secs() + 1, 7_200, 3_600, 10];
        for (digest, age) in digests.iter().zip(ages) {
            let times = Timestamps {
                last_access: Timespec { tv_sec: now_s - age as i64, tv_nsec: 0 },
                last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            };
            let path = dir.path().join("blobs").join(digest.to_string());
            utimensat(CWD, path, &times, AtFlags::empty()).unwrap();
        }
        let now_ns = now_s.unsigned_abs() * 1_000_000_000;
        let held = |digest: &BlobDigest| *digest == digests[1];
        let evicted = blobs.evict(200, now_ns, held).unwrap();
        assert_eq!(evicted, Evicted { count: 2, bytes: 200, kept_bytes: 200 });
        assert_eq!(blobs.missing(&digests), [digests[0], digests[2]]);
        assert_eq!(
            blobs.evict(0, now_ns, held).unwrap().kept_bytes,
            100,
            "what is held stays, however full it is"
        );
    }

    #[test]
    fn what_never_finished_is_removed_at_the_start() {
        let (dir, blobs) = store();
        let digest = put(&blobs, b"kept");
        fs::write(dir.path().join("blobs/.arriving-1-1"), "half").unwrap();
        blobs.remove_unfinished().unwrap();
        assert!(blobs.contains(&digest));
        assert_eq!(fs::read_dir(dir.path().join("blobs")).unwrap().count(), 1);
    }
}
