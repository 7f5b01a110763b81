//! Every form of a definition, and every fault with its place.

use expect_test::{Expect, expect};

use super::*;
use crate::params::yaml;

fn shown(definitions: Result<Vec<Defined>, DefineStreamError>) -> String {
    match definitions {
        Err(error) => error.to_string(),
        Ok(definitions) => {
            let lines = definitions.iter().map(|definition| {
                let mut line = format!("{} = {definition}", definition.name);
                if definition.defaults != Defaults::default() {
                    line += &format!(" {:?}", definition.defaults);
                }
                line
            });
            lines.collect::<Vec<_>>().join("\n")
        }
    }
}

fn check(text: &str, expected: Expect) {
    let params = yaml::parse("lab.yaml", text).unwrap();
    expected.assert_eq(&shown(from_params(&params, DEFAULT_PATH)));
}

fn check_path(text: &str, path: &str, expected: Expect) {
    let params = yaml::parse("lab.yaml", text).unwrap();
    expected.assert_eq(&shown(from_params(&params, path)));
}

fn check_inline(text: &str, expected: Expect) {
    expected.assert_eq(&shown(from_inline(text, &Origin::named("MILLSTREAM_STREAMS"))));
}

#[test]
fn lines_and_mappings_define_streams_in_their_order() {
    check(
        "streams:
  server: tls://foo.example.com:7433
  client-1:
    type: tls
    host: bar.example.com
    port: 7000
  box:
    type: docker
    image: 1.10
    create: yes
  1: docker://create=yes,image=fedora,remove=always
  here:
  sock: unix:///run/a.sock?cwd=/tmp
",
        expect![[r#"
            server = tls://foo.example.com:7433
            client-1 = tls://bar.example.com?port=7000
            box = docker?create=yes&image=1.10
            1 = docker?create=yes&image=fedora&remove=always
            here = local
            sock = unix:///run/a.sock Defaults { env: {}, cwd: Some("/tmp"), user: None, timeout: None, wrap: [], limits: ResourceLimits { memory_bytes: None, pids_count: None, cpu_millis: None }, on_failure: Continue }"#]],
    );
}

#[test]
fn lists_define_streams_too() {
    check(
        "streams:\n  - tls://foo\n  - type: local\n  - server: tls://bar\n  - 7: {type: local}\n",
        expect![[r#"
        0 = tls://foo
        1 = local
        server = tls://bar
        7 = local"#]],
    );
}

#[test]
fn defaults_hold_for_everything_that_runs_there() {
    check(
        "streams:
  a:
    type: local
    env: {LANG: C, DEPTH: 010}
    cwd: /tmp
    user: tester
    timeout: 2m
    wrap: [strace, -f]
    limits: {memory: 512M, pids: 100, cpu: 1.5}
    on_failure: drain
",
        expect![[
            r#"a = local Defaults { env: {"DEPTH": "010", "LANG": "C"}, cwd: Some("/tmp"), user: Some("tester"), timeout: Some(120s), wrap: ["strace", "-f"], limits: ResourceLimits { memory_bytes: Some(536870912), pids_count: Some(100), cpu_millis: Some(1500) }, on_failure: Drain }"#
        ]],
    );
}

#[test]
fn no_streams_are_no_fault_but_a_named_place_must_exist() {
    check("boot: {timeout: 1}", expect![""]);
    check_path(
        "boot: {timeout: 1}",
        "/second/streams/*",
        expect!["lab.yaml:1:1: there is nothing at `/second/streams/*`, where streams should be defined"],
    );
    check_path("second: {streams: {a: local}}", "/second/streams/*", expect!["a = local"]);
    check_path("second: {streams: {a: local}}", "*/streams/*", expect!["a = local"]);
    check_path(
        "x: {streams: {a: local}}\ny: {streams: {a: local}}",
        "*/streams/*",
        expect!["lab.yaml:1:14: `*/streams/*` could also mean the node at lab.yaml:2:14: name the streams by their absolute path"],
    );
    check("streams:", expect![""]);
    check("streams: nothing", expect!["lab.yaml:1:10: `/streams/*` should define streams: write a mapping of names, or a list"]);
}

#[test]
fn names_are_checked_and_stand_once() {
    check(
        "streams: {a/b: local}",
        expect!["lab.yaml:1:11: the stream name `a/b` has a `/` at byte 1: use letters, digits, `-`, `_` or `.`"],
    );
    check(
        "streams:\n  - a: local\n  - a: local\n",
        expect!["lab.yaml:3:5: stream `a` is defined twice, first at lab.yaml:2:5: give one another name"],
    );
    check(
        "streams:\n  - 1: local\n  - local\n",
        expect!["lab.yaml:3:5: stream `1` is defined twice, first at lab.yaml:2:5: give one another name"],
    );
}

#[test]
fn unknown_words_name_the_nearest() {
    check(
        "streams:\n  a: {type: tls, hots: x}\n",
        expect!["lab.yaml:2:18: stream `a` has the unknown key `hots`: did you mean `host`? (there are `host`, `port`, `authority`, `certificate`, `key`, `revocations`, `server_name`, `type`, `env`, `cwd`, `user`, `timeout`, `wrap`, `limits`, `on_failure`, `exclusive`, `wait`)"],
    );
    check(
        "streams:\n  a: {type: local, zebra: x}\n",
        expect!["lab.yaml:2:20: stream `a` has the unknown key `zebra`: use one of `type`, `env`, `cwd`, `user`, `timeout`, `wrap`, `limits`, `on_failure`, `exclusive`, `wait`"],
    );
    check(
        "streams:\n  a: tls://x?prot=1\n",
        expect!["lab.yaml:2:6: stream `a` has the unknown key `prot`: did you mean `port`? (there are `host`, `port`, `authority`, `certificate`, `key`, `revocations`, `server_name`, `type`, `env`, `cwd`, `user`, `timeout`, `wrap`, `limits`, `on_failure`, `exclusive`, `wait`)"],
    );
    check(
        "streams:\n  a: {type: local, limits: {memry: 1}}\n",
        expect!["lab.yaml:2:29: stream `a` has the unknown key `limits.memry`: did you mean `limits.memory`? (there are `memory`, `pids`, `cpu`)"],
    );
}

#[test]
fn a_type_that_is_not_built_in_takes_any_key() {
    check("streams:\n  a: {type: vm, host: bar.example.com, port: 22, identity: !file-shown ~/.ssh/id}\n", expect!["a = vm://bar.example.com?identity=!file ~/.ssh/id&port=22"]);
    check("streams:\n  a: vm://tester@bar.example.com:2222?strict=no\n", expect!["a = vm://tester@bar.example.com:2222?strict=no"]);
    check("streams:\n  a: {type: vm, host: x, timeout: soon}\n", expect!["lab.yaml:2:35: `timeout` of stream `a` is `soon`: write a duration such as `30s`, `2m`, `1h30m`, or a number of seconds"]);
    check("streams:\n  a: {type: a/b}\n", expect!["lab.yaml:2:13: `type` of stream `a` is `a/b`: write one word, such as `tls`"]);
    check_inline("a=vm://rawhide,b=local", expect![[r#"
        a = vm://rawhide
        b = local"#]]);
}

#[test]
fn an_entry_without_details_gets_the_defaults() {
    check("streams:\n  a:\n  b: {}\n  c: {cwd: /tmp}\n  d: local://\n", expect![[r#"
        a = local
        b = local
        c = local Defaults { env: {}, cwd: Some("/tmp"), user: None, timeout: None, wrap: [], limits: ResourceLimits { memory_bytes: None, pids_count: None, cpu_millis: None }, on_failure: Continue }
        d = local"#]]);
    check("streams:\n  - a:\n  - ~\n  - 7: {}\n", expect![[r#"
        a = local
        1 = local
        7 = local"#]]);
}

#[test]
fn the_authority_may_be_called_ca_as_in_the_name_of_its_file() {
    check("streams:\n  a: {type: tls, host: x, ca: y}\n", expect!["a = tls://x?authority=y"]);
    check("streams:\n  a: tls://x?ca=y\n", expect!["a = tls://x?authority=y"]);
    check("streams:\n  a: {type: vm, ca: y}\n", expect!["a = vm?ca=y"]);
    check(
        "streams:\n  a: {type: tls, host: x, ca: y, authority: z}\n",
        expect!["lab.yaml:2:27: stream `a` has `authority` and `ca`, which mean the same: remove `ca`"],
    );
    check(
        "streams:\n  a: tls://x?ca=y&authority=z\n",
        expect!["lab.yaml:2:6: stream `a` has the address `tls://x?ca=y&authority=z`: it gives a key twice"],
    );
}

#[test]
fn commands_have_words_and_whoever_logs_in_is_a_key_of_ssh() {
    check(
        r#"streams:
  line: command://ip netns exec blue millstream-agent stdio?host=blue
  words: {type: command, command: [nsenter, --net=/run/a b, sh], bring: yes}
  far: {type: ssh, host: bar, user: tester, options: [A=1, B=2], cwd: /tmp}
"#,
        expect![[r#"
            line = command://ip netns exec blue millstream-agent stdio?host=blue
            words = command://nsenter '--net=/run/a b' sh?bring=yes
            far = ssh://bar?options=A=1 B=2&user=tester Defaults { env: {}, cwd: Some("/tmp"), user: None, timeout: None, wrap: [], limits: ResourceLimits { memory_bytes: None, pids_count: None, cpu_millis: None }, on_failure: Continue }"#]],
    );
    check("streams:\n  a: ssh://\n", expect!["lab.yaml:2:6: stream `a` has the address `ssh://`: write a host, with a user or a port if need be, as in `ssh://tester@host:22`"]);
    check("streams:\n  a: {type: command}\n", expect!["lab.yaml:2:3: stream `a` of type `command` lacks the key `command`"]);
    check("streams:\n  a: {type: ssh, host: x, password: y}\n", expect!["lab.yaml:2:27: stream `a` has the unknown key `password`: use one of `host`, `user`, `port`, `identity`, `jump`, `config`, `options`, `agent`, `type`, `env`, `cwd`, `timeout`, `wrap`, `limits`, `on_failure`, `exclusive`, `wait`"]);
}

#[test]
fn a_bad_definition_is_told_with_its_place() {
    check(
        "streams:\n  a: {host: x}\n",
        expect!["lab.yaml:2:3: stream `a` does not say its type: add `type`, as in `type: tls`"],
    );
    check(
        "streams:\n  a: {type: tls}\n",
        expect!["lab.yaml:2:3: stream `a` of type `tls` lacks the key `host`"],
    );
    check(
        "streams:\n  a: [local]\n",
        expect!["lab.yaml:2:6: stream `a` is neither a URL, such as `tls://host:7433`, nor a mapping with `type`"],
    );
    check(
        "streams:\n  a: 'foo bar'\n",
        expect!["lab.yaml:2:6: stream `a` has the address `foo bar`: write a URL, such as `tls://host:7433`"],
    );
    check(
        "streams:\n  a: tls://\n",
        expect!["lab.yaml:2:6: stream `a` has the address `tls://`: write a host and, unless it is 7433, a port, as in `tls://host:7433`"],
    );
    check(
        "streams:\n  a: local://x\n",
        expect!["lab.yaml:2:6: stream `a` has the address `local://x`: write `local` alone: it is always this machine"],
    );
    check(
        "streams:\n  a: unix://run/a.sock\n",
        expect!["lab.yaml:2:6: stream `a` has the address `unix://run/a.sock`: write the absolute path of the agent's socket, as in `unix:///run/millstream/agent.sock`"],
    );
    check(
        "streams:\n  a: tls://x?port\n",
        expect!["lab.yaml:2:6: stream `a` has the address `tls://x?port`: write its keys as `key=value`"],
    );
    check(
        "streams:\n  a: {type: local, timeout: soon}\n",
        expect!["lab.yaml:2:29: `timeout` of stream `a` is `soon`: write a duration such as `30s`, `2m`, `1h30m`, or a number of seconds"],
    );
    check(
        "streams:\n  a: {type: local, timeout: 8d}\n",
        expect!["lab.yaml:2:29: `timeout` of stream `a` is `8d`: write a duration of more than nothing and at most 7 days"],
    );
    check(
        "streams:\n  a: {type: local, on_failure: stop}\n",
        expect!["lab.yaml:2:32: `on_failure` of stream `a` is `stop`: write `continue` or `drain`"],
    );
    check(
        "streams:\n  a: {type: local, exclusive: maybe}\n",
        expect!["lab.yaml:2:31: `exclusive` of stream `a` is `maybe`: write `yes` or `no`"],
    );
    check(
        "streams:\n  a: {type: local, env: [A]}\n",
        expect!["lab.yaml:2:25: `env` of stream `a` is `[…]`: write a mapping of names to texts"],
    );
    check(
        "streams:\n  a: {type: local, limits: {memory: lots}}\n",
        expect!["lab.yaml:2:37: `limits.memory` of stream `a` is `lots`: write a size such as `512M`, `2G`, or bytes"],
    );
    check("streams:\n  a: {type: unix, path: a.sock}\n", expect!["lab.yaml:2:3: `path` of stream `a` is `a.sock`: write the absolute path of the agent's socket, as in `unix:///run/millstream/agent.sock`"]);
    check(
        "streams:\n  a: {type: [local]}\n",
        expect!["lab.yaml:2:13: `type` of stream `a` is `[…]`: write a text"],
    );
}

#[test]
fn one_text_can_define_several() {
    check_inline(
        "server=tls://foo:7433, client=local",
        expect![[r#"
        server = tls://foo:7433
        client = local"#]],
    );
    check_inline(
        "box=docker://create=yes,image=fedora,a=local",
        expect![[r#"
        box = docker?create=yes&image=fedora
        a = local"#]],
    );
    check_inline(
        "server",
        expect!["MILLSTREAM_STREAMS: `server` is no stream definition: write `name=url`, several with commas, or the path of a YAML file"],
    );
    check_inline(
        "a=local,a=local",
        expect!["MILLSTREAM_STREAMS: stream `a` is defined twice, first at MILLSTREAM_STREAMS: give one another name"],
    );
    check_inline(
        "=local",
        expect!["MILLSTREAM_STREAMS: the stream name is empty: give it at least one character"],
    );
}

#[test]
fn what_is_secret_or_sounds_so_is_not_shown() {
    check("streams:\n  a: {type: vm, image: x, password: hunter2}\n", expect!["a = vm?image=x&password=…"]);
    check("streams:\n  a: {type: vm, image: !secret x, key: !file /k, user: y}\n", expect![[r#"a = vm?image=…&key=!file /k Defaults { env: {}, cwd: None, user: Some("y"), timeout: None, wrap: [], limits: ResourceLimits { memory_bytes: None, pids_count: None, cpu_millis: None }, on_failure: Continue }"#]]);
    check("streams:\n  a: vm://image=x,token=hunter2\n", expect!["a = vm?image=x&token=…"]);
    check("streams:\n  a: vm://image=x,token=hunter2,image=y\n", expect!["lab.yaml:2:6: stream `a` has the address `vm://image=x,token=…`: it gives a key twice"]);
    check("streams:\n  a: vm://user:hunter2@host\n", expect!["lab.yaml:2:6: stream `a` has the address `vm://user:…@host`: a password in a URL is seen by everybody: write a mapping with `password: !file PATH`"]);
    check("streams:\n  a: vm://user:hunter2@host?b=1&password=hunter2\n", expect!["lab.yaml:2:6: stream `a` has the address `vm://user:…@host?b=1&password=…`: a password in a URL is seen by everybody: write a mapping with `password: !file PATH`"]);
    check("streams:\n  a: 'foo bar://a:hunter2@x?password=hunter2/b&c'\n", expect!["lab.yaml:2:6: stream `a` has the address `foo bar://a:…@x?password=…`: write a URL, such as `tls://host:7433`"]);
    check_inline("a=vm://password=hunter2,b", expect!["MILLSTREAM_STREAMS: stream `a` has the address `vm://password=…`: write its keys as `key=value`"]);
    check_inline("vm://password=hunter2", expect!["MILLSTREAM_STREAMS: the stream name `vm://password` has a `/` at byte 3: use letters, digits, `-`, `_` or `.`"]);
}

#[test]
fn secrets_stand_only_where_nobody_looks() {
    check("streams:\n  a: !secret vm://x\n", expect!["lab.yaml:2:14: stream `a` is marked as secret, but everybody sees where a stream is: write a mapping and mark what is secret in it"]);
    check("streams:\n  a: !env-shown WHERE\n", expect!["lab.yaml:2:17: stream `a` is neither a URL, such as `tls://host:7433`, nor a mapping with `type`"]);
    check("streams:\n  a: {type: tls, host: !env LAB_HOST}\n", expect!["lab.yaml:2:29: `host` of stream `a` is `!env LAB_HOST`: everybody sees where a stream is: write it without a tag, or as `!env-shown NAME`"]);
    check("streams:\n  a: {type: tls, host: !env-shown LAB_HOST, key: !file /k}\n", expect!["a = tls?host=!env LAB_HOST&key=!file /k"]);
    check("streams:\n  a: {type: local, env: {TOKEN: !secret hunter2}}\n", expect!["lab.yaml:2:41: `env.TOKEN` of stream `a` is `…`: whoever looks at the host can see it: write it without a tag, or give it to blocks as a secret parameter"]);
    check("streams:\n  a: {type: local, wrap: !secret hunter2}\n", expect!["lab.yaml:2:34: `wrap` of stream `a` is `…`: whoever looks at the host can see it: write it without a tag, or give it to blocks as a secret parameter"]);
    check("streams:\n  a: {type: local, wrap: [!env X]}\n", expect!["lab.yaml:2:32: `wrap` of stream `a` is `!env X`: whoever looks at the host can see it: write it without a tag, or give it to blocks as a secret parameter"]);
    check("streams:\n  a: {type: local, timeout: !env-shown X}\n", expect!["lab.yaml:2:40: `timeout` of stream `a` is `!env X`: whoever looks at the host can see it: write it without a tag, or give it to blocks as a secret parameter"]);
    check("streams:\n  a: {type: !secret hunter2}\n", expect!["lab.yaml:2:21: `type` of stream `a` is `…`: whoever looks at the host can see it: write it without a tag, or give it to blocks as a secret parameter"]);
}

#[test]
fn containers_are_told_by_an_address_or_by_keys() {
    check("streams:\n  a: podman://box\n  b: {type: podman, name: box}\n  c: podman://box?image=x&remove=never\n  d: podman\n", expect![[r#"
        a = podman://box
        b = podman://box
        c = podman://box?image=x&remove=never
        d = podman"#]]);
    check("streams:\n  a: {type: docker, image: x, mounts: ['/a b:/c', '/d:/e']}\n", expect!["a = docker?image=x&mounts=/a b:/c /d:/e"]);
    check("streams:\n  a: docker://image=x,imge=y\n", expect!["lab.yaml:2:6: stream `a` has the unknown key `imge`: did you mean `image`? (there are `name`, `image`, `create`, `remove`, `mounts`, `network`, `memory`, `cpus`, `pids`, `options`, `engine`, `agent`, `idle`, `type`, `env`, `cwd`, `user`, `timeout`, `wrap`, `limits`, `on_failure`, `exclusive`, `wait`)"]);
    check("streams:\n  a: {type: docker, image: x, mounts: {a: b}}\n", expect!["lab.yaml:2:39: `mounts` of stream `a` is `{…}`: write a text or a list of texts"]);
}

#[test]
fn what_is_kept_elsewhere_is_looked_up_when_the_place_is_wanted() {
    let place = |text: &str, expected: Expect| {
        let params = yaml::parse("lab.yaml", text).unwrap();
        let definitions = from_params(&params, DEFAULT_PATH).unwrap();
        expected.assert_eq(&match definitions[0].place() {
            Ok(place) => format!("{place:?} {}", place.options.get("password").map_or("", String::as_str)),
            Err(error) => error.to_string(),
        });
    };
    place("streams:\n  a: {type: vm, host: !file-shown /dev/null, password: !file /dev/null, image: x}\n", expect![[r#"Place { kind: "vm", address: "", options: {"image": "x", "password": "…"} } "#]]);
    place("streams:\n  a: {type: vm, image: x, password: !secret hunter2}\n", expect![[r#"Place { kind: "vm", address: "", options: {"image": "x", "password": "…"} } hunter2"#]]);
    place("streams:\n  a: {type: tls, host: !env-shown MILLSTREAM_NOT_SET}\n", expect!["lab.yaml:2:35: the variable `MILLSTREAM_NOT_SET` is not set: set it for this program, or name another with `!env`"]);
}
