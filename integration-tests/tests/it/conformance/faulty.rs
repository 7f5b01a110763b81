//! Reaches that are unsound, each in one way, and what the suite says of them.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use millstream::{
    Definition, blocking,
    conformance::{Check, Rule, check},
    reach::{DialError, Dialing, Reach, Releasing},
};
use millstream_integration_tests::processes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::guest::Guest;
use crate::support::block_on;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Each pipe leaves out the byte after so many that came.
    LosesAByte(usize),
    /// Each pipe changes the byte after so many that came.
    ChangesAByte(usize),
    /// The second pipe is the first.
    SamePipe,
    /// Says that its agent lives on, and it does not.
    ClaimsToSurvive,
    /// Says that its agent does not live on, and it does.
    DeniesToSurvive,
    /// A dial that is given up keeps what all others need.
    KeepsWhenDropped,
    /// Calls its place another name each time.
    Renames,
    /// Gives its whole address for the name of its host.
    NoBareHost,
    /// Does not end its agent.
    LeavesItsAgent,
    /// Never comes to the end of its release.
    HangsInRelease,
    /// Panics when it is dialled.
    PanicsInDial,
}

/// A pipe as the reach below gives it.
type Inner = Pin<Box<dyn Duplex>>;

trait Duplex: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}

#[derive(Debug)]
struct Faulty {
    guest: Arc<Guest>,
    fault: Fault,
    asked: AtomicUsize,
    /// What the fault keeps.
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    pipe: Option<Arc<Mutex<Inner>>>,
    is_taken: bool,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

impl Faulty {
    fn new(fault: Fault) -> Arc<Self> {
        let guest = Guest::named("faulty", fault != Fault::ClaimsToSurvive);
        Arc::new(Self { guest, fault, asked: AtomicUsize::new(0), kept: Mutex::default() })
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self) -> DialError {
        let source = io::Error::new(io::ErrorKind::WouldBlock, "somebody else dials");
        DialError::Connect { address: self.describe(), source }
    }
}

impl Reach for Faulty {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            assert!(self.fault != Fault::PanicsInDial, "there is no such guest");
            if self.fault == Fault::KeepsWhenDropped {
                if std::mem::replace(&mut self.kept().is_taken, true) {
                    return Err(self.taken());
                }
                tokio::task::yield_now().await;
            }
            let known = self.kept().pipe.clone();
            let inner = match known {
                Some(pipe) => pipe,
                None => Arc::new(Mutex::new(Box::pin(self.guest.dial().await?) as Inner)),
            };
            self.kept().is_taken = false;
            if self.fault == Fault::SamePipe {
                self.kept().pipe = Some(Arc::clone(&inner));
            }
            Ok(Box::new(FaultyPipe { inner, fault: self.fault, came: 0 }) as _)
        })
    }

    fn describe(&self) -> String {
        match self.fault {
            Fault::Renames => format!("faulty://{}", self.asked.fetch_add(1, Ordering::SeqCst)),
            _ => "faulty://one".to_owned(),
        }
    }

    fn host(&self) -> String {
        if self.fault == Fault::NoBareHost { "tester@one:22".to_owned() } else { "one".to_owned() }
    }

    fn survives_disconnect(&self) -> bool {
        self.fault != Fault::DeniesToSurvive
    }

    fn release(&self) -> Releasing<'_> {
        match self.fault {
            Fault::LeavesItsAgent => Box::pin(async { Vec::new() }),
            Fault::HangsInRelease => Box::pin(std::future::pending()),
            _ => self.guest.release(),
        }
    }
}

struct FaultyPipe {
    inner: Arc<Mutex<Inner>>,
    fault: Fault,
    came: usize,
}

impl FaultyPipe {
    fn with<T>(&mut self, act: impl FnOnce(Pin<&mut dyn Duplex>) -> T) -> T {
        act(self.inner.lock().unwrap_or_else(PoisonError::into_inner).as_mut())
    }
}

