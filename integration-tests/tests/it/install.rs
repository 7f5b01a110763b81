//! Installing as administrators do it: the real package with the real dpkg on machines with systemd and an SSH server of
//! their own, by the words of deploy/README.md; and what becomes of tasks while the agent below them is replaced.

mod document;
mod image;
mod script;
mod tasks;

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use millstream_integration_tests::{authority::Certificate, lab::Lab, machine::Machine, package::Package};

/// A machine for the one host of a lab.
fn boot(lab: &Lab, name: &str) -> Machine {
    let directory = lab.directory().join(name);
    std::fs::create_dir_all(&directory).unwrap();
    Machine::boot(lab.host(name), &directory, &[])
}

/// The package under test; made once for all tests.
fn package() -> &'static Package {
    static PRESENT: OnceLock<Package> = OnceLock::new();
    PRESENT.get_or_init(|| Package::present(&packages().join("present")))
}

/// The version after it.
fn next_package() -> &'static Package {
    static NEXT: OnceLock<Package> = OnceLock::new();
    NEXT.get_or_init(|| package().next(&packages().join("next")))
}

fn packages() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("packages")
}

/// Puts an agent's certificate where the default configuration looks for it.
fn bring_certificate(machine: &Machine, certificate: &Certificate) {
    let bring = |from: &Path, to: &str| machine.bring(from, &format!("/etc/millstream/{to}"));
    bring(&certificate.authority, "ca.pem");
    bring(&certificate.revocations, "revoked.pem");
    bring(&certificate.certificate, "agent.pem");
    bring(&certificate.key, "agent.key");
}
