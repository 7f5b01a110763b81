//! The way from a command of a person to an agent: its Unix socket, TLS with a certificate, or loopback without.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::Args;
use millstream_common::{
    pipe::{self, BoxedPipe, ConnectError},
    tls::{self, TlsError, TlsPaths},
};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::transport::Channel;

use crate::config::PORT;

/// Variable that names the Unix socket of this host's agent, where it is not the usual one.
pub(super) const SOCKET_VARIABLE: &str = "MILLSTREAM_SOCKET";

/// With which files agents are dialled.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct Dialling {
    /// Certificate of the role operator or controller, for `tls://`.
    #[arg(long, value_name = "FILE", env = "MILLSTREAM_CERT")]
    certificate: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE", env = "MILLSTREAM_KEY")]
    key: Option<PathBuf>,
    /// Certificate of the authority.
    #[arg(long, value_name = "FILE", env = "MILLSTREAM_CA")]
    authority: Option<PathBuf>,
    /// Name in the agent's certificate, when it is dialled by another.
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
}

/// Why an agent cannot be dialled.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error(
        "`{text}` is no agent: give the path of a Unix socket, `tls://HOST[:PORT]` or `tcp://ADDRESS[:PORT]`"
    )]
    Address { text: String },
    #[error(
        "`{name}` is neither an address nor in /etc/hosts: give the address, and the name with `--server-name`"
    )]
    Name { name: String },
    #[error(
        "`{option}` is needed for `tls://`: the path of a file in PEM form, made by `millstream-agent pki issue`"
    )]
    Option { option: &'static str },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{source}; be root, or a member of the group that its directory belongs to")]
    NotLetIn {
        #[source]
        source: ConnectError,
    },
    #[error(transparent)]
    Connect(ConnectError),
}

impl From<ConnectError> for DialError {
    fn from(source: ConnectError) -> Self {
        match &source {
            // Of all that is dialled only a Unix socket asks who is there before it lets anybody in.
            ConnectError::Dial { source: told } if told.kind() == io::ErrorKind::PermissionDenied => {
                Self::NotLetIn { source }
            }
            _ => Self::Connect(source),
        }
    }
}

impl Dialling {
    /// Says one of them by its name.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        match name {
            "certificate" => self.certificate = Some(value.into()),
            "key" => self.key = Some(value.into()),
            "authority" => self.authority = Some(value.into()),
            _ => self.server_name = Some(value.to_owned()),
        }
    }

    #[cfg(test)]
    pub(super) fn shown(&self) -> String {
        let path =
            |path: &Option<PathBuf>| path.as_ref().map_or("-".to_owned(), |path| path.display().to_string());
        let name = self.server_name.as_deref().unwrap_or("-");
        format!("{} {} {} {name}", path(&self.certificate), path(&self.key), path(&self.authority))
    }

    /// Connects to an agent.
    pub(super) async fn connect(&self, agent: &str) -> Result<Channel, DialError> {
        let connected = if let Some(rest) = agent.strip_prefix("tls://") {
            let (name, address) = dialled(rest)?;
            let (config, name) =
                tls::client_config(&self.tls_paths()?, self.server_name.as_deref().unwrap_or(name))?;
            pipe::endpoint_channel(|| async move {
                let stream = TcpStream::connect(address).await?;
                Ok(Box::new(TlsConnector::from(config).connect(name, stream).await?) as BoxedPipe)
            })
            .await
        } else if let Some(rest) = agent.strip_prefix("tcp://") {
            let (_, address) = dialled(rest)?;
            pipe::endpoint_channel(
                || async move { Ok(Box::new(TcpStream::connect(address).await?) as BoxedPipe) },
            )
            .await
        } else {
            let path = agent.strip_prefix("unix://").unwrap_or(agent);
            if !path.contains('/') {
                return Err(DialError::Address { text: agent.to_owned() });
            }
            pipe::endpoint_channel(
                || async move { Ok(Box::new(UnixStream::connect(path).await?) as BoxedPipe) },
            )
            .await
        };
        Ok(connected?)
    }

    fn tls_paths(&self) -> Result<TlsPaths, DialError> {
        let given = |path: &Option<PathBuf>, option| path.clone().ok_or(DialError::Option { option });
        Ok(TlsPaths {
            certificate: given(&self.certificate, "--certificate")?,
            key: given(&self.key, "--key")?,
            authority: given(&self.authority, "--authority")?,
            revocations: None,
        })
    }
}

/// The host as it was named, and where it is dialled.
fn dialled(text: &str) -> Result<(&str, SocketAddr), DialError> {
    let text = text.trim_end_matches('/');
    if let Ok(address) = text.parse::<SocketAddr>() {
        let host = text.rsplit_once(':').map_or(text, |(host, _)| host).trim_matches(['[', ']']);
        return Ok((host, address));
    }
    let bare = text.trim_matches(['[', ']']);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok((bare, SocketAddr::new(ip, PORT)));
    }
    let (host, port) = text.split_once(':').unwrap_or((text, ""));
    let port = if port.is_empty() { Ok(PORT) } else { port.parse() };
    let port = port.map_err(|_| DialError::Address { text: text.to_owned() })?;
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let ip = in_hosts(host, &hosts).ok_or_else(|| DialError::Name { name: host.to_owned() })?;
    Ok((host, SocketAddr::new(ip, port)))
}

/// The name service is not asked: its modules crash a static program on hosts with another C library.
fn in_hosts(name: &str, hosts: &str) -> Option<IpAddr> {
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines.map(str::split_whitespace).find_map(|mut words| {
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_dialled_by_number_or_by_the_table_of_this_host() {
        let shown = |text| {
            dialled(text).map(|(host, address)| format!("{host} {address}")).map_err(|e| e.to_string())
        };
        assert_eq!(shown("10.0.0.1"), Ok(format!("10.0.0.1 10.0.0.1:{PORT}")));
        assert_eq!(shown("[::1]:99"), Ok("::1 [::1]:99".to_owned()));
        assert!(shown("no-such-host.invalid").unwrap_err().contains("--server-name"));
        assert_eq!(in_hosts("B", "# c\n10.1.2.3 a b # d\n"), Some(IpAddr::from([10, 1, 2, 3])));
    }
}
