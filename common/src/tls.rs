//! PEM files to TLS configurations, identities in certificates, and TLS errors in words.
//!
//! TLS 1.3 only, one provider of cryptography which is handed over by name, no session tickets: every connection shows its
//! certificate. What an identity *may* do is decided by the agent's table of calls and roles, not here.

use std::{
    error::Error,
    fmt, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::pipe;

/// The one protocol spoken inside TLS.
const ALPN: &[u8] = b"h2";
/// Scheme of the names that identities have in certificates.
const SCHEME: &str = "millstream://";
/// Longest name of an identity.
const IDENTITY_NAME_BYTES_MAX: usize = 128;

/// What the holder of a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// May run blocks.
    Controller,
    /// May only look.
    Operator,
    /// Is an agent: a server, never a client.
    Agent,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Controller, Self::Operator, Self::Agent];

    /// The role as the word that stands in certificates.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Operator => "operator",
            Self::Agent => "agent",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        Self::ALL
            .into_iter()
            .find(|role| role.word() == text)
            .ok_or_else(|| IdentityError::Role { role: crate::text::printable(text.as_bytes(), 64) })
    }
}

/// Who holds a certificate: `millstream://<role>/<name>` among its alternative names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// What it is.
    pub role: Role,
    /// Its name: 1 to 128 letters, digits, `-`, `_`, `.` or `@`.
    pub name: String,
}

/// Why a certificate or a text names no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The certificate cannot be read.
    #[error("the certificate cannot be read")]
    Encoding,
    /// No name with our scheme.
    #[error(
        "the certificate has no name `millstream://<role>/<name>`: issue one with `millstream-agent pki issue`"
    )]
    Missing,
    /// More than one such name: which one counts would be a guess.
    #[error("the certificate has more than one name `millstream://…`: issue one for each role")]
    Ambiguous,
    /// The role is none of ours.
    #[error("`{role}` is not a role: use controller, operator or agent")]
    Role {
        /// The word that was found, made safe to print.
        role: String,
    },
    /// The name is out of bounds.
    #[error("the name of an identity must have 1 to 128 letters, digits, `-`, `_`, `.` or `@`")]
    Name,
}

impl Identity {
    /// Checks a name and joins it to a role.
    ///
    /// # Errors
    /// When the name is empty, too long or has a character that is refused.
    pub fn new(role: Role, name: impl Into<String>) -> Result<Self, IdentityError> {
        let name = name.into();
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        if name.is_empty() || name.len() > IDENTITY_NAME_BYTES_MAX || !name.chars().all(allowed) {
            return Err(IdentityError::Name);
        }
        Ok(Self { role, name })
    }

    /// Reads the identity out of a certificate that has been verified.
    ///
    /// # Errors
    /// When there is not exactly one name with our scheme, or it is malformed.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| IdentityError::Encoding)?;
        let names = parsed.subject_alternative_name().map_err(|_| IdentityError::Encoding)?;
        let mut uris =
            names.iter().flat_map(|extension| &extension.value.general_names).filter_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some(*uri),
                _ => None,
            });
        let first = uris.next().ok_or(IdentityError::Missing)?;
        if uris.next().is_some() {
            return Err(IdentityError::Ambiguous);
        }
        first.parse()
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let rest = text.strip_prefix(SCHEME).ok_or(IdentityError::Missing)?;
        let (role, name) = rest.split_once('/').ok_or(IdentityError::Name)?;
        Self::new(role.parse()?, name)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.role, self.name)
    }
}

/// Where one end's certificate, its key and the authority of the other end lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// Certificate in PEM, the end's own first.
    pub certificate: PathBuf,
    /// Private key in PEM. Nobody but its owner may read it.
    pub key: PathBuf,
    /// Certificates of the authorities whose certificates are taken from the other end, in PEM. Several while an
    /// authority is replaced.
    pub authority: PathBuf,
}

/// Why TLS cannot be set up. Each names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("failed to read the {what} `{}`: {}; make one with `millstream-agent pki issue`, or correct the path", path.display(), reason(source))]
    Read {
        /// Which of the files.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file holds something else.
    #[error("`{}` holds no {what} in PEM form; make one with `millstream-agent pki issue`", path.display())]
    Content {
        /// What was looked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Others may read the private key.
    #[error("the private key `{}` can be used by others (mode {mode:04o}): run `chmod 600 {}`", path.display(), path.display())]
    KeyExposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Certificate and key do not belong together, or the certificate cannot be used.
    #[error("certificate `{}` and key `{}` cannot be used together: {}; issue both anew", certificate.display(), key.display(), reason(source))]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What the TLS library said.
        #[source]
        source: rustls::Error,
    },
    /// The certificate names no identity.
    #[error("certificate `{}`: {source}", certificate.display())]
    Identity {
        /// The certificate's file.
        certificate: PathBuf,
        /// What is wrong with it.
        #[source]
        source: IdentityError,
    },
    /// The certificate is of a role that cannot stand at this end.
    #[error("certificate `{}` is for the role {found}, but here one for {wanted} is needed: run `millstream-agent pki issue --role {wanted}`", certificate.display())]
    WrongRole {
        /// The certificate's file.
        certificate: PathBuf,
        /// Its role.
        found: Role,
        /// What would do.
        wanted: Role,
    },
    /// The authorities cannot be used.
    #[error("the certificates of authorities in `{}` cannot be used: {reason}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What the TLS library said.
        reason: String,
    },
    /// A name that no certificate can have.
    #[error("`{name}` is neither a host name nor an address: correct the host of the stream")]
    ServerName {
        /// The name, made safe to print.
        name: String,
    },
}

