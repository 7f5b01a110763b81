//! A container engine of a test's own: podman with its storage in a directory, in a namespace of mounts where control
//! groups are of version 2 alone, as its runtime wants them.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{
    tools::{self, text},
    wait::wait_until_true,
};

/// Mounts, and then a place that is held until the standard input ends.
const HOLD: &str = "umount -l /sys/fs/cgroup/* 2>/dev/null; umount -l /sys/fs/cgroup\n\
    mount -t cgroup2 none /sys/fs/cgroup && echo ready >\"$1/ready\" && exec cat";
/// As on a machine where not everything may be set: no groups and limits, and the network of the machine.
const CONTAINERS: &str = "[containers]\n\
    cgroups = \"disabled\"\n\
    default_ulimits = [\"nofile=1024:1024\", \"nproc=1000:1000\"]\n\
    netns = \"host\"\n\
    [engine]\n\
    cgroup_manager = \"cgroupfs\"\n\
    runtime = \"crun\"\n\
    events_logger = \"none\"\n";
/// From asking for the namespace to its mounts.
const READY_MAX: Duration = Duration::from_secs(10);

/// An engine with images and containers of its own. Dropping it removes them.
#[derive(Debug)]
pub struct Podman {
    directory: tempfile::TempDir,
    holder: Child,
}

impl Podman {
    /// Makes one, with the images `box` (busybox alone, and the variable `GREETING`) and `empty` (nothing at all).
    ///
    /// # Panics
    /// When this needs root, or packages that `integration-tests/setup` installs.
    #[must_use]
    pub fn start() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let path = directory.path();
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{0}/root\"\nrunroot = \"{0}/run\"\n",
            path.display()
        );
        fs::write(path.join("containers.conf"), CONTAINERS).expect("the directory can be written");
        fs::write(path.join("storage.conf"), storage).expect("the directory can be written");
        let holder = Command::new("unshare")
            .args(["--mount", "sh", "-c", HOLD, "sh", text(path)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("`unshare` is on every Debian");
        wait_until_true("the engine has its mounts", READY_MAX, || path.join("ready").exists());
        let script = format!(
            "#!/bin/sh\n\
             export CONTAINERS_CONF='{0}/containers.conf' CONTAINERS_STORAGE_CONF='{0}/storage.conf'\n\
             exec nsenter --mount=/proc/{1}/ns/mnt {2} \"$@\"\n",
            path.display(),
            holder.id(),
            tools::installed("podman").display(),
        );
        fs::write(path.join("podman"), script).expect("the directory can be written");
        fs::set_permissions(path.join("podman"), fs::Permissions::from_mode(0o755)).expect("it is ours");
        let engine = Self { directory, holder };
        engine.import("empty", &[], None);
        engine.import("box", &["--change", "ENV=GREETING=hello"], Some(&tools::installed("busybox")));
        engine
    }

    /// The engine's command, as a definition names it with `engine`.
    #[must_use]
    pub fn command(&self) -> PathBuf {
        self.directory.path().join("podman")
    }

    /// Runs it.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, arguments: &[&str]) -> String {
        tools::run(Command::new(self.command()).args(arguments).stdin(Stdio::null()))
    }

    /// Names of all containers, each with its state: `up`, `exited`, `created`.
    #[must_use]
    pub fn containers(&self) -> Vec<String> {
        let listed = self.run(&["ps", "--all", "--format", "{{.Names}} {{.Status}}"]);
        let short = |line: &str| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ").to_lowercase();
        listed.lines().map(short).collect()
    }

    /// Makes an image of busybox under all its names, or of nothing.
    fn import(&self, name: &str, options: &[&str], busybox: Option<&Path>) {
        let root = self.directory.path().join(name);
        fs::create_dir_all(root.join("bin")).expect("the directory can be written");
        match busybox {
            Some(busybox) => {
                fs::copy(busybox, root.join("bin/busybox")).expect("it can be copied");
                for applet in
                    tools::run(Command::new(busybox).arg("--list")).lines().filter(|name| *name != "busybox")
                {
                    symlink("busybox", root.join("bin").join(applet)).expect("each has a name of its own");
                }
            }
            None => fs::remove_dir(root.join("bin")).expect("it is empty"),
        }
        let archive = self.directory.path().join(format!("{name}.tar"));
        tools::run(Command::new("tar").args(["-C", text(&root), "-cf", text(&archive), "."]));
        self.run(&[&["import", "--quiet"], options, &[text(&archive), name]].concat());
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let removed = Command::new(self.command()).args(["rm", "--all", "--force", "--time", "0"]).output();
        if let Ok(output) = removed
            && !output.status.success()
        {
            eprintln!("containers stay: {}", tools::both(&output));
        }
        let _ended_already = self.holder.kill();
        let _reaped = self.holder.wait();
    }
}
