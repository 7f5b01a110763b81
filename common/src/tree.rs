//! Removes directory trees that somebody else has filled, whatever they left in them.
//!
//! Follows no symbolic link, leaves no mounted file system but those it can detach, opens what was closed to its owner, and
//! needs two descriptors and little memory however deep and wide the tree is. It expects that whoever filled the tree is
//! gone: it does not fight with a live writer.

use std::{
    collections::HashSet,
    ffi::{CStr, CString, OsStr},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, fstat, major, minor, openat, statx, unlinkat,
    },
    io::Errno,
    mount::{UnmountFlags, unmount},
};

/// Why a tree could not be removed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Some entries resisted; everything else is gone.
    #[error("failed to remove `{}`{}", path.display(), match others { 0 => String::new(), n => format!(" and {n} more") })]
    Entries {
        /// The first entry that resisted.
        path: PathBuf,
        /// How many others did.
        others: usize,
        /// What the system said of the first.
        #[source]
        source: io::Error,
    },
    /// The tree was changed while it was removed.
    #[error("`{}` was moved while it was being removed: somebody still works in it", path.display())]
    Moved {
        /// The directory that was not where it had been.
        path: PathBuf,
    },
}

/// Entries that resist before the rest is left alone: by then something is wrong with the whole.
const FAILURES_COUNT_MAX: usize = 64;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes `path` and everything below it. Nothing there is success.
///
/// # Errors
/// When entries resist, such as immutable files or mounts that may not be detached. Everything else is removed then, too.
pub fn remove_tree(path: &Path) -> Result<(), RemoveError> {
    let whole = |source: io::Error| RemoveError::Entries { path: path.to_owned(), others: 0, source };
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(whole(io::ErrorKind::InvalidInput.into()));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let name = CString::new(name.as_bytes()).map_err(|_| whole(io::ErrorKind::InvalidInput.into()))?;
    let parent = match openat(CWD, parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    {
        Ok(parent) => parent,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(whole(error.into())),
    };
    match unlinkat(&parent, &*name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR) => {
            return unlinkat(&parent, &*name, AtFlags::empty()).map_err(|e| whole(e.into()));
        }
        Err(_) => {}
    }
    let root = open_directory(parent.as_fd(), &name).map_err(|error| whole(error.into()))?;
    let mut removal = Removal {
        base: path.to_owned(),
        mount: Place::of(root.as_fd()).map_err(|error| whole(error.into()))?.mount,
        above: Vec::new(),
        failed: HashSet::new(),
        first_failure: None,
        failures: 0,
    };
    removal.empty(root)?;
    if let Err(error) = unlinkat(&parent, &*name, AtFlags::REMOVEDIR)
        && error != Errno::NOENT
    {
        removal.fail(path.to_owned(), error.into());
    }
    match removal.first_failure {
        None => Ok(()),
        Some((path, source)) => Err(RemoveError::Entries { path, others: removal.failures - 1, source }),
    }
}

/// Which directory this is, and on which mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    inode: (u32, u32, u64),
    mount: u64,
}

impl Place {
    fn of(directory: BorrowedFd<'_>) -> rustix::io::Result<Self> {
        // Once is enough to know that a kernel is older than Linux 4.11.
        static LACKS_STATX: AtomicBool = AtomicBool::new(false);
        if LACKS_STATX.load(Ordering::Relaxed) {
            return Self::by_device(directory);
        }
        let wanted = StatxFlags::INO | StatxFlags::MNT_ID;
        let found = match statx(directory, c"", AtFlags::EMPTY_PATH, wanted) {
            Err(Errno::NOSYS) => {
                LACKS_STATX.store(true, Ordering::Relaxed);
                return Self::by_device(directory);
            }
            found => found?,
        };
        let device = (u64::from(found.stx_dev_major) << 32) | u64::from(found.stx_dev_minor);
        // Before Linux 5.8 there are no mount numbers: the device tells all mounts apart but those of the same device.
        let has_mount = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::MNT_ID);
        Ok(Self {
            inode: (found.stx_dev_major, found.stx_dev_minor, found.stx_ino),
            mount: if has_mount { found.stx_mnt_id } else { device },
        })
    }

    /// For kernels that number no mounts.
    fn by_device(directory: BorrowedFd<'_>) -> rustix::io::Result<Self> {
        let found = fstat(directory)?;
        let inode = (major(found.st_dev), minor(found.st_dev), found.st_ino);
        Ok(Self { inode, mount: found.st_dev })
    }
}

/// A directory that is being emptied, while one below it is.
struct Level {
    name: CString,
    place: Place,
    /// Entries of it that resisted and are not tried again.
    failed: HashSet<CString>,
}

struct Removal {
    base: PathBuf,
    mount: u64,
    above: Vec<Level>,
    failed: HashSet<CString>,
    first_failure: Option<(PathBuf, io::Error)>,
    failures: usize,
}

impl Removal {
    /// Empties a directory. Goes down into the first directory that is not empty and up again by `..`, so that neither
    /// descriptors nor the stack grow with the depth; what was removed is not listed again.
    fn empty(&mut self, root: OwnedFd) -> Result<(), RemoveError> {
        let mut current = root;
        loop {
            if let Some(name) = self.unlink_entries(&current) {
                match self.enter(&current, &name) {
                    Ok(Some((child, place))) => {
                        self.above.push(Level { name, place, failed: std::mem::take(&mut self.failed) });
                        current = child;
                    }
                    Ok(None) => {}
                    Err(error) => self.fail_here(&name, error),
                }
                continue;
            }
            let Some(level) = self.above.pop() else { return Ok(()) };
            let parent = openat(&current, c"..", DIRECTORY, Mode::empty());
            let parent = match parent.and_then(|fd| Place::of(fd.as_fd()).map(|place| (fd, place))) {
                Ok((fd, place)) if place == level.place => fd,
                _ => return Err(RemoveError::Moved { path: self.path(&level.name) }),
            };
            current = parent;
            self.failed = level.failed;
            if let Err(error) = unlinkat(&current, &*level.name, AtFlags::REMOVEDIR)
                && error != Errno::NOENT
            {
                self.fail_here(&level.name, error);
            }
        }
    }

