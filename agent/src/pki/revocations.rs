//! The list of certificates that an authority has revoked.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use millstream_common::{text::hex, tls::Identity};
use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject as _};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};

use super::{AUTHORITY_LIFE, Authority, PkiError, make_failed, read};

/// What the list is called.
const LIST: &str = "list of revoked certificates";

/// A certificate that is revoked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revoked {
    /// Its holder.
    pub holder: String,
    /// Its serial number in hexadecimal digits.
    pub serial: String,
    /// Whether it was on the list before.
    pub already: bool,
}

/// What stands on a list.
#[derive(Debug, Default)]
pub(super) struct Revocations {
    /// Number of the list: each has a higher one.
    number: u64,
    /// Serial numbers with the time since 1970 at which each was revoked.
    serials: BTreeMap<Vec<u8>, Duration>,
}

impl Authority {
    /// Adds certificates to the authority's list; `now_ns` is the time since 1970. None is added when one of them cannot be.
    ///
    /// # Errors
    /// When the authority, its list or a certificate cannot be read, or a certificate is somebody else's.
    pub fn revoke(&self, certificates: &[PathBuf], now_ns: u64) -> Result<Vec<Revoked>, PkiError> {
        let issuer = self.issuer()?;
        let authority = der(&self.certificate())?;
        let (_, authority) =
            X509Certificate::from_der(&authority).map_err(|error| content(&self.certificate(), &error))?;
        let mut list = load(&self.revocations())?;
        let mut revoked = Vec::new();
        for path in certificates {
            let der = der(path)?;
            let (_, certificate) = X509Certificate::from_der(&der).map_err(|error| content(path, &error))?;
            // The name of an authority holds a part of its key's digest.
            if certificate.issuer() != authority.subject() {
                return Err(PkiError::Stranger { path: path.clone(), directory: self.directory.clone() });
            }
            let serial = certificate.raw_serial();
            let at = Duration::from_nanos(now_ns);
            let already = list.serials.contains_key(serial);
            list.serials.entry(serial.to_vec()).or_insert(at);
            let holder = Identity::of_certificate(&der)
                .map_or_else(|_| path.display().to_string(), |identity| identity.to_string());
            revoked.push(Revoked { holder, serial: hex(serial), already });
        }
        list.number += 1;
        replace(&self.revocations(), &sign(&issuer, &list, now_ns)?)?;
        Ok(revoked)
    }
}

fn der(path: &Path) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(read(path)?.as_bytes()).map_err(|error| content(path, &error))
}

fn content(path: &Path, error: &dyn std::fmt::Display) -> PkiError {
    PkiError::Content { what: "certificate", path: path.to_owned(), reason: error.to_string() }
}

/// Reads a list; an authority that was made before there were lists has none.
fn load(path: &Path) -> Result<Revocations, PkiError> {
    if !path.exists() {
        return Ok(Revocations::default());
    }
    let wrong = |error: &dyn std::fmt::Display| PkiError::Content {
        what: LIST,
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let der = CertificateRevocationListDer::from_pem_slice(read(path)?.as_bytes())
        .map_err(|error| wrong(&error))?;
    let (_, parsed) = CertificateRevocationList::from_der(&der).map_err(|error| wrong(&error))?;
    let digits = parsed.crl_number().map(|number| number.to_bytes_be()).unwrap_or_default();
    let number = digits.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let entries = parsed.iter_revoked_certificates().map(|entry| {
        let at = u64::try_from(entry.revocation_date.timestamp()).unwrap_or(0);
        (entry.raw_serial().to_vec(), Duration::from_secs(at))
    });
    Ok(Revocations { number, serials: entries.collect() })
}

/// Makes the list in PEM form.
pub(super) fn sign(
    issuer: &Issuer<'_, KeyPair>,
    list: &Revocations,
    now_ns: u64,
) -> Result<String, PkiError> {
    let at = |since_1970: Duration| date_time_ymd(1970, 1, 1) + Duration::from_secs(since_1970.as_secs());
    let now = Duration::from_nanos(now_ns);
    let entry = |(serial, revoked): (&Vec<u8>, &Duration)| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: at(*revoked),
        reason_code: None,
        invalidity_date: None,
    };
    let params = CertificateRevocationListParams {
        this_update: at(now),
        // Whoever has revoked nothing more has no reason to make another one.
        next_update: at(now + AUTHORITY_LIFE),
        crl_number: SerialNumber::from(list.number),
        issuing_distribution_point: None,
        revoked_certs: list.serials.iter().map(entry).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(issuer).and_then(|list| list.pem()).map_err(make_failed)
}

/// Replaces a file so that a reader finds the old list or the new one.
fn replace(path: &Path, content: &str) -> Result<(), PkiError> {
    let fresh = path.with_extension("pem.new");
    let failed = |source: io::Error| PkiError::File { attempt: "write", path: path.to_owned(), source };
    fs::write(&fresh, content).and_then(|()| fs::rename(&fresh, path)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use millstream_common::{clock::World, tls::Role};

    use super::*;
    use crate::pki::{CERTIFICATE_LIFE, Wanted};

    #[test]
    fn the_list_grows_and_tells_what_was_on_it() {
        let now_ns = World::system().clock.wall_ns();
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), "lab", now_ns).unwrap();
        assert_eq!(load(&authority.revocations()).unwrap().serials.len(), 0);
        let issue = |authority: &Authority, name: &str| {
            let (role, hosts, valid) = (Role::Controller, Vec::new(), CERTIFICATE_LIFE);
            let wanted = Wanted { role, name: name.to_owned(), hosts, valid };
            authority.issue(&wanted, now_ns).unwrap().certificate
        };
        let (alice, bob) = (issue(&authority, "alice"), issue(&authority, "bob"));
        let first = authority.revoke(std::slice::from_ref(&alice), now_ns).unwrap();
        assert_eq!(first[0].holder, "millstream://controller/alice");
        let both = authority.revoke(&[alice, bob.clone()], now_ns + 60_000_000_000).unwrap();
        assert_eq!(both.iter().map(|revoked| revoked.already).collect::<Vec<_>>(), [true, false]);
        let list = load(&authority.revocations()).unwrap();
        assert_eq!((list.number, list.serials.len()), (2, 2));
        let spans: Vec<_> = list.serials.values().map(Duration::as_secs).collect();
        assert_eq!(spans.iter().max().unwrap() - spans.iter().min().unwrap(), 60, "each keeps its time");

        let other = Authority::init(&directory.path().join("other"), "lab", now_ns).unwrap();
        let refused = other.revoke(&[bob, issue(&other, "carol")], now_ns).unwrap_err().to_string();
        assert!(refused.contains("controller-bob.pem` is not from the authority in"), "{refused}");
        assert_eq!(load(&other.revocations()).unwrap().serials.len(), 0, "all or none");
        // An authority of an older version has no list.
        fs::remove_file(other.revocations()).unwrap();
        other.revoke(&[issue(&other, "dave")], now_ns).unwrap();
    }
}
