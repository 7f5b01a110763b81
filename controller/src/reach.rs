//! Gives a byte pipe to an agent.
//!
//! A new kind of place is one small file that implements [`Reach`] and a line that [`register`]s it. Everything above a
//! pipe is the same for all of them: nothing here knows sessions, tasks or blocks.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::Future,
    io,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, LazyLock, PoisonError, RwLock},
    time::Duration,
};

use millstream_common::{
    clock::{Ids as _, SystemIds},
    id::SessionId,
    limits,
    pipe::BoxedPipe,
    text, tls,
};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use crate::params::{HIDDEN, ReferenceError};

pub(crate) mod child;
pub(crate) mod command;
pub(crate) mod container;
pub mod local;
pub(crate) mod nowhere;
pub(crate) mod program;
pub(crate) mod slurm;
pub(crate) mod ssh;
pub mod tcp;
pub mod unix;

/// A future that owns nothing but what it was given.
pub type Dialing<'a> = Pin<Box<dyn Future<Output = Result<BoxedPipe, DialError>> + Send + 'a>>;

/// A future that ends what a reach has started, and gives a sentence for each thing that it could not tidy.
pub type Releasing<'a> = Pin<Box<dyn Future<Output = Vec<String>> + Send + 'a>>;

/// A way to an agent.
pub trait Reach: Send + Sync + fmt::Debug + 'static {
    /// Makes a new pipe to the agent. Called twice for each session, and again after the connection broke.
    fn dial(&self) -> Dialing<'_>;

    /// The place as a person writes it, such as `tls://foo.example.com:7433`. Streams whose reaches describe the same
    /// place share one session.
    fn describe(&self) -> String;

    /// The name under which blocks on other hosts find this one: see [`Reach::knows_host`].
    fn host(&self) -> String;

    /// Whether the agent lives on when a pipe to it breaks, so that coming back makes sense.
    fn survives_disconnect(&self) -> bool {
        true
    }

    /// A number that grows as long as a dial comes on although it takes its time, such as one that brings a program over a
    /// slow line: then neither [`Reach::dial_max`] nor [`Reach::reach_max`] ends it.
    fn progress(&self) -> u64 {
        0
    }

    /// How long one dial may take before it is given up.
    fn dial_max(&self) -> Duration {
        limits::HANDSHAKE_MAX
    }

    /// Called when a task that ran there has ended unexpectedly: a reach that keeps what failed remembers it.
    fn task_failed(&self) {}

    /// How long the first contact may take in all, however many dials that are.
    fn reach_max(&self) -> Duration {
        limits::REACH_MAX
    }

    /// Whether [`Reach::host`] gives the host's own name already. Where a scheduler chooses the host, it is known only once a
    /// pipe was there.
    fn knows_host(&self) -> bool {
        true
    }

    /// Called before a session is asked for, and again once it is over: a reach through which somebody else can end what this
    /// process might leave tells them. Failing to is no reason to have no session.
    fn entrust<'a>(&'a self, _session: &'a Entrusted) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async {})
    }

    /// Called before a session is opened after another one was lost: what was lost with it may be made anew, such as a
    /// container that has ended.
    fn renew(&self) {}

    /// What a person may look at when the place could not be reached in time: a sentence that stands behind the last error.
    fn what_to_check(&self) -> String {
        "Check that an agent runs there and that the definition of the stream is right".to_owned()
    }

    /// Called when the test is over, after the session was closed: ends what the reach itself started. What cannot be ended
    /// becomes part of the test's report.
    fn release(&self) -> Releasing<'_> {
        Box::pin(async { Vec::new() })
    }
}

/// A session as somebody knows it who may have to end it. `Debug` leaves the secret out.
#[derive(Clone)]
#[non_exhaustive]
pub struct Entrusted {
    /// Its number.
    pub session_id: SessionId,
    /// What it is opened with.
    pub secret: String,
    /// How long its host keeps it without a word.
    pub lease: Duration,
    /// Whether it is over.
    pub over: bool,
}

impl fmt::Debug for Entrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entrusted")
            .field("session_id", &self.session_id)
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}

