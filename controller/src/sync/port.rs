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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use millstream_common::{clock::World, id::BarrierName};
    use millstream_proto::v1::{self, sync_service_client::SyncServiceClient};
    use tokio::runtime::Handle;
    use tonic_reflection::pb::{v1 as reflection, v1alpha as reflection_alpha};

    use super::*;

    #[tokio::test]
    async fn only_loopback_addresses_are_listened_on() {
        let host = SyncHost::new(World::system(), &Handle::current());
        let refused = host.listen("0.0.0.0:0".parse().unwrap()).await.unwrap_err();
        assert!(matches!(refused, ListenError::NotLoopback { .. }));
    }

    #[tokio::test]
    async fn a_person_looks_takes_part_and_is_marked() {
        let host = SyncHost::new(World::system(), &Handle::current());
        let bound = host.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let mut person = SyncServiceClient::connect(format!("http://{bound}")).await.unwrap();
        let name = BarrierName::new("setup").unwrap();
        let main = host.enter_as_main(name, 2, Duration::from_secs(60), bytes::Bytes::new());
        let by_hand = async {
            let hold = v1::HoldRequest { name: "setup".into(), release: false };
            person.hold(hold.clone()).await.unwrap();
            let mut entering = person.clone();
            let enter = v1::EnterRequest { name: "setup".into(), parties: 2, ..Default::default() };
            let entered = tokio::spawn(async move { entering.enter(enter).await });
            loop {
                let listed =
                    person.list_barriers(v1::ListBarriersRequest::default()).await.unwrap().into_inner();
                if listed.barriers[0].arrivals.len() == 2 {
                    assert_eq!(listed.barriers[0].state, "held");
                    break;
                }
            }
            person.hold(v1::HoldRequest { release: true, ..hold }).await.unwrap();
            entered.await.unwrap().unwrap().into_inner()
        };
        let (main, by_hand) = tokio::join!(main, by_hand);
        assert_eq!(main.unwrap().generation, by_hand.generation);
        let records = host.records();
        assert!(records.barriers[0].waits.iter().any(|wait| wait.by_hand && wait.party == "by hand"));
        assert_eq!(records.barriers[0].by_hand[0], "held");
    }

    #[tokio::test]
    async fn both_versions_of_reflection_list_the_sync_service_alone() {
        let host = SyncHost::new(World::system(), &Handle::current());
        let bound = host.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let channel = tonic::transport::Endpoint::try_from(format!("http://{bound}")).unwrap();
        let channel = channel.connect().await.unwrap();

        use reflection::server_reflection_request::MessageRequest;
        let ask = reflection::ServerReflectionRequest {
            message_request: Some(MessageRequest::ListServices(String::new())),
            ..Default::default()
        };
        let mut client = reflection::server_reflection_client::ServerReflectionClient::new(channel.clone());
        let mut answers = client.server_reflection_info(tokio_stream::once(ask)).await.unwrap().into_inner();
        let told = format!("{:?}", answers.message().await.unwrap());
        assert!(told.contains("millstream.v1.SyncService") && !told.contains("AgentService"), "{told}");

        use reflection_alpha::server_reflection_request::MessageRequest as AlphaRequest;
        let ask = reflection_alpha::ServerReflectionRequest {
            message_request: Some(AlphaRequest::FileContainingSymbol("millstream.v1.SyncService".into())),
            ..Default::default()
        };
        let mut client = reflection_alpha::server_reflection_client::ServerReflectionClient::new(channel);
        let mut answers = client.server_reflection_info(tokio_stream::once(ask)).await.unwrap().into_inner();
        let answer = answers.message().await.unwrap().unwrap();
        let described = format!("{answer:?}");
        assert!(described.contains("FileDescriptorResponse"), "{described:.200}");
    }
}
