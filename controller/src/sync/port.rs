//! The debugging port: the sync service on a loopback address, so that a person can look at a stuck test, and take part
//! in it, with `grpcurl`.
//!
//! Whatever comes through here is marked "by hand". There is no authentication, hence loopback only: whoever may open a
//! connection on this host's loopback may touch the test.

use std::{io, net::SocketAddr};

use millstream_proto::{FILE_DESCRIPTOR_SET, v1::sync_service_server::SyncServiceServer};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tracing::{debug, info};

use super::{
    Speaker,
    host::SyncHost,
    service::{Caller, Service},
};

/// Why the debugging port is not open.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Others could reach it.
    #[error(
        "the sync service listens on loopback addresses only, not on {address}: use 127.0.0.1:0 or [::1]:0"
    )]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// The system said no.
    #[error("failed to listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Our own description of the service cannot be served.
    #[error("failed to describe the service for reflection")]
    Describe {
        /// What is wrong with it.
        #[source]
        source: tonic_reflection::server::Error,
    },
}

/// Opens the port on the current runtime.
pub(super) async fn listen(host: &SyncHost, address: SocketAddr) -> Result<SocketAddr, ListenError> {
    if !address.ip().is_loopback() {
        return Err(ListenError::NotLoopback { address });
    }
    let refused = |source| ListenError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;

    let described = |source| ListenError::Describe { source };
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // The agent's services are in the same description, but not here.
            .with_service_name("millstream.v1.SyncService")
            .with_service_name("grpc.health.v1.Health")
    };
    // Released versions of grpcurl still ask in v1alpha.
    let reflection = describe().build_v1().map_err(described)?;
    let reflection_alpha = describe().build_v1alpha().map_err(described)?;
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<SyncServiceServer<Service>>().await;

    let by_hand = |mut request: tonic::Request<()>| {
        request.extensions_mut().insert(Caller { speaker: Speaker::ByHand, line: None, call_id: None });
        Ok(request)
    };
    let service = SyncServiceServer::with_interceptor(Service::new(host), by_hand);
    let over = host.over();
    let serve = millstream_common::pipe::server()
        .add_service(service)
        .add_service(reflection)
        .add_service(reflection_alpha)
        .add_service(health)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), over.cancelled_owned());
    // Ends with the host; nobody waits for it.
    drop(tokio::spawn(async move {
        if let Err(error) = serve.await {
            debug!(%error, %bound, "debugging port ended");
        }
    }));
    info!(%bound, "debugging port open: everything done there is marked by hand");
    Ok(bound)
}
