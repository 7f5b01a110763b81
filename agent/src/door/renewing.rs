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

/// What the status says of the certificate.
#[derive(Debug, Default)]
pub struct CertificateNote(Mutex<Option<v1::CertificateStatus>>);

impl CertificateNote {
    fn lock(&self) -> MutexGuard<'_, Option<v1::CertificateStatus>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn status(&self) -> Option<v1::CertificateStatus> {
        self.lock().clone()
    }

    fn write(
        &self,
        certificate: &CertificateDer<'_>,
        until: Duration,
        renewal: Option<Duration>,
        trouble: &str,
    ) {
        let time = |since_1970: Duration| convert::timestamp(nanoseconds(since_1970));
        let identity = Identity::of_certificate(certificate);
        *self.lock() = Some(v1::CertificateStatus {
            identity: identity.map_or_else(|error| error.to_string(), |identity| identity.to_string()),
            expire_time: Some(time(until)),
            renew_time: renewal.map(time),
            trouble: trouble.to_owned(),
        });
    }
}

/// Keeps the certificate valid for as long as it runs. Without an `authority` it only says in time what must be done by
/// hand.
pub async fn keep_valid(
    paths: TlsPaths,
    authority: Option<String>,
    world: World,
    note: Arc<CertificateNote>,
) {
    let mut told: Option<CertificateDer<'static>> = None;
    loop {
        let now = Duration::from_nanos(world.clock.wall_ns());
        let Some((certificate, until, renew)) = look(&paths) else {
            // Whoever loads it says what is wrong with it.
            sleep(PAUSE_MAX).await;
            continue;
        };
        let is_new = told.as_ref() != Some(&certificate);
        if is_new {
            note.write(&certificate, until, authority.as_ref().map(|_| renew), "");
            let (until, at) = (text(until), text(renew));
            match &authority {
                Some(authority) => info!(%until, renewal = %at, %authority, "certificate is valid"),
                None => info!(%until, "certificate is valid"),
            }
            told = Some(certificate.clone());
        }
        let left = until.saturating_sub(now);
        let due = renew.saturating_sub(now);
        if !due.is_zero() {
            sleep(due.min(PAUSE_MAX)).await;
            continue;
        }
        let next_step = "make one with `millstream-agent pki issue` and replace the files; a running agent takes them at once";
        let Some(authority) = &authority else {
            let until = text(until);
            if left.is_zero() {
                error!(%until, "the certificate has expired and nobody can connect: {next_step}");
            } else {
                warn!(%until, "the certificate expires in {}: {next_step}, or set `renew` under `tls`", spoken(left));
            }
            sleep(PAUSE_MAX.min(left / 2).max(PAUSE_MIN)).await;
            continue;
        };
        if left.is_zero() {
            error!(until = %text(until), "the certificate has expired and cannot be renewed any more: {next_step}");
            sleep(PAUSE_MAX).await;
            continue;
        }
        let attempt = timeout(ATTEMPT_MAX, renew_now(&paths, authority)).await;
        let pause = match attempt.unwrap_or(Err(RenewError::Silent)) {
            Ok(()) => {
                info!(%authority, "certificate renewed");
                PAUSE_MIN
            }
            Err(error) => {
                let pause = (left / 10).clamp(PAUSE_MIN, PAUSE_MAX);
                note.write(&certificate, until, Some(now + pause), &error.to_string());
                let (until, again) = (text(until), spoken(pause));
                warn!(
                    %authority, %error, %until, %again,
                    "the certificate could not be renewed: it is still valid for {}, and another attempt follows. Check that \
                     `millstream-agent pki serve` runs there, or issue one by hand",
                    spoken(left)
                );
                pause
            }
        };
        sleep(pause).await;
    }
}

fn nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

fn text(since_1970: Duration) -> String {
    clock_text(nanoseconds(since_1970))
}

/// The present certificate, until when it is valid, and when it is to be renewed.
fn look(paths: &TlsPaths) -> Option<(CertificateDer<'static>, Duration, Duration)> {
    let pem = std::fs::read(&paths.certificate).ok()?;
    let certificate = CertificateDer::from_pem_slice(&pem).ok()?;
    let until = tls::valid_until(&certificate)?;
    let renew = renewal_time(&certificate)?;
    Some((certificate, until, renew))
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
        let mut present = look(&paths).unwrap().0;
        // Twice: the renewed one is renewed in its turn.
        for _ in 0..2 {
            let before = present.clone();
            while present == before {
                timeout(Duration::from_secs(60), reload::next_change(&mut watch)).await.unwrap().unwrap();
                present = look(&paths).unwrap().0;
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
