//! Directories of released tasks, kept for the tasks that come.
//!
//! Making and removing directories costs more than everything else on the disk that a trivial task needs: on a file system
//! that tells its device about free blocks, removing one takes about a millisecond. So the directory of a task that left
//! its `work/` and `output/` as they were made is given to another one by renaming it. As they were made means: nothing
//! was ever put in, even for a moment, and no attribute was changed; whatever cannot be shown to be so is removed.
//! Almost every task has parameters in its `private/`: that one is emptied, and kept when it holds nothing but files and
//! has no attribute that it was not made with. Spares belong to one session and go with it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use millstream_common::{
    limits,
    tree::{self, RemoveError},
};
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, Statx, StatxAttributes, StatxFlags,
        flistxattr, openat, renameat_with, statx, unlinkat,
    },
    io::Errno,
};

/// The spares of one session. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Spares {
    pool: Arc<Mutex<Pool>>,
}

#[derive(Debug, Default)]
struct Pool {
    ready: Vec<PathBuf>,
    /// Number of spares ever kept: no two have the same name.
    number: u64,
    /// Whether nothing is kept any more, because the directory that spares lie in is being removed.
    is_shut: bool,
}

impl Spares {
    /// Makes a spare the directory of a task, with an empty `work/` and `output/`. False when there is none, or when the
    /// task has a directory already.
    pub(crate) fn claim(&self, task_dir: &Path) -> bool {
        let Some(spare) = self.pool().ready.pop() else { return false };
        match renameat_with(CWD, &spare, CWD, task_dir, RenameFlags::NOREPLACE) {
            Ok(()) => true,
            Err(Errno::EXIST) => {
                self.pool().ready.push(spare);
                false
            }
            // It is not where it was left: whoever took it away has it now.
            Err(_) => false,
        }
    }

    /// Removes everything of a task, its log and archive included, and keeps the directory when it is as it was made.
    /// Nothing there is success. Blocks on the disk.
    ///
    /// # Errors
    /// When something resists, such as an immutable file.
    pub fn retire(&self, task_dir: &Path) -> Result<(), RemoveError> {
        let has_room = {
            let pool = self.pool();
            !pool.is_shut && pool.ready.len() < limits::SPARES_COUNT_MAX
        };
        if has_room && emptied(task_dir) && self.keep(task_dir) {
            Ok(())
        } else {
            tree::remove_tree(task_dir)
        }
    }

    /// Keeps nothing from now on, so that the directory that the spares lie in can be removed with them.
    pub(crate) fn shut(&self) {
        let mut pool = self.pool();
        pool.is_shut = true;
        pool.ready.clear();
    }

    fn keep(&self, task_dir: &Path) -> bool {
        // The lock is held over the renaming: after `shut` no spare may appear.
        let mut pool = self.pool();
        let spare = task_dir.with_file_name(format!(".spare-{}", pool.number));
        let is_kept =
            !pool.is_shut && renameat_with(CWD, task_dir, CWD, &spare, RenameFlags::NOREPLACE).is_ok();
        if is_kept {
            pool.number += 1;
            pool.ready.push(spare);
        }
        is_kept
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const PRIVATE: &std::ffi::CStr = c"private";
const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes the files of a task whose directories are as they were made. False when they are not, or anything else is there;
/// some files may be gone then, as they would have to be anyway.
fn emptied(task_dir: &Path) -> bool {
    let Ok(task) = openat(CWD, task_dir, DIRECTORY, Mode::empty()) else { return false };
    let mount = match look(task.as_fd(), c"") {
        Ok(found) => found.stx_mnt_id,
        Err(_) => return false,
    };
    for name in [c"work", c"output"] {
        let untouched =
            look(task.as_fd(), name).is_ok_and(|found| is_as_made(&found) && found.stx_mnt_id == mount);
        let is_empty = openat(&task, name, DIRECTORY, Mode::empty()).and_then(is_empty);
        if !untouched || is_empty != Ok(true) {
            return false;
        }
    }
    private_emptied(&task, mount) && files_removed(&task, &[b"work", b"output", b"private"]).unwrap_or(false)
}

/// Empties `private/`, if there is one. False when anything about it is not as it was made, or when it holds more than
/// files.
fn private_emptied(task: &OwnedFd, mount: u64) -> bool {
    let found = match look(task.as_fd(), PRIVATE) {
        Ok(found) => found,
        Err(error) => return error == Errno::NOENT,
    };
    let is_ours = FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory
        && Mode::from_raw_mode(found.stx_mode.into()) == Mode::RWXU
        && found.stx_uid == rustix::process::geteuid().as_raw()
        && found.stx_mnt_id == mount
        && !found.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND);
    if !is_ours {
        return false;
    }
    let Ok(private) = openat(task, PRIVATE, DIRECTORY, Mode::empty()) else { return false };
    // A list of access rights that files in it would inherit is one of these.
    let has_attributes = flistxattr(&private, &mut [] as &mut [u8]) != Ok(0);
    !has_attributes && files_removed(&private, &[]).unwrap_or(false)
}

fn look(at: BorrowedFd<'_>, name: &std::ffi::CStr) -> rustix::io::Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    let found = statx(at, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH, wanted)?;
    // Not every file system knows when an inode was made, and not every kernel numbers its mounts.
    if StatxFlags::from_bits_retain(found.stx_mask).contains(wanted) { Ok(found) } else { Err(Errno::NOTSUP) }
}

/// Whether a directory is ours and nothing in it or about it has changed since it was made: its times are all the same.
fn is_as_made(found: &Statx) -> bool {
    let [made, changed, modified] =
        [found.stx_btime, found.stx_ctime, found.stx_mtime].map(|t| (t.tv_sec, t.tv_nsec));
    FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory
        && found.stx_uid == rustix::process::geteuid().as_raw()
        && made == changed
        && made == modified
}

fn is_empty(directory: OwnedFd) -> rustix::io::Result<bool> {
    for entry in Dir::new(directory)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes every file of a directory except what is kept; false when there is another directory.
fn files_removed(directory: &OwnedFd, kept: &[&[u8]]) -> io::Result<bool> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") || kept.contains(&name.to_bytes()) {
            continue;
        }
        match unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Session {
        dir: tempfile::TempDir,
        spares: Spares,
    }

