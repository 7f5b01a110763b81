//! An agent in a container: `podman://image=fedora` makes one, `docker://box` takes one that runs.
//!
//! The engine is driven by its own command, as a person would. The agent is brought along as one static file, so that the
//! image may be empty; pipes to it are `exec` of the same file. In a container that is made, the agent is the main process
//! and ends when nobody has used it for a while: a test that is killed leaves nothing that stays.

mod engine;
mod making;
mod owner;
mod recipe;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    clock::{Ids as _, SystemIds},
    limits,
};
use tokio::{sync::Mutex, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::{
    engine::{Engine, EngineError},
    making::{Wanted, strings},
    recipe::{Recipe, words},
};
use super::{
    DialError, Dialing, Place, PlaceError, Reach, Releasing, Secrets,
    child::{ChildPipe, Children},
    only_options,
};

/// All that a definition may say.
pub(crate) const KEYS: [&str; 13] = [
    "name", "image", "create", "remove", "mounts", "network", "memory", "cpus", "pids", "options", "engine",
    "agent", "idle",
];
/// Its socket in a container that was made.
const SOCKET: &str = "/run/millstream/agent.sock";
/// How long one dial waits for a container that is being made. The making goes on, and the next dial finds it.
const MAKING_MAX: Duration = Duration::from_secs(20);
const _: () = assert!(MAKING_MAX.as_millis() < limits::REACH_MAX.as_millis());
/// What is said inside as long as the agent does not listen.
const NOT_YET: &str = "no agent listens on";
/// Why nothing is made.
const OVER: &str = "the test is over";

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
    /// It has ended by itself, or somebody ended it: with everything in it. Until a new session may have another one.
    gone: Arc<AtomicBool>,
    /// How often that was so.
    endings: AtomicUsize,
    /// What nobody may read in what the engine was asked.
    secrets: Secrets,
}

/// How far a container is.
#[derive(Debug)]
enum Stage {
    Wanted,
    /// It could not be made, and something of it may be left.
    Begun,
    /// It runs, and the agent's program lies there in it.
    There {
        program: String,
    },
    /// It has ended while it was used; as which of them.
    Gone {
        why: String,
        number: usize,
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
        let (has_begun, fetches) = (AtomicBool::new(false), AtomicBool::new(false));
        let wanted = Wanted { engine, recipe, label, agent, idle, has_begun, fetches };
        Ok(Self {
            kind: place.kind.clone(),
            host,
            wanted: Arc::new(wanted),
            stage: Arc::new(Mutex::new(Stage::Wanted)),
            children: Children::default(),
            closing: CancellationToken::new(),
            failed: AtomicBool::new(false),
            gone: Arc::default(),
            endings: AtomicUsize::new(0),
            secrets: Secrets::of(place),
        })
    }

    /// Where the agent's program lies in the container, which is made when it is not there.
    async fn there(&self) -> Result<String, DialError> {
        let (wanted, stage) = (Arc::clone(&self.wanted), Arc::clone(&self.stage));
        let (closing, gone) = (self.closing.clone(), Arc::clone(&self.gone));
        // Nobody who gives up waiting leaves half a container behind.
        let making = tokio::spawn(async move {
            let mut stage = stage.lock().await;
            match &*stage {
                Stage::There { program } => return Ok(program.clone()),
                Stage::Released => return Err(OVER.to_owned()),
                Stage::Gone { why, .. } if gone.load(Ordering::Relaxed) => return Err(why.clone()),
                Stage::Gone { number, .. } => {
                    warn!(container = wanted.recipe.name(), "it has ended: another one is made in its place");
                    wanted.make_way(*number).await;
                }
                Stage::Wanted | Stage::Begun => {}
            }
            let making = async { tokio::join!(wanted.make(), wanted.sweep()).0 };
            let made = tokio::select! {
                biased;
                () = closing.cancelled() => Err(OVER.to_owned()),
                made = making => made,
            };
            match made {
                Ok(program) => {
                    *stage = Stage::There { program: program.clone() };
                    Ok(program)
                }
                Err(why) => {
                    let left = wanted.remove().await;
                    *stage = if left.is_empty() { Stage::Wanted } else { Stage::Begun };
                    Err(why)
                }
            }
        });
        match timeout(MAKING_MAX, making).await {
            Ok(Ok(made)) => made.map_err(|reason| self.failed(reason, true)),
            // The runtime of the test has ended.
            Ok(Err(_ended)) => Err(self.failed(OVER.to_owned(), true)),
            Err(_elapsed) => Err(self.still_making()),
        }
    }

