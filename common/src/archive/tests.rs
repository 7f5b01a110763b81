//! Archives there and back.

mod hostile;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use rustix::fs::{CWD, Mode, mknodat};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::{
    header::{BLOCK_BYTES, Entry, Kind, encode},
    *,
};
use crate::{limits, text};

struct Task {
    dir: TempDir,
}

impl Task {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("output")).unwrap();
        fs::create_dir(dir.path().join("home")).unwrap();
        Self { dir }
    }

    fn output(&self) -> PathBuf {
        self.dir.path().join("output")
    }

    fn whiteboard(&self) -> PathBuf {
        self.dir.path().join("whiteboard")
    }

    fn archive(&self) -> PathBuf {
        self.dir.path().join("archive.tar")
    }

    fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    fn pack(&self) -> Option<Packed> {
        pack(&self.output(), &self.whiteboard(), &self.archive()).unwrap()
    }

    fn extract(&self, info: &crate::outcome::ArchiveInfo, piece: usize) -> Extracted {
        let mut extractor = Extractor::new(self.home()).unwrap();
        for piece in fs::read(self.archive()).unwrap().chunks(piece) {
            extractor.write(piece).unwrap();
        }
        extractor.finish(info.size_bytes, &info.sha256).unwrap()
    }
}

/// Everything below a directory: path to (mode, content or link target).
fn snapshot(root: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(root).unwrap().to_owned();
            let content = if meta.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if meta.is_dir() {
                directories.push(path.clone());
                b"/".to_vec()
            } else {
                fs::read(&path).unwrap()
            };
            let mode = if meta.is_symlink() { 0 } else { meta.permissions().mode() & 0o111 };
            found.insert(name, (mode, content));
        }
    }
    found
}

#[test]
fn nothing_left_makes_no_archive() {
    let task = Task::new();
    assert_eq!(task.pack(), None);
    assert!(!task.archive().exists());
    fs::write(task.whiteboard(), "").unwrap();
    assert_eq!(task.pack(), None);
    fs::remove_dir(task.output()).unwrap();
    assert_eq!(task.pack(), None, "a block may remove its output directory");
}

