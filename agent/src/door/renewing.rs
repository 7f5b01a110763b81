//! The agent's own certificate: until when it is valid, and the next one in time.
//!
//! After two thirds of its life the authority is asked for the next one (`crate::pki::renewal`). What it answers replaces
//! the files, and [`super::reload`] sees that: nobody who is connected notices. What fails is tried again, with a line in the
//! log each time that says until when the present certificate will do. The only address that an agent ever dials.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use millstream_common::{
    clock::World,
    convert, limits, pipe,
    text::{printable, spoken},
    tls::{self, Identity, TlsError, TlsPaths},
};
use millstream_proto::v1::{self, RenewCertificateRequest, authority_service_client::AuthorityServiceClient};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::{
    net::TcpStream,
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_rustls::TlsConnector;
use tracing::{error, info, warn};

use super::status::clock_text;
use crate::pki::{
    PkiError,
    renewal::{Asking, renewal_time},
    serve::PORT,
};

/// How long one attempt may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(30);
/// Longest time between two looks at the file, which somebody may have replaced, and between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(3600);
/// Shortest time between two attempts.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error(transparent)]
    Files(#[from] PkiError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("failed to reach the authority: {}", tls::reason(source))]
    Connect {
        #[source]
        source: io::Error,
    },
    #[error("failed to reach the authority: {reason}")]
    Channel { reason: String },
    #[error("no answer of the authority within {}", spoken(ATTEMPT_MAX))]
    Silent,
    #[error("the authority says: {said}")]
    Refused { said: String },
}

/// What the status says of the certificate; and by which whoever loads new files says that there are some.
#[derive(Debug, Default)]
pub struct CertificateNote {
    status: Mutex<Option<v1::CertificateStatus>>,
    loaded: Notify,
}

impl CertificateNote {
    fn lock(&self) -> MutexGuard<'_, Option<v1::CertificateStatus>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn status(&self) -> Option<v1::CertificateStatus> {
        self.lock().clone()
    }

    /// The files may be others now: they are looked at at once.
    pub(super) fn look_again(&self) {
        self.loaded.notify_one();
    }

    /// A pause that ends early when the files have changed.
    async fn pause(&self, span: Duration) {
        tokio::select! {
            () = sleep(span) => {}
            () = self.loaded.notified() => {}
        }
    }

    fn write(&self, present: &Present, renewal: Option<Duration>, trouble: &str) {
        let time = |since_1970: Duration| convert::timestamp(nanoseconds(since_1970));
        let identity = Identity::of_certificate(&present.certificate);
        *self.lock() = Some(v1::CertificateStatus {
            identity: identity.map_or_else(|error| error.to_string(), |identity| identity.to_string()),
            expire_time: Some(time(present.until)),
            renew_time: renewal.map(time),
            trouble: trouble.to_owned(),
        });
    }
}

/// The certificate in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Present {
    certificate: CertificateDer<'static>,
    from: Duration,
    until: Duration,
    /// When it is to be renewed.
    renewal: Duration,
}

/// What is to be done about a certificate.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    /// Nothing yet.
    Later(Duration),
    /// Nobody takes it yet: a clock is wrong.
    NotYet,
    /// It is to be renewed, while it is valid for so long.
    Renewal(Duration),
    /// Nobody takes it any more, since so long.
    Expired(Duration),
}

impl Present {
    fn read(paths: &TlsPaths) -> Option<Self> {
        let pem = std::fs::read(&paths.certificate).ok()?;
        let certificate = CertificateDer::from_pem_slice(&pem).ok()?;
        let (from, until) = tls::life(&certificate)?;
        let renewal = renewal_time(&certificate)?;
        Some(Self { certificate, from, until, renewal })
    }

    fn due(&self, now: Duration) -> Due {
        // The second that it names is the last one of its life.
        let end = self.until.saturating_add(Duration::from_secs(1));
        if now < self.from {
            Due::NotYet
        } else if now >= end {
            Due::Expired(now - end)
        } else if now < self.renewal {
            Due::Later(self.renewal - now)
        } else {
            Due::Renewal(end - now)
        }
    }
}

/// What somebody does when the agent cannot help itself.
const BY_HAND: &str =
    "make one with `millstream-agent pki issue` and replace the files; a running agent takes them at once";

