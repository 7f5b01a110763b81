//! Workspaces that are made, packed and removed.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    time::Duration,
};

use bytes::Bytes;
use millstream_common::{
    id::{BlockName, StreamName},
    limits,
    spec::{BlobDigest, Expectation, FailurePolicy, ResourceLimits},
};

use super::*;
use crate::supervisor::spares::Spares;

struct Host {
    dir: tempfile::TempDir,
    blobs: Blobs,
    spares: Spares,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path().join("blobs")).unwrap();
        Self { dir, blobs, spares: Spares::default() }
    }

    fn task(&self) -> PathBuf {
        self.dir.path().join("tasks/one")
    }

    fn create(&self, spec: &TaskSpec) -> Result<Workspace, WorkspaceError> {
        let has_spare = self.spares.claim(&self.task());
        Workspace::create(&self.task(), spec, &[], &self.blobs, has_spare, None)
    }

    fn put(&self, content: &[u8]) -> BlobDigest {
        let digest = BlobDigest::of(content);
        let mut blob = self.blobs.begin(digest, content.len() as u64).unwrap();
        blob.write(content).unwrap();
        blob.finish().unwrap();
        digest
    }
}

fn spec(files: Vec<ShippedFile>) -> TaskSpec {
    TaskSpec {
        stream: StreamName::new("s").unwrap(),
        name: BlockName::new("b").unwrap(),
        stream_number: 1,
        test_number: 1,
        files,
        phases: Vec::new(),
        environment: BTreeMap::new(),
        working_directory: String::new(),
        user: None,
        limits: ResourceLimits::default(),
        grace: Duration::ZERO,
        log_head_bytes: limits::LOG_HEAD_BYTES,
        log_tail_bytes: limits::LOG_TAIL_BYTES,
        expectation: Expectation::Pass,
        failure_policy: FailurePolicy::Continue,
        hold: false,
    }
}

fn shipped(path: &str, source: FileSource) -> ShippedFile {
    ShippedFile {
        path: SafePath::new(path).unwrap(),
        place: FilePlace::Work,
        mode: 0o644,
        environment_name: None,
        environment_holds_directory: false,
        source,
    }
}

fn inline(path: &str) -> ShippedFile {
    shipped(path, FileSource::Inline(Bytes::from_static(b"inline")))
}

