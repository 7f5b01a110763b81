//! A certificate authority and its certificates, made by the agent's own `pki` command as a user would.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::tools;

/// A directory with an authority's files.
#[derive(Debug)]
pub struct Authority {
    directory: PathBuf,
}

/// The files that one end of a connection needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authority's certificate, by which the other end is judged.
    pub authority: PathBuf,
    /// The authority's list of revoked certificates.
    pub revocations: PathBuf,
}

impl Authority {
    /// Makes an authority in a new directory.
    ///
    /// # Panics
    /// When `pki init` fails.
    #[must_use]
    pub fn create(directory: &Path) -> Self {
        tools::run(Command::new(tools::agent_program()).args(["pki", "init", "--dir"]).arg(directory));
        Self { directory: directory.to_path_buf() }
    }

    /// A certificate for an agent that is dialled at `address`.
    ///
    /// # Panics
    /// When `pki issue` fails.
    #[must_use]
    pub fn agent(&self, name: &str, address: &str) -> Certificate {
        self.issue("agent", name, &["--address", address])
    }

    /// A certificate for a controller: may run blocks.
    ///
    /// # Panics
    /// When `pki issue` fails.
    #[must_use]
    pub fn controller(&self, name: &str) -> Certificate {
        self.issue("controller", name, &[])
    }

    /// A certificate for an operator: may only look.
    ///
    /// # Panics
    /// When `pki issue` fails.
    #[must_use]
    pub fn operator(&self, name: &str) -> Certificate {
        self.issue("operator", name, &[])
    }

    /// Takes a certificate back: puts it on the list that agents look at.
    ///
    /// # Panics
    /// When `pki revoke` fails.
    pub fn revoke(&self, certificate: &Certificate) {
        let mut command = Command::new(tools::agent_program());
        command.args(["pki", "revoke", "--dir"]).arg(&self.directory).arg(&certificate.certificate);
        tools::run(&mut command);
    }

    fn issue(&self, role: &str, name: &str, more: &[&str]) -> Certificate {
        let mut command = Command::new(tools::agent_program());
        command.args(["pki", "issue", "--dir"]).arg(&self.directory);
        tools::run(command.args(["--role", role, "--name", name]).args(more));
        let file = |name: String| {
            let path = self.directory.join(name);
            assert!(path.is_file(), "{} was not made", path.display());
            path
        };
        Certificate {
            certificate: file(format!("{role}-{name}.pem")),
            key: file(format!("{role}-{name}.key")),
            authority: file("ca.pem".to_owned()),
            revocations: file("revoked.pem".to_owned()),
        }
    }
}
