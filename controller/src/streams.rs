//! All streams of one test, as its user holds them.
//!
//! A handle numbers blocks and hands them to the driver; it decides nothing about when and where they run. Opening
//! connects nothing: hosts are reached when their streams are first used.

use std::{
    fmt,
    ops::{Bound, RangeBounds},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
pub use millstream_common::sync_client::{Parties, Released};
use millstream_common::{
    id::{BarrierName, TopicName},
    limits,
};
use tracing::warn;

mod builder;
mod errors;
mod place;
mod shared;

pub use builder::StreamsBuilder;
pub use errors::{CloseError, MeetError, OpenError, StreamError};
pub(crate) use place::StreamShared;
pub(crate) use shared::{Core, TestShared};

use crate::{
    block::Block,
    blocking::block_on_for,
    definition::Definition,
    driver::Input,
    outcome::{FailureReport, Outcome, Report},
    params::Params,
    results::WriteResultsError,
    stream::{Stream, StreamGroup},
    sync::{
        host::{Subscription, SyncHost},
        topic::{Content, Value},
    },
    task::{Running, Task},
};

/// A name or an index of a stream.
pub trait StreamKey: sealed::Sealed {}

impl<T: sealed::Sealed> StreamKey for T {}

mod sealed {
    /// What a key says.
    #[derive(Debug, Clone, Copy)]
    pub enum Key<'a> {
        Name(&'a str),
        Index(usize),
    }

    pub trait Sealed {
        fn key(&self) -> Key<'_>;
    }

    impl Sealed for &str {
        fn key(&self) -> Key<'_> {
            Key::Name(self)
        }
    }

    impl Sealed for String {
        fn key(&self) -> Key<'_> {
            Key::Name(self)
        }
    }

    impl Sealed for &String {
        fn key(&self) -> Key<'_> {
            Key::Name(self)
        }
    }

    impl Sealed for usize {
        fn key(&self) -> Key<'_> {
            Key::Index(*self)
        }
    }
}

/// All streams of one test.
///
/// Dropping it ends every session and all that runs in them, and waits for that at most 5 s; what cannot be reached is
/// left to its lease, and said so. [`Streams::close`] does the same and says what came of it.
#[derive(Debug)]
pub struct Streams {
    core: Arc<Core>,
    closed: bool,
}

impl Streams {
    /// Begins to open the streams of a test. The name becomes a directory of the results.
    pub fn builder(name: impl Into<String>) -> StreamsBuilder {
        StreamsBuilder::new(name.into())
    }

    /// Opens the streams of a test with nothing but its name: see [`StreamsBuilder::open`].
    ///
    /// # Errors
    /// When a definition or a name is not valid, or the results have no place.
    pub fn open(name: impl Into<String>) -> Result<Self, OpenError> {
        Self::builder(name).open()
    }

    fn stream(&self, shared: Arc<StreamShared>) -> Stream {
        Stream { shared, core: Arc::clone(&self.core) }
    }