/// What a stream definition says about the way to its agent. `Debug` leaves secrets out.
#[derive(Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Place {
    /// The type: `local`, `tls`, `unix`, `ssh`, `command`, `docker`, `podman`, or one that was registered.
    pub kind: String,
    /// What stands behind `://`, or the key `host` (`path` for `unix`, `command` for `command`, `name` for containers); empty
    /// when nothing does.
    pub address: String,
    /// All other keys that the type understands. What was kept in files and variables stands here in clear; a list has a
    /// line for each item.
    pub options: BTreeMap<String, String>,
    /// The keys whose values must never be shown: in no error, no description, no log.
    pub secrets: BTreeSet<String>,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |(key, value)| {
            let is_secret = self.secrets.contains(key);
            (key, if is_secret { HIDDEN } else { String::as_str(value) })
        };
        f.debug_struct("Place")
            .field("kind", &self.kind)
            .field("address", &self.address)
            .field("options", &self.options.iter().map(shown).collect::<BTreeMap<_, _>>())
            .finish()
    }
}

/// The values of a definition that must never be shown. `Debug` leaves them out.
#[derive(Clone, Default)]
struct Secrets(Vec<String>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Secrets").field(&self.0.len()).finish()
    }
}

impl Secrets {
    fn of(place: &Place) -> Self {
        let values: Vec<&String> = place
            .secrets
            .iter()
            .filter_map(|key| place.options.get(key))
            .filter(|value| !value.is_empty())
            .collect();
        let mut parts: Vec<String> = values.iter().map(|value| (*value).clone()).collect();
        // A word stands alone where it is used.
        parts.extend(values.into_iter().flat_map(|value| text::words(value).unwrap_or_default()));
        parts.sort_by_key(|part| std::cmp::Reverse(part.len()));
        Self(parts)
    }

    /// A text without them.
    fn hidden_in(&self, text: String) -> String {
        self.0.iter().fold(text, |text, secret| text.replace(secret, HIDDEN))
    }
}

impl Place {
    /// The value of a key as it may stand in the description of a place: one that must not be shown is told from others by
    /// something that nobody else can make.
    fn shown(&self, key: &str, value: &str) -> String {
        static PROCESS: LazyLock<String> = LazyLock::new(|| SystemIds.token());
        if !self.secrets.contains(key) {
            return value.trim_end().replace('\n', ",");
        }
        let digest = Sha256::new().chain_update(PROCESS.as_bytes()).chain_update(value).finalize();
        format!("{HIDDEN}{}", text::hex(&digest[..4]))
    }

    /// A place of a type at an address.
    #[must_use]
    pub fn new(kind: impl Into<String>, address: impl Into<String>) -> Self {
        Self { kind: kind.into(), address: address.into(), ..Self::default() }
    }
}

/// Why a definition does not lead anywhere: known before anything is dialled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// Nobody registered this type.
    #[error("stream type `{kind}` is unknown: use one of {known}{}", hint(nearest.as_deref()))]
    UnknownKind {
        /// The type as given.
        kind: String,
        /// The types that there are.
        known: String,
        /// The type that was probably meant.
        nearest: Option<String>,
    },
    /// The address does not suit the type.
    #[error("`{kind}` cannot use the address `{}`: {reason}", address.escape_debug())]
    Address {
        /// The type.
        kind: String,
        /// The address as given.
        address: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// A key that the type does not understand.
    #[error("`{kind}` does not know the key `{key}`: it takes {known}{}", hint(nearest.as_deref()))]
    UnknownOption {
        /// The type.
        kind: String,
        /// The key.
        key: String,
        /// The keys that it takes.
        known: String,
        /// The key that was probably meant.
        nearest: Option<String>,
    },
    /// Keys that do not go together, or a value that none can have.
    #[error("`{kind}` cannot be had: {reason}")]
    Keys {
        /// The type.
        kind: String,
        /// What is wrong with them, and what would be right.
        reason: String,
    },
    /// Something that is kept elsewhere cannot be had.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// Files with certificates that cannot be used.
    #[error("{place} cannot be reached: {reason}")]
    Credentials {
        /// The place.
        place: String,
        /// Which file, why, and what to do.
        reason: String,
    },
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map(|word| format!(" (did you mean `{word}`?)")).unwrap_or_default()
}

