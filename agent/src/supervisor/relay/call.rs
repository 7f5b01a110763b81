//! One call of a block: its request is cut into messages and sent on, its answers are framed again.
//!
//! Until the first answer the messages are kept, so that the call can be said again on the next link. The future or the
//! body being dropped is the block giving up, and the controller is told.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http_body::{Body, Frame};
use hyper::body::Incoming;
use millstream_common::{
    framing::body::{Messages, Piece, ReadError, end_frame, message_frame},
    id::TaskId,
    limits,
};
use millstream_proto::v1::{self, relay_frame};
use tonic::{Status, codegen::http};

use super::{Link, Shared, controller_gone};

/// Messages of one call that are kept for a repeat; no method of the sync service takes more than one.
const KEPT_MESSAGES_COUNT_MAX: usize = 64;

/// What the controller has said to a call, until the block takes it.
#[derive(Debug)]
pub(super) struct Call {
    id: u64,
    inner: Mutex<Answers>,
}

#[derive(Debug, Default)]
struct Answers {
    unread: VecDeque<Bytes>,
    unread_bytes: usize,
    /// Whether anything has been said: then the call cannot be said again.
    any: bool,
    end: Option<Status>,
    waker: Option<Waker>,
}

/// What a block is to be given next.
enum Answer {
    Message(Bytes),
    End(Status),
}

impl Call {
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a message. False when the block reads too slowly for it: then the call is over.
    pub(super) fn answered(&self, message: Bytes, kept_bytes: &AtomicUsize) -> bool {
        let mut answers = self.answers();
        answers.any = true;
        if answers.end.is_some() {
            return true;
        }
        let fits = answers.unread_bytes + message.len() <= limits::RELAY_UNREAD_BYTES_MAX
            && kept_bytes.load(Ordering::Relaxed) + message.len() <= limits::RELAY_KEPT_BYTES_MAX;
        if fits {
            kept_bytes.fetch_add(message.len(), Ordering::Relaxed);
            answers.unread_bytes += message.len();
            answers.unread.push_back(message);
        } else {
            answers.end = Some(Status::unavailable(
                "answers of this call came faster than the block reads: call again from where it stopped",
            ));
        }
        answers.wake();
        fits
    }

    pub(super) fn ended(&self, status: Status) {
        let mut answers = self.answers();
        answers.end.get_or_insert(status);
        answers.wake();
    }

    /// A call that was answered in part cannot go on elsewhere; any other looks at the link again.
    pub(super) fn link_changed(&self) {
        let mut answers = self.answers();
        if answers.any {
            answers.end.get_or_insert_with(|| {
                Status::unavailable(
                    "the controller's connection broke in the middle of the answers: call again from where it stopped",
                )
            });
        }
        answers.wake();
    }

    /// The next answer. None: not yet, and the link has changed or will wake the caller when it does.
    fn poll_answer(&self, context: &mut Context<'_>, shared: &Shared) -> Option<Answer> {
        let mut answers = self.answers();
        if let Some(message) = answers.unread.pop_front() {
            answers.unread_bytes -= message.len();
            shared.kept_bytes.fetch_sub(message.len(), Ordering::Relaxed);
            return Some(Answer::Message(message));
        }
        if let Some(status) = &answers.end {
            return Some(Answer::End(status.clone()));
        }
        match &answers.waker {
            Some(waker) if waker.will_wake(context.waker()) => {}
            _ => answers.waker = Some(context.waker().clone()),
        }
        // Looked at after the waker is in place: a change in between is not missed.
        (shared.link.get() == Link::Gone).then(|| Answer::End(controller_gone()))
    }
}

impl Answers {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// A call's place among the others. Dropped before the end was told, it tells the controller that the block gave up.
struct Seat {
    shared: Arc<Shared>,
    call: Arc<Call>,
    over: bool,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.calls().remove(&self.call.id);
        let unread_bytes = std::mem::take(&mut self.call.answers().unread_bytes);
        self.shared.kept_bytes.fetch_sub(unread_bytes, Ordering::Relaxed);
        if !self.over {
            self.shared.cancel(self.call.id);
        }
    }
}

