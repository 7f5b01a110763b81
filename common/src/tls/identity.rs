//! Who holds a certificate: the identities in certificates.

use std::{fmt, str::FromStr, time::Duration};

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

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

/// From when and until when a certificate is valid, since 1970; none when it cannot be read.
#[must_use]
pub fn life(certificate: &CertificateDer<'_>) -> Option<(Duration, Duration)> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let since_1970 = |at: i64| u64::try_from(at).ok().map(Duration::from_secs);
    let validity = parsed.validity();
    Some((since_1970(validity.not_before.timestamp())?, since_1970(validity.not_after.timestamp())?))
}

/// Until when a certificate is valid, since 1970; none when it cannot be read.
#[must_use]
pub fn valid_until(certificate: &CertificateDer<'_>) -> Option<Duration> {
    life(certificate).map(|(_, until)| until)
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