fn link(path: &str, target: &str) -> ShippedFile {
    shipped(path, FileSource::Link(SafePath::new(target).unwrap()))
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_task_without_files_has_two_empty_directories_and_leaves_nothing() {
    let host = Host::new();
    let workspace = host.create(&spec(Vec::new())).unwrap();
    assert_eq!(fs::read_dir(host.task()).unwrap().count(), 2);
    assert_eq!(workspace.working_directory(), workspace.work());
    assert_eq!(workspace.seal_and_pack().unwrap(), None);
    workspace.clear().unwrap();
    assert_eq!(fs::read_dir(host.task()).unwrap().count(), 0);
    workspace.remove().unwrap();
    workspace.remove().unwrap();
    assert!(!host.task().exists());
}

#[test]
fn the_directory_of_a_trivial_task_serves_the_next_one() {
    let host = Host::new();
    drop(host.create(&spec(Vec::new())).unwrap());
    let before = fs::metadata(host.task().join("work")).unwrap().ino();
    host.spares.retire(&host.task()).unwrap();
    assert!(!host.task().exists());
    let workspace = host.create(&spec(vec![inline("a")])).unwrap();
    assert_eq!(fs::metadata(workspace.work()).unwrap().ino(), before);
    host.spares.retire(&host.task()).unwrap();
    assert_eq!(fs::read_dir(host.dir.path().join("tasks")).unwrap().count(), 0, "it had a file: it is gone");
}

#[test]
fn a_workspace_that_is_there_is_neither_used_nor_cleared() {
    let host = Host::new();
    let first = host.create(&spec(vec![inline("a")])).unwrap();
    let error = host.create(&spec(Vec::new())).unwrap_err();
    assert_eq!(error.reason(), Reason::StateCorrupt, "{error}");
    assert!(first.work().join("a").exists());
}

#[test]
fn files_of_every_source_are_put_in_place() {
    let host = Host::new();
    let digest = host.put(b"#!/bin/sh\necho tool\n");
    let on_host = host.dir.path().join("data set");
    fs::create_dir(&on_host).unwrap();
    fs::write(on_host.join("x"), "on the host").unwrap();
    let mut tool = shipped("bin/tool", FileSource::Blob(digest));
    tool.mode = 0o755;
    let mut secret = inline("keys/secret");
    (secret.place, secret.mode) = (FilePlace::Private, 0o600);
    let mut open = inline("lib/a/open");
    open.mode = 0o666;
    let files = vec![
        tool,
        shipped("lib/data", FileSource::Blob(digest)),
        open,
        shipped("lib/a/set", FileSource::HostPath(on_host.to_str().unwrap().to_owned())),
        link("lib/a/b/also", "lib/data"),
    ];
    let workspace =
        Workspace::create(&host.task(), &spec(files), &[secret], &host.blobs, false, None).unwrap();
    let work = workspace.work();
    assert_eq!(mode(&work.join("bin/tool")), 0o555);
    assert_eq!(mode(&work.join("lib/data")), 0o644);
    assert_eq!(mode(&work.join("lib/a/open")), 0o666, "whatever the umask is");
    assert_eq!(fs::read(work.join("lib/a/set/x")).unwrap(), b"on the host");
    assert_eq!(fs::read(work.join("lib/a/b/also")).unwrap(), b"#!/bin/sh\necho tool\n");
    assert_eq!(mode(workspace.private()), 0o700);
    assert_eq!(mode(&workspace.private().join("keys/secret")), 0o600);
    workspace.remove().unwrap();
    assert!(on_host.join("x").exists(), "what a link points to stays");
    assert!(host.blobs.contains(&digest));
}

#[test]
fn what_cannot_be_put_in_place_is_told_by_name_and_leaves_nothing() {
    let host = Host::new();
    let missing = BlobDigest::of(b"missing");
    let host_path = |path: &str| FileSource::HostPath(path.to_owned());
    let cases: Vec<(Vec<ShippedFile>, &str, Reason)> = vec![
        (
            vec![inline("a"), inline("a/b")],
            "`a` on its way was shipped as a file or a link",
            Reason::FileRefused,
        ),
        (
            vec![inline("d/x"), link("l", "d"), inline("l/y")],
            "`l` on its way was shipped",
            Reason::FileRefused,
        ),
        (
            vec![shipped("l", host_path("/etc")), inline("l/y")],
            "`l` on its way was shipped",
            Reason::FileRefused,
        ),
        (vec![inline("a/b"), inline("a")], "another shipped file has that name", Reason::FileRefused),
        (vec![link("a", "b"), inline("a")], "another shipped file has that name", Reason::FileRefused),
        (
            vec![shipped("m", FileSource::Blob(missing))],
            "failed to put the shipped file `m`",
            Reason::FileRefused,
        ),
        (
            vec![shipped("h", host_path("/no/such"))],
            "`/no/such`, which the block uses as `h`",
            Reason::FileRefused,
        ),
    ];
    for (files, expected, reason) in cases {
        let error = host.create(&spec(files)).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert_eq!(error.reason(), reason);
        assert_eq!(fs::read_dir(host.task()).unwrap().count(), 0);
    }
    let mut elsewhere = spec(Vec::new());
    elsewhere.working_directory = "/no/such".to_owned();
    let error = host.create(&elsewhere).unwrap_err();
    assert!(error.to_string().contains("working directory `/no/such`"), "{error}");
}

#[test]
fn the_working_directory_may_be_below_or_elsewhere() {
    let host = Host::new();
    let mut below = spec(vec![inline("a/b")]);
    below.working_directory = "a".to_owned();
    assert_eq!(host.create(&below).unwrap().working_directory(), host.task().join("work/a"));
    remove_task(&host.task()).unwrap();
    below.working_directory = "/".to_owned();
    assert_eq!(host.create(&below).unwrap().working_directory(), Path::new("/"));
}

#[test]
fn variables_tell_where_files_are() {
    let host = Host::new();
    let named = |path: &str, place, holds_directory, name: &str| ShippedFile {
        place,
        environment_name: Some(name.to_owned()),
        environment_holds_directory: holds_directory,
        ..inline(path)
    };
    let mut spec = spec(vec![
        named("params.json", FilePlace::Private, false, "MILLSTREAM_PARAMS"),
        named("py/a.py", FilePlace::Work, true, "PYTHONPATH"),
        named("py/b.py", FilePlace::Work, true, "PYTHONPATH"),
        named("lib/c.py", FilePlace::Private, true, "PYTHONPATH"),
        named("d/e", FilePlace::Work, true, "EMPTY"),
    ]);
    spec.environment.insert("PYTHONPATH".to_owned(), "/given".to_owned());
    spec.environment.insert("EMPTY".to_owned(), String::new());
    let workspace = host.create(&spec).unwrap();
    let task = host.task().display().to_string();
    let expected = [
        ("MILLSTREAM_PARAMS", format!("{task}/private/params.json")),
        ("PYTHONPATH", format!("{task}/work/py:{task}/private/lib:/given")),
        ("EMPTY", format!("{task}/work/d")),
    ];
    assert_eq!(workspace.variables(), expected.map(|(name, value)| (name.to_owned(), value)));
}

#[test]
fn what_is_left_is_packed_and_then_cleared() {
    let host = Host::new();
    let workspace = host.create(&spec(vec![inline("a")])).unwrap();
    fs::write(workspace.output().join("result"), "42").unwrap();
    symlink("/etc/passwd", workspace.output().join("link")).unwrap();
    fs::write(workspace.whiteboard(), "note").unwrap();
    let packed = workspace.seal_and_pack().unwrap().unwrap();
    assert_eq!(packed.skipped.len(), 1);
    assert_eq!(packed.info.inline, fs::read(workspace.archive()).unwrap());
    workspace.clear().unwrap();
    let left: Vec<_> = fs::read_dir(host.task()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["archive.tar"]);
}

#[test]
#[ignore = "needs root: it alone can give files away"]
fn another_user_gets_what_it_may_write_to() {
    let host = Host::new();
    let owner = Owner { uid: 65534, gid: 65534 };
    let mut private = inline("sub/p");
    (private.place, private.mode) = (FilePlace::Private, 0o600);
    let spec = spec(vec![inline("dir/file"), private]);
    let workspace = Workspace::create(&host.task(), &spec, &[], &host.blobs, false, Some(owner)).unwrap();
    for path in ["work", "work/dir", "work/dir/file", "output", "private", "private/sub/p", "whiteboard"] {
        let meta = fs::symlink_metadata(host.task().join(path)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (65534, 65534), "{path}");
    }
    assert_eq!(mode(&host.task()), 0o711);
    assert_eq!(workspace.seal_and_pack().unwrap(), None, "a whiteboard that nobody wrote on is none");
    workspace.remove().unwrap();
}
