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

use arc_swap::ArcSwap;
use millstream_common::{
    text::{nearest, printable},
    tls::{self, TlsError, TlsPaths},
};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_yaml::{DuplicateKeyPolicy, Location, Spanned};
use tokio::net::{TcpListener, UnixListener};

use crate::door::Listener;

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

const KEYS: &[&str] = &["listen", "state_directory", "tls", "unix_socket"];
const TLS_KEYS: &[&str] = &["authority", "certificate", "key"];

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
}

/// Why there is no configuration, or why it cannot be followed. Each says where, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read the configuration `{}`: {}; write it, or name another with `--config`", path.display(), tls::reason(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is no YAML.
    #[error("{place}: {reason}")]
    Yaml {
        /// Where.
        place: Place,
        /// What the parser said.
        reason: String,
    },
    /// A key that means nothing here.
    #[error("{place}: `{}` is no key of {owner}{}", printable(key.as_bytes(), 64), meant(*near, keys))]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key.
        key: String,
        /// What it stands in.
        owner: &'static str,
        /// A key that looks like it.
        near: Option<&'static str>,
        /// The keys that there are.
        keys: &'static [&'static str],
    },
    /// A key that stands twice.
    #[error("{place}: `{}` is given twice: remove one", printable(key.as_bytes(), 64))]
    Twice {
        /// Where, the second time.
        place: Place,
        /// The key.
        key: String,
    },
    /// A value of another kind.
    #[error("{place}: `{key}` must be {wanted}")]
    Value {
        /// Where.
        place: Place,
        /// Its key.
        key: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
    /// An address that is none.
    #[error("{place}: `{}` is no address to listen on: write numbers, such as 127.0.0.1:{PORT} or [::]:{PORT}", printable(text.as_bytes(), 128))]
    Address {
        /// Where.
        place: Place,
        /// The text.
        text: String,
    },
    /// A key is missing.
    #[error(
        "{place}: `tls` needs `{key}` as well: the path of a file in PEM form, made by `millstream-agent pki issue`"
    )]
    Missing {
        /// Where the mapping is.
        place: Place,
        /// Which key.
        key: &'static str,
    },
    /// An open door.
    #[error(
        "{place}: refusing to listen on {address} without TLS: anybody who can reach it could run programs here. Change this \
         line to 127.0.0.1:{}, or add `tls:` with `certificate`, `key` and `authority` (`millstream-agent pki init` and `pki \
         issue` make them)", address.port()
    )]
    NoTls {
        /// Where.
        place: Place,
        /// The address.
        address: SocketAddr,
    },
    /// TLS cannot be set up.
    #[error("{place}: {source}")]
    Tls {
        /// Where it is configured.
        place: Place,
        /// Why not.
        #[source]
        source: TlsError,
    },
    /// An address cannot be bound.
    #[error("{place}: failed to listen on {address}: {}; {}", tls::reason(source), bind_step(source, *address))]
    Bind {
        /// Where it is configured.
        place: Place,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A Unix socket cannot be bound.
    #[error("{place}: failed to listen on `{}`: {}; choose another `unix_socket` that this user can make", path.display(), tls::reason(source))]
    BindUnix {
        /// Where it is configured.
        place: Place,
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody listens on the Unix socket.
    #[error("{place}: another program listens on `{}`: stop it, or choose another `unix_socket`", path.display())]
    UnixInUse {
        /// Where it is configured.
        place: Place,
        /// The socket.
        path: PathBuf,
    },
}

fn meant(near: Option<&'static str>, keys: &[&str]) -> String {
    match near {
        Some(near) => format!(": did you mean `{near}`?"),
        None => format!(": there are {}", keys.join(", ")),
    }
}

fn bind_step(source: &io::Error, address: SocketAddr) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another program has the port (`ss -ltnp sport = :{}` names it): stop it, or change this line",
            address.port()
        ),
        io::ErrorKind::AddrNotAvailable => {
            "no interface of this host has the address (`ip address` lists them): change this line".to_owned()
        }
        io::ErrorKind::PermissionDenied => "ports below 1024 are for root: change this line".to_owned(),
        _ => "change this line".to_owned(),
    }
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
        let options = serde_yaml::options! {
            // Told below in our own words.
            duplicate_keys: DuplicateKeyPolicy::PassThrough,
        };
        let root: Spanned<Raw> = serde_yaml::from_str_with_options(text, options).map_err(|error| {
            let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
            let reason = error.without_snippet().to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default().to_owned();
            ConfigError::Yaml { place: Place { file: file.to_owned(), line, column }, reason }
        })?;
        let mut config = Self::built_in(file);
        for (key, value) in reader.mapping(root, "the configuration", "the configuration", KEYS)? {
            match key {
                "listen" => config.listen = reader.addresses(value)?,
                "unix_socket" => config.unix_socket = reader.path("unix_socket", value)?,
                "state_directory" => config.state_directory = reader.path("state_directory", value)?.value,
                _ => config.tls = Some(reader.tls(value)?),
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
    pub fn tls_config(&self) -> Result<Option<Arc<ArcSwap<rustls::ServerConfig>>>, ConfigError> {
        let Some(paths) = &self.tls else { return Ok(None) };
        let config = tls::server_config(&paths.value)
            .map_err(|source| ConfigError::Tls { place: paths.place.clone(), source })?;
        Ok(Some(Arc::new(ArcSwap::new(config))))
    }

    /// Binds everything.
    ///
    /// # Errors
    /// When something cannot be bound.
    pub async fn bind(
        &self,
        tls: Option<&Arc<ArcSwap<rustls::ServerConfig>>>,
    ) -> Result<Vec<Listener>, ConfigError> {
        let mut listeners = Vec::new();
        for listen in &self.listen {
            let bound = TcpListener::bind(listen.value).await.map_err(|source| ConfigError::Bind {
                place: listen.place.clone(),
                address: listen.value,
                source,
            })?;
            listeners.push(match tls {
                Some(config) => Listener::Tls(bound, Arc::clone(config)),
                None => Listener::Loopback(bound),
            });
        }
        listeners.push(Listener::Unix(self.bind_unix().await?));
        Ok(listeners)
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

/// What the YAML library understands, with the place of everything.
enum Raw {
    Null,
    Text(String),
    List(Vec<Spanned<Self>>),
    Map(Vec<(Spanned<String>, Spanned<Self>)>),
}

/// Makes values out of what was read.
struct Reader<'a> {
    file: &'a Path,
}

impl Reader<'_> {
    fn place(&self, location: &Location) -> Place {
        Place { file: self.file.to_owned(), line: location.line(), column: location.column() }
    }

    fn mapping(
        &self,
        raw: Spanned<Raw>,
        key: &'static str,
        owner: &'static str,
        keys: &'static [&'static str],
    ) -> Result<Vec<(&'static str, Spanned<Raw>)>, ConfigError> {
        let pairs = match raw.value {
            Raw::Map(pairs) => pairs,
            Raw::Null => Vec::new(),
            Raw::Text(_) | Raw::List(_) => {
                let place = self.place(&raw.defined);
                return Err(ConfigError::Value { place, key, wanted: "a mapping: lines of `key: value`" });
            }
        };
        let mut found: Vec<(&'static str, Spanned<Raw>)> = Vec::new();
        for (key, value) in pairs {
            let place = self.place(&key.defined);
            let Some(known) = keys.iter().find(|known| **known == key.value) else {
                let near = nearest(&key.value, keys.iter().copied());
                let near = near.and_then(|near| keys.iter().copied().find(|key| *key == near));
                return Err(ConfigError::UnknownKey { place, key: key.value, owner, near, keys });
            };
            if found.iter().any(|(before, _)| before == known) {
                return Err(ConfigError::Twice { place, key: key.value });
            }
            found.push((known, value));
        }
        Ok(found)
    }

    fn text(
        &self,
        key: &'static str,
        raw: Spanned<Raw>,
        wanted: &'static str,
    ) -> Result<Placed<String>, ConfigError> {
        let place = self.place(&raw.defined);
        match raw.value {
            Raw::Text(value) if !value.is_empty() => Ok(Placed { value, place }),
            _ => Err(ConfigError::Value { place, key, wanted }),
        }
    }

    fn path(&self, key: &'static str, raw: Spanned<Raw>) -> Result<Placed<PathBuf>, ConfigError> {
        let text = self.text(key, raw, "an absolute path")?;
        if !text.value.starts_with('/') {
            return Err(ConfigError::Value { place: text.place, key, wanted: "an absolute path" });
        }
        Ok(Placed { value: text.value.into(), place: text.place })
    }

    fn addresses(&self, raw: Spanned<Raw>) -> Result<Vec<Placed<SocketAddr>>, ConfigError> {
        let wanted = "an address and a port, such as 127.0.0.1:7433, or a list of them";
        let entries = match raw.value {
            Raw::List(entries) => entries,
            // Only the Unix socket.
            Raw::Null => Vec::new(),
            _ => vec![raw],
        };
        let address = |raw: Spanned<Raw>| {
            let text = self.text("listen", raw, wanted)?;
            let parsed =
                text.value.parse().or_else(|_| text.value.parse().map(|ip| SocketAddr::new(ip, PORT)));
            match parsed {
                Ok(value) => Ok(Placed { value, place: text.place }),
                Err(_) => Err(ConfigError::Address { place: text.place, text: text.value }),
            }
        };
        entries.into_iter().map(address).collect()
    }

    fn tls(&self, raw: Spanned<Raw>) -> Result<Placed<TlsPaths>, ConfigError> {
        let place = self.place(&raw.defined);
        let (mut certificate, mut private, mut authority) = (None, None, None);
        for (key, value) in self.mapping(raw, "tls", "`tls`", TLS_KEYS)? {
            let path = Some(self.path(key, value)?.value);
            match key {
                "certificate" => certificate = path,
                "key" => private = path,
                _ => authority = path,
            }
        }
        let missing = |key| ConfigError::Missing { place: place.clone(), key };
        let value = TlsPaths {
            certificate: certificate.ok_or_else(|| missing("certificate"))?,
            key: private.ok_or_else(|| missing("key"))?,
            authority: authority.ok_or_else(|| missing("authority"))?,
        };
        Ok(Placed { value, place })
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping, a list or a text")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = access.next_element()? {
            entries.push(entry);
        }
        Ok(Raw::List(entries))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = access.next_entry()? {
            pairs.push(pair);
        }
        Ok(Raw::Map(pairs))
    }
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
                "agent.yaml:1:1: `colour` is no key of the configuration: there are listen, state_directory, tls, unix_socket"
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
