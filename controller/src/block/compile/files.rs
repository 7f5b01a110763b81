//! The files of one block: read, digested, and placed side by side without clashes.
//!
//! Small ones travel inside the specification, the others as blobs. What could leave a shipped directory is refused
//! here, by name, before a host sees it.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;
use millstream_common::{
    limits,
    spec::{BlobDigest, FilePlace, FileSource, SafePath, ShippedFile},
};

use super::{BlockError, Upload, UploadSource};
use crate::{
    block::{FileRequest, payload},
    topology::Topology,
};

/// Bytes of all names of a block's files together: with what stands around each name, they fit into one message.
pub(super) const NAMES_BYTES_MAX: usize = 768 * 1024;

/// What blocks are told of other streams and travels with each task: some dozen streams. More of it is a blob.
const TOPOLOGY_INLINE_BYTES_MAX: usize = 4 * 1024;

/// The module that Python code imports as `millstream`.
const PYTHON_MODULE: &str = include_str!("../python/millstream.py");

/// Files of one block, all of them.
pub(super) struct Collected {
    /// In the specification.
    pub(super) files: Vec<ShippedFile>,
    /// Beside it.
    pub(super) secret_files: Vec<ShippedFile>,
    /// Blobs that must be there first.
    pub(super) uploads: Vec<Upload>,
}

/// Files of one block as they come together.
#[derive(Debug, Default)]
pub(crate) struct Files {
    work: BTreeMap<String, ShippedFile>,
    private: BTreeMap<String, ShippedFile>,
    secret: Vec<ShippedFile>,
    uploads: BTreeMap<BlobDigest, Upload>,
    names_bytes: usize,
    inline_bytes: usize,
    has_python: bool,
}

impl Files {
    /// A file or directory that the user named.
    pub(super) fn request(&mut self, request: &FileRequest, no_copy: bool) -> Result<(), BlockError> {
        let path = &request.path;
        let place = file_name(path)?;
        if no_copy {
            let source = FileSource::HostPath(host_path(path)?);
            return self.add(FilePlace::Work, place, 0o644, None, source);
        }
        let what = if request.directory { "directory" } else { "file" };
        let metadata = metadata(what, path)?;
        match (request.directory, metadata.is_dir(), metadata.is_file()) {
            (true, true, _) => self.tree(path, &place),
            (false, _, true) => self.file(path, &metadata, place, None),
            (true, false, _) => {
                let hint = "ship a single file with `file`";
                Err(BlockError::WrongKind { what, path: path.clone(), hint })
            }
            (false, true, _) => {
                let hint = "ship a directory with `dir`";
                Err(BlockError::WrongKind { what, path: path.clone(), hint })
            }
            (false, false, false) => Err(BlockError::SpecialFile { path: path.clone() }),
        }
    }

    /// The script that the block runs; returns its place. It is made executable.
    pub(super) fn script(&mut self, path: &Path, variable: &str) -> Result<String, BlockError> {
        let metadata = metadata("script", path)?;
        if !metadata.is_file() {
            let hint = "name the file that is to be executed";
            return Err(BlockError::WrongKind { what: "script", path: path.to_owned(), hint });
        }
        let mut start = [0; 256];
        let mut file = fs::File::open(path).map_err(read_error(path))?;
        let length = file.read(&mut start).map_err(read_error(path))?;
        let start = &start[..length];
        if !start.starts_with(b"#!") && !start.starts_with(b"\x7fELF") {
            return Err(BlockError::NoInterpreter { path: path.to_owned() });
        }
        let first_line = start.split(|&byte| byte == b'\n').next().unwrap_or_default();
        self.has_python |= memchr::memmem::find(first_line, b"python").is_some();
        let place = file_name(path)?;
        // Naming the script among the files as well is harmless.
        self.work.remove(&place);
        let blob = self.blob(path, &metadata)?;
        let mode = (metadata.permissions().mode() & 0o777) | 0o555;
        self.add(FilePlace::Work, place.clone(), mode, Some(variable), blob)?;
        Ok(place)
    }

