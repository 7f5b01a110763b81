//! Reaches an agent and opens a session, or comes back to one: one attempt, and what its failure means.
//!
//! Decides whether trying again can help; when and how often is the link's to decide.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    clock::World,
    convert, limits,
    outcome::Reason,
    pipe,
    protocol::{ASK_AGAIN, Spoken},
    text::{printable, spoken},
    tls,
};
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use tokio::time::{Instant, error::Elapsed, timeout, timeout_at};
use tonic::{Code, Status};
use tracing::info;

use super::{
    Client, Connection, Features, LinkOptions, Loop, Opened, Session, believed, features, session_gone,
};
use crate::{
    reach::{DialError, Reach},
    results::timeline::HostClock,
};

/// One attempt to open a session or to come back to it.
pub(super) struct Attempt {
    reach: Arc<dyn Reach>,
    world: World,
    options: LinkOptions,
    session: Session,
    previous: Option<Session>,
    resume: bool,
    number: u64,
    asked: Arc<AtomicBool>,
    /// The connection on which it was answered that others have the host.
    control: Option<Client>,
    /// How long the host may keep the call if others have it.
    patience: Duration,
}

impl Attempt {
    pub(super) fn of(
        link: &Loop,
        session: &Session,
        resume: bool,
        number: u64,
        control: Option<Client>,
        patience: Duration,
    ) -> Self {
        Self {
            reach: Arc::clone(&link.reach),
            world: link.world.clone(),
            options: link.options.clone(),
            session: session.clone(),
            previous: link.previous.clone(),
            resume,
            number,
            asked: Arc::clone(&link.asked),
            control,
            patience,
        }
    }

    pub(super) async fn open(self) -> Result<(Connection, Opened, Instant), OpenError> {
        let mut control = match self.control {
            Some(control) => control,
            None => dial(&*self.reach).await?,
        };
        if !self.resume
            && let Some(previous) = &self.previous
        {
            // Whatever still runs in it must be gone before anything new runs beside it. A host that does not know it any
            // more is as clean as one that has just closed it.
            let request = v1::CloseSessionRequest { session: Some(previous.key()) };
            if let Err(status) = control.close_session(request).await
                && pipe::is_transport_failure(&status)
            {
                return Err(OpenError::Again(pipe::call_failure(&status)));
            }
        }
        // An agent that was replaced meanwhile by an older one has nothing to refuse: the session is there.
        let needed = features::of_session(&self.options).filter(|_| !self.resume);
        let request = v1::OpenSessionRequest {
            session_id: self.session.id.to_string(),
            secret: self.session.secret.clone(),
            protocol_min: Spoken::OURS.min,
            protocol_max: Spoken::OURS.max,
            required_features: needed.map(|feature| feature.word().to_owned()).collect(),
            version: Spoken::OURS.version.to_owned(),
            client: self.options.client.clone(),
            lease_duration: Some(convert::duration(self.options.lease)),
            exclusive: self.options.exclusive,
            resume: self.resume,
            wait_duration: Some(convert::duration(self.patience)),
        };
        // From here on until an answer is there, whoever gives up does not know.
        let unsure = self.asked.swap(true, Ordering::Relaxed);
        let sent = self.world.clock.now();
        let sent_ns = self.world.clock.wall_ns();
        let response = match control.open_session(request).await {
            Ok(response) => response.into_inner(),
            // It may be had later, and whoever gives up must say so.
            Err(status) if is_in_line(&status) => {
                let why = printable(
                    status.message().trim_end_matches(ASK_AGAIN).as_bytes(),
                    limits::TEXT_BYTES_MAX,
                );
                return Err(OpenError::InLine { why, control });
            }
            Err(status) => {
                let error = refused(&status);
                let is_final = matches!(error, OpenError::Final { .. });
                if is_final && pipe::is_transport_failure(&status) {
                    // The certificate is refused: what was asked with it before, and broke off, was refused as well.
                    self.asked.store(false, Ordering::Relaxed);
                } else if is_final || !pipe::is_transport_failure(&status) {
                    self.asked.store(unsure, Ordering::Relaxed);
                }
                return Err(error);
            }
        };
        let received_ns = self.world.clock.wall_ns();
        // An agent that knows no ranges opens a session all the same; it is closed with those that were given up.
        Spoken::OURS
            .check_agreed(response.protocol, &response.version)
            .map_err(|error| OpenError::Final { why: error.to_string(), reason: Reason::Unreachable })?;
        let boot_id = response.host.as_ref().map_or("", |host| host.boot_id.as_str());
        let mut clock = if shares_this_kernel(boot_id) { HostClock::same() } else { HostClock::default() };
        if let Some(time) = &response.host_time {
            clock.measure(sent_ns, convert::timestamp_ns(time), received_ns);
        }
        let session = Session { epoch: response.epoch, ..self.session };
        let asked = self.options.lease;
        let granted = convert::duration_in(
            "lease_duration",
            response.lease_duration.as_ref(),
            limits::LEASE_MIN..=asked,
        );
        // An answer that makes no sense is an older agent's, which gives what was asked for.
        let lease = granted.ok().flatten().unwrap_or(asked);
        if lease < asked && !self.resume {
            let (asked, lease) = (spoken(asked), spoken(lease));
            info!(place = self.reach.describe(), asked, lease, "the host allows no longer lease");
        }
        let opened = Opened {
            version: response.version,
            host: response.host.unwrap_or_default(),
            capabilities: response.capabilities.unwrap_or_default(),
            clock,
        };
        let features = Features::told(&opened.version, &opened.capabilities);
        let connection = Connection { number: self.number, control, session, lease, features };
        Ok((connection, opened, sent + believed(lease)))
    }
}

