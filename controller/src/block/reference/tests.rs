//! What references name, and every way in which they name nothing.

use std::{fs, path::Path};

use expect_test::{Expect, expect};

use super::*;
use crate::{block::payload::tests::surroundings, shell};

const NETPERF: &str = r#"
import unittest
import avocado

class NetServer:
    """Serves.

    :millstream: hidden
    """
    def setUp(self): pass
    def test(self): pass

class NetPerf(unittest.TestCase):
    def test_small(self): pass
    def test_large(self): pass
    def helper(self): pass

class Larger(NetPerf):
    def test_huge(self): pass

class Old(avocado.Test):
    """:avocado: disable"""
    def test(self): pass

class Elsewhere(Unknown):
    pass

def test(): pass
"#;

/// Knows a few words; passes on what begins with `again`.
struct Own;

impl Resolver for Own {
    fn name(&self) -> &str {
        "own"
    }

    fn resolve(&self, reference: &BlockReference) -> Resolution {
        match reference.text() {
            "milestone-one" => {
                Resolution::Found(vec![shell("echo one").param("a", 1).env("A", "1").param("b", 1)])
            }
            "milestone-two" => {
                Resolution::Found(vec![shell("echo one"), super::reference("milestone-one").name("second")])
            }
            "milestone-again" => Resolution::Found(vec![super::reference("milestone-again")]),
            "milestone-bad" => Resolution::Refused { reason: "the moon is wrong".to_owned() },
            "milestone-empty" => Resolution::Found(Vec::new()),
            other => Resolution::not_found("not a number", nearest_number(other)),
        }
    }
}

fn nearest_number(text: &str) -> Option<&'static str> {
    millstream_common::text::nearest(text, ["milestone-one", "milestone-two"])
}

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = Self { directory };
        place.write("NetPerf.py", NETPERF);
        place.write("hidden.py", "class A:\n  ':millstream: hidden'\n  def test(self): pass\n");
        place.write("plain.py", "print(1)\n");
        place.write("broken.py", "def x(:\n");
        place.write("tools/load.sh", "#!/bin/sh\n");
        place
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn reference(&self, text: &str) -> Block {
        super::reference(text.replace("PATH", self.directory.path().to_str().unwrap()))
            .resolved_by(&Chain::new(vec![Arc::new(Own)]))
    }

    fn shown(&self, text: &str) -> String {
        let here = std::env::current_dir().unwrap();
        text.replace(self.directory.path().to_str().unwrap(), "PATH").replace(here.to_str().unwrap(), "HERE")
    }

    fn check(&self, text: &str, expected: Expect) {
        let told = match self.reference(text).expand() {
            Ok(blocks) => {
                let told = blocks.iter().map(|block| format!("{}: {:?}\n", block.block_name(), block.kind));
                told.collect::<String>()
            }
            Err(error) => error.to_string(),
        };
        expected.assert_eq(&self.shown(&told));
    }

    fn compiled(&self, block: &Block) -> String {
        match block.compile(&surroundings()) {
            Ok(compiled) => {
                let spec = compiled.spec;
                let mut told = format!("{}: {:?}\n", spec.name, spec.phases[0].argv);
                for file in spec.files.iter().filter(|file| !file.path.as_str().ends_with(".json")) {
                    told += &format!("{}:{}\n", file.place, file.path);
                }
                self.shown(&told)
            }
            Err(error) => self.shown(&error.to_string()),
        }
    }
}

#[crate::block]
fn a_block_of_this_test(parties: usize) {
    println!("{parties}");
}

mod elsewhere {
    #[crate::block]
    fn same_name() {}

    pub(super) mod deeper {
        #[crate::block]
        fn same_name() {}
    }
}

