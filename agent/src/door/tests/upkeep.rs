//! An agent that is drained, and one whose host is not clean.

use std::process::Command;

use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::*;
use crate::session::OpenRefusal;

async fn status(client: &mut AgentServiceClient<Channel>) -> v1::AgentStatus {
    client.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner().status.unwrap()
}

impl Agent {
    async fn health(&self) -> &'static str {
        let (near, far) = duplex(64 * 1024);
        self.connections.send(Connection::from_pipe(Box::new(far), Caller::Loopback)).await.unwrap();
        let channel = endpoint_channel(|| async { Ok(Box::new(near) as BoxedPipe) }).await.unwrap();
        let mut client = HealthClient::new(channel);
        let mut words = Vec::new();
        for service in ["", "millstream.v1.AgentService"] {
            let request = HealthCheckRequest { service: service.to_owned() };
            words.push(client.check(request).await.unwrap().into_inner().status().as_str_name());
        }
        assert_eq!(words[0], words[1]);
        words[0]
    }
}

#[tokio::test]
async fn a_drained_agent_finishes_what_runs_takes_nothing_new_and_stays_so_over_a_restart() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    assert_eq!(agent.health().await, "SERVING");

    let mut keeper = agent.client(Caller::Starter).await;
    let request = v1::DrainRequest { reason: "kernel update".to_owned() };
    let refused = controller.client.drain(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    assert_eq!(keeper.drain(request).await.unwrap().into_inner().sessions_count, 1);
    let task = controller.start(spec(1, "echo goes on")).await;
    assert_eq!(controller.ends("", 1).await.ends[&task].outcome(), v1::OutcomeKind::Passed);
    let mut late = agent.controller().await;
    let refused = late.client.open_session(opening()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let told = refused.message();
    assert!(
        told.starts_with("draining since 2")
            && told.contains("Z by whoever started this agent: kernel update; "),
        "{told}"
    );
    let seen = status(&mut late.client).await;
    assert_eq!((seen.state(), seen.state_reason.contains("kernel update")), (v1::AgentState::Draining, true));
    assert_eq!(seen.drain.unwrap().reason, "kernel update");
    assert_eq!(agent.health().await, "NOT_SERVING");
    assert!(controller.close().await.is_empty());
    agent.end().await;

    let agent = Agent::start(state.path(), true).await;
    let mut late = agent.controller().await;
    let again = late.client.open_session(opening()).await.unwrap_err();
    assert_eq!(again.message(), told, "when it began, who said it and why have been kept");
    let mut keeper = agent.client(Caller::Starter).await;
    assert!(keeper.undrain(v1::UndrainRequest {}).await.unwrap().into_inner().was_draining);
    assert!(!keeper.undrain(v1::UndrainRequest {}).await.unwrap().into_inner().was_draining);
    late.open(opening()).await;
    assert!(late.close().await.is_empty());
    assert_eq!(status(&mut late.client).await.drain, None);
    agent.end().await;
}

#[tokio::test]
async fn a_host_with_a_survivor_is_not_reserved_until_it_is_gone() {
    let state = tempfile::tempdir().unwrap();
    let mut survivor = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = survivor.id();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    // As it would be told by a supervisor that could not end it.
    let session_id = controller.key.session_id.parse().unwrap();
    let supervised = agent.shared.supervised(session_id).unwrap();
    let looking = agent.shared.look_behind(&supervised, vec![format!("{pid} sleep 1000 of s/b")]);
    looking.await;
    assert!(controller.close().await.is_empty());

    let reserving = || v1::OpenSessionRequest { exclusive: true, ..opening() };
    let refused = controller.client.open_session(reserving()).await.unwrap_err();
    let line = format!("process {pid} `sleep 1000` of s/b (millstream://controller/alice, a test)");
    assert_eq!(refused.message(), OpenRefusal::Unclean { count: 1, first: line }.to_string());
    let seen = status(&mut controller.client).await;
    assert_eq!((seen.state(), seen.survivors[0].pid), (v1::AgentState::Unclean, pid));
    controller.open(opening()).await;
    assert!(controller.close().await.is_empty(), "it can still be shared");
    agent.end().await;

    // The next agent knows of it.
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    let seen = status(&mut controller.client).await;
    assert_eq!(
        (seen.state(), seen.survivors[0].owner.as_str()),
        (v1::AgentState::Unclean, "millstream://controller/alice")
    );
    let mut keeper = agent.client(Caller::Starter).await;
    let left = keeper.clean(v1::CleanRequest { force: false }).await.unwrap().into_inner().survivors;
    assert_eq!(left, []);
    assert_eq!(status(&mut controller.client).await.state(), v1::AgentState::Ready);
    controller.open(reserving()).await;
    assert!(controller.close().await.is_empty());
    agent.end().await;
    survivor.wait().unwrap();
}
