//! Who calls, and which calls each role may make.
//!
//! One table, a row for each call, nothing by pattern: a path that is not in the table exactly as it stands reaches no
//! handler, and a call without a row fails a test. Whether a *session* belongs to the caller is decided by
//! [`crate::session`], not here.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
};

use millstream_common::tls::{Identity, Role};
use rustix::process::geteuid;
use tonic::{
    Request, Status,
    body::Body,
    codegen::{BoxFuture, Service, http},
};
use tower::Layer;

use super::ledger::Ledger;
use crate::session::Owner;

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// The holder of a certificate of our authority.
    Certified(Identity),
    /// A user of this host, on the Unix socket: vouched for by the kernel.
    Local {
        /// Number of the user.
        uid: u32,
    },
    /// Somebody on this host, on a TCP port without TLS: the kernel does not say who.
    Loopback,
    /// Whoever has started this process, on a pipe that nobody else has.
    Starter,
}

impl Caller {
    /// What the caller may be. Who could end or replace this process anyway is a controller; everybody else on this host
    /// may look.
    #[must_use]
    pub fn role(&self) -> Role {
        match self {
            Self::Certified(identity) => identity.role,
            Self::Local { .. } | Self::Loopback | Self::Starter if self.keeps_host() => Role::Controller,
            Self::Local { .. } | Self::Loopback | Self::Starter => Role::Operator,
        }
    }

    /// Whether the caller could end or replace this process anyway: the kernel says that it is root or the agent's user, or it
    /// has started this process.
    fn keeps_host(&self) -> bool {
        match self {
            Self::Local { uid } => *uid == 0 || *uid == geteuid().as_raw(),
            Self::Starter => true,
            Self::Certified(_) | Self::Loopback => false,
        }
    }

    /// The caller as the owner of sessions.
    #[must_use]
    pub fn owner(&self) -> Owner {
        Owner(self.to_string())
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certified(identity) => identity.fmt(f),
            Self::Local { uid } => write!(f, "local user {uid}"),
            Self::Loopback => f.write_str("somebody on this host"),
            Self::Starter => f.write_str("whoever started this agent"),
        }
    }
}

/// Where a connection comes from: what refusals are counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// An address.
    Address(IpAddr),
    /// A user of this host, on the Unix socket.
    User(u32),
    /// Somebody on the Unix socket of whom the kernel says nothing, or on a pipe.
    Unnamed,
}

/// Who calls, and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Who it is.
    pub(crate) caller: Caller,
    /// Its address and port, on TCP.
    pub(crate) address: Option<SocketAddr>,
}

impl Peer {
    /// Where it comes from.
    pub(crate) fn source(&self) -> Source {
        match (&self.caller, self.address) {
            (_, Some(address)) => Source::Address(address.ip()),
            (Caller::Local { uid }, None) => Source::User(*uid),
            (_, None) => Source::Unnamed,
        }
    }

    /// The same in words: `10.0.0.9:51514`, `unix`.
    pub(crate) fn place(&self) -> String {
        place_of(self.address)
    }
}

/// Where a connection comes from, in words.
pub(crate) fn place_of(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "unix".to_owned(), |address| address.to_string())
}

/// May look.
const LOOK: &[Role] = &[Role::Controller, Role::Operator];
/// May run blocks.
const RUN: &[Role] = &[Role::Controller];
/// Keeps the host: no certificate may, however far away its holder is. Who could end this process anyway may.
const KEEP: &[Role] = &[];

/// Which roles may make which call. An agent's certificate stands in no row: it is useless as a client.
const TABLE: &[(&str, &[Role])] = &[
    ("/grpc.health.v1.Health/Check", LOOK),
    ("/grpc.health.v1.Health/Watch", LOOK),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", LOOK),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", LOOK),
    ("/millstream.v1.AgentService/Clean", KEEP),
    ("/millstream.v1.AgentService/CloseSession", RUN),
    ("/millstream.v1.AgentService/Drain", KEEP),
    ("/millstream.v1.AgentService/FetchArchive", RUN),
    ("/millstream.v1.AgentService/FindMissingBlobs", RUN),
    ("/millstream.v1.AgentService/GetStatus", LOOK),
    ("/millstream.v1.AgentService/KeepSession", RUN),
    ("/millstream.v1.AgentService/OpenSession", RUN),
    ("/millstream.v1.AgentService/RelaySync", RUN),
    ("/millstream.v1.AgentService/ReleaseTask", RUN),
    ("/millstream.v1.AgentService/SignalTask", RUN),
    ("/millstream.v1.AgentService/StartTask", RUN),
    ("/millstream.v1.AgentService/Undrain", KEEP),
    ("/millstream.v1.AgentService/UploadBlob", RUN),
    ("/millstream.v1.AgentService/WatchStatus", LOOK),
    ("/millstream.v1.AgentService/WatchTask", RUN),
];

