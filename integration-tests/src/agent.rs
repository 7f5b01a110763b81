//! One running agent: the real program with its configuration file, its certificate and its state directory.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{authority::Certificate, namespace::Namespace, processes, tools, wait::wait_until_true};

/// The port that agents listen on unless their configuration says otherwise.
pub const PORT: u16 = 7433;
/// From starting an agent to its word that it is ready. It takes milliseconds; a loaded machine gets time.
const READY_MAX: Duration = Duration::from_secs(20);
/// From asking an agent to end to its end.
const END_MAX: Duration = Duration::from_secs(20);

/// A running agent. Dropping it kills it; what it has left running ends with its namespace.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    address: SocketAddrV4,
    directory: PathBuf,
}

impl Agent {
    /// Starts an agent in a namespace and returns when it says that it is ready.
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start(place: &Namespace, address: Ipv4Addr, tls: &Certificate, directory: &Path) -> Self {
        Self::start_with_path(place, address, tls, directory, None)
    }

    /// As [`Agent::start`], with another `PATH`, which is also that of its blocks.
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start_with_path(
        place: &Namespace,
        address: Ipv4Addr,
        tls: &Certificate,
        directory: &Path,
        search_path: Option<&Path>,
    ) -> Self {
        fs::create_dir_all(directory).expect("the lab's directory can be written");
        let address = SocketAddrV4::new(address, PORT);
        Self::start_with(
            Some(place),
            address,
            directory,
            &configuration(address, Some(tls), directory),
            search_path,
        )
    }

    /// As [`Agent::start`], with more lines in its configuration.
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start_configured(
        place: &Namespace,
        address: Ipv4Addr,
        tls: &Certificate,
        directory: &Path,
        more: &str,
    ) -> Self {
        fs::create_dir_all(directory).expect("the lab's directory can be written");
        let address = SocketAddrV4::new(address, PORT);
        let configuration = configuration(address, Some(tls), directory) + more;
        Self::start_with(Some(place), address, directory, &configuration, None)
    }

    /// As [`Agent::start`], on loopback and without TLS.
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start_on_loopback(place: &Namespace, directory: &Path) -> Self {
        fs::create_dir_all(directory).expect("the lab's directory can be written");
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORT);
        Self::start_with(Some(place), address, directory, &configuration(address, None, directory), None)
    }

    /// As [`Agent::start`], in no namespace, and on its Unix socket alone: needs no root.
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start_on_socket(directory: &Path) -> Self {
        Self::start_here(directory, "")
    }

    /// As [`Agent::start_on_socket`], with `more` in its configuration.
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start_here(directory: &Path, more: &str) -> Self {
        fs::create_dir_all(directory).expect("the test's directory can be written");
        let yaml = on_socket_alone(directory) + more;
        Self::start_with(None, NOWHERE, directory, &yaml, None)
    }

    /// As [`Agent::start_on_socket`], of another build: `older` or `newer` (`agent-of-another-build`).
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start_of_another_build(directory: &Path, build: &str) -> Self {
        let mut command = Command::new(tools::beside_this_program("agent-of-another-build"));
        Self::start_command(command.env("MILLSTREAM_TEST_BUILD", build), directory)
    }

    /// As [`Agent::start_on_socket`], with calls refused to it as an old kernel does (`below-an-old-kernel`).
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start_below_an_old_kernel(directory: &Path, program: &Path) -> Self {
        let mut command = Command::new(tools::beside_this_program("below-an-old-kernel"));
        Self::start_command(command.arg(program), directory)
    }

    fn start_command(command: &mut Command, directory: &Path) -> Self {
        fs::create_dir_all(directory).expect("the test's directory can be written");
        fs::write(directory.join("agent.yaml"), on_socket_alone(directory))
            .expect("the test's directory can be written");
        let child = launch_program(command, None, directory);
        Self { child, address: NOWHERE, directory: directory.to_path_buf() }
    }

    /// As [`Agent::start`], with the configuration's `tls` as it is given.
    ///
    /// # Panics
    /// When it does not start; the message has its log.
    #[must_use]
    pub fn start_in(place: &Namespace, address: Ipv4Addr, directory: &Path, tls: &str) -> Self {
        fs::create_dir_all(directory).expect("the lab's directory can be written");
        let address = SocketAddrV4::new(address, PORT);
        let yaml = configuration(address, None, directory) + tls;
        Self::start_with(Some(place), address, directory, &yaml, None)
    }

    /// What a stream definition says to reach it by its Unix socket.
    #[must_use]
    pub fn unix_url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    fn start_with(
        place: Option<&Namespace>,
        address: SocketAddrV4,
        directory: &Path,
        configuration: &str,
        search_path: Option<&Path>,
    ) -> Self {
        fs::write(directory.join("agent.yaml"), configuration).expect("the lab's directory can be written");
        let child = launch(place, directory, search_path);
        Self { child, address, directory: directory.to_path_buf() }
    }

    /// What an agent says that is given this configuration and refuses to start.
    ///
    /// # Panics
    /// When it starts all the same and ends well.
    #[must_use]
    pub fn refused(directory: &Path, configuration: &str) -> String {
        let path = directory.join("agent.yaml");
        fs::write(&path, configuration).expect("the test's directory can be written");
        let mut command = Command::new(tools::agent_program());
        let output = tools::output(command.args(["serve", "--config"]).arg(&path).stdin(Stdio::null()));
        assert!(!output.status.success(), "{}", tools::both(&output));
        tools::both(&output)
    }

    /// Where it is dialled.
    #[must_use]
    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// What a stream definition says to reach it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("tls://{}", self.address)
    }

    /// Its Unix socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("agent.sock")
    }

    /// Where it keeps sessions and blobs.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has logged since it was first started.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("agent.log")).unwrap_or_default()
    }

    /// Kills it as a crash would, and waits until it is gone.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }

    /// Starts it again with the same configuration and state.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self, place: &Namespace) {
        self.child = launch(Some(place), &self.directory, None);
    }

    /// Asks it to end, as an init system does, and waits until it has.
    ///
    /// # Panics
    /// When it does not end.
    pub fn terminate(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it is our child");
        wait_until_true("the agent ends", END_MAX, || matches!(self.child.try_wait(), Ok(Some(_))));
    }

    /// Sessions that have a directory in its state.
    #[must_use]
    pub fn session_directories(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.state().join("sessions")).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    }

    /// Processes of the supervisors that it has started.
    #[must_use]
    pub fn supervisors(&self) -> Vec<u32> {
        processes::children(self.pid())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have been killed by the test already.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Where an agent is that listens on its socket alone.
const NOWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);

