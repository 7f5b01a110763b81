//! One place where blocks run one after another, and groups of such places.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use millstream_common::id::StreamName;

use crate::{
    block::Block,
    error::UnexpectedEnd,
    outcome::Outcome,
    streams::{CloseError, Core, StreamShared},
    task::{Prepared, Running, Stage, Task, expected},
};

/// Outcomes of several tasks, in their order, or the first that was unexpected, after all have ended.
pub type Outcomes = Pin<Box<dyn Future<Output = Result<Vec<Arc<Outcome>>, UnexpectedEnd>> + Send>>;

/// One place where blocks run one after another. Cloning gives another handle to the same place.
#[derive(Clone)]
pub struct Stream {
    pub(crate) shared: Arc<StreamShared>,
    pub(crate) core: Arc<Core>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("name", &self.shared.name)
            .field("place", &self.shared.reach().describe())
            .finish_non_exhaustive()
    }
}

impl Stream {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &StreamName {
        &self.shared.name
    }

    /// Its definition as one line, without the secrets in it.
    #[must_use]
    pub fn definition(&self) -> String {
        self.shared.definition()
    }

    /// Its place among the streams, from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.shared.index
    }

    /// The name or address under which blocks of other streams find its host, as its definition has it; 127.0.0.1 for
    /// this machine.
    #[must_use]
    pub fn host(&self) -> &str {
        self.shared.host()
    }

    /// Schedules a block behind the others and returns at once. This never fails: a block that cannot be run ends with
    /// the outcome `error`.
    pub fn run_bg(&self, block: impl Into<Block>) -> Task {
        self.core.schedule(&self.shared, block.into(), false, None)
    }

    /// Schedules a block behind the others, at once and not when the result is first polled, and gives its outcome.
    ///
    /// # Errors
    /// When the task ended unexpectedly.
    ///
    /// # Cancel safety
    /// Dropping the result does not cancel the task.
    pub fn run_fg(&self, block: impl Into<Block>) -> Running {
        Running::new(self.run_bg(block))
    }

    /// Schedules several blocks, one after another: a list of them, or all that a reference names. References are
    /// resolved at once, which reads files here; one that names nothing is one task that ends with the outcome `error`.
    pub fn run_all_bg(&self, blocks: impl Blocks) -> Vec<Task> {
        let mut tasks = Vec::new();
        for block in blocks.into_blocks() {
            let block = block.resolved_by(&self.core.resolvers);
            match block.expand() {
                Ok(blocks) => tasks.extend(blocks.into_iter().map(|block| self.run_bg(block))),
                // It is resolved once more when it is run, and this is what comes of it.
                Err(_) => tasks.push(self.run_bg(block)),
            }
        }
        tasks
    }

    /// Schedules several blocks, one after another, at once, and gives their outcomes: see [`Stream::run_all_bg`].
    ///
    /// # Errors
    /// The first unexpected end, after all have ended.
    ///
    /// # Cancel safety
    /// Dropping the result does not cancel the tasks.
    pub fn run_all_fg(&self, blocks: impl Blocks) -> Outcomes {
        let tasks = self.run_all_bg(blocks);
        Box::pin(async move { outcomes_of(&tasks).await.into_iter().map(expected).collect() })
    }

    /// What came of the tasks of this stream that have ended, in their order, as a JSON list of outcomes.
    ///
    /// # Panics
    /// Never: outcomes have no values that JSON has not.
    #[must_use]
    pub fn results(&self) -> serde_json::Value {
        let outcomes = self.core.outcomes_of(self.name());
        let outcomes: Vec<&Outcome> = outcomes.iter().map(AsRef::as_ref).collect();
        serde_json::to_value(outcomes).expect("outcomes are plain data")
    }

    /// Ends the stream while the test goes on: what runs there is stopped, what waits is cancelled, and nothing begins there
    /// any more. When no other stream is at its place, the session there is closed, so that the host is clean and, if it
    /// was reserved, free for others. Barriers of all streams count it no longer. What its reach has made stays until the
    /// end of the test, which closes every stream that is still open, in any order. Closing it again changes nothing.
    ///
    /// # Errors
    /// [`Error::Close`](crate::Error::Close) when something could not be tidied.
    ///
    /// # Cancel safety
    /// Once polled the stream is closed, whether or not the future is dropped.
    pub async fn close(&self) -> crate::Result<()> {
        match self.core.close_stream(self.index()).await {
            Ok(left_behind) if !left_behind.is_empty() => Err(CloseError { left_behind }.into()),
            // The test has ended meanwhile, and all its streams with it.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Schedules a block, ships its files and creates its process, and holds it there: starting it is one message. It
    /// holds its place in the stream.
    pub fn prepare(&self, block: impl Into<Block>) -> Prepared {
        Prepared::new(self.core.schedule(&self.shared, block.into(), true, None))
    }
}

/// Several blocks: a list of them, or a reference to several.
pub trait Blocks {
    /// The blocks, in their order.
    fn into_blocks(self) -> Vec<Block>;
}

impl Blocks for Block {
    fn into_blocks(self) -> Vec<Block> {
        vec![self]
    }
}

impl<I: IntoIterator<Item = Block>> Blocks for I {
    fn into_blocks(self) -> Vec<Block> {
        self.into_iter().collect()
    }
}

async fn outcomes_of(tasks: &[Task]) -> Vec<Arc<Outcome>> {
    let mut outcomes = Vec::with_capacity(tasks.len());
    for task in tasks {
        outcomes.push(task.outcome().await);
    }
    outcomes
}

/// Several streams, in their order.
#[derive(Debug, Clone, Default)]
pub struct StreamGroup {
    streams: Vec<Stream>,
}

impl StreamGroup {
    pub(crate) fn new(streams: Vec<Stream>) -> Self {
        Self { streams }
    }

    /// Number of streams.
    #[must_use]
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// The streams.
    pub fn iter(&self) -> std::slice::Iter<'_, Stream> {
        self.streams.iter()
    }

    fn size(&self) -> Option<u32> {
        u32::try_from(self.streams.len()).ok()
    }

    /// Runs a block on each stream and returns at once. A barrier that it enters without a number of parties is for as
    /// many as there are streams.
    pub fn run_bg(&self, block: impl Into<Block>) -> Vec<Task> {
        let block = block.into();
        let run = |stream: &Stream| stream.core.schedule(&stream.shared, block.clone(), false, self.size());
        self.streams.iter().map(run).collect()
    }

    /// Runs a block on each stream and gives the outcomes.
    ///
    /// # Errors
    /// The first unexpected end, after all have ended.
    ///
    /// # Cancel safety
    /// The tasks are scheduled when this is called; dropping the future does not cancel them.
    pub fn run_fg(&self, block: impl Into<Block>) -> Outcomes {
        let tasks = self.run_bg(block);
        Box::pin(async move { outcomes_of(&tasks).await.into_iter().map(expected).collect() })
    }

    /// Prepares a block on each stream, then starts all of them at once.
    ///
    /// # Errors
    /// When one could not be prepared, or stands behind a prepared task that was not started.
    ///
    /// # Cancel safety
    /// Dropping the future cancels what was not started yet.
    pub async fn run_synchronized(&self, block: impl Into<Block>) -> Result<Started, StartError> {
        let block = block.into();
        let prepare = |stream: &Stream| {
            Prepared::new(stream.core.schedule(&stream.shared, block.clone(), true, self.size()))
        };
        start_together(self.streams.iter().map(prepare)).await
    }
}

