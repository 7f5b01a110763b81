//! What blocks become, and every fault in its words.

use std::{error::Error as _, fmt::Write as _, fs, os::unix::fs::PermissionsExt as _, path::Path};

use expect_test::{Expect, expect};

use super::*;
use crate::block::{exec, payload::tests::surroundings, python, script, shell};

/// Phases, environment and files as text; `PATH` stands for the directory of the test.
fn shown(compiled: &Compiled, directory: &Path) -> String {
    let mut text = String::new();
    let spec = &compiled.spec;
    for phase in &spec.phases {
        let limit = phase.timeout.map(|timeout| format!(" within {timeout:?}")).unwrap_or_default();
        let _ = writeln!(text, "{}: {:?}{limit}", phase.phase, phase.argv);
    }
    for (name, value) in &spec.environment {
        let _ = writeln!(text, "{name}={value}");
    }
    let files = spec.files.iter().map(|file| ("", file));
    let secret = compiled.secret_files.iter().map(|file| ("secret ", file));
    for (secret, file) in files.chain(secret) {
        let variable = file.environment_name.as_deref().map(|name| format!(" ${name}")).unwrap_or_default();
        let place = format!("{}:{}", file.place, file.path);
        let _ = match place.as_str() {
            // The library's own, which changes for its own reasons.
            "private:python/millstream.py" => writeln!(text, "{secret}{place}{variable}"),
            _ => writeln!(text, "{secret}{file:?}{variable}"),
        };
    }
    text.replace(directory.to_str().unwrap(), "PATH")
}

fn check_in(directory: &Path, block: &Block, expected: Expect) {
    let text = match block.compile(&surroundings()) {
        Ok(compiled) => shown(&compiled, directory),
        Err(error) => {
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            let here = std::env::current_dir().unwrap();
            format!("{error}{cause}")
                .replace(directory.to_str().unwrap(), "PATH")
                .replace(here.to_str().unwrap(), "HERE")
        }
    };
    expected.assert_eq(&text);
}

fn check(block: &Block, expected: Expect) {
    check_in(Path::new("/nowhere"), block, expected);
}

