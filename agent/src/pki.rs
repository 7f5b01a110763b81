//! A private certificate authority and certificates with roles, in one command each.
//!
//! Files are made for their owner alone and nothing is ever overwritten but the list of revoked certificates, which grows. What
//! a role may do is not decided here; but a
//! certificate of an agent can only be a server, and the others only clients, so that one stolen from a host opens no other.

pub mod renewal;
mod revocations;
pub mod serve;

use std::{
    fmt::{self, Write as _},
    fs,
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use millstream_common::{
    text::{hex, printable},
    tls::{self, Identity, IdentityError, Role},
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use self::revocations::Revocations;
pub use self::revocations::Revoked;
use crate::door::status::clock_text;

/// How long an authority lives.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long a certificate lives unless another span is asked for.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// Clocks of hosts differ: a certificate is valid from a little before it was made.
pub(crate) const CLOCKS_DIFFER: Duration = Duration::from_secs(300);
/// The authority's files.
const AUTHORITY_CERTIFICATE: &str = "ca.pem";
const AUTHORITY_KEY: &str = "ca.key";
const AUTHORITY_REVOCATIONS: &str = "revoked.pem";

/// Why nothing was made or shown. Each names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// There is something already.
    #[error("`{}` exists and is not overwritten: choose another directory or name, or remove it yourself", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("failed to {attempt} `{}`: {}{}", path.display(), tls::reason(source), no_authority(path, source))]
    File {
        /// What was attempted.
        attempt: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file holds something else.
    #[error("`{}` holds no {what}: {reason}", path.display())]
    Content {
        /// What was looked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A certificate cannot be made.
    #[error("failed to make the certificate: {source}")]
    Make {
        /// What the library said.
        #[source]
        source: rcgen::Error,
    },
    /// A certificate of somebody else.
    #[error("`{}` is not from the authority in `{}`: name the directory of its own authority with `--dir`", path.display(), directory.display())]
    Stranger {
        /// The certificate.
        path: PathBuf,
        /// Where the authority is.
        directory: PathBuf,
    },
    /// A name that cannot stand in a certificate.
    #[error("`{}` cannot be the name in a certificate: {source}", printable(name.as_bytes(), 128))]
    Name {
        /// The name.
        name: String,
        /// Why not.
        #[source]
        source: IdentityError,
    },
    /// An agent without a host.
    #[error(
        "a certificate for an agent needs the name or address by which controllers dial it: add `--address HOST`, once for each"
    )]
    NoHost,
    /// A client with a host.
    #[error("`--address` is for agents: a {role} is never dialled")]
    HostOfClient {
        /// The role.
        role: Role,
    },
    /// A host that is none.
    #[error("`{}` is neither a host name nor an address", printable(host.as_bytes(), 256))]
    Host {
        /// The text.
        host: String,
    },
}

fn no_authority(path: &Path, source: &io::Error) -> &'static str {
    let is_authority = path.ends_with(AUTHORITY_CERTIFICATE) || path.ends_with(AUTHORITY_KEY);
    if is_authority && source.kind() == io::ErrorKind::NotFound {
        "; make an authority with `millstream-agent pki init --dir DIR` first"
    } else {
        ""
    }
}

/// What a certificate is wanted for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The role of its holder.
    pub role: Role,
    /// The name of its holder.
    pub name: String,
    /// Names and addresses by which an agent is dialled.
    pub hosts: Vec<String>,
    /// How long it lives.
    pub valid: Duration,
}

/// A certificate that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authority's certificate, for the other end.
    pub authority: PathBuf,
}

/// A directory with an authority.
#[derive(Debug)]
pub struct Authority {
    directory: PathBuf,
}