/// Why a call reaches no handler.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallRefusal {
    /// Not in the table.
    #[error("this agent has no such call")]
    NoSuchCall,
    /// The connection says nothing about its other end.
    #[error("nothing is known about the caller: connect with a certificate, or by the agent's Unix socket")]
    Unknown,
    /// The role may not.
    #[error("{caller} has the role {role} here, which may not make this call: {}", next_step(caller))]
    Role {
        /// Who called.
        caller: String,
        /// Its role.
        role: Role,
    },
    /// No certificate may.
    #[error(
        "{caller} may not make this call, as nobody may from afar: log in to the host, and use the agent's Unix socket as root \
         or as the user of the agent"
    )]
    Keeper {
        /// Who called.
        caller: String,
    },
}

fn next_step(caller: &str) -> &'static str {
    if caller.starts_with("millstream://") {
        "use a certificate of the role controller"
    } else {
        "use the Unix socket as root or as the user of the agent, or TLS with a certificate of the role controller"
    }
}

impl CallRefusal {
    /// In one word, for counts and records.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::NoSuchCall => "no_such_call",
            Self::Unknown => "unknown",
            Self::Role { .. } => "role",
            Self::Keeper { .. } => "keeper",
        }
    }
}

impl From<CallRefusal> for Status {
    fn from(refusal: CallRefusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            CallRefusal::NoSuchCall => Self::unimplemented(message),
            CallRefusal::Unknown => Self::unauthenticated(message),
            CallRefusal::Role { .. } | CallRefusal::Keeper { .. } => Self::permission_denied(message),
        }
    }
}

/// Looks a call up in the table.
pub(crate) fn authorise(path: &str, caller: Option<&Caller>) -> Result<(), CallRefusal> {
    let caller = caller.ok_or(CallRefusal::Unknown)?;
    let row = TABLE.binary_search_by(|(known, _)| (*known).cmp(path)).map_err(|_| CallRefusal::NoSuchCall)?;
    let (role, allowed) = (caller.role(), TABLE[row].1);
    if allowed.contains(&role) || caller.keeps_host() {
        return Ok(());
    }
    let caller = caller.to_string();
    Err(if allowed.is_empty() { CallRefusal::Keeper { caller } } else { CallRefusal::Role { caller, role } })
}

/// Who makes a request that has passed [`Authorise`].
///
/// # Errors
/// When the request came around it, which is a mistake in the set-up of the server.
pub(crate) fn peer_of<T>(request: &Request<T>) -> Result<Peer, Status> {
    request.extensions().get::<Peer>().cloned().ok_or_else(|| CallRefusal::Unknown.into())
}

/// The same, where it does not matter from where.
///
/// # Errors
/// See [`peer_of`].
pub(crate) fn caller_of<T>(request: &Request<T>) -> Result<Caller, Status> {
    peer_of(request).map(|peer| peer.caller)
}

/// Puts the table in front of every service of a server.
#[derive(Debug, Clone)]
pub(crate) struct AuthoriseLayer {
    ledger: Arc<Ledger>,
}

impl AuthoriseLayer {
    /// Refusals are put on record there.
    pub(crate) fn new(ledger: Arc<Ledger>) -> Self {
        Self { ledger }
    }
}

impl<S> Layer<S> for AuthoriseLayer {
    type Service = Authorise<S>;

    fn layer(&self, inner: S) -> Authorise<S> {
        Authorise { inner, ledger: Arc::clone(&self.ledger) }
    }
}

/// Lets calls through that the table allows.
#[derive(Debug, Clone)]
pub(crate) struct Authorise<S> {
    inner: S,
    ledger: Arc<Ledger>,
}

