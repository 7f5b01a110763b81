//! Questions to a tree, changes of it, and what is never shown.

use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::*;

const TREE: &str = "\
net:
  boot: {timeout: 10, image: 1.10}
  check: {timeout: 1}
disk:
  boot: {timeout: 10, retries: 3}
  client-1: {rate: fast}
hosts: [{name: a}, {name: b}]
";

fn tree() -> Params {
    yaml::parse("lab.yaml", TREE).unwrap()
}

fn check(key: &str, path: &str, expected: Expect) {
    let text = match tree().get::<serde_json::Value>(key, path) {
        Ok(value) => value.to_string(),
        Err(error) => error.to_string(),
    };
    expected.assert_eq(&text);
}

#[test]
fn an_absolute_path_means_one_node() {
    check("timeout", "/net/check", expect!["1"]);
    check(
        "timeout",
        "/boot",
        expect!["there is no parameter `timeout` at `/boot`: did you mean `timeout` at lab.yaml:2:19?"],
    );
    check("net", "/", expect![[r#"{"boot":{"image":1.1,"timeout":10},"check":{"timeout":1}}"#]]);
}

#[test]
fn a_relative_path_means_every_node_that_ends_so() {
    check("timeout", "*/boot/*", expect!["10"]);
    check("timeout", "boot", expect!["10"]);
    check("rate", "*/client-*", expect![[r#""fast""#]]);
    check("name", "*/hosts/1", expect![[r#""b""#]]);
}

#[test]
fn two_values_for_one_question_are_a_clash_that_names_both_places() {
    check("timeout", "/net/*", expect!["parameter `timeout` at `/net/*` is `10` at lab.yaml:2:19 and `1` at lab.yaml:3:20: ask with a path that means one of them"]);
    check("timeout", "*", expect!["parameter `timeout` at `*` is `10` at lab.yaml:2:19 and `1` at lab.yaml:3:20: ask with a path that means one of them"]);
}

#[test]
fn a_missing_parameter_names_the_nearest() {
    check("retreis", "*/boot/*", expect!["there is no parameter `retreis` at `*/boot/*`: did you mean `retries` at lab.yaml:5:32?"]);
    check("zebra", "*", expect!["there is no parameter `zebra` at `*`"]);
}

#[test]
fn a_text_is_had_as_it_was_written_and_a_wrong_type_is_named_with_its_place() {
    let params = tree();
    assert_eq!(params.get::<String>("image", "/net/boot").unwrap(), "1.10");
    assert_eq!(params.get_or("absent", "*", 7).unwrap(), 7);
    assert_eq!(params.get_or("absent", "*", None::<u8>).unwrap(), None);
    assert_eq!(params.get_or("retries", "*", None).unwrap(), Some(3));
    let error = params.get::<u64>("rate", "*").unwrap_err();
    expect![[r#"lab.yaml:6:20: parameter `rate` cannot be read as `u64`: invalid type: string "fast", expected u64"#]]
        .assert_eq(&error.to_string());
}

fn json(params: &Params) -> String {
    serde_json::to_string(params).unwrap()
}

#[test]
fn files_merge_and_later_ones_win_in_the_order_of_the_first() {
    let later = yaml::parse("mine.yaml", "disk: {boot: {timeout: 3, extra: [1]}}\nhosts: ~\nnew: 1\n").unwrap();
    let merged = tree().merge(later);
    let order: Vec<String> = merged.root.children().map(|(name, _)| name).collect();
    assert_eq!(order, ["net", "disk", "hosts", "new"]);
    expect![[r#"{"disk":{"boot":{"extra":[1],"retries":3,"timeout":3},"client-1":{"rate":"fast"}},"hosts":null,"net":{"boot":{"image":1.1,"timeout":10},"check":{"timeout":1}},"new":1}"#]].assert_eq(&json(&merged));
    let error = merged.get::<u64>("timeout", "*/boot/*").unwrap_err();
    expect!["parameter `timeout` at `*/boot/*` is `10` at lab.yaml:2:19 and `3` at mine.yaml:1:24: ask with a path that means one of them"].assert_eq(&error.to_string());
    assert_eq!(json(&tree().merge("# nothing".parse().unwrap())), json(&tree()));
    assert_eq!(json(&Params::empty().merge(tree())), json(&tree()));
}

#[test]
fn several_files_are_read_in_one_call() {
    let directory = tempfile::tempdir().unwrap();
    let files = [("a.yaml", "x: 1\ny: 1\n"), ("b.yaml", "y: !file word\n"), ("word", "two\n")];
    for (name, text) in files {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    let params = Params::load_all([directory.path().join("a.yaml"), directory.path().join("b.yaml")]).unwrap();
    assert_eq!(params.get::<u8>("x", "/").unwrap(), 1);
    assert_eq!(params.get::<String>("y", "/").unwrap(), "two");
    assert!(Params::load_all(["/nonexistent/lab.yaml"]).is_err());
}

#[test]
fn what_is_set_is_what_is_had() {
    let mut params = tree();
    params.set("timeout", "*/boot/*", 7).unwrap();
    assert_eq!(params.get::<u64>("timeout", "*/boot/*").unwrap(), 7);
    assert_eq!(params.get::<u64>("timeout", "/net/check").unwrap(), 1);
    params.set("depth", "/a/b", [1, 2]).unwrap();
    assert_eq!(params.get::<Vec<u8>>("depth", "/a/b").unwrap(), [1, 2]);
    params.set("name", "/hosts/1", "c").unwrap();
    assert_eq!(params.get::<String>("name", "*/hosts/1").unwrap(), "c");
    let error = params.get::<u64>("timeout", "*").unwrap_err().to_string();
    let place = format!("`7` at {}:", file!());
    assert!(error.contains(&place), "{error} names the line of this test");
}

#[test]
fn what_cannot_be_set_says_why() {
    let mut params = tree();
    let mut refused = |key: &str, path: &str, expected: Expect| {
        expected.assert_eq(&params.set(key, path, 1).unwrap_err().to_string());
    };
    refused("retreis", "*/boot/*", expect!["there is no parameter `retreis` at `*/boot/*`: did you mean `retries` at lab.yaml:5:32?; to add it, name one node by its absolute path"]);
    refused("x", "/net/boot/timeout", expect!["parameter `x` cannot be set at `/net/boot/timeout`: `timeout` at lab.yaml:2:19 is neither a mapping nor a list that has it"]);
    refused("x", "/hosts/2", expect!["parameter `x` cannot be set at `/hosts/2`: `hosts` at lab.yaml:7:8 is neither a mapping nor a list that has it"]);
    let error = params.set("x", "/", std::collections::BTreeMap::from([((1, 2), 3)])).unwrap_err();
    expect!["parameter `x` cannot be set at `/`: key must be a string"].assert_eq(&error.to_string());
}

const SECRETS: &str = "\
password: !secret hunter2
number: !secret 4711
all: !secret {user: hunter2, list: [hunter2, &deep {a: hunter2}]}
again: *deep
first: !secret &first hunter2
second: *first
third: {<<: *deep}
fourth: &fourth !env MILLSTREAM_NOT_SET
fifth: *fourth
port: {password: hunter3}
home: !env-shown HOME
missing: !env MILLSTREAM_NOT_SET
file: !file /nonexistent/password
";

#[test]
fn secrets_are_had_and_never_shown() {
    let params = yaml::parse("lab.yaml", SECRETS).unwrap();
    assert_eq!(params.get::<String>("password", "/").unwrap(), "hunter2");
    assert_eq!(params.get::<String>("second", "/").unwrap(), "hunter2");
    assert_eq!(params.get::<u64>("number", "/").unwrap(), 4711);
    assert_eq!(params.get::<String>("home", "/").ok(), std::env::var("HOME").ok());
    expect![[r#"{"again":"…","all":"…","fifth":"!env MILLSTREAM_NOT_SET","file":"!file /nonexistent/password","first":"…","fourth":"!env MILLSTREAM_NOT_SET","home":"!env HOME","missing":"!env MILLSTREAM_NOT_SET","number":"…","password":"…","port":{"password":"hunter3"},"second":"…","third":{"a":"…"}}"#]].assert_eq(&json(&params));
    assert!(!format!("{params:?}").contains("hunter2"), "{params:?}");
    let asked = |key: &str, path: &str, expected: Expect| {
        expected.assert_eq(&params.get::<bool>(key, path).unwrap_err().to_string());
    };
    asked("password", "*", expect![[r#"parameter `password` at `*` is secret at lab.yaml:1:19 and `"hunter3"` at lab.yaml:10:18: ask with a path that means one of them"#]]);
    asked("password", "/", expect!["lab.yaml:1:19: parameter `password` cannot be read as `bool`: what is there is secret and not shown"]);
    asked("all", "/", expect!["lab.yaml:3:14: parameter `all` cannot be read as `bool`: what is there is secret and not shown"]);
    asked("missing", "/", expect!["lab.yaml:12:15: the variable `MILLSTREAM_NOT_SET` is not set: set it for this program, or name another with `!env`"]);
    asked("file", "/", expect!["lab.yaml:13:13: failed to read `/nonexistent/password`: no such file or directory; write the file, or name another with `!file`"]);
}

#[test]
fn what_was_secret_stays_secret() {
    let mut params = yaml::parse("lab.yaml", SECRETS).unwrap();
    params.set("password", "/", "changed").unwrap();
    params.set("new", "/all", "changed").unwrap();
    params.set_secret("key", "/", "changed").unwrap();
    let params = params.merge("all: {more: changed}\nnumber: changed\nport: !secret {x: changed}".parse().unwrap());
    assert_eq!(params.get::<String>("more", "/all").unwrap(), "changed");
    assert_eq!(params.get::<String>("password", "/port").unwrap(), "hunter3");
    let shown = format!("{params:?}");
    assert!(!shown.contains("changed") && !shown.contains("hunter"), "{shown}");
}

#[test]
fn a_tag_that_means_nothing_is_refused() {
    let refused = |text: &str, expected: Expect| {
        expected.assert_eq(&yaml::parse("lab.yaml", text).unwrap_err().to_string());
    };
    refused("a: !secrt x", expect!["lab.yaml:1:11: the tag `!secrt` is unknown: did you mean `!secret`?"]);
    refused("a: !zebra x", expect!["lab.yaml:1:11: the tag `!zebra` is unknown: there are !secret, !env, !file, !env-shown, !file-shown"]);
    refused("a: !env", expect!["lab.yaml:1:8: behind `!env` stands the name of a variable, as in `!env LAB_PASSWORD`"]);
    refused("a: !file [x]", expect!["lab.yaml:1:10: behind `!file` stands the path of a file, as in `!file ~/.lab-password`"]);
}

fn scalars() -> impl Strategy<Value = String> {
    "[a-c]{1,2}"
}

/// A tree of mappings with texts in them, as YAML in braces.
fn trees() -> impl Strategy<Value = String> {
    let leaf = scalars().prop_map(|text| format!("'{text}'"));
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop::collection::btree_map(scalars(), inner, 1..4).prop_map(|entries| {
            let entries: Vec<String> = entries.into_iter().map(|(key, value)| format!("{key}: {value}")).collect();
            format!("{{{}}}", entries.join(", "))
        })
    })
}

proptest! {
    /// Where the later tree has a value, it is the answer; everywhere else the earlier one is.
    #[test]
    fn merging_asks_the_later_tree_first(earlier in trees(), later in trees(), key in scalars(), names in prop::collection::vec(scalars(), 0..3)) {
        let (earlier, later) = (yaml::parse("a", &earlier).unwrap(), yaml::parse("b", &later).unwrap());
        let path = format!("/{}", names.join("/"));
        let ask = |params: &Params| params.get::<String>(&key, &path).ok();
        let merged = earlier.clone().merge(later.clone());
        if let Some(value) = ask(&later) {
            prop_assert_eq!(ask(&merged), Some(value));
        } else if let Some(value) = ask(&merged) {
            prop_assert_eq!(ask(&earlier), Some(value));
        }
        prop_assert_eq!(json(&merged.clone().merge(later)), json(&merged));
    }

    #[test]
    fn what_could_be_set_can_be_had(tree in trees(), key in scalars(), path in "/?([ab*]{1,2}/){0,2}[ab*]{0,2}") {
        let mut params = yaml::parse("a", &tree).unwrap();
        let before = json(&params);
        match params.set(&key, &path, "new") {
            Ok(()) => prop_assert_eq!(params.get::<String>(&key, &path).unwrap(), "new"),
            Err(SetParamError::Missing(_)) => prop_assert_eq!(json(&params), before),
            Err(_) => prop_assert!(params.get::<String>(&key, &path).is_err()),
        }
    }

    /// A mark anywhere hides everything below it, whatever is done with the tree.
    #[test]
    fn a_marked_value_is_nowhere_in_what_is_shown(tree in trees(), over in trees(), key in scalars()) {
        let secret = "zzz";
        let marked = tree.replacen('\'', &format!("!secret '{secret}"), 1);
        let params = yaml::parse("a", &marked).unwrap();
        let changed = params.clone().merge(yaml::parse("b", &over).unwrap());
        for params in [params, changed] {
            let shown = format!("{params:?}{}", json(&params));
            prop_assert!(!shown.contains(secret), "{}", shown);
            for path in ["*", "/", "a", "*/b/*"] {
                if let Err(error) = params.get::<u64>(&key, path) {
                    let shown = format!("{error} {error:?}");
                    prop_assert!(!shown.contains(secret), "{}", shown);
                }
            }
        }
    }
}
