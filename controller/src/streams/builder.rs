//! How streams are opened: definitions are gathered, the driver is started, nothing is connected.

use std::{
    env, fmt, io,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use millstream_common::{clock::World, id::TestName, limits, text::spoken};
use serde::Serialize;
use tokio::{
    runtime::{Handle, Runtime},
    sync::watch,
};

use super::{
    OpenError, Streams,
    place::StreamShared,
    shared::{Core, Registry, TestShared},
};
use crate::{
    block::{Resolver, reference::Chain},
    definition::{DEFAULT_PATH, Defined, Definition, Definitions},
    driver::{
        self, Driver, Setup,
        mailbox::Mailbox,
        scribe::{OnLog, Scribe},
    },
    link::LinkOptions,
    nested::{
        Gate,
        inside::{self, Inside},
    },
    params::{Origin, Params, SetParamError, sources::Sources},
    reach::{self, local::Local},
    results::{Layout, writer::ResultsWriter},
    sync::host::SyncHost,
    task::LogLine,
};
/// Variable with the directory of results, when the test names none.
const RESULTS_VARIABLE: &str = "MILLSTREAM_RESULTS_DIR";
/// Directory of results when nobody names one.
const RESULTS_DIRECTORY: &str = "results";
/// Threads of the driver's runtime: one may be busy while the other renews leases.
const WORKERS_COUNT: usize = 2;

/// How streams are to be opened.
#[must_use = "nothing is opened before `open`"]
pub struct StreamsBuilder {
    name: String,
    params: Params,
    /// Set over the parameters when the streams are opened.
    overrides: Vec<Override>,
    /// Where the parameters define streams; the default path when none is named.
    paths: Vec<String>,
    streams: Vec<(String, Definition)>,
    results: Option<PathBuf>,
    layout: Layout,
    strict: bool,
    fails_fast: bool,
    deadline: Duration,
    lease: Duration,
    wait: Option<Duration>,
    together: Option<Vec<String>>,
    on_log: Vec<OnLog>,
    environment: bool,
    resolvers: Vec<Arc<dyn Resolver>>,
    world: World,
    runtime: Option<Handle>,
}

/// One parameter that is set for this test.
struct Override {
    key: String,
    path: String,
    value: Result<serde_json::Value, serde_json::Error>,
    secret: bool,
    origin: Origin,
}

impl Override {
    #[track_caller]
    fn new(key: String, path: String, value: &impl Serialize, secret: bool) -> Self {
        Self { key, path, value: serde_json::to_value(value), secret, origin: Origin::of_caller() }
    }
}

impl fmt::Debug for StreamsBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamsBuilder").field("name", &self.name).finish_non_exhaustive()
    }
}