impl Authority {
    /// Takes the authority in a directory.
    #[must_use]
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Makes an authority; `name` is for people, `now_ns` is the time since 1970.
    ///
    /// # Errors
    /// When there is one already, or its files cannot be made.
    pub fn init(directory: &Path, name: &str, now_ns: u64) -> Result<Self, PkiError> {
        let authority = Self::at(directory);
        // Looked at first, so that a refusal leaves no half of an authority behind.
        for path in [authority.certificate(), authority.key(), authority.revocations()] {
            if path.exists() {
                return Err(PkiError::Exists { path });
            }
        }
        fs::create_dir_all(directory).map_err(|source| PkiError::File {
            attempt: "make the directory",
            path: directory.to_owned(),
            source,
        })?;
        let key = KeyPair::generate().map_err(make_failed)?;
        let mut wanted = CertificateParams::new(Vec::new()).map_err(make_failed)?;
        // Part of the key's digest: two authorities of one name could not be told apart otherwise.
        let mark = hex(&Sha256::digest(key.public_key_raw())[..4]);
        let name = printable(name.as_bytes(), 64);
        wanted.distinguished_name.push(DnType::CommonName, format!("Millstream authority {name} {mark}"));
        wanted.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        wanted.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_life(&mut wanted, now_ns, AUTHORITY_LIFE);
        let certificate = wanted.self_signed(&key).map_err(make_failed)?;
        create(&authority.key(), key.serialize_pem().as_bytes(), 0o600)?;
        create(&authority.certificate(), certificate.pem().as_bytes(), 0o644)?;
        // Agents can be told of it from the first day on.
        let none = revocations::sign(&authority.issuer()?, &Revocations::default(), now_ns)?;
        create(&authority.revocations(), none.as_bytes(), 0o644)?;
        Ok(authority)
    }

    /// The authority's certificate: every end needs it.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.directory.join(AUTHORITY_CERTIFICATE)
    }

    /// The authority's private key: no end needs it.
    #[must_use]
    pub fn key(&self) -> PathBuf {
        self.directory.join(AUTHORITY_KEY)
    }

    /// The list of certificates that the authority has revoked: every agent needs it, or a newer one.
    #[must_use]
    pub fn revocations(&self) -> PathBuf {
        self.directory.join(AUTHORITY_REVOCATIONS)
    }

    /// Makes a certificate and its key in the authority's directory.
    ///
    /// # Errors
    /// When the authority cannot be read, the names are wrong, or the files are there already.
    pub fn issue(&self, wanted: &Wanted, now_ns: u64) -> Result<Issued, PkiError> {
        let identity = Identity::new(wanted.role, wanted.name.clone())
            .map_err(|source| PkiError::Name { name: wanted.name.clone(), source })?;
        let base = format!("{}-{}", wanted.role, wanted.name);
        let issued = Issued {
            certificate: self.directory.join(format!("{base}.pem")),
            key: self.directory.join(format!("{base}.key")),
            authority: self.certificate(),
        };
        for path in [&issued.certificate, &issued.key] {
            if path.exists() {
                return Err(PkiError::Exists { path: path.clone() });
            }
        }
        let issuer = self.issuer()?;
        let key = KeyPair::generate().map_err(make_failed)?;
        let certificate = params(&identity, wanted, now_ns)?.signed_by(&key, &issuer).map_err(make_failed)?;
        create(&issued.key, key.serialize_pem().as_bytes(), 0o600)?;
        create(&issued.certificate, certificate.pem().as_bytes(), 0o644)?;
        Ok(issued)
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, PkiError> {
        let (certificate, key) = (self.certificate(), self.key());
        let certificate_pem = read(&certificate)?;
        let key_pem = read(&key)?;
        let content = |what, path: PathBuf| {
            move |error: rcgen::Error| PkiError::Content { what, path, reason: error.to_string() }
        };
        let signing = KeyPair::from_pem(&key_pem).map_err(content("private key", key))?;
        Issuer::from_ca_cert_pem(&certificate_pem, signing).map_err(content("certificate", certificate))
    }
}

fn make_failed(source: rcgen::Error) -> PkiError {
    PkiError::Make { source }
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::File {
        attempt: "read",
        path: path.to_owned(),
        source,
    })
}