/// Runs one request of a block. Returns with the first answer; the body goes on with the others.
pub(super) async fn run(
    shared: Arc<Shared>,
    task: TaskId,
    request: http::Request<Incoming>,
) -> http::Response<AnswerBody> {
    let content_type = request.headers().get("content-type").map(http::HeaderValue::as_bytes);
    if request.method() != http::Method::POST
        || !content_type.is_some_and(|value| value.starts_with(b"application/grpc"))
    {
        let mut response = http::Response::new(AnswerBody::empty());
        *response.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return response;
    }
    let method = request.uri().path().to_owned();
    let call = Arc::new(Call {
        id: shared.next_call_id.fetch_add(1, Ordering::Relaxed),
        inner: Mutex::new(Answers::default()),
    });
    {
        let mut calls = shared.calls();
        if calls.len() >= limits::RELAY_CALLS_COUNT_MAX {
            drop(calls);
            return refused(&Status::resource_exhausted(format!(
                "the blocks of this session make {} calls already: no more are taken at once",
                limits::RELAY_CALLS_COUNT_MAX
            )));
        }
        calls.insert(call.id, call.clone());
    }
    let seat = Seat { shared, call, over: false };
    let mut asking = Asking {
        task,
        method,
        body: Messages::new(request.into_body(), limits::RELAY_MESSAGE_BYTES_MAX),
        kept: Kept { shared: seat.shared.clone(), messages: Vec::new(), size_bytes: 0 },
        half_closed: false,
        said: Said::default(),
    };
    match asking.first_answer(&seat).await {
        Ok(message) => {
            let Asking { body, half_closed, .. } = asking;
            if !half_closed {
                // Ends with the request's body, which ends with the call.
                drop(tokio::spawn(pass_on(seat.shared.clone(), seat.call.clone(), body)));
            }
            response(AnswerBody { seat: Some(seat), first: Some(message) })
        }
        Err(status) => {
            let mut seat = seat;
            // Told by the controller, or the controller never heard of the call on a link that is there.
            seat.over = seat.call.answers().end.is_some();
            refused(&status)
        }
    }
}

/// How much of a call the current link has heard.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    link: Option<u64>,
    messages: usize,
    half_close: bool,
}

/// A call before its first answer.
struct Asking {
    task: TaskId,
    method: String,
    body: Messages<Incoming>,
    kept: Kept,
    half_closed: bool,
    said: Said,
}

/// Messages that are kept for a repeat, and their share of what a session may keep.
struct Kept {
    shared: Arc<Shared>,
    messages: Vec<Bytes>,
    size_bytes: usize,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.shared.kept_bytes.fetch_sub(self.size_bytes, Ordering::Relaxed);
    }
}

enum Step {
    Body(Result<Piece, ReadError<hyper::Error>>),
    Say(u64),
    Answer(Answer),
}

impl Asking {
    /// Says the call, again on each new link, until the first answer or the end without one.
    async fn first_answer(&mut self, seat: &Seat) -> Result<Bytes, Status> {
        loop {
            let step = std::future::poll_fn(|context| {
                // The body first: a call that is complete is said in one go.
                if !self.half_closed
                    && let Poll::Ready(piece) = self.body.poll_next(context)
                {
                    return Poll::Ready(Step::Body(piece));
                }
                if let Some(answer) = seat.call.poll_answer(context, &seat.shared) {
                    return Poll::Ready(Step::Answer(answer));
                }
                match seat.shared.link.get() {
                    Link::Up(link) if self.has_unsaid(link) => Poll::Ready(Step::Say(link)),
                    _ => Poll::Pending,
                }
            })
            .await;
            match step {
                Step::Body(piece) => self.take(piece)?,
                Step::Say(link) => self.say(link, seat).await?,
                Step::Answer(Answer::Message(message)) => return Ok(message),
                Step::Answer(Answer::End(status)) => return Err(status),
            }
        }
    }

    fn has_unsaid(&self, link: u64) -> bool {
        self.said.link != Some(link)
            || self.said.messages < self.kept.messages.len()
            || self.said.half_close != self.half_closed
    }

    fn take(&mut self, piece: Result<Piece, ReadError<hyper::Error>>) -> Result<(), Status> {
        match piece {
            Ok(Piece::Message(message)) => self.keep(message)?,
            Ok(Piece::Trailers(_) | Piece::End) => self.half_closed = true,
            Err(error) => return Err(unreadable(&error)),
        }
        Ok(())
    }

