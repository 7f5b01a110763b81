//! The barriers of a running test, for people: who came, who is missing and why, and a hand in it.
//!
//! Speaks to the debugging port that a test opens with `streams.listen`, as grpcurl would: what is done here is marked "by
//! hand" in the test's results.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use clap::{Args, Subcommand};
use millstream_common::{
    clock::World,
    convert, limits,
    pipe::{self, BoxedPipe, ConnectError},
    text::{printable, spoken},
    tls,
};
use millstream_proto::v1::{self, sync_service_client::SyncServiceClient};
use tokio::net::TcpStream;
use tonic::transport::Channel;

use super::print;

/// Options of `board`.
#[derive(Debug, Args)]
pub(super) struct Board {
    /// Where the test listens: what `streams.listen` returned, such as `127.0.0.1:41235`.
    #[arg(value_parser = address)]
    address: SocketAddr,
    #[command(subcommand)]
    act: Option<Act>,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Show every barrier: who came, who is missing and what it does. The default.
    List,
    /// Enter a barrier as one more party, and wait until it is released.
    Enter {
        /// Name of the barrier.
        name: String,
        /// How many parties it is for; what those who wait already have said, unless given.
        #[arg(long, value_name = "COUNT", default_value_t = 0, hide_default_value = true)]
        parties: u32,
        /// For how long at most.
        #[arg(long, value_name = "SPAN", value_parser = humantime::parse_duration)]
        timeout: Option<Duration>,
    },
    /// Keep a barrier from being released: a break point. The patience of those who wait stands still.
    Hold {
        /// Name of the barrier.
        name: String,
    },
    /// Let a barrier go that was held.
    Release {
        /// Name of the barrier.
        name: String,
    },
    /// Break a barrier, for all who wait and all who come.
    Abort {
        /// Name of the barrier.
        name: String,
        /// Why: everybody is told.
        reason: String,
    },
    /// Make a broken barrier usable again.
    Reset {
        /// Name of the barrier.
        name: String,
    },
}

/// Why the board cannot be seen or touched.
#[derive(Debug, thiserror::Error)]
pub(super) enum BoardError {
    #[error(
        "no test listens on {address}: {}; `streams.listen` opens the port and says its address",
        tls::reason(source)
    )]
    Connect {
        address: SocketAddr,
        #[source]
        source: ConnectError,
    },
    #[error(
        "{waiting} waits at {name} for {wanted} parties: to come in for {given} would break it for all; leave `--parties` out, or say \
         `abort` if that is meant"
    )]
    Parties { name: String, waiting: String, wanted: u32, given: u32 },
    #[error("the test refused: {}", pipe::call_failure(source))]
    Call {
        #[source]
        source: Box<tonic::Status>,
    },
    #[error(transparent)]
    Print(Box<super::RunError>),
}

impl Act {
    /// The barrier that it is about.
    fn name(&self) -> Option<&str> {
        match self {
            Self::List => None,
            Self::Enter { name, .. }
            | Self::Hold { name }
            | Self::Release { name }
            | Self::Abort { name, .. }
            | Self::Reset { name } => Some(name),
        }
    }
}

impl From<tonic::Status> for BoardError {
    fn from(source: tonic::Status) -> Self {
        Self::Call { source: Box::new(source) }
    }
}

impl Board {
    pub(super) async fn run(self) -> Result<(), BoardError> {
        let address = self.address;
        let dial = || async move { Ok(Box::new(TcpStream::connect(address).await?) as BoxedPipe) };
        let connected = pipe::endpoint_channel(dial).await;
        let channel = connected.map_err(|source| BoardError::Connect { address, source })?;
        let mut client = SyncServiceClient::new(channel);
        let act = self.act.unwrap_or(Act::List);
        let barriers = barriers(&mut client).await?;
        let hint = act.name().map_or("", |name| hint(name, &barriers));
        let said = match act {
            Act::List => list(&barriers),
            Act::Enter { name, parties, timeout } => {
                check_parties(&name, parties, &barriers)?;
                enter(&mut client, name, parties, timeout).await?
            }
            Act::Hold { name } => {
                client.hold(v1::HoldRequest { name: name.clone(), release: false }).await?;
                format!("{} is held{hint}\n", shown(&name))
            }
            Act::Release { name } => {
                client.hold(v1::HoldRequest { name: name.clone(), release: true }).await?;
                format!("{} is not held any more{hint}\n", shown(&name))
            }
            Act::Abort { name, reason } => {
                client.abort(v1::AbortRequest { name: name.clone(), reason }).await?;
                format!("{} is broken{hint}\n", shown(&name))
            }
            Act::Reset { name } => {
                client.reset(v1::ResetRequest { name: name.clone() }).await?;
                format!("{} can be used again{hint}\n", shown(&name))
            }
        };
        print(&said).map_err(|error| BoardError::Print(Box::new(error)))
    }
}

