//! The agent's configuration file, and errors that name the line to change.
//!
//! Reads and checks; binds sockets, so that what cannot be bound is told with the line that asked for it. Serves nothing.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use millstream_common::{
    limits,
    text::nearest,
    tls::{ServerTls, TlsPaths},
    yaml::{self, Located, Mark, Value, YamlError},
};
use tokio::net::{TcpListener, UnixListener};

use crate::{
    door::{Admission, JOURNAL, Listener},
    session::Bounds,
};

mod bounds;
mod errors;

pub use errors::ConfigError;

/// Where the configuration is unless the command line says otherwise.
pub const CONFIG_PATH: &str = "/etc/millstream/agent.yaml";
/// Port unless the configuration says otherwise.
pub const PORT: u16 = 7433;
/// Where sessions and blobs lie unless the configuration says otherwise.
const STATE: &str = "/var/lib/millstream";
/// Unix socket unless the configuration says otherwise.
pub const UNIX_SOCKET: &str = "/run/millstream/agent.sock";
/// A configuration is a page of text.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Everybody on the host may connect: who is there is told by the kernel, and what each may do by the table of calls.
const SOCKET_MODE: u32 = 0o666;

const KEYS: &[&str] =
    &["audit", "limits", "listen", "metrics", "shipped_files_max", "state_directory", "tls", "unix_socket"];
const TLS_KEYS: &[&str] = &["authority", "certificate", "key", "renew", "revocations"];
/// Other words that are understood, and the ones that they stand for.
const ALIASES: [(&str, &str); 1] = [("ca", "authority")];

/// A place in a configuration file, as editors take it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    file: PathBuf,
    line: u64,
    column: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.file.display()),
            line => write!(f, "{}:{line}:{}", self.file.display(), self.column),
        }
    }
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub place: Place,
}

