//! The controller's part of a barrier alone: ten links, as of ten hosts, that carry the frames of up to 10,000 parties.
//!
//! There is no limit of the machine beside it: no process, socket or agent takes part, and every block is a few messages.

use std::time::{Duration, Instant};

use millstream::sync::host::{SpeakerLabel, SyncHost};
use millstream_common::{
    clock::World,
    id::{BlockName, StreamName, TaskId},
};
use millstream_proto::v1::{self, relay_frame};
use prost::Message as _;
use tokio::{runtime::Handle, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;

/// Hosts.
const LINKS: u32 = 10;
/// Rounds of each number of parties.
const ROUNDS: usize = 20;
/// Frames of one message: each party sends three.
const FRAMES_COUNT: usize = 3 * 256;

struct Link {
    task: TaskId,
    frames: mpsc::Sender<Vec<v1::RelayFrame>>,
    answers: mpsc::Receiver<Vec<v1::RelayFrame>>,
}

/// Prints the median round of each number of parties.
pub(crate) fn rounds() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut links = links();
        let mut begun = 0;
        for parties in [10, 100, 1_000, 10_000] {
            let mut spans = Vec::new();
            for _ in 0..ROUNDS {
                spans.push(round(&mut links, parties, &mut begun).await);
            }
            spans.sort();
            println!("barrier round of {parties} parties, the controller alone: {:?}", spans[ROUNDS / 2]);
        }
    });
}

fn links() -> Vec<Link> {
    let world = World::system();
    let host = SyncHost::new(world.clone(), &Handle::current());
    let link = |number| {
        let task = world.ids.task_id();
        let label = SpeakerLabel {
            stream: StreamName::new(format!("s{number}")).unwrap(),
            number: 1,
            block: BlockName::new("block").unwrap(),
        };
        host.task_scheduled(task, label, None, None);
        let (frames, inbound) = mpsc::channel(16);
        let (outbound, answers) = mpsc::channel(16);
        let host = host.clone();
        tokio::spawn(async move { host.serve_relay(ReceiverStream::new(inbound), outbound).await });
        Link { task, frames, answers }
    };
    (0..LINKS).map(link).collect()
}

/// All parties enter, as many on each link, and all are answered. `begun` counts calls.
async fn round(links: &mut [Link], parties: u32, begun: &mut u64) -> Duration {
    let begin = Instant::now();
    for link in &mut *links {
        let entries: Vec<v1::RelayFrame> =
            (0..parties / LINKS).flat_map(|_| entry(link.task, parties, begun)).collect();
        for part in entries.chunks(FRAMES_COUNT) {
            link.frames.send(part.to_vec()).await.unwrap();
        }
    }
    for link in links {
        let mut ended = 0;
        while ended < (parties / LINKS) as usize {
            let frames = link.answers.recv().await.unwrap();
            let is_end = |frame: &&v1::RelayFrame| matches!(frame.frame, Some(relay_frame::Frame::End(_)));
            ended += frames.iter().filter(is_end).count();
        }
    }
    begin.elapsed()
}

/// The frames of one call.
fn entry(task: TaskId, parties: u32, begun: &mut u64) -> [v1::RelayFrame; 3] {
    *begun += 1;
    let call_id = *begun;
    let begin =
        v1::RelayBegin { task_id: task.to_string(), method: "/millstream.v1.SyncService/Enter".to_owned() };
    let message = v1::EnterRequest {
        name: "round".to_owned(),
        parties,
        party_token: format!("token-of-32-hexadecimal-{call_id:08}"),
        ..v1::EnterRequest::default()
    };
    [
        relay_frame::Frame::Begin(begin),
        relay_frame::Frame::Message(message.encode_to_vec().into()),
        relay_frame::Frame::HalfClose(v1::RelayHalfClose {}),
    ]
    .map(|frame| v1::RelayFrame { call_id, frame: Some(frame) })
}
