//! A container engine of a test's own: podman or docker, with storage, daemon and images below one directory.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    tools::{self, text},
    wait::{self, wait_until_true},
};

/// Mounts where control groups are of version 2 alone, as podman's runtime wants them, and then a place that is held until the standard input ends.
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
/// From asking for the namespace or the daemon to its word.
const READY_MAX: Duration = Duration::from_secs(30);
/// From asking a daemon to end to its end.
const END_MAX: Duration = Duration::from_secs(20);
/// Where a daemon finds its other programs.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An engine with images and containers of its own. Dropping it removes them.
#[derive(Debug)]
pub struct Engine {
    kind: &'static str,
    directory: tempfile::TempDir,
    /// Holds what the engine needs: the daemon, or a place with its mounts.
    holder: Child,
}

impl Engine {
    /// Podman, with the images `box` (busybox alone, and the variable `GREETING`) and `empty` (nothing at all).
    ///
    /// # Panics
    /// When this needs root, or packages that `integration-tests/setup` installs.
    #[must_use]
    pub fn podman() -> Self {
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
        Self::behind("podman", &script, directory, holder)
    }

    /// Docker, with a daemon in a network of its own, and the same images.
    ///
    /// # Panics
    /// When this needs root, or packages that `integration-tests/setup` brings.
    #[must_use]
    pub fn docker() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let (path, programs) = (directory.path().display(), tools::set_up("docker"));
        let programs = programs.display();
        let log = fs::File::create(directory.path().join("log")).expect("the directory can be written");
        // Its containers share its network, or have none: nothing of the machine's is changed for them.
        let start = "ip link set lo up && exec dockerd --iptables=false --ip6tables=false --bridge=none \
                     --storage-driver=vfs --data-root \"$1/data\" --exec-root \"$1/exec\" --pidfile \"$1/pid\" \
                     --host \"unix://$1/socket\"";
        let holder = Command::new("unshare")
            .args(["--net", "--mount", "sh", "-c", start, "sh", text(directory.path())])
            .env("PATH", format!("{programs}/usr/sbin:{programs}/usr/bin:{SYSTEM_PATH}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("`unshare` is on every Debian");
        let script =
            format!("#!/bin/sh\nexec {programs}/usr/bin/docker --host unix://{path}/socket \"$@\"\n");
        let socket = directory.path().join("socket");
        wait_until_true("the daemon listens", READY_MAX, || socket.exists());
        Self::behind("docker", &script, directory, holder)
    }

    fn behind(kind: &'static str, script: &str, directory: tempfile::TempDir, holder: Child) -> Self {
        let engine = Self { kind, directory, holder };
        fs::write(engine.command(), script).expect("the directory can be written");
        fs::set_permissions(engine.command(), fs::Permissions::from_mode(0o755)).expect("it is ours");
        engine.import("empty", &[], None);
        engine.import("box", &["--change", "ENV GREETING=hello"], Some(&tools::installed("busybox")));
        engine
    }

    /// What definitions call it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// The engine's command, as a definition names it with `engine`.
    #[must_use]
    pub fn command(&self) -> PathBuf {
        self.directory.path().join(self.kind)
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
        self.run(&[&["import"], options, &[text(&archive), name]].concat());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let run = |arguments: &[&str]| Command::new(self.command()).args(arguments).output();
        if let Ok(listed) = run(&["ps", "--all", "--quiet"]) {
            for id in String::from_utf8_lossy(&listed.stdout).split_whitespace() {
                if let Ok(output) = run(&["rm", "--force", id])
                    && !output.status.success()
                {
                    eprintln!("a container stays: {}", tools::both(&output));
                }
            }
        }
        // Asked, a daemon ends what it has started.
        let _gone = kill_process(Pid::from_child(&self.holder), Signal::TERM);
        if !wait::is_soon(END_MAX, || matches!(self.holder.try_wait(), Ok(Some(_)))) {
            let _ended_meanwhile = self.holder.kill();
            let _reaped = self.holder.wait();
        }
    }
}
