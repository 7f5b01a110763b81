//! Why a peer was sent away, for the agent's log, and what somebody can do about it.

use std::io;

use millstream_common::{limits, tls};

/// Why a peer was sent away. Only the agent's log says it; the peer learns what TLS tells it.
#[derive(Debug, thiserror::Error)]
pub(super) enum GreetError {
    #[error("{limit}")]
    TooMany { limit: &'static str },
    #[error("the handshake was not finished within {} s", limits::HANDSHAKE_MAX.as_secs())]
    TooSlow,
    #[error("the TLS handshake failed: {}", handshake_reason(source))]
    Tls {
        #[source]
        source: io::Error,
    },
    #[error("the certificate is not taken any more: {}", tls::reason(source))]
    NotTaken {
        #[source]
        source: rustls::Error,
    },
    #[error("the certificate names nobody: {source}")]
    Identity {
        #[source]
        source: tls::IdentityError,
    },
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    #[error("the peer went away without a word")]
    Gone,
    #[error("the peer does not speak HTTP/2")]
    NotHttp2,
    #[error("the kernel does not say who the peer is")]
    NoCredentials(#[source] io::Error),
}

impl GreetError {
    /// In one word, for counts and records.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::TooMany { .. } => "too_many",
            Self::TooSlow => "too_slow",
            Self::Tls { .. } => "handshake",
            Self::NotTaken { .. } => "not_taken",
            Self::Identity { .. } => "identity",
            Self::Broken(_) => "broken",
            // Never told: what looks whether a port is open does this all day.
            Self::Gone => "gone",
            Self::NotHttp2 => "not_http2",
            Self::NoCredentials(_) => "no_credentials",
        }
    }

    /// What somebody can do about it who wanted to come in.
    pub(super) fn next_step(&self) -> &'static str {
        use rustls::{CertificateError as Bad, Error};
        let told = match self {
            Self::Tls { source } => source.get_ref().and_then(|carried| carried.downcast_ref()),
            Self::NotTaken { source } => Some(source),
            _ => None,
        };
        match (self, told) {
            (_, Some(Error::NoCertificatesPresented)) => {
                "dial with a certificate of the role controller or operator, made by `millstream-agent pki issue`"
            }
            (
                _,
                Some(Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. } | Bad::Revoked)),
            ) => "issue a new one with `millstream-agent pki issue`",
            (_, Some(Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature))) => {
                "issue one in the directory of this agent's authority, or add the other authority to `authority` in agent.yaml"
            }
            (_, Some(Error::InvalidCertificate(Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. }))) => {
                "dial with a certificate of the role controller or operator: one of an agent is for its own port"
            }
            (_, Some(Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }))) => {
                "set the clock that is wrong: of this host, or of the one where the certificate was made"
            }
            (_, Some(Error::AlertReceived(rustls::AlertDescription::CertificateExpired))) => {
                "look at `millstream-agent status`: either this agent's certificate has expired, or a clock is wrong"
            }
            (_, Some(Error::AlertReceived(_))) => {
                "look at this agent's certificate with `millstream-agent pki show`: the peer wants its own authority, and \
                 the name that it dials among the hosts"
            }
            (Self::Identity { .. }, _) => "issue one with `millstream-agent pki issue`, once for each role",
            (Self::TooMany { .. }, _) => "close connections that are not used",
            (Self::NotHttp2, _) => "what is served here is gRPC: dial with `tls://` and this port",
            _ => "nothing, unless it comes again: then look at the network and the peer",
        }
    }
}

