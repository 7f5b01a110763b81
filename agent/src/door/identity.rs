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

/// What a call takes. Who could end this process anyway may make every one; an agent's certificate gives no right at all, it is
/// useless as a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    /// See who runs what.
    Look,
    /// See what is printed: of those who may look, only who is known by name.
    Read,
    /// Run blocks.
    Run,
    /// Keep the host: no certificate gives it, however far away its holder is.
    Keep,
}

impl Right {
    fn is_had_by(self, caller: &Caller) -> bool {
        let looks = matches!(caller.role(), Role::Controller | Role::Operator);
        caller.keeps_host()
            || match self {
                Self::Look => looks,
                Self::Read => looks && matches!(caller, Caller::Certified(_)),
                Self::Run => caller.role() == Role::Controller,
                Self::Keep => false,
            }
    }
}

/// What each call takes.
const TABLE: &[(&str, Right)] = &[
    ("/grpc.health.v1.Health/Check", Right::Look),
    ("/grpc.health.v1.Health/Watch", Right::Look),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Right::Look),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Right::Look),
    ("/millstream.v1.AgentService/Clean", Right::Keep),
    ("/millstream.v1.AgentService/CloseSession", Right::Run),
    ("/millstream.v1.AgentService/Drain", Right::Keep),
    ("/millstream.v1.AgentService/FetchArchive", Right::Run),
    ("/millstream.v1.AgentService/FindMissingBlobs", Right::Run),
    ("/millstream.v1.AgentService/GetStatus", Right::Look),
    ("/millstream.v1.AgentService/KeepSession", Right::Run),
    ("/millstream.v1.AgentService/OpenSession", Right::Run),
    ("/millstream.v1.AgentService/ReadLog", Right::Read),
    ("/millstream.v1.AgentService/RelaySync", Right::Run),
    ("/millstream.v1.AgentService/ReleaseTask", Right::Run),
    ("/millstream.v1.AgentService/SignalTask", Right::Run),
    ("/millstream.v1.AgentService/StartTask", Right::Run),
    ("/millstream.v1.AgentService/Undrain", Right::Keep),
    ("/millstream.v1.AgentService/UploadBlob", Right::Run),
    ("/millstream.v1.AgentService/WatchStatus", Right::Look),
    ("/millstream.v1.AgentService/WatchTask", Right::Run),
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
    /// It takes more than to be on this host.
    #[error(
        "{caller} may see here who runs what, but not what is printed: use the Unix socket as root or as the user of the agent, or \
         TLS with a certificate of the role operator or controller"
    )]
    Reader {
        /// Who called.
        caller: String,
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
            Self::Reader { .. } => "reader",
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
            CallRefusal::Role { .. } | CallRefusal::Reader { .. } | CallRefusal::Keeper { .. } => {
                Self::permission_denied(message)
            }
        }
    }
}

/// Looks a call up in the table.
pub(crate) fn authorise(path: &str, caller: Option<&Caller>) -> Result<(), CallRefusal> {
    let caller = caller.ok_or(CallRefusal::Unknown)?;
    let row = TABLE.binary_search_by(|(known, _)| (*known).cmp(path)).map_err(|_| CallRefusal::NoSuchCall)?;
    let right = TABLE[row].1;
    if right.is_had_by(caller) {
        return Ok(());
    }
    let (role, caller) = (caller.role(), caller.to_string());
    Err(match right {
        Right::Keep => CallRefusal::Keeper { caller },
        Right::Read if role == Role::Operator => CallRefusal::Reader { caller },
        Right::Look | Right::Read | Right::Run => CallRefusal::Role { caller, role },
    })
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
        assert!(TABLE.is_sorted_by_key(|(path, _)| path), "the table is searched by halves");
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
            let reads_logs = path.ends_with("/ReadLog");
            let operator = authorise(path, Some(&identity(Role::Operator)));
            assert_eq!(operator.is_ok(), looks || reads_logs, "{path}");
            for nameless in [Caller::Loopback, Caller::Local { uid: 4_294_967_294 }] {
                assert_eq!(authorise(path, Some(&nameless)).is_ok(), looks, "{path}");
            }
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
        let refusal = authorise("/millstream.v1.AgentService/ReadLog", Some(&Caller::Loopback)).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "somebody on this host may see here who runs what, but not what is printed: use the Unix socket as root or as the user \
             of the agent, or TLS with a certificate of the role operator or controller"
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