/// What an agent is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// TCP addresses.
    pub listen: Vec<Placed<SocketAddr>>,
    /// Unix socket.
    pub unix_socket: Placed<PathBuf>,
    /// Where sessions and blobs lie.
    pub state_directory: PathBuf,
    /// Certificate, key and authority; without them only loopback is listened on.
    pub tls: Option<Placed<TlsPaths>>,
    /// Where the authority renews this agent's certificate.
    pub renew: Option<String>,
    /// How long leases may be, and how much one identity may have.
    pub bounds: Bounds,
    /// Where audit records go: a file, or the socket of a journal. None: into the agent's own log.
    pub audit: Option<PathBuf>,
    /// Where numbers are served, if at all.
    pub metrics: Option<Placed<SocketAddr>>,
    /// Bytes that shipped files may take together.
    pub shipped_files_bytes_max: u64,
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// When it cannot be read, or something in it cannot be followed.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read { path: path.to_owned(), source };
        if fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
            return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 1 MiB")));
        }
        Self::parse(path, &fs::read_to_string(path).map_err(failed)?)
    }

    /// Reads a configuration from text; `file` is what it is called in errors.
    ///
    /// # Errors
    /// When something in it cannot be followed.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let reader = Reader { file };
        let root = yaml::parse(text).map_err(|error| match error {
            YamlError::Syntax { mark, reason } => ConfigError::Yaml { place: reader.place(mark), reason },
            YamlError::Twice { key, second, .. } => ConfigError::Twice { place: reader.place(second), key },
        })?;
        let mut config = Self::built_in(file);
        for (key, value) in reader.mapping(root, "the configuration", "the configuration", KEYS)? {
            match key {
                "limits" => config.bounds = reader.bounds(value)?,
                "listen" => config.listen = reader.addresses(value)?,
                "unix_socket" => config.unix_socket = reader.path("unix_socket", value)?,
                "state_directory" => config.state_directory = reader.path("state_directory", value)?.value,
                "audit" => config.audit = reader.audit(value)?,
                "metrics" => config.metrics = reader.metrics(value)?,
                "shipped_files_max" => config.shipped_files_bytes_max = reader.size(value)?,
                _ => {
                    let (tls, renew) = reader.tls(value)?;
                    (config.tls, config.renew) = (Some(tls), renew);
                }
            }
        }
        config.check()?;
        Ok(config)
    }

    /// What holds when nothing is configured: this host only.
    #[must_use]
    pub fn built_in(file: &Path) -> Self {
        let place = Place { file: file.to_owned(), line: 0, column: 0 };
        let listen = SocketAddr::from(([127, 0, 0, 1], PORT));
        Self {
            listen: vec![Placed { value: listen, place: place.clone() }],
            unix_socket: Placed { value: UNIX_SOCKET.into(), place },
            state_directory: STATE.into(),
            tls: None,
            renew: None,
            bounds: Bounds::default(),
            audit: Some(PathBuf::from(JOURNAL)).filter(|journal| journal.exists()),
            metrics: None,
            shipped_files_bytes_max: limits::BLOBS_BYTES_MAX,
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let open = self.listen.iter().find(|listen| !listen.value.ip().is_loopback());
        match (open, &self.tls) {
            (Some(open), None) => Err(ConfigError::NoTls { place: open.place.clone(), address: open.value }),
            _ => Ok(()),
        }
    }

    /// The TLS configuration, if there is one, where its replacement will be seen.
    ///
    /// # Errors
    /// When a file is missing, exposed or not what it should be.
    pub fn tls_config(&self) -> Result<Option<Arc<Admission>>, ConfigError> {
        let Some(paths) = &self.tls else { return Ok(None) };
        let tls = ServerTls::load(&paths.value)
            .map_err(|source| ConfigError::Tls { place: paths.place.clone(), source })?;
        Ok(Some(Admission::new(tls)))
    }

    /// Binds everything.
    ///
    /// # Errors
    /// When something cannot be bound.
    pub async fn bind(&self, tls: Option<&Arc<Admission>>) -> Result<Vec<Listener>, ConfigError> {
        let mut listeners = Vec::new();
        for listen in &self.listen {
            let bound = TcpListener::bind(listen.value).await.map_err(|source| ConfigError::Bind {
                place: listen.place.clone(),
                address: listen.value,
                source,
            })?;
            listeners.push(match tls {
                Some(admission) => Listener::Tls(bound, Arc::clone(admission)),
                None => Listener::Loopback(bound),
            });
        }
        listeners.push(Listener::Unix(self.bind_unix().await?));
        Ok(listeners)
    }

    /// Binds the address of the numbers, if there is one.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub async fn bind_metrics(&self) -> Result<Option<TcpListener>, ConfigError> {
        let Some(Placed { value: address, place }) = &self.metrics else { return Ok(None) };
        let bound = TcpListener::bind(address).await;
        let failed = |source| ConfigError::Bind { place: place.clone(), address: *address, source };
        bound.map(Some).map_err(failed)
    }

    async fn bind_unix(&self) -> Result<UnixListener, ConfigError> {
        let Placed { value: path, place } = &self.unix_socket;
        let failed = |source| ConfigError::BindUnix { place: place.clone(), path: path.clone(), source };
        // A socket that an agent left behind when it was killed is in the way of the next one, and of nobody else.
        match tokio::net::UnixStream::connect(path).await {
            Ok(_) => return Err(ConfigError::UnixInUse { place: place.clone(), path: path.clone() }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(_) => {}
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
        Ok(listener)
    }
}

/// Makes values out of what was read.
struct Reader<'a> {
    file: &'a Path,
}