/// Keeps the certificate valid for as long as it runs. Without an `authority` it only says in time what must be done by
/// hand.
pub async fn keep_valid(
    paths: TlsPaths,
    authority: Option<String>,
    world: World,
    note: Arc<CertificateNote>,
) {
    let mut told: Option<Present> = None;
    loop {
        let now = Duration::from_nanos(world.clock.wall_ns());
        let Some(present) = Present::read(&paths) else {
            // Whoever loads it says what is wrong with it.
            note.pause(PAUSE_MAX).await;
            continue;
        };
        let (until, at) = (text(present.until), text(present.renewal));
        let is_new = told.as_ref() != Some(&present);
        if is_new {
            note.write(&present, authority.as_ref().map(|_| present.renewal), "");
            told = Some(present.clone());
        }
        let pause = match (present.due(now), &authority) {
            (Due::Later(pause), authority) => {
                match authority {
                    Some(authority) if is_new => {
                        info!(%until, renewal = %at, %authority, "certificate is valid")
                    }
                    None if is_new => info!(%until, "certificate is valid"),
                    _ => {}
                }
                pause
            }
            (Due::NotYet, _) => {
                let (from, now) = (text(present.from), text(now));
                let trouble =
                    format!("it is valid from {from}, and the clock here says {now}: set the clock");
                note.write(&present, None, &trouble);
                error!(%from, %now, "the certificate is not valid yet and nobody can connect: set the clock");
                PAUSE_MIN * 60
            }
            (Due::Expired(since), authority) => {
                // The authority renews none that nobody takes any more: whoever has had its key since then could ask, too.
                let why = match authority {
                    Some(_) => "and is not renewed any more, for this agent was away when there was time",
                    None => "and nobody has renewed it",
                };
                note.write(&present, None, &format!("it has expired {why}: {BY_HAND}"));
                error!(%until, "the certificate has expired {} ago {why}; nobody can connect: {BY_HAND}", spoken(since));
                PAUSE_MAX
            }
            (Due::Renewal(left), None) => {
                warn!(%until, "the certificate expires in {}: {BY_HAND}, or set `renew` under `tls`", spoken(left));
                left / 2
            }
            (Due::Renewal(left), Some(authority)) => {
                let attempt = timeout(ATTEMPT_MAX, renew_now(&paths, authority)).await;
                match attempt.unwrap_or(Err(RenewError::Silent)) {
                    Ok(()) => {
                        info!(%authority, "certificate renewed");
                        PAUSE_MIN
                    }
                    Err(error) => {
                        let pause = (left / 10).clamp(PAUSE_MIN, PAUSE_MAX);
                        note.write(&present, Some(now + pause), &error.to_string());
                        warn!(
                            %authority, %error, %until, again = %spoken(pause),
                            "the certificate could not be renewed: it is still valid for {}, and another attempt follows. Check \
                             that `millstream-agent pki serve` runs there, or issue one by hand",
                            spoken(left)
                        );
                        pause
                    }
                }
            }
        };
        note.pause(pause.clamp(PAUSE_MIN, PAUSE_MAX)).await;
    }
}

fn nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

fn text(since_1970: Duration) -> String {
    clock_text(nanoseconds(since_1970))
}

async fn renew_now(paths: &TlsPaths, authority: &str) -> Result<(), RenewError> {
    let asking = Asking::make(paths)?;
    let answer = ask(paths, authority, asking.request.clone()).await?;
    Ok(asking.put_in_place(&answer, paths)?)
}

async fn ask(
    paths: &TlsPaths,
    authority: &str,
    request: RenewCertificateRequest,
) -> Result<String, RenewError> {
    let (host, port) = host_and_port(authority);
    let (config, name) = tls::anonymous_client_config(&paths.authority, host)?;
    let failed = |source| RenewError::Connect { source };
    let stream = TcpStream::connect((host, port)).await.map_err(failed)?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(failed)?;
    let channel = pipe::endpoint_channel(|| async { Ok(Box::new(stream) as pipe::BoxedPipe) }).await;
    let channel = channel.map_err(|error| RenewError::Channel { reason: error.to_string() })?;
    let answer = AuthorityServiceClient::new(channel).renew_certificate(request).await;
    let answer = answer.map_err(|status| RenewError::Refused {
        said: printable(pipe::call_failure(&status).as_bytes(), limits::TEXT_BYTES_MAX),
    })?;
    Ok(answer.into_inner().certificate_pem)
}

/// A host and its port: `ca.example.com`, `ca.example.com:7434`, `[::1]:7434`.
fn host_and_port(text: &str) -> (&str, u16) {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse().ok()),
        _ => (text, None),
    };
    let (host, port) = port.map_or((text, PORT), |port| (host, port));
    (host.trim_start_matches('[').trim_end_matches(']'), port)
}

