//! Archives there and back, and archives that nobody honest would send.

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

#[test]
fn hostile_archives_are_refused_by_name() {
    let long = "x".repeat(256);
    let deep = format!("data/{}", "d/".repeat(64));
    let many_bytes = changed(file("data/x", b""), 124, b"77777777777\0");
    let sparse = pax(&record("GNU.sparse.major", "1"));
    let d = || dir("data");
    let cases: Vec<(&str, Vec<Vec<u8>>, &str)> = vec![
        ("absolute path", vec![file("/etc/x", b"x")], "its name is absolute"),
        (
            "absolute path by PAX",
            vec![pax(&record("path", "/etc/x")), file("data/x", b"")],
            "its name is absolute",
        ),
        ("parent at the beginning", vec![file("../x", b"x")], "empty component, a `.` or a `..`"),
        ("parent in the middle", vec![d(), file("data/../../x", b"x")], "empty component, a `.` or a `..`"),
        ("parent at the end", vec![d(), dir("data/..")], "empty component, a `.` or a `..`"),
        ("parent by PAX", vec![d(), pax(&record("path", "data/../x")), file("y", b"")], "a `..`"),
        ("dot", vec![dir(".")], "empty component, a `.` or a `..`"),
        ("dot inside", vec![d(), file("data/./x", b"")], "empty component, a `.` or a `..`"),
        ("doubled slash", vec![d(), file("data//x", b"")], "empty component"),
        ("file with a slash behind it", vec![d(), file("data/x/", b"")], "empty component"),
        ("empty name", vec![file("", b"")], "its name is empty"),
        ("empty name by PAX", vec![pax("8 path=\n"), file("x", b"")], "its PAX header is malformed"),
        ("NUL by PAX", vec![d(), pax(&record("path", "data/a\0b")), file("x", b"")], "its name holds a NUL"),
        (
            "bytes behind a name's NUL",
            vec![d(), changed(file("data/x", b""), 50, b"evil")],
            "bytes behind its name",
        ),
        (
            "bytes behind a prefix's NUL",
            vec![d(), changed(file("data/x", b""), 400, b"e")],
            "bytes behind its name's prefix",
        ),
        (
            "bytes behind the header",
            vec![d(), changed(file("data/x", b""), 505, b"e")],
            "bytes behind its header",
        ),
        ("component too long", vec![d(), file(&format!("data/{long}"), b"")], "too long"),
        ("path too long", vec![d(), file(&format!("data/{}", "y/".repeat(2100)), b"")], "too long"),
        ("too deep", vec![d(), file(&format!("{deep}x"), b"")], "deeper than 64"),
        ("file twice", vec![d(), file("data/x", b"1"), file("data/x", b"2")], "its name stands twice"),
        ("directory twice", vec![d(), d()], "its name stands twice"),
        ("file, then directory", vec![d(), file("data/x", b""), dir("data/x")], "its name stands twice"),
        ("directory, then file", vec![d(), dir("data/x"), file("data/x", b"")], "its name stands twice"),
        (
            "link, then file of the same name",
            vec![d(), link("data/l", "x"), file("data/l", b"")],
            "stands twice",
        ),
        ("whiteboard twice", vec![file("whiteboard", b""), file("whiteboard", b"")], "its name stands twice"),
        ("through a link", vec![d(), link("data/l", "."), file("data/l/x", b"")], "is a file or a link"),
        ("through a file", vec![d(), file("data/f", b""), file("data/f/x", b"")], "is a file or a link"),
        ("without its directory", vec![d(), file("data/a/x", b"")], "directory is not in the archive"),
        ("without data", vec![file("data/x", b"")], "directory is not in the archive"),
        ("another place", vec![file("stdout", b"")], "`whiteboard` and `data` alone"),
        ("below the whiteboard", vec![file("whiteboard/x", b"")], "`whiteboard` and `data` alone"),
        ("data as a file", vec![file("data", b"")], "wrong type or size"),
        ("data as a link", vec![link("data", "x")], "wrong type or size"),
        ("whiteboard as a link", vec![link("whiteboard", "data")], "wrong type or size"),
        ("whiteboard as a directory", vec![dir("whiteboard")], "wrong type or size"),
        (
            "whiteboard too large",
            vec![entry("whiteboard", Kind::File { executable: false }, 2 << 20, "")],
            "wrong type or size",
        ),
        ("hard link", vec![d(), changed(typed(b'1'), 157, b"data/y")], "it is a hard link"),
        ("character device", vec![d(), typed(b'3')], "it is a character device"),
        ("block device", vec![d(), typed(b'4')], "it is a block device"),
        ("fifo", vec![d(), typed(b'6')], "it is a fifo"),
        ("contiguous file", vec![d(), typed(b'7')], "it is a contiguous file"),
        ("global PAX header", vec![typed(b'g')], "it is a global PAX header"),
        ("GNU long name", vec![typed(b'L')], "it is a GNU long name"),
        ("GNU long link", vec![typed(b'K')], "it is a GNU long name"),
        ("GNU sparse file", vec![typed(b'S')], "it is a GNU sparse file"),
        ("GNU volume", vec![typed(b'V')], "it is a GNU extension"),
        ("sparse file by PAX", vec![d(), sparse, file("data/x", b"")], "has the key `GNU.sparse.major`"),
        ("other PAX key", vec![pax(&record("mtime", "1")), d()], "has the key `mtime`"),
        ("unknown type", vec![d(), typed(b'Z')], "its type 0x5a is unknown"),
        ("old format type", vec![d(), typed(0)], "it is of the old format"),
        ("old magic", vec![changed(d(), 257, b"ustar  \0")], "not in the ustar format"),
        ("no magic", vec![changed(d(), 257, &[0; 8])], "not in the ustar format"),
        (
            "wrong checksum",
            vec![{
                let mut bad = d();
                bad[0] ^= 1;
                bad
            }],
            "does not match its checksum",
        ),
        ("garbage", vec![vec![0xA5; 4096]], "does not match its checksum"),
        (
            "size in base 256",
            vec![d(), changed(file("data/x", b""), 124, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])],
            "its size is not an octal number",
        ),
        (
            "negative size",
            vec![d(), changed(file("data/x", b""), 124, b"-0000000001\0")],
            "its size is not an octal number",
        ),
        ("two sizes", vec![d(), pax(&record("size", "9")), file("data/x", b"1")], "different sizes"),
        (
            "signed PAX size",
            vec![d(), pax(&record("size", "+9")), file("data/x", b"1")],
            "its size is not an octal number",
        ),
        (
            "larger than the bound",
            vec![d(), pax(&record("size", "99999999999999")), file("data/x", b"")],
            "larger than 64 GiB",
        ),
        ("many large files", vec![d(), many_bytes], "in the middle of an entry"),
        ("directory with content", vec![changed(d(), 124, b"00000000001\0")], "its type has none"),
        (
            "link with content",
            vec![d(), changed(link("data/l", "x"), 124, b"00000001000\0")],
            "its type has none",
        ),
        (
            "file with a link target",
            vec![d(), changed(file("data/x", b""), 157, b"y")],
            "without being a link",
        ),
        ("link to the root", vec![d(), link("data/l", "/")], "leaves `data`"),
        ("link to an absolute path", vec![d(), link("data/l", "/etc/passwd")], "leaves `data`"),
        ("link to the parent", vec![d(), link("data/l", "..")], "leaves `data`"),
        ("link to the whiteboard", vec![d(), link("data/l", "../whiteboard")], "leaves `data`"),
        (
            "link up too far from below",
            vec![d(), dir("data/a"), link("data/a/l", "../../x")],
            "leaves `data`",
        ),
        (
            "link up through another link",
            vec![d(), link("data/a", "b/c"), link("data/l", "a/../../../x")],
            "leaves `data`",
        ),
        ("link up behind a name", vec![d(), dir("data/a"), link("data/l", "a/..")], "leaves `data`"),
        ("empty link", vec![d(), link("data/l", "")], "leaves `data`"),
        ("link target too long", vec![d(), link("data/l", &"a/".repeat(2100))], "leaves `data`"),
        ("PAX header without a newline", vec![pax("11 path=ab_"), d()], "PAX header is malformed"),
        ("PAX length beyond the header", vec![pax("99 path=ab\n"), d()], "PAX header is malformed"),
        ("PAX length of zero", vec![pax("0 path=ab\n"), d()], "PAX header is malformed"),
        ("PAX length with a zero before it", vec![pax("011 path=abc\n"), d()], "PAX header is malformed"),
        ("PAX without a key", vec![pax("7 path\n"), d()], "PAX header is malformed"),
        (
            "PAX key twice",
            vec![pax(&(record("path", "a") + &record("path", "b"))), d()],
            "PAX header is malformed",
        ),
        ("empty PAX header", vec![pax(""), d()], "PAX header is malformed"),
        ("huge PAX header", vec![changed(typed(b'x'), 124, b"00007777777\0")], "PAX header is malformed"),
        (
            "two PAX headers",
            vec![pax(&record("path", "data")), pax(&record("path", "data")), d()],
            "not followed by its entry",
        ),
        ("PAX header at the end", vec![pax(&record("path", "data"))], "not followed by its entry"),
        (
            "padding that hides bytes",
            vec![d(), {
                let mut bad = file("data/x", b"1");
                bad[600] = 7;
                bad
            }],
            "padding is not zero",
        ),
        (
            "PAX padding that hides bytes",
            vec![
                {
                    let mut bad = pax(&record("path", "data"));
                    bad[1000] = 7;
                    bad
                },
                d(),
            ],
            "padding is not zero",
        ),
    ];
    assert!(cases.len() >= 80);
    for (name, parts, expected) in &cases {
        let mut archive = parts.concat();
        // The one case that stops in the middle: its bytes would take a day to write.
        if *name != "many large files" {
            archive.extend(end());
        }
        for piece in [usize::MAX >> 1, 512, 100] {
            let refused = refusal(&archive, piece);
            assert!(refused.contains(expected), "{name}: {refused}");
        }
    }
}

