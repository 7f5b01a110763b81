//! The controller's end of one session's relay: frames of many calls in, calls of the service, frames out.
//!
//! It stamps each call with the task that the agent vouches for and understands no message. Answers of many calls that
//! are ready together share one message. When the link breaks, its calls are dropped as lost with the link, not as given
//! up: the agent sends those without an answer again, with the same numbers. Nothing here waits without a bound but
//! the calls themselves.

use std::{
    collections::HashMap,
    convert::Infallible,
    pin::{Pin, pin},
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame};
use millstream_common::{
    framing::{Deframer, framed},
    id::TaskId,
    limits,
};
use millstream_proto::v1::{self, relay_frame, sync_service_server::SyncServiceServer};
use prost::Message as _;
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Status, codegen::http};
use tower::Service as _;

use super::{
    Speaker,
    host::{Line, SyncHost},
    service::{Caller, Service},
};

/// Messages of one call that wait for its handler. No method of the service takes more than one; a nested one may.
const UNREAD_MESSAGES_COUNT_MAX: usize = 16;
/// Bytes of frames in one outgoing message: with what one more answer adds it stays within a control message.
const BATCH_BYTES_MAX: usize =
    limits::CONTROL_MESSAGE_BYTES_MAX - limits::RELAY_MESSAGE_BYTES_MAX - 64 * 1024;

/// A call as it is begun: its messages so far, and whether more may come.
struct Opening {
    task: TaskId,
    method: String,
    messages: Vec<Bytes>,
    complete: bool,
}

/// A call that runs.
struct Live {
    abort: AbortHandle,
    /// Where further messages go; none once the block has sent all of them.
    messages: Option<mpsc::Sender<Bytes>>,
}

/// What a call wants to send: an answer, its end, or both at once.
struct Outgoing {
    call_id: u64,
    message: Option<Bytes>,
    end: Option<v1::RelayEnd>,
}

/// Serves one link until `inbound` ends.
pub(super) async fn serve(
    host: SyncHost,
    speaks_for: impl Fn(TaskId) -> bool + Send,
    inbound: impl Stream<Item = Vec<v1::RelayFrame>> + Send,
    outbound: mpsc::Sender<Vec<v1::RelayFrame>>,
) {
    let (out, waiting) = mpsc::channel(limits::RELAY_FRAMES_COUNT_MAX);
    let mut link = Link {
        service: Service::new(&host),
        line: Line::default(),
        calls: HashMap::new(),
        running: JoinSet::new(),
        out,
    };
    // The board must not be kept alive by a link that nobody uses any more.
    drop(host);
    let mut inbound = pin!(inbound);
    let mut pump = pin!(pump(waiting, outbound));
    loop {
        tokio::select! {
            frames = inbound.next() => match frames {
                Some(frames) => link.take(frames, &speaks_for).await,
                None => break,
            },
            Some(ended) = link.running.join_next() => link.reap(ended.ok()),
            // The other half is gone: no answer can be told any more.
            () = &mut pump => break,
        }
    }
    link.line.lose();
    link.running.shutdown().await;
}

struct Link {
    service: Service,
    line: Line,
    calls: HashMap<u64, Live>,
    running: JoinSet<u64>,
    out: mpsc::Sender<Outgoing>,
}

impl Link {
    /// Takes in one message of the agent: calls that are complete in it are begun with all they will ever say.
    async fn take(&mut self, frames: Vec<v1::RelayFrame>, speaks_for: &(impl Fn(TaskId) -> bool + Send)) {
        let mut openings: HashMap<u64, Opening> = HashMap::new();
        let mut order = Vec::new();
        for v1::RelayFrame { call_id, frame } in frames {
            match frame {
                Some(relay_frame::Frame::Begin(begin)) => match begin.task_id.parse::<TaskId>() {
                    Ok(task) if speaks_for(task) => {
                        let method = begin.method;
                        order.push(call_id);
                        openings
                            .insert(call_id, Opening { task, method, messages: Vec::new(), complete: false });
                    }
                    _ => {
                        let told =
                            format!("task `{}` is not one of this session", begin.task_id.escape_debug());
                        self.end(call_id, Code::PermissionDenied, told).await;
                    }
                },
                Some(relay_frame::Frame::Message(message)) => match openings.get_mut(&call_id) {
                    Some(opening) => opening.messages.push(message),
                    None => self.pass(call_id, message).await,
                },
                Some(relay_frame::Frame::HalfClose(v1::RelayHalfClose {})) => {
                    match (openings.get_mut(&call_id), self.calls.get_mut(&call_id)) {
                        (Some(opening), _) => opening.complete = true,
                        (None, Some(live)) => live.messages = None,
                        (None, None) => {}
                    }
                }
                Some(relay_frame::Frame::Cancel(v1::RelayCancel {})) => {
                    openings.remove(&call_id);
                    if let Some(live) = self.calls.remove(&call_id) {
                        live.abort.abort();
                    }
                }
                // Ends are told to agents, not by them; a frame of a later version is not for us.
                Some(relay_frame::Frame::End(_)) | None => {}
            }
        }
        for call_id in order {
            if let Some(opening) = openings.remove(&call_id) {
                self.begin(call_id, opening).await;
            }
        }
    }

