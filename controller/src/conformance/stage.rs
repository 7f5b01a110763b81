//! What every rule of the scenario needs: streams of a test of its own, files to ship, and waits with a bound.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use millstream_common::text::spoken;
use tokio::time::timeout;

use super::{cuttable::Cuttable, samples};
use crate::{
    block::Block,
    definition::Definition,
    outcome::{Outcome, OutcomeKind},
    reach::Reach,
    stream::Stream,
    streams::Streams,
    task::Task,
};

/// How long anything may take that takes moments on an idle host, first contact included.
pub(super) const STEP_MAX: Duration = Duration::from_secs(90);
/// Control and bulk.
const PIPES_PER_SESSION: usize = 2;
/// Bytes of the large sample: more than any buffer on the way, and more than what rides with the end of a task.
pub(super) const LARGE_BYTES: usize = 6 * 1024 * 1024;
/// Bytes of the other one, for the other output.
pub(super) const SMALL_BYTES: usize = 1024 * 1024;

/// The place that is examined, and what is shipped there.
pub(super) struct Stage {
    pub(super) there: Arc<Cuttable>,
    directory: PathBuf,
    /// The samples, as they are in `large` and `small`.
    pub(super) large: Vec<u8>,
    pub(super) small: Vec<u8>,
}

impl Stage {
    pub(super) fn new(directory: &Path, there: &Arc<Cuttable>) -> io::Result<Self> {
        let stage = Self {
            there: Arc::clone(there),
            directory: directory.to_path_buf(),
            large: samples::bytes(1, LARGE_BYTES),
            small: samples::bytes(2, SMALL_BYTES),
        };
        fs::create_dir_all(stage.shipped())?;
        fs::write(stage.large_path(), &stage.large)?;
        fs::write(stage.small_path(), &stage.small)?;
        Ok(stage)
    }

    /// Where files lie that are shipped.
    pub(super) fn shipped(&self) -> PathBuf {
        self.directory.join("shipped")
    }

    pub(super) fn large_path(&self) -> PathBuf {
        self.shipped().join("large")
    }

    pub(super) fn small_path(&self) -> PathBuf {
        self.shipped().join("small")
    }

    /// A program to ship.
    pub(super) fn program(&self, name: &str, text: &str) -> Result<PathBuf, String> {
        let path = self.shipped().join(name);
        let write = || {
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        };
        write().map_err(|error| format!("the suite could not write `{}`: {error}", path.display()))?;
        Ok(path)
    }

    /// A test of its own for one rule, with the streams `there` and `beside` of the place, and `here` of this machine.
    pub(super) fn open(&self, name: &str) -> Result<Act, String> {
        let there = || Definition::reach(Arc::clone(&self.there) as Arc<dyn Reach>);
        let streams = Streams::builder(name)
            .only_given()
            .results_dir(&self.directory)
            .stream("there", there())
            .stream("beside", there())
            .stream("here", Definition::local())
            .open()
            .map_err(|error| error.to_string())?;
        // Those before were counted for the rule before.
        let _before = self.there.pipes_made();
        Ok(Act { streams, there: Arc::clone(&self.there) })
    }
}

/// The streams of one rule. Dropping it closes them.
pub(super) struct Act {
    pub(super) streams: Streams,
    there: Arc<Cuttable>,
}

impl Act {
    fn stream(&self, name: &str) -> Result<Stream, String> {
        self.streams.get(name).map_err(|error| error.to_string())
    }

    pub(super) fn there(&self, block: Block) -> Result<Task, String> {
        Ok(self.stream("there")?.run_bg(block))
    }

    pub(super) fn beside(&self, block: Block) -> Result<Task, String> {
        Ok(self.stream("beside")?.run_bg(block))
    }

    pub(super) fn here(&self, block: Block) -> Result<Task, String> {
        Ok(self.stream("here")?.run_bg(block))
    }

    /// Runs a block there to its end, which must be good.
    pub(super) async fn passes(&self, block: Block) -> Result<Arc<Outcome>, String> {
        passed(&self.there(block)?).await
    }

    /// Ends the session. What could not be tidied is told, and pipes that broke although nobody cut them: a session makes
    /// good for them, so that nothing else shows it.
    pub(super) async fn close(self) -> Result<(), String> {
        match timeout(STEP_MAX, self.streams.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(format!("closing the streams: {error}")),
            Err(_elapsed) => return Err(format!("the streams were not closed within {}", spoken(STEP_MAX))),
        }
        match self.there.pipes_made() {
            Some(made) if made > PIPES_PER_SESSION => Err(format!(
                "one session took {made} pipes instead of {PIPES_PER_SESSION}: some broke although nobody cut them"
            )),
            _ => Ok(()),
        }
    }
}

/// What came of a task, within the bound; else what it does instead.
pub(super) async fn ended(task: &Task) -> Result<Arc<Outcome>, String> {
    match timeout(STEP_MAX, task.outcome()).await {
        Ok(outcome) => Ok(outcome),
        Err(_elapsed) => Err(format!(
            "task {} did not end within {}: {}",
            task.label(),
            spoken(STEP_MAX),
            task.explain().await
        )),
    }
}

/// As [`ended`], for a task that has to pass.
pub(super) async fn passed(task: &Task) -> Result<Arc<Outcome>, String> {
    let outcome = ended(task).await?;
    if outcome.passed() { Ok(outcome) } else { Err(outcome.to_string()) }
}

/// As [`ended`], for a task that has to end in one way.
pub(super) async fn ended_as(task: &Task, kind: OutcomeKind) -> Result<Arc<Outcome>, String> {
    let outcome = ended(task).await?;
    if outcome.kind == kind {
        Ok(outcome)
    } else {
        Err(format!("it should have ended as `{kind}`: {outcome}"))
    }
}

/// The outputs as they were written.
pub(super) fn printed(outcome: &Outcome) -> Result<(Vec<u8>, Vec<u8>), String> {
    // There is no file for an output that nothing was written to.
    let output = |path: &Path| if path.exists() { read(path) } else { Ok(Vec::new()) };
    Ok((output(&outcome.stdout_path())?, output(&outcome.stderr_path())?))
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("`{}` cannot be read: {error}", path.display()))
}

/// Fails unless the text is what was expected.
pub(super) fn is_text(what: &str, expected: &str, came: &str) -> Result<(), String> {
    if expected == came { Ok(()) } else { Err(format!("{what} is {came:?} instead of {expected:?}")) }
}
