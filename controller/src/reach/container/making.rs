//! What is asked of an engine: to make a container, to bring the agent, to remove what was made.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::{
    engine::{Engine, EngineError},
    owner,
    recipe::{Recipe, Remove},
};
use crate::reach::program;

/// Where the agent's program lies in a container that was made.
const PROGRAM: &str = "/.millstream-agent";
/// How long it stays there without being used, unless the definition says otherwise: longer than leases usually are, so that
/// a controller can come back.
const IDLE: &str = "90s";
/// Digits of the digest that name a program in a container that is somebody else's.
const DIGITS: usize = 16;
/// Seconds from asking a container that is kept to end to its end.
const STOP_SECONDS: &str = "2";
/// How often a container is asked to go that is being removed already, and the pause between: as long as a test waits for what
/// it releases.
const REMOVALS_MAX: u32 = 20;
const REMOVAL_PAUSE: Duration = Duration::from_millis(200);
/// Label of every container that is made; its value is another one for each reach.
const LABEL: &str = "millstream";
/// Label that says which process made it.
const OWNER: &str = "millstream.owner";
/// Why nothing is brought.
const NO_AGENT: &str = "there is no agent to bring: put a static `millstream-agent` (`deploy/build-static` makes one) into a \
                        directory of PATH, or name it with `agent` or MILLSTREAM_AGENT";

/// What is wanted of which engine.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) engine: Engine,
    pub(super) recipe: Recipe,
    pub(super) label: String,
    /// The agent's program, when the definition names it.
    pub(super) agent: Option<String>,
    /// How long the agent stays there without being used, when the definition says so.
    pub(super) idle: Option<String>,
    /// Whether something may have been made.
    pub(super) has_begun: AtomicBool,
    /// Whether the engine has to fetch the image first, which it is doing.
    pub(super) fetches: AtomicBool,
}

impl Wanted {
    /// Makes the container, or looks at one that runs, and brings the agent's program.
    pub(super) async fn make(&self) -> Result<String, String> {
        let program = program::find(self.agent.as_deref()).await.map_err(|error| error.to_string())?;
        let Some((path, digest)) = program.file() else { return Err(NO_AGENT.to_owned()) };
        let Some(path) = path.to_str() else { return Err(format!("`{}` is no text", path.display())) };
        self.make_with(path, digest).await.map_err(|error| error.to_string())
    }

