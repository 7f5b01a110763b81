//! TLS errors and errors of the system in words: what they mean, and what to do.

use std::error::Error;

use rustls::pki_types::UnixTime;

use crate::{convert, pipe};

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
            Bad::Expired => "the other end's certificate has expired: issue a new one".to_owned(),
            Bad::ExpiredContext { time, not_after } => format!(
                "the other end's certificate has expired: it was valid until {}, and the clock here says {}; issue a new one",
                clock(*not_after),
                clock(*time)
            ),
            Bad::NotValidYet => "the other end's certificate is not valid yet: check both clocks".to_owned(),
            Bad::NotValidYetContext { time, not_before } => format!(
                "the other end's certificate is not valid yet: it is valid from {}, and the clock here says {}; set the clock that \
                 is wrong",
                clock(*not_before),
                clock(*time)
            ),
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

fn clock(time: UnixTime) -> String {
    convert::timestamp(time.as_secs().saturating_mul(1_000_000_000)).to_string()
}

/// Whether a [`reason`] says that the agent refused who asked, by a certificate or by the lack of one. Nothing but the text
/// of an alert comes through HTTP/2; so its words are compared here, beside the sentences that have them.
#[must_use]
pub fn is_refusal_of_the_agent(reason: &str) -> bool {
    reason.starts_with(REFUSED_BY_THE_AGENT)
}

/// How every sentence begins that tells of such a refusal.
const REFUSED_BY_THE_AGENT: &str = "the agent refused";

/// What the alerts mean that a refused certificate causes. The other end is always the agent: agents dial nobody.
fn alert_reason(alert: &str) -> Option<&'static str> {
    Some(match alert.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default() {
        "UnknownCA" => {
            "the agent refused this certificate: unknown CA; use one of the authority that the agent trusts"
        }
        "CertificateRequired" | "NoCertificate" => {
            "the agent refused the connection: no certificate was shown; give one with role controller or operator"
        }
        "CertificateExpired" => {
            "the agent refused this certificate: by its clock it has expired or is not valid yet; look at it with \
             `millstream-agent pki show`, issue a new one, or set the clock that is wrong"
        }
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
    fn a_certificate_out_of_its_time_is_told_with_both_times() {
        use std::time::Duration;
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let told = |bad| reason(&rustls::Error::InvalidCertificate(bad));
        use rustls::CertificateError::{ExpiredContext, NotValidYetContext};
        assert_eq!(
            told(ExpiredContext { time: at(1_790_000_000), not_after: at(1_780_000_000) }),
            "the other end's certificate has expired: it was valid until 2026-05-28T20:26:40Z, and the clock here says \
             2026-09-21T14:13:20Z; issue a new one"
        );
        assert_eq!(
            told(NotValidYetContext { time: at(1_000), not_before: at(1_780_000_000) }),
            "the other end's certificate is not valid yet: it is valid from 2026-05-28T20:26:40Z, and the clock here says \
             1970-01-01T00:16:40Z; set the clock that is wrong"
        );
    }

    #[test]
    fn an_alert_about_a_certificate_is_a_refusal_and_no_other_one_is() {
        let told = |alert: &str| is_refusal_of_the_agent(alert_reason(alert).unwrap());
        for refusal in [
            "UnknownCA",
            "CertificateRequired",
            "NoCertificate",
            "CertificateExpired",
            "CertificateRevoked",
            "UnsupportedCertificate",
            "BadCertificate",
            "CertificateUnknown",
            "AccessDenied",
            "DecryptError",
        ] {
            assert!(told(refusal), "{refusal}");
        }
        for other in ["ProtocolVersion", "NoApplicationProtocol", "UnrecognisedName"] {
            assert!(!told(other), "{other}");
        }
    }
}
