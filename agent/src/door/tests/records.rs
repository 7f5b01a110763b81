//! What an agent puts on record, and what it counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use rustix::process::geteuid;

use super::*;
use crate::{door::Listener, session::Share};

/// What a scraper gets for a request.
async fn scraped(agent: &Agent, request: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let metrics = super::super::Metrics { shared: Arc::clone(&agent.shared) };
    let serving = tokio::spawn(metrics.serve(listener, stop.clone()));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    stop.cancel();
    serving.await.unwrap();
    answer
}

/// Samples by name and labels; fails on whatever the format forbids.
fn parsed(page: &str) -> BTreeMap<String, f64> {
    let (mut families, mut samples) = (BTreeSet::new(), BTreeMap::new());
    let mut family = (String::new(), String::new());
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').unwrap();
            assert!(families.insert(name.to_owned()) && text.ends_with('.'), "{line}");
            family = (name.to_owned(), String::new());
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!((name, family.1.as_str()), (family.0.as_str(), ""), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            family.1 = kind.to_owned();
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert_eq!(series.split('{').next(), Some(family.0.as_str()), "{line}");
            assert!(!family.1.is_empty(), "{line}");
            let before = samples.insert(series.replace("millstream_agent_", ""), value.parse().unwrap());
            assert_eq!(before, None, "{line}");
        }
    }
    samples
}

/// An agent with an audit log at this path.
fn recorded(state: &Path) -> (DoorConfig, PathBuf) {
    let path = state.join("audit.jsonl");
    (DoorConfig { audit: Some(path.clone()), ..config(&state.join("s"), true) }, path)
}

async fn recording(state: &Path) -> (Agent, PathBuf) {
    let (config, path) = recorded(state);
    (Agent::start_configured(config).await, path)
}

#[tokio::test]
async fn who_ran_what_with_which_outcome_is_on_record_and_counted() {
    let state = tempfile::tempdir().unwrap();
    let (agent, path) = recording(state.path()).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let task = controller.start(spec(1, "echo hunter2; exit 3")).await;
    controller.ends("", 1).await;
    let mut keeper = agent.client(Caller::Starter).await;
    controller.client.drain(v1::DrainRequest::default()).await.unwrap_err();
    keeper.drain(v1::DrainRequest { reason: "a look inside".to_owned() }).await.unwrap();
    let mut late = agent.controller().await;
    late.client.open_session(opening()).await.unwrap_err();
    let before = parsed(
        scraped(&agent, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.split_once("\r\n\r\n").unwrap().1,
    );
    for (series, value) in [
        ("state{state=\"draining\"}", 1.0),
        ("state{state=\"ready\"}", 0.0),
        ("sessions{stage=\"open\"}", 1.0),
        ("sessions_opened_total", 1.0),
        ("sessions_ended_total{how=\"closed\"}", 0.0),
        ("sessions_refused_total{reason=\"draining\"}", 1.0),
        ("sessions_refused_total{reason=\"too_many\"}", 0.0),
        ("peers_refused_total{reason=\"handshake\"}", 0.0),
        ("tasks_refused_total{reason=\"share_used_up\"}", 0.0),
        ("calls_refused_total{reason=\"keeper\"}", 1.0),
        ("tasks{state=\"finished\"}", 1.0),
        ("tasks_accepted_total", 1.0),
        ("tasks_ended_total{outcome=\"failed\"}", 1.0),
        ("tasks_ended_total{outcome=\"passed\"}", 0.0),
        ("logged_bytes_total", 8.0),
        ("blobs_disk_limit_bytes", 300.0),
        ("audit_lost_total", 0.0),
    ] {
        assert_eq!(before.get(series), Some(&value), "{series}: {before:#?}");
    }
    assert!(controller.close().await.is_empty());
    keeper.undrain(v1::UndrainRequest {}).await.unwrap();
    agent.end().await;

    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains("hunter2"), "what a block prints, or is told, is nobody's business here: {text}");
    let records: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let events: Vec<_> = records.iter().map(|record| record["event"].as_str().unwrap()).collect();
    assert_eq!(
        events,
        [
            "session.opened",
            "task.accepted",
            "task.ended",
            "call.refused",
            "host.drained",
            "session.refused",
            "session.ended",
            "host.undrained"
        ]
    );
    for record in &records {
        assert!(record["time"].as_str().unwrap().ends_with('Z') && record["host"].is_string(), "{record}");
    }
    let (accepted, ended) = (&records[1], &records[2]);
    for record in [accepted, ended] {
        assert_eq!(record["owner"], "millstream://controller/alice");
        assert_eq!(
            (&record["client"], &record["stream"], &record["block"]),
            (&"a test".into(), &"s".into(), &"b".into())
        );
        assert_eq!(record["task"], task.as_str());
        assert_eq!(record["session"], controller.key.session_id.as_str());
    }
    assert_eq!(accepted["program"], "sh");
    assert_eq!(
        (&ended["outcome"], &ended["reason"], &ended["exit_code"]),
        (&"failed".into(), &"exited".into(), &"3".into())
    );
    assert_eq!(records[5]["reason"], "draining");
    assert_eq!(records[4]["reason"], "a look inside");
}

