//! Why there is no configuration, or why it cannot be followed: every text names the line, the cause and the next step.

use std::{io, net::SocketAddr, path::PathBuf};

use millstream_common::{
    text::printable,
    tls::{self, TlsError},
};

use super::{PORT, Place};

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

impl ConfigError {
    /// Whether the same configuration may work later: what is in the way may go without anybody changing a file.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Self::Bind { .. } | Self::BindUnix { .. } | Self::UnixInUse { .. })
    }
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