fn on_socket_alone(directory: &Path) -> String {
    format!(
        "listen: []\nunix_socket: {}\nstate_directory: {}\n",
        directory.join("agent.sock").display(),
        directory.join("state").display()
    )
}

fn configuration(address: SocketAddrV4, tls: Option<&Certificate>, directory: &Path) -> String {
    let mut yaml = format!(
        "listen: {address}\nunix_socket: {socket}\nstate_directory: {state}\n",
        socket = directory.join("agent.sock").display(),
        state = directory.join("state").display(),
    );
    if let Some(tls) = tls {
        yaml += &format!(
            "tls:\n  certificate: {certificate}\n  key: {key}\n  authority: {authority}\n  revocations: {revocations}\n",
            certificate = tls.certificate.display(),
            key = tls.key.display(),
            authority = tls.authority.display(),
            revocations = tls.revocations.display(),
        );
    }
    yaml
}

fn launch(place: Option<&Namespace>, directory: &Path, search_path: Option<&Path>) -> Child {
    let mut program = Command::new(tools::agent_program());
    if let Some(path) = search_path {
        program.env("PATH", path);
    }
    launch_program(&mut program, place, directory)
}

/// Starts a program and waits for `READY=1` on its notification socket: the word an init system waits for.
fn launch_program(command: &mut Command, place: Option<&Namespace>, directory: &Path) -> Child {
    let notify = directory.join("notify.sock");
    // Left by the launch before this one.
    let _absent = fs::remove_file(&notify);
    let socket = UnixDatagram::bind(&notify).expect("a socket can be bound in the lab's directory");
    socket.set_read_timeout(Some(READY_MAX)).expect("not zero");
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(directory.join("agent.log"))
        .expect("the lab's directory can be written");
    command
        .args(["serve", "--config"])
        .arg(directory.join("agent.yaml"))
        .env("NOTIFY_SOCKET", &notify)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a file can be shared"))
        .stderr(log);
    let child = match place {
        Some(namespace) => namespace.spawn(command),
        None => command.spawn(),
    };
    let child = child.expect("the agent's program can be started");
    let mut word = [0; 256];
    loop {
        match socket.recv(&mut word) {
            Ok(length) if word[..length].starts_with(b"READY=1") => return child,
            Ok(_) => {}
            Err(error) => panic!(
                "the agent is not ready: {error}\n{}",
                fs::read_to_string(directory.join("agent.log")).unwrap_or_default()
            ),
        }
    }
}