impl Reader<'_> {
    fn place(&self, mark: Mark) -> Place {
        Place { file: self.file.to_owned(), line: mark.line, column: mark.column }
    }

    fn mapping(
        &self,
        located: Located,
        key: &'static str,
        owner: &'static str,
        keys: &'static [&'static str],
    ) -> Result<Vec<(&'static str, Located)>, ConfigError> {
        let entries = match located.value {
            Value::Map(entries) => entries,
            Value::Null => return Ok(Vec::new()),
            Value::Scalar { .. } | Value::List(_) => {
                let place = self.place(located.mark);
                return Err(ConfigError::Value { place, key, wanted: "a mapping: lines of `key: value`" });
            }
        };
        let mut found: Vec<(&'static str, Located)> = Vec::new();
        for (key, (mark, value)) in entries {
            let place = self.place(mark);
            let meant =
                ALIASES.iter().find(|(alias, _)| *alias == key).map_or(key.as_str(), |(_, meant)| meant);
            let Some(known) = keys.iter().find(|known| **known == meant) else {
                let near = nearest(&key, keys.iter().copied());
                let near = near.and_then(|near| keys.iter().copied().find(|key| *key == near));
                return Err(ConfigError::UnknownKey { place, key, owner, near, keys });
            };
            if found.iter().any(|(before, _)| before == known) {
                return Err(ConfigError::Twice { place, key: (*known).to_owned() });
            }
            found.push((known, value));
        }
        Ok(found)
    }

    fn text(
        &self,
        key: &'static str,
        located: Located,
        wanted: &'static str,
    ) -> Result<Placed<String>, ConfigError> {
        let place = self.place(located.mark);
        match located.value {
            Value::Scalar { text, .. } if !text.is_empty() => Ok(Placed { value: text, place }),
            _ => Err(ConfigError::Value { place, key, wanted }),
        }
    }

    fn path(&self, key: &'static str, located: Located) -> Result<Placed<PathBuf>, ConfigError> {
        let text = self.text(key, located, "an absolute path")?;
        if !text.value.starts_with('/') {
            return Err(ConfigError::Value { place: text.place, key, wanted: "an absolute path" });
        }
        Ok(Placed { value: text.value.into(), place: text.place })
    }

    fn addresses(&self, located: Located) -> Result<Vec<Placed<SocketAddr>>, ConfigError> {
        let wanted = "an address and a port, such as 127.0.0.1:7433, or a list of them";
        let entries = match located.value {
            Value::List(entries) => entries,
            // Only the Unix socket.
            Value::Null => Vec::new(),
            _ => vec![located],
        };
        let address = |located: Located| {
            let text = self.text("listen", located, wanted)?;
            let parsed =
                text.value.parse().or_else(|_| text.value.parse().map(|ip| SocketAddr::new(ip, PORT)));
            match parsed {
                Ok(value) => Ok(Placed { value, place: text.place }),
                Err(_) => Err(ConfigError::Address { place: text.place, text: text.value }),
            }
        };
        entries.into_iter().map(address).collect()
    }

    fn audit(&self, located: Located) -> Result<Option<PathBuf>, ConfigError> {
        match located.value {
            // Only into the agent's own log.
            Value::Null => Ok(None),
            _ => Ok(Some(self.path("audit", located)?.value)),
        }
    }

    fn metrics(&self, located: Located) -> Result<Option<Placed<SocketAddr>>, ConfigError> {
        if let Value::Null = located.value {
            return Ok(None);
        }
        let wanted = "an address and a port, such as 127.0.0.1:9433";
        let Placed { value: text, place } = self.text("metrics", located, wanted)?;
        match text.parse() {
            Ok(value) => Ok(Some(Placed { value, place })),
            Err(_) => Err(ConfigError::Value { place, key: "metrics", wanted }),
        }
    }

    fn size(&self, located: Located) -> Result<u64, ConfigError> {
        let wanted = "a number of bytes, or a size such as 500MiB or 32GiB";
        let key = "shipped_files_max";
        let Placed { value: text, place } = self.text(key, located, wanted)?;
        size_in(&text).filter(|bytes| *bytes > 0).ok_or(ConfigError::Value { place, key, wanted })
    }

    fn tls(&self, located: Located) -> Result<(Placed<TlsPaths>, Option<String>), ConfigError> {
        let place = self.place(located.mark);
        let mut renew = None;
        let (mut certificate, mut private, mut authority, mut revocations) = (None, None, None, None);
        for (key, value) in self.mapping(located, "tls", "`tls`", TLS_KEYS)? {
            if key == "renew" {
                let wanted =
                    "the host of `millstream-agent pki serve`, such as ca.example.com or ca.example.com:7434";
                renew = Some(self.text("renew", value, wanted)?.value);
                continue;
            }
            let path = Some(self.path(key, value)?.value);
            match key {
                "certificate" => certificate = path,
                "key" => private = path,
                "revocations" => revocations = path,
                _ => authority = path,
            }
        }
        let missing = |key| ConfigError::Missing { place: place.clone(), key };
        let value = TlsPaths {
            certificate: certificate.ok_or_else(|| missing("certificate"))?,
            key: private.ok_or_else(|| missing("key"))?,
            authority: authority.ok_or_else(|| missing("authority"))?,
            revocations,
        };
        Ok((Placed { value, place }, renew))
    }
}

