//! One task's socket: accepts connections of its blocks and makes each HTTP/2 request a call.
//!
//! Knows nothing of links. Whoever can open the file is the task; its mode keeps everybody else out.

use std::{convert::Infallible, sync::Arc};

use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use millstream_common::{id::TaskId, limits};
use tokio::{net::UnixListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::codegen::http;
use tracing::debug;

use super::{Shared, call};

/// Serves a socket until it is closed; then its connections end.
pub(super) async fn serve(
    shared: Arc<Shared>,
    task: TaskId,
    listener: UnixListener,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        let full = connections.len() >= limits::RELAY_CONNECTIONS_COUNT_MAX;
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if !full => match accepted {
                Ok((stream, _)) => {
                    let shared = shared.clone();
                    connections.spawn(async move { converse(shared, task, stream).await });
                }
                Err(error) => {
                    debug!(%task, %error, "accepting on the socket of a task rests");
                    tokio::time::sleep(limits::ACCEPT_PAUSE).await;
                }
            },
        }
    }
    connections.shutdown().await;
}

async fn converse(shared: Arc<Shared>, task: TaskId, stream: tokio::net::UnixStream) {
    let service = service_fn(move |request: http::Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(call::run(shared, task, request).await) }
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(limits::HTTP2_CALLS_MAX)
        .max_header_list_size(limits::HTTP2_HEADERS_BYTES_MAX)
        .max_local_error_reset_streams(limits::HTTP2_LOCAL_RESETS_MAX)
        .max_frame_size(limits::HTTP2_FRAME_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        debug!(%task, %error, "a connection of a block ended");
    }
}
