//! The package as administrators get it: made by `deploy/package` from the static agent with the profile of the tests, or one
//! that somebody has built; and the version after it.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use millstream_common::protocol::VERSION;

use crate::tools;

/// The Debian package and the archive for other hosts, of one version.
#[derive(Debug)]
pub struct Package {
    /// What the program in it calls itself.
    pub version: String,
    /// For dpkg.
    pub debian: PathBuf,
    /// For `install.sh`.
    pub archive: PathBuf,
}

impl Package {
    /// What is under test: what `deploy/package` has put into the directory that `MILLSTREAM_PACKAGE` names, else a package
    /// that is made in `directory`.
    ///
    /// # Panics
    /// When there is none, or none can be made: cargo-deb must be there.
    #[must_use]
    pub fn present(directory: &Path) -> Self {
        match env::var_os("MILLSTREAM_PACKAGE") {
            Some(built) => Self::built(Path::new(&built)),
            None => make(VERSION.to_owned(), &tools::static_agent_program(), directory),
        }
    }

    /// The version after it: a package of the same program, which calls itself otherwise on its command line. What it says of
    /// itself over the wire may stay: compilers put short texts into instructions.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn next(&self, directory: &Path) -> Self {
        fs::create_dir_all(directory).expect("the directory of packages can be made");
        let mut unpack = Command::new("tar");
        unpack.arg("-xOf").arg(&self.archive);
        unpack.args(["--exclude=*/completions/*", "--wildcards", "*/millstream-agent"]);
        let mut program = tools::output(&mut unpack).stdout;
        let next = after(&self.version);
        let count = rename(&mut program, self.version.as_bytes(), next.as_bytes());
        assert!(count > 0, "no `{}` in the program of {}", self.version, self.archive.display());
        let path = directory.join("millstream-agent");
        fs::write(&path, program).expect("the directory of packages can be written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .expect("a file of ours can be made a program");
        let told = tools::run(Command::new(&path).arg("--version"));
        assert_eq!(told, format!("millstream-agent {next}\n"));
        make(next, &path, directory)
    }

    fn built(directory: &Path) -> Self {
        let files =
            fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let files: Vec<PathBuf> = files.filter_map(Result::ok).map(|entry| entry.path()).collect();
        let the = |suffix: &str| {
            let mut found = files.iter().filter(|path| tools::text(path).ends_with(suffix));
            match (found.next(), found.next()) {
                (Some(path), None) => path.clone(),
                _ => panic!(
                    "not one file *{suffix} in {}: run deploy/package --output there",
                    directory.display()
                ),
            }
        };
        Self { version: VERSION.to_owned(), debian: the(".deb"), archive: the(".tar.gz") }
    }
}

fn make(version: String, program: &Path, directory: &Path) -> Package {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut path: Vec<PathBuf> = tools::cargo_deb().parent().map(Path::to_path_buf).into_iter().collect();
    path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    let mut command = Command::new(root.join("deploy/package"));
    command
        .args(["--fast", "--version", &version, "--binary"])
        .arg(program)
        .arg("--output")
        .arg(directory)
        .env("PATH", env::join_paths(path).expect("no path has a colon"));
    let told = tools::run(&mut command);
    let made = |suffix: &str| {
        let line = told.lines().find(|line| line.ends_with(suffix));
        PathBuf::from(line.unwrap_or_else(|| panic!("no {suffix} was made:\n{told}")))
    };
    Package { debian: made(".deb"), archive: made(".tar.gz"), version }
}

/// The version with another last digit, so that it is as long.
fn after(version: &str) -> String {
    let (rest, last) = version.split_at(version.len() - 1);
    let digit: u8 = last.parse().expect("a version ends with a digit");
    format!("{rest}{}", (digit + 1) % 10)
}

/// Replaces one text by another that is as long, wherever it stands, and tells how often it did. In what a linker has made
/// nothing moves.
fn rename(program: &mut [u8], from: &[u8], to: &[u8]) -> usize {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> =
        program.windows(from.len()).enumerate().filter(|(_, text)| *text == from).map(|(at, _)| at).collect();
    for &at in &places {
        program[at..at + to.len()].copy_from_slice(to);
    }
    places.len()
}
