//! The next certificate of an agent: what it asks for, what the authority checks, and how both files are replaced.
//!
//! Nothing but the new key is taken from the request. Identity, hosts and length of life are those of the certificate that
//! the agent shows, so that a renewal never gives more than was issued by hand; and whoever has let it expire, or had it
//! revoked, comes back only by hand.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use millstream_common::tls::{self, HolderError, Role, TlsPaths};
use millstream_proto::v1::RenewCertificateRequest;
use rcgen::{CertificateParams, CertificateSigningRequestParams, KeyPair, SigningKey as _};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, UnixTime, pem::PemObject as _};

use super::{AUTHORITY_REVOCATIONS, Authority, CLOCKS_DIFFER, PkiError, Wanted, make_failed, params, read};

/// What stands before the request in what is signed: the same key signs TLS handshakes, which begin otherwise.
const SIGNED_FOR: &[u8] = b"millstream renewal 1\0";

/// Why an authority does not renew.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The certificate is not taken, or its key has not signed.
    #[error("{source}; issue a new one with `millstream-agent pki issue`")]
    Holder {
        /// Why not.
        #[source]
        source: HolderError,
    },
    /// The request is none, or not signed by the key in it.
    #[error("the request for a certificate is not valid: {source}")]
    Request {
        /// What is wrong.
        #[source]
        source: rcgen::Error,
    },
    /// The authority itself.
    #[error(transparent)]
    Authority(#[from] PkiError),
}

/// A certificate that was renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewed {
    /// Whose it is.
    pub holder: String,
    /// The certificate in PEM form.
    pub pem: String,
}

impl Authority {
    /// Renews the certificate of an agent; `now_ns` is the time since 1970.
    ///
    /// # Errors
    /// When the agent has no valid certificate of this authority, or the authority cannot be used.
    pub fn renew(&self, request: &RenewCertificateRequest, now_ns: u64) -> Result<Renewed, RenewError> {
        let certificate = CertificateDer::from(request.certificate_der.as_ref());
        let list = self.directory.join(AUTHORITY_REVOCATIONS);
        let holder = tls::check_holder(
            &self.certificate(),
            list.exists().then_some(list.as_path()),
            &certificate,
            &[SIGNED_FOR, &request.request_der].concat(),
            &request.signature,
            UnixTime::since_unix_epoch(Duration::from_nanos(now_ns)),
        )
        .map_err(|source| RenewError::Holder { source })?;
        let asked = CertificateSigningRequestDer::from(request.request_der.as_ref());
        let asked = CertificateSigningRequestParams::from_der(&asked)
            .map_err(|source| RenewError::Request { source })?;
        let valid = span(&certificate).ok_or(RenewError::Holder { source: HolderError::Unreadable })?;
        let name = holder.identity.name.clone();
        let wanted = Wanted { role: Role::Agent, name, hosts: holder.hosts, valid };
        let made = params(&holder.identity, &wanted, now_ns)?
            .signed_by(&asked.public_key, &self.issuer()?)
            .map_err(make_failed)?;
        Ok(Renewed { holder: holder.identity.to_string(), pem: made.pem() })
    }
}

/// How long a certificate lives: without the time by which it began earlier, in case clocks differ.
fn span(certificate: &CertificateDer<'_>) -> Option<Duration> {
    let (from, until) = tls::life(certificate)?;
    let whole = until.checked_sub(from)?;
    Some(whole.checked_sub(CLOCKS_DIFFER).filter(|span| !span.is_zero()).unwrap_or(whole))
}

/// When a certificate is to be renewed, since 1970: after two thirds of its life. None when it cannot be read.
#[must_use]
pub fn renewal_time(certificate: &CertificateDer<'_>) -> Option<Duration> {
    let (_, until) = tls::life(certificate)?;
    Some(until.saturating_sub(span(certificate)? / 3))
}

/// A request that was made, with the new key, which never leaves the host.
pub struct Asking {
    /// What is sent.
    pub request: RenewCertificateRequest,
    key: KeyPair,
}

impl std::fmt::Debug for Asking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asking").finish_non_exhaustive()
    }
}