/// Why a handshake failed, as seen from this end.
fn handshake_reason(error: &io::Error) -> String {
    match error.get_ref().and_then(|carried| carried.downcast_ref()) {
        Some(rustls::Error::InvalidCertificate(
            rustls::CertificateError::InvalidPurpose | rustls::CertificateError::InvalidPurposeContext { .. },
        )) => "the certificate is for no client".to_owned(),
        Some(rustls::Error::AlertReceived(alert)) => {
            format!("the peer does not take this agent's certificate (alert {alert:?})")
        }
        _ => tls::reason(error),
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc, time::Duration};

    use millstream_common::{
        clock::World,
        tls::{Role, ServerTls, TlsPaths, anonymous_client_config, client_config},
    };
    use rustls::{ClientConfig, pki_types::ServerName};
    use tokio::{
        io::AsyncReadExt as _,
        net::{TcpListener, TcpStream},
    };
    use tokio_rustls::TlsConnector;

    use super::{
        super::{Admission, Places, Socket, greet},
        tls,
    };
    use crate::pki::{Authority, Issued, Wanted};

    fn now() -> u64 {
        World::system().clock.wall_ns()
    }

    fn issue(authority: &Authority, role: Role, name: &str, begin: u64) -> Issued {
        let hosts = if role == Role::Agent { vec!["localhost".to_owned()] } else { Vec::new() };
        let valid = Duration::from_secs(3600);
        authority.issue(&Wanted { role, name: name.to_owned(), hosts, valid }, begin).unwrap()
    }

    fn paths(issued: &Issued, authority: &Path, revocations: Option<&Path>) -> TlsPaths {
        TlsPaths {
            certificate: issued.certificate.clone(),
            key: issued.key.clone(),
            authority: authority.to_owned(),
            revocations: revocations.map(Path::to_owned),
        }
    }

    /// What the log says of a peer that dials with this configuration: what it claims, the reason and the next step.
    async fn told(admission: &Arc<Admission>, dial: (Arc<ClientConfig>, ServerName<'static>)) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (config, name) = dial;
        let peer = tokio::spawn(async move {
            let stream = TcpStream::connect(address).await.unwrap();
            if let Ok(mut stream) = TlsConnector::from(config).connect(name, stream).await {
                // Its own refusal is learned by reading.
                let _refused = stream.read_u8().await;
            }
        });
        let (stream, from) = listener.accept().await.unwrap();
        let place = Places::new().take(Some(from.ip())).unwrap();
        let greeting = greet(Socket::Tcp(stream, from), Some(Arc::clone(admission)), place);
        let (greeted, claims) = tls::with_presented(greeting).await;
        let error = greeted.unwrap_err();
        peer.await.unwrap();
        format!("{} | {error} | {}", claims.as_deref().unwrap_or("nothing"), error.next_step())
    }

    /// The configuration of a program of ours.
    fn dial(issued: &Issued, authority: &Path) -> (Arc<ClientConfig>, ServerName<'static>) {
        client_config(&paths(issued, authority, None), "localhost").unwrap()
    }

    #[tokio::test]
    async fn each_kind_of_refusal_says_who_came_why_not_and_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(&directory.path().join("lab"), "lab", now()).unwrap();
        let other = Authority::init(&directory.path().join("other"), "other", now()).unwrap();
        let agent = issue(&authority, Role::Agent, "foo", now());
        let revoked = issue(&authority, Role::Controller, "rita", now());
        authority.revoke(std::slice::from_ref(&revoked.certificate), now()).unwrap();
        let tls = paths(&agent, &authority.certificate(), Some(&authority.revocations()));
        let admission = Admission::new(ServerTls::load(&tls).unwrap());
        let trusted = authority.certificate();

        let nobody = anonymous_client_config(&trusted, "localhost").unwrap();
        let expired = issue(&authority, Role::Controller, "erik", now() - 7_200_000_000_000);
        let stranger = issue(&other, Role::Controller, "stan", now());
        // What no program of ours does: an agent's certificate in a client.
        let (_, name) = dial(&revoked, &trusted);
        let mistaken = with_certificate_of(&agent, &trusted);
        // It expects another host, and another authority.
        let elsewhere = anonymous_client_config(&trusted, "bar.example.com").unwrap();
        let elsewhere_trusting = dial(&stranger, &other.certificate());
        let mut log = String::new();
        for peer in [
            nobody,
            dial(&expired, &trusted),
            dial(&revoked, &trusted),
            dial(&stranger, &trusted),
            (mistaken, name),
            elsewhere,
            elsewhere_trusting,
        ] {
            let line = told(&admission, peer).await;
            let is_time =
                |word: &str| word.starts_with("20") && word.trim_end_matches([',', ';']).ends_with('Z');
            let words: Vec<_> =
                line.split(' ').map(|word| if is_time(word) { "TIME" } else { word }).collect();
            log += &words.join(" ");
            log += "\n";
        }
        expect_test::expect![[r#"
            nothing | the TLS handshake failed: the other end showed no certificate | dial with a certificate of the role controller or operator, made by `millstream-agent pki issue`
            millstream://controller/erik | the TLS handshake failed: the other end's certificate has expired: it was valid until TIME and the clock here says TIME issue a new one | issue a new one with `millstream-agent pki issue`
            millstream://controller/rita | the TLS handshake failed: the other end's certificate was revoked | issue a new one with `millstream-agent pki issue`
            millstream://controller/stan | the TLS handshake failed: the other end's certificate is not from the authority that was given: check that both ends use the same `ca.pem` | issue one in the directory of this agent's authority, or add the other authority to `authority` in agent.yaml
            millstream://agent/foo | the TLS handshake failed: the certificate is for no client | dial with a certificate of the role controller or operator: one of an agent is for its own port
            nothing | the TLS handshake failed: the peer does not take this agent's certificate (alert BadCertificate) | look at this agent's certificate with `millstream-agent pki show`: the peer wants its own authority, and the name that it dials among the hosts
            nothing | the TLS handshake failed: the peer does not take this agent's certificate (alert UnknownCA) | look at this agent's certificate with `millstream-agent pki show`: the peer wants its own authority, and the name that it dials among the hosts
        "#]].assert_eq(&log);
    }

    /// A client that shows an agent's certificate.
    fn with_certificate_of(issued: &Issued, authority: &Path) -> Arc<ClientConfig> {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
        let certificate = CertificateDer::from_pem_file(&issued.certificate).unwrap();
        let key = PrivateKeyDer::from_pem_file(&issued.key).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(authority).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }
}