    /// Removes what can be removed at once; returns the first directory that is not empty.
    fn unlink_entries(&mut self, directory: &OwnedFd) -> Option<CString> {
        if self.failures > FAILURES_COUNT_MAX {
            return None;
        }
        let entries = match Dir::read_from(directory) {
            Ok(entries) => entries,
            Err(error) => {
                self.fail(self.path(c""), error.into());
                return None;
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    self.fail(self.path(c""), error.into());
                    return None;
                }
            };
            let name = entry.file_name();
            if name == c"." || name == c".." || self.failed.contains(name) {
                continue;
            }
            let is_directory = entry.file_type() == FileType::Directory;
            match unlink(directory.as_fd(), name, is_directory) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::ISDIR) => return Some(name.to_owned()),
                Err(Errno::BUSY) => {
                    let detached = unmount(self.path(name), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
                    if let Err(error) = detached.and_then(|()| unlink(directory.as_fd(), name, is_directory))
                    {
                        self.fail_here(name, error);
                    }
                }
                Err(error) => self.fail_here(name, error),
            }
        }
        None
    }

    /// Opens a directory to empty it; none when it was a mount and is gone.
    fn enter(&self, current: &OwnedFd, name: &CStr) -> rustix::io::Result<Option<(OwnedFd, Place)>> {
        let child = open_directory(current.as_fd(), name)?;
        if Place::of(child.as_fd())?.mount != self.mount {
            drop(child);
            unmount(self.path(name), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
            return Ok(None);
        }
        Ok(Some((child, Place::of(current.as_fd())?)))
    }

    fn path(&self, name: &CStr) -> PathBuf {
        let mut path = self.base.clone();
        path.extend(self.above.iter().map(|level| OsStr::from_bytes(level.name.to_bytes())));
        if !name.is_empty() {
            path.push(OsStr::from_bytes(name.to_bytes()));
        }
        path
    }

    fn fail_here(&mut self, name: &CStr, error: Errno) {
        // A directory is only not empty because something in it resisted, and that is on record already.
        if !(error == Errno::NOTEMPTY && self.failures > 0) {
            self.fail(self.path(name), error.into());
        }
        self.failed.insert(name.to_owned());
    }

    fn fail(&mut self, path: PathBuf, error: io::Error) {
        self.failures += 1;
        self.first_failure.get_or_insert((path, error));
    }
}

/// Removes one entry; when its directory is closed, opens the directory and tries again.
fn unlink(directory: BorrowedFd<'_>, name: &CStr, is_directory: bool) -> rustix::io::Result<()> {
    let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    match unlinkat(directory, name, flags) {
        Err(Errno::ACCESS | Errno::PERM) => {
            rustix::fs::fchmod(directory, Mode::RWXU)?;
            unlinkat(directory, name, flags)
        }
        outcome => outcome,
    }
}

/// Opens a directory for listing; when it is closed to its owner, opens it up first.
fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    match openat(parent, name, DIRECTORY, Mode::empty()) {
        Err(Errno::ACCESS) => {
            // Through a handle on the directory itself: a change of mode by name would follow a link.
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let handle = openat(parent, name, flags, Mode::empty())?;
            rustix::fs::chmod(format!("/proc/self/fd/{}", handle.as_raw_fd()), Mode::RWXU)?;
            openat(parent, name, DIRECTORY, Mode::empty())
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn nothing_is_success_and_a_link_is_removed_but_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, tree) = (dir.path().join("kept"), dir.path().join("tree"));
        remove_tree(&tree).unwrap();
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "x").unwrap();
        fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(kept.join("file").exists() && !tree.exists());
        std::os::unix::fs::symlink(&kept, &tree).unwrap();
        remove_tree(&tree).unwrap();
        assert!(kept.join("file").exists() && tree.symlink_metadata().is_err());
    }

    #[test]
    fn deep_and_wide_trees_go() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        // Deeper than any path may be long, and than descriptors may be open.
        let mut current = openat(CWD, &tree, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&current, c"deep", Mode::RWXU).unwrap();
            current = openat(&current, c"deep", DIRECTORY, Mode::empty()).unwrap();
        }
        for number in 0..2000 {
            let inner = tree.join(format!("d{number}"));
            fs::create_dir(&inner).unwrap();
            fs::write(inner.join("file"), "x").unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    #[ignore = "needs root: it alone can mount"]
    fn mounts_are_detached_and_what_they_show_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, shown) = (dir.path().join("tree"), dir.path().join("shown"));
        for path in [&tree.join("a/bind"), &tree.join("full"), &shown] {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(shown.join("kept"), "x").unwrap();
        // A bind mount has the same device as its surroundings: only the number of the mount tells it apart.
        rustix::mount::mount_bind(&shown, tree.join("a/bind")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", tree.join("full"), "tmpfs", flags, None::<&CStr>).unwrap();
        fs::write(tree.join("full/file"), "x").unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && shown.join("kept").exists());
    }

    #[test]
    fn directories_closed_to_their_owner_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("closed/inner")).unwrap();
        fs::write(tree.join("closed/inner/file"), "x").unwrap();
        fs::set_permissions(tree.join("closed/inner"), fs::Permissions::from_mode(0o500)).unwrap();
        fs::set_permissions(tree.join("closed"), fs::Permissions::from_mode(0o000)).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }
}
