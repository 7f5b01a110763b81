//! Whom this agent takes by TLS: for those who come, and still for those who are connected.
//!
//! Connections remember the certificates that they were opened with. When the files behind the configuration change, each is
//! looked at again, and those that would not be let in now are ended, with a line in the log for each; so are those whose
//! certificate expires while they are open. What an identity may call is decided by [`super::identity`].

use std::{
    collections::BTreeMap,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwap;
use millstream_common::{
    limits,
    tls::{self, Identity, ServerTls},
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, UnixTime},
};
use tokio::{sync::oneshot, time::sleep};
use tracing::{info, warn};

/// The present configuration, and who is connected.
#[derive(Debug)]
pub struct Admission {
    tls: ArcSwap<ServerTls>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: BTreeMap<u64, OpenConnection>,
}

#[derive(Debug)]
struct OpenConnection {
    peer: String,
    identity: Identity,
    chain: Vec<CertificateDer<'static>>,
    /// Dropped or used: the connection ends.
    end: oneshot::Sender<()>,
}

impl Admission {
    /// Begins with a configuration.
    #[must_use]
    pub fn new(tls: ServerTls) -> Arc<Self> {
        Arc::new(Self { tls: ArcSwap::from_pointee(tls), open: Mutex::default() })
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How those are greeted who come now.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.tls.load().config()
    }

    /// Lets somebody in whose handshake is done, unless the configuration has changed meanwhile so that it would not be.
    ///
    /// # Errors
    /// When these certificates are not taken any more.
    pub(crate) fn admit(
        self: &Arc<Self>,
        peer: String,
        identity: Identity,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<Admitted, rustls::Error> {
        let valid_until = chain.first().and_then(tls::valid_until);
        let (end, ended) = oneshot::channel();
        let admitted = {
            let mut open = self.open();
            let number = open.next;
            open.next += 1;
            let noted =
                OpenConnection { peer: peer.clone(), identity: identity.clone(), chain: chain.clone(), end };
            open.connections.insert(number, noted);
            let admission = Arc::clone(self);
            let ended = async move {
                tokio::select! {
                    // Whoever ends it has said why.
                    _ = ended => {}
                    () = expiry(valid_until) => {
                        info!(%peer, %identity, "connection ended: its certificate has expired");
                    }
                }
            };
            Admitted { admission, number, ended: Some(Box::pin(ended)) }
        };
        // After it was noted, so that a change is seen either here or by whoever brings it.
        self.tls.load().check(&chain)?;
        Ok(admitted)
    }

    /// Uses another configuration from now on, and ends the connections that it would not have let in.
    pub fn replace(&self, fresh: ServerTls) {
        self.tls.store(Arc::new(fresh));
        let tls = self.tls.load();
        let mut open = self.open();
        let refused: Vec<_> = open
            .connections
            .iter()
            .filter_map(|(number, connection)| Some((*number, tls.check(&connection.chain).err()?)))
            .collect();
        for (number, error) in refused {
            let Some(connection) = open.connections.remove(&number) else { continue };
            let OpenConnection { peer, identity, end, .. } = connection;
            warn!(%peer, %identity, reason = %tls::reason(&error), "connection ended: its certificate is not taken any more");
            // It may have ended by itself.
            let _gone: Result<(), ()> = end.send(());
        }
    }
}

/// Waits until a certificate has expired. The clock is asked again and again, because it may be set.
async fn expiry(valid_until: Option<Duration>) {
    let Some(valid_until) = valid_until else { return std::future::pending().await };
    // The second that it names is the last one of its life.
    let dead_at = valid_until.saturating_add(Duration::from_secs(1));
    loop {
        let left = dead_at.saturating_sub(Duration::from_secs(UnixTime::now().as_secs()));
        if left.is_zero() {
            return;
        }
        sleep(left.min(limits::WAIT_MAX)).await;
    }
}

/// Counts as an open connection for as long as it lives.
pub(crate) struct Admitted {
    admission: Arc<Admission>,
    number: u64,
    /// None once it has ended.
    ended: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl fmt::Debug for Admitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admitted").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Admitted {
    /// Ready when the connection must end, and from then on.
    pub(crate) fn poll_ended(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(ended) = &mut self.ended {
            std::task::ready!(ended.as_mut().poll(context));
            self.ended = None;
        }
        Poll::Ready(())
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.admission.open().connections.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, path::Path};

    use millstream_common::{
        clock::World,
        tls::{Role, TlsPaths, client_config},
    };
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        sync::mpsc,
        time::timeout,
    };
    use tokio_rustls::{TlsConnector, client::TlsStream};
    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;
    use crate::{
        door::{
            Listener,
            acceptor::{Connection, Places, accept},
            ledger::Ledger,
        },
        pki::{Authority, Issued, Wanted},
    };

    const PATIENCE: Duration = Duration::from_secs(30);

    fn now() -> u64 {
        World::system().clock.wall_ns()
    }

    fn issue(authority: &Authority, role: Role, name: &str, valid: Duration) -> Issued {
        let hosts = if role == Role::Agent { vec!["localhost".to_owned()] } else { Vec::new() };
        authority.issue(&Wanted { role, name: name.to_owned(), hosts, valid }, now()).unwrap()
    }

    fn paths(issued: &Issued, authority: &Path, revocations: Option<&Path>) -> TlsPaths {
        TlsPaths {
            certificate: issued.certificate.clone(),
            key: issued.key.clone(),
            authority: authority.to_owned(),
            revocations: revocations.map(Path::to_owned),
        }
    }

