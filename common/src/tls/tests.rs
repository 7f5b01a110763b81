//! Certificates, identities, handshakes, and what is said of those that fail.

use super::*;

#[test]
fn identities_have_one_spelling() {
    let identity: Identity = "millstream://controller/alice@lab".parse().unwrap();
    assert_eq!(identity, Identity::new(Role::Controller, "alice@lab").unwrap());
    assert_eq!(identity.to_string(), "millstream://controller/alice@lab");
    for text in
        ["millstream://root/x", "millstream://agent/", "millstream://agent/a/b", "http://agent/x", "agent/x"]
    {
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
    let error = io::Error::other(rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRequired));
    assert!(reason(&error).contains("no certificate was shown"), "{}", reason(&error));
}

#[test]
fn system_errors_lose_their_number() {
    assert_eq!(reason(&io::Error::from_raw_os_error(111)), "connection refused");
}

#[test]
fn a_missing_file_is_named_with_the_next_step() {
    let missing = PathBuf::from("/nonexistent/agent.pem");
    let paths = TlsPaths {
        certificate: missing.clone(),
        key: missing.clone(),
        authority: missing,
        revocations: None,
    };
    let error = ServerTls::load(&paths).unwrap_err().to_string();
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
        TlsPaths { certificate, key: key_path, authority: authority.clone(), revocations: None }
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
    let error = ServerTls::load(&agent).unwrap_err().to_string();
    assert!(error.contains("mode 0644") && error.contains("chmod 600"), "{error}");
}

#[test]
fn a_certificate_of_the_wrong_role_is_refused_at_home() {
    let directory = tempfile::tempdir().unwrap();
    let (agent, controller) = pki(directory.path());
    assert!(matches!(ServerTls::load(&controller), Err(TlsError::WrongRole { wanted: Role::Agent, .. })));
    assert!(matches!(client_config(&agent, "localhost"), Err(TlsError::WrongRole { .. })));
}

async fn handshake(server: &TlsPaths, client: &TlsPaths, name: &str) -> Result<Identity, String> {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let acceptor = tokio_rustls::TlsAcceptor::from(ServerTls::load(server).unwrap().config());
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