fn write(path: &Path, content: &str, mode: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn commands_become_phases() {
    check(&exec(["true"]), expect![[r#"
        run: ["true"]
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
    check(
        &shell("iperf3 -s").setup("modprobe x").teardown(["rm", "-r", "cache"]).timeout(Duration::from_secs(9)),
        expect![[r#"
            setup: ["/bin/sh", "-c", "modprobe x"] within 9s
            run: ["/bin/sh", "-c", "iperf3 -s"] within 9s
            teardown: ["rm", "-r", "cache"] within 60s
            private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
            private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
        "#]],
    );
    check(&exec(["prog", "a b"]).wrap(["strace", "-f"]), expect![[r#"
        run: ["strace", "-f", "prog", "a b"]
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
}

#[test]
fn parameters_are_a_file_and_variables_but_secrets_are_a_file_alone() {
    let block = exec(["true"]).param("server-ip", "10.0.0.1").param("parties", 2).param("list", [1, 2]);
    check(&block, expect![[r#"
        run: ["true"]
        MILLSTREAM_PARAM_LIST=[1,2]
        MILLSTREAM_PARAM_PARTIES=2
        MILLSTREAM_PARAM_SERVER_IP=10.0.0.1
        private:params.json 600 from 49 inline bytes $MILLSTREAM_PARAMS
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
    check(&block.secret_param("password", "hunter2"), expect![[r#"
        run: ["true"]
        MILLSTREAM_PARAM_LIST=[1,2]
        MILLSTREAM_PARAM_PARTIES=2
        MILLSTREAM_PARAM_SERVER_IP=10.0.0.1
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
        secret private:params.json 600 from 70 inline bytes $MILLSTREAM_PARAMS
    "#]]);
    let block = exec(["true"]).secret_param("password", "hunter2");
    let compiled = block.compile(&surroundings()).unwrap();
    assert!(!format!("{compiled:?} {block:?}").contains("hunter2"));
}

#[test]
fn a_blocks_own_word_comes_before_the_streams() {
    let mut around = surroundings();
    around.defaults.env = BTreeMap::from([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "1".to_owned())]);
    around.defaults.cwd = Some("/srv".to_owned());
    around.defaults.user = Some("tester".to_owned());
    around.defaults.timeout = Some(Duration::from_secs(5));
    around.defaults.wrap = vec!["nice".to_owned()];
    around.defaults.limits.pids_count = Some(7);
    let limits = ResourceLimits { memory_bytes: Some(1), ..ResourceLimits::default() };
    let block = exec(["true"]).env("B", "2").cwd("/tmp").user("me").timeout(Duration::from_secs(6)).limits(limits);
    let spec = block.compile(&around).unwrap().spec;
    assert_eq!(spec.environment.into_iter().collect::<Vec<_>>(), [("A", "1"), ("B", "2")].map(|(a, b)| (a.to_owned(), b.to_owned())));
    assert_eq!((spec.working_directory.as_str(), spec.user.as_deref()), ("/tmp", Some("me")));
    assert_eq!((spec.limits.memory_bytes, spec.limits.pids_count), (Some(1), Some(7)));
    assert_eq!(spec.phases[0].argv, ["nice", "true"]);
    assert_eq!(spec.phases[0].timeout, Some(Duration::from_secs(6)));
}

#[test]
fn python_and_scripts_are_shipped() {
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("tool.sh"), "#!/bin/sh\n", 0o644);
    let script = script(directory.path().join("tool.sh"));
    check_in(directory.path(), &script, expect![[r#"
        run: ["./tool.sh"]
        work:tool.sh 755 from blob bc1f407a11c9377c8b9b13f956b279c8462775105eb958fc9ae3c40de87cc96e $MILLSTREAM_PROGRAM
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
    check_in(directory.path(), &script.clone().cwd("/tmp"), expect![[r#"
        run: ["/bin/sh", "-c", "exec \"$MILLSTREAM_PROGRAM\" \"$@\"", "sh"]
        work:tool.sh 755 from blob bc1f407a11c9377c8b9b13f956b279c8462775105eb958fc9ae3c40de87cc96e $MILLSTREAM_PROGRAM
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
    let python_script = crate::block::script(directory.path().join("tool"));
    write(&directory.path().join("tool"), "#!/usr/bin/env python3\n", 0o755);
    check_in(directory.path(), &python_script, expect![[r#"
        run: ["./tool"]
        work:tool 755 from blob 4513f933539b81b720c797abfbc157e65c7dba63d61b6625e1f15aaeb20f57f4 $MILLSTREAM_PROGRAM
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:python/millstream.py $PYTHONPATH
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
    check(&python("print(1)").env("PYTHONPATH", "/srv"), expect![[r#"
        run: ["/usr/bin/python3", "__block__.py"]
        PYTHONDONTWRITEBYTECODE=1
        PYTHONPATH=/srv
        PYTHONUNBUFFERED=1
        work:__block__.py 644 from 8 inline bytes $MILLSTREAM_PROGRAM
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:python/millstream.py $PYTHONPATH
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
    check(&shell("cd /srv && python3 -m tool"), expect![[r#"
        run: ["/bin/sh", "-c", "cd /srv && python3 -m tool"]
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:python/millstream.py $PYTHONPATH
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
    check_in(directory.path(), &script.no_copy(), expect![[r#"
        run: ["PATH/tool.sh"]
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
}

#[test]
fn what_is_told_of_many_streams_is_one_file_for_all_blocks() {
    let many = Surroundings { topology: Bytes::from(vec![b'x'; 5_000]).into(), ..surroundings() };
    let upload = |block: Block| {
        let compiled = block.compile(&many).unwrap();
        let [upload] = &compiled.uploads[..] else { panic!("{:?}", compiled.uploads) };
        (upload.digest, upload.size_bytes)
    };
    assert_eq!(upload(exec(["true"])), upload(python("1")));
    assert_eq!(upload(exec(["true"])).1, 5_000);
}

#[test]
fn files_and_directories_are_shipped() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("tree");
    write(&root.join("a/small"), "x", 0o640);
    write(&root.join("a/run"), "#!/bin/sh\n", 0o755);
    write(&root.join("large"), &"y".repeat(70_000), 0o644);
    std::os::unix::fs::symlink("../large", root.join("a/link")).unwrap();
    let block = exec(["true"]).dir(&root);
    check_in(directory.path(), &block, expect![[r#"
        run: ["true"]
        work:tree/a/link 777 from link to tree/large
        work:tree/a/run 755 from blob bc1f407a11c9377c8b9b13f956b279c8462775105eb958fc9ae3c40de87cc96e
        work:tree/a/small 640 from 1 inline bytes
        work:tree/large 644 from blob f68d4cfff79b85f074c7a4fd5deb0d5861e539e3225d59e158762ada3644a86b
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
    assert_eq!(block.compile(&surroundings()).unwrap().uploads.len(), 2);
    check_in(directory.path(), &block.no_copy(), expect![[r#"
        run: ["true"]
        work:tree 644 from host path PATH/tree
        private:params.json 600 from 2 inline bytes $MILLSTREAM_PARAMS
        private:topology.json 600 from 2 inline bytes $MILLSTREAM_TOPOLOGY
    "#]]);
}

#[test]
fn what_cannot_be_shipped_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    write(&path("plain"), "no interpreter\n", 0o755);
    write(&path("a/same"), "1", 0o644);
    write(&path("b/same"), "2", 0o644);
    write(&path("links/x"), "", 0o644);
    std::os::unix::fs::symlink("/etc/passwd", path("links/out")).unwrap();
    write(&path("pipes/x"), "", 0o644);
    rustix::fs::mkfifoat(rustix::fs::CWD, path("pipes/fifo"), rustix::fs::Mode::RUSR).unwrap();
    let check = |block: &Block, expected: Expect| check_in(directory.path(), block, expected);
    check(&script(path("absent.sh")), expect!["script `PATH/absent.sh` does not exist (the current directory is `HERE`)"]);
    check(&script("absent.sh"), expect!["script `absent.sh` does not exist (the current directory is `HERE`)"]);
    check(&script(path("plain")), expect!["script `PATH/plain` does not say what runs it: begin it with a line such as `#!/bin/sh`"]);
    check(&script(path("a")), expect!["`PATH/a` is no script: name the file that is to be executed"]);
    check(&script("tool.sh").no_copy(), expect!["`tool.sh` is used where it is on the host, by `no_copy`: name it by its absolute path"]);
    check(&exec(["true"]).file(path("absent")), expect!["file `PATH/absent` does not exist (the current directory is `HERE`)"]);
    check(&exec(["true"]).file(path("a")), expect!["`PATH/a` is no file: ship a directory with `dir`"]);
    check(&exec(["true"]).dir(path("plain")), expect!["`PATH/plain` is no directory: ship a single file with `file`"]);
    check(&exec(["true"]).file(path("a/same")).file(path("b/same")), expect!["the block ships two files as `same`: rename one"]);
    check(&exec(["true"]).dir(path("links")), expect!["the symbolic link `PATH/links/out` points to `/etc/passwd`, outside of the shipped directory: ship its target instead"]);
    check(&exec(["true"]).dir(path("pipes")), expect!["`PATH/pipes/fifo` is a socket, pipe or device: only files, directories and symbolic links are shipped"]);
    check(&exec(["true"]).file(path("pipes/fifo")), expect!["`PATH/pipes/fifo` is a socket, pipe or device: only files, directories and symbolic links are shipped"]);
    assert!(exec(["true"]).file(path("a/same")).file(path("a/same")).compile(&surroundings()).is_ok());
}

#[test]
fn a_bad_block_is_told_what_is_wrong() {
    check(&exec(Vec::<String>::new()), expect!["the run command of the block is empty: name a program"]);
    check(&exec(["true"]).setup(Vec::<String>::new()), expect!["the setup command of the block is empty: name a program"]);
    check(&exec(["echo", "a\0b"]), expect![[r#"the run command of the block has a NUL character in `a\0b`: the system cannot pass it on"#]]);
    check(&shell("x".repeat(200_000)), expect!["the run command of the block has 200012 bytes: at most 131072 are allowed; ship the text as a file"]);
    check(&exec(["true"]).name("a/b"), expect!["the block cannot have the name it was given: the block name `a/b` has a `/` at byte 1: use letters, digits, `-`, `_` or `.`"]);
    check(&exec(["true"]).joins(["ok", ""]), expect!["the block cannot join a barrier: the barrier name is empty: give it at least one character"]);
    check(&exec(["true"]).env("A=B", ""), expect!["the environment variable `A=B` is refused: a name is not empty, has at most 255 bytes and neither `=` nor NUL"]);
    check(&exec(["true"]).env("A", "\0"), expect!["the value of the environment variable `A` is refused: it has 1 bytes (at most 131072) or holds a NUL"]);
    check(&exec(["true"]).param("map", BTreeMap::from([((1, 2), 3)])), expect!["parameter `map` cannot be given to the block: it cannot be written as JSON: key must be a string"]);
    check(&exec(["true"]).param("a-b", 1).param("a_b", 1), expect!["parameters `a-b` and `a_b` would both be the variable `MILLSTREAM_PARAM_A_B`: rename one"]);
    check(&exec(["true"]).secret_param("key", "x".repeat(70_000)), expect!["the parameters have 70010 bytes: with a secret among them, at most 65536 are allowed"]);
    check(&exec(["true"]).timeout(Duration::from_secs(8 * 86_400)), expect!["the timeout of the block is 192 h 0 min: at most 168 h 0 min is allowed"]);
    check(&exec(["true"]).grace(Duration::from_secs(3_600)), expect!["the grace period of the block is 1 h 0 min: at most 10 min 0 s is allowed"]);
    check(&exec(["true"]).cwd("a\0b"), expect![[r#"the working directory `a\0b` is refused: it holds a NUL or is longer than 4,096 bytes"#]]);
    let no_python = Surroundings { python: None, ..surroundings() };
    let error = python("pass").compile(&no_python).unwrap_err();
    expect!["host here has no Python 3, which this block needs: install the package `python3` there"].assert_eq(&error.to_string());
}