#[test]
fn archives_with_a_wrong_end_are_refused() {
    let good = [dir("data"), file("data/x", b"1")].concat();
    for (name, archive, expected) in [
        ("no end", good.clone(), "in the middle of an entry"),
        ("half an end", [good.clone(), vec![0; 512]].concat(), "only half of the end mark"),
        (
            "an entry behind half an end",
            [good.clone(), vec![0; 512], dir("data/y"), end()].concat(),
            "only half",
        ),
        ("three blocks of zeros", [good.clone(), vec![0; 3 * 512]].concat(), "bytes behind the end mark"),
        (
            "an entry behind the end",
            [good.clone(), end(), file("data/y", b"")].concat(),
            "bytes behind the end mark",
        ),
        ("a byte behind the end", [good.clone(), end(), vec![0]].concat(), "bytes behind the end mark"),
        ("cut in a header", good[..300].to_vec(), "in the middle of an entry"),
        ("cut in content", good[..1024 + 1].to_vec(), "in the middle of an entry"),
        ("nothing", Vec::new(), "in the middle of an entry"),
    ] {
        let refused = refusal(&archive, 4096);
        assert!(refused.contains(expected), "{name}: {refused}");
    }
}

#[test]
fn what_is_not_what_was_announced_is_refused() {
    let archive = [dir("data"), file("data/x", b"1"), end()].concat();
    let sha256 = text::hex(&Sha256::digest(&archive));
    for (length, digest) in [(archive.len() as u64 - 1, &*sha256), (archive.len() as u64, &*"0".repeat(64))] {
        let home = tempfile::tempdir().unwrap();
        let mut extractor = Extractor::new(home.path()).unwrap();
        extractor.write(&archive).unwrap();
        let error = extractor.finish(length, digest).unwrap_err();
        assert!(matches!(error, ExtractError::Length { .. } | ExtractError::Digest { .. }), "{error}");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }
}

#[test]
fn after_a_refusal_nothing_more_is_looked_at() {
    let home = tempfile::tempdir().unwrap();
    let mut extractor = Extractor::new(home.path()).unwrap();
    extractor.write(&file("/x", b"")).unwrap_err();
    assert!(matches!(extractor.write(&dir("data")), Err(ExtractError::RefusedBefore)));
    assert!(matches!(extractor.finish(0, ""), Err(ExtractError::RefusedBefore)));
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
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
