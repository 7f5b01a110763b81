//! The package as administrators get it, made by `deploy/package` from the static agent with the profile of the tests.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use crate::tools;

/// The Debian package and the archive for other hosts, of one version.
#[derive(Debug)]
pub struct Package {
    /// For dpkg.
    pub debian: PathBuf,
    /// For `install.sh`.
    pub archive: PathBuf,
}

impl Package {
    /// Makes the package in a directory.
    ///
    /// # Panics
    /// When it cannot be made: cargo-deb must be there.
    #[must_use]
    pub fn make(version: &str, directory: &Path) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut path: Vec<PathBuf> = tools::cargo_deb().parent().map(Path::to_path_buf).into_iter().collect();
        path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        let mut command = Command::new(root.join("deploy/package"));
        command
            .args(["--fast", "--version", version, "--binary"])
            .arg(tools::static_agent_program())
            .arg("--output")
            .arg(directory)
            .env("PATH", env::join_paths(path).expect("no path has a colon"));
        let told = tools::run(&mut command);
        let made = |suffix: &str| {
            let line = told.lines().find(|line| line.ends_with(suffix));
            PathBuf::from(line.unwrap_or_else(|| panic!("no {suffix} was made:\n{told}")))
        };
        Self { debian: made(".deb"), archive: made(".tar.gz") }
    }
}