fn shown(name: &str) -> String {
    printable(name.as_bytes(), limits::BARRIER_NAME_BYTES_MAX)
}

async fn enter(
    client: &mut SyncServiceClient<Channel>,
    name: String,
    parties: u32,
    timeout: Option<Duration>,
) -> Result<String, BoardError> {
    let timeout = timeout.map(convert::duration);
    let request = v1::EnterRequest { name: name.clone(), parties, timeout, ..v1::EnterRequest::default() };
    let entered = client.enter(request).await?.into_inner();
    let waited = entered.wait_duration.and_then(|waited| Duration::try_from(waited).ok()).unwrap_or_default();
    let parties: Vec<String> = entered.parties.iter().map(|party| shown(&party.name)).collect();
    Ok(format!(
        "{} was released, generation {}, after {}: {}\n",
        shown(&name),
        entered.generation,
        spoken(waited),
        parties.join(", ")
    ))
}

/// Every barrier of the test.
async fn barriers(client: &mut SyncServiceClient<Channel>) -> Result<Vec<v1::BarrierStatus>, BoardError> {
    let mut barriers = Vec::new();
    let mut from_index = 0;
    loop {
        let answer = client.list_barriers(v1::ListBarriersRequest { from_index }).await?.into_inner();
        barriers.extend(answer.barriers);
        // The test says where to go on; one that does not would be asked for ever.
        if answer.next_index <= from_index {
            return Ok(barriers);
        }
        from_index = answer.next_index;
    }
}

fn list(barriers: &[v1::BarrierStatus]) -> String {
    let now_ns = World::system().clock.wall_ns();
    let mut said = String::new();
    for barrier in barriers {
        barrier_lines(barrier, now_ns, &mut said);
    }
    if said.is_empty() {
        said.push_str("nobody has entered a barrier yet\n");
    }
    said
}

/// A barrier may be held or broken before anybody comes; but a name that nobody knows is more often a mistake.
fn hint(name: &str, barriers: &[v1::BarrierStatus]) -> &'static str {
    if barriers.iter().any(|barrier| barrier.name == name) {
        ""
    } else {
        "; nobody has come to a barrier of this name yet"
    }
}

/// A person who miscounts must not break what those who wait are right about.
fn check_parties(name: &str, given: u32, barriers: &[v1::BarrierStatus]) -> Result<(), BoardError> {
    let barrier = barriers.iter().find(|barrier| barrier.name == name);
    let arrival = barrier.and_then(|barrier| Some((barrier, barrier.arrivals.first()?)));
    match arrival {
        Some((barrier, arrival)) if given != 0 && barrier.parties != 0 && barrier.parties != given => {
            let (name, waiting) = (shown(name), shown(&arrival.name));
            Err(BoardError::Parties { name, waiting, wanted: barrier.parties, given })
        }
        _ => Ok(()),
    }
}

/// An address, or `localhost` with a port: nothing else is listened on.
fn address(text: &str) -> Result<SocketAddr, String> {
    let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    let parsed = numeric.as_deref().unwrap_or(text).parse();
    parsed.map_err(|_| "not an address with a port, such as 127.0.0.1:41235".to_owned())
}

