//! The real controller, doors and supervisors on the hosts of a simulated network.
//!
//! Each has a runtime of its own, so that it can be killed as a whole. Between controller and doors lies the simulated
//! network; between a door and its supervisors lie real sockets and files, as on a host.

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use millstream::{
    Definition, Outcome, Streams,
    reach::{DialError, Dialing, PlaceError, Reach, register},
};
use millstream_agent::{
    door::{Connection, Door, DoorConfig, StartSupervisor, Starting, Supervisors, identity::Caller},
    entry::Relaunch,
    session::Bounds,
    supervisor::{
        self,
        disk::{Disk, Host},
    },
};
use millstream_common::{clock::World, protocol::Build};
use tokio::{
    io::copy_bidirectional,
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
};
use tokio_util::sync::CancellationToken;
use turmoil::net::{TcpListener, TcpStream};

use crate::{
    ledger::Ledger,
    plan::{Order, Plan},
    scripts::{pause, scripts},
};

const PORT: u16 = 7433;
/// Bytes under way between the network and a door.
const BUFFER_BYTES: usize = 64 * 1024;

/// What came of a test.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) outcomes: Vec<Arc<Outcome>>,
    /// What closing could not tidy.
    pub(crate) left_behind: Option<String>,
}

/// A disk that may be full.
#[derive(Debug, Default)]
pub(crate) struct SmallDisk {
    pub(crate) full: AtomicBool,
}

impl Disk for SmallDisk {
    fn admit(&self, _file: &Path, _bytes: usize) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

/// One host with an agent: the door, and beside it the supervisors, which go on when the door is killed.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    pub(crate) state: PathBuf,
    pub(crate) number: usize,
    pub(crate) world: World,
    pub(crate) ledger: Ledger,
    pub(crate) told_later: bool,
    pub(crate) disk: Arc<SmallDisk>,
    /// Cuts every connection when it changes.
    pub(crate) cuts: watch::Sender<u32>,
}

impl Agent {
    /// Name of the door in the simulated network.
    pub(crate) fn door(&self) -> String {
        format!("door-{}", self.number)
    }

    /// Name of the place where its supervisors run.
    pub(crate) fn supervisors(&self) -> String {
        format!("supervisors-{}", self.number)
    }

    /// Adds the hosts of door and supervisors.
    pub(crate) fn join(&self, sim: &mut turmoil::Sim<'_>) {
        let (sender, receiver) = mpsc::channel(8);
        let receiver = Arc::new(tokio::sync::Mutex::new(receiver));
        let agent = self.clone();
        sim.host(self.supervisors(), move || {
            let (agent, receiver) = (agent.clone(), Arc::clone(&receiver));
            async move {
                while let Some(order) = receiver.lock().await.recv().await {
                    tokio::spawn(agent.clone().supervise(order));
                }
                Ok(())
            }
        });
        let agent = self.clone();
        let starter = Arc::new(Starter { orders: sender });
        sim.host(self.door(), move || agent.clone().serve(Arc::clone(&starter)));
    }

    async fn supervise(self, order: StartOrder) {
        let StartOrder { directory, listening } = order;
        let ledger = self.ledger.clone();
        let processes = scripts(&self.ledger, &self.world, self.told_later);
        let host = Host { processes, disk: self.disk };
        let begun = move || {
            // A door that was killed meanwhile finds it by its socket.
            let _gone = listening.send(());
        };
        let ended = supervisor::attend(&directory, self.world, |_| Ok(host), begun).await;
        if let Err(error) = ended {
            ledger.open().troubles.push(format!("a supervisor failed: {error:?}"));
        }
    }

    async fn serve(self, starter: Arc<Starter>) -> turmoil::Result {
        let config = DoorConfig {
            state: self.state.clone(),
            relaunch: Relaunch::of_program("/bin/false"),
            base_environment: Vec::new(),
            supervisors: Supervisors::Elsewhere(starter),
            blobs_bytes_max: millstream_common::limits::BLOBS_BYTES_MAX,
            bounds: Bounds::default(),
            build: Build::OURS,
            audit: None,
        };
        let door = Door::open(config, self.world.clone()).await?;
        let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
        let (give, taken) = oneshot::channel();
        let serving = door.serve(Vec::new(), move |to| drop(give.send(to)), CancellationToken::new());
        let serving = tokio::spawn(serving);
        let connections = taken.await?;
        loop {
            let (mut stream, _) = tokio::select! {
                accepted = listener.accept() => accepted?,
                () = connections.closed() => break,
            };
            let (near, mut far) = tokio::io::duplex(BUFFER_BYTES);
            let mut cut = self.cuts.subscribe();
            tokio::spawn(async move {
                tokio::select! {
                    _ended = copy_bidirectional(&mut stream, &mut far) => {}
                    _cut = cut.changed() => {}
                }
            });
            connections.send(Connection::from_pipe(Box::new(near), Caller::Starter)).await?;
        }
        Ok(serving.await??)
    }
}

