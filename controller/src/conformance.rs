//! Whether a reach is sound: the same scenario over every reach, with the faults that it says it survives.
//!
//! Whoever [`register`](crate::reach::register)s a type of streams wants to know that everything above it holds. One
//! test says so:
//!
//! ```no_run
//! millstream::entry!(); // the suite has a local stream, too
//!
//! # mod my_lab { pub fn register_vm() {} }
//! async fn vm_is_a_sound_reach() -> millstream::Result<()> {
//!     my_lab::register_vm(); // calls `millstream::reach::register("vm", …)`
//!     let report = millstream::conformance::check("vm://rawhide").await?;
//!     println!("{report}");
//!     Ok(())
//! }
//! # fn main() {}
//! ```
//!
//! A [`Rule`] that is broken is a sentence with its evidence in [`BrokenRules`], never a panic. Every wait is bounded. The
//! place needs a POSIX shell with the usual commands, nothing else. The scenario runs on a thread of its own, so that it
//! needs no runtime: plain tests use [`block_on`](crate::blocking::block_on).
//!
//! Nothing here is known to any reach: what is checked is what a test sees, and what a reach says of itself.

use std::{
    collections::BTreeSet,
    fs,
    future::{Future, IntoFuture, poll_fn},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    thread,
    time::Duration,
};

use millstream_common::{
    clock::{Ids as _, SystemIds},
    limits,
    text::{printable, spoken},
};
use tokio::{sync::oneshot, time::timeout};

mod cuts;
mod cuttable;
mod pipes;
mod report;
mod samples;
mod scenario;
mod stage;

use cuttable::Cuttable;
use report::Ledger;
pub use report::{BrokenRules, Report, Rule, Verdict};
use stage::Stage;

use crate::{definition::Definition, reach::Reach, streams::Streams};

/// What may take longest of one rule: several waits, each bounded by itself.
const RULE_MAX: Duration = Duration::from_secs(300);
/// How long processes of a released reach may take to be gone.
const GONE_MAX: Duration = Duration::from_secs(5);
/// Between two looks at them.
const GONE_PAUSE: Duration = Duration::from_millis(20);

/// Checks the reach of a definition: a URL, a [`Definition`], or a reach that was made by hand. Await it.
///
/// What it gives is a [`Report`] when every rule that applies is kept, else [`BrokenRules`].
pub fn check(definition: impl Into<Definition>) -> Check {
    Check { definition: definition.into(), only: None, alone: false, directory: None, afterwards: Vec::new() }
}

/// What looks whether anything is left, and says what.
type Look = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// A check that has not begun: refine it, and await it.
#[must_use = "a check does nothing until it is awaited"]
pub struct Check {
    definition: Definition,
    only: Option<Vec<Rule>>,
    alone: bool,
    directory: Option<PathBuf>,
    afterwards: Vec<Look>,
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check").field("definition", &self.definition).finish_non_exhaustive()
    }
}

impl Check {
    /// Examines these rules alone, and that an agent answers at all. For whoever is about to repair one of them.
    pub fn only(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.only = Some(rules.into_iter().chain([Rule::FirstContact]).collect());
        self
    }

    /// Says that this process does nothing else meanwhile, so that every child process that stays after
    /// [`Reach::release`] was left by the reach. Not for harnesses that run other tests on other threads.
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Looks after [`Reach::release`] whether the place is as it was, such as that no container stays. What it says when it
    /// is not becomes the evidence of a broken rule.
    pub fn afterwards(mut self, look: impl FnOnce() -> Result<(), String> + Send + 'static) -> Self {
        self.afterwards.push(Box::new(look));
        self
    }