fn barrier_lines(barrier: &v1::BarrierStatus, now_ns: u64, out: &mut String) {
    let came = match barrier.parties {
        0 => String::new(),
        parties => format!(", {} of {parties} came", barrier.arrivals.len()),
    };
    // Writing to a String cannot fail.
    let _ =
        writeln!(out, "{}: {}, generation {}{came}", shown(&barrier.name), barrier.state, barrier.generation);
    for arrival in &barrier.arrivals {
        let since = now_ns.saturating_sub(ns(arrival.enter_time.as_ref()));
        let left = ns(arrival.timeout_time.as_ref()).saturating_sub(now_ns);
        let lost = if arrival.connected { "" } else { ", connection lost" };
        let _ = writeln!(
            out,
            "  came     {}, {} ago, gives up in {}{lost}",
            shown(&arrival.name),
            spoken(Duration::from_nanos(since)),
            spoken(Duration::from_nanos(left))
        );
    }
    for missing in &barrier.missing {
        let _ = writeln!(out, "  missing  {}", printable(missing.as_bytes(), limits::TEXT_BYTES_MAX));
    }
    if !barrier.broken.is_empty() {
        let _ =
            writeln!(out, "  broken   {}", printable(barrier.broken.as_bytes(), 4 * limits::TEXT_BYTES_MAX));
    }
}

fn ns(time: Option<&prost_types::Timestamp>) -> u64 {
    let Some(time) = time else { return 0 };
    let seconds = u64::try_from(time.seconds).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.nanos).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_person_neither_breaks_a_barrier_by_miscounting_nor_holds_one_that_nobody_knows_unawares() {
        let arrivals =
            vec![v1::BarrierArrival { name: "server/1-a".to_owned(), ..v1::BarrierArrival::default() }];
        let waiting = v1::BarrierStatus {
            name: "setup".to_owned(),
            parties: 2,
            arrivals,
            ..v1::BarrierStatus::default()
        };
        let idle = v1::BarrierStatus { name: "idle".to_owned(), ..v1::BarrierStatus::default() };
        let barriers = [waiting, idle];
        for fine in [("setup", 0), ("setup", 2), ("idle", 7), ("new", 7)] {
            assert!(check_parties(fine.0, fine.1, &barriers).is_ok(), "{fine:?}");
        }
        assert_eq!(
            check_parties("setup", 3, &barriers).unwrap_err().to_string(),
            "server/1-a waits at setup for 2 parties: to come in for 3 would break it for all; leave `--parties` out, or say `abort` \
             if that is meant"
        );
        assert_eq!(hint("idle", &barriers), "");
        assert_eq!(hint("idel", &barriers), "; nobody has come to a barrier of this name yet");
    }

    #[test]
    fn the_test_is_found_by_its_address_or_as_localhost() {
        assert_eq!(address("localhost:41235").unwrap(), address("127.0.0.1:41235").unwrap());
        assert!(address("foo:41235").unwrap_err().contains("such as 127.0.0.1:41235"));
    }

    #[test]
    fn a_barrier_is_shown_with_who_came_and_who_is_missing() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let arrival = v1::BarrierArrival {
            name: "server/1-netserver".to_owned(),
            enter_time: at(100),
            timeout_time: at(160),
            connected: true,
        };
        let waiting = v1::BarrierStatus {
            name: "setup".to_owned(),
            generation: 2,
            state: "waiting".to_owned(),
            parties: 2,
            arrivals: vec![arrival],
            missing: vec!["client/1-netperf: runs \x1b[31m".to_owned()],
            broken: String::new(),
        };
        let broken = v1::BarrierStatus {
            name: "end".to_owned(),
            generation: 1,
            state: "broken".to_owned(),
            broken: "by hand: no".to_owned(),
            ..v1::BarrierStatus::default()
        };
        let mut out = String::new();
        barrier_lines(&waiting, 112_500_000_000, &mut out);
        barrier_lines(&broken, 112_500_000_000, &mut out);
        expect![[r"
            setup: waiting, generation 2, 1 of 2 came
              came     server/1-netserver, 12 s ago, gives up in 47 s
              missing  client/1-netperf: runs \u{1b}[31m
            end: broken, generation 1
              broken   by hand: no
        "]]
        .assert_eq(&out);
    }
}