    impl Session {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), spares: Spares::default() }
        }

        fn made(&self, name: &str) -> PathBuf {
            let task = self.dir.path().join(name);
            fs::create_dir_all(task.join("work")).unwrap();
            fs::create_dir(task.join("output")).unwrap();
            fs::write(task.join("spool"), "log").unwrap();
            task
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.dir.path()).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    #[test]
    fn a_directory_that_is_as_it_was_made_is_used_again() {
        let session = Session::new();
        session.spares.retire(&session.made("one")).unwrap();
        assert_eq!(session.names(), [".spare-0"]);
        let two = session.dir.path().join("two");
        assert!(session.spares.claim(&two) && !session.spares.claim(&two));
        let mut left: Vec<_> = fs::read_dir(&two).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["output", "work"]);
        session.spares.retire(&two).unwrap();
        assert!(session.spares.claim(&session.dir.path().join("three")), "and again");
        session.spares.retire(&session.dir.path().join("never there")).unwrap();
    }

    #[test]
    fn a_directory_that_was_touched_is_removed() {
        type Touch = fn(&Path);
        let touches: [(&str, Touch); 6] = [
            ("a file is left", |task| fs::write(task.join("output/x"), "").unwrap()),
            ("another directory", |task| fs::create_dir(task.join("private")).unwrap()),
            ("no output", |task| fs::remove_dir(task.join("output")).unwrap()),
            ("a link for a directory", |task| {
                fs::remove_dir(task.join("work")).unwrap();
                std::os::unix::fs::symlink("output", task.join("work")).unwrap();
            }),
            ("times that were set", |task| {
                let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
                fs::File::open(task.join("work")).unwrap().set_times(times).unwrap();
            }),
            ("a file for a directory", |task| {
                fs::remove_dir(task.join("work")).unwrap();
                fs::write(task.join("work"), "").unwrap();
            }),
        ];
        for (name, touch) in touches {
            let session = Session::new();
            let task = session.made("one");
            touch(&task);
            session.spares.retire(&task).unwrap();
            assert_eq!(session.names(), [""; 0], "{name}");
            assert!(!session.spares.claim(&task));
        }
    }

    #[test]
    fn what_was_shipped_in_private_is_removed_and_its_directory_kept() {
        use std::os::unix::fs::PermissionsExt as _;
        type Touch = fn(&Path);
        let touches: [(&str, bool, Touch); 4] = [
            ("files", true, |private| fs::write(private.join("params.json"), "{}").unwrap()),
            ("another mode", false, |private| {
                fs::set_permissions(private, fs::Permissions::from_mode(0o755)).unwrap();
            }),
            ("a directory", false, |private| fs::create_dir(private.join("more")).unwrap()),
            ("a link for it", false, |private| {
                fs::remove_dir(private).unwrap();
                std::os::unix::fs::symlink("work", private).unwrap();
            }),
        ];
        for (name, is_kept, touch) in touches {
            let session = Session::new();
            let task = session.made("one");
            let private = task.join("private");
            fs::create_dir(&private).unwrap();
            fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).unwrap();
            touch(&private);
            session.spares.retire(&task).unwrap();
            let two = session.dir.path().join("two");
            assert_eq!(session.spares.claim(&two), is_kept, "{name}");
            assert!(!is_kept || fs::read_dir(two.join("private")).unwrap().next().is_none(), "{name}");
            assert!(!task.exists());
        }
    }

    #[test]
    fn what_came_and_went_is_seen_by_the_times() {
        let session = Session::new();
        let task = session.made("one");
        let made = fs::metadata(task.join("output")).unwrap().created().unwrap();
        // The clock of the file system has to move on first: it stamps in steps of a few milliseconds.
        while fs::metadata(task.join("output")).unwrap().modified().unwrap() == made {
            fs::write(task.join("output/x"), "").unwrap();
            fs::remove_file(task.join("output/x")).unwrap();
        }
        session.spares.retire(&task).unwrap();
        assert_eq!(session.names(), [""; 0]);
    }

    #[test]
    fn a_task_that_has_a_directory_keeps_it_and_spares_are_few() {
        let session = Session::new();
        session.spares.retire(&session.made("one")).unwrap();
        let two = session.made("two");
        assert!(!session.spares.claim(&two));
        assert!(two.join("spool").exists());
        for number in 0..limits::SPARES_COUNT_MAX + 5 {
            session.spares.retire(&session.made(&format!("many-{number}"))).unwrap();
        }
        fs::remove_dir_all(two).unwrap();
        assert_eq!(session.names().len(), limits::SPARES_COUNT_MAX);
        let last = session.made("last");
        session.spares.shut();
        session.spares.retire(&last).unwrap();
        assert!(!last.exists() && !session.spares.claim(&last), "nothing is kept or given any more");
        assert_eq!(session.names().len(), limits::SPARES_COUNT_MAX);
    }
}