impl<S> Service<http::Request<Body>> for Authorise<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<http::Response<Body>, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        // The acceptor has put it there for the whole connection.
        let peer = request.extensions().get::<Peer>();
        match authorise(request.uri().path(), peer.map(|peer| &peer.caller)) {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(refusal) => {
                self.ledger.call_refused(peer, request.uri().path(), &refusal);
                Box::pin(async move { Ok(Status::from(refusal).into_http()) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::door::SERVED;

    fn identity(role: Role) -> Caller {
        Caller::Certified(Identity::new(role, "x").unwrap())
    }

    fn calls_of(encoded: &[u8]) -> BTreeSet<String> {
        let set = FileDescriptorSet::decode(encoded).unwrap();
        let mut calls = BTreeSet::new();
        for file in set.file {
            for service in &file.service {
                let name = format!("{}.{}", file.package(), service.name());
                if SERVED.contains(&name.as_str()) {
                    calls.extend(service.method.iter().map(|method| format!("/{name}/{}", method.name())));
                }
            }
        }
        calls
    }

    #[test]
    fn every_call_has_a_row_and_every_row_a_call() {
        let mut calls = calls_of(millstream_proto::FILE_DESCRIPTOR_SET);
        calls.extend(calls_of(tonic_health::pb::FILE_DESCRIPTOR_SET));
        calls.extend(calls_of(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET));
        calls.extend(calls_of(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET));
        let rows: BTreeSet<String> = TABLE.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(rows, calls);
        assert_eq!(rows.len(), TABLE.len(), "a row stands twice");
        assert!(TABLE.is_sorted(), "the table is searched by halves");
    }

    #[test]
    fn each_role_may_what_its_rows_say_and_nothing_else() {
        let reads = ["Health/", "ServerReflection/", "AgentService/GetStatus", "AgentService/WatchStatus"];
        let keeps = ["/Clean", "/Drain", "/Undrain"];
        for (path, _) in TABLE {
            let runs = !keeps.iter().any(|keep| path.ends_with(keep));
            assert_eq!(authorise(path, Some(&identity(Role::Controller))).is_ok(), runs, "{path}");
            assert_eq!(authorise(path, Some(&Caller::Local { uid: 0 })), Ok(()), "{path}");
            assert_eq!(authorise(path, Some(&Caller::Starter)), Ok(()), "{path}");
            let looks = reads.iter().any(|read| path.contains(read));
            assert_eq!(authorise(path, Some(&identity(Role::Operator))).is_ok(), looks, "{path}");
            assert_eq!(authorise(path, Some(&Caller::Loopback)).is_ok(), looks, "{path}");
            assert!(authorise(path, Some(&identity(Role::Agent))).is_err(), "{path}");
            assert_eq!(authorise(path, None), Err(CallRefusal::Unknown));
        }
    }

    #[test]
    fn odd_paths_reach_no_handler() {
        let controller = identity(Role::Controller);
        for path in [
            "",
            "/",
            "millstream.v1.AgentService/GetStatus",
            "//millstream.v1.AgentService/GetStatus",
            "/millstream.v1.AgentService/GetStatus/",
            "/millstream.v1.AgentService/getstatus",
            "/millstream.v1.AgentService/Get%53tatus",
            "/millstream.v1.AgentService/../AgentService/StartTask",
            "/millstream.v1.SyncService/Enter",
        ] {
            assert_eq!(authorise(path, Some(&controller)), Err(CallRefusal::NoSuchCall), "{path}");
        }
    }

    #[test]
    fn a_refusal_says_which_certificate_would_do() {
        let refusal =
            authorise("/millstream.v1.AgentService/StartTask", Some(&identity(Role::Operator))).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "millstream://operator/x has the role operator here, which may not make this call: use a certificate of the \
             role controller"
        );
        let refusal =
            authorise("/millstream.v1.AgentService/Drain", Some(&identity(Role::Controller))).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "millstream://controller/x may not make this call, as nobody may from afar: log in to the host, and use the \
             agent's Unix socket as root or as the user of the agent"
        );
    }

    #[test]
    fn local_users_are_told_apart() {
        assert_eq!(Caller::Local { uid: 0 }.role(), Role::Controller);
        assert_eq!(Caller::Local { uid: geteuid().as_raw() }.role(), Role::Controller);
        assert_eq!(Caller::Local { uid: 4_294_967_294 }.role(), Role::Operator);
    }
}
