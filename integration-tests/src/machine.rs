//! A machine: a host of a lab with files, processes, users and an init system of its own, as an administrator meets it.
//!
//! The root is this machine's under a layer in memory; systemd is its first process and starts the distribution's SSH
//! server. Whatever is installed, started or broken there stays there.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use crate::{lab::Host, processes, tools, wait};

/// From the first process to a machine that takes commands: a second when nobody else is at work.
const BOOT_MAX: Duration = Duration::from_secs(60);

/// A running machine. Dropping it ends all that runs there and forgets its files.
#[derive(Debug)]
pub struct Machine {
    /// Waits for the first process, and takes it along.
    keeper: Child,
    init: u32,
    group: PathBuf,
    directory: PathBuf,
}

impl Machine {
    /// Boots a machine on a host of a lab. `names` are the lines of its `/etc/hosts`.
    ///
    /// # Panics
    /// When it does not boot; the message has what systemd said.
    #[must_use]
    pub fn boot(host: &Host, directory: &Path, names: &[(String, Ipv4Addr)]) -> Self {
        let place = directory.join("root");
        fs::create_dir_all(&place).expect("the lab's directory can be written");
        let group = unified_groups().join(host.namespace().name());
        fs::create_dir_all(&group).expect("a control group of version 2 can be made");
        let hosts: Vec<String> = names.iter().map(|(name, address)| format!("{address} {name}")).collect();
        let log = fs::File::create(directory.join("boot.log")).expect("the lab's directory can be written");
        let mut command = Command::new("bash");
        command
            // The control group namespace begins at the group that this process is in.
            .args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""])
            .arg(&group)
            .args(["unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"])
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/machine/boot"))
            .args([&place, Path::new(host.name()), Path::new(&hosts.join("\n"))])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log);
        let keeper = host.namespace().spawn(&mut command).expect("bash can be started");
        let mut machine = Self { init: 0, keeper, group, directory: directory.to_path_buf() };
        machine.wait_for_boot();
        machine
    }

    fn wait_for_boot(&mut self) {
        let told = || fs::read_to_string(self.directory.join("boot.log")).unwrap_or_default();
        self.init = wait::wait_until("the first process of a machine", BOOT_MAX, || {
            if let Ok(Some(status)) = self.keeper.try_wait() {
                panic!("the machine did not boot: {status}\n{}", told());
            }
            let begun = |pid: &u32| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "systemd")
            };
            processes::children(self.keeper.id()).into_iter().find(begun)
        });
        // Processes must not stay in a group that hands controllers on to others: systemd has left it.
        fs::write(unified_groups().join("cgroup.procs"), self.keeper.id().to_string())
            .expect("a process can be moved");
        wait::wait_until_true("the machine takes commands", BOOT_MAX, || {
            self.output("systemctl is-active ssh.service machine.target").status.success()
        });
    }

    /// A program of the machine, as root would start it at its console.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.init.to_string()])
            .args(["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup"])
            // Entered there, not here.
            .args(["--", "env", "--chdir=/root", program])
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .envs([("HOME", "/root"), ("USER", "root"), ("SHELL", "/bin/bash"), ("LANG", "C.UTF-8")])
            .stdin(Stdio::null());
        command
    }

    /// Runs lines of shell and returns what they print.
    ///
    /// # Panics
    /// When one fails.
    pub fn run(&self, script: &str) -> String {
        tools::run(self.command("bash").args(["-euo", "pipefail", "-c", script]))
    }

    /// Runs lines of shell, whatever becomes of them.
    ///
    /// # Panics
    /// When no shell can be started.
    #[must_use]
    pub fn output(&self, script: &str) -> Output {
        tools::output(self.command("bash").args(["-c", script]))
    }

    /// Where a file of the machine is found from outside.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// Brings a file.
    ///
    /// # Panics
    /// When it cannot be read or written.
    pub fn bring(&self, from: &Path, to: &str) {
        let target = self.path(to);
        fs::create_dir_all(target.parent().expect("a file lies in a directory"))
            .expect("a machine's files can be written");
        fs::copy(from, &target).unwrap_or_else(|error| panic!("{} to {to}: {error}", from.display()));
    }

    /// What its services have logged.
    #[must_use]
    pub fn journal(&self) -> String {
        tools::both(&self.output("journalctl --no-pager --output=short-monotonic -u 'millstream*' -u ssh"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Killing the first process of a process namespace ends all of it; it is not reaped before they are gone.
        if self.init == 0 {
            // It may have ended already.
            let _ended = self.keeper.kill();
        } else {
            processes::kill(self.init);
        }
        let _reaped = self.keeper.wait();
        if !remove_groups(&self.group) {
            eprintln!("the control group {} stays", self.group.display());
        }
    }
}

/// Removes a group with those below it, and tells whether it is gone.
fn remove_groups(group: &Path) -> bool {
    let below = fs::read_dir(group).into_iter().flatten().filter_map(Result::ok);
    below.filter(|entry| entry.path().is_dir()).for_each(|entry| {
        remove_groups(&entry.path());
    });
    fs::remove_dir(group).is_ok() || !group.exists()
}

/// Where control groups of version 2 are mounted.
fn unified_groups() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("the system lists its mounts");
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let mount = mount.expect("control groups of version 2 are mounted: machines need them");
    PathBuf::from(mount.split(' ').nth(1).expect("a mount has a place"))
}
