//! A lab: hosts and a controller's place, each a namespace, joined by a switch that is a namespace too.

use std::{future::Future, net::Ipv4Addr, path::Path, process::Command};

use tempfile::TempDir;

use crate::{
    agent::Agent,
    authority::{Authority, Certificate},
    namespace::Namespace,
};

/// The network of every lab; labs do not see each other.
const NETWORK: [u8; 3] = [10, 77, 0];
/// Bridge inside the switch.
const BRIDGE: &str = "bridge";
/// Interface of a host.
const INTERFACE: &str = "lab0";

/// One host: a namespace with one interface.
#[derive(Debug)]
pub struct Host {
    name: String,
    number: u8,
    namespace: Namespace,
}

impl Host {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address in the lab.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        let [a, b, c] = NETWORK;
        Ipv4Addr::new(a, b, c, self.number)
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Runs asynchronous work inside, on a runtime of its own. A controller opened there reaches the lab from this host.
    ///
    /// # Panics
    /// As the work does.
    pub fn block_on<F, T>(&self, make: impl FnOnce() -> F + Send) -> T
    where
        F: Future<Output = T>,
        T: Send,
    {
        self.namespace.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime can be started").block_on(make())
        })
    }

    fn port(&self) -> String {
        format!("port{}", self.number)
    }
}

/// Hosts, a place for the controller, a certificate authority and a directory for everybody's files. Dropping it removes
/// them all.
#[derive(Debug)]
pub struct Lab {
    // The hosts go first: their agents' state lies in the directory.
    hosts: Vec<Host>,
    controller: Host,
    switch: Namespace,
    authority: Option<Authority>,
    directory: TempDir,
}

impl Lab {
    /// Builds hosts with these names. No agent runs yet.
    ///
    /// # Panics
    /// When the process may not: it needs root and `ip`.
    #[must_use]
    pub fn new(names: &[&str]) -> Self {
        let mut lab = Self::without_authority(names);
        lab.authority = Some(Authority::create(&lab.directory.path().join("authority")));
        lab
    }

    /// As [`Lab::new`], for claims about the network alone.
    ///
    /// # Panics
    /// When the process may not: it needs root and `ip`.
    #[must_use]
    pub fn without_authority(names: &[&str]) -> Self {
        let directory = tempfile::Builder::new().prefix("lab-").tempdir().expect("a directory");
        let switch = Namespace::create("switch");
        switch.ip(&["link", "add", BRIDGE, "type", "bridge"]);
        switch.ip(&["link", "set", BRIDGE, "up"]);
        let host = |name: &str, number: usize| {
            let number = u8::try_from(number).expect("a lab is small");
            let host = Host { name: name.to_owned(), number, namespace: Namespace::create(name) };
            connect(&switch, &host);
            host
        };
        let controller = host("controller", 1);
        let hosts = names.iter().enumerate().map(|(index, name)| host(name, index + 2)).collect();
        Self { hosts, controller, switch, authority: None, directory }
    }

    /// A host by its name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn host(&self, name: &str) -> &Host {
        self.hosts.iter().find(|host| host.name == name).unwrap_or_else(|| panic!("no host {name}"))
    }

    /// The controller's place: no agent runs there.
    #[must_use]
    pub fn controller(&self) -> &Host {
        &self.controller
    }

    /// The authority of the lab.
    ///
    /// # Panics
    /// When the lab was built without one.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        self.authority.as_ref().expect("the lab was built with an authority")
    }

    /// A directory for the test's files; gone with the lab.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts an agent on every host.
    ///
    /// # Panics
    /// When one does not start.
    #[must_use]
    pub fn start_agents(&self) -> Vec<Agent> {
        self.hosts.iter().map(|host| self.start_agent(host.name())).collect()
    }

    /// Starts an agent on one host, with a certificate of its own.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_agent(&self, name: &str) -> Agent {
        let host = self.host(name);
        let certificate = self.authority().agent(host.name(), &host.address().to_string());
        Agent::start(host.namespace(), host.address(), &certificate, &self.directory.path().join(host.name()))
    }

    /// Starts an agent on one host with more lines in its configuration.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_agent_configured(&self, name: &str, more: &str) -> Agent {
        let host = self.host(name);
        let certificate = self.authority().agent(host.name(), &host.address().to_string());
        let directory = self.directory.path().join(host.name());
        Agent::start_configured(host.namespace(), host.address(), &certificate, &directory, more)
    }

    /// Starts an agent on one host whose programs, and those of its blocks, are looked up in another `PATH`.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_agent_with_path(&self, name: &str, search_path: &Path) -> Agent {
        let host = self.host(name);
        let certificate = self.authority().agent(host.name(), &host.address().to_string());
        let directory = self.directory.path().join(host.name());
        Agent::start_with_path(host.namespace(), host.address(), &certificate, &directory, Some(search_path))
    }

    /// Starts an agent on one host that listens on loopback only, without TLS.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_loopback_agent(&self, name: &str) -> Agent {
        let host = self.host(name);
        Agent::start_on_loopback(host.namespace(), &self.directory.path().join(host.name()))
    }

    /// A definition file with a stream for each host, named as the host, dialled with this certificate.
    #[must_use]
    pub fn definitions(&self, certificate: &Certificate) -> String {
        let mut yaml = "streams:\n".to_owned();
        for host in &self.hosts {
            yaml += &format!(
                "  {}:\n    type: tls\n    host: {}\n    ca: {}\n    certificate: {}\n    key: {}\n",
                host.name(),
                host.address(),
                certificate.authority.display(),
                certificate.certificate.display(),
                certificate.key.display()
            );
        }
        yaml
    }

    /// Cuts a host off: packets vanish both ways, no connection is told.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn cut(&self, name: &str) {
        self.switch.ip(&["link", "set", &self.host(name).port(), "nomaster"]);
    }

    /// Joins a host that was cut off again.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn heal(&self, name: &str) {
        self.switch.ip(&["link", "set", &self.host(name).port(), "master", BRIDGE]);
    }
}

fn connect(switch: &Namespace, host: &Host) {
    let port = host.port();
    crate::tools::run(
        Command::new("ip").args(["-n", switch.name(), "link", "add", &port, "type", "veth"]).args([
            "peer",
            "name",
            INTERFACE,
            "netns",
            host.namespace.name(),
        ]),
    );
    switch.ip(&["link", "set", &port, "master", BRIDGE]);
    switch.ip(&["link", "set", &port, "up"]);
    host.namespace.ip(&["address", "add", &format!("{}/24", host.address()), "dev", INTERFACE]);
    host.namespace.ip(&["link", "set", INTERFACE, "up"]);
}
