//! Directories of one task: make, seal, pack, remove.
//!
//! Below the task's directory lie `work/` (shipped files), `output/`, and when something is shipped there, `private/`. All
//! is made through directory handles and no link is followed, so that no shipped path can lead anywhere else, not even
//! through a link that was shipped before it. A task without files costs two calls to make and two to remove. Starts
//! nothing and waits for nothing.

use std::{
    ffi::OsStr,
    io::{self, Write as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use millstream_common::{
    archive::{self, PackError, Packed},
    outcome::Reason,
    spec::{FilePlace, FileSource, SafePath, ShippedFile, TaskSpec},
    tree::{self, RemoveError},
};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, chmodat, chownat, mkdirat, openat, symlinkat},
    io::Errno,
};

pub use super::blobs::Owner;
use super::blobs::{BlobError, Blobs, create_file};

/// Why a task's directories could not be made, packed or removed.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    /// A directory of the task could not be made.
    #[error("failed to make the directory `{}`: check that the agent may write there and that there is space", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The working directory that the block asks for is not there.
    #[error("the working directory `{}` cannot be used: create it on the host, or ship files into it", path.display())]
    WorkingDirectory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A blob could not be put in place.
    #[error("failed to put the shipped file `{file}` into `{place}`")]
    Blob {
        /// The file.
        file: SafePath,
        /// Where to.
        place: FilePlace,
        /// Why not.
        #[source]
        source: BlobError,
    },
    /// A file or link could not be made.
    #[error("failed to put the shipped file `{file}` into `{place}`: check the space on the host")]
    File {
        /// The file.
        file: SafePath,
        /// Where to.
        place: FilePlace,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another shipped file is in the way.
    #[error(
        "failed to put the shipped file `{file}` into `{place}`: another shipped file has that name; rename one of them"
    )]
    Taken {
        /// The file.
        file: SafePath,
        /// Where to.
        place: FilePlace,
    },
    /// A directory on the way is something else.
    #[error(
        "failed to put the shipped file `{file}` into `{place}`: `{component}` on its way was shipped as a file or a \
         link; rename one of them"
    )]
    NotDirectory {
        /// The file.
        file: SafePath,
        /// Where to.
        place: FilePlace,
        /// The component that is no directory.
        component: String,
    },
    /// Something that should be on the host already is not.
    #[error(
        "`{path}`, which the block uses as `{file}` without shipping it, cannot be used: create it on the host or ship it"
    )]
    HostPath {
        /// The name in the working directory.
        file: SafePath,
        /// The path on the host.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The results could not be packed.
    #[error("failed to pack the results")]
    Pack(#[from] PackError),
    /// Something of the task is left behind.
    #[error("failed to remove the task's directory")]
    Remove(#[from] RemoveError),
}

impl WorkspaceError {
    /// What a terminal record says when this is why a task could not be begun.
    #[must_use]
    pub fn reason(&self) -> Reason {
        let errno = |source: &io::Error| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::OutOfMemory => {
                Reason::HostExhausted
            }
            // Out of descriptors, here or on the whole host.
            _ if matches!(source.raw_os_error(), Some(23 | 24)) => Reason::HostExhausted,
            _ => Reason::FileRefused,
        };
        match self {
            Self::Directory { source, .. } => match errno(source) {
                Reason::FileRefused => Reason::StateCorrupt,
                reason => reason,
            },
            Self::Blob {
                source: BlobError::Place { source, .. } | BlobError::Store { source, .. }, ..
            }
            | Self::File { source, .. } => errno(source),
            Self::WorkingDirectory { .. } => Reason::StartFailed,
            Self::Blob { .. } | Self::Taken { .. } | Self::NotDirectory { .. } | Self::HostPath { .. } => {
                Reason::FileRefused
            }
            Self::Pack(_) | Self::Remove(_) => Reason::HostExhausted,
        }
    }
}

/// The directories of one task. Dropping it removes nothing: what a task leaves is removed when its controller has it.
#[derive(Debug, Clone)]
pub struct Workspace {
    task: PathBuf,
    work: PathBuf,
    output: PathBuf,
    private: PathBuf,
    whiteboard: PathBuf,
    has_private: bool,
    working_directory: PathBuf,
    variables: Vec<(String, String)>,
}

impl Workspace {
    /// Makes the directories of a task below `task_dir`, which is made too unless it is there, and puts the shipped files in
    /// place. One that `has_spare` has them already. With an `owner`, which no spare has, everything that the block may write
    /// to belongs to that user; directories above `task_dir` must let the user pass.
    ///
    /// # Errors
    /// When anything cannot be put in place. What was made so far is removed.
    pub fn create(
        task_dir: &Path,
        spec: &TaskSpec,
        secret_files: &[ShippedFile],
        blobs: &Blobs,
        has_spare: bool,
        owner: Option<Owner>,
    ) -> Result<Self, WorkspaceError> {
        let mut workspace = Self {
            task: task_dir.to_owned(),
            work: task_dir.join("work"),
            output: task_dir.join("output"),
            private: task_dir.join("private"),
            whiteboard: task_dir.join(archive::WHITEBOARD),
            has_private: spec.files.iter().chain(secret_files).any(|file| file.place == FilePlace::Private),
            working_directory: PathBuf::new(),
            variables: variables(task_dir, spec, secret_files),
        };
        if !has_spare {
            // Before anything can be cleared again: a directory that is there already belongs to somebody else.
            make_directory(&workspace.work, 0o755, owner)?;
        }
        match workspace
            .make_rest(has_spare, owner)
            .and_then(|()| workspace.fill(spec, secret_files, blobs, owner))
        {
            Ok(()) => Ok(workspace),
            Err(error) => {
                if let Err(left) = workspace.clear() {
                    tracing::warn!(error = %left, "a task that could not be begun leaves files behind");
                }
                Err(error)
            }
        }
    }

    fn make_rest(&self, has_spare: bool, owner: Option<Owner>) -> Result<(), WorkspaceError> {
        if !has_spare {
            make_directory(&self.output, 0o755, owner)?;
        }
        if self.has_private {
            match make_directory(&self.private, 0o700, owner) {
                // A spare may have an empty one.
                Err(WorkspaceError::Directory { source, .. })
                    if has_spare && source.kind() == io::ErrorKind::AlreadyExists => {}
                made => made?,
            }
        }
        match owner {
            Some(owner) => self.open_to(owner),
            None => Ok(()),
        }
    }

    fn fill(
        &mut self,
        spec: &TaskSpec,
        secret_files: &[ShippedFile],
        blobs: &Blobs,
        owner: Option<Owner>,
    ) -> Result<(), WorkspaceError> {
        for (path, place) in [(&self.work, FilePlace::Work), (&self.private, FilePlace::Private)] {
            let files = || spec.files.iter().chain(secret_files).filter(|file| file.place == place);
            if files().next().is_some() {
                let mut placer = Placer::open(path, place, blobs, owner)?;
                files().try_for_each(|file| placer.put(file))?;
            }
        }
        self.working_directory = self.work.clone();
        if !spec.working_directory.is_empty() {
            // An absolute path replaces the other.
            self.working_directory.push(&spec.working_directory);
            let path = &self.working_directory;
            let failed = |source| WorkspaceError::WorkingDirectory { path: path.clone(), source };
            if !std::fs::metadata(path).map_err(failed)?.is_dir() {
                return Err(failed(io::ErrorKind::NotADirectory.into()));
            }
        }
        Ok(())
    }

    /// Lets another user reach its directories and write its whiteboard, which lies where only the agent makes files.
    fn open_to(&self, owner: Owner) -> Result<(), WorkspaceError> {
        let failed = |path: &Path, source| WorkspaceError::Directory { path: path.to_owned(), source };
        chmodat(CWD, &self.task, Mode::from_raw_mode(0o711), AtFlags::empty())
            .map_err(|error| failed(&self.task, error.into()))?;
        let parent = open_directory(CWD, &self.task).map_err(|error| failed(&self.task, error.into()))?;
        create_file(parent.as_fd(), OsStr::new(archive::WHITEBOARD), 0o644, Some(owner))
            .map(drop)
            .map_err(|error| failed(&self.whiteboard, error))
    }

    /// Directory of the shipped files.
    #[must_use]
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Where the block begins: [`Workspace::work`], or what it asked for.
    #[must_use]
    pub fn working_directory(&self) -> &Path {
        &self.working_directory
    }

    /// Directory whose content comes home.
    #[must_use]
    pub fn output(&self) -> &Path {
        &self.output
    }

    /// Directory of mode 0700 for parameters and secrets; made only when something is shipped there.
    #[must_use]
    pub fn private(&self) -> &Path {
        &self.private
    }

    /// The file that comes home as whiteboard; the block makes it.
    #[must_use]
    pub fn whiteboard(&self) -> &Path {
        &self.whiteboard
    }

    /// The archive, once the results are packed.
    #[must_use]
    pub fn archive(&self) -> PathBuf {
        archive_path(&self.task)
    }

    /// Variables that tell where shipped files are. They stand above those of the specification, whose values are in them
    /// already where the two are to be joined.
    #[must_use]
    pub fn variables(&self) -> &[(String, String)] {
        &self.variables
    }

    /// Packs what the block left; none when it left nothing. To be called when its tree is dead, so that nobody writes any
    /// more. With nothing left it makes no file and looks at the directory once.
    ///
    /// # Errors
    /// When the results cannot be read or the archive cannot be written.
    pub fn seal_and_pack(&self) -> Result<Option<Packed>, WorkspaceError> {
        Ok(archive::pack(&self.output, &self.whiteboard, &self.archive())?)
    }

    /// Removes what the block worked with and what was packed. What watchers read stays: the log and the archive.
    ///
    /// # Errors
    /// When something resists.
    pub fn clear(&self) -> Result<(), WorkspaceError> {
        tree::remove_tree(&self.work)?;
        tree::remove_tree(&self.output)?;
        if self.has_private {
            tree::remove_tree(&self.private)?;
        }
        match std::fs::remove_file(&self.whiteboard) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Ok(tree::remove_tree(&self.whiteboard)?),
            _ => Ok(()),
        }
    }

    /// Removes everything of the task, its log and archive included.
    ///
    /// # Errors
    /// When something resists.
    pub fn remove(&self) -> Result<(), WorkspaceError> {
        remove_task(&self.task)
    }
}

