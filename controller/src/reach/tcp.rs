//! An agent on another host, through TCP with mutual TLS: `tls://foo.example.com:7433`.
//!
//! The certificate files come from the stream's definition (`authority`, `certificate`, `key`), else from the environment
//! (`MILLSTREAM_CA`, `MILLSTREAM_CERT`, `MILLSTREAM_KEY`), else from `~/.config/millstream/`. So does the list of certificates
//! that the authority has revoked (`revocations`, `MILLSTREAM_REVOCATIONS`), which need not be there. They are read anew for
//! each connection, so that a renewed certificate is used, and a revoked agent refused, without a restart.

use std::{env, io, path::PathBuf, time::Duration};

use millstream_common::tls::{self, TlsPaths};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{DialError, Dialing, Place, PlaceError, Reach, address_error, only_options};

/// The port of an agent unless the definition names another.
const PORT: u16 = 7433;

/// Unsent or unanswered bytes older than this end the connection: a peer that vanished is noticed even while something
/// is being sent to it.
const USER_TIMEOUT: Duration = Duration::from_secs(10);

const OPTIONS: [&str; 7] = ["host", "port", "authority", "certificate", "key", "revocations", "server_name"];

/// A host and port, and what is needed to trust each other.
#[derive(Debug)]
pub(crate) struct Tls {
    host: String,
    port: u16,
    /// The name that the agent's certificate must have.
    server_name: String,
    paths: TlsPaths,
}

impl Tls {
    pub(crate) fn new(place: &Place) -> Result<Self, PlaceError> {
        only_options(place, &OPTIONS)?;
        let option = |key: &str| place.options.get(key).cloned();
        let address =
            if place.address.is_empty() { option("host").unwrap_or_default() } else { place.address.clone() };
        let (host, port) = split(&address).ok_or_else(|| {
            address_error(place, "give a host and, unless it is 7433, a port, as in foo.example.com:7433")
        })?;
        let port = match option("port") {
            Some(port) => port.parse().map_err(|_| {
                address_error(
                    place,
                    format!("the port `{}` is no number from 1 to 65535", port.escape_debug()),
                )
            })?,
            None => port.unwrap_or(PORT),
        };
        let server_name = option("server_name").unwrap_or_else(|| host.clone());
        let paths = TlsPaths {
            certificate: file(option("certificate"), "MILLSTREAM_CERT", "cert.pem"),
            key: file(option("key"), "MILLSTREAM_KEY", "key.pem"),
            authority: file(option("authority"), "MILLSTREAM_CA", "ca.pem"),
            revocations: revocations(option("revocations")),
        };
        Ok(Self { host, port, server_name, paths })
    }

    async fn connect(&self) -> Result<TcpStream, DialError> {
        let addresses = tokio::net::lookup_host((self.host.as_str(), self.port))
            .await
            .map_err(|source| DialError::Resolve { host: self.host.clone(), source })?;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(DialError::Connect { address: self.describe(), source: last })
    }
}

impl Reach for Tls {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let paths = self.paths.clone();
            let server_name = self.server_name.clone();
            let configured =
                tokio::task::spawn_blocking(move || tls::client_config(&paths, &server_name)).await;
            let (config, name) = configured
                .expect("reading certificates does not panic and is not cancelled")
                .map_err(|error| DialError::Credentials { reason: error.to_string() })?;
            let stream = self.connect().await?;
            set_options(&stream).map_err(|source| DialError::Connect { address: self.describe(), source })?;
            let pipe = TlsConnector::from(config).connect(name, stream).await.map_err(|error| {
                if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
                    DialError::Refused { address: self.describe(), reason: tls::reason(&error) }
                } else {
                    DialError::Connect { address: self.describe(), source: error }
                }
            })?;
            Ok(Box::new(pipe) as _)
        })
    }

    fn describe(&self) -> String {
        if self.host.contains(':') {
            format!("tls://[{}]:{}", self.host, self.port)
        } else {
            format!("tls://{}:{}", self.host, self.port)
        }
    }

    fn host(&self) -> String {
        self.host.clone()
    }

    fn what_to_check(&self) -> String {
        "Check that `millstream-agent` runs there and that its address and port are right".to_owned()
    }
}

fn set_options(stream: &TcpStream) -> io::Result<()> {
    // One small message must not wait for another.
    stream.set_nodelay(true)?;
    let milliseconds = u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, milliseconds)?;
    Ok(())
}

/// A file as named by the definition, by the environment, or in its usual place.
fn file(option: Option<String>, variable: &str, usual: &str) -> PathBuf {
    if let Some(path) = option {
        return match (path.strip_prefix("~/"), env::var_os("HOME")) {
            (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
            _ => PathBuf::from(path),
        };
    }
    if let Some(path) = env::var_os(variable).filter(|path| !path.is_empty()) {
        return path.into();
    }
    let configuration =
        env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute()).unwrap_or_else(
            || PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".config"),
        );
    configuration.join("millstream").join(usual)
}

/// The list of revoked certificates: where the definition or the environment says, else in its usual place if it is there.
fn revocations(option: Option<String>) -> Option<PathBuf> {
    const VARIABLE: &str = "MILLSTREAM_REVOCATIONS";
    let named = option.is_some() || env::var_os(VARIABLE).is_some_and(|path| !path.is_empty());
    let path = file(option, VARIABLE, "revoked.pem");
    (named || path.exists()).then_some(path)
}

/// `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address.
pub(super) fn split(address: &str) -> Option<(String, Option<u16>)> {
    let address = address.strip_suffix('/').unwrap_or(address);
    let (host, port) = if let Some(rest) = address.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
    } else if address.matches(':').count() == 1 {
        let (host, port) = address.split_once(':')?;
        (host, Some(port))
    } else {
        (address, None)
    };
    let usable = |c: char| c.is_alphanumeric() || "-_.:%".contains(c);
    if host.is_empty() || !host.chars().all(usable) {
        return None;
    }
    let port = match port {
        Some(port) => Some(port.parse::<u16>().ok().filter(|&port| port != 0)?),
        None => None,
    };
    Some((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_split_into_host_and_port() {
        let split_is =
            |text: &str, host: &str, port| assert_eq!(split(text), Some((host.to_owned(), port)), "{text}");
        split_is("foo", "foo", None);
        split_is("foo:1/", "foo", Some(1));
        split_is("[::1]:7433", "::1", Some(7433));
        split_is("fe80::1", "fe80::1", None);
        for bad in ["", ":1", "foo:0", "foo:x", "foo:70000", "a b", "[::1", "user@foo"] {
            assert_eq!(split(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_usual_port_is_added() {
        assert_eq!(Tls::new(&Place::new("tls", "foo")).unwrap().describe(), "tls://foo:7433");
    }
}
