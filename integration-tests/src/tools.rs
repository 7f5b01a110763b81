//! The programs that the tests drive, found or refused with the next step.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// The agent's program: the one named by `MILLSTREAM_AGENT`, else the one that cargo has built from the agent's own
/// `main.rs` together with these tests.
///
/// # Panics
/// When neither is there.
#[must_use]
pub fn agent_program() -> PathBuf {
    if let Some(path) = env::var_os("MILLSTREAM_AGENT") {
        return PathBuf::from(path);
    }
    beside_this_program("agent-under-test")
}

/// The agent as one static file, with the profile of the tests: the one named by `MILLSTREAM_STATIC_AGENT`, else the one
/// that `deploy/build-static` has made.
///
/// # Panics
/// When neither is there.
#[must_use]
pub fn static_agent_program() -> PathBuf {
    if let Some(path) = env::var_os("MILLSTREAM_STATIC_AGENT") {
        return PathBuf::from(path);
    }
    let this = env::current_exe().expect("the system knows the program's path");
    this.ancestors()
        .map(|directory| directory.join("static/millstream-agent"))
        .find(|path| path.is_file())
        .expect("no static agent: run `deploy/build-static --profile dev`")
}

/// A program of this package, built by cargo into the same directory as (or the one above) this test or benchmark.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn beside_this_program(name: &str) -> PathBuf {
    let this = env::current_exe().expect("the system knows the program's path");
    this.ancestors()
        .skip(1)
        .take(3)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("no `{name}` near {}: build the package with cargo", this.display()))
}

/// grpcurl: the one named by `GRPCURL`, on the `PATH`, or put below `target/tools` by `integration-tests/setup`.
///
/// # Panics
/// When it is nowhere.
#[must_use]
pub fn grpcurl() -> PathBuf {
    if let Some(path) = env::var_os("GRPCURL") {
        return PathBuf::from(path);
    }
    below_target("tools/grpcurl/bin/grpcurl")
        .chain(on_path("grpcurl"))
        .find(|path| path.is_file())
        .expect("no grpcurl: run integration-tests/setup, or name one with GRPCURL")
}

/// The directory with a `python3` that has Avocado: put below `target/tools` by `integration-tests/setup`.
///
/// # Panics
/// When it is nowhere.
#[must_use]
pub fn avocado_programs() -> PathBuf {
    below_target("tools/avocado/bin")
        .find(|programs| programs.join("avocado").is_file())
        .expect("no Avocado below target/tools: run integration-tests/setup")
}

/// cargo-deb: put below `target/tools` by `integration-tests/setup`, or on the `PATH`.
///
/// # Panics
/// When it is nowhere.
#[must_use]
pub fn cargo_deb() -> PathBuf {
    below_target("tools/cargo-deb/bin/cargo-deb")
        .chain(on_path("cargo-deb"))
        .find(|path| path.is_file())
        .expect("no cargo-deb: run integration-tests/setup")
}

/// Where something may lie below the directory that cargo builds in.
fn below_target(path: &'static str) -> impl Iterator<Item = PathBuf> {
    let this = env::current_exe().expect("the system knows the program's path");
    let directories: Vec<PathBuf> = this.ancestors().map(|directory| directory.join(path)).collect();
    directories.into_iter()
}

/// What `integration-tests/setup` has put below `target/tools` under a name.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn set_up(name: &str) -> PathBuf {
    let this = env::current_exe().expect("the system knows the program's path");
    this.ancestors()
        .map(|directory| directory.join("tools").join(name))
        .find(|path| path.is_dir())
        .unwrap_or_else(|| panic!("no `{name}` below target/tools: run integration-tests/setup"))
}

/// A program on the `PATH`.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn installed(name: &str) -> PathBuf {
    on_path(name)
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("no `{name}` on the PATH: run integration-tests/setup"))
}

fn on_path(name: &str) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories: Vec<PathBuf> =
        env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")]).collect();
    let name = name.to_owned();
    directories.into_iter().map(move |directory| directory.join(&name))
}

/// Runs a command to its end and returns what it printed.
///
/// # Panics
/// When it cannot be started or fails; the message has its errors.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, both(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command to its end, whatever that is.
///
/// # Panics
/// When it cannot be started.
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Both outputs as text.
#[must_use]
pub fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The path as text.
///
/// # Panics
/// When it is not UTF-8: the tests make no such paths.
#[must_use]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("the tests make no such paths")
}