    async fn make_with(&self, agent: &str, digest: &str) -> Result<String, EngineError> {
        match &self.recipe {
            Recipe::New { name, image, remove, options, .. } => {
                let (label, owner) =
                    (format!("{LABEL}={}", self.label), format!("{OWNER}={}", owner::this()));
                let mut create = strings(["create", "--name", name, "--label", &label, "--label", &owner]);
                create.extend(strings(["--user", "0", "--entrypoint", PROGRAM]));
                // For a test that is killed: the engine removes the container when the agent has ended.
                create.extend((*remove == Remove::Always).then(|| "--rm".to_owned()));
                create.extend_from_slice(options);
                create.extend(strings([image, "serve", "--idle", self.idle.as_deref().unwrap_or(IDLE)]));
                let looked_up =
                    self.engine.run(&strings(["image", "inspect", "--format", "{{.Id}}", image])).await;
                self.fetches.store(looked_up.is_err(), Ordering::Relaxed);
                self.has_begun.store(true, Ordering::Relaxed);
                let created = self.engine.run(&create).await;
                self.fetches.store(false, Ordering::Relaxed);
                // What an engine refuses to make is not there; of what was interrupted nobody knows.
                self.has_begun.store(created.is_ok(), Ordering::Relaxed);
                created?;
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
    pub(super) fn exec(&self, program: &str, arguments: &[&str]) -> Vec<String> {
        let mut words = strings(["exec", "--interactive", "--user", "0", self.recipe.name(), program]);
        words.extend(arguments.iter().map(|word| (*word).to_owned()));
        words
    }

    /// How a container ended that is not there any more, or not as it was.
    pub(super) async fn fate(&self) -> String {
        let name = self.recipe.name();
        let format = "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}";
        let state =
            self.engine.run(&strings(["inspect", "--type", "container", "--format", format, name])).await;
        let ended =
            match state.as_deref().map(|state| state.split_whitespace().collect::<Vec<_>>()).as_deref() {
                Ok(["exited" | "stopped" | "dead", code, "true"]) => {
                    format!("has ended with exit code {code}, for it had no memory left")
                }
                Ok(["exited" | "stopped" | "dead", code, _]) => format!("has ended with exit code {code}"),
                Ok([state @ ("paused" | "created"), ..]) => format!("is {state}"),
                _ => "is gone: somebody has ended or removed it, or has killed the agent in it".to_owned(),
            };
        let next = match self.recipe {
            Recipe::New { .. } => "whatever runs there next gets a new one",
            Recipe::Running { .. } => "start it again: what runs there next finds it",
        };
        format!("the container `{name}` {ended}; {next}")
    }

    /// Takes its name from a container that has ended, so that another one can have it. One that its definition would keep
    /// stays under another name.
    pub(super) async fn make_way(&self, number: usize) {
        let Recipe::New { name, remove, .. } = &self.recipe else { return };
        let moved = match remove {
            Remove::Always => self.remove().await.into_iter().next(),
            Remove::OnSuccess | Remove::Never => {
                let ended = format!("{name}-ended-{number}");
                self.engine.run(&strings(["rename", name, &ended])).await.err().map(|error| error.to_string())
            }
        };
        if let Some(why) = moved {
            // Whoever makes the next one is told more.
            tracing::debug!(container = name, why, "no way can be made for another container");
        }
    }

    /// Removes what this has made, running or not, and nothing else of the same name. What stays is told.
    pub(super) async fn remove(&self) -> Vec<String> {
        if !self.has_begun.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let mut left = Vec::new();
        for _ in 0..REMOVALS_MAX {
            left = match self.remove_once().await {
                Ok(left) => left,
                Err(error) => return vec![stays(self.recipe.name(), error)],
            };
            // An engine that is removing a container by itself refuses to be asked.
            if !left.iter().any(|(_, error)| error.is_under_way()) {
                break;
            }
            tokio::time::sleep(REMOVAL_PAUSE).await;
        }
        left.into_iter().map(|(id, error)| stays(&id, error)).collect()
    }

    /// Those that could not be removed, each with the reason.
    async fn remove_once(&self) -> Result<Vec<(String, EngineError)>, EngineError> {
        let filter = format!("label={LABEL}={}", self.label);
        let list = strings(["ps", "--all", "--quiet", "--filter", &filter]);
        let mut left = Vec::new();
        for id in self.engine.run(&list).await?.split_whitespace() {
            if let Err(error) = self.engine.run(&strings(["rm", "--force", id])).await {
                left.push((id.to_owned(), error));
            }
        }
        if !left.is_empty() {
            let still = self.engine.run(&list).await?;
            left.retain(|(id, _)| still.split_whitespace().any(|listed| listed == id));
        }
        Ok(left)
    }

    /// Gives back what was made. What could not be is told.
    pub(super) async fn give_back(&self, failed: bool) -> Vec<String> {
        let Recipe::New { name, remove, .. } = &self.recipe else { return Vec::new() };
        match remove {
            Remove::OnSuccess if failed => {}
            Remove::Always | Remove::OnSuccess => return self.remove().await,
            Remove::Never => {}
        }
        match self.engine.run(&strings(["stop", "-t", STOP_SECONDS, name])).await {
            Ok(_) => {
                tracing::info!(container = name, "kept; `rm` removes it");
                Vec::new()
            }
            Err(error) if error.is_gone() => Vec::new(),
            Err(error) => {
                vec![format!("the container `{name}`, which is kept, could not be stopped: {error}")]
            }
        }
    }

    /// Removes containers that were made and never started, by processes of this place that have ended meanwhile: nobody
    /// else would.
    pub(super) async fn sweep(&self) {
        let Recipe::New { .. } = self.recipe else { return };
        let swept = async {
            let filters = ["--filter".to_owned(), format!("label={OWNER}")];
            let mut list = strings(["ps", "--all", "--quiet", "--filter", "status=created"]);
            list.extend(filters);
            let listed = self.engine.run(&list).await?;
            for id in listed.split_whitespace() {
                let format = format!("{{{{index .Config.Labels \"{OWNER}\"}}}}");
                let owner = self
                    .engine
                    .run(&strings(["inspect", "--type", "container", "--format", &format, id]))
                    .await?;
                if owner::is_dead(owner.trim()) {
                    // Not by force: one that somebody has started meanwhile stays.
                    self.engine.run(&strings(["rm", id])).await?;
                }
            }
            Ok::<(), EngineError>(())
        };
        if let Err(error) = swept.await {
            tracing::debug!(%error, "containers of tests that have ended could not be looked for");
        }
    }
}

fn stays(container: &str, why: impl fmt::Display) -> String {
    format!("the container `{container}` could not be removed: {why}")
}

pub(super) fn strings<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}