struct StartOrder {
    directory: PathBuf,
    listening: oneshot::Sender<()>,
}

/// A door's way to the supervisors of its host.
#[derive(Debug)]
struct Starter {
    orders: mpsc::Sender<StartOrder>,
}

impl StartSupervisor for Starter {
    fn start(&self, directory: PathBuf) -> Starting<'_> {
        Box::pin(async move {
            let (listening, begun) = oneshot::channel();
            let order = StartOrder { directory, listening };
            self.orders.send(order).await.map_err(std::io::Error::other)?;
            begun.await.map_err(std::io::Error::other)
        })
    }
}

/// The way to a door through the simulated network.
#[derive(Debug)]
struct Network {
    door: String,
}

impl Reach for Network {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let stream = TcpStream::connect((self.door.as_str(), PORT)).await;
            let stream = stream.map_err(|source| DialError::Connect { address: self.describe(), source })?;
            Ok(Box::new(stream) as _)
        })
    }

    fn describe(&self) -> String {
        self.door.clone()
    }

    fn host(&self) -> String {
        self.door.clone()
    }
}

/// Makes doors places that streams can be on: type `sim`.
pub(crate) fn register_network() {
    register("sim", |place| {
        Ok::<_, PlaceError>(Arc::new(Network { door: place.address.clone() }) as Arc<dyn Reach>)
    });
}

/// A program that may be killed: nothing of it is done when it goes before its end, not even what its values do when they are
/// dropped.
pub(crate) struct Killable<F>(Option<Pin<Box<F>>>);

impl<F> Killable<F> {
    pub(crate) fn new(program: F) -> Self {
        Self(Some(Box::pin(program)))
    }
}

impl<F: Future> Future for Killable<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let program = self.0.as_mut().expect("nobody asks a program that has ended");
        let polled = program.as_mut().poll(context);
        if polled.is_ready() {
            self.0 = None;
        }
        polled
    }
}

impl<F> Drop for Killable<F> {
    fn drop(&mut self) {
        std::mem::forget(self.0.take());
    }
}

/// The test itself: gives its orders, waits for the ends of all tasks, closes. `number` tells apart those that come one after
/// the other.
pub(crate) async fn test(
    plan: Arc<Plan>,
    number: u32,
    world: World,
    results: PathBuf,
    found: Arc<Mutex<Option<Found>>>,
) -> turmoil::Result {
    let mut builder = Streams::builder("simulation").only_given().results_dir(results).lease(plan.lease);
    for (stream, host) in plan.streams.iter().enumerate() {
        let definition = Definition::url(format!("sim://door-{host}"));
        let definition = if plan.exclusive { definition.exclusive() } else { definition };
        builder = builder.stream(format!("s{stream}"), definition);
    }
    let deadline = Duration::from_secs(3_000);
    let streams = builder.deadline(deadline).simulated(world, Handle::current()).open()?;
    let mut tasks = Vec::new();
    let mut prepared = std::collections::VecDeque::new();
    let mut ends = Vec::new();
    for order in &plan.orders {
        match order {
            Order::Run { stream, program } => tasks.push(streams.get(*stream)?.run_bg(program.block(number))),
            Order::Prepare { stream, program } => {
                let held = streams.get(*stream)?.prepare(program.block(number));
                tasks.push(held.task().clone());
                prepared.push_back(held);
            }
            Order::Go => drop(prepared.pop_front().map(millstream::Prepared::start)),
            Order::Stop { task } => ends.push(tasks[*task].stop()),
            Order::Cancel { task } => ends.push(tasks[*task].cancel()),
            Order::Pause { millis } => pause(Duration::from_millis(*millis)).await,
        }
    }
    for held in prepared {
        drop(held.start());
    }
    for end in ends {
        end.await;
    }
    let report = streams.join().await;
    let closed = streams.close().await;
    let left_behind = closed.err().map(|error| error.to_string());
    *found.lock().unwrap() = Some(Found { outcomes: report.outcomes, left_behind });
    Ok(())
}