impl Asking {
    /// Makes a new key and a request for its certificate, signed by the present key.
    ///
    /// # Errors
    /// When the present files cannot be read or used.
    pub fn make(paths: &TlsPaths) -> Result<Self, PkiError> {
        let content =
            |what, path: &Path, reason: String| PkiError::Content { what, path: path.to_owned(), reason };
        let certificate = CertificateDer::from_pem_slice(read(&paths.certificate)?.as_bytes())
            .map_err(|error| content("certificate", &paths.certificate, error.to_string()))?;
        let present = KeyPair::from_pem(&read(&paths.key)?)
            .map_err(|error| content("private key", &paths.key, error.to_string()))?;
        let key = KeyPair::generate().map_err(make_failed)?;
        let request = CertificateParams::new(Vec::new()).map_err(make_failed)?;
        let request = request.serialize_request(&key).map_err(make_failed)?;
        let request_der = request.der().to_vec();
        let signature = present.sign(&[SIGNED_FOR, request_der.as_slice()].concat()).map_err(make_failed)?;
        let request = RenewCertificateRequest {
            certificate_der: certificate.to_vec().into(),
            request_der: request_der.into(),
            signature: signature.into(),
        };
        Ok(Self { request, key })
    }

    /// Puts the new certificate and its key in place of the present ones.
    ///
    /// # Errors
    /// When the answer holds no certificate of this key, or a file cannot be written.
    pub fn put_in_place(&self, pem: &str, paths: &TlsPaths) -> Result<(), PkiError> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes());
        let key = self.key.serialize_pem();
        let holds_key = der.as_ref().is_ok_and(|der| {
            let needle = rcgen::PublicKeyData::der_bytes(&self.key);
            der.windows(needle.len()).any(|window| window == needle)
        });
        if !holds_key {
            let reason = "the authority's answer is no certificate of the new key".to_owned();
            return Err(PkiError::Content { what: "certificate", path: paths.certificate.clone(), reason });
        }
        // Both are there before either is used, so that whoever is interrupted between the two steps can go on.
        write(&beside(&paths.key), key.as_bytes(), 0o600)?;
        write(&beside(&paths.certificate), pem.as_bytes(), 0o644)?;
        rename(&paths.key)?;
        rename(&paths.certificate)
    }
}

/// Goes on with a replacement that was interrupted, or takes it back when it had not come so far.
///
/// # Errors
/// When a file cannot be renamed.
pub fn finish_interrupted(paths: &TlsPaths) -> Result<(), PkiError> {
    if beside(&paths.key).exists() {
        // The key in use is still the old one.
        let _absent = fs::remove_file(beside(&paths.certificate));
        let _absent = fs::remove_file(beside(&paths.key));
        return Ok(());
    }
    if beside(&paths.certificate).exists() { rename(&paths.certificate) } else { Ok(()) }
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().map_or_else(OsString::new, ToOwned::to_owned);
    name.push(".new");
    path.with_file_name(name)
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), PkiError> {
    // With the permissions of whoever makes it, and not of what lay there.
    let _absent = fs::remove_file(path);
    let made = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = made.and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.map_err(failed("write", path))
}

fn rename(path: &Path) -> Result<(), PkiError> {
    fs::rename(beside(path), path).map_err(failed("replace", path))
}