#[test]
fn classes_and_methods_are_found_without_running_the_file() {
    let place = Place::new();
    place.check(
        "PATH/NetPerf.py:NetServer.test",
        expect![[r#"
        NetServer.test: reference("PATH/NetPerf.py:NetServer.test")
    "#]],
    );
    place.check(
        "PATH/NetPerf.py:NetServer",
        expect![[r#"
        NetServer.test: reference("PATH/NetPerf.py:NetServer.test")
    "#]],
    );
    place.check(
        "PATH/NetPerf:NetServer.test",
        expect![[r#"
            NetServer.test: reference("PATH/NetPerf.py:NetServer.test")
        "#]],
    );
    place.check(
        "PATH/NetPerf:NetServer.tset",
        expect!["the reference `PATH/NetPerf:NetServer.tset` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`; python: class `NetServer` in `PATH/NetPerf.py` has no method `tset`, did you mean `PATH/NetPerf.py:NetServer.test`?; programs: not for Python files; scripts: not for Python files"],
    );
    place.check(
        "PATH/NetPerf.py:Larger",
        expect![[r#"
        Larger.test_small: reference("PATH/NetPerf.py:Larger.test_small")
        Larger.test_large: reference("PATH/NetPerf.py:Larger.test_large")
        Larger.test_huge: reference("PATH/NetPerf.py:Larger.test_huge")
    "#]],
    );
    place.check(
        "PATH/NetPerf.py",
        expect![[r#"
        NetPerf.test_small: reference("PATH/NetPerf.py:NetPerf.test_small")
        NetPerf.test_large: reference("PATH/NetPerf.py:NetPerf.test_large")
        Larger.test_small: reference("PATH/NetPerf.py:Larger.test_small")
        Larger.test_large: reference("PATH/NetPerf.py:Larger.test_large")
        Larger.test_huge: reference("PATH/NetPerf.py:Larger.test_huge")
    "#]],
    );
    place.check(
        "PATH/NetPerf.py:Elsewhere.test_there",
        expect![[r#"
        Elsewhere.test_there: reference("PATH/NetPerf.py:Elsewhere.test_there")
    "#]],
    );
    place.check(
        "PATH/plain.py a 'b c'",
        expect![[r#"
        plain: reference("PATH/plain.py")
    "#]],
    );
}

#[test]
fn what_python_files_do_not_have_is_told_with_the_nearest() {
    let place = Place::new();
    place.check(
        "PATH/NetPref.py:NetServer",
        expect!["the reference `PATH/NetPref.py:NetServer` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`; python: file `PATH/NetPref.py` does not exist (the current directory is `HERE`), did you mean `PATH/NetPerf.py`?; programs: not for Python files; scripts: not for Python files"],
    );
    place.check(
        "PATH/NetPerf.py:NetSrver.test",
        expect!["the reference `PATH/NetPerf.py:NetSrver.test` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`; python: `PATH/NetPerf.py` has no class `NetSrver` with methods that begin with `test`, did you mean `PATH/NetPerf.py:NetServer`?; programs: not for Python files; scripts: not for Python files"],
    );
    place.check(
        "PATH/NetPerf.py:NetPerf.test_smal",
        expect!["the reference `PATH/NetPerf.py:NetPerf.test_smal` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`; python: class `NetPerf` in `PATH/NetPerf.py` has no method `test_smal`, did you mean `PATH/NetPerf.py:NetPerf.test_small`?; programs: not for Python files; scripts: not for Python files"],
    );
    place.check("PATH/NetPerf.py:Elsewhere", expect!["the reference `PATH/NetPerf.py:Elsewhere` cannot be run (python): class `Elsewhere` has no methods of its own, and those that it inherits from another file are not known here: name one, as in `PATH/NetPerf.py:Elsewhere.test`"]);
    place.check("PATH/NetPerf.py 5", expect!["the reference `PATH/NetPerf.py 5` cannot be run (python): a file with classes takes no arguments: give parameters with `param`"]);
    place.check(
        "PATH/broken.py",
        expect![
            "the reference `PATH/broken.py` cannot be run (python): `PATH/broken.py`, line 1: invalid syntax"
        ],
    );
    place.check(
        "PATH/hidden.py",
        expect!["the reference `PATH/hidden.py` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`; python: all classes in `PATH/hidden.py` are hidden, and found only by their names, did you mean `PATH/hidden.py:A`?; programs: not for Python files; scripts: not for Python files"],
    );
}

#[test]
fn functions_programs_and_scripts_are_found() {
    let place = Place::new();
    place.check(
        "a_block_of_this_test",
        expect![[r#"
        a_block_of_this_test: a_block_of_this_test(…)
    "#]],
    );
    place.check(
        "deeper::same_name",
        expect![[r#"
        same_name: same_name(…)
    "#]],
    );
    place.check(
        "sh -c 'echo \"a b\" \\\"c'",
        expect![[r#"
        sh-c-echo-a-b-c: exec(["sh", "-c", "echo \"a b\" \\\"c"])
    "#]],
    );
    place.check(
        "/usr/bin/wget example.org",
        expect![[r#"
        wget-example.org: exec(["/usr/bin/wget", "example.org"])
    "#]],
    );
    place.check("./no/such.sh", expect!["the reference `./no/such.sh` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`; python: not of the form `file.py`, `file.py:Class` or `file.py:Class.method`; programs: neither a name nor an absolute path; scripts: file `./no/such.sh` does not exist (the current directory is `HERE`)"]);
    place.check("a_block_of_this_tets", expect!["the reference `a_block_of_this_tets` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`, did you mean `a_block_of_this_test`?; python: not of the form `file.py`, `file.py:Class` or `file.py:Class.method`; programs: `a_block_of_this_tets` is not on the PATH of this machine (for one that only the host has, use its absolute path); scripts: file `a_block_of_this_tets` does not exist (the current directory is `HERE`)"]);
    place.check("echo 'open", expect!["the reference `echo 'open` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`; python: not of the form `file.py`, `file.py:Class` or `file.py:Class.method`; programs: a quote is not closed; scripts: a quote is not closed"]);
    place.check("", expect!["the reference `` names no block: own: not a number; functions: no function of this program with `#[millstream::block]`; python: not of the form `file.py`, `file.py:Class` or `file.py:Class.method`; programs: the reference is empty; scripts: the reference is empty"]);
}

#[test]
fn scripts_are_shipped_with_their_arguments() {
    let place = Place::new();
    let path = pathdiff(&place.path("tools/load.sh"));
    let block = super::reference(format!("{path} 5 'a b'"));
    let told = place.compiled(&block);
    assert_eq!(told, "load.sh-5-a-b: [\"./load.sh\", \"5\", \"a b\"]\nwork:load.sh\n");
}

/// From the current directory to a path, by way of the root.
fn pathdiff(path: &Path) -> String {
    let here = std::env::current_dir().unwrap();
    let up = "../".repeat(here.components().count() - 1);
    format!("{up}{}", path.strip_prefix("/").unwrap().display())
}

#[test]
fn resolvers_of_a_user_come_first_and_may_refer_on() {
    let place = Place::new();
    place.check(
        "milestone-one",
        expect![[r#"
        echo-one: shell("echo one")
    "#]],
    );
    place.check(
        "milestone-two",
        expect![[r#"
        echo-one: shell("echo one")
        second: shell("echo one")
    "#]],
    );
    place.check("milestone-onee", expect!["the reference `milestone-onee` names no block: own: not a number, did you mean `milestone-one`?; functions: no function of this program with `#[millstream::block]`; python: not of the form `file.py`, `file.py:Class` or `file.py:Class.method`; programs: `milestone-onee` is not on the PATH of this machine (for one that only the host has, use its absolute path); scripts: file `milestone-onee` does not exist (the current directory is `HERE`)"]);
    place.check(
        "milestone-bad",
        expect!["the reference `milestone-bad` cannot be run (own): the moon is wrong"],
    );
    place.check("milestone-empty", expect!["the reference `milestone-empty` names no block: own: found nothing; functions: no function of this program with `#[millstream::block]`; python: not of the form `file.py`, `file.py:Class` or `file.py:Class.method`; programs: `milestone-empty` is not on the PATH of this machine (for one that only the host has, use its absolute path); scripts: file `milestone-empty` does not exist (the current directory is `HERE`)"]);
    place.check(
        "milestone-again",
        expect!["the reference `milestone-again` leads from one reference to the next, 8 times: last to `milestone-again`"],
    );
}

#[test]
fn what_is_said_of_the_reference_wins() {
    let place = Place::new();
    let block = place.reference("milestone-one").param("a", 2).env("B", "2");
    let spec = block.compile(&surroundings()).unwrap().spec;
    let told: Vec<_> = spec.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(told, ["A=1", "B=2", "MILLSTREAM_PARAM_A=2", "MILLSTREAM_PARAM_B=1"]);
    assert_eq!(spec.name.as_str(), "milestone-one");
}

#[test]
fn several_where_one_is_asked_are_listed() {
    let place = Place::new();
    let told =
        |text: &str| place.shown(&place.reference(text).compile(&surroundings()).unwrap_err().to_string());
    expect!["the reference `PATH/NetPerf.py` names 5 blocks: `PATH/NetPerf.py:NetPerf.test_small`, `PATH/NetPerf.py:NetPerf.test_large`, `PATH/NetPerf.py:Larger.test_small`, `PATH/NetPerf.py:Larger.test_large`, `PATH/NetPerf.py:Larger.test_huge`; run one of them, or all with `run_all_bg` or `run_all_fg`"].assert_eq(&told("PATH/NetPerf.py"));
    expect!["the reference `same_name` names 2 blocks: `millstream::block::reference::tests::elsewhere::deeper::same_name`, `millstream::block::reference::tests::elsewhere::same_name`; run one of them, or all with `run_all_bg` or `run_all_fg`"].assert_eq(&told("same_name"));
}

#[test]
fn a_class_is_shipped_with_what_it_may_import() {
    let place = Place::new();
    place.write("package/__init__.py", "");
    place.write("package/__pycache__/x.pyc", "");
    place.write("package/inner.py", "");
    place.write("other/file.py", "");
    place.write("NetPerf.py.data/input", "");
    let block = place.reference("PATH/NetPerf.py:NetServer.test");
    expect![[r#"
        NetServer.test: ["/usr/bin/python3", ".millstream/harness.py", "NetPerf.py", "NetServer", "test"]
        work:.millstream/harness.py
        work:NetPerf.py
        work:NetPerf.py.data/input
        work:broken.py
        work:hidden.py
        work:package/__init__.py
        work:package/inner.py
        work:plain.py
        private:python/millstream.py
    "#]]
    .assert_eq(&place.compiled(&block));
    let path = place.path("NetPerf.py");
    expect![[r#"
        NetServer.test: ["/bin/sh", "-c", "program=\"$1\"; shift; exec \"$program\" \"$MILLSTREAM_PROGRAM\" \"$@\"", "sh", "/usr/bin/python3", "NetPerf.py", "NetServer", "test"]
        work:.millstream/harness.py
        work:NetPerf.py
        work:NetPerf.py.data/input
        work:broken.py
        work:hidden.py
        work:package/__init__.py
        work:package/inner.py
        work:plain.py
        private:python/millstream.py
    "#]].assert_eq(&place.compiled(&block.clone().file(path).cwd("/")));
    expect![[r#"
        NetServer.test: ["/usr/bin/python3", ".millstream/harness.py", "PATH/NetPerf.py", "NetServer", "test"]
        work:.millstream/harness.py
        private:python/millstream.py
    "#]]
    .assert_eq(&place.compiled(&block.no_copy()));
    expect![[r#"
        A.test: ["/usr/bin/python3", ".millstream/harness.py", "/no/such.py", "A", "test"]
        work:.millstream/harness.py
        private:python/millstream.py
    "#]]
    .assert_eq(&place.compiled(&super::reference("/no/such.py:A.test").no_copy()));
    expect!["the reference `/no/such.py:A` cannot be run (python): `/no/such.py` is not on this machine, so that its classes cannot be listed: name class and method, as in `file.py:Class.method`"].assert_eq(&place.compiled(&super::reference("/no/such.py:A").no_copy()));
    expect![[r#"
        plain.py-1: ["/usr/bin/python3", "plain.py", "1"]
        work:NetPerf.py
        work:broken.py
        work:hidden.py
        work:package/__init__.py
        work:package/inner.py
        work:plain.py
        private:python/millstream.py
    "#]]
    .assert_eq(&place.compiled(&place.reference("PATH/plain.py 1")));
}
