//! `pki serve`: the authority answers agents that ask for their next certificate. The one thing that it does by itself.
//!
//! Its own certificate is made at each start and never written down. Every call reads the authority's files anew, so that
//! what was revoked a moment ago is not renewed. Callers are strangers until a signature says otherwise: how many are served
//! at once, for how long, and how much they may send is bounded.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use millstream_common::{
    clock::World,
    limits, pipe,
    tls::{self, Identity, Role},
};
use millstream_proto::v1::{
    RenewCertificateRequest, RenewCertificateResponse,
    authority_service_server::{AuthorityService, AuthorityServiceServer},
};
use rcgen::KeyPair;
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::{debug, info, warn};

use super::{Authority, PkiError, Wanted, make_failed, params, renewal::RenewError};

/// Port unless the command line says otherwise.
pub const PORT: u16 = 7434;
/// A request is two keys, a certificate and a signature.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Connections at once, those that have not finished their handshake included: each is one call.
const CONNECTIONS_COUNT_MAX: usize = 64;
/// How long a connection may last.
const CONNECTION_MAX: Duration = Duration::from_secs(30);
/// How long the certificate of this service lives: as long as it may run without being started again.
const OWN_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why the authority cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its files or its own certificate.
    #[error(transparent)]
    Authority(#[from] PkiError),
    /// TLS cannot be set up.
    #[error("failed to set up TLS: {}", tls::reason(source))]
    Tls {
        /// What the library said.
        #[source]
        source: rustls::Error,
    },
    /// The address cannot be bound.
    #[error("failed to listen on {address}: {}; choose another with `--listen`", tls::reason(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Serving ended with an error.
    #[error("failed to serve")]
    Serve(#[source] tonic::transport::Error),
}

/// The service, bound and not serving yet.
#[derive(Debug)]
pub struct AuthorityServer {
    authority: Arc<Authority>,
    listener: TcpListener,
    config: Arc<ServerConfig>,
    world: World,
}

impl AuthorityServer {
    /// Reads the authority, makes the service's own certificate for `hosts`, and binds.
    ///
    /// # Errors
    /// When one of the three fails.
    pub async fn bind(
        directory: &Path,
        address: SocketAddr,
        hosts: Vec<String>,
        world: World,
    ) -> Result<Self, ServeError> {
        let authority = Authority::at(directory);
        let identity = Identity { role: Role::Agent, name: "authority".to_owned() };
        let wanted = Wanted { role: Role::Agent, name: identity.name.clone(), hosts, valid: OWN_LIFE };
        let key = KeyPair::generate().map_err(make_failed)?;
        let made = params(&identity, &wanted, world.clock.wall_ns())?
            .signed_by(&key, &authority.issuer()?)
            .map_err(make_failed)?;
        let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config =
            tls::open_server_config(made.der().clone(), der).map_err(|source| ServeError::Tls { source })?;
        let listener =
            TcpListener::bind(address).await.map_err(|source| ServeError::Bind { address, source })?;
        Ok(Self { authority: Arc::new(authority), listener, config, world })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until told to end.
    ///
    /// # Errors
    /// When serving fails.
    pub async fn serve(self, end: CancellationToken) -> Result<(), ServeError> {
        let service = Service { authority: self.authority, world: self.world };
        let service = AuthorityServiceServer::new(service)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let (greeted, connections) = mpsc::channel(CONNECTIONS_COUNT_MAX);
        let accepting = tokio::spawn(accept(self.listener, self.config, greeted));
        let served = pipe::server()
            .max_connection_age(CONNECTION_MAX)
            .add_service(service)
            .serve_with_incoming_shutdown(
                ReceiverStream::new(connections).map(io::Result::Ok),
                end.cancelled(),
            )
            .await;
        accepting.abort();
        served.map_err(ServeError::Serve)
    }
}

async fn accept(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    greeted: mpsc::Sender<TlsStream<TcpStream>>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_COUNT_MAX));
    let acceptor = TlsAcceptor::from(config);
    loop {
        // Waits for a place before it takes the next one: agents ask again.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                debug!(%error, "cannot accept a connection");
                sleep(limits::ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, greeted) = (acceptor.clone(), greeted.clone());
        tokio::spawn(async move {
            match timeout(limits::HANDSHAKE_MAX, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    // The server has ended; so does the connection.
                    let _ended = greeted.send(stream).await;
                }
                Ok(Err(error)) => debug!(%peer, error = %tls::reason(&error), "peer sent away"),
                Err(_elapsed) => debug!(%peer, "the handshake was not finished in time"),
            }
            drop(place);
        });
    }
}

struct Service {
    authority: Arc<Authority>,
    world: World,
}

#[tonic::async_trait]
impl AuthorityService for Service {
    async fn renew_certificate(
        &self,
        request: Request<RenewCertificateRequest>,
    ) -> Result<Response<RenewCertificateResponse>, Status> {
        let peer = request.remote_addr().map_or_else(|| "unknown".to_owned(), |peer| peer.to_string());
        let (authority, now_ns) = (Arc::clone(&self.authority), self.world.clock.wall_ns());
        let renewing = tokio::task::spawn_blocking(move || authority.renew(request.get_ref(), now_ns)).await;
        match renewing.map_err(|error| Status::internal(error.to_string()))? {
            Ok(renewed) => {
                info!(%peer, holder = renewed.holder, "certificate renewed");
                Ok(Response::new(RenewCertificateResponse { certificate_pem: renewed.pem }))
            }
            Err(error) => {
                warn!(%peer, %error, "certificate not renewed");
                Err(refused(&error))
            }
        }
    }
}

fn refused(error: &RenewError) -> Status {
    use tls::HolderError as Holder;
    let message = error.to_string();
    match error {
        RenewError::Holder { source: Holder::NotTaken { .. } } => Status::permission_denied(message),
        RenewError::Holder { source: Holder::Files(_) } | RenewError::Authority(_) => {
            Status::internal(message)
        }
        RenewError::Holder { source: Holder::Unreadable | Holder::Signature }
        | RenewError::Request { .. } => Status::invalid_argument(message),
    }
}
