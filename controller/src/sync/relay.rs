//! The controller's end of one session's relay: frames of many calls in, calls of the service, frames out.
//!
//! It stamps each call with the task that the agent vouches for and understands no message. Answers of many calls that
//! are ready together share one message. When the link breaks, its calls are dropped as lost with the link, not as given
//! up: the agent sends those without an answer again, with the same numbers. Nothing here waits without a bound but
//! the calls themselves.

use std::{
    collections::{BTreeSet, HashMap},
    convert::Infallible,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
use tokio::{
    sync::{Notify, mpsc},
    task::{AbortHandle, JoinSet},
};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status, codegen::http};
use tower::Service as _;

use super::{
    CallId, Speaker,
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

/// Calls that enter barriers: the ones that thousands make at the same moment. They have no task each; whoever brings
/// the decision about puts the answers here.
#[derive(Default)]
struct Entries {
    waiting: Mutex<HashMap<u64, CallId>>,
    /// One answer a call, so that the calls of a session bound it.
    answers: Mutex<Vec<Outgoing>>,
    some: Notify,
}

impl Entries {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, CallId>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answers(&self) -> MutexGuard<'_, Vec<Outgoing>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an answer down, unless the call has gone or begun anew meanwhile.
    fn answer(&self, call_id: u64, call: CallId, answer: Result<Bytes, Status>) {
        let mut waiting = self.waiting();
        if waiting.get(&call_id) != Some(&call) {
            return;
        }
        waiting.remove(&call_id);
        drop(waiting);
        let (message, status) = match answer {
            Ok(message) => (Some(message), Status::ok("")),
            Err(status) => (None, status),
        };
        let end = v1::RelayEnd { code: status.code() as u32, message: status.message().to_owned() };
        let mut answers = self.answers();
        answers.push(Outgoing { call_id, message, end: Some(end) });
        let first = answers.len() == 1;
        drop(answers);
        if first {
            self.some.notify_one();
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
            (None, CallBody { ready: opening.messages.into_iter(), more: None })
        } else {
            let (tx, rx) = mpsc::channel(UNREAD_MESSAGES_COUNT_MAX);
            (Some(tx), CallBody { ready: opening.messages.into_iter(), more: Some(rx) })
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

/// Runs one call to its end.
async fn answer(
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

/// The one call that is decoded here, and answered with a list that is encoded once for all parties.
const ENTER: &str = "/millstream.v1.SyncService/Enter";

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
mod tests {
    //! The whole way in one process: a block's client, its Unix socket, the agent's relay, frames, the board.

    use std::{path::PathBuf, sync::Arc, time::Duration};

    use millstream_agent::supervisor::relay::Relay;
    use millstream_common::{
        clock::World,
        id::{BarrierName, BlockName, StreamName, TopicName},
        sync_client::{Content, Entry, SyncClient, SyncError},
    };
    use millstream_proto::supervisor::v1::RelayFrames;
    use prost::Message as _;
    use tokio::{runtime::Handle, sync::Mutex, task::JoinHandle};
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;
    use crate::sync::host::{SpeakerLabel, TaskFate};

    struct Lab {
        host: SyncHost,
        relay: Relay,
        frames: Arc<Mutex<mpsc::Receiver<RelayFrames>>>,
        directory: tempfile::TempDir,
        world: World,
    }

    /// A link between the agent's relay and the host. Cut by [`Wire::cut`].
    struct Wire {
        relay: Relay,
        tasks: Vec<JoinHandle<()>>,
        served: JoinHandle<()>,
    }

    impl Wire {
        /// Cuts the link as a network does: what is on its way is lost.
        async fn cut(self) {
            for task in &self.tasks {
                task.abort();
            }
            for task in self.tasks {
                drop(task.await);
            }
            self.relay.attached(false);
            self.served.await.unwrap();
        }
    }

    impl Lab {
        fn new() -> Self {
            let world = World::system();
            let host = SyncHost::new(world.clone(), &Handle::current());
            let (tx, rx) = mpsc::channel(64);
            let relay = Relay::new(tx);
            let directory = tempfile::tempdir().unwrap();
            Self { host, relay, frames: Arc::new(Mutex::new(rx)), directory, world }
        }

        /// A task with its socket.
        fn task(&self, stream: &str, number: u32) -> (TaskId, PathBuf) {
            let task = self.world.ids.task_id();
            let label = SpeakerLabel {
                stream: StreamName::new(stream).unwrap(),
                number,
                block: BlockName::new("block").unwrap(),
            };
            self.host.task_scheduled(task, label, None, None);
            let path = self.directory.path().join(format!("{}.sock", task.short()));
            self.relay.open(task, &path, None).unwrap();
            (task, path)
        }

        /// A link; `deaf`: what the controller says does not arrive.
        fn link(&self, deaf: bool) -> Wire {
            let (to_controller, inbound) = mpsc::channel(16);
            let (outbound, mut to_agent) = mpsc::channel(16);
            let host = self.host.clone();
            let served =
                tokio::spawn(async move { host.serve_relay(ReceiverStream::new(inbound), outbound).await });
            let frames = self.frames.clone();
            let up = tokio::spawn(async move {
                let mut frames = frames.lock().await;
                while let Some(message) = frames.recv().await {
                    if to_controller.send(message.frames).await.is_err() {
                        return;
                    }
                }
            });
            let relay = self.relay.clone();
            let down = tokio::spawn(async move {
                while let Some(frames) = to_agent.recv().await {
                    if !deaf {
                        relay.incoming(RelayFrames { frames });
                    }
                }
            });
            self.relay.attached(true);
            Wire { relay: self.relay.clone(), tasks: vec![up, down], served }
        }

        /// Waits until so many parties have entered a barrier.
        async fn entered(&self, name: &str, count: usize) {
            let seen = || {
                let counts = self.host.with_barriers(0, |barrier, _, _| {
                    let arrivals = barrier.meeting().map_or(0, |meeting| meeting.arrivals.len());
                    Some((barrier.name().to_string(), arrivals))
                });
                counts.contains(&(name.to_owned(), count))
            };
            let wait = async {
                while !seen() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), wait).await.expect("nobody came");
        }
    }

    fn two() -> Entry {
        Entry { parties: Some(2), ..Entry::default() }
    }

    #[tokio::test]
    async fn two_blocks_pass_a_barrier_and_see_what_the_other_brought() {
        let lab = Lab::new();
        let ((_, a), (_, b)) = (lab.task("a", 1), lab.task("b", 1));
        let _wire = lab.link(false);
        let (a, b) = (SyncClient::connect(a).await.unwrap(), SyncClient::connect(b).await.unwrap());
        let bringing = |text: &'static str| Entry { payload: text.into(), ..two() };
        let first = tokio::spawn(async move { a.barrier("setup", bringing("port 1")).await });
        lab.entered("setup", 1).await;
        let second = b.barrier("setup", bringing("port 2")).await.unwrap();
        let first = first.await.unwrap().unwrap();
        assert_eq!((first.arrival, second.arrival, first.generation), (0, 1, 1));
        let brought = |party: &millstream_common::sync_client::Party| {
            (party.name.clone(), String::from_utf8_lossy(&party.payload).into_owned())
        };
        let expected =
            [("a/1-block", "port 1"), ("b/1-block", "port 2")].map(|(n, p)| (n.to_owned(), p.to_owned()));
        assert_eq!(first.parties.iter().map(brought).collect::<Vec<_>>(), expected);
        assert_eq!(second.parties.iter().map(brought).collect::<Vec<_>>(), expected);
        let records = lab.host.records();
        assert_eq!(records.barriers[0].last.as_deref(), Some("b/1-block"));
        assert_eq!(records.barriers[0].waits.len(), 2);
    }

    #[tokio::test]
    async fn a_party_waits_through_a_broken_link() {
        let lab = Lab::new();
        let ((task, a), (_, b)) = (lab.task("a", 1), lab.task("b", 1));
        let wire = lab.link(false);
        let (a, b) = (SyncClient::connect(a).await.unwrap(), SyncClient::connect(b).await.unwrap());
        let first = tokio::spawn(async move { a.barrier("setup", two()).await });
        lab.entered("setup", 1).await;
        wire.cut().await;
        lab.host.session_suspended(&[task]);
        // Begun while there is no link: it waits for one.
        let second = tokio::spawn(async move { b.barrier("setup", two()).await });
        lab.host.session_resumed(&[task]);
        let _wire = lab.link(false);
        assert_eq!(first.await.unwrap().unwrap().arrival, 0);
        assert_eq!(second.await.unwrap().unwrap().arrival, 1);
        assert_eq!(lab.host.records().barriers.len(), 1, "one meeting, and no party twice");
    }

    #[tokio::test]
    async fn a_release_that_the_link_has_lost_is_delivered_on_return() {
        let lab = Lab::new();
        let ((_, a), (_, b)) = (lab.task("a", 1), lab.task("b", 1));
        let wire = lab.link(true);
        let (a, b) = (SyncClient::connect(a).await.unwrap(), SyncClient::connect(b).await.unwrap());
        let first = tokio::spawn(async move { a.barrier("setup", two()).await });
        lab.entered("setup", 1).await;
        let second = tokio::spawn(async move { b.barrier("setup", two()).await });
        let decided = async {
            while lab.host.records().barriers.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), decided).await.unwrap();
        assert!(!first.is_finished() && !second.is_finished());
        wire.cut().await;
        let _wire = lab.link(false);
        assert_eq!(first.await.unwrap().unwrap().generation, 1);
        assert_eq!(second.await.unwrap().unwrap().generation, 1);
        assert_eq!(lab.host.records().barriers.len(), 1);
    }

    #[tokio::test]
    async fn a_subscriber_sees_each_value_once_across_a_broken_link() {
        let lab = Lab::new();
        let ((_, a), (_, b)) = (lab.task("a", 1), lab.task("b", 1));
        let wire = lab.link(false);
        let (a, b) = (SyncClient::connect(a).await.unwrap(), SyncClient::connect(b).await.unwrap());
        let mut values = a.subscribe("t", 0);
        assert_eq!(b.publish("t", "zero").await.unwrap(), 0);
        assert_eq!(values.next().await.unwrap().unwrap().content, Content::Text("zero".into()));
        wire.cut().await;
        let main = lab.host.publish_as_main(TopicName::new("t").unwrap(), "one".into());
        assert_eq!(main.unwrap(), 1);
        let _wire = lab.link(false);
        let one = values.next().await.unwrap().unwrap();
        assert_eq!(
            (one.index, one.content, one.publisher.as_str()),
            (1, Content::Text("one".into()), "main")
        );
        assert_eq!(b.wait("t", 2, None).await.unwrap().len(), 2);
    }

    #[tokio::test]
    async fn whoever_waits_is_told_when_the_controller_is_gone_for_good() {
        let lab = Lab::new();
        let (_, a) = lab.task("a", 1);
        let wire = lab.link(false);
        let a = SyncClient::connect(a).await.unwrap();
        let waiting = tokio::spawn({
            let a = a.clone();
            async move { a.barrier("setup", two()).await }
        });
        lab.entered("setup", 1).await;
        wire.cut().await;
        lab.relay.controller_gone();
        for ended in [waiting.await.unwrap(), a.barrier("later", two()).await] {
            match ended {
                Err(SyncError::Gone(told)) => assert!(told.starts_with("controller gone"), "{told}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_party_whose_partner_fails_is_told_at_once() {
        let lab = Lab::new();
        let ((_, a), (server, _)) = (lab.task("a", 1), lab.task("server", 1));
        let _wire = lab.link(false);
        let a = SyncClient::connect(a).await.unwrap();
        let waiting = tokio::spawn(async move { a.barrier("setup", two()).await });
        lab.entered("setup", 1).await;
        let fate = TaskFate {
            unexpected: true,
            sentence: "failed with exit code 1".into(),
            last_line: Some("bind: address in use".into()),
        };
        lab.host.task_ended(server, fate);
        match waiting.await.unwrap() {
            Err(SyncError::Broken(told)) => {
                let expected = "1 of 2 entered; the second can no longer come: task 1-block on stream server \
                                failed with exit code 1, 0.0 s ago (last line: `bind: address in use`)";
                assert!(told.contains(expected), "{told}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn main_meets_blocks_and_mistakes_are_named() {
        let lab = Lab::new();
        let (_, a) = lab.task("a", 1);
        let _wire = lab.link(false);
        let a = SyncClient::connect(a).await.unwrap();
        let name = BarrierName::new("setup").unwrap();
        let main = lab.host.enter_as_main(name, Some(2), Duration::from_secs(60), Bytes::new());
        let (main, block) = tokio::join!(main, a.barrier("setup", two()));
        assert_eq!(main.unwrap().generation, block.unwrap().generation);

        let refused = |error: SyncError| match error {
            SyncError::Refused { code, message } => (code, message),
            other => panic!("{other:?}"),
        };
        let (code, told) = refused(a.barrier("", two()).await.unwrap_err());
        assert_eq!(code, Code::InvalidArgument);
        assert!(told.contains("the barrier name is empty"), "{told}");
        let (code, told) = refused(a.barrier("x", Entry::default()).await.unwrap_err());
        assert_eq!(code, Code::InvalidArgument);
        assert!(told.contains("not run on a group"), "{told}");
        let (code, _) = refused(a.publish("t", "x".repeat(70_000)).await.unwrap_err());
        assert_eq!(code, Code::ResourceExhausted);
    }

    /// A call as any gRPC client would make it, with bytes that no generated code has seen.
    async fn raw(path: PathBuf, method: &'static str, message: &'static [u8]) -> Result<Bytes, Status> {
        let stream = tokio::net::UnixStream::connect(path).await.unwrap();
        let pipe: millstream_common::pipe::BoxedPipe = Box::new(stream);
        let channel = millstream_common::pipe::endpoint_channel(|| async { Ok(pipe) }).await.unwrap();
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let request = tonic::Request::new(Bytes::from_static(message));
        let answer = client.unary(request, http::uri::PathAndQuery::from_static(method), RawCodec).await;
        answer.map(tonic::Response::into_inner)
    }

    #[derive(Debug, Clone, Copy)]
    struct RawCodec;

    impl tonic::codec::Codec for RawCodec {
        type Encode = Bytes;
        type Decode = Bytes;
        type Encoder = Self;
        type Decoder = Self;
        fn encoder(&mut self) -> Self {
            Self
        }
        fn decoder(&mut self) -> Self {
            Self
        }
    }

    impl tonic::codec::Encoder for RawCodec {
        type Item = Bytes;
        type Error = Status;
        fn encode(&mut self, item: Bytes, buffer: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), Status> {
            bytes::BufMut::put(buffer, item);
            Ok(())
        }
    }

    impl tonic::codec::Decoder for RawCodec {
        type Item = Bytes;
        type Error = Status;
        fn decode(&mut self, buffer: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
            let length = bytes::Buf::remaining(buffer);
            Ok(Some(bytes::Buf::copy_to_bytes(buffer, length)))
        }
    }

    #[tokio::test]
    async fn any_client_may_call_any_method_and_garbage_is_refused() {
        let lab = Lab::new();
        let (_, a) = lab.task("a", 1);
        let _wire = lab.link(false);
        // EnterRequest{name: "x", parties: 1}
        let entered = raw(a.clone(), ENTER, b"\x0a\x01x\x10\x01").await.unwrap();
        assert_eq!(v1::EnterResponse::decode(entered).unwrap().generation, 1);
        let garbage = raw(a.clone(), ENTER, b"\xff\xff\xff").await.unwrap_err();
        assert_eq!(garbage.code(), Code::InvalidArgument, "{garbage}");
        let unknown = raw(a.clone(), "/millstream.v1.SyncService/Nonsense", b"").await.unwrap_err();
        assert_eq!(unknown.code(), Code::Unimplemented);
        let reset = raw(a, "/millstream.v1.SyncService/Reset", b"\x0a\x01x").await.unwrap_err();
        assert_eq!(reset.code(), Code::PermissionDenied);
    }

    #[tokio::test]
    async fn an_agent_speaks_for_its_own_tasks_only() {
        let host = SyncHost::new(World::system(), &Handle::current());
        let (tx, rx) = mpsc::channel(1);
        let (outbound, mut answers) = mpsc::channel(1);
        let foreign = World::system().ids.task_id();
        let begin = v1::RelayBegin { task_id: foreign.to_string(), method: ENTER.to_owned() };
        let frame = v1::RelayFrame { call_id: 1, frame: Some(relay_frame::Frame::Begin(begin)) };
        tx.send(vec![frame]).await.unwrap();
        let serving = host.serve_relay_of(|_| false, ReceiverStream::new(rx), outbound);
        let asking = async move {
            let frames = answers.recv().await.unwrap();
            drop(tx);
            frames
        };
        let ((), frames) = tokio::join!(serving, asking);
        match &frames[0].frame {
            Some(relay_frame::Frame::End(end)) => assert_eq!(end.code, Code::PermissionDenied as u32),
            other => panic!("{other:?}"),
        }
    }

    /// Run with `--ignored --nocapture`; prints medians of barrier rounds.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    #[ignore = "a measurement"]
    async fn rounds_of_many_parties() {
        let lab = Lab::new();
        let _wire = lab.link(false);
        let clock = lab.world.clock.clone();
        let mut clients = Vec::new();
        for number in 0..10 {
            let (_, path) = lab.task(&format!("s{number}"), 1);
            clients.push(SyncClient::connect(path).await.unwrap());
        }
        for parties in [2_u32, 100, 1_000] {
            let mut rounds = Vec::new();
            for _ in 0..30 {
                let began = clock.now();
                let mut waiting = tokio::task::JoinSet::new();
                for number in 0..parties {
                    let client = clients[number as usize % clients.len()].clone();
                    let entry = Entry { parties: Some(parties), ..Entry::default() };
                    waiting.spawn(async move { client.barrier("round", entry).await.unwrap() });
                }
                waiting.join_all().await;
                rounds.push(clock.now().duration_since(began));
            }
            rounds.sort();
            println!("sockets: {parties} parties on 10 tasks: median {:?}, best {:?}", rounds[15], rounds[0]);
        }
    }

    /// The controller's part alone: ten links that carry frames of many parties.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    #[ignore = "a measurement"]
    async fn rounds_of_frames() {
        let world = World::system();
        let host = SyncHost::new(world.clone(), &Handle::current());
        let mut links = Vec::new();
        for number in 0..10 {
            let task = world.ids.task_id();
            let label = SpeakerLabel {
                stream: StreamName::new(format!("s{number}")).unwrap(),
                number: 1,
                block: BlockName::new("block").unwrap(),
            };
            host.task_scheduled(task, label, None, None);
            let (tx, rx) = mpsc::channel::<Vec<v1::RelayFrame>>(16);
            let (outbound, answers) = mpsc::channel(16);
            let host = host.clone();
            tokio::spawn(async move { host.serve_relay(ReceiverStream::new(rx), outbound).await });
            links.push((task, tx, answers));
        }
        let mut call_id = 0;
        for parties in [10_u32, 100, 1_000, 10_000] {
            let mut rounds = Vec::new();
            for _ in 0..20 {
                let began = world.clock.now();
                for (task, tx, _) in &links {
                    let mut frames = Vec::new();
                    for _ in 0..parties / 10 {
                        call_id += 1;
                        let begin = v1::RelayBegin { task_id: task.to_string(), method: ENTER.to_owned() };
                        let message = v1::EnterRequest {
                            name: "round".into(),
                            parties,
                            party_token: format!("token-of-32-hexadecimal-{call_id:08}"),
                            ..v1::EnterRequest::default()
                        };
                        for frame in [
                            relay_frame::Frame::Begin(begin),
                            relay_frame::Frame::Message(message.encode_to_vec().into()),
                            relay_frame::Frame::HalfClose(v1::RelayHalfClose {}),
                        ] {
                            frames.push(v1::RelayFrame { call_id, frame: Some(frame) });
                        }
                    }
                    for part in frames.chunks(3 * 256) {
                        tx.send(part.to_vec()).await.unwrap();
                    }
                }
                for (_, _, answers) in &mut links {
                    let mut ended = 0;
                    while ended < parties / 10 {
                        let frames = answers.recv().await.unwrap();
                        ended += u32::try_from(
                            frames
                                .iter()
                                .filter(|f| matches!(f.frame, Some(relay_frame::Frame::End(_))))
                                .count(),
                        )
                        .unwrap();
                    }
                }
                rounds.push(world.clock.now().duration_since(began));
            }
            rounds.sort();
            println!("frames: {parties} parties on 10 links: median {:?}, best {:?}", rounds[10], rounds[0]);
        }
    }
}