fn failed(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PkiError {
    move |source| PkiError::File { attempt, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use millstream_common::{clock::World, tls::ServerTls};

    use super::{super::Issued, *};

    fn now() -> u64 {
        World::system().clock.wall_ns()
    }

    fn issue(authority: &Authority, role: Role, name: &str) -> Issued {
        let hosts =
            if role == Role::Agent { vec!["foo.example.com".into(), "10.0.0.7".into()] } else { vec![] };
        let valid = Duration::from_secs(3600);
        authority.issue(&Wanted { role, name: name.to_owned(), hosts, valid }, now()).unwrap()
    }

    fn paths(issued: &Issued) -> TlsPaths {
        TlsPaths {
            certificate: issued.certificate.clone(),
            key: issued.key.clone(),
            authority: issued.authority.clone(),
            revocations: None,
        }
    }

    fn refused(authority: &Authority, request: &RenewCertificateRequest, now: u64) -> String {
        authority.renew(request, now).unwrap_err().to_string()
    }

    #[test]
    fn a_renewed_certificate_has_the_same_identity_hosts_and_life_and_another_key() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), "lab", now()).unwrap();
        let issued = issue(&authority, Role::Agent, "foo");
        let paths = paths(&issued);
        let before = std::fs::read_to_string(&issued.key).unwrap();
        let shown = |now| super::super::show(&issued.certificate, now).unwrap().to_string();
        let old = shown(now());
        let asking = Asking::make(&paths).unwrap();
        let later = now() + 1_000_000_000 * 2_400;
        let renewed = authority.renew(&asking.request, later).unwrap();
        assert_eq!(renewed.holder, "millstream://agent/foo");
        asking.put_in_place(&renewed.pem, &paths).unwrap();
        ServerTls::load(&paths).unwrap();
        assert_ne!(std::fs::read_to_string(&issued.key).unwrap(), before);
        let new = shown(later);
        for line in ["identity", "hosts", "usable as"] {
            let of = |text: &str| {
                text.lines().find(|shown| shown.trim_start().starts_with(line)).map(str::to_owned)
            };
            assert_eq!(of(&old), of(&new));
        }
        assert!(new.contains("foo.example.com, 10.0.0.7"), "{new}");
        let der = CertificateDer::from_pem_slice(renewed.pem.as_bytes()).unwrap();
        assert_eq!(span(&der), Some(Duration::from_secs(3600)));
        assert_eq!(renewal_time(&der).unwrap().as_secs(), later / 1_000_000_000 + 2_400);
    }

    #[test]
    fn whoever_has_no_valid_certificate_of_an_agent_gets_none() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), "lab", now()).unwrap();
        let other = Authority::init(&directory.path().join("other"), "lab", now()).unwrap();
        let asking = |issued: &Issued| Asking::make(&paths(issued)).unwrap().request;
        let foo = asking(&issue(&authority, Role::Agent, "foo"));
        let told = refused(&authority, &foo, now() + 3_700 * 1_000_000_000);
        let begin =
            "the certificate of millstream://agent/foo is not taken: it has expired: it was valid until ";
        assert!(told.starts_with(begin) && told.ends_with("with `millstream-agent pki issue`"), "{told}");
        assert!(refused(&other, &foo, now()).contains("it is not from the authority that was given"));
        let alice = asking(&issue(&authority, Role::Controller, "alice"));
        assert!(
            refused(&authority, &alice, now())
                .starts_with("the certificate cannot be read, or names no host")
        );
        // Somebody else's key, and somebody else's request.
        let bar = asking(&issue(&authority, Role::Agent, "bar"));
        for mixed in [
            RenewCertificateRequest { certificate_der: foo.certificate_der.clone(), ..bar.clone() },
            RenewCertificateRequest { request_der: foo.request_der.clone(), ..bar.clone() },
            RenewCertificateRequest { signature: foo.signature.clone(), ..bar.clone() },
        ] {
            assert!(refused(&authority, &mixed, now()).starts_with("the signature is not by the key"));
        }
        let issued = issue(&authority, Role::Agent, "gone");
        let gone = asking(&issued);
        authority.revoke(&[issued.certificate], now()).unwrap();
        assert!(refused(&authority, &gone, now()).contains("agent/gone is not taken: it was revoked"));
        assert!(authority.renew(&bar, now()).is_ok());
    }

    #[test]
    fn an_interrupted_replacement_is_finished_or_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), "lab", now()).unwrap();
        let paths = paths(&issue(&authority, Role::Agent, "foo"));
        let asking = Asking::make(&paths).unwrap();
        let renewed = authority.renew(&asking.request, now()).unwrap();
        let key = asking.key.serialize_pem();
        // Before the first step.
        write(&beside(&paths.key), key.as_bytes(), 0o600).unwrap();
        write(&beside(&paths.certificate), renewed.pem.as_bytes(), 0o644).unwrap();
        finish_interrupted(&paths).unwrap();
        ServerTls::load(&paths).unwrap();
        assert!(!beside(&paths.key).exists() && !beside(&paths.certificate).exists());
        // Between the two.
        std::fs::write(&paths.key, &key).unwrap();
        write(&beside(&paths.certificate), renewed.pem.as_bytes(), 0o644).unwrap();
        assert!(ServerTls::load(&paths).is_err());
        finish_interrupted(&paths).unwrap();
        ServerTls::load(&paths).unwrap();
        finish_interrupted(&paths).unwrap();
    }

    #[test]
    fn an_answer_with_another_key_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), "lab", now()).unwrap();
        let (foo, bar) = (issue(&authority, Role::Agent, "foo"), issue(&authority, Role::Agent, "bar"));
        let before = std::fs::read_to_string(&foo.certificate).unwrap();
        let asking = Asking::make(&paths(&foo)).unwrap();
        let other = std::fs::read_to_string(&bar.certificate).unwrap();
        for answer in [other.as_str(), "", "-----BEGIN CERTIFICATE-----"] {
            let error = asking.put_in_place(answer, &paths(&foo)).unwrap_err().to_string();
            assert!(error.contains("no certificate of the new key"), "{error}");
        }
        assert_eq!(std::fs::read_to_string(&foo.certificate).unwrap(), before);
    }
}