    /// A Python file and what it may import from beside it: modules, packages, and its directory of data. Returns its
    /// place.
    pub(crate) fn python_file(&mut self, path: &Path, variable: Option<&str>) -> Result<String, BlockError> {
        let main = metadata("Python file", path)?;
        if !main.is_file() {
            let hint = "name the file that holds the code";
            return Err(BlockError::WrongKind { what: "Python file", path: path.to_owned(), hint });
        }
        let main_place = file_name(path)?;
        self.work.remove(&main_place);
        self.file(path, &main, main_place.clone(), variable)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        for entry in fs::read_dir(directory).map_err(read_error(directory))? {
            let path = entry.map_err(read_error(directory))?.path();
            // What is no text cannot be imported, and what has gone meanwhile need not be shipped.
            let (Ok(place), Ok(metadata)) = (file_name(&path), fs::metadata(&path)) else { continue };
            if place == main_place {
                continue;
            }
            if metadata.is_file() && place.ends_with(".py") {
                self.file(&path, &metadata, place, None)?;
            } else if metadata.is_dir()
                && (path.join("__init__.py").is_file() || place == format!("{main_place}.data"))
            {
                self.tree_without(&path, &place, Some("__pycache__"))?;
            }
        }
        Ok(main_place)
    }

    /// A file of the block's own program, executable, beside the shipped files.
    pub(crate) fn program(&mut self, path: &Path, place: String, variable: &str) -> Result<(), BlockError> {
        let metadata = metadata("program", path)?;
        let blob = self.blob(path, &metadata)?;
        self.add(FilePlace::Work, place, 0o555, Some(variable), blob)
    }

    /// Content that was made here, in the working directory.
    pub(crate) fn content(&mut self, place: &str, variable: &str, content: Bytes) -> Result<(), BlockError> {
        let source = self.memory(content);
        self.add(FilePlace::Work, place.to_owned(), 0o644, Some(variable), source)
    }

    /// Content that was made here, out of the block's way.
    pub(crate) fn generated(
        &mut self,
        place: &str,
        variable: &str,
        content: Bytes,
    ) -> Result<(), BlockError> {
        let source = self.memory(content);
        self.add(FilePlace::Private, place.to_owned(), 0o600, Some(variable), source)
    }

    /// What the block is told of the other streams: the same for many tasks, so that a host gets it once unless it is short.
    pub(super) fn topology(
        &mut self,
        place: &str,
        variable: &str,
        topology: &Topology,
    ) -> Result<(), BlockError> {
        let Topology { content, digest } = topology.clone();
        let source = if content.len() <= TOPOLOGY_INLINE_BYTES_MAX {
            self.memory(content)
        } else {
            self.upload(digest, content)
        };
        self.add(FilePlace::Private, place.to_owned(), 0o600, Some(variable), source)
    }

    /// Content that nobody but the block may see.
    pub(super) fn secret(&mut self, place: &str, variable: &str, content: Bytes) -> Result<(), BlockError> {
        if content.len() > limits::INLINE_FILE_BYTES_MAX {
            return Err(BlockError::SecretsTooLarge { length: content.len() });
        }
        let source = FileSource::Inline(content);
        let file = shipped(FilePlace::Private, place.to_owned(), 0o600, Some(variable), source)?;
        self.secret.push(file);
        Ok(())
    }

    /// The module that Python code imports as `millstream`.
    pub(super) fn python_module(&mut self) -> Result<(), BlockError> {
        let place = "python/millstream.py".to_owned();
        let source = self.memory(Bytes::from_static(PYTHON_MODULE.as_bytes()));
        self.add(FilePlace::Private, place.clone(), 0o644, Some("PYTHONPATH"), source)?;
        if let Some(file) = self.private.get_mut(&place) {
            file.environment_holds_directory = true;
        }
        Ok(())
    }

    /// Whether one of the files is Python.
    pub(super) fn has_python(&self) -> bool {
        self.has_python || self.work.keys().any(|place| place.ends_with(".py"))
    }