    /// The parameters of the test, with what the builder set over them.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.core.params
    }

    /// The stream of a name or at an index, from 0. One that nobody defined is defined now, on this machine, and so are
    /// those before its index; in strict mode that is an error.
    ///
    /// # Errors
    /// When there is none, or its place cannot be had.
    pub fn get(&self, key: impl StreamKey) -> Result<Stream, StreamError> {
        let shared = match key.key() {
            sealed::Key::Name(name) => self.core.named(name),
            sealed::Key::Index(index) => self.core.at(index),
        }?;
        shared.locate()?;
        Ok(self.stream(shared))
    }

    /// The stream of a name or at an index, if it is defined and its place can be had. Defines nothing, so that a test can
    /// look for a stream and do something else when the lab has none.
    ///
    /// # Errors
    /// [`StreamError::Unknown`] or [`StreamError::NoIndex`] when nobody defined it, [`StreamError::Place`] when its type is
    /// unknown, or what it needs is not there.
    pub fn try_get(&self, key: impl StreamKey) -> Result<Stream, StreamError> {
        let shared = match key.key() {
            sealed::Key::Name(name) => self.core.defined(name),
            sealed::Key::Index(index) => self.core.defined_at(index),
        }?;
        shared.locate()?;
        Ok(self.stream(shared))
    }

    /// Defines another stream, by a URL such as `tls://foo.example.com:7433`, a [`Definition`], or a reach that was made by
    /// hand. It is tidied with all others.
    ///
    /// # Errors
    /// When the name is taken, name or definition are not valid, or the place cannot be had. Nothing is defined then.
    pub fn add(
        &self,
        name: impl AsRef<str>,
        definition: impl Into<Definition>,
    ) -> Result<Stream, StreamError> {
        let defined = definition.into().named(name.as_ref())?;
        self.core.define(defined).map(|shared| self.stream(shared))
    }

    /// Every defined stream, in order. Whether each can be had is found when a block is run there.
    #[must_use]
    pub fn all(&self) -> StreamGroup {
        StreamGroup::new(self.core.shared.streams().into_iter().map(|shared| self.stream(shared)).collect())
    }

    /// The streams whose whole name matches a regular expression, such as `client-\d+`: a part of the name is not enough.
    /// The group is empty when none does.
    ///
    /// # Errors
    /// When it is none.
    pub fn select(&self, pattern: &str) -> Result<StreamGroup, StreamError> {
        let whole = regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|error| StreamError::Pattern {
            pattern: pattern.to_owned(),
            reason: error.to_string(),
        })?;
        let streams = self.all().into_iter().filter(|stream| whole.is_match(stream.name().as_str()));
        Ok(StreamGroup::new(streams.collect()))
    }

    /// The streams at a range of indexes, such as `1..` or `2..=4`. Those that nobody defined are defined as by
    /// [`Streams::get`], gaps included. A range that is empty gives an empty group.
    ///
    /// # Errors
    /// When one of them does not exist and the test is strict, or when there would be too many. Nothing is defined then.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<StreamGroup, StreamError> {
        let begin = match range.start_bound() {
            Bound::Included(&begin) => begin,
            Bound::Excluded(&before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len(),
        };
        let streams = self.core.range(begin, end)?;
        Ok(StreamGroup::new(streams.into_iter().map(|shared| self.stream(shared)).collect()))
    }

    /// Number of defined streams.
    #[must_use]
    pub fn len(&self) -> usize {
        self.core.shared.streams_count()
    }

    /// Whether no stream is defined.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of streams that something was scheduled on.
    #[must_use]
    pub fn initialized(&self) -> usize {
        self.core.shared.lock().counts.iter().filter(|&&count| count > 0).count()
    }

    /// Runs a single block in a stream of its own, and returns at once. Blocks that are run like this wait for nobody.
    ///
    /// `place` is the name of a defined stream, whose definition the new stream takes, or a definition in one line, such
    /// as `tls://foo.example.com:7433`. The new stream is called after the place and counted: `server.1`, `server.2`,
    /// `foo.example.com.1`, and `local.1` on this machine.
    ///
    /// # Errors
    /// When `place` is neither.
    pub fn run_bg(&self, place: impl AsRef<str>, block: impl Into<Block>) -> Result<Task, StreamError> {
        let stream = self.core.single(place.as_ref())?;
        Ok(self.stream(stream).run_bg(block))
    }

    /// As [`Streams::run_bg`], and gives the outcome.
    ///
    /// # Errors
    /// When `place` is neither a defined stream nor a definition. The result itself is an error when the task ended
    /// unexpectedly.
    ///
    /// # Cancel safety
    /// Dropping the result does not cancel the task.
    pub fn run_fg(&self, place: impl AsRef<str>, block: impl Into<Block>) -> Result<Running, StreamError> {
        let stream = self.core.single(place.as_ref())?;
        Ok(self.stream(stream).run_fg(block))
    }

    /// Waits until all tasks of all streams have ended.
    ///
    /// # Errors
    /// When any ended unexpectedly: one failure for each cause.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn wait(&self) -> Result<Report, FailureReport> {
        let report = self.join().await;
        match report.failures() {
            Some(failures) => Err(failures),
            None => Ok(report),
        }
    }

    /// Waits until all tasks of all streams have ended, and tells what came of them, failures or not.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn join(&self) -> Report {
        let _waiting = MainWaits::begin(&self.core.sync);
        let mut unfinished = self.core.shared.unfinished.subscribe();
        // The sender lives as long as this does.
        let _none = unfinished.wait_for(|&count| count == 0).await;
        self.core.shared.report()
    }

    /// Whether no task has ended unexpectedly so far.
    #[must_use]
    pub fn success(&self) -> bool {
        self.core.shared.report().success()
    }

    /// What came of all tasks so far, as JSON.
    ///
    /// # Panics
    /// Never: outcomes have no values that JSON has not.
    #[must_use]
    pub fn results(&self) -> serde_json::Value {
        let report = self.core.shared.report();
        let outcomes: Vec<&Outcome> = report.outcomes.iter().map(AsRef::as_ref).collect();
        serde_json::json!({
            "test": report.test.as_str(),
            "success": report.success(),
            "tasks": serde_json::to_value(outcomes).expect("outcomes are plain data"),
        })
    }

    /// Directory of this run's results.
    #[must_use]
    pub fn results_dir(&self) -> &std::path::Path {
        self.core.writer.directory()
    }

    /// Appends a line to main's own whiteboard in the results.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn whiteboard(&self, line: impl fmt::Display) -> Result<(), WriteResultsError> {
        self.core.writer.whiteboard(&line.to_string())
    }

    /// Main's own directory in the results, for whatever the test wants to keep.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn data_dir(&self) -> Result<PathBuf, WriteResultsError> {
        self.core.writer.data_directory()
    }

    /// Takes part in a barrier as blocks do: waits until `parties` have entered, at most 60 s. A number, or
    /// [`Parties::all`] with one more for main, or [`Parties::group`] for as many as those have said who wait already.
    ///
    /// # Errors
    /// When the barrier broke, or was refused.
    ///
    /// # Cancel safety
    /// Dropping the future takes main back, which breaks the barrier for all.
    pub async fn barrier(&self, name: &str, parties: impl Into<Parties>) -> Result<Released, MeetError> {
        self.barrier_with(name, parties, limits::BARRIER_TIMEOUT, Bytes::new()).await
    }

    /// The same with a time of its own, and something for every other party.
    ///
    /// # Errors
    /// When the barrier broke, or was refused.
    ///
    /// # Cancel safety
    /// Dropping the future takes main back, which breaks the barrier for all.
    pub async fn barrier_with(
        &self,
        name: &str,
        parties: impl Into<Parties>,
        timeout: Duration,
        payload: impl Into<Bytes>,
    ) -> Result<Released, MeetError> {
        let name = BarrierName::new(name)?;
        Ok(self.core.sync.enter_as_main(name, parties, timeout, payload.into()).await?)
    }

    /// Makes a broken barrier usable again.
    ///
    /// # Errors
    /// When the name is none.
    pub fn reset_barrier(&self, name: &str) -> Result<(), MeetError> {
        self.core.sync.reset_as_main(BarrierName::new(name)?);
        Ok(())
    }

    /// Publishes a value and gives its index: a rank that nobody else gets.
    ///
    /// # Errors
    /// When topic or value are refused.
    pub fn publish(&self, topic: &str, value: impl fmt::Display) -> Result<u64, MeetError> {
        Ok(self.core.sync.publish_as_main(TopicName::new(topic)?, Content::Text(value.to_string()))?)
    }

    /// Waits until a topic has `count` values, at most 60 s, and gives them.
    ///
    /// # Errors
    /// When they do not come in time, or nobody is left who could publish them.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn wait_topic(&self, topic: &str, count: u64) -> Result<Vec<Arc<Value>>, MeetError> {
        let topic = TopicName::new(topic)?;
        Ok(self.core.sync.wait_as_main(topic, count, limits::BARRIER_TIMEOUT).await?)
    }

    /// The values of a topic from the first on, and those that come later.
    ///
    /// # Errors
    /// When the name is none.
    pub fn subscribe(&self, topic: &str) -> Result<Subscription, MeetError> {
        Ok(self.core.sync.subscribe_as_main(TopicName::new(topic)?, 0))
    }

    /// Opens a loopback address where a person may look at barriers, with `grpcurl` for example, and take part by hand.
    /// It is open until the streams are closed.
    ///
    /// # Errors
    /// When the address is none of this machine's own, or cannot be listened on.
    pub async fn listen(
        &self,
        address: std::net::SocketAddr,
    ) -> Result<std::net::SocketAddr, crate::sync::port::ListenError> {
        let sync = self.core.sync.clone();
        let listening = self.core.driver.spawn(async move { sync.listen(address).await });
        match listening.await {
            Some(result) => result,
            // The driver ends only by closing, which consumes this.
            None => std::future::pending().await,
        }
    }

    /// Ends every session and everything that runs in them, and waits until hosts are clean and results complete.
    ///
    /// # Errors
    /// [`Error::Close`](crate::Error::Close) when something could not be tidied or written.
    ///
    /// # Cancel safety
    /// Dropping the future is as dropping the streams.
    pub async fn close(mut self) -> crate::Result<()> {
        self.core.sync.main_waiting(true);
        self.core.driver.send(Input::Close);
        let mut ended = self.core.ended.clone();
        let left_behind = match ended.wait_for(Option::is_some).await {
            Ok(left_behind) => left_behind.clone().unwrap_or_default(),
            Err(_) => vec!["the driver failed: see its message above".to_owned()],
        };
        self.closed = true;
        if left_behind.is_empty() { Ok(()) } else { Err(CloseError { left_behind }.into()) }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        self.core.sync.main_waiting(true);
        self.core.driver.send(Input::Close);
        let mut ended = self.core.ended.clone();
        let waiting = async move {
            // An error means that the driver is gone: nothing to wait for.
            let ended = ended.wait_for(Option::is_some).await;
            ended.ok().and_then(|left_behind| left_behind.clone()).unwrap_or_default()
        };
        match block_on_for(waiting, limits::CLOSE_MAX, &*self.core.world.clock) {
            Some(left_behind) if left_behind.is_empty() => {}
            Some(left_behind) => warn!("not everything could be tidied: {}", left_behind.join("; ")),
            None => {
                warn!("not every host has ended its session in time: each ends it when its lease is over")
            }
        }
    }
}

/// Main is inside a wait: it sends nobody to barriers meanwhile.
struct MainWaits<'a>(&'a SyncHost);

impl<'a> MainWaits<'a> {
    fn begin(sync: &'a SyncHost) -> Self {
        sync.main_waiting(true);
        Self(sync)
    }
}

impl Drop for MainWaits<'_> {
    fn drop(&mut self) {
        self.0.main_waiting(false);
    }
}
