//! Who a client says it is whose certificate is refused: TLS forgets it with the handshake, and the log must not.

use std::{cell::RefCell, sync::Arc};

use rustls::{
    DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::{Identity, signatures_as};

tokio::task_local! {
    static PRESENTED: RefCell<Option<String>>;
}

/// Does work that contains a handshake, and tells whom the certificate named that the other end showed in it. Nobody has
/// checked it: it is what somebody says.
pub async fn with_presented<T>(handshake: impl Future<Output = T>) -> (T, Option<String>) {
    let work = async {
        let done = handshake.await;
        (done, PRESENTED.with(RefCell::take))
    };
    PRESENTED.scope(RefCell::default(), work).await
}

/// Verifies as another one does, and notes who came.
#[derive(Debug)]
pub(super) struct Noting(pub(super) Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Noting {
    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let claimed =
            Identity::of_certificate(certificate).map_or_else(|error| error.to_string(), |of| of.to_string());
        // Outside of a handshake that somebody watches nobody wants to know.
        let _unwatched = PRESENTED.try_with(|presented| presented.replace(Some(claimed)));
        self.0.verify_client_cert(certificate, intermediates, now)
    }

    signatures_as!(0);
}
