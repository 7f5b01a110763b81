//! An agent in a container: `podman://image=fedora` makes one, `docker://box` takes one that runs.
//!
//! The engine is driven by its own command, as a person would. The agent is brought along as one static file, so that the
//! image may be empty; pipes to it are `exec` of the same file. In a container that is made, the agent is the main process
//! and ends when nobody has used it for a while: a test that is killed leaves nothing that stays.

mod engine;
mod recipe;

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    clock::{Ids as _, SystemIds},
    limits,
};
use tokio::{sync::Mutex, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    engine::{Engine, EngineError},
    recipe::{Recipe, Remove, words},
};
use super::{
    DialError, Dialing, Place, PlaceError, Reach,
    child::{ChildPipe, Children},
    only_options, program,
};

/// All that a definition may say.
pub(crate) const KEYS: [&str; 13] = [
    "name", "image", "create", "remove", "mounts", "network", "memory", "cpus", "pids", "options", "engine",
    "agent", "idle",
];
/// Where the agent's program lies in a container that was made.
const PROGRAM: &str = "/.millstream-agent";
/// Its socket there.
const SOCKET: &str = "/run/millstream/agent.sock";
/// How long it stays there without being used, unless the definition says otherwise: longer than leases usually are, so that
/// a controller can come back.
const IDLE: &str = "90s";
/// How long one dial waits for a container that is being made. The making goes on, and the next dial finds it.
const MAKING_MAX: Duration = Duration::from_secs(20);
const _: () = assert!(MAKING_MAX.as_millis() < limits::REACH_MAX.as_millis());
/// Digits of the digest that name a program in a container that is somebody else's.
const DIGITS: usize = 16;
/// Seconds from asking a container that is kept to end to its end.
const STOP_SECONDS: &str = "2";
/// Label of every container that is made; its value is another one for each.
const LABEL: &str = "millstream";

/// A container and the way into it.
#[derive(Debug)]
pub(crate) struct Container {
    kind: String,
    host: String,
    wanted: Arc<Wanted>,
    stage: Arc<Mutex<Stage>>,
    /// The engine's commands that are pipes.
    children: Children,
    /// The test is over: nothing is made any more.
    closing: CancellationToken,
    failed: AtomicBool,
    /// It has ended by itself, or somebody ended it: with everything in it.
    gone: AtomicBool,
}

/// What is wanted of which engine.
#[derive(Debug)]
struct Wanted {
    engine: Engine,
    recipe: Recipe,
    label: String,
    /// The agent's program, when the definition names it.
    agent: Option<String>,
    /// How long the agent stays there without being used, when the definition says so.
    idle: Option<String>,
}

/// How far a container is.
#[derive(Debug)]
enum Stage {
    Wanted,
    /// It runs, and the agent's program lies there in it.
    There {
        program: String,
    },
    Released,
}

impl Container {
    pub(crate) fn new(place: &Place) -> Result<Self, PlaceError> {
        only_options(place, &KEYS)?;
        let token = SystemIds.token();
        let label = token[..12].to_owned();
        let recipe = Recipe::of(place, &format!("millstream-{label}"))?;
        let mut engine = words(place, "engine")?;
        if engine.is_empty() {
            engine.push(place.kind.clone());
        }
        let host = match &recipe {
            Recipe::New { shares_network: true, .. } => "localhost".to_owned(),
            recipe => recipe.name().to_owned(),
        };
        let engine = Engine::new(engine);
        let agent = place.options.get("agent").cloned();
        let idle = place.options.get("idle").cloned();
        let wanted = Wanted { engine, recipe, label, agent, idle };
        Ok(Self {
            kind: place.kind.clone(),
            host,
            wanted: Arc::new(wanted),
            stage: Arc::new(Mutex::new(Stage::Wanted)),
            children: Children::default(),
            closing: CancellationToken::new(),
            failed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        })
    }