impl IntoIterator for StreamGroup {
    type Item = Stream;
    type IntoIter = std::vec::IntoIter<Stream>;

    fn into_iter(self) -> Self::IntoIter {
        self.streams.into_iter()
    }
}

impl<'a> IntoIterator for &'a StreamGroup {
    type Item = &'a Stream;
    type IntoIter = std::slice::Iter<'a, Stream>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Tasks that were started together.
#[derive(Debug)]
#[non_exhaustive]
pub struct Started {
    /// The tasks, in the order in which they were given.
    pub tasks: Vec<Task>,
    /// From the first beginning to the last, by the hosts' clocks as corrected to the controller's. None when a task ended
    /// before its beginning was seen.
    pub skew: Option<Duration>,
}

/// Why tasks were not started together.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// One could not be prepared.
    #[error("a task could not be prepared: {0}")]
    NotPrepared(UnexpectedEnd),
    /// One cannot begin.
    #[error(
        "{task} cannot begin with the others: {behind}, before it in its stream, is prepared and was not started"
    )]
    Blocked {
        /// The one that cannot begin.
        task: String,
        /// The one before it.
        behind: String,
    },
    /// There is no driver any more.
    #[error("the streams are closed")]
    Closed,
}

/// Starts prepared tasks at once, after all of them are held on their hosts, and tells how far apart they began.
///
/// # Errors
/// When one could not be prepared, or stands behind a prepared task that is not among these; nothing is started then,
/// and all of them are cancelled.
///
/// # Cancel safety
/// Dropping the future cancels what was not started yet.
pub async fn start_together(prepared: impl IntoIterator<Item = Prepared>) -> Result<Started, StartError> {
    let prepared: Vec<Prepared> = prepared.into_iter().collect();
    let Some(first) = prepared.first() else { return Ok(Started { tasks: Vec::new(), skew: None }) };
    let driver = first.task().driver.clone();
    // Nobody can be held on its host behind another one that is not started: said before it is waited for.
    let ids: Vec<_> = prepared.iter().map(|prepared| prepared.task().id()).collect();
    let ask = |start: bool| {
        let (answer, receiver) = tokio::sync::oneshot::channel();
        driver.send(crate::driver::Input::GoTogether { tasks: ids.clone(), start, answer });
        async move {
            match receiver.await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(blocked)) => Err(StartError::Blocked { task: blocked.task, behind: blocked.behind }),
                Err(_) => Err(StartError::Closed),
            }
        }
    };
    ask(false).await?;
    let mut streams_seen = std::collections::BTreeSet::new();
    for one in &prepared {
        // Behind another one of this set in the same stream it is held only when that one has ended.
        if streams_seen.insert(one.task().stream().clone()) {
            one.staged().await.map_err(StartError::NotPrepared)?;
        }
    }
    ask(true).await?;
    let tasks: Vec<Task> = prepared.into_iter().map(Prepared::release).collect();
    let mut begins = Vec::with_capacity(tasks.len());
    for task in &tasks {
        let mut stage = task.shared.stage.subscribe();
        let begun = stage.wait_for(|stage| matches!(stage, Stage::Began { .. } | Stage::Finished)).await;
        begins.push(match begun.map(|stage| *stage) {
            Ok(Stage::Began { time_ns }) => Some(time_ns),
            _ => task.try_outcome().and_then(|outcome| outcome.start_time_ns),
        });
    }
    let skew = begins
        .into_iter()
        .collect::<Option<Vec<u64>>>()
        .and_then(|begins| Some(Duration::from_nanos(begins.iter().max()? - begins.iter().min()?)));
    Ok(Started { tasks, skew })
}