impl StreamsBuilder {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            params: Params::empty(),
            overrides: Vec::new(),
            paths: Vec::new(),
            streams: Vec::new(),
            results: None,
            layout: Layout::default(),
            strict: false,
            fails_fast: false,
            deadline: limits::TEST_DEADLINE,
            lease: limits::LEASE,
            wait: None,
            together: None,
            on_log: Vec::new(),
            environment: true,
            resolvers: Vec::new(),
            world: World::system(),
            runtime: None,
        }
    }

    /// Parameters of the test: [`Streams::params`] gives them, and they define streams at `/streams/*`. Called again, it
    /// puts the later ones over the earlier, as [`Params::merge`] does.
    pub fn params(mut self, params: Params) -> Self {
        self.params = self.params.merge(params);
        self
    }

    /// Parameters that define streams at another path, such as `/second/streams/*`.
    pub fn params_at(self, params: Params, path: impl Into<String>) -> Self {
        self.params(params).streams_at(path)
    }

    /// A path at which the parameters define streams, such as `*/test1/streams/*`, instead of `/streams/*`. Called again,
    /// it names another place, which only adds names that those before it leave open.
    pub fn streams_at(mut self, path: impl Into<String>) -> Self {
        self.paths.push(path.into());
        self
    }

    /// Sets one parameter for this test, over all files, as [`Params::set`] does.
    #[track_caller]
    pub fn param(mut self, key: impl Into<String>, path: impl Into<String>, value: impl Serialize) -> Self {
        self.overrides.push(Override::new(key.into(), path.into(), &value, false));
        self
    }

    /// Sets one parameter for this test that is never shown, as [`Params::set_secret`] does.
    #[track_caller]
    pub fn secret_param(
        mut self,
        key: impl Into<String>,
        path: impl Into<String>,
        value: impl Serialize,
    ) -> Self {
        self.overrides.push(Override::new(key.into(), path.into(), &value, true));
        self
    }

    /// One stream by its name and where it runs: a URL such as `tls://foo.example.com:7433`, `local`, a [`Definition`], or
    /// a reach. The variable `MILLSTREAM_STREAMS` comes before it, parameters and configuration files after it.
    pub fn stream(mut self, name: impl Into<String>, definition: impl Into<Definition>) -> Self {
        self.streams.push((name.into(), definition.into()));
        self
    }

    /// Directory of results; without it the variable `MILLSTREAM_RESULTS_DIR`, else `results`.
    pub fn results_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.results = Some(directory.into());
        self
    }

    /// How results are laid out.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Streams that nobody defined are errors. Otherwise they are defined on first use, on this machine.
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// The first task that ends unexpectedly ends the test: what has not begun is cancelled, what runs is stopped, each with
    /// the reason `fail_fast` and the name of that task. Teardowns still run. Without this call the others go on.
    pub fn fail_fast(mut self) -> Self {
        self.fails_fast = true;
        self
    }

    /// How long the whole test may take: one hour unless set, at most 7 days. Then every task is stopped, and fails.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How long hosts keep the tasks of a controller that they do not hear: 30 s unless set, from 1 s to 24 h.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long the test waits in line for a host that others have: 10 minutes unless set, at most 7 days. A definition
    /// may say otherwise for its stream (`wait`). [`Task::explain`](crate::Task::explain) says who has the host.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Takes the hosts of these streams together: when the first of them is used, all are asked for one after another, in
    /// one order for all tests, and nothing begins on any of them before all are had. Without this call, those of all
    /// streams that are defined as exclusive are. Two tests that take the same hosts so cannot lock each other out.
    pub fn take_together<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.together.get_or_insert_default().extend(names.into_iter().map(Into::into));
        self
    }

    /// Called for each line that any block prints, on a thread of the library. Output is not read while it runs, so that a
    /// slow one slows the reading down, and nothing else.
    pub fn on_log(mut self, callback: impl Fn(&LogLine) + Send + Sync + 'static) -> Self {
        self.on_log.push(Arc::new(callback));
        self
    }

    /// Takes no streams from the variable `MILLSTREAM_STREAMS` and from configuration files: only what the test says.
    pub fn only_given(mut self) -> Self {
        self.environment = false;
        self
    }

    /// Takes clocks and numbers from `world`, and runs on a runtime of the caller instead of threads of its own: for a
    /// simulation that holds both. The runtime must be driven until the streams are closed; nothing here may block it, so
    /// close them instead of dropping them.
    pub fn simulated(mut self, world: World, runtime: Handle) -> Self {
        (self.world, self.runtime) = (world, Some(runtime));
        self
    }

    /// The parameters with everything that is set over them.
    fn overridden(&mut self) -> Result<(), SetParamError> {
        for one in std::mem::take(&mut self.overrides) {
            self.params.put(&one.key, &one.path, one.value, one.secret, &one.origin)?;
        }
        Ok(())
    }

    /// Adds a resolver of references: it is asked after those that were added before, and before those that everybody
    /// has.
    pub fn resolver(mut self, resolver: impl Resolver + 'static) -> Self {
        self.resolvers.push(Arc::new(resolver));
        self
    }

    /// What code and parameters define, and outside of blocks the environment and configuration files.
    fn definitions(&mut self, nested: bool) -> Result<Vec<Defined>, OpenError> {
        let mut code = Definitions::default();
        for (name, definition) in std::mem::take(&mut self.streams) {
            code.add(definition.named(&name)?)?;
        }
        let sources =
            if self.environment && !nested { Sources::of_this_process() } else { Sources::default() };
        let usual = [DEFAULT_PATH.to_owned()];
        let paths = if self.paths.is_empty() { &usual[..] } else { &self.paths[..] };
        Ok(sources.definitions(code.in_order(), &self.params, paths)?)
    }

    /// Opens the streams. Connects nothing, and makes no reach: that is done for a stream when it is first used. A stream
    /// that cannot be had, because nobody knows its type for example, is defined all the same: [`Streams::get`] and
    /// [`Streams::try_get`] say why.
    ///
    /// # Errors
    /// When a definition, a parameter or a name is not valid, or the results have no place.
    pub fn open(mut self) -> Result<Streams, OpenError> {
        let test = TestName::new(&self.name).map_err(OpenError::Name)?;
        let wait = self.wait.unwrap_or(limits::LINE_WAIT);
        let spans = [
            ("a wait in line", wait, Duration::ZERO, limits::WAIT_MAX),
            ("a deadline", self.deadline, Duration::from_millis(100), limits::WAIT_MAX),
            ("a lease", self.lease, limits::LEASE_MIN, limits::LEASE_MAX),
        ];
        for (what, given, min, max) in spans {
            if given < min || given > max {
                return Err(OpenError::Span {
                    what,
                    given: spoken(given),
                    min: spoken(min),
                    max: spoken(max),
                });
            }
        }
        self.overridden()?;
        let inside = Inside::find();
        // What a block was given comes instead of what lies on its host.
        let inherited = match &inside {
            Some(inside) => {
                inside.streams().map_err(|error| OpenError::Nested { reason: error.to_string() })?
            }
            None => Vec::new(),
        };
        let definitions = self.definitions(inside.is_some())?;
        let reaches = reach::Surroundings { local: Arc::new(Local::new()), slurm: Arc::default() };
        let mut registry = Registry::default();
        for definition in definitions {
            let index = registry.streams.len();
            let stream = Arc::new(StreamShared::new(definition, index, &reaches));
            registry.by_name.insert(stream.name.clone(), index);
            registry.streams.push(stream);
            registry.counts.push(0);
        }
        for stream in inherited {
            if self.environment && !registry.by_name.contains_key(&stream.name) {
                let index = registry.streams.len();
                registry.by_name.insert(stream.name.clone(), index);
                registry.streams.push(Arc::new(stream.shared(index, &reaches)));
                registry.counts.push(0);
            }
        }
        let together = match self.together {
            Some(names) => Some(registry.known(names)?),
            None => None,
        };
        let results = self
            .results
            .or_else(|| inside.as_ref().map(Inside::results))
            .or_else(|| env::var_os(RESULTS_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from))
            .unwrap_or_else(|| PathBuf::from(RESULTS_DIRECTORY));
        let writer = ResultsWriter::create(&results, &test, self.layout)?;
        let (own, runtime) = match self.runtime {
            Some(runtime) => (None, runtime),
            None => {
                let own = own_runtime().map_err(OpenError::Driver)?;
                let handle = own.handle().clone();
                (Some(own), handle)
            }
        };
        let scribe = match &own {
            Some(_) => Scribe::start(self.on_log).map_err(OpenError::Driver)?,
            None => Scribe::in_place(self.on_log),
        };
        let shared = Arc::new(TestShared {
            test: test.clone(),
            registry: Mutex::new(registry),
            together,
            unfinished: watch::Sender::new(0),
        });
        let inbox = Arc::new(Mailbox::new());
        let driver = driver::handle(&inbox, &runtime);
        let sync = SyncHost::new(self.world.clone(), &runtime);
        sync.streams_defined(shared.lock().streams.len());
        let gate = Arc::new(Gate::new(Arc::clone(&shared), self.world.clone()));
        sync.serve_beside(Arc::clone(&gate) as _);
        let (ended, receiver) = watch::channel(None);
        let setup = Setup {
            world: self.world.clone(),
            test: test.clone(),
            deadline: self.deadline,
            fails_fast: self.fails_fast,
            link: LinkOptions {
                lease: self.lease,
                exclusive: false,
                wait,
                in_block: inside.is_some(),
                holdings: Arc::default(),
                client: client_name(&test),
            },
            writer: writer.clone(),
            scribe,
            sync: sync.clone(),
            gate: Arc::clone(&gate),
            shared: Arc::clone(&shared),
            inbox: Arc::clone(&inbox),
        };
        match own {
            None => drop(runtime.spawn(async move { drop(ended.send_replace(Some(drive(setup).await))) })),
            Some(own) => {
                let on_a_thread = move || {
                    let left_behind = own.block_on(drive(setup));
                    own.shutdown_background();
                    ended.send_replace(Some(left_behind));
                };
                let thread = std::thread::Builder::new().name("millstream".to_owned());
                drop(thread.spawn(on_a_thread).map_err(OpenError::Driver)?);
            }
        }
        if inside.is_some() {
            inside::close_when_terminated(driver.clone(), receiver.clone());
        }
        let core = Arc::new(Core {
            shared,
            params: self.params,
            driver,
            sync,
            gate,
            world: self.world,
            writer,
            reaches,
            strict: self.strict,
            resolvers: Chain::new(self.resolvers),
            ended: receiver,
        });
        Ok(Streams { core, closed: false })
    }
}

/// The runtime of a driver that has its own.
fn own_runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS_COUNT)
        .thread_name("millstream-driver")
        .enable_all()
        .build()
}

/// Runs a driver to its end, and tells what it could not tidy.
async fn drive(setup: Setup) -> Vec<String> {
    let (inbox, shared) = (Arc::clone(&setup.inbox), Arc::clone(&setup.shared));
    // As a task of the runtime, and not on the thread that waits for it, it is woken by its neighbours without a detour.
    let driving = tokio::spawn(async move { Driver::new(setup).run().await });
    driving.await.unwrap_or_else(|error| {
        inbox.close();
        shared.abandon();
        vec![format!("the driver failed: {error}")]
    })
}

/// What operators see of this controller.
fn client_name(test: &TestName) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{test} on {host}, process {}", std::process::id())
}
