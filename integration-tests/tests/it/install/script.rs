//! `install.sh`, for hosts without dpkg: installs, updates and removes from the unpacked archive.

use std::process::Output;

use millstream_integration_tests::{lab::Lab, machine::Machine, tools};

use super::{boot, bring_certificate, package};

fn unpack(machine: &Machine, version: &str) {
    machine.bring(&package(version).archive, &format!("/srv/{version}.tar.gz"));
    machine.run(&format!("cd /srv && tar -xf {version}.tar.gz && mv millstream-agent-{version}-* {version}"));
}

fn refused(output: &Output) -> String {
    assert!(!output.status.success(), "{}", tools::both(output));
    tools::both(output)
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn a_host_without_dpkg_is_installed_updated_and_freed_by_a_script() {
    let lab = Lab::new(&["one"]);
    let machine = boot(&lab, "one");
    for version in ["0.1.0", "0.2.0"] {
        unpack(&machine, version);
    }
    let told = machine.run("/srv/0.1.0/install.sh");
    assert!(told.contains("installed /usr/local/bin/millstream-agent: millstream-agent "), "{told}");
    assert!(
        told.contains("next: put ca.pem, revoked.pem, agent.pem and agent.key into /etc/millstream"),
        "{told}"
    );
    bring_certificate(&machine, &lab.authority().agent("one", &lab.host("one").address().to_string()));
    machine.run("systemctl enable --quiet --now millstream-agent && millstream-agent status");
    let agent = || machine.run("systemctl show -p MainPID --value millstream-agent");
    let first = agent();
    // Again: nothing is asked of the administrator, and nothing is kept beside an unchanged configuration.
    let told = machine.run("/srv/0.1.0/install.sh");
    assert_eq!(told.lines().count(), 1, "{told}");
    machine.run("echo '# mine' >>/etc/millstream/agent.yaml && echo '# new' >>/srv/0.2.0/agent.yaml");
    let told = machine.run("/srv/0.2.0/install.sh");
    assert!(
        told.contains("kept /etc/millstream/agent.yaml; the new default is /etc/millstream/agent.yaml.dist"),
        "{told}"
    );
    machine.run(
        "grep -q '# mine' /etc/millstream/agent.yaml && grep -q '# new' /etc/millstream/agent.yaml.dist",
    );
    assert_ne!(agent(), first, "the agent was replaced");
    machine.run("millstream-agent status");

    let told = machine.run("/srv/0.2.0/install.sh --uninstall");
    assert!(told.contains("/etc/millstream stays"), "{told}");
    let left = machine
        .run("pgrep -l millstream || true; find /usr/local /etc/systemd /etc/tmpfiles.d /var/lib /run -name '*millstream*'");
    assert_eq!(left, "");
    // Again, with nothing there.
    machine.run("/srv/0.2.0/install.sh --uninstall");
    // Into another root: this host's own services are left alone.
    machine.run("mkdir /srv/root && DESTDIR=/srv/root PREFIX=/opt /srv/0.2.0/install.sh");
    machine.run("/srv/root/opt/bin/millstream-agent --version && test ! -e /etc/systemd/system/millstream-agent.service");
    machine.run("grep -q '^ExecStart=/opt/bin/' /srv/root/etc/systemd/system/millstream-agent.service");

    let told = refused(&machine.output("/srv/0.2.0/install.sh --update"));
    assert_eq!(told, "install.sh: no such option: `--update`; there is --uninstall\n");
    let told = refused(&machine.output("setpriv --reuid nobody --clear-groups /srv/0.2.0/install.sh"));
    assert_eq!(told, "install.sh: run this as root\n");
    let told = refused(&machine.output("rm /srv/0.2.0/agent.yaml; /srv/0.2.0/install.sh"));
    assert_eq!(
        told,
        "install.sh: no `agent.yaml` in /srv/0.2.0: run this script where the whole archive is unpacked\n"
    );
}
