//! One network namespace: made, entered, removed. Names carry the number of the process that made them, so that what a
//! killed test run has left is found and removed by the next one.

use std::{
    fs, io, panic,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use crate::{processes, tools};

/// Where `ip` keeps the names of namespaces.
const DIRECTORY: &str = "/run/netns";
/// First part of every name of ours.
const PREFIX: &str = "millstream-";

static NUMBER: AtomicU32 = AtomicU32::new(0);
static TIDY: Once = Once::new();

/// A network namespace with its loopback up. Dropping it ends what runs inside and removes it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: fs::File,
}

impl Namespace {
    /// Makes one. The first call of a process removes what dead processes have left.
    ///
    /// # Panics
    /// When the process may not: it needs root and `ip`.
    #[must_use]
    pub fn create(label: &str) -> Self {
        TIDY.call_once(remove_stale);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{label}", std::process::id());
        tools::run(Command::new("ip").args(["netns", "add", &name]));
        let path = Path::new(DIRECTORY).join(&name);
        let file = fs::File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let namespace = Self { name, file };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// Its name, as `ip -n` takes it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` inside.
    ///
    /// # Panics
    /// When it fails.
    pub fn ip(&self, arguments: &[&str]) -> String {
        tools::run(Command::new("ip").args(["-n", &self.name]).args(arguments))
    }

    /// Runs `work` on a thread of its own inside the namespace. Threads and processes that it starts are inside too.
    ///
    /// # Panics
    /// As `work` does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&self.file),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )
            .unwrap_or_else(|error| panic!("cannot enter {}: {error}", self.name));
            work()
        };
        thread::scope(|scope| {
            let name = thread::current().name().unwrap_or("test").to_owned();
            let worker = thread::Builder::new().name(name).spawn_scoped(scope, inside);
            match worker.expect("a thread can be started").join() {
                Ok(value) => value,
                Err(payload) => panic::resume_unwind(payload),
            }
        })
    }

    /// Starts a program inside.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.run(|| command.spawn())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Ends everything in a namespace and removes its name. Failing is reported, never fatal: it may run while a test panics.
fn remove(name: &str) {
    // A process may start another between the look and the kill: look until there is none, a few times.
    for _ in 0..10 {
        let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() else { break };
        let pids = String::from_utf8_lossy(&output.stdout).into_owned();
        if pids.trim().is_empty() {
            break;
        }
        pids.split_whitespace().filter_map(|pid| pid.parse().ok()).for_each(processes::kill);
    }
    match Command::new("ip").args(["netns", "delete", name]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => eprintln!("namespace {name} stays: {}", tools::both(&output)),
        Err(error) => eprintln!("namespace {name} stays: {error}"),
    }
}

fn remove_stale() {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().filter_map(Result::ok);
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if maker.is_some_and(|pid| !PathBuf::from("/proc").join(pid).exists()) {
            remove(&name);
        }
    }
}
