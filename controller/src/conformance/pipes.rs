//! What a reach says of itself, and its pipes before anything runs on them.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};

use millstream_common::{
    limits,
    pipe::{self, BoxedPipe},
    text::{printable, spoken},
};
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::reach::{DialError, Reach};

/// Dials are given up after so many polls: before anything was done, and at each step of a dial that has several.
const POLLS_MAX: usize = 8;

pub(super) fn describes_itself(reach: &dyn Reach, first: &str) -> Result<(), String> {
    let again = reach.describe();
    if again != first {
        return Err(format!("it said `{}` first and `{}` later", first.escape_debug(), again.escape_debug()));
    }
    if first.is_empty() {
        return Err("it is empty: streams of different places would share a session".to_owned());
    }
    if first.chars().any(char::is_control) || first.len() > limits::TEXT_BYTES_MAX {
        return Err(format!(
            "`{}` is not one line of at most {} bytes",
            printable(first.as_bytes(), 200),
            limits::TEXT_BYTES_MAX
        ));
    }
    Ok(())
}

pub(super) fn names_its_host(reach: &dyn Reach, first: &str) -> Result<(), String> {
    let again = reach.host();
    if again != first {
        return Err(format!("it said `{}` first and `{}` later", first.escape_debug(), again.escape_debug()));
    }
    // Addresses of the sixth version have colons and a zone; names have none of what stands around them in a URL.
    let usable = |c: char| c.is_alphanumeric() || "-_.:%".contains(c);
    if !reach.knows_host() {
        return Err("it is not known although a pipe was there: knows_host() says so".to_owned());
    }
    if first.is_empty() || !first.chars().all(usable) {
        return Err(format!(
            "`{}` is no bare name or address: blocks on other hosts are given it to connect to",
            first.escape_debug()
        ));
    }
    Ok(())
}

/// An agent at the other end of one pipe.
struct Agent(AgentServiceClient<Channel>);

impl Agent {
    async fn dial(reach: &dyn Reach) -> Result<Self, String> {
        let pipe = timeout(reach.reach_max(), decided(reach))
            .await
            .map_err(|_| format!("nobody decided within {}", spoken(reach.reach_max())))??;
        let bound = limits::REACH_MAX;
        let channel = timeout(bound, pipe::endpoint_channel(|| async { Ok(pipe) }))
            .await
            .map_err(|_| format!("nothing answered on the pipe within {}", spoken(bound)))?
            .map_err(|error| error.to_string())?;
        let mut agent = Self(AgentServiceClient::new(channel));
        agent.answers().await?;
        Ok(agent)
    }

    /// Asks for something small.
    async fn answers(&mut self) -> Result<(), String> {
        let bound = limits::REACH_MAX;
        match timeout(bound, self.0.get_status(v1::GetStatusRequest::default())).await {
            Ok(Ok(_status)) => Ok(()),
            Ok(Err(status)) => {
                let why = pipe::call_failure(&status);
                Err(format!("the pipe leads to no working agent: {}", printable(why.as_bytes(), 512)))
            }
            Err(_elapsed) => Err(format!("the agent did not answer within {}", spoken(bound))),
        }
    }
}

/// Dials until it is decided: what is pending is dialled again.
async fn decided(reach: &dyn Reach) -> Result<BoxedPipe, String> {
    let bound = reach.dial_max();
    loop {
        match timeout(bound, reach.dial()).await {
            Ok(Ok(pipe)) => return Ok(pipe),
            Ok(Err(DialError::Pending { .. })) => tokio::time::sleep(limits::RECONNECT_PAUSE_MIN).await,
            Ok(Err(error)) => return Err(format!("dial() failed: {error}")),
            Err(_elapsed) => {
                return Err(format!("dial() gave neither a pipe nor an error within {}", spoken(bound)));
            }
        }
    }
}

pub(super) async fn first_contact(reach: &dyn Reach) -> Result<(), String> {
    Agent::dial(reach).await.map(drop)
}

pub(super) async fn two_at_once(reach: &dyn Reach) -> Result<(), String> {
    let amid = |what: &'static str| move |why: String| format!("{what}: {why}");
    let mut first = Agent::dial(reach).await.map_err(amid("the first pipe"))?;
    let mut second = Agent::dial(reach).await.map_err(amid("a second pipe beside the first"))?;
    first.answers().await.map_err(amid("the first pipe, after a second one was made"))?;
    let (one, other) = tokio::join!(first.answers(), second.answers());
    one.map_err(amid("the first pipe, while the second was in use"))?;
    other.map_err(amid("the second pipe, while the first was in use"))?;
    if !reach.survives_disconnect() {
        // The end of one pipe may be the end of the agent.
        return Ok(());
    }
    drop(first);
    second.answers().await.map_err(amid("the second pipe, after the first was dropped"))?;
    Agent::dial(reach).await.map_err(amid("a third pipe, after the first was dropped"))?;
    second.answers().await.map_err(amid("the second pipe, after a third came and went"))
}

pub(super) async fn cancelled_dials(reach: &dyn Reach) -> Result<(), String> {
    for polls in 1..=POLLS_MAX {
        let abandoned = timeout(limits::REACH_MAX, polled(polls, reach.dial())).await;
        abandoned.map_err(|_| format!("dial() hung for {}", spoken(limits::REACH_MAX)))?;
    }
    let mut agent = Agent::dial(reach)
        .await
        .map_err(|why| format!("after {POLLS_MAX} dials that were given up: {why}"))?;
    // Many at a time, as after a cut that hit many streams.
    tokio::join!(polled(1, reach.dial()), polled(2, reach.dial()), polled(3, reach.dial()));
    agent.answers().await.map_err(|why| format!("while other dials were given up: {why}"))
}

/// Polls a future so many times, or until it is ready, and drops it.
async fn polled(times: usize, future: impl Future) {
    let mut future = pin!(future);
    let mut left = times;
    poll_fn(|context| {
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Pending if left > 0 => Poll::Pending,
            _ => Poll::Ready(()),
        }
    })
    .await;
}