/// A certificate, its key and the authorities of the other end, read and checked.
struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    identity: Identity,
}

impl Credentials {
    fn load(paths: &TlsPaths) -> Result<Self, TlsError> {
        let chain = certificates("certificate", &paths.certificate)?;
        let identity = Identity::of_certificate(&chain[0])
            .map_err(|source| TlsError::Identity { certificate: paths.certificate.clone(), source })?;
        let key = private_key(&paths.key)?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates("certificate of the authority", &paths.authority)? {
            roots.add(certificate).map_err(|error| TlsError::Authority {
                path: paths.authority.clone(),
                reason: reason(&error),
            })?;
        }
        Ok(Self { chain, key, roots: Arc::new(roots), identity })
    }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { what, path: path.to_owned(), source })
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(what, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TlsError::Content { what, path: path.to_owned() }),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let what = "private key";
    let failed = |source| TlsError::Read { what, path: path.to_owned(), source };
    let mode = fs::metadata(path).map_err(failed)?.permissions().mode() & 0o7777;
    // A group may read (a key of root's for a service's group), but only read.
    if mode & 0o037 != 0 {
        return Err(TlsError::KeyExposed { path: path.to_owned(), mode });
    }
    PrivateKeyDer::from_pem_slice(&read(what, path)?)
        .map_err(|_| TlsError::Content { what, path: path.to_owned() })
}

/// The provider of cryptography, by name: nothing here depends on which one the process calls its default.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The identity of the certificate in a file.
///
/// # Errors
/// When it cannot be read or names none.
pub fn identity_of_file(certificate: &Path) -> Result<Identity, TlsError> {
    let chain = certificates("certificate", certificate)?;
    Identity::of_certificate(&chain[0])
        .map_err(|source| TlsError::Identity { certificate: certificate.to_owned(), source })
}

/// The configuration of an agent: takes clients with a certificate of its authorities and nobody else.
///
/// # Errors
/// When a file is missing, exposed or not what it should be.
pub fn server_config(paths: &TlsPaths) -> Result<Arc<ServerConfig>, TlsError> {
    let Credentials { chain, key, roots, identity } = Credentials::load(paths)?;
    if identity.role != Role::Agent {
        return Err(TlsError::WrongRole {
            certificate: paths.certificate.clone(),
            found: identity.role,
            wanted: Role::Agent,
        });
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| TlsError::Authority { path: paths.authority.clone(), reason: error.to_string() })?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| pair(paths, source))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|source| pair(paths, source))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A ticket would let a certificate that was revoked come back without being shown.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The configuration of a controller or operator that dials the agent whose certificate names `server_name`.
///
/// # Errors
/// When a file is missing, exposed or not what it should be, or the name is none.
pub fn client_config(
    paths: &TlsPaths,
    server_name: &str,
) -> Result<(Arc<ClientConfig>, ServerName<'static>), TlsError> {
    let name = ServerName::try_from(server_name.to_owned())
        .map_err(|_| TlsError::ServerName { name: crate::text::printable(server_name.as_bytes(), 256) })?;
    let Credentials { chain, key, roots, identity } = Credentials::load(paths)?;
    if identity.role == Role::Agent {
        return Err(TlsError::WrongRole {
            certificate: paths.certificate.clone(),
            found: identity.role,
            wanted: Role::Controller,
        });
    }
    let inner = WebPkiServerVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| TlsError::Authority { path: paths.authority.clone(), reason: error.to_string() })?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| pair(paths, source))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AgentVerifier { inner }))
        .with_client_auth_cert(chain, key)
        .map_err(|source| pair(paths, source))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok((Arc::new(config), name))
}

fn pair(paths: &TlsPaths, source: rustls::Error) -> TlsError {
    TlsError::Pair { certificate: paths.certificate.clone(), key: paths.key.clone(), source }
}