/// Makes a file that is not there yet.
fn create(path: &Path, content: &[u8], mode: u32) -> Result<(), PkiError> {
    let made = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = made.and_then(|mut file| file.write_all(content));
    written.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists { path: path.to_owned() },
        _ => PkiError::File { attempt: "write", path: path.to_owned(), source },
    })
}

fn set_life(params: &mut CertificateParams, now_ns: u64, life: Duration) {
    let epoch = date_time_ymd(1970, 1, 1);
    let now = Duration::from_secs(now_ns / 1_000_000_000);
    params.not_before = epoch + now.saturating_sub(CLOCKS_DIFFER);
    params.not_after = epoch + now + life;
}

fn params(identity: &Identity, wanted: &Wanted, now_ns: u64) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::new(Vec::new()).map_err(make_failed)?;
    params.distinguished_name.push(DnType::CommonName, format!("{} {}", identity.role, identity.name));
    let uri = identity.to_string().try_into().map_err(make_failed)?;
    params.subject_alt_names.push(SanType::URI(uri));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.is_ca = IsCa::ExplicitNoCa;
    match identity.role {
        Role::Agent => {
            if wanted.hosts.is_empty() {
                return Err(PkiError::NoHost);
            }
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            for host in &wanted.hosts {
                params.subject_alt_names.push(host_name(host)?);
            }
        }
        Role::Controller | Role::Operator => {
            if !wanted.hosts.is_empty() {
                return Err(PkiError::HostOfClient { role: identity.role });
            }
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        }
    }
    set_life(&mut params, now_ns, wanted.valid);
    Ok(params)
}

fn host_name(host: &str) -> Result<SanType, PkiError> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let wrong = || PkiError::Host { host: host.to_owned() };
    rustls::pki_types::DnsName::try_from(host).map_err(|_| wrong())?;
    Ok(SanType::DnsName(host.try_into().map_err(|_| wrong())?))
}

/// What is to be known of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    path: PathBuf,
    lines: Vec<(&'static str, String)>,
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.path.display())?;
        for (name, value) in &self.lines {
            writeln!(f, "  {name:<12} {value}")?;
        }
        Ok(())
    }
}

/// Describes the first certificate in a file, as of `now_ns`.
///
/// # Errors
/// When the file cannot be read or holds none.
pub fn show(path: &Path, now_ns: u64) -> Result<Shown, PkiError> {
    let pem = read(path)?;
    let content = |reason: String| PkiError::Content { what: "certificate", path: path.to_owned(), reason };
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| content(error.to_string()))?;
    let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| content(error.to_string()))?;
    let identity = match Identity::of_certificate(&der) {
        Ok(identity) => identity.to_string(),
        Err(_) if parsed.is_ca() => "authority".to_owned(),
        Err(error) => error.to_string(),
    };
    let safe = |text: String| printable(text.as_bytes(), 256);
    let lines = vec![
        ("identity", identity),
        ("hosts", hosts(&parsed)),
        ("usable as", usable_as(&parsed)),
        ("valid", validity(&parsed, now_ns)),
        ("subject", safe(parsed.subject().to_string())),
        ("issuer", safe(parsed.issuer().to_string())),
        ("serial", parsed.raw_serial_as_string()),
        ("sha256", hex(&Sha256::digest(&der))),
    ];
    let lines = lines.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    Ok(Shown { path: path.to_owned(), lines })
}

fn hosts(certificate: &X509Certificate<'_>) -> String {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return String::new() };
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(printable(name.as_bytes(), 256)),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(host).collect::<Vec<_>>().join(", ")
}

fn usable_as(certificate: &X509Certificate<'_>) -> String {
    if certificate.is_ca() {
        return "authority".to_owned();
    }
    let Ok(Some(usage)) = certificate.extended_key_usage() else { return String::new() };
    let mut text = String::new();
    for (is, word) in [(usage.value.server_auth, "server"), (usage.value.client_auth, "client")] {
        if is {
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{comma}{word}");
        }
    }
    text
}

