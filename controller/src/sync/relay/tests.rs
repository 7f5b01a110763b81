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
use tonic::{Status, codegen::http};

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
    Entry { parties: 2.into(), ..Entry::default() }
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
    assert_eq!((one.index, one.content, one.publisher.as_str()), (1, Content::Text("one".into()), "main"));
    assert_eq!(b.wait("t", 2, None).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_subscriber_may_wait_or_listen_at_each_step() {
    let lab = Lab::new();
    let ((_, a), (_, b)) = (lab.task("a", 1), lab.task("b", 1));
    let _wire = lab.link(false);
    let (a, b) = (SyncClient::connect(a).await.unwrap(), SyncClient::connect(b).await.unwrap());
    for value in ["zero", "one", "two"] {
        b.publish("t", value).await.unwrap();
    }
    let mut values = a.subscribe("t", 0);
    assert_eq!(values.wait_next().await.unwrap().unwrap().index, 0);
    assert_eq!(values.next().await.unwrap().unwrap().index, 1);
    let rest: Vec<u64> = values.wait_batch().await.unwrap().iter().map(|value| value.index).collect();
    assert_eq!(rest, [2]);
    let (next, _) = tokio::join!(values.wait_next(), b.publish("t", "three"));
    assert_eq!(next.unwrap().unwrap().index, 3);
    let (next, _) = tokio::join!(values.next(), b.publish("t", "four"));
    assert_eq!(next.unwrap().unwrap().index, 4);
    // One waits for the other, which waits for a value of the first: nobody is left who could publish.
    lab.host.main_waiting(true);
    let mut others = b.subscribe("u", 0);
    let (first, second) = tokio::join!(values.wait_next(), others.wait_next());
    for told in [first.unwrap_err(), second.unwrap_err()] {
        let told = told.to_string();
        assert!(told.contains("the tasks wait for each other in a circle: topic `"), "{told}");
    }
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
    let main = lab.host.enter_as_main(name, 2, Duration::from_secs(60), Bytes::new());
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
async fn long_lists_come_in_parts() {
    let lab = Lab::new();
    let (_, a) = lab.task("a", 1);
    let _wire = lab.link(false);
    for number in 0..1_000 {
        let name = format!("{number:0>100}");
        lab.host.abort_as_main(BarrierName::new(&name).unwrap(), "x".repeat(1_000));
        for suffix in 0..8 {
            let topic = TopicName::new(format!("{name} {suffix}")).unwrap();
            lab.host.publish_as_main(topic, "value".into()).unwrap();
        }
    }
    let a = SyncClient::connect(a).await.unwrap();
    let barriers: Vec<String> = a.barriers().await.unwrap().into_iter().map(|barrier| barrier.name).collect();
    assert_eq!(barriers, (0..1_000).map(|number| format!("{number:0>100}")).collect::<Vec<_>>());
    let topics: std::collections::BTreeSet<String> =
        a.topics().await.unwrap().into_iter().map(|topic| topic.name).collect();
    assert_eq!(topics.len(), 8_000);
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