    /// Only the fetching of an image may take longer than reaching a place does.
    fn still_making(&self) -> DialError {
        match &self.wanted.recipe {
            Recipe::New { image, .. } if self.wanted.fetches.load(Ordering::Relaxed) => {
                let reason = format!("the engine is still fetching the image `{image}`");
                DialError::Pending { reason: self.secrets.hidden_in(reason) }
            }
            _ => self.failed("the engine is still making the container".to_owned(), false),
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

    /// It has ended while it was used. What happened is told to everybody until another one is made.
    async fn gone(&self) -> DialError {
        let why = self.wanted.fate().await;
        let mut stage = self.stage.lock().await;
        if let Stage::There { .. } = &*stage {
            self.gone.store(true, Ordering::Relaxed);
            let number = self.endings.fetch_add(1, Ordering::Relaxed) + 1;
            *stage = Stage::Gone { why: why.clone(), number };
        }
        self.failed(why, true)
    }

    fn failed(&self, reason: String, is_final: bool) -> DialError {
        DialError::Denied { reason: self.secrets.hidden_in(reason), is_final }
    }
}

impl Reach for Container {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let program = self.there().await?;
            match self.enter(&program).await {
                Ok(pipe) => Ok(Box::new(pipe) as _),
                Err(error) if error.is_gone() => Err(self.gone().await),
                Err(error) => {
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

    fn reach_max(&self) -> Duration {
        match self.wanted.recipe {
            Recipe::New { .. } => limits::IMAGE_MAX + limits::REACH_MAX,
            Recipe::Running { .. } => limits::REACH_MAX,
        }
    }

    fn task_failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    fn renew(&self) {
        self.gone.store(false, Ordering::Relaxed);
    }

    fn what_to_check(&self) -> String {
        let engine = self.wanted.engine.asked(&strings(["ps", "--all"]));
        format!("Check what `{engine}` says of the container `{}`", self.wanted.recipe.name())
    }

    fn release(&self) -> Releasing<'_> {
        Box::pin(async {
            self.closing.cancel();
            let (wanted, stage) = (Arc::clone(&self.wanted), Arc::clone(&self.stage));
            let failed = self.failed.load(Ordering::Relaxed);
            // It goes on when the caller has waited long enough.
            let giving_back = tokio::spawn(async move {
                let mut stage = stage.lock().await;
                match std::mem::replace(&mut *stage, Stage::Released) {
                    Stage::There { .. } | Stage::Gone { .. } => wanted.give_back(failed).await,
                    Stage::Begun => wanted.remove().await,
                    Stage::Wanted | Stage::Released => Vec::new(),
                }
            });
            let left = giving_back.await.expect("nothing in it panics, and it is not given up");
            self.children.end().await;
            left.into_iter().map(|what| self.secrets.hidden_in(what)).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

    use expect_test::{Expect, expect};

    use super::*;

    /// Makes containers once it is let, and then cannot start them. Whether it has the image is decided by a file.
    const ENGINE: &str = "#!/bin/sh\n\
        case $1 in\n\
        image) test -e \"$0.image\" ;;\n\
        create) touch \"$0.asked\"; until [ -e \"$0.let\" ]; do sleep 0.05; done ;;\n\
        start) echo 'no space left' >&2; exit 1 ;;\n\
        esac\n";

    fn beside(engine: &Path, what: &str) -> std::path::PathBuf {
        engine.with_extension(what)
    }

    /// What a dial says that has waited for as long as it may while the container is being made.
    async fn check(has_image: bool, expected: Expect) {
        let directory = tempfile::tempdir().unwrap();
        let engine = directory.path().join("engine");
        fs::write(&engine, ENGINE).unwrap();
        fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).unwrap();
        if has_image {
            fs::write(beside(&engine, "image"), "").unwrap();
        }
        let options = [("image", "x"), ("engine", engine.to_str().unwrap()), ("agent", "/bin/sh")];
        let place = Place {
            kind: "podman".to_owned(),
            options: options.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            ..Place::default()
        };
        let container = Arc::new(Container::new(&place).unwrap());
        let dialling = tokio::spawn({
            let container = Arc::clone(&container);
            async move { container.dial().await.err() }
        });
        let asked = async {
            while !beside(&engine, "asked").exists() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(60), asked).await.unwrap();
        let told = container.still_making();
        let is_pending = matches!(told, DialError::Pending { .. });
        expected.assert_eq(&format!("{told}; pending: {is_pending}"));
        fs::write(beside(&engine, "let"), "").unwrap();
        let failed = dialling.await.unwrap().unwrap().to_string();
        assert!(failed.ends_with("no space left"), "{failed}");
        assert!(container.release().await.is_empty());
    }

    #[tokio::test]
    async fn an_image_that_has_to_be_fetched_is_waited_for() {
        check(false, expect!["the engine is still fetching the image `x`; pending: true"]).await;
    }

    #[tokio::test]
    async fn an_engine_that_does_not_answer_has_the_usual_time() {
        check(true, expect!["the engine is still making the container; pending: false"]).await;
    }
}