    /// Where the results of the scenario lie. Unless it is said, they lie in a temporary directory, which is kept when a
    /// rule is broken.
    pub fn results_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    async fn run(self) -> Result<Report, BrokenRules> {
        let is_kept = self.directory.is_some();
        let directory = self.directory.clone().unwrap_or_else(|| {
            std::env::temp_dir().join(format!("millstream-conformance-{}", SystemIds.session_id()))
        });
        let report = self.examine(&directory).await;
        if report.is_sound() {
            if !is_kept {
                // What cannot be removed from a temporary directory says nothing about a reach.
                let _removed = fs::remove_dir_all(&directory);
            }
            Ok(report)
        } else {
            Err(BrokenRules { report, results: directory })
        }
    }

    async fn examine(self, directory: &Path) -> Report {
        let before = children();
        let reach = match self.reach(directory) {
            Ok(reach) => reach,
            Err((place, why)) => {
                let mut ledger = Ledger::new(place, true, self.only.as_deref());
                ledger.note(Rule::FirstContact, Err(why));
                return ledger.close();
            }
        };
        let place = printable(reach.describe().as_bytes(), limits::TEXT_BYTES_MAX);
        let mut ledger = Ledger::new(place, reach.survives_disconnect(), self.only.as_deref());
        examine_all(&mut ledger, &reach, directory).await;
        ledger.note(Rule::ReleaseLeavesNothing, {
            let released = release(&*reach).await;
            // The looks come in any case: they may tell more than that it took too long.
            let gone = if self.alone { gone(&before).await } else { Ok(()) };
            self.afterwards.into_iter().fold(released.and(gone), |so_far, look| so_far.and_then(|()| look()))
        });
        ledger.close()
    }

    /// The reach itself, made as for any test.
    fn reach(&self, directory: &Path) -> Result<Arc<dyn Reach>, (String, String)> {
        let failed = |why: String| (format!("{:?}", self.definition), why);
        let builder = Streams::builder("definition").only_given().results_dir(directory);
        let streams = builder
            .stream("there", self.definition.clone())
            .open()
            .map_err(|error| failed(error.to_string()))?;
        let stream = streams.get("there").map_err(|error| failed(error.to_string()))?;
        Ok(Arc::clone(stream.shared.reach()))
    }
}

impl IntoFuture for Check {
    type Output = Result<Report, BrokenRules>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    /// Begins when it is first polled. Dropping it afterwards does not end the scenario, which is bounded.
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let (done, verdict) = oneshot::channel();
            thread::Builder::new()
                .name("conformance".to_owned())
                .spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .expect("a runtime of one thread needs a few descriptors");
                    // Nobody listens any more when the check was dropped.
                    let _heard = done.send(runtime.block_on(self.run()));
                })
                .expect("a thread can be started");
            verdict.await.expect("what a reach may panic in is caught")
        })
    }
}

async fn examine_all(ledger: &mut Ledger, reach: &Arc<dyn Reach>, directory: &Path) {
    let described = reach.describe();
    ledger.note(Rule::DescribesItself, pipes::describes_itself(&**reach, &described));
    if !examine(ledger, Rule::FirstContact, pipes::first_contact(&**reach)).await {
        return;
    }
    // Known by now, whoever had to choose it.
    let host = reach.host();
    ledger.note(Rule::NamesItsHost, pipes::names_its_host(&**reach, &host));
    examine(ledger, Rule::TwoPipes, pipes::two_at_once(&**reach)).await;
    examine(ledger, Rule::CancelledDials, pipes::cancelled_dials(&**reach)).await;

    let there = Arc::new(Cuttable::new(Arc::clone(reach)));
    let stage = match Stage::new(directory, &there) {
        Ok(stage) => stage,
        Err(error) => {
            let why = format!("the suite could not write to `{}`: {error}", directory.display());
            return ledger.note(Rule::RunsInOrder, Err(why));
        }
    };
    examine(ledger, Rule::RunsInOrder, scenario::runs_in_order(&stage)).await;
    examine(ledger, Rule::OutputIsWhole, scenario::output_is_whole(&stage)).await;
    examine(ledger, Rule::LogIsLive, scenario::log_is_live(&stage)).await;
    examine(ledger, Rule::EndsAreTold, scenario::ends_are_told(&stage)).await;
    examine(ledger, Rule::FilesArrive, scenario::files_arrive(&stage)).await;
    examine(ledger, Rule::ParametersArrive, scenario::parameters_arrive(&stage)).await;
    examine(ledger, Rule::ArchiveComesHome, scenario::archive_comes_home(&stage)).await;
    examine(ledger, Rule::StreamsMeet, scenario::streams_meet(&stage)).await;
    examine(ledger, Rule::StopAndCancel, scenario::stop_and_cancel(&stage)).await;
    examine(ledger, Rule::TreesEnd, scenario::trees_end(&stage)).await;
    if reach.survives_disconnect() {
        examine(ledger, Rule::OutputSurvivesCuts, cuts::output_survives(&stage)).await;
        examine(ledger, Rule::FilesSurviveCuts, cuts::files_survive(&stage)).await;
        examine(ledger, Rule::ArchiveSurvivesCuts, cuts::archive_survives(&stage)).await;
        examine(ledger, Rule::PartiesSurviveCuts, cuts::parties_survive(&stage)).await;
    } else {
        examine(ledger, Rule::LossIsTold, cuts::loss_is_told(&stage)).await;
    }
    ledger.note(Rule::DescribesItself, pipes::describes_itself(&**reach, &described));
    ledger.note(Rule::NamesItsHost, pipes::names_its_host(&**reach, &host));
}