/// Where the archive of a task lies.
#[must_use]
pub fn archive_path(task_dir: &Path) -> PathBuf {
    task_dir.join("archive.tar")
}

/// Removes the directory of a task and everything in it. Nothing there is success.
///
/// # Errors
/// When something resists, such as an immutable file.
pub fn remove_task(task_dir: &Path) -> Result<(), WorkspaceError> {
    Ok(tree::remove_tree(task_dir)?)
}

fn make_directory(path: &Path, mode: u32, owner: Option<Owner>) -> Result<(), WorkspaceError> {
    let failed = |error: Errno| WorkspaceError::Directory { path: path.to_owned(), source: error.into() };
    let made = match mkdirat(CWD, path, Mode::from_raw_mode(mode)) {
        Err(Errno::NOENT) => {
            // The task's own directory is not there yet.
            let task = path.parent().unwrap_or(Path::new("."));
            std::fs::create_dir_all(task)
                .map_err(|source| WorkspaceError::Directory { path: task.to_owned(), source })?;
            mkdirat(CWD, path, Mode::from_raw_mode(mode))
        }
        made => made,
    };
    made.map_err(failed)?;
    if let Some(owner) = owner {
        let (uid, gid) = owner.ids();
        chownat(CWD, path, uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    }
    Ok(())
}

fn open_directory(at: BorrowedFd<'_>, path: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(at, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Variables of shipped files: the path of one, or the directories of several, before the value that the task has anyway.
fn variables(task_dir: &Path, spec: &TaskSpec, secret_files: &[ShippedFile]) -> Vec<(String, String)> {
    let mut variables: Vec<(String, Vec<String>)> = Vec::new();
    for file in spec.files.iter().chain(secret_files) {
        let Some(name) = &file.environment_name else { continue };
        let path = task_dir.join(file.place.to_string()).join(&file.path);
        let value = if file.environment_holds_directory { path.parent().unwrap_or(&path) } else { &path };
        let value = value.to_string_lossy().into_owned();
        match variables.iter_mut().find(|(known, _)| known == name) {
            None => variables.push((name.clone(), vec![value])),
            Some((_, values)) if !file.environment_holds_directory => *values = vec![value],
            Some((_, values)) if !values.contains(&value) => values.push(value),
            Some(_) => {}
        }
    }
    let joins = |name: &str| {
        let mut all = spec.files.iter().chain(secret_files);
        all.any(|file| file.environment_holds_directory && file.environment_name.as_deref() == Some(name))
    };
    variables
        .into_iter()
        .map(|(name, mut values)| {
            if joins(&name) {
                values.extend(spec.environment.get(&name).filter(|value| !value.is_empty()).cloned());
            }
            let value = values.join(":");
            (name, value)
        })
        .collect()
}

/// Puts files into one directory. Keeps the directories on the way to the last file open: files come directory by
/// directory, so that each directory is opened once.
struct Placer<'a> {
    place: FilePlace,
    root: OwnedFd,
    open: Vec<(String, OwnedFd)>,
    blobs: &'a Blobs,
    owner: Option<Owner>,
}

impl<'a> Placer<'a> {
    fn open(
        path: &Path,
        place: FilePlace,
        blobs: &'a Blobs,
        owner: Option<Owner>,
    ) -> Result<Self, WorkspaceError> {
        let root = open_directory(CWD, path)
            .map_err(|error| WorkspaceError::Directory { path: path.to_owned(), source: error.into() })?;
        Ok(Self { place, root, open: Vec::new(), blobs, owner })
    }

    fn put(&mut self, shipped: &ShippedFile) -> Result<(), WorkspaceError> {
        let (file, place) = (&shipped.path, self.place);
        let (parents, name) = match file.as_str().rsplit_once('/') {
            Some((parents, name)) => (parents.split('/').collect(), name),
            None => (Vec::new(), file.as_str()),
        };
        self.open_parents(file, &parents)?;
        let parent = self.open.last().map_or(self.root.as_fd(), |(_, directory)| directory.as_fd());
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => WorkspaceError::Taken { file: file.clone(), place },
            _ => WorkspaceError::File { file: file.clone(), place, source },
        };
        match &shipped.source {
            FileSource::Inline(content) => create_file(parent, name.as_ref(), shipped.mode, self.owner)
                .and_then(|mut made| made.write_all(content))
                .map_err(failed),
            FileSource::Blob(digest) => self
                .blobs
                .place(digest, parent, name.as_ref(), shipped.mode, self.owner)
                .map_err(|error| match error {
                    BlobError::Place { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                        WorkspaceError::Taken { file: file.clone(), place }
                    }
                    source => WorkspaceError::Blob { file: file.clone(), place, source },
                }),
            FileSource::HostPath(path) => {
                std::fs::metadata(path).map_err(|source| WorkspaceError::HostPath {
                    file: file.clone(),
                    path: path.clone(),
                    source,
                })?;
                symlinkat(path.as_str(), parent, name).map_err(|error| failed(error.into()))
            }
            FileSource::Link(target) => {
                // Relative, so that it holds wherever the directory is seen from.
                let target = format!("{}{target}", "../".repeat(parents.len()));
                symlinkat(target.as_str(), parent, name).map_err(|error| failed(error.into()))
            }
        }
    }

    /// Opens the directories on the way to a file, and makes those that are not there.
    fn open_parents(&mut self, file: &SafePath, parents: &[&str]) -> Result<(), WorkspaceError> {
        let place = self.place;
        let common = self.open.iter().zip(parents).take_while(|((name, _), parent)| name == *parent).count();
        self.open.truncate(common);
        for &component in &parents[common..] {
            let above = self.open.last().map_or(self.root.as_fd(), |(_, directory)| directory.as_fd());
            let opened = match open_directory(above, component) {
                Err(Errno::NOENT) => self.make_parent(above, component),
                opened => opened,
            };
            let directory = opened.map_err(|error| match error {
                Errno::NOTDIR | Errno::LOOP => {
                    let component = component.to_owned();
                    WorkspaceError::NotDirectory { file: file.clone(), place, component }
                }
                error => WorkspaceError::File { file: file.clone(), place, source: error.into() },
            })?;
            self.open.push((component.to_owned(), directory));
        }
        Ok(())
    }

    fn make_parent(&self, above: BorrowedFd<'_>, component: &str) -> rustix::io::Result<OwnedFd> {
        mkdirat(above, component, Mode::from_raw_mode(0o755))?;
        if let Some(owner) = self.owner {
            let (uid, gid) = owner.ids();
            chownat(above, component, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        open_directory(above, component)
    }
}

#[cfg(test)]
mod tests;
