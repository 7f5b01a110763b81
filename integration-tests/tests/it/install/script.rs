//! `install.sh`, for hosts without dpkg: installs, updates and removes from the unpacked archive.

use std::process::Output;

use millstream_integration_tests::{lab::Lab, machine::Machine, package::Package, tools};

use super::{boot, bring_certificate, next_package, package};

/// Unpacks the archive into `/srv/NAME`.
fn unpack(machine: &Machine, package: &Package, name: &str) {
    machine.bring(&package.archive, "/srv/archive.tar.gz");
    machine.run(&format!("cd /srv && tar -xf archive.tar.gz && mv millstream-agent-*/ {name}"));
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
    unpack(&machine, package(), "present");
    unpack(&machine, next_package(), "next");
    let told = machine.run("/srv/present/install.sh");
    let version = &package().version;
    let installed = format!("installed /usr/local/bin/millstream-agent: millstream-agent {version}\n");
    assert!(told.contains(&installed), "{told}");
    assert!(
        told.contains("next: put ca.pem, revoked.pem, agent.pem and agent.key into /etc/millstream"),
        "{told}"
    );
    bring_certificate(&machine, &lab.authority().agent("one", &lab.host("one").address().to_string()));
    machine.run("systemctl enable --quiet --now millstream-agent && millstream-agent status");
    let agent = || machine.run("systemctl show -p MainPID --value millstream-agent");
    let first = agent();
    // Again: nothing is asked of the administrator, and nothing is kept beside an unchanged configuration.
    let told = machine.run("/srv/present/install.sh");
    assert_eq!(told.lines().count(), 1, "{told}");
    machine.run("echo '# mine' >>/etc/millstream/agent.yaml && echo '# new' >>/srv/next/agent.yaml");
    let told = machine.run("/srv/next/install.sh");
    assert!(
        told.contains("kept /etc/millstream/agent.yaml; the new default is /etc/millstream/agent.yaml.dist"),
        "{told}"
    );
    machine.run(
        "grep -q '# mine' /etc/millstream/agent.yaml && grep -q '# new' /etc/millstream/agent.yaml.dist",
    );
    assert_ne!(agent(), first, "the agent was replaced");
    let told =
        machine.run(&format!("millstream-agent status >/dev/null && /proc/{}/exe --version", agent().trim()));
    assert_eq!(told, format!("millstream-agent {}\n", next_package().version));

    let told = machine.run("/srv/next/install.sh --uninstall");
    assert!(told.contains("/etc/millstream stays"), "{told}");
    let left = machine
        .run("pgrep -l millstream || true; find /usr/local /etc/systemd /etc/tmpfiles.d /var/lib /run -name '*millstream*'");
    assert_eq!(left, "");
    // Again, with nothing there.
    machine.run("/srv/next/install.sh --uninstall");
    // Into another root: this host's own services are left alone.
    machine.run("mkdir /srv/root && DESTDIR=/srv/root PREFIX=/opt /srv/next/install.sh");
    machine.run("/srv/root/opt/bin/millstream-agent --version && test ! -e /etc/systemd/system/millstream-agent.service");
    machine.run("grep -q '^ExecStart=/opt/bin/' /srv/root/etc/systemd/system/millstream-agent.service");

    // Where there is nothing but a shell: no systemd, no dpkg, none of its programs.
    machine.run(
        "cd /srv && mkdir -p small/bin small/srv small/proc && mount -t proc proc small/proc && cp -r present small/srv/\n\
         cp /bin/busybox small/bin/\n\
         for name in $(busybox --list); do [ $name = busybox ] || ln -s busybox small/bin/$name; done",
    );
    let small = |command: &str| {
        machine.run(&format!("PATH=/usr/sbin:/usr/local/bin:/bin chroot /srv/small /bin/sh -c '{command}'"))
    };
    let told = small("/srv/present/install.sh");
    assert!(told.contains("then have this host start: /usr/local/bin/millstream-agent serve"), "{told}");
    assert_eq!(small("millstream-agent --version"), format!("millstream-agent {version}\n"));
    small("/srv/present/install.sh --uninstall");
    assert!(!machine.path("/srv/small/usr/local/bin/millstream-agent").exists());

    let told = refused(&machine.output("/srv/next/install.sh --update"));
    assert_eq!(told, "install.sh: no such option: `--update`; there is --uninstall\n");
    let told = refused(&machine.output("setpriv --reuid nobody --clear-groups /srv/next/install.sh"));
    assert_eq!(told, "install.sh: run this as root\n");
    let told = refused(&machine.output("rm /srv/next/agent.yaml; /srv/next/install.sh"));
    assert_eq!(
        told,
        "install.sh: no `agent.yaml` in /srv/next: run this script where the whole archive is unpacked\n"
    );
}
