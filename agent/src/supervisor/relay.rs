//! Unix sockets of tasks, and the calls that blocks make on them, carried to the controller.
//!
//! The relay ends HTTP/2 and gRPC framing, stamps each call with the task whose socket it came through, and passes
//! messages on as bytes: it knows no method and understands no message. All calls of a session share the frames of one
//! link; what is ready together travels together.
//!
//! When the link breaks, calls that have no answer yet are sent again on the next one, with the same number; those that
//! have begun to be answered end as unavailable, because what they have missed is not known here. New calls wait for a
//! link. When the controller is gone for good, every call is told so. Nothing polls, and everything that is kept has a
//! bound.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use millstream_common::{id::TaskId, limits};
use millstream_proto::{
    supervisor::v1::RelayFrames,
    v1::{self, relay_frame},
};
use tokio::{
    net::UnixListener,
    sync::{Notify, mpsc},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status};

mod call;
mod socket;

use call::Call;

/// Why a task has no socket.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system refused to make it; a path of more than 107 bytes is a common reason.
    #[error("failed to listen on `{}`", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It could not be made the task's own.
    #[error("failed to hand `{}` to the task's user", path.display())]
    Own {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The relay of one session. Cheap to clone; dropping the last handle closes every socket.
#[derive(Debug, Clone)]
pub struct Relay {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    sockets: Mutex<HashMap<TaskId, Socket>>,
    _pump: DropGuard,
}

#[derive(Debug)]
struct Socket {
    path: PathBuf,
    _listening: DropGuard,
}

/// What calls and the link share.
#[derive(Debug)]
struct Shared {
    link: LinkCell,
    next_call_id: AtomicU64,
    calls: Mutex<HashMap<u64, Arc<Call>>>,
    frames: mpsc::Sender<v1::RelayFrame>,
    /// Calls that were given up and whose controller is still to be told. Bounded by the calls of a session.
    cancelled: Mutex<Vec<u64>>,
    cancels: Notify,
    /// Bytes of messages that are kept for a repeat, or wait for a block.
    kept_bytes: AtomicUsize,
}

/// The link as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// The controller is gone for good.
    Gone,
    /// None at the moment.
    Down,
    /// There: the number tells one from the next.
    Up(u64),
}

/// 0: gone. Even: down. Odd: up.
#[derive(Debug)]
struct LinkCell(AtomicU64);

impl LinkCell {
    fn get(&self) -> Link {
        match self.0.load(Ordering::Acquire) {
            0 => Link::Gone,
            number if number % 2 == 1 => Link::Up(number),
            _ => Link::Down,
        }
    }

