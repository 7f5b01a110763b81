//! A byte pipe that gRPC can be served on and dialled through, and the HTTP/2 settings of both ends.
//!
//! Everything above a pipe is the same for a local child, a TLS socket and the standard streams of a remote command. This
//! page must not know which of them it holds, and dials nothing itself. The library's defaults are not safe (no limit of
//! streams, resets or silent peers), so nobody builds a server or a channel but through [`server`] and
//! [`endpoint_channel`].

use std::{
    error::Error,
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Channel, Endpoint, Server, Uri};

use crate::{limits, tls};

/// Bytes both ways: all that gRPC needs from the place it runs over.
pub trait BytePipe: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> BytePipe for T {}

/// A byte pipe whose kind no longer matters.
pub type BoxedPipe = Box<dyn BytePipe>;

/// Why no channel came to be.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The pipe itself could not be had.
    #[error("failed to reach the agent: {}", tls::reason(source))]
    Dial {
        /// What the system or the TLS layer said.
        #[source]
        source: io::Error,
    },
    /// The pipe is there, but HTTP/2 did not begin on it.
    #[error("failed to begin HTTP/2 with the agent: {}", tls::reason(source))]
    Begin {
        /// What the transport said.
        #[source]
        source: tonic::transport::Error,
    },
}

/// A dial that was used up: one channel is one pipe, and a lost pipe is for the link above to replace, with its own
/// pauses and its own resumption. Otherwise the library would dial for ever behind everybody's back.
#[derive(Debug, thiserror::Error)]
#[error("{}", why.as_deref().unwrap_or("the connection is gone"))]
struct UsedUp {
    /// What the pipe said when it broke.
    why: Option<String>,
}

/// The last words of a pipe. The library drops them when a pipe breaks before the first answer, which is when they matter:
/// an agent that refuses a certificate says so there.
#[derive(Debug, Clone, Default)]
struct LastWords(Arc<Mutex<Option<String>>>);

impl LastWords {
    fn hear(&self, error: &io::Error) {
        let mut words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A write may fail before the reason has been read: what TLS says later is worth more.
        if words.is_none() || error.get_ref().is_some() {
            *words = Some(tls::reason(error));
        }
    }

    fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A pipe whose last words are heard.
struct Heard {
    pipe: BoxedPipe,
    words: LastWords,
}

impl Heard {
    fn hear<T>(&self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &result {
            self.words.hear(error);
        }
        result
    }
}

impl AsyncRead for Heard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.pipe).poll_read(context, buffer);
        self.hear(result)
    }
}

impl AsyncWrite for Heard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.pipe).poll_write(context, bytes);
        self.hear(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.pipe).poll_flush(context);
        self.hear(result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.pipe).poll_write_vectored(context, slices);
        self.hear(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.pipe.is_write_vectored()
    }
}

/// Makes a channel over the one pipe that `dial` gives, with this system's HTTP/2 settings. When that pipe ends, calls
/// fail as unavailable and the channel never dials again.
///
/// # Errors
/// When the dial fails or HTTP/2 does not begin.
///
/// # Cancel safety
/// Dropping the future drops the pipe.
pub async fn endpoint_channel<D, F>(dial: D) -> Result<Channel, ConnectError>
where
    D: FnOnce() -> F,
    F: Future<Output = io::Result<BoxedPipe>>,
{
    // Dialled here and not inside the connector: the caller learns the real error, not one that was wrapped three times.
    let pipe = dial().await.map_err(|source| ConnectError::Dial { source })?;
    let words = LastWords::default();
    let once = Arc::new(Mutex::new(Some(Heard { pipe, words: words.clone() })));
    let connector = tower::service_fn(move |_: Uri| {
        let pipe = once.lock().unwrap_or_else(PoisonError::into_inner).take();
        let why = words.get();
        async move {
            pipe.map(TokioIo::new).ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, UsedUp { why }))
        }
    });
    endpoint().connect_with_connector(connector).await.map_err(|source| ConnectError::Begin { source })
}