/// A number of bytes as people write it.
fn size_in(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(text: &str, expected: &Expect) {
        let parsed = Config::parse(Path::new("agent.yaml"), text);
        expected.assert_eq(&match parsed {
            Ok(config) => {
                let listen: Vec<_> = config.listen.iter().map(|listen| listen.value.to_string()).collect();
                let tls = config.tls.map(|tls| tls.value.certificate.display().to_string());
                let unix = config.unix_socket.value.display().to_string();
                format!("{listen:?} {unix} {} {tls:?}", config.state_directory.display())
            }
            Err(error) => error.to_string(),
        });
    }

    #[test]
    fn nothing_means_this_host_only() {
        check("", &expect![[r#"["127.0.0.1:7433"] /run/millstream/agent.sock /var/lib/millstream None"#]]);
        check(
            "listen: []\nunix_socket: /tmp/a.sock\nstate_directory: /tmp/s",
            &expect!["[] /tmp/a.sock /tmp/s None"],
        );
    }

    #[test]
    fn a_full_configuration_is_followed() {
        check(
            "listen: [0.0.0.0:7000, '::1']\ntls:\n  certificate: /a.pem\n  key: /a.key\n  authority: /ca.pem\n",
            &expect![[
                r#"["0.0.0.0:7000", "[::1]:7433"] /run/millstream/agent.sock /var/lib/millstream Some("/a.pem")"#
            ]],
        );
    }

    #[test]
    fn the_authority_may_be_called_ca_as_in_the_names_of_its_files() {
        let config = with("tls: {certificate: /a.pem, key: /a.key, ca: /ca.pem}");
        assert_eq!(config.tls.unwrap().value.authority, Path::new("/ca.pem"));
    }

    #[test]
    fn records_numbers_and_a_bound_for_shipped_files_are_told_in_a_line_each() {
        let config = with("audit: /var/log/a.jsonl\nmetrics: 127.0.0.1:9433\nshipped_files_max: 500 MiB");
        assert_eq!(config.audit.as_deref(), Some(Path::new("/var/log/a.jsonl")));
        assert_eq!(config.metrics.unwrap().value.to_string(), "127.0.0.1:9433");
        assert_eq!(config.shipped_files_bytes_max, 500 << 20);
        assert_eq!((with("audit:").audit, with("").metrics), (None, None));
        assert_eq!(with("shipped_files_max: 1024").shipped_files_bytes_max, 1_024);
        check("audit: a.jsonl", &expect!["agent.yaml:1:8: `audit` must be an absolute path"]);
        check(
            "metrics: 9433",
            &expect!["agent.yaml:1:10: `metrics` must be an address and a port, such as 127.0.0.1:9433"],
        );
        for wrong in ["many", "0", "10GB", "99999999999TiB", "-1"] {
            let error =
                Config::parse(Path::new("agent.yaml"), &format!("shipped_files_max: {wrong}")).unwrap_err();
            assert!(error.to_string().ends_with("such as 500MiB or 32GiB"), "{error}");
        }
    }

    #[test]
    fn an_open_address_without_tls_is_refused_with_its_line() {
        check(
            "state_directory: /tmp/s\nlisten:\n  - 127.0.0.1:7433\n  - 0.0.0.0:7433\n",
            &expect![
                "agent.yaml:4:5: refusing to listen on 0.0.0.0:7433 without TLS: anybody who can reach it could run programs here. Change this line to 127.0.0.1:7433, or add `tls:` with `certificate`, `key` and `authority` (`millstream-agent pki init` and `pki issue` make them)"
            ],
        );
    }

    #[test]
    fn unknown_and_repeated_keys_are_told_with_the_nearest() {
        check(
            "liten: 127.0.0.1:1",
            &expect!["agent.yaml:1:1: `liten` is no key of the configuration: did you mean `listen`?"],
        );
        check(
            "colour: red",
            &expect![
                "agent.yaml:1:1: `colour` is no key of the configuration: there are audit, limits, listen, metrics, shipped_files_max, state_directory, tls, unix_socket"
            ],
        );
        check(
            "listen: 127.0.0.1:1\nlisten: 127.0.0.1:2",
            &expect!["agent.yaml:2:1: `listen` is given twice: remove one"],
        );
        check(
            "tls:\n  certifcate: /a.pem\n",
            &expect!["agent.yaml:2:3: `certifcate` is no key of `tls`: did you mean `certificate`?"],
        );
        check(
            "tls:\n  certificate: /a.pem\n  key: /a.key\n",
            &expect![
                "agent.yaml:2:3: `tls` needs `authority` as well: the path of a file in PEM form, made by `millstream-agent pki issue`"
            ],
        );
    }

    #[test]
    fn wrong_values_are_told_with_what_would_do() {
        check(
            "listen: localhost:7433",
            &expect![
                "agent.yaml:1:9: `localhost:7433` is no address to listen on: write numbers, such as 127.0.0.1:7433 or [::]:7433"
            ],
        );
        check("unix_socket: agent.sock", &expect!["agent.yaml:1:14: `unix_socket` must be an absolute path"]);
        check("tls: yes", &expect!["agent.yaml:1:6: `tls` must be a mapping: lines of `key: value`"]);
        check(
            "listen: {a: b}",
            &expect![
                "agent.yaml:1:9: `listen` must be an address and a port, such as 127.0.0.1:7433, or a list of them"
            ],
        );
        check("listen: [127.0.0.1:1", &expect!["agent.yaml:1:9: unclosed bracket '['"]);
    }

    fn with(text: &str) -> Config {
        Config::parse(Path::new("agent.yaml"), text).unwrap()
    }

    #[tokio::test]
    async fn a_port_in_use_is_told_with_who_to_ask() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = with(&format!("listen: 127.0.0.1:{port}\n")).bind(None).await.unwrap_err();
        let text = error.to_string().replace(&port.to_string(), "PORT");
        expect!["agent.yaml:1:9: failed to listen on 127.0.0.1:PORT: address already in use; another program has the port (`ss -ltnp sport = :PORT` names it): stop it, or change this line"].assert_eq(&text);
    }

    #[tokio::test]
    async fn a_unix_socket_is_taken_over_from_the_dead_and_not_from_the_living() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let config = with(&format!("listen: []\nunix_socket: {}\n", path.display()));
        let bound = config.bind(None).await.unwrap();
        let error = config.bind(None).await.unwrap_err().to_string();
        assert!(error.starts_with("agent.yaml:2:14: another program listens on"), "{error}");
        drop(bound);
        assert!(path.exists());
        config.bind(None).await.unwrap();
    }

    #[test]
    fn a_missing_certificate_and_a_missing_file_are_told_with_the_next_step() {
        let config = with("tls:\n  certificate: /nonexistent/a.pem\n  key: /a.key\n  authority: /ca.pem\n");
        expect!["agent.yaml:2:3: failed to read the certificate `/nonexistent/a.pem`: no such file or directory; make one with `millstream-agent pki issue`, or correct the path"].assert_eq(&config.tls_config().unwrap_err().to_string());
        expect!["failed to read the configuration `/nonexistent/agent.yaml`: no such file or directory; write it, or name another with `--config`"].assert_eq(&Config::load(Path::new("/nonexistent/agent.yaml")).unwrap_err().to_string());
    }
}