    fn set(&self, up: bool) {
        let next = |number: u64| match number {
            0 => None,
            // A link that is replaced without having been taken away is another link all the same.
            number if up => Some(number + 1 + number % 2),
            number => Some(number + number % 2),
        };
        // Refused once the controller is gone: then it stays gone.
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    fn give_up(&self) {
        self.0.store(0, Ordering::Release);
    }
}

impl Relay {
    /// A relay without a link. Must be made inside a runtime. What blocks say goes to `outgoing`, in order; while no
    /// link is attached nothing is sent there, and what it still holds may be thrown away.
    #[must_use]
    pub fn new(outgoing: mpsc::Sender<RelayFrames>) -> Self {
        let (frames, waiting) = mpsc::channel(limits::RELAY_FRAMES_COUNT_MAX);
        let shared = Arc::new(Shared {
            link: LinkCell(AtomicU64::new(2)),
            next_call_id: AtomicU64::new(1),
            calls: Mutex::new(HashMap::new()),
            frames,
            cancelled: Mutex::new(Vec::new()),
            cancels: Notify::new(),
            kept_bytes: AtomicUsize::new(0),
        });
        let stop = CancellationToken::new();
        let (pumped, stopped) = (shared.clone(), stop.clone());
        // Ends with the last handle; nobody waits for it.
        drop(tokio::spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = pump(&pumped, waiting, outgoing) => {}
            }
        }));
        let inner = Inner { shared, sockets: Mutex::new(HashMap::new()), _pump: stop.drop_guard() };
        Self { inner: Arc::new(inner) }
    }

    /// Opens a task's socket, for its user alone: mode 0600, owned by `owner` (user and group) when given. Must be
    /// called inside a runtime.
    ///
    /// # Errors
    /// When the socket cannot be made, or not be handed to its user.
    pub fn open(&self, task: TaskId, path: &Path, owner: Option<(u32, u32)>) -> Result<(), OpenError> {
        let refused = |source| OpenError::Listen { path: path.to_owned(), source };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refused(error)),
            // What an earlier supervisor of this session has left, or nothing.
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(refused)?;
        let owned = |source| OpenError::Own { path: path.to_owned(), source };
        // Until here the session's directory keeps others out.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(owned)?;
        if let Some((user, group)) = owner {
            std::os::unix::fs::chown(path, Some(user), Some(group)).map_err(owned)?;
        }
        let stop = CancellationToken::new();
        let serving = socket::serve(self.inner.shared.clone(), task, listener, stop.clone());
        // Ends when the socket is closed; nobody waits for it.
        drop(tokio::spawn(serving));
        let socket = Socket { path: path.to_owned(), _listening: stop.drop_guard() };
        self.sockets().insert(task, socket);
        Ok(())
    }

    /// Closes a task's socket: its connections end, and the controller learns that their calls are over.
    pub fn close(&self, task: TaskId) {
        let closed = self.sockets().remove(&task);
        if let Some(socket) = closed {
            // Gone already when the session's directory is.
            drop(fs::remove_file(&socket.path));
        }
    }

    /// The controller's link is there, or is gone.
    pub fn attached(&self, attached: bool) {
        let shared = &self.inner.shared;
        shared.link.set(attached);
        for call in shared.all_calls() {
            call.link_changed();
        }
    }

    /// Takes in frames of the controller.
    pub fn incoming(&self, frames: RelayFrames) {
        let shared = &self.inner.shared;
        let mut refused = Vec::new();
        let calls = shared.calls();
        for v1::RelayFrame { call_id, frame } in frames.frames {
            // A call that is over here may still be answered there for a moment.
            let Some(call) = calls.get(&call_id) else { continue };
            match frame {
                Some(relay_frame::Frame::Message(message)) => {
                    let taken = call.answered(message, &shared.kept_bytes);
                    refused.extend((!taken).then_some(call_id));
                }
                Some(relay_frame::Frame::End(v1::RelayEnd { code, message })) => {
                    let code = Code::from(i32::try_from(code).unwrap_or(i32::MAX));
                    call.ended(Status::new(code, message));
                }
                // The rest is said by blocks, not to them.
                _ => {}
            }
        }
        drop(calls);
        for call_id in refused {
            shared.cancel(call_id);
        }
    }

    /// The lease is over: every call, now and later, is told that the controller is gone.
    pub fn controller_gone(&self) {
        let shared = &self.inner.shared;
        shared.link.give_up();
        for call in shared.all_calls() {
            call.link_changed();
        }
    }

    fn sockets(&self) -> MutexGuard<'_, HashMap<TaskId, Socket>> {
        self.inner.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, HashMap<u64, Arc<Call>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_calls(&self) -> Vec<Arc<Call>> {
        let mut calls: Vec<Arc<Call>> = self.calls().values().cloned().collect();
        // Replays keep the order in which the calls were made.
        calls.sort_unstable_by_key(|call| call.id());
        calls
    }

    /// Tells the controller that a call was given up.
    fn cancel(&self, call_id: u64) {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).push(call_id);
        self.cancels.notify_one();
    }
}

/// What a call is told when the lease is over.
fn controller_gone() -> Status {
    let gone = millstream_common::sync_client::CONTROLLER_GONE;
    Status::unavailable(format!("{gone}: its lease is over, and this task is about to be ended"))
}

/// Bytes of frames in one outgoing message: with one more message it stays within a control message.
const BATCH_BYTES_MAX: usize =
    limits::CONTROL_MESSAGE_BYTES_MAX - limits::RELAY_MESSAGE_BYTES_MAX - 64 * 1024;