    struct Bench {
        directory: tempfile::TempDir,
        authority: Authority,
        agent: Issued,
        admission: Arc<Admission>,
        address: std::net::SocketAddr,
        incoming: mpsc::Receiver<Connection>,
        _accepted: mpsc::Sender<Connection>,
    }

    impl Bench {
        async fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let authority = Authority::init(directory.path(), "lab", now()).unwrap();
            let agent = issue(&authority, Role::Agent, "one", Duration::from_secs(3600));
            let tls = paths(&agent, &authority.certificate(), Some(&authority.revocations()));
            let admission = Admission::new(ServerTls::load(&tls).unwrap());
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let listeners = vec![Listener::Tls(listener, Arc::clone(&admission))];
            let (accepted, incoming) = accept(
                listeners,
                &Places::new(),
                &Ledger::of_a_test(),
                &CancellationToken::new(),
                &TaskTracker::new(),
            );
            Self { directory, authority, agent, admission, address, incoming, _accepted: accepted }
        }

        fn reload(&self) {
            let tls = paths(&self.agent, &self.authority.certificate(), Some(&self.authority.revocations()));
            self.admission.replace(ServerTls::load(&tls).unwrap());
        }

        /// Dials with a certificate: the client's end, which has begun HTTP/2.
        async fn dial(&self, issued: &Issued) -> TlsStream<TcpStream> {
            let (config, name) =
                client_config(&paths(issued, &self.authority.certificate(), None), "localhost").unwrap();
            let stream = TcpStream::connect(self.address).await.unwrap();
            let mut stream = TlsConnector::from(config).connect(name, stream).await.unwrap();
            // Refused or not is only learned by reading.
            let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
            let _refused = stream.write_all(&preface).await;
            stream
        }

        async fn connect(&mut self, issued: &Issued) -> (TlsStream<TcpStream>, Connection) {
            let near = self.dial(issued).await;
            let mut far = timeout(PATIENCE, self.incoming.recv()).await.unwrap().unwrap();
            let mut preface = [0; 33];
            far.read_exact(&mut preface).await.unwrap();
            (near, far)
        }
    }

    #[tokio::test]
    async fn a_revoked_certificate_is_refused_and_its_open_connection_ends_while_others_go_on() {
        let mut bench = Bench::new().await;
        let hour = Duration::from_secs(3600);
        let alice = issue(&bench.authority, Role::Controller, "alice", hour);
        let bob = issue(&bench.authority, Role::Controller, "bob", hour);
        let (_near, mut of_alice) = bench.connect(&alice).await;
        let (mut near_bob, mut of_bob) = bench.connect(&bob).await;
        bench.reload();
        assert_eq!(bench.admission.open().connections.len(), 2, "nothing has changed for anybody");
        bench.authority.revoke(std::slice::from_ref(&alice.certificate), now()).unwrap();
        bench.reload();
        let ended = timeout(PATIENCE, of_alice.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(ended.to_string(), "the certificate of this connection is not taken any more");
        near_bob.write_all(b"x").await.unwrap();
        near_bob.flush().await.unwrap();
        assert_eq!(timeout(PATIENCE, of_bob.read_u8()).await.unwrap().unwrap(), b'x');
        let mut refused = bench.dial(&alice).await;
        let error = timeout(PATIENCE, refused.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(
            tls::reason(&error),
            "the agent refused this certificate: it was revoked; issue a new one"
        );
        let again = issue(&bench.authority, Role::Controller, "alice-again", hour);
        bench.connect(&again).await;
        drop((of_alice, of_bob));
        assert_eq!(bench.admission.open().connections.len(), 0);
    }

    #[tokio::test]
    async fn a_new_authority_ends_the_connections_of_the_old_one() {
        let mut bench = Bench::new().await;
        let alice = issue(&bench.authority, Role::Controller, "alice", Duration::from_secs(3600));
        let (_near, mut of_alice) = bench.connect(&alice).await;
        let other = Authority::init(&bench.directory.path().join("other"), "lab", now()).unwrap();
        let agent = issue(&other, Role::Agent, "one", Duration::from_secs(3600));
        let tls = paths(&agent, &other.certificate(), Some(&other.revocations()));
        bench.admission.replace(ServerTls::load(&tls).unwrap());
        assert!(timeout(PATIENCE, of_alice.read_u8()).await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_connection_ends_when_its_certificate_expires() {
        let bench = Bench::new().await;
        let issued = issue(&bench.authority, Role::Controller, "brief", Duration::from_secs(2));
        let pem = std::fs::read(&issued.certificate).unwrap();
        let chain = vec![rustls::pki_types::pem::PemObject::from_pem_slice(&pem).unwrap()];
        let identity = Identity::new(Role::Controller, "brief").unwrap();
        // On a machine so slow that it has expired before, it is refused at once.
        if let Ok(mut admitted) = bench.admission.admit("here".to_owned(), identity.clone(), chain.clone()) {
            timeout(PATIENCE, poll_fn(|context| admitted.poll_ended(context))).await.unwrap();
        }
        let refused = bench.admission.admit("here".to_owned(), identity, chain).unwrap_err();
        let told = tls::reason(&refused);
        assert!(told.starts_with("the other end's certificate has expired: it was valid until "), "{told}");
    }
}