    fn keep(&mut self, message: Bytes) -> Result<(), Status> {
        let kept = &self.kept.shared.kept_bytes;
        let full = kept.load(Ordering::Relaxed) + message.len() > limits::RELAY_KEPT_BYTES_MAX;
        if full || self.kept.messages.len() >= KEPT_MESSAGES_COUNT_MAX {
            return Err(Status::resource_exhausted(format!(
                "calls without an answer are kept for a repeat: at most {KEPT_MESSAGES_COUNT_MAX} messages of one, and \
                 {} bytes of all calls of a session",
                limits::RELAY_KEPT_BYTES_MAX
            )));
        }
        kept.fetch_add(message.len(), Ordering::Relaxed);
        self.kept.size_bytes += message.len();
        self.kept.messages.push(message);
        Ok(())
    }

    /// Says what the link has not heard.
    async fn say(&mut self, link: u64, seat: &Seat) -> Result<(), Status> {
        let mut frames = Vec::with_capacity(3);
        if self.said.link != Some(link) {
            self.said = Said { link: Some(link), ..Said::default() };
            frames.push(relay_frame::Frame::Begin(v1::RelayBegin {
                task_id: self.task.to_string(),
                method: self.method.clone(),
            }));
        }
        let unsaid = &self.kept.messages[self.said.messages..];
        frames.extend(unsaid.iter().cloned().map(relay_frame::Frame::Message));
        if self.half_closed && !self.said.half_close {
            frames.push(relay_frame::Frame::HalfClose(v1::RelayHalfClose {}));
        }
        self.said.messages = self.kept.messages.len();
        self.said.half_close = self.half_closed;
        let permits = seat.shared.frames.reserve_many(frames.len()).await;
        // Fails only when the session is over.
        let permits = permits.map_err(|_| controller_gone())?;
        for (permit, frame) in permits.zip(frames) {
            permit.send(v1::RelayFrame { call_id: seat.call.id, frame: Some(frame) });
        }
        Ok(())
    }
}

/// What a block is told whose request cannot be passed on.
fn unreadable(error: &ReadError<hyper::Error>) -> Status {
    match error {
        ReadError::Broken(error) => Status::cancelled(format!("the request broke off: {error}")),
        ReadError::Framing(error) => Status::resource_exhausted(error.to_string()),
        ReadError::Incomplete => Status::invalid_argument("the request ends in the middle of a message"),
    }
}

/// Passes on what a block says after the first answer. A link that breaks now ends the call, so nothing is kept.
async fn pass_on(shared: Arc<Shared>, call: Arc<Call>, mut body: Messages<Incoming>) {
    loop {
        let frame = match body.next().await {
            Ok(Piece::Message(message)) => relay_frame::Frame::Message(message),
            Ok(Piece::Trailers(_) | Piece::End) => relay_frame::Frame::HalfClose(v1::RelayHalfClose {}),
            // The call is over with its connection.
            Err(ReadError::Broken(_)) => return,
            Err(error) => return call.ended(unreadable(&error)),
        };
        let over = matches!(frame, relay_frame::Frame::HalfClose(_));
        let frame = v1::RelayFrame { call_id: call.id, frame: Some(frame) };
        if shared.frames.send(frame).await.is_err() || over {
            return;
        }
    }
}

/// A call that ends without an answer.
fn refused(status: &Status) -> http::Response<AnswerBody> {
    let mut response = response(AnswerBody::empty());
    // Fails only for a message that cannot be a header; it is encoded so that it can.
    drop(status.add_header(response.headers_mut()));
    response
}

fn response(body: AnswerBody) -> http::Response<AnswerBody> {
    let mut response = http::Response::new(body);
    let content_type = http::HeaderValue::from_static("application/grpc");
    response.headers_mut().insert("content-type", content_type);
    response
}

/// Answers of a call, as the body of a response. Dropped before its end, it gives the call up.
pub(super) struct AnswerBody {
    seat: Option<Seat>,
    first: Option<Bytes>,
}

impl AnswerBody {
    fn empty() -> Self {
        Self { seat: None, first: None }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(message) = self.first.take() {
            return Poll::Ready(Some(Ok(message_frame(&message))));
        }
        let Some(seat) = &mut self.seat else { return Poll::Ready(None) };
        match seat.call.poll_answer(context, &seat.shared) {
            None => Poll::Pending,
            Some(Answer::Message(message)) => Poll::Ready(Some(Ok(message_frame(&message)))),
            Some(Answer::End(status)) => {
                seat.over = seat.call.answers().end.is_some();
                self.seat = None;
                Poll::Ready(Some(Ok(end_frame(&status))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.seat.is_none() && self.first.is_none()
    }
}