/// Examines one rule, if it is wanted; true unless it is broken.
async fn examine(ledger: &mut Ledger, rule: Rule, work: impl Future<Output = Result<(), String>>) -> bool {
    if !ledger.wants(rule) {
        return true;
    }
    let verdict = match timeout(RULE_MAX, unless_it_panics(pin!(work))).await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(why)) => Err(why),
        Err(_elapsed) => Err(format!("it could not be decided within {}", spoken(RULE_MAX))),
    };
    let is_kept = verdict.is_ok();
    ledger.note(rule, verdict);
    is_kept
}

/// A panic in what the user has written is a broken rule as well: it would end a part of the test that nobody waits for.
async fn unless_it_panics<T>(mut work: Pin<&mut impl Future<Output = T>>) -> Result<T, String> {
    poll_fn(|context| {
        // Nothing of the work is touched again after a panic.
        match panic::catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
            Ok(poll) => poll.map(Ok),
            Err(payload) => {
                let text = payload.downcast_ref::<String>().map(String::as_str);
                let text =
                    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("without a word");
                Poll::Ready(Err(format!("it panicked: {}", printable(text.as_bytes(), 512))))
            }
        }
    })
    .await
}

/// Releases twice: who tidies once too often must do no harm.
async fn release(reach: &dyn Reach) -> Result<(), String> {
    for time in ["", " when it was called again"] {
        let left = timeout(limits::CLOSE_MAX, reach.release()).await.map_err(|_| {
            format!(
                "release() did not end within {}{time}: a test waits no longer",
                spoken(limits::CLOSE_MAX)
            )
        })?;
        if !left.is_empty() {
            return Err(format!("release(){time} left something: {}", left.join("; ")));
        }
    }
    Ok(())
}

/// Waits until no child process of this one is left but those that were there before.
async fn gone(before: &BTreeSet<u32>) -> Result<(), String> {
    let look = async {
        while !children().is_subset(before) {
            tokio::time::sleep(GONE_PAUSE).await;
        }
    };
    if timeout(GONE_MAX, look).await.is_ok() {
        return Ok(());
    }
    let left: Vec<String> = children().difference(before).map(|&pid| called(pid)).collect();
    Err(format!("{} after release() these processes stay: {}", spoken(GONE_MAX), left.join(", ")))
}

/// The child processes of this one.
fn children() -> BTreeSet<u32> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| parent(*pid) == Some(own)).collect()
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it is in brackets and may contain anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn called(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).filter(|word| !word.is_empty()).collect();
    format!("{pid} (`{}`)", printable(&words.join(&b' '), 200))
}