/// Verifies a server as the library does, and then that its role is `agent`: any other certificate of the same authority
/// is no server, whatever its key usage says.
#[derive(Debug)]
struct AgentVerifier {
    inner: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for AgentVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified =
            self.inner.verify_server_cert(certificate, intermediates, server_name, ocsp_response, now)?;
        match Identity::of_certificate(certificate) {
            Ok(Identity { role: Role::Agent, .. }) => Ok(verified),
            _ => Err(rustls::Error::InvalidCertificate(rustls::CertificateError::InvalidPurpose)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Why something failed, for people: the innermost cause of an error, and for TLS what it means and what to do.
#[must_use]
pub fn reason(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    loop {
        if let Some(found) = cause.downcast_ref::<rustls::Error>() {
            return tls_reason(found);
        }
        match pipe::deeper(cause) {
            Some(next) => cause = next,
            None => break,
        }
    }
    let text = pipe::innermost(error).to_string();
    // HTTP/2 keeps only the text of what the layer below it said.
    if let Some(explained) = text.split("received fatal alert: ").nth(1).and_then(alert_reason) {
        return explained.to_owned();
    }
    // What the answer of a TLS port looks like to HTTP/2.
    if text.contains("frame with invalid size") {
        return "the other end does not speak HTTP/2 without TLS: use `tls://`".to_owned();
    }
    system_words(&text)
}

/// The system's words without its number, in the lower case of a clause.
fn system_words(text: &str) -> String {
    let text = text.split(" (os error").next().unwrap_or(text);
    let mut characters = text.chars();
    match characters.next() {
        // An acronym stays as it is.
        Some(first) if !text.chars().nth(1).is_some_and(char::is_uppercase) => {
            first.to_lowercase().chain(characters).collect()
        }
        _ => text.to_owned(),
    }
}

fn tls_reason(error: &rustls::Error) -> String {
    use rustls::{CertificateError as Bad, Error as Tls};
    match error {
        Tls::AlertReceived(alert) => {
            let name = format!("{alert:?}");
            alert_reason(&name)
                .map_or_else(|| format!("the other end ended TLS with the alert {name}"), str::to_owned)
        }
        Tls::InvalidCertificate(bad) => match bad {
            // Two authorities of one name differ in their signatures only.
            Bad::UnknownIssuer | Bad::BadSignature => {
                "the other end's certificate is not from the authority that was given: \
                 check that both ends use the same `ca.pem`"
                    .to_owned()
            }
            Bad::Expired | Bad::ExpiredContext { .. } => {
                "the other end's certificate has expired: issue a new one".to_owned()
            }
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
                "the other end's certificate is not valid yet: check both clocks".to_owned()
            }
            Bad::Revoked => "the other end's certificate was revoked".to_owned(),
            Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => {
                "the other end's certificate is for another role: an agent needs one of the role agent"
                    .to_owned()
            }
            Bad::NotValidForNameContext { expected, presented } => format!(
                "the host was expected to be `{}`, but its certificate is for {}: correct the host, or issue the \
                 certificate with that name",
                expected.to_str(),
                if presented.is_empty() { "no host".to_owned() } else { presented.join(", ") },
            ),
            other => format!("the other end's certificate is refused: {other}"),
        },
        Tls::InvalidMessage(_) => {
            "the other end does not speak TLS: check the port and the scheme".to_owned()
        }
        Tls::NoCertificatesPresented => "the other end showed no certificate".to_owned(),
        other => system_words(&other.to_string()),
    }
}

/// What the alerts mean that a refused certificate causes. The other end is always the agent: agents dial nobody.
fn alert_reason(alert: &str) -> Option<&'static str> {
    Some(match alert.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default() {
        "UnknownCA" => {
            "the agent refused this certificate: unknown CA; use one of the authority that the agent trusts"
        }
        "CertificateRequired" | "NoCertificate" => {
            "the agent refused the connection: no certificate was shown; give one with role controller or operator"
        }
        "CertificateExpired" => "the agent refused this certificate: it has expired; issue a new one",
        "CertificateRevoked" => "the agent refused this certificate: it was revoked; issue a new one",
        "UnsupportedCertificate" => {
            "the agent refused this certificate: it is not for a client; use one with role controller or operator"
        }
        "BadCertificate" | "CertificateUnknown" | "AccessDenied" => {
            "the agent refused this certificate: it is not acceptable; the agent's log says why"
        }
        "DecryptError" => {
            "the agent refused this certificate: the key or the authority is another one of the same name"
        }
        "ProtocolVersion" => "the other end does not speak TLS 1.3",
        "NoApplicationProtocol" => "the other end does not speak HTTP/2: check the port",
        "UnrecognisedName" => "the agent does not go by that name: check the host of the stream",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_have_one_spelling() {
        let identity: Identity = "millstream://controller/alice@lab".parse().unwrap();
        assert_eq!(identity, Identity::new(Role::Controller, "alice@lab").unwrap());
        assert_eq!(identity.to_string(), "millstream://controller/alice@lab");
        for text in [
            "millstream://root/x",
            "millstream://agent/",
            "millstream://agent/a/b",
            "http://agent/x",
            "agent/x",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
    }

    #[test]
    fn alerts_become_sentences_even_when_only_their_text_is_left() {
        let error = io::Error::other("received fatal alert: UnknownCA");
        assert!(
            reason(&error).starts_with("the agent refused this certificate: unknown CA"),
            "{}",
            reason(&error)
        );
        let error =
            io::Error::other(rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRequired));
        assert!(reason(&error).contains("no certificate was shown"), "{}", reason(&error));
    }

    #[test]
    fn system_errors_lose_their_number() {
        assert_eq!(reason(&io::Error::from_raw_os_error(111)), "connection refused");
    }

    #[test]
    fn a_missing_file_is_named_with_the_next_step() {
        let missing = PathBuf::from("/nonexistent/agent.pem");
        let paths = TlsPaths { certificate: missing.clone(), key: missing.clone(), authority: missing };
        let error = server_config(&paths).unwrap_err().to_string();
        assert_eq!(
            error,
            "failed to read the certificate `/nonexistent/agent.pem`: no such file or directory; make one with \
             `millstream-agent pki issue`, or correct the path"
        );
    }

    /// Writes an authority and two ends' files; returns the paths of (agent, controller).
    fn pki(directory: &Path) -> (TlsPaths, TlsPaths) {
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let issuer = rcgen::Issuer::new(ca, ca_key);
        let authority = directory.join("ca.pem");
        fs::write(&authority, ca_pem).unwrap();
        let issue = |role: Role, usage| {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut end = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            let uri = format!("millstream://{role}/x").try_into().unwrap();
            end.subject_alt_names.push(rcgen::SanType::URI(uri));
            end.extended_key_usages = vec![usage];
            let certificate = directory.join(format!("{role}.pem"));
            let key_path = directory.join(format!("{role}.key"));
            fs::write(&certificate, end.signed_by(&key, &issuer).unwrap().pem()).unwrap();
            fs::write(&key_path, key.serialize_pem()).unwrap();
            fs::set_permissions(&key_path, fs::Permissions::from_mode(0o600)).unwrap();
            TlsPaths { certificate, key: key_path, authority: authority.clone() }
        };
        (
            issue(Role::Agent, rcgen::ExtendedKeyUsagePurpose::ServerAuth),
            issue(Role::Controller, rcgen::ExtendedKeyUsagePurpose::ClientAuth),
        )
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (agent, _) = pki(directory.path());
        fs::set_permissions(&agent.key, fs::Permissions::from_mode(0o644)).unwrap();
        let error = server_config(&agent).unwrap_err().to_string();
        assert!(error.contains("mode 0644") && error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_certificate_of_the_wrong_role_is_refused_at_home() {
        let directory = tempfile::tempdir().unwrap();
        let (agent, controller) = pki(directory.path());
        assert!(matches!(server_config(&controller), Err(TlsError::WrongRole { wanted: Role::Agent, .. })));
        assert!(matches!(client_config(&agent, "localhost"), Err(TlsError::WrongRole { .. })));
    }

    async fn handshake(server: &TlsPaths, client: &TlsPaths, name: &str) -> Result<Identity, String> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let acceptor = tokio_rustls::TlsAcceptor::from(server_config(server).unwrap());
        let (config, name) = client_config(client, name).unwrap();
        let connector = tokio_rustls::TlsConnector::from(config);
        let (accepted, connected) = tokio::join!(acceptor.accept(far), connector.connect(name, near));
        connected.map_err(|error| reason(&error))?;
        let accepted = accepted.map_err(|error| reason(&error))?;
        let certificates = accepted.get_ref().1.peer_certificates().unwrap();
        Identity::of_certificate(&certificates[0]).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn both_ends_know_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let (agent, controller) = pki(directory.path());
        let identity = handshake(&agent, &controller, "localhost").await.unwrap();
        assert_eq!(identity.to_string(), "millstream://controller/x");
    }

    #[tokio::test]
    async fn another_host_name_is_refused_with_both_names() {
        let directory = tempfile::tempdir().unwrap();
        let (agent, controller) = pki(directory.path());
        let error = handshake(&agent, &controller, "other.example.com").await.unwrap_err();
        assert!(error.contains("`other.example.com`") && error.contains("localhost"), "{error}");
    }

    #[tokio::test]
    async fn another_authority_is_refused() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let ((agent, _), (_, stranger)) = (pki(one.path()), pki(other.path()));
        let error = handshake(&agent, &stranger, "localhost").await.unwrap_err();
        assert!(error.contains("not from the authority"), "{error}");
    }
}