    /// What goes into the specification, what stays out of it, and what must be there first.
    pub(super) fn finish(self) -> Result<Collected, BlockError> {
        let work = self.work.into_values();
        let files: Vec<_> = work.chain(self.private.into_values()).collect();
        if files.len() > limits::FILES_COUNT_MAX || self.names_bytes > NAMES_BYTES_MAX {
            return Err(BlockError::TooManyFiles);
        }
        Ok(Collected { files, secret_files: self.secret, uploads: self.uploads.into_values().collect() })
    }

    fn add(
        &mut self,
        place: FilePlace,
        path: String,
        mode: u32,
        variable: Option<&str>,
        source: FileSource,
    ) -> Result<(), BlockError> {
        self.names_bytes += path.len();
        // Asked at every file, so that a directory without end is not walked to its end.
        if self.work.len() >= limits::FILES_COUNT_MAX || self.names_bytes > NAMES_BYTES_MAX {
            return Err(BlockError::TooManyFiles);
        }
        let file = shipped(place, path.clone(), mode, variable, source)?;
        let places = match place {
            FilePlace::Work => &mut self.work,
            FilePlace::Private => &mut self.private,
        };
        match places.get(&path) {
            Some(there) if *there != file => Err(BlockError::FileClash { place: path }),
            Some(_) => Ok(()),
            None => {
                places.insert(path, file);
                Ok(())
            }
        }
    }

    fn memory(&mut self, content: Bytes) -> FileSource {
        if self.fits_inline(content.len()) {
            return FileSource::Inline(content);
        }
        self.upload(BlobDigest::of(&content), content)
    }

    fn upload(&mut self, digest: BlobDigest, content: Bytes) -> FileSource {
        let size_bytes = content.len() as u64;
        self.uploads.insert(digest, Upload { digest, size_bytes, source: UploadSource::Bytes(content) });
        FileSource::Blob(digest)
    }

    fn fits_inline(&mut self, length: usize) -> bool {
        let fits = length <= limits::INLINE_FILE_BYTES_MAX
            && self.inline_bytes + length <= limits::INLINE_FILES_BYTES_MAX;
        if fits {
            self.inline_bytes += length;
        }
        fits
    }

    fn file(
        &mut self,
        path: &Path,
        metadata: &fs::Metadata,
        place: String,
        variable: Option<&str>,
    ) -> Result<(), BlockError> {
        let mode = metadata.permissions().mode() & 0o777;
        // Executables are always blobs, which hosts link into place: a file that was just written cannot be executed as
        // long as any other process that is being started still has it open.
        let small = metadata.len() <= limits::INLINE_FILE_BYTES_MAX as u64 && mode & 0o111 == 0;
        let source = if small {
            let content = fs::read(path).map_err(read_error(path))?;
            self.memory(Bytes::from(content))
        } else {
            self.blob(path, metadata)?
        };
        self.add(FilePlace::Work, place, mode, variable, source)
    }

    fn blob(&mut self, path: &Path, metadata: &fs::Metadata) -> Result<FileSource, BlockError> {
        let size_bytes = metadata.len();
        if size_bytes > limits::BLOB_BYTES_MAX {
            return Err(BlockError::FileTooLarge { path: path.to_owned(), length: size_bytes });
        }
        let digest = payload::digest_of_file(path, metadata).map_err(read_error(path))?;
        let path = std::path::absolute(path).map_err(read_error(path))?;
        self.uploads.insert(digest, Upload { digest, size_bytes, source: UploadSource::Path(path) });
        Ok(FileSource::Blob(digest))
    }

    /// A directory and all that is in it.
    fn tree(&mut self, root: &Path, root_place: &str) -> Result<(), BlockError> {
        self.tree_without(root, root_place, None)
    }

