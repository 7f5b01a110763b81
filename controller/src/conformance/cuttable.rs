//! A reach whose pipes can be cut: at once, or when so many bytes have come or gone.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use millstream_common::pipe::BoxedPipe;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::reach::{Dialing, Entrusted, Reach, Releasing};

/// Passes everything on to the reach that is examined, but for its release, which the suite does itself.
#[derive(Debug)]
pub(super) struct Cuttable {
    inner: Arc<dyn Reach>,
    wire: Arc<Wire>,
}

/// All pipes of a reach.
#[derive(Debug, Default)]
struct Wire {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The cuts that are to come, the next one last.
    plan: Vec<Cut>,
    /// Cuts of this plan so far.
    cuts: usize,
    /// Pipes made since somebody asked, and cuts meanwhile.
    made: usize,
    cut_meanwhile: bool,
    pipes: Vec<Weak<Mutex<Line>>>,
}

/// A cut that is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// When so many more bytes have come from the place.
    Come(usize),
    /// When so many more bytes have gone there.
    Gone(usize),
}

/// What can be told to one pipe.
#[derive(Debug, Default)]
struct Line {
    is_cut: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Cuttable {
    pub(super) fn new(inner: Arc<dyn Reach>) -> Self {
        Self { inner, wire: Arc::default() }
    }

    /// Cuts every pipe that there is.
    pub(super) fn cut(&self) {
        self.wire.cut(&mut self.wire.lock());
    }

    /// Cuts every pipe that there is then, as often as there are entries; each counts from the one before.
    pub(super) fn cut_after(&self, plan: &[Cut]) {
        let mut state = self.wire.lock();
        state.cuts = 0;
        state.plan = plan.iter().rev().copied().collect();
    }

    /// Pipes that were made since this was last asked; none when some of them were cut, so that more had to be made.
    pub(super) fn pipes_made(&self) -> Option<usize> {
        let mut state = self.wire.lock();
        let made = std::mem::take(&mut state.made);
        if std::mem::take(&mut state.cut_meanwhile) { None } else { Some(made) }
    }

    /// Whether every cut of the plan was made; what is left of it is dropped.
    pub(super) fn planned_cuts(&self, wanted: usize) -> Result<(), String> {
        let mut state = self.wire.lock();
        state.plan.clear();
        if state.cuts == wanted {
            return Ok(());
        }
        Err(format!(
            "{} of {wanted} cuts could be made: fewer bytes came through its pipes than the scenario moves",
            state.cuts
        ))
    }
}

impl Wire {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self, state: &mut State) {
        state.cuts += 1;
        state.cut_meanwhile = true;
        for line in state.pipes.drain(..).filter_map(|line| line.upgrade()) {
            let mut line = lock(&line);
            line.is_cut = true;
            line.reader.take().into_iter().chain(line.writer.take()).for_each(Waker::wake);
        }
    }

    /// How many of so many bytes may pass before the next cut.
    fn allowed(&self, length: usize, coming: bool) -> usize {
        match self.lock().plan.last() {
            Some(Cut::Come(left)) if coming => length.min(*left),
            Some(Cut::Gone(left)) if !coming => length.min(*left),
            _ => length,
        }
    }

    fn passed(&self, length: usize, coming: bool) {
        let mut state = self.lock();
        let due = match state.plan.last_mut() {
            Some(Cut::Come(left)) if coming => {
                *left = left.saturating_sub(length);
                *left == 0
            }
            Some(Cut::Gone(left)) if !coming => {
                *left = left.saturating_sub(length);
                *left == 0
            }
            _ => false,
        };
        if due {
            state.plan.pop();
            self.cut(&mut state);
        }
    }
}

fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reach for Cuttable {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let pipe = self.inner.dial().await?;
            let line = Arc::new(Mutex::new(Line::default()));
            let mut state = self.wire.lock();
            state.pipes.retain(|line| line.strong_count() > 0);
            state.made += 1;
            state.pipes.push(Arc::downgrade(&line));
            Ok(Box::new(CuttablePipe { pipe: Some(pipe), line, wire: Arc::clone(&self.wire) }) as _)
        })
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn host(&self) -> String {
        self.inner.host()
    }

    fn survives_disconnect(&self) -> bool {
        self.inner.survives_disconnect()
    }

    fn task_failed(&self) {
        self.inner.task_failed();
    }

    fn progress(&self) -> u64 {
        self.inner.progress()
    }

    fn dial_max(&self) -> Duration {
        self.inner.dial_max()
    }

    fn reach_max(&self) -> Duration {
        self.inner.reach_max()
    }

    fn knows_host(&self) -> bool {
        self.inner.knows_host()
    }

    fn entrust<'a>(&'a self, session: &'a Entrusted) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        self.inner.entrust(session)
    }

    fn renew(&self) {
        self.inner.renew();
    }

    fn what_to_check(&self) -> String {
        self.inner.what_to_check()
    }

    fn release(&self) -> Releasing<'_> {
        // Several tests of the suite use one reach after the other.
        Box::pin(async { Vec::new() })
    }
}

/// A pipe that can be cut. The other end sees the end of the pipe when this one has noticed.
struct CuttablePipe {
    /// None once it is cut.
    pipe: Option<BoxedPipe>,
    line: Arc<Mutex<Line>>,
    wire: Arc<Wire>,
}

/// What a cut looks like to whoever reads or writes.
fn cut<T>() -> Poll<io::Result<T>> {
    Poll::Ready(Err(io::Error::new(
        io::ErrorKind::ConnectionReset,
        "the conformance suite has cut this pipe",
    )))
}

impl CuttablePipe {
    /// The pipe, unless it is cut; then it is dropped.
    fn whole(&mut self, register: impl FnOnce(&mut Line)) -> Option<&mut BoxedPipe> {
        let mut line = lock(&self.line);
        if line.is_cut {
            drop(line);
            self.pipe = None;
            return None;
        }
        register(&mut line);
        drop(line);
        self.pipe.as_mut()
    }
}

impl AsyncRead for CuttablePipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let allowed = self.wire.allowed(buffer.remaining(), true);
        let wire = Arc::clone(&self.wire);
        let waker = context.waker().clone();
        let Some(pipe) = self.whole(|line| line.reader = Some(waker)) else { return cut() };
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(allowed));
        let result = Pin::new(pipe).poll_read(context, &mut part);
        let length = part.filled().len();
        if matches!(result, Poll::Ready(Ok(()))) {
            buffer.advance(length);
            wire.passed(length, true);
        }
        result
    }
}

impl AsyncWrite for CuttablePipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let allowed = self.wire.allowed(bytes.len(), false);
        let wire = Arc::clone(&self.wire);
        let waker = context.waker().clone();
        let Some(pipe) = self.whole(|line| line.writer = Some(waker)) else { return cut() };
        let result = Pin::new(pipe).poll_write(context, &bytes[..allowed]);
        if let Poll::Ready(Ok(length)) = &result {
            wire.passed(*length, false);
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waker = context.waker().clone();
        match self.whole(|line| line.writer = Some(waker)) {
            Some(pipe) => Pin::new(pipe).poll_flush(context),
            None => cut(),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waker = context.waker().clone();
        match self.whole(|line| line.writer = Some(waker)) {
            Some(pipe) => Pin::new(pipe).poll_shutdown(context),
            None => cut(),
        }
    }
}