/// Why a dial gave no pipe.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// No connection.
    #[error("failed to connect to {address}: {}", tls::reason(source))]
    Connect {
        /// Where to.
        address: String,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// The name leads to no address.
    #[error("failed to find an address for `{host}`: {}", tls::reason(source))]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver answered.
        #[source]
        source: io::Error,
    },
    /// The two ends do not trust each other.
    #[error("{address} refused the connection, or was refused: {reason}")]
    Refused {
        /// Where to.
        address: String,
        /// Why, and what to do.
        reason: String,
    },
    /// Files with certificates that cannot be used.
    #[error("{reason}")]
    Credentials {
        /// Which file, why, and what to do.
        reason: String,
    },
    /// A program that should lead to the agent gave no connection.
    #[error("`{what}` gives no connection: {reason}")]
    Program {
        /// The program, or the place that it should lead to.
        what: String,
        /// How the program ended and what it said.
        reason: String,
        /// Whether dialling again is useless.
        is_final: bool,
    },
    /// Whoever gives the place does not, such as a container engine or a scheduler.
    #[error("{reason}")]
    Denied {
        /// Who, what was asked, and what the answer was.
        reason: String,
        /// Whether dialling again is useless.
        is_final: bool,
    },
    /// Somebody has to decide first, such as a scheduler.
    #[error("{reason}")]
    Pending {
        /// Who, and how it stands.
        reason: String,
    },
    /// The stream's definition leads nowhere.
    #[error("{reason}")]
    Nowhere {
        /// Which stream, where it is defined, and why.
        reason: String,
    },
    /// No agent could be started on this machine.
    #[error(
        "no agent can be started for local streams: this program does not call `millstream::entry!();` and \
         `millstream-agent` is not in PATH. Add the line `millstream::entry!();` to the file of the test"
    )]
    NoLocalAgent,
    /// The agent for local streams did not start.
    #[error("the agent for local streams, `{}`, did not start: {reason}", program.display())]
    LocalAgent {
        /// The program.
        program: PathBuf,
        /// What it said or what the system said.
        reason: String,
    },
}

impl DialError {
    /// Whether dialling again is useless: somebody has to change something first.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Resolve { .. } | Self::Pending { .. } => false,
            Self::Program { is_final, .. } | Self::Denied { is_final, .. } => *is_final,
            Self::Refused { .. }
            | Self::Credentials { .. }
            | Self::Nowhere { .. }
            | Self::NoLocalAgent
            | Self::LocalAgent { .. } => true,
        }
    }
}

/// Releases a reach, within the time that the end of a test has for it. What could not be tidied comes back with its place.
pub(crate) async fn released(reach: &dyn Reach) -> Vec<String> {
    let left = timeout(limits::CLOSE_MAX, reach.release()).await.unwrap_or_else(|_elapsed| {
        vec![format!("what was started for it did not end within {}", text::spoken(limits::CLOSE_MAX))]
    });
    left.into_iter().map(|what| format!("{}: {what}", reach.describe())).collect()
}

/// Makes a reach of what a definition says.
type Factory = Arc<dyn Fn(&Place) -> Result<Arc<dyn Reach>, PlaceError> + Send + Sync>;

/// Types that users have registered, beside the ones that are built in.
static REGISTERED: RwLock<BTreeMap<String, Factory>> = RwLock::new(BTreeMap::new());

/// The types that are always there.
const BUILT_IN: [&str; 8] = ["command", "docker", "local", "podman", "slurm", "ssh", "tls", "unix"];

/// Registers a type of streams under the name that definitions use, such as `vm` in `vm://rawhide`. A later registration
/// of the same name replaces the earlier one; a type that is built in stays as it is.
pub fn register(
    kind: impl Into<String>,
    factory: impl Fn(&Place) -> Result<Arc<dyn Reach>, PlaceError> + Send + Sync + 'static,
) {
    REGISTERED.write().unwrap_or_else(PoisonError::into_inner).insert(kind.into(), Arc::new(factory));
}

/// Every type that a definition may name.
#[must_use]
pub fn kinds() -> Vec<String> {
    let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
    let more = registered.keys().filter(|kind| !BUILT_IN.contains(&kind.as_str()));
    BUILT_IN.iter().map(|kind| (*kind).to_owned()).chain(more.cloned()).collect()
}

