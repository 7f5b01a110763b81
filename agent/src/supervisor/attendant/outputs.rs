//! The output pipes of a task, from the side that reads.
//!
//! They are read as far as they are filled; their end is never waited for, for anybody may hold them open.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use millstream_common::{clock::World, limits, log::LogChannel};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::warn;

use super::{SharedSpool, locked};
use crate::supervisor::process::{Channels, watch};

/// Room in an output pipe: what one read takes.
pub(super) const PIPE_BYTES: usize = limits::CHUNK_BYTES;
/// Room in the pipe for what is told of phases: a few lines, and what one read takes.
pub(super) const REPORT_PIPE_BYTES: usize = 4096;
pub(super) const CHANNELS: [LogChannel; 2] = [LogChannel::Stdout, LogChannel::Stderr];

/// What one read gave.
pub(super) enum Read {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now, but somebody could still write.
    Nothing,
    /// Nobody can write any more.
    End,
}

/// Read ends of the output pipes of a task.
pub(super) struct Outputs {
    stdout: Output,
    stderr: Output,
    reports: Option<Output>,
}

struct Output {
    pipe: AsyncFd<OwnedFd>,
    at_end: bool,
}

/// Write ends of the pipes.
#[derive(Debug)]
pub struct OutputEnds {
    /// Of the standard output.
    pub stdout: OwnedFd,
    /// Of the standard error.
    pub stderr: OwnedFd,
    /// For what a command tells of its phases, where it does.
    pub reports: Option<OwnedFd>,
}

impl OutputEnds {
    /// With `/dev/null`, all that a new process is given.
    pub(crate) fn channels<'a>(&'a self, null: BorrowedFd<'a>) -> Channels<'a> {
        let reports = self.reports.as_ref().map(AsFd::as_fd);
        Channels { null, stdout: self.stdout.as_fd(), stderr: self.stderr.as_fd(), reports }
    }
}

impl Outputs {
    pub(super) fn new(with_reports: bool) -> io::Result<(Self, OutputEnds)> {
        let (stdout, stdout_end) = Output::new(PIPE_BYTES)?;
        let (stderr, stderr_end) = Output::new(PIPE_BYTES)?;
        let reports = if with_reports { Some(Output::new(REPORT_PIPE_BYTES)?) } else { None };
        let (reports, reports_end) = reports.unzip();
        let ends = OutputEnds { stdout: stdout_end, stderr: stderr_end, reports: reports_end };
        Ok((Self { stdout, stderr, reports }, ends))
    }

    /// Waits until a phase may have been told.
    pub(super) async fn reported(&self) {
        match &self.reports {
            Some(reports) => reports.readable().await,
            None => std::future::pending().await,
        }
    }

    /// What was told of phases, as far as it fits; nothing when there is nothing now.
    pub(super) fn read_reports<'a>(&mut self, piece: &'a mut [u8; REPORT_PIPE_BYTES]) -> &'a [u8] {
        let length = self.reports.as_mut().and_then(|reports| reports.read(piece)).unwrap_or(0);
        &piece[..length]
    }

    /// Waits until one of them has something.
    pub(super) async fn readable(&self) -> LogChannel {
        tokio::select! {
            () = self.stdout.readable() => LogChannel::Stdout,
            () = self.stderr.readable() => LogChannel::Stderr,
        }
    }

    /// Takes at most one piece into the spool.
    pub(super) fn read(&mut self, channel: LogChannel, spool: &SharedSpool, world: &World) -> Read {
        thread_local! {
            static PIECE: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; limits::CHUNK_BYTES]);
        }
        let output = if channel == LogChannel::Stderr { &mut self.stderr } else { &mut self.stdout };
        PIECE.with_borrow_mut(|piece| match output.read(piece) {
            Some(0) => Read::End,
            Some(length) => {
                if let Some(spool) = &mut *locked(spool) {
                    // What cannot be written is counted, and told at the end of the task.
                    let _kept: io::Result<u64> =
                        spool.append(channel, world.clock.wall_ns(), &piece[..length]);
                }
                Read::Bytes(length)
            }
            None => Read::Nothing,
        })
    }
}

impl Output {
    fn new(size_bytes: usize) -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // Fewer wake-ups for much output; where the system refuses, the usual size does.
        let _size = rustix::pipe::fcntl_setpipe_size(&ours, size_bytes);
        rustix::io::ioctl_fionbio(&ours, true)?;
        Ok((Self { pipe: watch(ours, Interest::READABLE)?, at_end: false }, theirs))
    }

    async fn readable(&self) {
        if self.at_end {
            return std::future::pending().await;
        }
        // It fails only when the runtime is going away.
        if self.pipe.readable().await.map(|mut guard| guard.retain_ready()).is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Bytes read, zero at the end, none when there is nothing now.
    fn read(&mut self, piece: &mut [u8]) -> Option<usize> {
        // Looked at before the read: what becomes readable after it must not be forgotten with it.
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let readiness = self.pipe.poll_read_ready(&mut context);
        loop {
            match rustix::io::read(self.pipe.get_ref(), &mut *piece) {
                Ok(length) => {
                    self.at_end = length == 0;
                    return Some(length);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if let std::task::Poll::Ready(Ok(mut guard)) = readiness {
                        guard.clear_ready();
                    }
                    return None;
                }
                Err(error) => {
                    warn!(%error, "an output pipe cannot be read");
                    self.at_end = true;
                    return Some(0);
                }
            }
        }
    }
}
