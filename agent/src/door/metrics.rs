//! Numbers for Prometheus: in its text format, by HTTP on an address of their own.
//!
//! No label holds anything that a peer has chosen: each set of values is a list of words in this program. Whoever reaches the
//! address may read; names of owners, tests and blocks are not among what is there.

use std::{
    convert::Infallible,
    fmt::{Display, Write as _},
    sync::Arc,
    time::Duration,
};

use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use millstream_common::limits;
use millstream_proto::v1;
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    Shared,
    ledger::counts::{
        CALL_REFUSALS, Count, PEER_REFUSALS, SESSION_ENDS, SESSION_REFUSALS, TASK_REFUSALS, outcomes,
    },
};
use crate::session::Stage;

/// Scrapers at once: a lab has one or two.
const CONNECTIONS_COUNT_MAX: usize = 8;
/// From a connection to the end of its answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// The text format that every version of Prometheus reads.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers scrapers of one agent.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub(super) shared: Arc<Shared>,
}

impl Metrics {
    /// Serves until `stop` is cancelled. One answer a connection: it holds nothing up, and is gone in seconds.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_COUNT_MAX));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept scrapers");
                    tokio::time::sleep(limits::ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                debug!("a scraper was turned away: too many at once");
                continue;
            };
            let shared = Arc::clone(&self.shared);
            tokio::spawn(async move {
                let _place = place;
                let answering = service_fn(move |request| {
                    let shared = Arc::clone(&shared);
                    async move { Ok::<_, Infallible>(answer(&shared, &request).await) }
                });
                let mut http = hyper::server::conn::http1::Builder::new();
                let serving = http
                    .timer(TokioTimer::new())
                    .header_read_timeout(limits::HANDSHAKE_MAX)
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), answering);
                if let Ok(Err(error)) = timeout(ANSWER_MAX, serving).await {
                    debug!(%error, "a scraper was not answered");
                }
            });
        }
    }
}

async fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<String> {
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, FORMAT, text(shared).await),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "the numbers are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(text);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

/// Families of numbers, one after another.
#[derive(Default)]
struct Page(String);

impl Page {
    /// Begins a family; its samples follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ =
            write!(self.0, "# HELP millstream_agent_{name} {help}\n# TYPE millstream_agent_{name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels.iter().map(|(label, word)| format!("{label}=\"{word}\"")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "millstream_agent_{name}{labels} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "counter", help);
        self.sample(name, &[], value);
    }

    fn counters<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        words: impl IntoIterator<Item = &'a &'static str>,
        value: impl Fn(&'static str) -> u64,
    ) {
        self.family(name, "counter", help);
        for word in words {
            self.sample(name, &[(label, word)], value(word));
        }
    }
}

/// Everything, as it is now.
async fn text(shared: &Shared) -> String {
    let mut page = Page::default();
    let numbers = [("version", shared.build.spoken.version)];
    page.family("build_info", "gauge", "Version of the agent's program; always 1.");
    page.sample("build_info", &numbers, 1);
    let uptime = shared.world.clock.since_boot().saturating_sub(shared.started);
    page.gauge("uptime_seconds", "How long the agent's process has run.", uptime.as_secs_f64());
    sessions(shared, &mut page);
    tasks(shared, &mut page);
    counted(shared, &mut page);
    let spool = shared.disk_use.measure(shared).await;
    page.gauge("sessions_disk_bytes", "Disk used by sessions: spools, work, results.", spool.sessions_bytes);
    page.gauge("blobs_disk_bytes", "Disk used by shipped files.", spool.blobs_bytes);
    page.gauge("blobs_disk_limit_bytes", "Disk that shipped files may use.", spool.blobs_bytes_max);
    page.gauge("disk_free_bytes", "Free on the file system of the state directory.", spool.free_bytes);
    page.0
}

fn sessions(shared: &Shared, page: &mut Page) {
    let sessions = shared.sessions();
    let state = match (sessions.draining(), sessions.survivors()) {
        (Some(_), _) => "draining",
        (None, []) => "ready",
        (None, _) => "unclean",
    };
    page.family("state", "gauge", "1 for the state that the agent is in.");
    for word in ["draining", "ready", "unclean"] {
        page.sample("state", &[("state", word)], u8::from(word == state));
    }
    page.gauge("survivors", "Things that ended sessions have left behind.", sessions.survivors().len());
    let stages = sessions.iter().map(|(_, session)| session.stage);
    let open = stages.filter(|stage| *stage == Stage::Open).count();
    page.family("sessions", "gauge", "Sessions: open, or over with their results kept.");
    page.sample("sessions", &[("stage", "open")], open);
    page.sample("sessions", &[("stage", "over")], sessions.iter().count() - open);
    page.gauge("sessions_waiting", "Controllers in line for a session.", sessions.waiting_count());
}

fn tasks(shared: &Shared, page: &mut Page) {
    let mut by_state = [
        (v1::TaskState::Queued, "queued", 0_u64),
        (v1::TaskState::Staged, "staged", 0),
        (v1::TaskState::Running, "running", 0),
        (v1::TaskState::Ending, "ending", 0),
        (v1::TaskState::Finished, "finished", 0),
    ];
    let ids: Vec<_> = shared.sessions().iter().map(|(id, _)| id).collect();
    for supervised in ids.into_iter().filter_map(|id| shared.supervised(id)) {
        for (_, task) in supervised.mirror().iter() {
            for (state, _, count) in &mut by_state {
                *count += u64::from(task.state == *state);
            }
        }
    }
    page.family("tasks", "gauge", "Tasks that are not released, by where they are in their life.");
    for (_, word, count) in by_state {
        page.sample("tasks", &[("state", word)], count);
    }
}

fn counted(shared: &Shared, page: &mut Page) {
    let counts = &shared.ledger.counts;
    let of = |count| move |word| counts.of(count, word);
    let opened = counts.of(Count::SessionsOpened, "");
    page.counter("sessions_opened_total", "Sessions that were opened.", opened);
    let help = "Sessions that are over: closed, expired with their lease, or lost with their supervisor.";
    page.counters("sessions_ended_total", help, "how", SESSION_ENDS, of(Count::SessionsEnded));
    let help = "Askings for a session that were refused.";
    page.counters("sessions_refused_total", help, "reason", SESSION_REFUSALS, of(Count::SessionsRefused));
    let help = "Connections that were sent away: how far they came.";
    page.counters("peers_refused_total", help, "reason", PEER_REFUSALS, of(Count::PeersRefused));
    let help = "Calls that were refused: for keepers of the host only, no such call, not the caller's session, not for everybody on the host, the role may not, unknown caller.";
    page.counters("calls_refused_total", help, "reason", CALL_REFUSALS, of(Count::CallsRefused));
    let accepted = counts.of(Count::TasksAccepted, "");
    page.counter("tasks_accepted_total", "Tasks that were taken in.", accepted);
    let help = "Tasks that were not taken in: their owner has as many as it may have.";
    page.counters("tasks_refused_total", help, "reason", TASK_REFUSALS, of(Count::TasksRefused));
    let outcomes: Vec<_> = outcomes().collect();
    page.counters("tasks_ended_total", "Tasks by outcome.", "outcome", &outcomes, of(Count::TasksEnded));
    page.counter("logged_bytes_total", "Bytes that tasks have printed.", counts.logged_bytes());
    page.counter("audit_lost_total", "Audit records that could not be written.", shared.ledger.audit.lost());
}