#[test]
fn results_come_home_as_they_were() {
    let task = Task::new();
    let output = task.output();
    let long = "n".repeat(120);
    fs::create_dir_all(output.join("a/b/c").join(&long)).unwrap();
    fs::write(output.join("a/b/c").join(&long).join(&long), "deep").unwrap();
    fs::write(output.join("empty"), "").unwrap();
    fs::write(output.join("tool"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(output.join("tool"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::write(output.join("a/512"), [1; 512]).unwrap();
    fs::write(output.join("a/513"), [2; 513]).unwrap();
    fs::write(output.join("large"), vec![3; 700_000]).unwrap();
    fs::write(output.join("line\nbreak ü"), "x").unwrap();
    symlink("../empty", output.join("a/link")).unwrap();
    symlink(format!("b/c/{long}/{long}"), output.join("a/long link")).unwrap();
    fs::write(task.whiteboard(), "8.2 Gbit/s").unwrap();

    let packed = task.pack().unwrap();
    assert_eq!(packed.skipped, Vec::<String>::new());
    assert_eq!(packed.info.size_bytes, fs::metadata(task.archive()).unwrap().len());
    assert!(packed.info.inline.is_empty(), "too large to travel with the record");
    let extracted = task.extract(&packed.info, 1000);
    assert!(extracted.whiteboard && extracted.data);
    assert_eq!(snapshot(&task.home().join("data")), snapshot(&output));
    assert_eq!(fs::read(task.home().join("whiteboard")).unwrap(), b"8.2 Gbit/s");
    assert_eq!(fs::metadata(task.home().join("data/tool")).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(fs::read_dir(task.home()).unwrap().count(), 2, "nothing but results is in place");
}

#[test]
fn a_small_archive_travels_with_the_record_and_is_readable_by_others() {
    let task = Task::new();
    fs::create_dir(task.output().join("d".repeat(90))).unwrap();
    fs::write(task.output().join("d".repeat(90)).join("f".repeat(60)), "split name").unwrap();
    fs::write(task.output().join("f".repeat(200)), "pax name").unwrap();
    let packed = task.pack().unwrap();
    assert_eq!(packed.info.inline, fs::read(task.archive()).unwrap());
    assert_eq!(packed.info.sha256, text::hex(&Sha256::digest(&packed.info.inline)));
    let mut reader = tar::Archive::new(&*packed.info.inline);
    let names: Vec<String> =
        reader.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect();
    let (d, f, long) = ("d".repeat(90), "f".repeat(60), "f".repeat(200));
    assert_eq!(names, ["data/", &format!("data/{d}/"), &format!("data/{d}/{f}"), &format!("data/{long}")]);
}

#[test]
fn what_cannot_travel_is_left_out_by_name() {
    let task = Task::new();
    let output = task.output();
    fs::write(output.join("kept"), "x").unwrap();
    mknodat(CWD, output.join("fifo"), rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(output.join("socket")).unwrap();
    symlink("/etc/passwd", output.join("absolute")).unwrap();
    symlink("../../x", output.join("up")).unwrap();
    symlink("kept/../../../x", output.join("hidden up")).unwrap();
    fs::create_dir_all(output.join((0..70).map(|_| "d/").collect::<String>())).unwrap();
    symlink("/dev/zero", task.whiteboard()).unwrap();
    let packed = task.pack().unwrap();
    let told = packed.skipped.join("\n");
    for line in [
        "data/fifo: a fifo",
        "data/socket: a socket",
        "data/absolute: a link that leaves the directory (to /etc/passwd)",
        "data/up: a link that leaves",
        "data/hidden up: a link that leaves",
        "deeper than 64 directories",
        "whiteboard: not a regular file",
    ] {
        assert!(told.contains(line), "{line} in\n{told}");
    }
    assert_eq!(task.extract(&packed.info, 4096).entries, 2 + 63, "data, kept, and what is not too deep");
}

#[test]
#[ignore = "needs root: it alone can mount"]
fn mounts_are_not_entered() {
    let task = Task::new();
    let shown = task.dir.path().join("shown");
    fs::create_dir(&shown).unwrap();
    fs::write(shown.join("secret"), "x").unwrap();
    fs::create_dir(task.output().join("bind")).unwrap();
    fs::write(task.output().join("file"), "x").unwrap();
    rustix::mount::mount_bind(&shown, task.output().join("bind")).unwrap();
    rustix::mount::mount_bind(shown.join("secret"), task.output().join("file")).unwrap();
    let packed = task.pack().unwrap();
    crate::tree::remove_tree(&task.output()).unwrap();
    assert_eq!(packed.skipped, ["data/bind: on another file system", "data/file: on another file system"]);
    assert!(shown.join("secret").exists());
}

#[test]
fn an_output_directory_that_became_a_link_is_not_followed() {
    let task = Task::new();
    fs::remove_dir(task.output()).unwrap();
    symlink("/etc", task.output()).unwrap();
    let packed = task.pack().unwrap();
    assert_eq!(packed.skipped, ["data: the output directory was replaced by something else"]);
    assert_eq!(task.extract(&packed.info, 4096), Extracted::default());
}

#[test]
fn a_whiteboard_is_cut_at_its_bound() {
    let task = Task::new();
    fs::write(task.whiteboard(), vec![b'w'; 2 << 20]).unwrap();
    let packed = task.pack().unwrap();
    assert_eq!(packed.skipped, ["whiteboard: cut at 1 MiB"]);
    task.extract(&packed.info, 1 << 20);
    assert_eq!(fs::metadata(task.home().join("whiteboard")).unwrap().len(), limits::WHITEBOARD_BYTES_MAX);
}

#[test]
fn many_that_are_left_out_are_counted() {
    let task = Task::new();
    for number in 0..100 {
        symlink("/x", task.output().join(format!("{number:03}"))).unwrap();
    }
    let packed = task.pack().unwrap();
    assert_eq!(packed.skipped.len(), limits::SKIPPED_COUNT_MAX);
    assert_eq!(packed.skipped.last().unwrap(), "and 37 more");
}

#[test]
fn a_place_that_is_taken_is_not_overwritten() {
    let task = Task::new();
    fs::write(task.output().join("file"), "new").unwrap();
    fs::write(task.whiteboard(), "new").unwrap();
    let packed = task.pack().unwrap();
    fs::write(task.home().join("whiteboard"), "old").unwrap();
    let mut extractor = Extractor::new(task.home()).unwrap();
    extractor.write(&packed.info.inline).unwrap();
    let error = extractor.finish(packed.info.size_bytes, &packed.info.sha256).unwrap_err();
    assert!(matches!(error, ExtractError::Occupied { .. }), "{error}");
    assert_eq!(fs::read(task.home().join("whiteboard")).unwrap(), b"old");
    assert_eq!(fs::read_dir(task.home()).unwrap().count(), 1, "nothing else is in place");
}

// Archives by hand.

fn file(path: &str, content: &[u8]) -> Vec<u8> {
    let kind = Kind::File { executable: false };
    let mut out = entry(path, kind, content.len() as u64, "");
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(BLOCK_BYTES), 0);
    out
}

fn dir(path: &str) -> Vec<u8> {
    entry(path, Kind::Directory, 0, "")
}

fn link(path: &str, target: &str) -> Vec<u8> {
    entry(path, Kind::Symlink, 0, target)
}

fn entry(path: &str, kind: Kind, size: u64, link: &str) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&Entry { path: path.into(), kind, size, link: link.into() }, &mut out);
    out
}

fn end() -> Vec<u8> {
    vec![0; 2 * BLOCK_BYTES]
}

/// Changes bytes of the last header of `entry` and makes its checksum right again.
fn changed(mut entry: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    entry[at..at + bytes.len()].copy_from_slice(bytes);
    entry[148..156].copy_from_slice(b"        ");
    let sum: u32 = entry[..BLOCK_BYTES].iter().map(|&byte| u32::from(byte)).sum();
    entry[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    entry
}

fn typed(flag: u8) -> Vec<u8> {
    changed(file("data/x", b""), 156, &[flag])
}

fn pax(records: &str) -> Vec<u8> {
    let mut out = changed(file("x", records.as_bytes()), 156, b"x");
    out.resize(out.len().next_multiple_of(BLOCK_BYTES), 0);
    out
}

fn record(key: &str, value: &str) -> String {
    let rest = key.len() + value.len() + 3;
    let length = (rest..).find(|length| *length == rest + length.to_string().len()).unwrap();
    format!("{length} {key}={value}\n")
}

/// Gives an archive to an extractor in pieces and tells why it was refused.
fn refusal(archive: &[u8], piece: usize) -> String {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("target");
    fs::create_dir(&target).unwrap();
    let mut extractor = Extractor::new(&target).unwrap();
    let written = archive.chunks(piece).try_for_each(|piece| extractor.write(piece));
    let sha256 = text::hex(&Sha256::digest(archive));
    let error = written.and_then(|()| extractor.finish(archive.len() as u64, &sha256).map(drop)).unwrap_err();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0, "nothing is left in place");
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "nothing is left beside it");
    match error {
        ExtractError::Refused { refusal, .. } => refusal.to_string(),
        other => other.to_string(),
    }
}

fn trees() -> impl Strategy<Value = Vec<(Vec<String>, Option<Vec<u8>>)>> {
    let component = prop_oneof![4 => "[a-c]", 1 => "[a-zü .\\n-]{1,12}x", 1 => "z{90,130}"];
    let path = prop::collection::vec(component, 1..5);
    let content = prop::option::of(prop::collection::vec(any::<u8>(), 0..1500));
    prop::collection::vec((path, content), 0..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_home_as_it_was(tree in trees(), piece in 1_usize..3000, note in "[ -~]{0,40}") {
        let task = Task::new();
        for (path, content) in &tree {
            let path = task.output().join(path.join("/"));
            match content {
                // What is in the way of another entry of the tree is simply not made.
                None => drop(fs::create_dir_all(path)),
                Some(content) => {
                    if fs::create_dir_all(path.parent().unwrap()).is_ok() && !path.exists() {
                        fs::write(path, content).unwrap();
                    }
                }
            }
        }
        fs::write(task.whiteboard(), &note).unwrap();
        let before = snapshot(&task.output());
        match task.pack() {
            None => prop_assert!(before.is_empty() && note.is_empty()),
            Some(packed) => {
                task.extract(&packed.info, piece);
                if !before.is_empty() {
                    prop_assert_eq!(snapshot(&task.home().join("data")), before);
                }
                if !note.is_empty() {
                    prop_assert_eq!(fs::read(task.home().join("whiteboard")).unwrap(), note.as_bytes());
                }
                fs::remove_file(task.archive()).unwrap();
                let again = task.pack().unwrap();
                prop_assert_eq!(again.info, packed.info, "the same results are the same bytes");
            }
        }
    }

    #[test]
    fn no_bytes_make_the_extractor_panic_or_leave_anything(
        noise in prop::collection::vec((0_usize..4096, any::<u8>()), 0..6),
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut archive = [dir("data"), file("data/x", b"content"), link("data/l", "x"), file(&format!("data/{}", "y".repeat(200)), b"1")].concat();
        for (at, byte) in noise {
            let length = archive.len();
            archive[at % length] = byte;
        }
        archive.extend(bytes);
        let home = tempfile::tempdir().unwrap();
        let mut extractor = Extractor::new(home.path()).unwrap();
        let _outcome = archive.chunks(77).try_for_each(|piece| extractor.write(piece));
        drop(extractor);
        prop_assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }
}

/// Prints what packing and extracting cost beside `tar`:
/// `cargo test --release -p millstream-common archive_speed -- --ignored --nocapture`.
#[test]
#[ignore = "measures; run it alone, in release"]
#[expect(clippy::disallowed_methods, reason = "measures real time")]
fn archive_speed() {
    for (files, bytes) in [(10_000, 4096), (1, 1 << 28)] {
        let (mut ours, mut theirs) = (f64::MAX, f64::MAX);
        for _round in 0..3 {
            let task = Task::new();
            for number in 0..files {
                let directory = task.output().join(format!("{}", number / 1000));
                fs::create_dir_all(&directory).unwrap();
                fs::write(directory.join(format!("{number}")), vec![b'x'; bytes]).unwrap();
            }
            let start = std::time::Instant::now();
            let packed = task.pack().unwrap();
            let packing = start.elapsed();
            let mut extractor = Extractor::new(task.home()).unwrap();
            let archive = fs::File::open(task.archive()).unwrap();
            let (mut piece, mut at) = (vec![0; limits::CHUNK_BYTES], 0);
            loop {
                let count = rustix::io::pread(&archive, &mut piece, at).unwrap();
                if count == 0 {
                    break;
                }
                at += count as u64;
                extractor.write(&piece[..count]).unwrap();
            }
            extractor.finish(packed.info.size_bytes, &packed.info.sha256).unwrap();
            let all = start.elapsed();
            ours = ours.min(all.as_secs_f64());
            fs::create_dir(task.dir.path().join("tar")).unwrap();
            let start = std::time::Instant::now();
            let script = "tar -C output -cf - . | tar -C tar -xf -";
            let status = std::process::Command::new("sh")
                .args(["-c", script])
                .current_dir(task.dir.path())
                .status()
                .unwrap();
            assert!(status.success());
            theirs = theirs.min(start.elapsed().as_secs_f64());
            println!("{files} x {bytes}: pack {packing:?}, all {all:?}, tar|tar {:?}", start.elapsed());
        }
        println!("{files} x {bytes}: ours {ours:.3} s, tar|tar {theirs:.3} s, ratio {:.2}", ours / theirs);
    }
}