    async fn begin(&mut self, call_id: u64, opening: Opening) {
        if self.calls.len() >= limits::RELAY_CALLS_COUNT_MAX {
            let told = format!("this session has {} calls already", limits::RELAY_CALLS_COUNT_MAX);
            return self.end(call_id, Code::ResourceExhausted, told).await;
        }
        let (messages, body) = if opening.complete {
            (None, CallBody { ready: opening.messages.into_iter(), more: None })
        } else {
            let (tx, rx) = mpsc::channel(UNREAD_MESSAGES_COUNT_MAX);
            (Some(tx), CallBody { ready: opening.messages.into_iter(), more: Some(rx) })
        };
        let caller = Caller {
            speaker: Speaker::Task(opening.task),
            line: Some(self.line.clone()),
            call_id: Some(call_id),
        };
        let answered = answer(self.service.clone(), caller, opening.method, body, call_id, self.out.clone());
        let abort = self.running.spawn(async move {
            answered.await;
            call_id
        });
        // A second beginning of the same call on the same link takes the place of the first.
        if let Some(older) = self.calls.insert(call_id, Live { abort, messages }) {
            older.abort.abort();
        }
    }

    async fn pass(&mut self, call_id: u64, message: Bytes) {
        let Some(Live { messages: Some(messages), .. }) = self.calls.get(&call_id) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = messages.try_send(message) {
            if let Some(live) = self.calls.remove(&call_id) {
                live.abort.abort();
            }
            let told = format!("more than {UNREAD_MESSAGES_COUNT_MAX} messages of this call are unread");
            self.end(call_id, Code::ResourceExhausted, told).await;
        }
    }

    async fn end(&self, call_id: u64, code: Code, message: String) {
        let end = Some(v1::RelayEnd { code: code as u32, message });
        // Fails only when the link is gone: then there is nobody to tell.
        drop(self.out.send(Outgoing { call_id, message: None, end }).await);
    }

    fn reap(&mut self, ended: Option<u64>) {
        let Some(call_id) = ended else { return };
        // The number may belong to a newer beginning of the same call, which still runs.
        if self.calls.get(&call_id).is_some_and(|live| live.abort.is_finished()) {
            self.calls.remove(&call_id);
        }
    }
}

/// Runs one call to its end.
async fn answer(
    service: Service,
    caller: Caller,
    method: String,
    body: CallBody,
    call_id: u64,
    out: mpsc::Sender<Outgoing>,
) {
    let ended = match Pace::of(&method, &body) {
        Pace::Enter(message) => match enter(&service, &caller, message).await {
            Ok(message) => (Some(message), Status::ok("")),
            Err(status) => (None, status),
        },
        Pace::Any => any_method(service, caller, method, body, call_id, &out).await,
    };
    let (message, status) = ended;
    let end = v1::RelayEnd { code: status.code() as u32, message: status.message().to_owned() };
    // Fails only when the link is gone: then there is nobody to tell.
    drop(out.send(Outgoing { call_id, message, end: Some(end) }).await);
}

/// Which way a call goes.
enum Pace {
    /// The one call that thousands make at the same moment: decoded here, and answered with a list that is encoded once
    /// for all of them.
    Enter(Bytes),
    /// Everything else, through the generated service.
    Any,
}

impl Pace {
    fn of(method: &str, body: &CallBody) -> Self {
        match body.ready.as_slice() {
            [message] if body.more.is_none() && method == ENTER => Self::Enter(message.clone()),
            _ => Self::Any,
        }
    }
}

const ENTER: &str = "/millstream.v1.SyncService/Enter";