    /// Where the agent's program lies in the container, which is made when it is not there.
    async fn there(&self) -> Result<String, DialError> {
        let (wanted, stage) = (Arc::clone(&self.wanted), Arc::clone(&self.stage));
        let closing = self.closing.clone();
        // Nobody who gives up waiting leaves half a container behind.
        let making = tokio::spawn(async move {
            let mut stage = stage.lock().await;
            match &*stage {
                Stage::There { program } => return Ok(program.clone()),
                Stage::Released => return Err(OVER.to_owned()),
                Stage::Wanted => {}
            }
            let made = tokio::select! {
                biased;
                () = closing.cancelled() => Err(OVER.to_owned()),
                made = wanted.make() => made,
            };
            match &made {
                Ok(program) => *stage = Stage::There { program: program.clone() },
                Err(_) => wanted.remove_what_was_begun().await,
            }
            made
        });
        match timeout(MAKING_MAX, making).await {
            Ok(Ok(made)) => made.map_err(|reason| self.failed(reason, true)),
            // The runtime of the test has ended.
            Ok(Err(_ended)) => Err(self.failed(OVER.to_owned(), true)),
            Err(_elapsed) => {
                let reason = "it is still being made: an image that is large is best pulled before the test";
                Err(self.failed(reason.to_owned(), false))
            }
        }
    }

    /// The engine's command that leads to the agent inside.
    fn way_in(&self, program: &str, token: &str) -> Vec<String> {
        let mut words = self.wanted.exec(program, &["stdio", "--greeting", token]);
        match self.wanted.recipe {
            // The agent that is there, and no other.
            Recipe::New { .. } => words.extend(strings(["--socket", SOCKET])),
            Recipe::Running { .. } => {
                words.extend(self.wanted.idle.iter().flat_map(|idle| strings(["--idle", idle])));
            }
        }
        words
    }

    async fn enter(&self, program: &str) -> Result<ChildPipe, EngineError> {
        let token = SystemIds.token();
        let (engine, words) = (&self.wanted.engine, self.way_in(program, &token));
        let spawned = self.children.spawn(engine.command(&words));
        let mut pipe = spawned.map_err(|source| engine.not_started(&words, source))?;
        match pipe.answer(&token).await {
            Ok(_) => Ok(pipe),
            Err(error) => Err(EngineError::Silent { asked: engine.asked(&words), error }),
        }
    }

    fn failed(&self, reason: String, is_final: bool) -> DialError {
        DialError::Program { what: self.describe(), reason, is_final }
    }
}

/// What is said inside as long as the agent does not listen.
const NOT_YET: &str = "no agent listens on";
/// Why nothing is brought.
const NO_AGENT: &str = "there is no agent to bring: put a static `millstream-agent` (`deploy/build-static` makes one) into a \
                        directory of PATH, or name it with `agent` or MILLSTREAM_AGENT";
/// Why nothing is made.
const OVER: &str = "the test is over";

impl Wanted {
    /// Makes the container, or looks at one that runs, and brings the agent's program.
    async fn make(&self) -> Result<String, String> {
        let program = program::find(self.agent.as_deref()).await.map_err(|error| error.to_string())?;
        let Some((path, digest)) = program.file() else { return Err(NO_AGENT.to_owned()) };
        let Some(path) = path.to_str() else { return Err(format!("`{}` is no text", path.display())) };
        self.make_with(path, digest).await.map_err(|error| error.to_string())
    }

    async fn make_with(&self, agent: &str, digest: &str) -> Result<String, EngineError> {
        match &self.recipe {
            Recipe::New { name, image, remove, options, .. } => {
                let label = format!("{LABEL}={}", self.label);
                let mut create = strings(["create", "--name", name, "--label", &label, "--user", "0"]);
                create.extend(strings(["--entrypoint", PROGRAM]));
                // For a test that is killed: the engine removes the container when the agent has ended.
                create.extend((*remove == Remove::Always).then(|| "--rm".to_owned()));
                create.extend_from_slice(options);
                create.extend(strings([image, "serve", "--idle", self.idle.as_deref().unwrap_or(IDLE)]));
                self.engine.run(&create).await?;
                self.bring(agent, PROGRAM).await?;
                self.engine.run(&strings(["start", name])).await?;
                Ok(PROGRAM.to_owned())
            }
            Recipe::Running { .. } => {
                // Several tests may bring several versions.
                let program = format!("{PROGRAM}-{}", &digest[..DIGITS]);
                let version = self.exec(&program, &["--version"]);
                match self.engine.run(&version).await {
                    Ok(_) => {}
                    Err(error) if error.is_gone() => return Err(error),
                    Err(_not_there_yet) => self.bring(agent, &program).await?,
                }
                Ok(program)
            }
        }
    }

