//! OpenSSH on a host of the lab: the system's own server with keys and a configuration of its own, and what a client needs
//! to log in there.

use std::{
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{lab::Host, processes, tools, wait::wait_until_true};

/// The port of the servers: each has a network of its own.
pub const PORT: u16 = 22;
/// From starting a server to its first answer.
const READY_MAX: Duration = Duration::from_secs(20);
/// Where the server wants to shut its unprivileged part in.
const SEPARATION: &str = "/run/sshd";

/// A running server. Dropping it ends it and every login.
#[derive(Debug)]
pub struct Sshd {
    child: Child,
    directory: PathBuf,
    address: std::net::Ipv4Addr,
}

impl Sshd {
    /// Starts a server in a host's network. Its logins have their caches beside its own files.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(host: &Host, directory: &Path) -> Self {
        Self::start_with(host, directory, "")
    }

    /// As [`Sshd::start`], with more lines of configuration.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_with(host: &Host, directory: &Path, more: &str) -> Self {
        let directory = directory.join(format!("sshd-{}", host.name()));
        fs::create_dir_all(directory.join("cache")).expect("the lab's directory can be written");
        fs::create_dir_all(SEPARATION).expect("root may make it");
        for name in ["host_key", "identity", "stranger"] {
            let path = directory.join(name);
            if !path.exists() {
                tools::run(
                    Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path),
                );
            }
        }
        let read = |name: &str| fs::read_to_string(directory.join(name)).expect("it was just made");
        let write = |name: &str, text: String| {
            fs::write(directory.join(name), text).expect("the lab's directory can be written");
        };
        write("authorized_keys", read("identity.pub"));
        write("known_hosts", format!("{} {}", host.address(), read("host_key.pub")));
        let at = directory.display();
        write(
            "sshd_config",
            format!(
                "Port {PORT}\nListenAddress {}\nHostKey {at}/host_key\nAuthorizedKeysFile {at}/authorized_keys\nPidFile none\n\
                 UsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nLogLevel VERBOSE\n\
                 SetEnv XDG_CACHE_HOME={at}/cache\n{more}",
                host.address()
            ),
        );
        // Nothing of the configuration of whoever runs the tests.
        write(
            "ssh_config",
            format!(
                "Host *\nUser root\nIdentityFile {at}/identity\nIdentitiesOnly yes\nUserKnownHostsFile {at}/known_hosts\nGlobalKnownHostsFile none\n"
            ),
        );
        let child = launch(host, &directory);
        Self { child, directory, address: host.address() }
    }

    /// What a stream definition says to reach it, with the client's configuration.
    #[must_use]
    pub fn url(&self) -> String {
        format!("ssh://root@{}?config={}", self.address, self.client_configuration().display())
    }

    /// A client's configuration that knows the server and has a key for it.
    #[must_use]
    pub fn client_configuration(&self) -> PathBuf {
        self.directory.join("ssh_config")
    }

    /// A file beside the server's own.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// What logins have put into their caches.
    #[must_use]
    pub fn cached(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.directory.join("cache/millstream")).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    }

    /// Everything that it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Kills the server and the servers of all its logins, as a crash would; what was started by the logins lives.
    pub fn kill(&mut self) {
        let sessions = processes::children(self.child.id());
        let deeper: Vec<u32> = sessions.iter().flat_map(|pid| processes::children(*pid)).collect();
        let servers = deeper.into_iter().filter(|pid| is_sshd(*pid)).chain(sessions);
        servers.collect::<Vec<_>>().into_iter().for_each(processes::kill);
        // It may have ended already.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }

    /// Starts it again.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self, host: &Host) {
        self.child = launch(host, &self.directory);
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn is_sshd(pid: u32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| program.ends_with("sshd"))
}

fn launch(host: &Host, directory: &Path) -> Child {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(directory.join("log"))
        .expect("the lab's directory can be written");
    let mut command = Command::new(tools::installed("sshd"));
    command.args(["-D", "-e", "-f"]).arg(directory.join("sshd_config"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let child = host.namespace().spawn(&mut command).expect("sshd can be started");
    wait_until_true("sshd answers", READY_MAX, || {
        host.namespace().run(|| TcpStream::connect((host.address(), PORT)).is_ok())
    });
    child
}