    /// The same without what has a certain name.
    fn tree_without(
        &mut self,
        root: &Path,
        root_place: &str,
        left_out: Option<&str>,
    ) -> Result<(), BlockError> {
        let mut directories = vec![(root.to_owned(), root_place.to_owned())];
        while let Some((directory, place)) = directories.pop() {
            for entry in fs::read_dir(&directory).map_err(read_error(&directory))? {
                let entry = entry.map_err(read_error(&directory))?;
                let path = entry.path();
                let name = file_name(&path)?;
                if left_out == Some(name.as_str()) {
                    continue;
                }
                let place = format!("{place}/{name}");
                let kind = entry.file_type().map_err(read_error(&path))?;
                if kind.is_dir() {
                    // The depth is bounded by the rules for paths.
                    safe_path(&path, place.clone())?;
                    directories.push((path, place));
                } else if kind.is_file() {
                    let metadata = entry.metadata().map_err(read_error(&path))?;
                    self.file(&path, &metadata, place, None)?;
                } else if kind.is_symlink() {
                    let target = fs::read_link(&path).map_err(read_error(&path))?;
                    let resolved = link_target(root_place, &place, &target);
                    let resolved =
                        resolved.ok_or_else(|| BlockError::LinkOutside { path: path.clone(), target })?;
                    let source = FileSource::Link(safe_path(&path, resolved)?);
                    self.add(FilePlace::Work, place, 0o777, None, source)?;
                } else {
                    return Err(BlockError::SpecialFile { path });
                }
            }
        }
        Ok(())
    }
}

/// Where a link at `place` points to, seen from the working directory; none when that is outside of `root`.
fn link_target(root: &str, place: &str, target: &Path) -> Option<String> {
    let mut components: Vec<&str> = place.split('/').collect();
    components.pop();
    for component in target.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                components.pop()?;
            }
            Component::Normal(name) => components.push(name.to_str()?),
            Component::RootDir | Component::Prefix(_) => return None,
        }
        // Leaving the root and coming back would name whatever has the root's name on the host.
        if components.first() != Some(&root) {
            return None;
        }
    }
    Some(components.join("/"))
}

fn shipped(
    place: FilePlace,
    path: String,
    mode: u32,
    variable: Option<&str>,
    source: FileSource,
) -> Result<ShippedFile, BlockError> {
    Ok(ShippedFile {
        path: safe_path(Path::new(&path), path.clone())?,
        place,
        mode,
        environment_name: variable.map(str::to_owned),
        environment_holds_directory: false,
        source,
    })
}

fn safe_path(path: &Path, place: String) -> Result<SafePath, BlockError> {
    let refused = |error| BlockError::FileName { path: path.to_owned(), source: Some(error) };
    SafePath::new(place).map_err(refused)
}

/// The last component of a path, also of one that ends in `.` or `..`.
fn file_name(path: &Path) -> Result<String, BlockError> {
    let unnamed = || BlockError::FileName { path: path.to_owned(), source: None };
    let name = match path.file_name() {
        Some(name) => name.to_owned(),
        None => {
            let path = path.canonicalize().map_err(read_error(path))?;
            path.file_name().ok_or_else(unnamed)?.to_owned()
        }
    };
    name.into_string().map_err(|_| unnamed())
}

/// A path of the host, as text.
pub(crate) fn host_path(path: &Path) -> Result<String, BlockError> {
    if !path.is_absolute() {
        return Err(BlockError::RelativeHostPath { path: path.to_owned() });
    }
    let unnamed = || BlockError::FileName { path: path.to_owned(), source: None };
    path.to_str().map(str::to_owned).ok_or_else(unnamed)
}

fn metadata(what: &'static str, path: &Path) -> Result<fs::Metadata, BlockError> {
    fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            let directory = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("?"));
            BlockError::NotFound { what, path: path.to_owned(), directory }
        }
        _ => BlockError::Read { path: path.to_owned(), source },
    })
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> BlockError + '_ {
    |source| BlockError::Read { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_followed_only_inside_its_directory() {
        let target = |place, target: &str| link_target("d", place, Path::new(target));
        assert_eq!(target("d/a/link", "../b/file").as_deref(), Some("d/b/file"));
        assert_eq!(target("d/link", "./file").as_deref(), Some("d/file"));
        assert_eq!(target("d/link", "../d/file"), None);
        assert_eq!(target("d/link", "../other"), None);
        assert_eq!(target("d/link", "/etc/passwd"), None);
        assert_eq!(target("d/a/link", "../../../x"), None);
    }
}
