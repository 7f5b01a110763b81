//! `NestedService`: the controller's end, for one task at a time. Lists streams and dials their agents; understands nothing
//! of what passes.

use std::{sync::Arc, time::Duration};

use millstream_common::{convert, id::TaskId, limits};
use millstream_proto::v1::{
    self, dial_stream_request, dial_stream_response,
    nested_service_server::{NestedService, NestedServiceServer},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    codegen::{BoxFuture, http},
};
use tower::Service as _;

use super::{
    Gate,
    tunnel::{self, Piece},
};
use crate::{
    reach::Entrusted,
    sync::service::{BlockService, Page},
};

/// What every method of the service begins with.
const PREFIX: &str = "/millstream.v1.NestedService/";

impl BlockService for Gate {
    fn serves(&self, method: &str) -> bool {
        method.starts_with(PREFIX)
    }

    fn call(
        self: Arc<Self>,
        task: TaskId,
        request: http::Request<tonic::body::Body>,
    ) -> BoxFuture<http::Response<tonic::body::Body>, std::convert::Infallible> {
        NestedServiceServer::new(ForTask { gate: self, task })
            .max_decoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX)
            .call(request)
    }
}

/// The service as one task has it.
#[derive(Debug)]
struct ForTask {
    gate: Arc<Gate>,
    task: TaskId,
}

#[tonic::async_trait]
impl NestedService for ForTask {
    async fn list_streams(
        &self,
        request: Request<v1::ListStreamsRequest>,
    ) -> Result<Response<v1::ListStreamsResponse>, Status> {
        let mut page = Page::new(request.into_inner().from_index);
        let streams = self.gate.list(self.task, &mut page)?;
        Ok(Response::new(v1::ListStreamsResponse { streams, next_index: page.next_index() }))
    }

    async fn entrust_session(
        &self,
        request: Request<v1::EntrustSessionRequest>,
    ) -> Result<Response<v1::EntrustSessionResponse>, Status> {
        let v1::EntrustSessionRequest { stream, session_id, secret, lease_duration, over } =
            request.into_inner();
        let invalid = |error: convert::ConvertError| Status::invalid_argument(error.to_string());
        let session_id = convert::id_in("session_id", &session_id).map_err(invalid)?;
        let lease = lease_duration.and_then(|lease| Duration::try_from(lease).ok()).unwrap_or(limits::LEASE);
        self.gate.entrust(self.task, &stream, Entrusted { session_id, secret, lease, over })?;
        Ok(Response::new(v1::EntrustSessionResponse {}))
    }

    type DialStreamStream =
        std::pin::Pin<Box<dyn Stream<Item = Result<v1::DialStreamResponse, Status>> + Send>>;

    async fn dial_stream(
        &self,
        request: Request<Streaming<v1::DialStreamRequest>>,
    ) -> Result<Response<Self::DialStreamStream>, Status> {
        let mut inbound = request.into_inner();
        let begin = inbound.message().await?.and_then(|request| request.piece);
        let Some(dial_stream_request::Piece::Stream(name)) = begin else {
            return Err(Status::invalid_argument("stream: the first request says which one"));
        };
        let reach = self.gate.reach(self.task, &name)?;
        let pipe = reach.dial().await.map_err(|error| {
            let told = error.to_string();
            if error.is_final() { Status::failed_precondition(told) } else { Status::unavailable(told) }
        })?;
        let (outbound, pieces) = mpsc::channel(tunnel::OUTBOUND_COUNT_MAX);
        // What is no piece ends the pipe, as the end of the call does.
        let inbound = inbound.map_while(|request| match request.ok()?.piece? {
            dial_stream_request::Piece::Data(data) => Some(Piece::Data(data)),
            dial_stream_request::Piece::TakenCount(count) => Some(Piece::Taken(count)),
            dial_stream_request::Piece::Stream(_) => None,
        });
        // Lives as long as the answers are wanted, which is as long as the call.
        let gone = outbound.clone();
        drop(tokio::spawn(async move {
            tokio::select! {
                () = tunnel::run(pipe, inbound, outbound) => {}
                () = gone.closed() => {}
            }
        }));
        let opened = tokio_stream::once(dial_stream_response::Piece::Opened(true));
        let pieces = ReceiverStream::new(pieces).map(|piece| match piece {
            Piece::Data(data) => dial_stream_response::Piece::Data(data),
            Piece::Taken(count) => dial_stream_response::Piece::TakenCount(count),
        });
        let answers = opened.chain(pieces).map(|piece| Ok(v1::DialStreamResponse { piece: Some(piece) }));
        Ok(Response::new(Box::pin(answers)))
    }
}
