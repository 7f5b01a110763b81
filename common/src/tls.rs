//! PEM files to TLS configurations.
//!
//! TLS 1.3 only, one provider of cryptography which is handed over by name, no session tickets: every connection shows its
//! certificate. What an identity *may* do is decided by the agent's table of calls and roles, not here.

mod holder;
mod identity;
mod presented;
#[cfg(test)]
mod tests;
mod words;

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
        pem::PemObject as _,
    },
    server::{VerifierBuilderError, WebPkiClientVerifier, danger::ClientCertVerifier},
};

pub use self::{
    holder::{Holder, HolderError, check_holder},
    identity::{Identity, IdentityError, Role, life, valid_until},
    presented::with_presented,
    words::{is_refusal_of_the_agent, reason},
};

/// The one protocol spoken inside TLS.
const ALPN: &[u8] = b"h2";

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
    /// Lists of certificates that these authorities have revoked, in PEM. Without it nothing counts as revoked.
    pub revocations: Option<PathBuf>,
}

/// Why TLS cannot be set up. Each names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("failed to read the {what} `{}`: {}; make one with `millstream-agent pki {}`, or correct the path", path.display(), reason(source), made_by(what))]
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
    #[error("`{}` holds no {what} in PEM form; make one with `millstream-agent pki {}`", path.display(), made_by(what))]
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
    #[error("what is in `{}` cannot be used to check certificates: {reason}", path.display())]
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

/// What a list of revoked certificates is called.
const REVOCATIONS: &str = "list of revoked certificates";

/// The command that makes a file.
fn made_by(what: &str) -> &'static str {
    if what == REVOCATIONS { "revoke" } else { "issue" }
}

/// A certificate, its key and the authorities of the other end, read and checked.
struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
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
        let revoked = paths.revocations.as_deref().map(revocations).transpose()?.unwrap_or_default();
        Ok(Self { chain, key, roots: Arc::new(roots), revoked, identity })
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

fn revocations(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let pem = read(REVOCATIONS, path)?;
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TlsError::Content { what: REVOCATIONS, path: path.to_owned() }),
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

/// An agent's end of TLS: takes clients with a certificate of its authorities that was not revoked, and nobody else.
#[derive(Debug)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl ServerTls {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// When a file is missing, exposed or not what it should be.
    pub fn load(paths: &TlsPaths) -> Result<Self, TlsError> {
        server_tls(paths)
    }

    /// What connections are accepted with.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// Whether the certificates that a client has shown would be taken now.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, chain: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        let (end, intermediates) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        self.verifier.verify_client_cert(end, intermediates, UnixTime::now()).map(drop)
    }
}

fn server_tls(paths: &TlsPaths) -> Result<ServerTls, TlsError> {
    let Credentials { chain, key, roots, revoked, identity } = Credentials::load(paths)?;
    if identity.role != Role::Agent {
        return Err(TlsError::WrongRole {
            certificate: paths.certificate.clone(),
            found: identity.role,
            wanted: Role::Agent,
        });
    }
    // An authority without a list has revoked nothing; one is on its way out while another comes in.
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .with_crls(revoked)
        .only_check_end_entity_revocation()
        .allow_unknown_revocation_status()
        .build()
        .map_err(|error| unusable(paths, &error))?;
    let verifier: Arc<dyn ClientCertVerifier> = Arc::new(presented::Noting(verifier));
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| pair(paths, source))?
        .with_client_cert_verifier(Arc::clone(&verifier))
        .with_single_cert(chain, key)
        .map_err(|source| pair(paths, source))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A ticket would let a certificate that was revoked come back without being shown.
    config.send_tls13_tickets = 0;
    Ok(ServerTls { config: Arc::new(config), verifier })
}

fn unusable(paths: &TlsPaths, error: &VerifierBuilderError) -> TlsError {
    let path = match (error, &paths.revocations) {
        (VerifierBuilderError::InvalidCrl(_), Some(revocations)) => revocations,
        _ => &paths.authority,
    };
    TlsError::Authority { path: path.clone(), reason: error.to_string() }
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
    let Credentials { chain, key, roots, revoked, identity } = Credentials::load(paths)?;
    if identity.role == Role::Agent {
        return Err(TlsError::WrongRole {
            certificate: paths.certificate.clone(),
            found: identity.role,
            wanted: Role::Controller,
        });
    }
    let inner = WebPkiServerVerifier::builder_with_provider(roots, provider())
        .with_crls(revoked)
        .only_check_end_entity_revocation()
        .allow_unknown_revocation_status()
        .build()
        .map_err(|error| unusable(paths, &error))?;
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

/// The configuration of somebody without a certificate who dials an agent or an authority that goes by `server_name`.
///
/// # Errors
/// When the authority's file is missing or not what it should be, or the name is none.
pub fn anonymous_client_config(
    authority: &Path,
    server_name: &str,
) -> Result<(Arc<ClientConfig>, ServerName<'static>), TlsError> {
    let name = ServerName::try_from(server_name.to_owned())
        .map_err(|_| TlsError::ServerName { name: crate::text::printable(server_name.as_bytes(), 256) })?;
    let unusable = |reason: String| TlsError::Authority { path: authority.to_owned(), reason };
    let mut roots = RootCertStore::empty();
    for certificate in certificates("certificate of the authority", authority)? {
        roots.add(certificate).map_err(|error| unusable(reason(&error)))?;
    }
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| unusable(error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| unusable(reason(&error)))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AgentVerifier { inner }))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok((Arc::new(config), name))
}

/// The configuration of a server that takes everybody: what callers hold they show in their calls.
///
/// # Errors
/// When certificate and key do not belong together.
pub fn open_server_config(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn pair(paths: &TlsPaths, source: rustls::Error) -> TlsError {
    TlsError::Pair { certificate: paths.certificate.clone(), key: paths.key.clone(), source }
}

/// What a verifier leaves to the one that it wraps: signatures, which say nothing of who somebody is.
macro_rules! signatures_as {
    ($inner:tt) => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.$inner.verify_tls12_signature(message, certificate, signature)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.$inner.verify_tls13_signature(message, certificate, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.$inner.supported_verify_schemes()
        }
    };
}
use signatures_as;

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

    signatures_as!(inner);
}