impl AsyncRead for FaultyPipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut bytes = vec![0; buffer.remaining()];
        let mut part = ReadBuf::new(&mut bytes);
        let result = self.with(|inner| inner.poll_read(context, &mut part));
        let mut came = part.filled().to_vec();
        let from = self.came;
        self.came += came.len();
        match self.fault {
            Fault::LosesAByte(at) if (from..self.came).contains(&at) => drop(came.remove(at - from)),
            Fault::ChangesAByte(at) if (from..self.came).contains(&at) => came[at - from] ^= 1,
            _ => {}
        }
        buffer.put_slice(&came);
        result
    }
}

impl AsyncWrite for FaultyPipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.with(|inner| inner.poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|inner| inner.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|inner| inner.poll_shutdown(context))
    }
}

/// What the suite says.
fn told(check: Check) -> String {
    let broken = blocking::block_on(check).unwrap_err();
    std::fs::remove_dir_all(&broken.results).unwrap();
    broken.to_string()
}

/// Fails unless exactly one rule is broken, for this reason.
fn is_told(fault: Fault, rule: Rule, why: &str) {
    let reach = Faulty::new(fault);
    let text = told(check(Definition::reach(Arc::clone(&reach) as _)).only([rule]));
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("faulty://") && lines[0].ends_with(" breaks 1 rule of reaches"), "{text}");
    assert!(lines[1].contains(why), "{text}");
    block_on(reach.guest.release());
}

#[test]
fn bytes_that_are_lost_or_changed_are_told() {
    // What becomes of them depends on where they were: in output, or in what stands around it.
    is_told(Fault::LosesAByte(2 << 20), Rule::OutputIsWhole, "output comes byte for byte: ");
    is_told(Fault::ChangesAByte(2 << 20), Rule::OutputIsWhole, "output comes byte for byte: ");
}

#[test]
fn one_pipe_given_twice_is_told() {
    let why =
        "two pipes at once do not disturb each other: the first pipe: the pipe leads to no working agent";
    is_told(Fault::SamePipe, Rule::TwoPipes, why);
}

#[test]
fn a_lie_about_surviving_is_told() {
    let why = "a cut amid output loses no byte and runs nothing twice: ";
    is_told(Fault::ClaimsToSurvive, Rule::OutputSurvivesCuts, why);
    let why = "a cut ends what ran there, and it is told at once: the block ran on after the cut";
    is_told(Fault::DeniesToSurvive, Rule::LossIsTold, why);
}

#[test]
fn a_dial_that_keeps_something_when_it_is_dropped_is_told() {
    let why = "after 8 dials that were given up: dial() failed: failed to connect to faulty://one: somebody else dials";
    is_told(Fault::KeepsWhenDropped, Rule::CancelledDials, why);
}

#[test]
fn words_that_change_or_are_none_are_told() {
    is_told(Fault::Renames, Rule::DescribesItself, "it said `faulty://2` first and `faulty://3` later");
    is_told(Fault::NoBareHost, Rule::NamesItsHost, "`tester@one:22` is no bare name or address");
}

#[test]
fn a_panic_is_told() {
    is_told(
        Fault::PanicsInDial,
        Rule::FirstContact,
        "an agent answers on a new pipe: it panicked: there is no such guest",
    );
}

#[test]
fn what_stays_after_release_is_told() {
    is_told(Fault::HangsInRelease, Rule::ReleaseLeavesNothing, "release() did not end within 5.0 s");

    let reach = Faulty::new(Fault::LeavesItsAgent);
    let definition = || Definition::reach(Arc::clone(&reach) as _);
    let text = told(check(definition()).only([Rule::ReleaseLeavesNothing]).alone());
    let agent = reach.guest.process().unwrap();
    assert!(text.contains(&format!("{agent} (`")) && text.contains("stdio --child"), "{text}");

    let look = move || {
        if processes::is_live(agent) { Err("the agent of the guest is there".to_owned()) } else { Ok(()) }
    };
    let text = told(check(definition()).only([Rule::ReleaseLeavesNothing]).afterwards(look));
    assert!(
        text.contains("release() ends what the reach has started: the agent of the guest is there"),
        "{text}"
    );
    block_on(reach.guest.release());
}