/// Why a session could not be opened.
#[derive(Debug)]
pub(super) enum OpenError {
    /// Trying again may help.
    Again(String),
    /// Somebody has to decide first, and was asked.
    Pending(String),
    /// Others have the host, and a place in line is kept. The next asking goes on the same connection.
    InLine { why: String, control: Client },
    /// Trying again is useless. What ended a session that was to be resumed is the reason.
    Final { why: String, reason: Reason },
}

impl OpenError {
    /// Why there is no session.
    pub(super) fn why(self) -> String {
        match self {
            Self::Again(why) | Self::Pending(why) | Self::InLine { why, .. } | Self::Final { why, .. } => why,
        }
    }
}

impl From<DialError> for OpenError {
    fn from(error: DialError) -> Self {
        if let DialError::Pending { reason } = error {
            Self::Pending(reason)
        } else if error.is_final() {
            Self::Final { why: error.to_string(), reason: Reason::Unreachable }
        } else {
            Self::Again(error.to_string())
        }
    }
}

/// Waits until the deadline, which is put off while the reach `may` come on and does. The end of a lease is not put off.
pub(super) async fn unless_late<T>(
    mut attempt: Pin<Box<impl Future<Output = T>>>,
    reach: &dyn Reach,
    deadline: &mut Instant,
    may: bool,
) -> Result<T, Elapsed> {
    let mut progress = reach.progress();
    loop {
        let waited = timeout_at(*deadline, &mut attempt).await;
        if waited.is_ok() || !may || !comes_on(reach, &mut progress) {
            return waited;
        }
        *deadline += limits::REACH_MAX;
    }
}

/// Whether a dial has come on since the last look.
fn comes_on(reach: &dyn Reach, seen: &mut u64) -> bool {
    let now = reach.progress();
    std::mem::replace(seen, now) != now
}

/// A channel over a new pipe.
pub(super) async fn dial(reach: &dyn Reach) -> Result<Client, OpenError> {
    let most = reach.dial_max();
    let mut dialling = reach.dial();
    let mut progress = reach.progress();
    let pipe = loop {
        match timeout(most, &mut dialling).await {
            Ok(dialled) => break dialled?,
            Err(_elapsed) if comes_on(reach, &mut progress) => {}
            Err(_elapsed) => {
                return Err(OpenError::Again(format!("no connection within {}", spoken(most))));
            }
        }
    };
    let channel = pipe::endpoint_channel(|| async { Ok(pipe) })
        .await
        .map_err(|error| OpenError::Again(error.to_string()))?;
    Ok(AgentServiceClient::new(channel)
        .max_decoding_message_size(limits::BULK_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::BULK_MESSAGE_BYTES_MAX))
}