fn validity(certificate: &X509Certificate<'_>, now_ns: u64) -> String {
    let seconds = |at: i64| u64::try_from(at).unwrap_or(0);
    let from = seconds(certificate.validity().not_before.timestamp());
    let until = seconds(certificate.validity().not_after.timestamp());
    let now = now_ns / 1_000_000_000;
    let days = |span: u64| span / (24 * 3600);
    let word = if now < from {
        "not valid yet".to_owned()
    } else if now > until {
        format!("EXPIRED {} days ago", days(now - until))
    } else {
        format!("{} days left", days(until - now))
    };
    let text = |at: u64| clock_text(at.saturating_mul(1_000_000_000));
    format!("{} to {} ({word})", text(from), text(until))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use millstream_common::{
        clock::World,
        tls::{ServerTls, TlsPaths},
    };

    use super::*;

    fn now() -> u64 {
        World::system().clock.wall_ns()
    }

    fn wanted(role: Role, hosts: &[&str]) -> Wanted {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        Wanted { role, name: "x".to_owned(), hosts, valid: CERTIFICATE_LIFE }
    }

    fn authority() -> (tempfile::TempDir, Authority) {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), "lab", now()).unwrap();
        (directory, authority)
    }

    fn paths(issued: Issued) -> TlsPaths {
        let Issued { certificate, key, authority } = issued;
        TlsPaths { certificate, key, authority, revocations: None }
    }

    #[test]
    fn what_is_issued_can_be_used_at_its_own_end_only() {
        let (_directory, authority) = authority();
        let at = now();
        let agent = paths(authority.issue(&wanted(Role::Agent, &["localhost", "10.0.0.1"]), at).unwrap());
        let controller = paths(authority.issue(&wanted(Role::Controller, &[]), at).unwrap());
        assert!(ServerTls::load(&agent).is_ok() && tls::client_config(&controller, "10.0.0.1").is_ok());
        assert!(ServerTls::load(&controller).is_err() && tls::client_config(&agent, "localhost").is_err());
        let shown = show(&agent.certificate, at).unwrap().to_string();
        for part in [
            "millstream://agent/x",
            "localhost, 10.0.0.1",
            "server\n",
            "(90 days left)",
            "Millstream authority lab",
        ] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
        assert!(show(&controller.certificate, at).unwrap().to_string().contains("client\n"));
        let later = at + 100 * 24 * 3600 * 1_000_000_000;
        assert!(show(&agent.certificate, later).unwrap().to_string().contains("EXPIRED 10 days ago"));
    }

    #[test]
    fn nothing_is_overwritten_and_keys_are_private() {
        let (directory, authority) = authority();
        let issued = authority.issue(&wanted(Role::Operator, &[]), now()).unwrap();
        for key in [&authority.key(), &issued.key] {
            assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let before = fs::read(&issued.key).unwrap();
        let again = authority.issue(&wanted(Role::Operator, &[]), now()).unwrap_err();
        assert!(again.to_string().contains("exists and is not overwritten"), "{again}");
        assert!(matches!(Authority::init(directory.path(), "lab", now()), Err(PkiError::Exists { .. })));
        assert_eq!(fs::read(&issued.key).unwrap(), before);
    }

    #[test]
    fn what_is_wrong_is_told_with_the_next_step() {
        let (_directory, authority) = authority();
        let error = |wanted: &Wanted| authority.issue(wanted, now()).unwrap_err().to_string();
        assert!(error(&wanted(Role::Agent, &[])).contains("`--address HOST`"));
        assert!(error(&wanted(Role::Controller, &["h"])).contains("is for agents"));
        assert!(error(&wanted(Role::Agent, &["a b"])).contains("neither a host name nor an address"));
        let slash = Wanted { name: "a/b".to_owned(), ..wanted(Role::Operator, &[]) };
        assert!(error(&slash).contains("letters, digits"));
        let empty = tempfile::tempdir().unwrap();
        let none = Authority::at(empty.path()).issue(&wanted(Role::Operator, &[]), now()).unwrap_err();
        assert!(none.to_string().contains("pki init"), "{none}");
    }
}