#[tokio::test]
async fn every_refusal_is_counted_and_told_once_unless_it_is_a_flood() {
    let state = tempfile::tempdir().unwrap();
    let (config, path) = recorded(state.path());
    let bounds = Bounds { each: Share { tasks: Some(1), sessions: Some(1) }, ..Bounds::default() };
    let agent = Agent::start_configured(DoorConfig { bounds, ..config }).await;
    let mut alice = agent.controller().await;
    alice.open(opening()).await;
    alice.start(spec(1, "true")).await;
    let over = alice.start_request(spec(2, "true"));
    alice.client.start_task(over).await.unwrap_err();
    alice
        .client
        .open_session(v1::OpenSessionRequest { protocol_min: 98, protocol_max: 99, ..opening() })
        .await
        .unwrap_err();
    // Each of the others comes from elsewhere, as the kernel tells.
    let mut bob = agent.client(Caller::Local { uid: geteuid().as_raw() }).await;
    bob.keep_session(v1::KeepSessionRequest { session: Some(alice.key.clone()) }).await.unwrap_err();
    bob.close_session(v1::CloseSessionRequest { session: Some(alice.key.clone()) }).await.unwrap_err();
    let mut stranger = agent.client(Caller::Local { uid: 4_294_967_294 }).await;
    for _ in 0..40 {
        stranger.undrain(v1::UndrainRequest {}).await.unwrap_err();
    }
    // Who waits in line has not been refused.
    bob.open_session(v1::OpenSessionRequest {
        exclusive: true,
        wait_duration: Some(convert::duration(Duration::ZERO)),
        ..opening()
    })
    .await
    .unwrap_err();
    let page = scraped(&agent, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let counts = parsed(page.split_once("\r\n\r\n").unwrap().1);
    let refused: BTreeMap<_, _> =
        counts.into_iter().filter(|(series, count)| series.contains("refused") && *count > 0.0).collect();
    let expected = [
        ("calls_refused_total{reason=\"keeper\"}", 40.0),
        ("calls_refused_total{reason=\"not_yours\"}", 2.0),
        ("sessions_refused_total{reason=\"version\"}", 1.0),
        ("tasks_refused_total{reason=\"share_used_up\"}", 1.0),
    ];
    assert_eq!(refused, expected.map(|(series, count)| (series.to_owned(), count)).into());
    agent.end().await;

    let text = fs::read_to_string(&path).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let told: Vec<String> = records
        .filter(|record| record["event"].as_str().unwrap().ends_with(".refused"))
        .map(|record| {
            let word = |name: &str| record[name].as_str().unwrap_or("-").to_owned();
            ["event", "peer", "owner", "reason"].map(word).join(" ")
        })
        .collect();
    let own = format!("local user {}", geteuid().as_raw());
    let mut expected = vec![
        "task.refused unix millstream://controller/alice share_used_up".to_owned(),
        "session.refused unix millstream://controller/alice version".to_owned(),
        format!("call.refused unix {own} not_yours"),
        format!("call.refused unix {own} not_yours"),
    ];
    expected.extend(vec!["call.refused unix local user 4294967294 keeper".to_owned(); 5]);
    assert_eq!(told, expected);
    assert!(!text.contains(&alice.key.secret), "a secret is on record: {text}");
}

#[tokio::test]
async fn whoever_is_sent_away_is_on_record_with_where_it_came_from() {
    let state = tempfile::tempdir().unwrap();
    let (config, path) = recorded(state.path());
    let door = Door::open(config, World::system()).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(door.serve(vec![Listener::Loopback(listener)], drop, shutdown.clone()));
    let mut peer = TcpStream::connect(address).await.unwrap();
    peer.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    // Either way of closing will do.
    drop(timeout(PATIENCE, peer.read_to_end(&mut Vec::new())).await.unwrap());
    shutdown.cancel();
    serving.await.unwrap().unwrap();
    let record: serde_json::Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(record["event"], "peer.refused");
    assert_eq!(record["peer"], peer.local_addr().unwrap().to_string());
    assert_eq!((&record["claims"], &record["reason"]), (&"nothing".into(), &"not_http2".into()));
}

#[tokio::test]
async fn scrapers_get_numbers_at_one_path_alone() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let head = |answer: &str| answer.lines().next().unwrap().to_owned();
    let found = scraped(&agent, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(head(&found), "HTTP/1.1 200 OK");
    assert!(found.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{found}");
    let elsewhere = scraped(&agent, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(head(&elsewhere), "HTTP/1.1 404 Not Found");
    assert!(elsewhere.ends_with("the numbers are at /metrics\n"));
    let posted = scraped(&agent, "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(head(&posted), "HTTP/1.1 405 Method Not Allowed");
    assert_eq!(head(&scraped(&agent, "nonsense\r\n\r\n").await), "HTTP/1.1 400 Bad Request");
    agent.end().await;
}