/// Sends what calls have to say, as many frames as are ready in one message.
async fn pump(
    shared: &Shared,
    mut waiting: mpsc::Receiver<v1::RelayFrame>,
    outgoing: mpsc::Sender<RelayFrames>,
) {
    let mut ready = Vec::new();
    loop {
        tokio::select! {
            biased;
            count = waiting.recv_many(&mut ready, limits::RELAY_FRAMES_COUNT_MAX) => if count == 0 { return },
            () = shared.cancels.notified() => {}
        }
        let cancelled = std::mem::take(&mut *shared.cancelled.lock().unwrap_or_else(PoisonError::into_inner));
        if !cancelled.is_empty() {
            // A call must never begin after it was given up: whatever those calls have said is in the channel already.
            for _ in 0..limits::RELAY_FRAMES_COUNT_MAX {
                match waiting.try_recv() {
                    Ok(frame) => ready.push(frame),
                    Err(_) => break,
                }
            }
            let cancel = |call_id| v1::RelayFrame {
                call_id,
                frame: Some(relay_frame::Frame::Cancel(v1::RelayCancel {})),
            };
            ready.extend(cancelled.into_iter().map(cancel));
        }
        if !matches!(shared.link.get(), Link::Up(_)) {
            // Calls without an answer say everything again on the next link.
            ready.clear();
            continue;
        }
        let mut batch = Vec::with_capacity(ready.len());
        let mut size_bytes = 0;
        for frame in ready.drain(..) {
            size_bytes += match &frame.frame {
                Some(relay_frame::Frame::Message(message)) => message.len(),
                _ => 0,
            };
            batch.push(frame);
            if size_bytes > BATCH_BYTES_MAX {
                size_bytes = 0;
                if outgoing.send(RelayFrames { frames: std::mem::take(&mut batch) }).await.is_err() {
                    return;
                }
            }
        }
        if !batch.is_empty() && outgoing.send(RelayFrames { frames: batch }).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use millstream_common::{
        clock::World,
        sync_client::{Entry, SyncClient},
    };
    use relay_frame::Frame;

    use super::*;

    #[test]
    fn each_link_has_a_number_of_its_own_and_gone_is_for_ever() {
        let link = LinkCell(AtomicU64::new(2));
        assert_eq!(link.get(), Link::Down);
        let mut seen = Vec::new();
        for up in [true, true, false, false, true] {
            link.set(up);
            seen.push(link.get());
        }
        assert_eq!(seen, [Link::Up(3), Link::Up(5), Link::Down, Link::Down, Link::Up(7)]);
        link.give_up();
        link.set(true);
        assert_eq!(link.get(), Link::Gone);
    }

    /// The next frames, as `number kind`.
    async fn said(frames: &mut mpsc::Receiver<RelayFrames>, count: usize) -> Vec<String> {
        let mut said = Vec::new();
        while said.len() < count {
            let next = tokio::time::timeout(Duration::from_secs(10), frames.recv());
            let message = next.await.expect("nothing is said").expect("the relay is gone");
            said.extend(message.frames.into_iter().map(|frame| {
                let kind = match frame.frame {
                    Some(Frame::Begin(begin)) => begin.method,
                    Some(Frame::Message(_)) => "message".to_owned(),
                    Some(Frame::HalfClose(_)) => "half close".to_owned(),
                    Some(Frame::Cancel(_)) => "cancel".to_owned(),
                    other => format!("{other:?}"),
                };
                format!("{} {kind}", frame.call_id)
            }));
        }
        said
    }

    const ENTER: &str = "1 /millstream.v1.SyncService/Enter";

    #[tokio::test]
    async fn a_call_is_said_again_on_the_next_link_and_its_end_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (tx, mut frames) = mpsc::channel(16);
        let relay = Relay::new(tx);
        let task = World::system().ids.task_id();
        let path = directory.path().join("sync.sock");
        relay.open(task, &path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        let client = SyncClient::connect(&path).await.unwrap();
        let entry = Entry { parties: 2.into(), ..Entry::default() };
        let waiting = tokio::spawn(async move { client.barrier("x", entry).await });
        relay.attached(true);
        let whole = [ENTER, "1 message", "1 half close"];
        assert_eq!(said(&mut frames, 3).await, whole);
        relay.attached(false);
        relay.attached(true);
        assert_eq!(said(&mut frames, 3).await, whole);

        // The block dies: its connection ends, and the controller is told.
        waiting.abort();
        assert_eq!(said(&mut frames, 1).await, ["1 cancel"]);
        relay.close(task);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn closing_a_socket_ends_its_calls() {
        let directory = tempfile::tempdir().unwrap();
        let (tx, mut frames) = mpsc::channel(16);
        let relay = Relay::new(tx);
        relay.attached(true);
        let task = World::system().ids.task_id();
        let path = directory.path().join("sync.sock");
        relay.open(task, &path, None).unwrap();
        let client = SyncClient::connect(&path).await.unwrap();
        let entry = Entry { parties: 2.into(), ..Entry::default() };
        let waiting = tokio::spawn(async move { client.barrier("x", entry).await });
        assert_eq!(said(&mut frames, 3).await, [ENTER, "1 message", "1 half close"]);
        relay.close(task);
        assert_eq!(said(&mut frames, 1).await, ["1 cancel"]);
        waiting.abort();
    }
}