#[cfg(test)]
mod tests {
    use millstream_common::tls::{Role, ServerTls};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        door::reload,
        pki::{Authority, Wanted, serve::AuthorityServer},
    };

    #[test]
    fn the_authoritys_address_may_leave_its_port_out() {
        assert_eq!(host_and_port("ca.example.com"), ("ca.example.com", PORT));
        assert_eq!(host_and_port("ca.example.com:1"), ("ca.example.com", 1));
        assert_eq!(host_and_port("[::1]:1"), ("::1", 1));
        assert_eq!(host_and_port("[::1]"), ("::1", PORT));
        assert_eq!(host_and_port("::1"), ("::1", PORT));
    }

    #[tokio::test]
    async fn one_that_nobody_takes_is_told_with_the_next_step_until_it_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let world = World::system();
        let authority = Authority::init(directory.path(), "lab", world.clock.wall_ns()).unwrap();
        let issue = |name: &str, now_ns: u64| {
            let (role, hosts) = (Role::Agent, vec!["localhost".to_owned()]);
            let wanted = Wanted { role, name: name.to_owned(), hosts, valid: Duration::from_secs(3600) };
            authority.issue(&wanted, now_ns).unwrap()
        };
        let (day, now) = (24 * 3_600_000_000_000, world.clock.wall_ns());
        let files = [issue("off", now - 30 * day), issue("early", now + 30 * day), issue("fine", now)];
        let paths = TlsPaths {
            certificate: directory.path().join("agent.pem"),
            key: files[0].key.clone(),
            authority: authority.certificate(),
            revocations: None,
        };
        let note = Arc::<CertificateNote>::default();
        std::fs::copy(&files[0].certificate, &paths.certificate).unwrap();
        // It never asks that address: there is nothing to ask for.
        let keeping =
            tokio::spawn(keep_valid(paths.clone(), Some("192.0.2.1".to_owned()), world, Arc::clone(&note)));
        for (file, identity, trouble) in [
            (&files[0], "off", "it has expired and is not renewed any more"),
            (&files[1], "early", "it is valid from "),
            (&files[2], "fine", ""),
        ] {
            std::fs::copy(&file.certificate, &paths.certificate).unwrap();
            note.look_again();
            let is_told = || {
                note.status().is_some_and(|status| {
                    status.identity.ends_with(identity)
                        && status.trouble.starts_with(trouble)
                        && status.trouble.is_empty() == trouble.is_empty()
                })
            };
            timeout(Duration::from_secs(60), async {
                while !is_told() {
                    tokio::task::yield_now().await;
                }
            })
            .await
            .unwrap_or_else(|_| panic!("{identity}: {:?}", note.status()));
        }
        keeping.abort();
    }

    #[tokio::test]
    async fn a_certificate_is_renewed_in_time_again_and_again() {
        let directory = tempfile::tempdir().unwrap();
        let world = World::system();
        let authority = Authority::init(directory.path(), "lab", world.clock.wall_ns()).unwrap();
        let wanted = Wanted {
            role: Role::Agent,
            name: "foo".to_owned(),
            hosts: vec!["localhost".to_owned()],
            valid: Duration::from_secs(6),
        };
        let issued = authority.issue(&wanted, world.clock.wall_ns()).unwrap();
        let paths = TlsPaths {
            certificate: issued.certificate,
            key: issued.key,
            authority: authority.certificate(),
            revocations: None,
        };
        let hosts = vec!["127.0.0.1".to_owned()];
        let bound =
            AuthorityServer::bind(directory.path(), "127.0.0.1:0".parse().unwrap(), hosts, world.clone());
        let server = bound.await.unwrap();
        let address = server.address().unwrap().to_string();
        let end = CancellationToken::new();
        let serving = tokio::spawn(server.serve(end.clone()));
        let mut watch = Some(reload::watch_directories(&paths).unwrap());
        let note = Arc::<CertificateNote>::default();
        let keeping = tokio::spawn(keep_valid(paths.clone(), Some(address), world, Arc::clone(&note)));
        let mut present = Present::read(&paths).unwrap();
        // Twice: the renewed one is renewed in its turn.
        for _ in 0..2 {
            let before = present.clone();
            while present == before {
                timeout(Duration::from_secs(60), reload::next_change(&mut watch)).await.unwrap().unwrap();
                present = Present::read(&paths).unwrap();
            }
        }
        // The last file has its name now: both fit together.
        ServerTls::load(&paths).unwrap();
        let status = note.status().unwrap();
        assert_eq!((status.identity.as_str(), status.trouble.as_str()), ("millstream://agent/foo", ""));
        assert!(status.renew_time.unwrap().seconds <= status.expire_time.unwrap().seconds);
        keeping.abort();
        end.cancel();
        serving.await.unwrap().unwrap();
    }
}
