//! Whether somebody holds an agent's certificate, shown by a signature instead of a handshake: an agent's certificate is
//! for a server, and so no client can show it in TLS.

use std::{net::IpAddr, path::Path, sync::Arc};

use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::{AgentVerifier, Identity, IdentityError, TlsError, certificates, provider, reason, revocations};

/// Why somebody does not hold an agent's certificate.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// The files to check it by cannot be used.
    #[error(transparent)]
    Files(#[from] TlsError),
    /// The certificate cannot be read.
    #[error("the certificate cannot be read, or names no host")]
    Unreadable,
    /// It is not taken.
    #[error("the certificate of {} is not taken: {}", holder.as_ref().map_or_else(|_| "nobody known".to_owned(), ToString::to_string), not_taken(source))]
    NotTaken {
        /// Whom it names.
        holder: Result<Identity, IdentityError>,
        /// What the TLS library said.
        #[source]
        source: rustls::Error,
    },
    /// It was not signed by its key.
    #[error("the signature is not by the key of the certificate")]
    Signature,
}

/// What is said of another end's certificate, said of one in a message.
fn not_taken(error: &rustls::Error) -> String {
    reason(error).replace("the other end's certificate", "it")
}

/// An agent's certificate whose key has signed something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Whom it names.
    pub identity: Identity,
    /// Names and addresses by which the agent is dialled.
    pub hosts: Vec<String>,
}

/// Checks an agent's certificate as whoever dials the agent would, and that its key has signed `message`.
///
/// # Errors
/// When it is of another authority or role, revoked or not valid now, or the signature is another's.
pub fn check_holder(
    authority: &Path,
    revoked: Option<&Path>,
    certificate: &CertificateDer<'_>,
    message: &[u8],
    signature: &[u8],
    now: UnixTime,
) -> Result<Holder, HolderError> {
    let provider = provider();
    let mut roots = RootCertStore::empty();
    for root in certificates("certificate of the authority", authority)? {
        roots
            .add(root)
            .map_err(|error| TlsError::Authority { path: authority.to_owned(), reason: reason(&error) })?;
    }
    let revoked = revoked.map(revocations).transpose()?.unwrap_or_default();
    let unusable = |error: rustls::server::VerifierBuilderError| TlsError::Authority {
        path: authority.to_owned(),
        reason: error.to_string(),
    };
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .with_crls(revoked)
        .only_check_end_entity_revocation()
        .allow_unknown_revocation_status()
        .build()
        .map_err(unusable)?;
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| HolderError::Unreadable)?;
    let hosts = hosts(&parsed);
    let first = hosts.first().and_then(|host| ServerName::try_from(host.as_str()).ok());
    let first = first.ok_or(HolderError::Unreadable)?;
    let holder = Identity::of_certificate(certificate);
    AgentVerifier { inner }
        .verify_server_cert(certificate, &[], &first, &[], now)
        .map_err(|source| HolderError::NotTaken { holder: holder.clone(), source })?;
    let key = &parsed.public_key().subject_public_key.data;
    let algorithms = provider.signature_verification_algorithms.all;
    // One that is for another kind of key takes no signature by this one.
    if !algorithms.iter().any(|algorithm| algorithm.verify_signature(key, message, signature).is_ok()) {
        return Err(HolderError::Signature);
    }
    let identity = holder.map_err(|_| HolderError::Unreadable)?;
    Ok(Holder { identity, hosts })
}

fn hosts(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(host).collect()
}
