//! Command lines that are understood or refused, and what is printed.

use expect_test::{Expect, expect};

use super::*;

fn check(line: &str, expected: &Expect) {
    let parsed = parse(line.split_whitespace().map(OsString::from));
    let told = match parsed {
        Ok(parsed) => format!("{:?}{}", parsed.command, if parsed.json { " as json" } else { "" }),
        Err(error) => error.sentence(),
    };
    expected.assert_eq(&told);
}

#[test]
fn a_barrier_is_understood() {
    check(
        "barrier setup 2 --timeout 1.5 --json --payload=x",
        &expect![[
            r#"Barrier { name: "setup", parties: Count(2), timeout: Some(1.5s), payload: Some("x") } as json"#
        ]],
    );
    check(
        "--json barrier all --timeout 2m",
        &expect![[
            r#"Barrier { name: "all", parties: Group { more: 0 }, timeout: Some(120s), payload: None } as json"#
        ]],
    );
    check(
        "barrier -- --odd-name",
        &expect![[
            r#"Barrier { name: "--odd-name", parties: Group { more: 0 }, timeout: None, payload: None }"#
        ]],
    );
}

#[test]
fn a_subscription_is_understood() {
    check("subscribe t", &expect![[r#"Subscribe { topic: "t", from: 0, once: false }"#]]);
    check("subscribe t --once --from 3", &expect![[r#"Subscribe { topic: "t", from: 3, once: true }"#]]);
    check("get t --once", &expect!["`get` takes no --once: see `millstream-sync --help`"]);
}

#[test]
fn what_is_wrong_is_said_with_what_would_be_right() {
    check("", &expect!["a command is missing: see `millstream-sync --help`"]);
    check(
        "barier x",
        &expect!["command `barier` is unknown, perhaps `barrier` was meant: see `millstream-sync --help`"],
    );
    check(
        "barrier x 0",
        &expect![
            "the number of parties is 1 to 100,000, `group` or `all`, or one of these with more, such as `all+1`, not `0`: see `millstream-sync --help`"
        ],
    );
    check(
        "barrier x --timout 3",
        &expect!["option --timout is unknown, perhaps --timeout was meant: see `millstream-sync --help`"],
    );
    check("barrier x --timeout", &expect!["--timeout needs a value: see `millstream-sync --help`"]);
    check(
        "barrier x --timeout -3",
        &expect![
            "--timeout is seconds, or like 2m 30s, of at most 7 days, not `-3`: see `millstream-sync --help`"
        ],
    );
    check("publish x", &expect!["`publish` needs a value: see `millstream-sync --help`"]);
    check("get x --timeout 3", &expect!["`get` takes no --timeout: see `millstream-sync --help`"]);
    check("get x y", &expect!["`get` does not take `y` as well: see `millstream-sync --help`"]);
}

#[test]
fn wrong_usage_is_exit_code_2_and_said_to_programs_too() {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = run(["--json", "nonsense"].map(OsString::from), &mut out, &mut err);
    assert_eq!(code, 2);
    assert!(String::from_utf8(err).unwrap().starts_with("millstream-sync: command `nonsense` is unknown"));
    let told: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(told["error"]["kind"], "usage");
}
