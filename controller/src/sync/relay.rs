//! The controller's end of one session's relay: frames of many calls in, calls of the service, frames out.
//!
//! It stamps each call with the task that the agent vouches for and understands no message. Answers of many calls that
//! are ready together share one message. When the link breaks, its calls are dropped as lost with the link, not as given
//! up: the agent sends those without an answer again, with the same numbers. Nothing here waits without a bound but
//! the calls themselves.

use std::{
    collections::{BTreeSet, HashMap},
    pin::pin,
    sync::Arc,
};

use bytes::Bytes;
use millstream_common::{id::TaskId, limits};
use millstream_proto::v1::{self, relay_frame};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;

use super::{
    CallId, Speaker,
    host::{Line, SyncHost},
    service::{Caller, Service},
};
use call::{CallBody, answer};
use entries::Entries;

mod call;
mod entries;

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
    let entries = Arc::new(Entries::default());
    let mut link = Link {
        service: Service::new(&host),
        entries: entries.clone(),
        line: Line::default(),
        calls: HashMap::new(),
        running: JoinSet::new(),
        out,
    };
    // The board must not be kept alive by a link that nobody uses any more.
    drop(host);
    let mut inbound = pin!(inbound);
    // A task of its own: a call that cannot be begun is told so while nothing else here goes on.
    let mut pump = AbortOnDropHandle::new(tokio::spawn(pump(waiting, entries, outbound)));
    loop {
        tokio::select! {
            frames = inbound.next() => match frames {
                Some(frames) => link.take(frames, &speaks_for).await,
                None => break,
            },
            Some(ended) = link.running.join_next() => link.reap(ended.ok()),
            // The other half is gone: no answer can be told any more.
            _ = &mut pump => break,
        }
    }
    link.line.lose();
    link.running.shutdown().await;
}

impl Drop for Link {
    /// The owner of a link may drop it instead of ending it: its calls are lost with it all the same.
    fn drop(&mut self) {
        self.line.lose();
        let left = std::mem::take(&mut *self.entries.waiting());
        let Some(host) = self.service.upgrade() else { return };
        let left: BTreeSet<CallId> = left.into_values().collect();
        for call in left {
            host.leave(call, true);
        }
    }
}

struct Link {
    service: Service,
    entries: Arc<Entries>,
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
                    self.give_up(call_id, false);
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

    /// Drops a call, if there is one of this number.
    fn give_up(&mut self, call_id: u64, link_down: bool) {
        if let Some(live) = self.calls.remove(&call_id) {
            live.abort.abort();
        }
        let entry = self.entries.waiting().remove(&call_id);
        if let (Some(call), Some(host)) = (entry, self.service.upgrade()) {
            host.leave(call, link_down);
        }
    }

    /// Enters a barrier without a task of its own.
    fn enter(&self, host: &SyncHost, caller: &Caller, call_id: u64, message: Bytes) {
        let call = host.next_call();
        self.entries.waiting().insert(call_id, call);
        let entries = self.entries.clone();
        self.service.enter_with(call, caller, message, move |answer| entries.answer(call_id, call, answer));
    }

    async fn begin(&mut self, call_id: u64, opening: Opening) {
        // A second beginning of the same call on the same link takes the place of the first, as after a broken link.
        self.give_up(call_id, true);
        let calls = self.calls.len() + self.entries.waiting().len();
        if calls >= limits::RELAY_CALLS_COUNT_MAX {
            let told = format!("this session has {} calls already", limits::RELAY_CALLS_COUNT_MAX);
            return self.end(call_id, Code::ResourceExhausted, told).await;
        }
        let caller = Caller {
            speaker: Speaker::Task(opening.task),
            line: Some(self.line.clone()),
            call_id: Some(call_id),
        };
        if let ([message], true, ENTER) = (&*opening.messages, opening.complete, opening.method.as_str())
            && let Some(host) = self.service.upgrade()
        {
            return self.enter(&host, &caller, call_id, message.clone());
        }
        let (messages, body) = if opening.complete {
            (None, CallBody::new(opening.messages, None))
        } else {
            let (tx, rx) = mpsc::channel(UNREAD_MESSAGES_COUNT_MAX);
            (Some(tx), CallBody::new(opening.messages, Some(rx)))
        };
        let answered = answer(self.service.clone(), caller, opening.method, body, call_id, self.out.clone());
        let abort = self.running.spawn(async move {
            answered.await;
            call_id
        });
        self.calls.insert(call_id, Live { abort, messages });
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

/// The one call that is decoded here, and answered with a list that is encoded once for all parties.
const ENTER: &str = "/millstream.v1.SyncService/Enter";

/// Sends what calls have to say, as many as are ready in one message. Returns when the link or all calls are gone.
async fn pump(
    mut waiting: mpsc::Receiver<Outgoing>,
    entries: Arc<Entries>,
    outbound: mpsc::Sender<Vec<v1::RelayFrame>>,
) {
    let mut ready = Vec::new();
    loop {
        tokio::select! {
            count = waiting.recv_many(&mut ready, limits::RELAY_FRAMES_COUNT_MAX) => if count == 0 { return },
            () = entries.some.notified() => ready.append(&mut entries.answers()),
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

#[cfg(test)]
mod tests;
