//! Those who wait in line for the host: what operators see of them, and what becomes of one that goes.

use std::{
    pin::pin,
    task::{Context, Waker},
};

use super::*;
use crate::{
    door::identity::Peer,
    session::{Asking, Owner, Secret},
};

fn asking(name: &str) -> Asking {
    Asking {
        session_id: SystemIds.session_id(),
        secret: Secret::parse(&SystemIds.token()).unwrap(),
        owner: Owner(format!("millstream://controller/{name}")),
        client: format!("{name}'s test"),
        lease: limits::LEASE,
        exclusive: true,
        resume: false,
        patience: limits::OPEN_WAIT_MAX,
    }
}

fn peer() -> Peer {
    Peer { caller: Caller::Starter, address: None }
}

#[tokio::test]
async fn a_reserved_host_is_waited_for_and_given_on() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut first = agent.controller().await;
    first.open(v1::OpenSessionRequest { exclusive: true, ..opening() }).await;
    let mut second = agent.controller().await;
    let waiting = async {
        second.open(opening()).await;
        second.close().await
    };
    let closing = async { first.close().await };
    let (waited, closed) = tokio::join!(waiting, closing);
    assert!(waited.is_empty() && closed.is_empty());
    agent.end().await;
}

#[tokio::test]
async fn operators_see_who_waits_since_when_in_which_order() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(v1::OpenSessionRequest { exclusive: true, ..opening() }).await;
    let shared = Arc::clone(&agent.shared);
    let peer = peer();
    let mut second = pin!(shared.open(asking("bob"), &peer));
    let mut third = pin!(shared.open(Asking { exclusive: false, ..asking("carol") }, &peer));
    let mut context = Context::from_waker(Waker::noop());
    assert!(
        second.as_mut().poll(&mut context).is_pending() && third.as_mut().poll(&mut context).is_pending()
    );
    let status = shared.status().await;
    let shown: Vec<_> = status
        .waiting
        .iter()
        .map(|waiting| (waiting.owner.as_str(), waiting.client.as_str(), waiting.exclusive))
        .collect();
    assert_eq!(
        shown,
        [
            ("millstream://controller/bob", "bob's test", true),
            ("millstream://controller/carol", "carol's test", false)
        ]
    );
    let opened = status.sessions[0].open_time.unwrap();
    assert!(status.waiting.iter().all(|waiting| waiting.asked_time.unwrap().seconds >= opened.seconds));
    agent.end().await;
}

#[tokio::test]
async fn a_host_that_was_given_to_somebody_who_has_just_gone_is_given_on() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(v1::OpenSessionRequest { exclusive: true, ..opening() }).await;
    {
        let peer = peer();
        let mut gone = pin!(agent.shared.open(asking("bob"), &peer));
        assert!(gone.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        // Its answer is there when this returns, and nobody has looked at it when the call is dropped.
        controller.close().await;
    }
    let mut next = agent.controller().await;
    let request = v1::OpenSessionRequest { exclusive: true, ..opening() };
    timeout(PATIENCE, next.open(request)).await.unwrap();
    assert_eq!(agent.shared.sessions().iter().count(), 1);
    agent.end().await;
}