/// What a reach of a built-in type needs to know of the test it serves.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    /// The one child agent of this test.
    pub(crate) local: Arc<local::Local>,
    /// What it has of clusters.
    pub(crate) slurm: Arc<slurm::Allocations>,
}

/// Makes the reach that a definition names.
pub(crate) fn resolve(place: &Place, surroundings: &Surroundings) -> Result<Arc<dyn Reach>, PlaceError> {
    match place.kind.as_str() {
        "local" => {
            only_options(place, &[])?;
            if !place.address.is_empty() {
                return Err(address_error(place, "write `local` alone: it is always this machine"));
            }
            Ok(Arc::clone(&surroundings.local) as Arc<dyn Reach>)
        }
        "command" => Ok(Arc::new(command::Command::new(place)?)),
        "docker" | "podman" => Ok(Arc::new(container::Container::new(place)?)),
        "slurm" => Ok(Arc::new(surroundings.slurm.node(place)?)),
        "ssh" => Ok(Arc::new(ssh::Ssh::new(place)?)),
        "tls" => Ok(Arc::new(tcp::Tls::new(place)?)),
        "unix" => Ok(Arc::new(unix::Unix::new(place)?)),
        kind => {
            let factory = REGISTERED.read().unwrap_or_else(PoisonError::into_inner).get(kind).cloned();
            match factory {
                Some(factory) => factory(place),
                None => Err(unknown_kind(kind)),
            }
        }
    }
}

fn unknown_kind(kind: &str) -> PlaceError {
    let known = kinds();
    let nearest = text::nearest(kind, known.iter().map(String::as_str)).map(str::to_owned);
    PlaceError::UnknownKind { kind: text::printable(kind.as_bytes(), 64), known: listed(&known), nearest }
}

fn listed(words: &[String]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

/// Refuses options that a type does not know.
fn only_options(place: &Place, known: &[&str]) -> Result<(), PlaceError> {
    let Some(key) = place.options.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(()) };
    let words: Vec<String> = known.iter().map(|word| (*word).to_owned()).collect();
    Err(PlaceError::UnknownOption {
        kind: place.kind.clone(),
        key: text::printable(key.as_bytes(), 64),
        known: if words.is_empty() { "none".to_owned() } else { listed(&words) },
        nearest: text::nearest(key, known.iter().copied()).map(str::to_owned),
    })
}

/// A key that says yes or no; no unless it says so.
fn truth(place: &Place, key: &str) -> Result<bool, PlaceError> {
    match place.options.get(key).map(String::as_str) {
        Some("true" | "yes" | "on") => Ok(true),
        None | Some("false" | "no" | "off") => Ok(false),
        Some(other) => {
            Err(keys_error(place, format!("`{key}` is `{}`: write `yes` or `no`", other.escape_debug())))
        }
    }
}

fn keys_error(place: &Place, reason: impl Into<String>) -> PlaceError {
    PlaceError::Keys { kind: place.kind.clone(), reason: reason.into() }
}

fn address_error(place: &Place, reason: impl Into<String>) -> PlaceError {
    PlaceError::Address { kind: place.kind.clone(), address: place.address.clone(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surroundings() -> Surroundings {
        Surroundings { local: Arc::new(local::Local::new()), slurm: Arc::default() }
    }

    #[test]
    fn an_unknown_type_is_answered_with_the_nearest_one() {
        let error = resolve(&Place::new("unx", "/run/x"), &surroundings()).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "stream type `unx` is unknown: use one of `command`, `docker`, `local`, `podman`, `slurm`, `ssh`, `tls`, `unix`"
            ),
            "{error}"
        );
        assert!(error.ends_with("(did you mean `unix`?)"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_answered_with_the_nearest_one() {
        let mut place = Place::new("tls", "foo");
        place.options.insert("certificat".to_owned(), "x".to_owned());
        let error = resolve(&place, &surroundings()).unwrap_err().to_string();
        assert!(error.contains("does not know the key `certificat`"), "{error}");
        assert!(error.contains("did you mean `certificate`?"), "{error}");
    }
}
