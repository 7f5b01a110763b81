//! Lets connections in: TCP with TLS, TCP on loopback, Unix sockets. Everything that an unknown peer can do is bounded here.
//!
//! A peer that is silent, slow or speaks something else is gone within seconds, whatever it holds of the handshake; only
//! connections that have begun HTTP/2 are handed on. What they may call is decided by [`super::identity`].

mod reasons;

use std::{
    collections::HashMap,
    fmt,
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use millstream_common::{
    limits,
    pipe::BoxedPipe,
    tls::{self, Identity},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::server::Connected;
use tracing::{debug, info, warn};

use self::reasons::GreetError;
use super::{
    admission::{Admission, Admitted},
    identity::{Caller, Peer},
    ledger::Ledger,
};

/// What a client of HTTP/2 sends before anything else.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The head of the SETTINGS frame that must follow it.
const FRAME_HEAD_BYTES: usize = 9;
/// Number of that kind of frame.
const SETTINGS: u8 = 4;
/// How long a peer that was refused may take to read why.
const GOODBYE_MAX: Duration = Duration::from_millis(500);
/// Connections that have come through and wait to be served: handing on is immediate, so few are enough.
const ACCEPTED_COUNT_MAX: usize = 64;

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// TCP with TLS. Whom it takes may change at any time, for open connections too.
    Tls(TcpListener, Arc<Admission>),
    /// TCP without TLS: on loopback only, which the configuration has made sure of.
    Loopback(TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

/// A connection that has begun HTTP/2, with what is known about its other end.
pub struct Connection {
    io: Io,
    /// Read already, to see whether it is HTTP/2.
    head: Bytes,
    peer: Peer,
    /// Ends the connection when its certificate is not taken any more.
    admitted: Option<Admitted>,
    /// Counts the connection for as long as it lives.
    _place: Option<Place>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Connection {
    /// A connection that was made elsewhere: a pair of pipes, a simulated network.
    #[must_use]
    pub fn from_pipe(pipe: BoxedPipe, caller: Caller) -> Self {
        let peer = Peer { caller, address: None };
        Self { io: Io::Pipe(pipe), head: Bytes::new(), peer, admitted: None, _place: None }
    }
}

enum Io {
    Tls(Box<TlsStream<TcpStream>>),
    Tcp(TcpStream),
    Unix(UnixStream),
    Pipe(BoxedPipe),
}

macro_rules! each_io {
    ($self:ident, $io:ident => $call:expr) => {
        match &mut $self.io {
            Io::Tls($io) => $call,
            Io::Tcp($io) => $call,
            Io::Unix($io) => $call,
            Io::Pipe($io) => $call,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Whoever serves a connection always reads from it, so that this is enough to end it.
        if self.admitted.as_mut().is_some_and(|admitted| admitted.poll_ended(context).is_ready()) {
            let why = "the certificate of this connection is not taken any more";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::PermissionDenied, why)));
        }
        if !self.head.is_empty() {
            let length = self.head.len().min(buffer.remaining());
            buffer.put_slice(&self.head[..length]);
            self.head.advance(length);
            return Poll::Ready(Ok(()));
        }
        each_io!(self, io => Pin::new(io).poll_read(context, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        each_io!(self, io => Pin::new(io).poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each_io!(self, io => Pin::new(io).poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each_io!(self, io => Pin::new(io).poll_shutdown(context))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each_io!(self, io => Pin::new(io).poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Tls(io) => io.is_write_vectored(),
            Io::Tcp(io) => io.is_write_vectored(),
            Io::Unix(io) => io.is_write_vectored(),
            Io::Pipe(io) => io.is_write_vectored(),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

/// The places that connections take.
#[derive(Debug)]
pub(crate) struct Places {
    all: Arc<Semaphore>,
    /// How many of these are taken, for who waits until none is.
    taken: watch::Sender<usize>,
    /// Those that have not finished their handshake.
    greeting: Arc<Semaphore>,
    by_address: Mutex<HashMap<IpAddr, AddressUse>>,
}

#[derive(Debug, Default, Clone, Copy)]
struct AddressUse {
    connections: usize,
    greeting: usize,
}

/// One place, given back when dropped.
#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    address: Option<IpAddr>,
    greeting: Option<OwnedSemaphorePermit>,
    _one: OwnedSemaphorePermit,
}

impl Places {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            all: Arc::new(Semaphore::new(limits::CONNECTIONS_COUNT_MAX)),
            taken: watch::Sender::new(0),
            greeting: Arc::new(Semaphore::new(limits::HANDSHAKES_COUNT_MAX)),
            by_address: Mutex::default(),
        })
    }

    /// How many connections there are, now and later.
    pub(crate) fn taken(&self) -> watch::Receiver<usize> {
        self.taken.subscribe()
    }

    /// Takes a place, or tells which limit was reached.
    fn take(self: &Arc<Self>, address: Option<IpAddr>) -> Result<Place, &'static str> {
        let one = Arc::clone(&self.all).try_acquire_owned().map_err(|_| "too many connections")?;
        let greeting =
            Arc::clone(&self.greeting).try_acquire_owned().map_err(|_| "too many unfinished handshakes")?;
        if let Some(address) = address {
            let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
            let used = by_address.entry(address).or_default();
            if used.connections >= limits::CONNECTIONS_PER_ADDRESS_MAX {
                return Err("too many connections from this address");
            }
            // One address must not keep all others out by being slow.
            if used.greeting >= limits::HANDSHAKES_PER_ADDRESS_MAX {
                return Err("too many unfinished handshakes from this address");
            }
            used.connections += 1;
            used.greeting += 1;
        }
        self.taken.send_modify(|count| *count += 1);
        Ok(Place { places: Arc::clone(self), address, greeting: Some(greeting), _one: one })
    }

    fn give_back(&self, address: IpAddr, change: impl FnOnce(&mut AddressUse)) {
        let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(used) = by_address.get_mut(&address) {
            change(used);
            if used.connections == 0 {
                by_address.remove(&address);
            }
        }
    }
}

impl Place {
    /// The handshake is done: only the connection itself counts from now on.
    fn greeted(&mut self) {
        if self.greeting.take().is_some()
            && let Some(address) = self.address
        {
            self.places.give_back(address, |used| used.greeting -= 1);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.greeted();
        self.places.taken.send_modify(|count| *count -= 1);
        if let Some(address) = self.address {
            self.places.give_back(address, |used| used.connections -= 1);
        }
    }
}

/// Accepts on all listeners until `stop` is cancelled; connections that have begun HTTP/2 come out of the channel. Also
/// returns the channel's other end, for connections that are made elsewhere.
pub(crate) fn accept(
    listeners: Vec<Listener>,
    places: &Arc<Places>,
    ledger: &Arc<Ledger>,
    stop: &CancellationToken,
    tracker: &TaskTracker,
) -> (mpsc::Sender<Connection>, mpsc::Receiver<Connection>) {
    let (accepted, incoming) = mpsc::channel(ACCEPTED_COUNT_MAX);
    for listener in listeners {
        let acceptor = Acceptor {
            places: Arc::clone(places),
            ledger: Arc::clone(ledger),
            accepted: accepted.clone(),
            stop: stop.clone(),
        };
        tracker.spawn(acceptor.run(listener));
    }
    (accepted, incoming)
}

struct Acceptor {
    places: Arc<Places>,
    /// Where those are put on record that are sent away.
    ledger: Arc<Ledger>,
    accepted: mpsc::Sender<Connection>,
    stop: CancellationToken,
}

/// A socket that was accepted.
enum Socket {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Socket {
    fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(_, address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

impl Acceptor {
    async fn run(self, listener: Listener) {
        let mut pausing = false;
        loop {
            let socket = tokio::select! {
                () = self.stop.cancelled() => return,
                socket = accept_one(&listener) => socket,
            };
            match socket {
                Ok(socket) => {
                    if std::mem::take(&mut pausing) {
                        info!("accepting connections again");
                    }
                    self.greet(socket, &listener);
                }
                // The peer went away between its arrival and our turn.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                // No descriptors or no memory: asking again at once would spin. One line is enough until it is over.
                Err(error) => {
                    if !std::mem::replace(&mut pausing, true) {
                        warn!(error = %tls::reason(&error), "cannot accept connections: pausing between attempts");
                    }
                    sleep(limits::ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Greets a peer in a task of its own: one that is slow must not hold up the others.
    fn greet(&self, socket: Socket, listener: &Listener) {
        let address = socket.address();
        let place = match self.places.take(address.map(|address| address.ip())) {
            Ok(place) => place,
            Err(limit) => {
                let error = GreetError::TooMany { limit };
                self.ledger.peer_refused(address, None, error.word(), &error, error.next_step());
                return;
            }
        };
        let tls = match listener {
            Listener::Tls(_, admission) => Some(Arc::clone(admission)),
            Listener::Loopback(_) | Listener::Unix(_) => None,
        };
        let (ledger, accepted, stop) = (Arc::clone(&self.ledger), self.accepted.clone(), self.stop.clone());
        tokio::spawn(async move {
            let greeted = tokio::select! {
                () = stop.cancelled() => return,
                greeted = tls::with_presented(timeout(limits::HANDSHAKE_MAX, greet(socket, tls, place))) => greeted,
            };
            let (greeted, claims) = greeted;
            match greeted.unwrap_or(Err(GreetError::TooSlow)) {
                Ok(connection) => {
                    debug!(peer = connection.peer.place(), caller = %connection.peer.caller, "connected");
                    // The server has ended; so does the connection.
                    let _ended = accepted.send(connection).await;
                }
                // What looks whether a port is open does this all day.
                Err(GreetError::Gone) => debug!(?address, "peer went away without a word"),
                Err(error) => {
                    let next = error.next_step();
                    ledger.peer_refused(address, claims.as_deref(), error.word(), &error, next);
                }
            }
        });
    }
}

async fn accept_one(listener: &Listener) -> io::Result<Socket> {
    match listener {
        Listener::Tls(listener, _) | Listener::Loopback(listener) => {
            let (stream, address) = listener.accept().await?;
            Ok(Socket::Tcp(stream, address))
        }
        Listener::Unix(listener) => Ok(Socket::Unix(listener.accept().await?.0)),
    }
}

async fn greet(
    socket: Socket,
    tls: Option<Arc<Admission>>,
    mut place: Place,
) -> Result<Connection, GreetError> {
    let mut admitted = None;
    let address = socket.address();
    let (mut io, caller) = match (socket, tls) {
        (Socket::Tcp(stream, address), Some(admission)) => {
            set_options(&stream).map_err(GreetError::Broken)?;
            let stream = match TlsAcceptor::from(admission.config()).accept(stream).into_fallible().await {
                Ok(stream) => stream,
                Err((source, stream)) => {
                    say_goodbye(stream).await;
                    return Err(GreetError::Tls { source });
                }
            };
            let chain = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
            let identity =
                chain.first().ok_or(tls::IdentityError::Missing).and_then(Identity::of_certificate);
            let identity = identity.map_err(|source| GreetError::Identity { source })?;
            let admission = admission.admit(address.to_string(), identity.clone(), chain);
            admitted = Some(admission.map_err(|source| GreetError::NotTaken { source })?);
            (Io::Tls(Box::new(stream)), Caller::Certified(identity))
        }
        (Socket::Tcp(stream, _), None) => {
            set_options(&stream).map_err(GreetError::Broken)?;
            (Io::Tcp(stream), Caller::Loopback)
        }
        (Socket::Unix(stream), _) => {
            let uid = stream.peer_cred().map_err(GreetError::NoCredentials)?.uid();
            (Io::Unix(stream), Caller::Local { uid })
        }
    };
    let head = match &mut io {
        Io::Tls(io) => preface(io).await?,
        Io::Tcp(io) => preface(io).await?,
        Io::Unix(io) => preface(io).await?,
        Io::Pipe(io) => preface(io).await?,
    };
    place.greeted();
    Ok(Connection { io, head, peer: Peer { caller, address }, admitted, _place: Some(place) })
}

/// Lets the peer read why it was refused: a socket that is closed with unread bytes in it takes back what it has sent.
async fn say_goodbye(mut stream: TcpStream) {
    let mut unread = [0; 1024];
    let drained = async {
        stream.shutdown().await?;
        while stream.read(&mut unread).await? > 0 {}
        io::Result::Ok(())
    };
    // It was sent away in any case; a peer that keeps sending does not keep its place for long.
    let _why_it_ended = timeout(GOODBYE_MAX, drained).await;
}

fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let milliseconds = u32::try_from(limits::TCP_SILENCE_MAX.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, milliseconds)?;
    Ok(())
}

/// Reads until it is certain that the peer speaks HTTP/2: its preface and the head of its SETTINGS frame. The first byte
/// that differs ends it.
async fn preface(io: &mut (impl AsyncRead + Unpin)) -> Result<Bytes, GreetError> {
    let mut head = BytesMut::with_capacity(PREFACE.len() + FRAME_HEAD_BYTES);
    while head.len() < PREFACE.len() + FRAME_HEAD_BYTES {
        let missing = PREFACE.len() + FRAME_HEAD_BYTES - head.len();
        let mut limited = (&mut *io).take(u64::try_from(missing).unwrap_or(u64::MAX));
        if limited.read_buf(&mut head).await.map_err(GreetError::Broken)? == 0 {
            return Err(if head.is_empty() { GreetError::Gone } else { GreetError::NotHttp2 });
        }
        let known = head.len().min(PREFACE.len());
        if head[..known] != PREFACE[..known] {
            return Err(GreetError::NotHttp2);
        }
    }
    if head[PREFACE.len() + 3] != SETTINGS {
        return Err(GreetError::NotHttp2);
    }
    Ok(head.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        address: SocketAddr,
        _accepted: mpsc::Sender<Connection>,
        incoming: mpsc::Receiver<Connection>,
        stop: CancellationToken,
    }

    async fn bench() -> Bench {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let (accepted, incoming) = accept(
            vec![Listener::Loopback(listener)],
            &Places::new(),
            &Ledger::of_a_test(),
            &stop,
            &TaskTracker::new(),
        );
        Bench { address, _accepted: accepted, incoming, stop }
    }

    #[tokio::test]
    async fn http2_comes_through_with_every_byte() {
        let mut bench = bench().await;
        let mut peer = TcpStream::connect(bench.address).await.unwrap();
        let peer_address = Some(peer.local_addr().unwrap());
        let sent = [PREFACE, &[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0], b"more"].concat();
        for piece in sent.chunks(5) {
            peer.write_all(piece).await.unwrap();
        }
        let mut connection = bench.incoming.recv().await.unwrap();
        let peer = connection.connect_info();
        assert_eq!((peer.caller, peer.address), (Caller::Loopback, peer_address));
        let mut got = vec![0; sent.len()];
        connection.read_exact(&mut got).await.unwrap();
        assert_eq!(got, sent);
        bench.stop.cancel();
    }

    #[tokio::test]
    async fn garbage_is_cut_off_at_its_first_wrong_byte() {
        let bench = bench().await;
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/1"] {
            let mut peer = TcpStream::connect(bench.address).await.unwrap();
            peer.write_all(garbage).await.unwrap();
            let mut rest = Vec::new();
            // Either way of closing is fine, but it is closed.
            assert!(matches!(peer.read_to_end(&mut rest).await, Ok(0) | Err(_)));
        }
    }

    #[tokio::test]
    async fn a_silent_peer_is_gone_within_the_handshakes_time() {
        let bench = bench().await;
        let mut peer = TcpStream::connect(bench.address).await.unwrap();
        let mut rest = Vec::new();
        let ended = timeout(limits::HANDSHAKE_MAX * 2, peer.read_to_end(&mut rest)).await;
        assert_eq!(ended.unwrap().unwrap(), 0);
    }

    #[test]
    fn places_are_given_back() {
        let places = Places::new();
        let address = Some(IpAddr::from([127, 0, 0, 1]));
        let mut held: Vec<_> =
            (0..limits::HANDSHAKES_PER_ADDRESS_MAX).map(|_| places.take(address).unwrap()).collect();
        assert_eq!(places.take(address).unwrap_err(), "too many unfinished handshakes from this address");
        assert!(places.take(Some(IpAddr::from([127, 0, 0, 2]))).is_ok());
        held[0].greeted();
        assert!(places.take(address).is_ok());
        held.clear();
        assert!(places.by_address.lock().unwrap().is_empty());
        assert_eq!(places.all.available_permits(), limits::CONNECTIONS_COUNT_MAX);
    }
}