    /// Copies the agent's program into the container.
    async fn bring(&self, agent: &str, program: &str) -> Result<(), EngineError> {
        let to = format!("{}:{program}", self.recipe.name());
        self.engine.run(&strings(["cp", agent, &to])).await.map(drop)
    }

    /// The engine's arguments that run the agent's program inside. The agent is root there: it starts blocks as any user.
    fn exec(&self, program: &str, arguments: &[&str]) -> Vec<String> {
        let mut words = strings(["exec", "--interactive", "--user", "0", self.recipe.name(), program]);
        words.extend(arguments.iter().map(|word| (*word).to_owned()));
        words
    }

    /// Removes what this has made, wherever it was interrupted, and nothing else of the same name.
    async fn remove_what_was_begun(&self) {
        let Recipe::New { .. } = self.recipe else { return };
        let filter = format!("label={LABEL}={}", self.label);
        let found = self.engine.run(&strings(["ps", "--all", "--quiet", "--filter", &filter])).await;
        for id in found.unwrap_or_default().split_whitespace() {
            self.remove(id).await;
        }
    }

    /// Removes a container, running or not.
    async fn remove(&self, container: &str) {
        match self.engine.run(&strings(["rm", "--force", container])).await {
            Ok(_) => {}
            Err(error) => warn!(container, %error, "a container could not be removed"),
        }
    }

    /// Gives back what was made.
    async fn give_back(&self, failed: bool) {
        let Recipe::New { name, remove, .. } = &self.recipe else { return };
        match remove {
            Remove::OnSuccess if failed => {}
            Remove::Always | Remove::OnSuccess => return self.remove(name).await,
            Remove::Never => {}
        }
        match self.engine.run(&strings(["stop", "-t", STOP_SECONDS, name])).await {
            Ok(_) => info!(container = name, "kept; `rm` removes it"),
            Err(error) => warn!(container = name, %error, "a container that is kept could not be stopped"),
        }
    }
}

fn strings<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

impl Reach for Container {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let program = self.there().await?;
            match self.enter(&program).await {
                Ok(pipe) => Ok(Box::new(pipe) as _),
                Err(error) => {
                    self.gone.store(error.is_gone(), Ordering::Relaxed);
                    let reason = error.to_string();
                    // It is just starting.
                    let is_final = !reason.contains(NOT_YET);
                    Err(self.failed(reason, is_final))
                }
            }
        })
    }

    fn describe(&self) -> String {
        match &self.wanted.recipe {
            Recipe::New { name, image, .. } => format!("{}://{name}?image={image}", self.kind),
            Recipe::Running { name } => format!("{}://{name}", self.kind),
        }
    }

    fn host(&self) -> String {
        self.host.clone()
    }

    fn survives_disconnect(&self) -> bool {
        !self.gone.load(Ordering::Relaxed)
    }

    fn dial_max(&self) -> Duration {
        limits::REACH_MAX
    }

    fn task_failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    fn release(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            self.closing.cancel();
            let (wanted, stage) = (Arc::clone(&self.wanted), Arc::clone(&self.stage));
            let failed = self.failed.load(Ordering::Relaxed);
            // It goes on when the caller has waited long enough.
            let giving_back = tokio::spawn(async move {
                let mut stage = stage.lock().await;
                if let Stage::There { .. } = std::mem::replace(&mut *stage, Stage::Released) {
                    wanted.give_back(failed).await;
                }
            });
            let _the_runtime_ended = giving_back.await;
            self.children.end().await;
        })
    }
}