/// Whether a host is this machine, or a container of it: then there is one clock, and nothing to estimate.
fn shares_this_kernel(boot_id: &str) -> bool {
    static OWN: OnceLock<String> = OnceLock::new();
    let own =
        OWN.get_or_init(|| std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default());
    !boot_id.is_empty() && own.trim() == boot_id
}

/// Whether the host is reserved, and a place in line is kept.
fn is_in_line(status: &Status) -> bool {
    status.code() == Code::ResourceExhausted && status.message().ends_with(ASK_AGAIN)
}

/// What the refusal of a session means.
fn refused(status: &Status) -> OpenError {
    let why = printable(pipe::call_failure(status).as_bytes(), limits::TEXT_BYTES_MAX);
    if pipe::is_transport_failure(status) {
        // With TLS 1.3 an agent's refusal of a certificate is seen only now. It will not change its mind.
        return if tls::is_refusal_of_the_agent(&why) {
            OpenError::Final { why, reason: Reason::Unreachable }
        } else {
            OpenError::Again(why)
        };
    }
    match status.code() {
        Code::FailedPrecondition => {
            OpenError::Final { why, reason: session_gone(status).unwrap_or(Reason::Unreachable) }
        }
        Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument => {
            OpenError::Final { why, reason: Reason::Unreachable }
        }
        Code::Unimplemented => OpenError::Final {
            why: format!(
                "it is no agent of this protocol ({why}): check the address and the version of what runs there"
            ),
            reason: Reason::Unreachable,
        },
        _ => OpenError::Again(why),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use tokio::sync::Notify;

    use super::*;
    use crate::reach::Dialing;

    /// A place whose dial comes on, until it was looked at so often, and then ends; or never.
    #[derive(Debug, Default)]
    struct Slow {
        looks: AtomicU64,
        looks_max: u64,
        ended: Notify,
    }

    impl Reach for Slow {
        fn dial(&self) -> Dialing<'_> {
            Box::pin(async {
                self.ended.notified().await;
                Err(DialError::Nowhere { reason: "it came to its end".to_owned() })
            })
        }

        fn describe(&self) -> String {
            "slow".to_owned()
        }

        fn host(&self) -> String {
            "slow".to_owned()
        }

        fn dial_max(&self) -> Duration {
            Duration::from_millis(1)
        }

        fn progress(&self) -> u64 {
            let looks = self.looks.fetch_add(1, Ordering::Relaxed) + 1;
            if looks == self.looks_max {
                self.ended.notify_one();
            }
            looks.min(self.looks_max)
        }
    }

    async fn told(reach: &Slow) -> String {
        dial(reach).await.map(drop).unwrap_err().why()
    }

    #[tokio::test]
    async fn a_dial_is_given_up_for_its_silence_and_not_for_its_length() {
        let reach = Slow { looks_max: 10, ..Slow::default() };
        assert_eq!(told(&reach).await, "it came to its end");
        assert_eq!(told(&Slow::default()).await, "no connection within 0.0 s");
    }

    #[tokio::test]
    async fn a_deadline_is_put_off_while_a_dial_comes_on_unless_a_lease_ends_then() {
        let in_time = async |reach: &Slow, may: bool| {
            let mut deadline = Instant::now();
            unless_late(Box::pin(reach.dial()), reach, &mut deadline, may).await.is_ok()
        };
        let slow = || Slow { looks_max: 2, ..Slow::default() };
        assert!(in_time(&slow(), true).await);
        assert!(!in_time(&slow(), false).await);
        assert!(!in_time(&Slow::default(), true).await);
    }
}