async fn enter(service: &Service, caller: &Caller, message: Bytes) -> Result<Bytes, Status> {
    let message = v1::EnterRequest::decode(message)
        .map_err(|error| Status::invalid_argument(format!("the message is no EnterRequest: {error}")))?;
    let (decided, arrival) = service.enter(caller, message).await?;
    Ok(super::service::encoded_release(&decided, arrival))
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
    let request = http::Request::post(method)
        .version(http::Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .extension(caller)
        .body(body);
    let Ok(request) = request else {
        return (None, Status::unimplemented("the name of the method is no path"));
    };
    let mut server = SyncServiceServer::new(service)
        .max_decoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX);
    let Ok(response) = server.call(request).await;
    let (parts, body) = response.into_parts();
    if let Some(status) = Status::from_header_map(&parts.headers) {
        return (None, status);
    }
    let mut body = pin!(body);
    let mut deframer = Deframer::new(limits::RELAY_MESSAGE_BYTES_MAX);
    let mut last: Option<Bytes> = None;
    loop {
        let frame = match next_frame(body.as_mut(), last.is_some()).await {
            Next::Frame(frame) => frame,
            // The end is not there yet: the answer does not wait for it.
            Next::NotYet => {
                let message = last.take();
                if out.send(Outgoing { call_id, message, end: None }).await.is_err() {
                    return (None, Status::unavailable("the link is gone"));
                }
                continue;
            }
            Next::Failed(status) => return (last, status),
            Next::Over => return (last, Status::internal("the service ended a call without a status")),
        };
        match frame.into_data() {
            Ok(data) => deframer.push(data),
            Err(frame) => {
                let status = frame.trailers_ref().and_then(Status::from_header_map);
                let missing = || Status::internal("the service ended a call without a status");
                return (last, status.unwrap_or_else(missing));
            }
        }
        loop {
            match deframer.next_message() {
                Ok(None) => break,
                Ok(Some(message)) => {
                    if let Some(message) = last.replace(message)
                        && out.send(Outgoing { call_id, message: Some(message), end: None }).await.is_err()
                    {
                        return (None, Status::unavailable("the link is gone"));
                    }
                }
                Err(error) => return (last, Status::internal(error.to_string())),
            }
        }
    }
}

enum Next {
    Frame(Frame<Bytes>),
    NotYet,
    Failed(Status),
    Over,
}

/// The next frame of a response. With `hurry`, does not wait for it.
async fn next_frame(mut body: Pin<&mut tonic::body::Body>, hurry: bool) -> Next {
    std::future::poll_fn(|context| match body.as_mut().poll_frame(context) {
        Poll::Ready(Some(Ok(frame))) => Poll::Ready(Next::Frame(frame)),
        Poll::Ready(Some(Err(status))) => Poll::Ready(Next::Failed(status)),
        Poll::Ready(None) => Poll::Ready(Next::Over),
        Poll::Pending if hurry => Poll::Ready(Next::NotYet),
        Poll::Pending => Poll::Pending,
    })
    .await
}

/// Body of a call: what has come with its beginning, then what follows.
struct CallBody {
    ready: std::vec::IntoIter<Bytes>,
    more: Option<mpsc::Receiver<Bytes>>,
}

impl Body for CallBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(message) = self.ready.next() {
            return Poll::Ready(Some(Ok(Frame::data(framed(&message)))));
        }
        match &mut self.more {
            None => Poll::Ready(None),
            Some(more) => more.poll_recv(context).map(|m| m.map(|message| Ok(Frame::data(framed(&message))))),
        }
    }
}

/// Sends what calls have to say, as many as are ready in one message. Returns when the link or all calls are gone.
async fn pump(mut waiting: mpsc::Receiver<Outgoing>, outbound: mpsc::Sender<Vec<v1::RelayFrame>>) {
    let mut ready = Vec::new();
    loop {
        if waiting.recv_many(&mut ready, limits::RELAY_FRAMES_COUNT_MAX).await == 0 {
            return;
        }
        let mut batch = Vec::with_capacity(2 * ready.len());
        let mut size_bytes = 0;
        for Outgoing { call_id, message, end } in ready.drain(..) {
            size_bytes +=
                message.as_ref().map_or(0, Bytes::len) + end.as_ref().map_or(0, |end| end.message.len());
            let frames = [message.map(relay_frame::Frame::Message), end.map(relay_frame::Frame::End)];
            batch.extend(
                frames.into_iter().flatten().map(|frame| v1::RelayFrame { call_id, frame: Some(frame) }),
            );
            if size_bytes > BATCH_BYTES_MAX {
                size_bytes = 0;
                if outbound.send(std::mem::take(&mut batch)).await.is_err() {
                    return;
                }
            }
        }
        if !batch.is_empty() && outbound.send(batch).await.is_err() {
            return;
        }
    }
}
