//! One call of a block as the service sees it: a request as if it had come over HTTP/2, and its answers as frames.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame};
use millstream_common::{
    framing::body::{Messages, Piece, ReadError, message_frame},
    limits,
};
use millstream_proto::v1::{self, sync_service_server::SyncServiceServer};
use tokio::sync::mpsc;
use tonic::{Status, codegen::http};
use tower::Service as _;

use super::Outgoing;
use crate::sync::{
    Speaker,
    service::{Caller, Service},
};

/// Runs one call to its end.
pub(super) async fn answer(
    service: Service,
    caller: Caller,
    method: String,
    body: CallBody,
    call_id: u64,
    out: mpsc::Sender<Outgoing>,
) {
    let (message, status) = any_method(service, caller, method, body, call_id, &out).await;
    let end = v1::RelayEnd { code: status.code() as u32, message: status.message().to_owned() };
    // Fails only when the link is gone: then there is nobody to tell.
    drop(out.send(Outgoing { call_id, message, end: Some(end) }).await);
}

/// Calls the service as if the request had come over HTTP/2. Gives the last answer, not sent yet, and the status.
async fn any_method(
    service: Service,
    caller: Caller,
    method: String,
    body: CallBody,
    call_id: u64,
    out: &mpsc::Sender<Outgoing>,
) -> (Option<Bytes>, Status) {
    let beside = service.upgrade().and_then(|host| host.beside(&method));
    let speaker = caller.speaker;
    let request = http::Request::post(method)
        .version(http::Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .extension(caller)
        .body(tonic::body::Body::new(body));
    let Ok(request) = request else {
        return (None, Status::unimplemented("the name of the method is no path"));
    };
    let answered = match (beside, speaker) {
        (Some(beside), Speaker::Task(task)) => beside.call(task, request).await,
        _ => {
            SyncServiceServer::new(service)
                .max_decoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX)
                .max_encoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX)
                .call(request)
                .await
        }
    };
    let Ok(response) = answered;
    let (parts, body) = response.into_parts();
    if let Some(status) = Status::from_header_map(&parts.headers) {
        return (None, status);
    }
    let mut body = Messages::new(body, limits::RELAY_MESSAGE_BYTES_MAX);
    let mut last: Option<Bytes> = None;
    loop {
        let hurry = last.is_some();
        let piece = std::future::poll_fn(|context| match body.poll_next(context) {
            // The end is not there yet: the answer does not wait for it.
            Poll::Pending if hurry => Poll::Ready(None),
            polled => polled.map(Some),
        });
        let ready = match piece.await {
            None => last.take(),
            Some(Ok(Piece::Message(message))) => last.replace(message),
            Some(Ok(Piece::Trailers(trailers))) => {
                return (last, Status::from_header_map(&trailers).unwrap_or_else(without_status));
            }
            Some(Ok(Piece::End)) => return (last, without_status()),
            Some(Err(ReadError::Broken(status))) => return (last, status),
            Some(Err(error)) => return (last, Status::internal(error.to_string())),
        };
        if let Some(message) = ready
            && out.send(Outgoing { call_id, message: Some(message), end: None }).await.is_err()
        {
            return (None, Status::unavailable("the link is gone"));
        }
    }
}

fn without_status() -> Status {
    Status::internal("the service ended a call without a status")
}

/// Body of a call: what has come with its beginning, then what follows.
pub(super) struct CallBody {
    ready: std::vec::IntoIter<Bytes>,
    more: Option<mpsc::Receiver<Bytes>>,
}

impl CallBody {
    /// What has come, and where the rest will come from, if there is more.
    pub(super) fn new(ready: Vec<Bytes>, more: Option<mpsc::Receiver<Bytes>>) -> Self {
        Self { ready: ready.into_iter(), more }
    }
}

impl Body for CallBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(message) = self.ready.next() {
            return Poll::Ready(Some(Ok(message_frame(&message))));
        }
        match &mut self.more {
            None => Poll::Ready(None),
            Some(more) => more.poll_recv(context).map(|m| m.map(|message| Ok(message_frame(&message)))),
        }
    }
}