fn endpoint() -> Endpoint {
    // The name is never resolved; it becomes the `:authority` of every call.
    Endpoint::from_static("http://localhost")
        .initial_stream_window_size(limits::HTTP2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::HTTP2_CONNECTION_WINDOW_BYTES)
        .max_frame_size(limits::HTTP2_FRAME_BYTES)
        .http2_max_header_list_size(limits::HTTP2_HEADERS_BYTES_MAX)
        .http2_max_local_error_reset_streams(limits::HTTP2_LOCAL_RESETS_MAX)
        // The adaptive window overrides the two above and is slower.
        .http2_adaptive_window(false)
        .http2_keep_alive_interval(limits::KEEPALIVE)
        .keep_alive_timeout(limits::KEEPALIVE)
        .keep_alive_while_idle(true)
}

/// A server with every limit that the library leaves open: calls at once, resets in both directions, headers, silent
/// peers. Handshakes, prefaces and the number of connections are the acceptor's; messages are each service's.
///
/// Connections have no greatest age: a test may take days, and connections whose certificate was replaced or revoked are
/// ended by whoever learns of it.
#[must_use]
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(limits::HTTP2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::HTTP2_CONNECTION_WINDOW_BYTES)
        .max_frame_size(limits::HTTP2_FRAME_BYTES)
        .max_concurrent_streams(limits::HTTP2_CALLS_MAX)
        .http2_max_header_list_size(limits::HTTP2_HEADERS_BYTES_MAX)
        .http2_max_local_error_reset_streams(Some(limits::HTTP2_LOCAL_RESETS_MAX))
        .http2_max_pending_accept_reset_streams(Some(limits::HTTP2_PENDING_RESETS_MAX))
        .http2_adaptive_window(Some(false))
        .http2_keepalive_interval(Some(limits::KEEPALIVE))
        .http2_keepalive_timeout(Some(limits::KEEPALIVE))
}

/// What a failed call is about, for people: the innermost cause, in words where it is one that this system knows. A
/// certificate that the agent refuses shows only at the first call, and only there.
#[must_use]
pub fn call_failure(status: &tonic::Status) -> String {
    match status.source() {
        // A status that the peer sent has no source: its message is all there is.
        None => status.message().to_owned(),
        Some(source) => tls::reason(source),
    }
}

/// Whether a failed call never got an answer of the peer: the transport gave up, not a handler.
#[must_use]
pub fn is_transport_failure(status: &tonic::Status) -> bool {
    status.source().is_some()
}

/// The innermost cause of an error that is worth showing, with the ones that wrap it left out.
pub(crate) fn innermost<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut cause = error;
    while let Some(next) = deeper(cause) {
        cause = next;
    }
    cause
}

/// One step towards the cause. `io::Error` hides what it carries: its `source()` skips the error that was put in.
pub(crate) fn deeper<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    if let Some(carried) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        return Some(carried);
    }
    error.source()
}

impl fmt::Debug for dyn BytePipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BytePipe")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dial_that_fails_is_told_as_it_failed() {
        let refused = || async { Err(io::Error::from(io::ErrorKind::ConnectionRefused)) };
        let error = endpoint_channel(refused).await.unwrap_err();
        assert_eq!(error.to_string(), "failed to reach the agent: connection refused");
    }

    #[tokio::test]
    async fn a_lost_pipe_is_not_dialled_again() {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let channel = endpoint_channel(|| async { Ok(Box::new(near) as BoxedPipe) }).await.unwrap();
        drop(far);
        let mut client = tonic::client::Grpc::new(channel);
        for _ in 0..2 {
            let Err(error) = client.ready().await else { continue };
            let reason = tls::reason(&error);
            assert!(reason.contains("the connection is gone") || reason.contains("closed"), "{reason}");
        }
    }

    #[test]
    fn what_an_io_error_carries_is_found() {
        let error = io::Error::other(io::Error::other(UsedUp { why: None }));
        assert_eq!(innermost(&error).to_string(), "the connection is gone");
    }
}
