//! deploy/README.md, executed: its commands are read out of it and run as they stand on an administrator's machine, with three
//! hosts in reach; and on the same hosts those of docs/certificates.md that make certificates renew themselves.
//!
//! Two programs are stood in for there, because building them again would take minutes and prove nothing about the document:
//! `deploy/package` hands out the package that it has made before from the static agent, and `cargo run --example` starts
//! the example that was built with these tests.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use millstream_integration_tests::{
    lab::{Host, Lab},
    machine::Machine,
    tools,
    wait::wait_until_true,
};

use super::package;
use crate::support::SOON;

const HOSTS: [&str; 3] = ["foo", "bar", "baz"];
const EXAMPLES: [&str; 2] = ["netperf", "ping_all"];

/// The commands of one section of a document: what stands in its `sh` fences.
fn commands(document: &str, section: &str) -> Vec<String> {
    let (_, from) = document.split_once(&format!("\n## {section}\n")).expect("the document has the section");
    let section = from.split("\n## ").next().unwrap();
    let fences = section.split("\n```sh\n").skip(1);
    fences.map(|fence| fence.split_once("```").expect("a fence ends").0.to_owned()).collect()
}

/// Commands that are no part of another: what a person would type and count.
fn count(fences: &[String]) -> usize {
    let is_command = |line: &&str| !line.starts_with([' ', '#']) && *line != "done";
    fences.iter().flat_map(|fence| fence.lines()).filter(is_command).count()
}

fn write_program(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// What an administrator has before the first command: a checkout, cargo, and ssh access as root to the hosts.
fn prepare_administrator(administrator: &Machine, hosts: &[Machine]) {
    administrator.bring(&package().debian, "/srv/made/millstream-agent_0.1.0_amd64.deb");
    write_program(
        &administrator.path("/root/checkout/deploy/package"),
        "#!/bin/sh\nmkdir -p target/debian && cp /srv/made/*.deb target/debian/\n",
    );
    for example in EXAMPLES {
        let program = tools::beside_this_program(&format!("examples/{example}"));
        administrator.bring(&program, &format!("/srv/examples/{example}"));
    }
    write_program(
        &administrator.path("/usr/local/bin/cargo"),
        "#!/bin/sh\n[ \"$1 $2 $4 $5 $6\" = 'run --example -p millstream --' ] || exit 2\n\
         program=/srv/examples/$3; shift 6; exec \"$program\" \"$@\"\n",
    );
    administrator.run(
        "mkdir -p -m 700 .ssh && rm -f .ssh/* && ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519\n\
         echo 'StrictHostKeyChecking accept-new' >.ssh/config",
    );
    let key = fs::read_to_string(administrator.path("/root/.ssh/id_ed25519.pub")).unwrap();
    for host in hosts {
        host.run(&format!(
            "mkdir -p -m 700 .ssh && (umask 077 && echo '{}' >.ssh/authorized_keys)",
            key.trim()
        ));
    }
}

#[test]
fn the_document_takes_ten_commands() {
    let document = include_str!("../../../../deploy/README.md");
    assert_eq!(count(&commands(document, "Three hosts in ten commands")), 10);
}

#[test]
#[ignore = "needs root, systemd, openssh, cargo-deb and the built examples: integration-tests/run"]
fn three_hosts_are_installed_by_following_the_document() {
    let lab = Lab::without_authority(&HOSTS);
    let mut names: Vec<_> =
        HOSTS.iter().map(|name| (format!("{name}.example.com"), lab.host(name).address())).collect();
    names.push(("ca.example.com".to_owned(), lab.controller().address()));
    let boot = |host: &Host| {
        let directory = lab.directory().join(host.name());
        fs::create_dir_all(&directory).unwrap();
        Machine::boot(host, &directory, &names)
    };
    let administrator = boot(lab.controller());
    let hosts = HOSTS.map(|name| boot(lab.host(name)));
    prepare_administrator(&administrator, &hosts);
    let deploying = include_str!("../../../../deploy/README.md");
    let follow = |document: &str, section: &str| {
        let run = |fence: String| administrator.run(&format!("cd /root/checkout\n{fence}"));
        commands(document, section).into_iter().map(run).collect::<String>()
    };

    let told = follow(deploying, "Three hosts in ten commands");
    for name in HOSTS {
        assert!(told.contains(&format!("made pki/agent-{name}.pem")), "{told}");
    }
    for host in &hosts {
        assert_eq!(host.run("systemctl is-enabled millstream-agent").trim(), "enabled");
        assert_eq!(
            tools::both(
                &host.output("systemd-analyze verify millstream-agent.service millstream-blocks.service")
            ),
            ""
        );
        assert_eq!(host.run("stat -c %a /etc/millstream/agent.key").trim(), "600");
    }

    let told = follow(deploying, "For whoever writes tests");
    assert!(told.contains("client | connected to foo.example.com") && told.contains("Gbit/s"), "{told}");
    for name in ["server", "client", "third"] {
        assert!(told.contains(&format!("{name} answers after")), "{told}");
    }

    follow(include_str!("../../../../docs/certificates.md"), "Renewal");
    renews_itself(&administrator, &hosts[0]);
}

/// A certificate of 20 s is followed by others, by a service that its own user runs.
fn renews_itself(authority: &Machine, host: &Machine) {
    let served = authority.run("systemctl show -p MainPID --value millstream-pki@ca.example.com");
    assert_eq!(authority.run(&format!("stat -c %U /proc/{}", served.trim())), "millstream-pki\n");
    assert_eq!(authority.run("stat -c '%a %U %G' /etc/millstream/pki/ca.key"), "640 root millstream-pki\n");
    let told = authority.output("systemd-analyze verify millstream-pki@ca.example.com.service");
    assert_eq!(tools::both(&told), "");

    authority.run(
        "millstream-agent pki issue --role agent --name brief --valid 20s --address foo.example.com\n\
         scp -q /etc/millstream/pki/agent-brief.pem root@foo.example.com:/etc/millstream/agent.pem\n\
         scp -q /etc/millstream/pki/agent-brief.key root@foo.example.com:/etc/millstream/agent.key\n\
         ssh root@foo.example.com systemctl restart millstream-agent",
    );
    let log = |machine: &Machine| machine.run("journalctl --no-pager --output=cat -u 'millstream-*'");
    wait_until_true("the certificate is renewed", SOON, || log(host).contains("certificate renewed"));
    let told = log(authority);
    assert!(told.contains("holder=\"millstream://agent/brief\""), "{told}");
    let told = host.run("millstream-agent status");
    assert!(told.contains("millstream://agent/brief, until ") && told.contains(", is renewed at "), "{told}");
}
