//! How long barrier rounds of many parties take. Run with `--ignored --nocapture`; prints medians.

use super::*;

/// The whole way, by sockets.
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
                let entry = Entry { parties: parties.into(), ..Entry::default() };
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
                        frames.iter().filter(|f| matches!(f.frame, Some(relay_frame::Frame::End(_)))).count(),
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
