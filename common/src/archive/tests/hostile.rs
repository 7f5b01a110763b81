//! Archives by hand, as nobody honest would send them.

use super::*;

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
