//! A byte pipe over the standard input and output of a child process: `ssh`, a command, the client of a container engine.
//!
//! What the child says on its standard error is kept, within a bound, so that whoever dials is told why there is no pipe.
//! Dropping a pipe ends its child: it is given a moment to end by itself, is asked, and then killed, with its process group.
//! It is a group of its own, so that Ctrl-C on a test does not cut the pipe before the test has tidied.

use std::{
    fmt,
    future::Future,
    io,
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    pin::Pin,
    process::{Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, BytesMut};
use millstream_common::{protocol::GREETING, text::printable};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, Interest, ReadBuf, unix::AsyncFd},
    net::unix::pipe,
    sync::{Notify, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::task::TaskTracker;
use tracing::warn;

/// How long a child may take to end by itself once its input has ended: one that relays has the other end to tell.
const LEAVING_MAX: Duration = Duration::from_secs(1);
/// How long it may take to end when it is asked to, before it is killed.
const ASKED_MAX: Duration = Duration::from_secs(1);
/// How long the last words of a child are waited for: what it has left running may hold its standard error open.
const LAST_WORDS_MAX: Duration = Duration::from_millis(500);
/// How long the end of a child is waited for whose output has ended, so that it can be told.
const END_MAX: Duration = Duration::from_secs(2);
/// What is kept of a standard error: its end.
const SAID_BYTES_MAX: usize = 8 * 1024;
/// What is shown of it.
const SHOWN_BYTES_MAX: usize = 512;
/// Lines that are shown of it: the reason is in the last ones.
const SHOWN_LINES_MAX: usize = 3;
/// What may be printed before the other end says that it is there: banners, messages of the day, noise of start-up files.
const NOISE_BYTES_MAX: usize = 64 * 1024;
/// What is shown of it.
const NOISE_SHOWN_BYTES_MAX: usize = 200;

/// The children of one reach.
#[derive(Debug, Clone, Default)]
pub(crate) struct Children {
    attended: TaskTracker,
    /// Tells all of them to end.
    ending: Arc<Notify>,
    /// Grows while something large comes on through one of them.
    progress: Arc<AtomicU64>,
}

impl Children {
    /// Ends every child, whether its pipe was dropped or not, and waits until they are gone.
    pub(crate) async fn end(&self) {
        self.ending.notify_waiters();
        self.attended.close();
        self.attended.wait().await;
        self.attended.reopen();
    }

    /// Something large has come on.
    pub(crate) fn progressed(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// How often something has.
    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Starts a program that gives a pipe. Must be called within a runtime.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn spawn(&self, mut command: Command) -> io::Result<ChildPipe> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        // From here on it is ended and reaped whatever happens.
        let running = Running { child };
        let (Some(input), Some(output), Some(errors)) = pipes else {
            unreachable!("all three were asked for")
        };
        let pidfd = pidfd_open(running.pid(), PidfdFlags::NONBLOCK)?;
        let pidfd = watched(pidfd)?;
        let input = pipe::Sender::from_owned_fd(OwnedFd::from(input))?;
        let output = pipe::Receiver::from_owned_fd(OwnedFd::from(output))?;
        let errors = pipe::Receiver::from_owned_fd(OwnedFd::from(errors))?;
        let said = Said::keeping(SAID_BYTES_MAX);
        let listening = tokio::spawn(said.clone().listen(errors));
        let (status_in, status) = watch::channel(None);
        let (held, dropped) = oneshot::channel();
        let ending = Arc::clone(&self.ending).notified_owned();
        self.attended.spawn(async move {
            let given_up = async {
                tokio::select! {
                    _ = dropped => {}
                    () = ending => {}
                }
            };
            let status = running.attend(pidfd, given_up).await;
            // Whoever learns of the end finds the last words as well.
            hear_out(listening).await;
            status_in.send_replace(Some(status));
        });
        Ok(ChildPipe {
            input: Some(input),
            output,
            head: BytesMut::new(),
            said,
            status,
            ending: None,
            _held: held,
        })
    }
}

#[expect(unsafe_code, reason = "the runtime wants a promise about the descriptor")]
fn watched(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is the same one until it is dropped, and nobody can reach it but through the result.
    let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
    watched.map_err(|error| error.into_parts().1)
}

/// A child that runs, or waits to be reaped.
struct Running {
    child: std::process::Child,
}

impl Running {
    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Signals everything in the child's group. The child is not reaped yet, so that its number is nobody else's.
    fn signal(&self, signal: Signal) {
        // A group that is gone has ended as it should.
        let _gone = kill_process_group(self.pid(), signal);
    }

    /// Waits for the end of the child, and ends it when it was given up.
    async fn attend(mut self, pidfd: AsyncFd<OwnedFd>, given_up: impl Future<Output = ()>) -> ExitStatus {
        let ended = || async { drop(pidfd.readable().await) };
        tokio::select! {
            () = ended() => {}
            () = given_up => {
                if timeout(LEAVING_MAX, ended()).await.is_err() {
                    self.signal(Signal::TERM);
                    if timeout(ASKED_MAX, ended()).await.is_err() {
                        self.signal(Signal::KILL);
                        ended().await;
                    }
                }
            }
        }
        self.reap()
    }

    /// Ends what is left of the group, and reaps the child, which has ended or does so now.
    fn reap(&mut self) -> ExitStatus {
        self.signal(Signal::KILL);
        self.child.wait().unwrap_or_else(|error| {
            warn!(%error, "a child cannot be waited for");
            ExitStatus::from_raw(Signal::KILL.as_raw())
        })
    }
}

impl Drop for Running {
    /// The runtime ends while the child runs, or the child could not be attended to.
    fn drop(&mut self) {
        if let Ok(None) | Err(_) = self.child.try_wait() {
            self.reap();
        }
    }
}

/// The end of what a child has said on one of its outputs.
#[derive(Debug, Clone)]
pub(crate) struct Said {
    bytes: Arc<Mutex<Vec<u8>>>,
    bytes_max: usize,
}

/// Listens to the last words of a child that has ended, but not for long.
pub(crate) async fn hear_out(mut listening: JoinHandle<()>) {
    if timeout(LAST_WORDS_MAX, &mut listening).await.is_err() {
        listening.abort();
    }
}

impl Said {
    /// Keeps so many bytes, the last ones.
    pub(crate) fn keeping(bytes_max: usize) -> Self {
        Self { bytes: Arc::default(), bytes_max }
    }

    /// Listens until the output ends. What was heard so far can be had meanwhile.
    pub(crate) async fn listen(self, mut output: impl AsyncRead + Unpin) {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = output.read(&mut buffer).await {
            let mut said = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            said.extend_from_slice(&buffer[..length]);
            let surplus = said.len().saturating_sub(self.bytes_max);
            said.drain(..surplus);
        }
    }

    /// What was heard.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// The last lines, made safe to print; empty when nothing was said.
    fn last_lines(&self) -> String {
        let text = self.text();
        let worded = |line: &&str| line.chars().any(char::is_alphanumeric);
        let mut lines: Vec<&str> =
            text.lines().map(str::trim).filter(worded).rev().take(SHOWN_LINES_MAX).collect();
        lines.reverse();
        printable(lines.join("; ").as_bytes(), SHOWN_BYTES_MAX)
    }
}

/// How a child ended, and what it said last.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    /// None when it has closed its output and goes on.
    pub(crate) status: Option<ExitStatus>,
    /// The last lines of its standard error.
    pub(crate) said: String,
}

impl Ended {
    /// With which exit code, when it has one.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status?.code()
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            None => f.write_str("it closed its output"),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => write!(f, "it ended with exit code {code}"),
                (None, Some(signal)) => write!(f, "it was ended by signal {signal}"),
                (None, None) => write!(f, "it ended with {status}"),
            },
        }?;
        if self.said.is_empty() { f.write_str(" and without a word") } else { write!(f, ": {}", self.said) }
    }
}

impl std::error::Error for Ended {}

/// What the other end says before the pipe begins: `millstream-stdio TOKEN` and whatever follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The first word.
    pub(crate) word: String,
    /// What follows the token.
    pub(crate) rest: String,
}

/// Why the other end did not answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    /// The child has ended.
    #[error("{ended}{}", printed(noise))]
    Ended {
        /// How.
        ended: Ended,
        /// What it printed instead.
        noise: String,
    },
    /// It prints and prints.
    #[error("it printed {} KiB and no connection began: {}", NOISE_BYTES_MAX / 1024, printed(noise).trim_start_matches("; "))]
    Noise {
        /// The end of what it printed.
        noise: String,
    },
    /// A terminal changes bytes.
    #[error("there is a terminal in between, which changes bytes: leave out what asks for one, such as `-t`")]
    Terminal,
    /// The pipe broke.
    #[error("the pipe to it broke: {}", millstream_common::tls::reason(source))]
    Broken {
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn printed(noise: &str) -> String {
    if noise.is_empty() { String::new() } else { format!("; it printed `{noise}`") }
}

/// A pipe over one child.
pub(crate) struct ChildPipe {
    /// None once it was closed.
    input: Option<pipe::Sender>,
    output: pipe::Receiver,
    /// Read before the pipe began, and not taken yet.
    head: BytesMut,
    said: Said,
    status: watch::Receiver<Option<ExitStatus>>,
    /// The output has ended; how is being found out.
    ending: Option<Pin<Box<dyn Future<Output = Ended> + Send>>>,
    /// Dropped with the pipe, which ends the child.
    _held: oneshot::Sender<()>,
}

impl fmt::Debug for ChildPipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildPipe").finish_non_exhaustive()
    }
}

impl ChildPipe {
    /// Reads lines until the other end answers, which it does with a line of a word that begins with `millstream-`, and the
    /// token. Everything before is noise.
    ///
    /// # Errors
    /// When it does not answer.
    ///
    /// # Cancel safety
    /// What was read is kept.
    pub(crate) async fn answer(&mut self, token: &str) -> Result<Answer, AnswerError> {
        let mut noise = BytesMut::new();
        loop {
            while let Some(end) = self.head.iter().position(|byte| *byte == b'\n') {
                let line = self.head.split_to(end + 1);
                let text = String::from_utf8_lossy(&line[..end]);
                if let Some(answer) = answer_in(text.trim_end_matches('\r'), token) {
                    return if text.ends_with('\r') { Err(AnswerError::Terminal) } else { Ok(answer) };
                }
                noise.unsplit(line);
            }
            if noise.len() + self.head.len() > NOISE_BYTES_MAX {
                return Err(AnswerError::Noise { noise: shown(&noise) });
            }
            match self.output.read_buf(&mut self.head).await {
                Ok(1..) => {}
                Ok(0) => {
                    noise.extend_from_slice(&self.head);
                    let ended = last_words(self.status.clone(), self.said.clone()).await;
                    return Err(AnswerError::Ended { ended, noise: shown(&noise) });
                }
                Err(source) => return Err(AnswerError::Broken { source }),
            }
        }
    }
}

impl ChildPipe {
    /// The writing side alone, for who writes and listens at once; [`ChildPipe::put_input`] puts it back.
    pub(crate) fn take_input(&mut self) -> Option<pipe::Sender> {
        self.input.take()
    }

    pub(crate) fn put_input(&mut self, input: Option<pipe::Sender>) {
        self.input = input;
    }
}

fn answer_in(line: &str, token: &str) -> Option<Answer> {
    let mut words = line.splitn(3, ' ');
    let (word, given, rest) = (words.next()?, words.next()?, words.next().unwrap_or_default());
    let is_answer = given == token && word.starts_with("millstream-");
    is_answer.then(|| Answer { word: word.to_owned(), rest: rest.to_owned() })
}

/// Whether the answer is the greeting of a relay, behind which the pipe begins.
pub(crate) fn is_greeting(answer: &Answer) -> bool {
    answer.word == GREETING
}

/// The end of what was printed, in one line.
fn shown(noise: &[u8]) -> String {
    let text = String::from_utf8_lossy(noise);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let from = text.char_indices().rev().nth(NOISE_SHOWN_BYTES_MAX).map_or(0, |(at, _)| at);
    printable(&text.as_bytes()[from..], NOISE_SHOWN_BYTES_MAX * 2)
}

/// Waits for the end of a child whose output has ended, but not for long.
async fn last_words(mut status: watch::Receiver<Option<ExitStatus>>, said: Said) -> Ended {
    let status = match timeout(END_MAX, status.wait_for(Option::is_some)).await {
        Ok(Ok(found)) => *found,
        Ok(Err(_)) | Err(_) => None,
    };
    Ended { status, said: said.last_lines() }
}

impl AsyncRead for ChildPipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.head.is_empty() {
            let length = this.head.len().min(buffer.remaining());
            buffer.put_slice(&this.head[..length]);
            this.head.advance(length);
            return Poll::Ready(Ok(()));
        }
        if this.ending.is_none() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut this.output).poll_read(context, buffer))?;
            if buffer.filled().len() > before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            this.ending = Some(Box::pin(last_words(this.status.clone(), this.said.clone())));
        }
        let Some(ending) = &mut this.ending else { return Poll::Ready(Ok(())) };
        let ended = ready!(ending.as_mut().poll(context));
        this.ending = None;
        // A relay never ends by itself while it is used: why it did is worth more than the end of a file.
        Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, ended)))
    }
}

impl AsyncWrite for ChildPipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.input {
            Some(input) => Pin::new(input).poll_write(context, bytes),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.input = None;
        Poll::Ready(Ok(()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.input {
            Some(input) => Pin::new(input).poll_write_vectored(context, slices),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    async fn told(script: &str) -> String {
        let mut pipe = Children::default().spawn(sh(script)).unwrap();
        pipe.answer("token").await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn bytes_begin_behind_the_answer_and_noise_is_skipped() {
        let children = Children::default();
        let script = "echo welcome; printf 'no newline\\nmillstream-stdio other\\nmillstream-stdio token x y\\nab'; exec cat";
        let mut pipe = children.spawn(sh(script)).unwrap();
        let answer = pipe.answer("token").await.unwrap();
        assert_eq!((answer.word.as_str(), answer.rest.as_str()), (GREETING, "x y"));
        pipe.write_all(b"cd").await.unwrap();
        let mut got = [0; 4];
        pipe.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"abcd");
        drop(pipe);
        children.end().await;
    }

    #[tokio::test]
    async fn who_does_not_answer_is_told_with_what_was_said() {
        let error = told("echo hello; echo one >&2; echo '@@@' >&2; printf 'two\\033[1m' >&2; exit 7").await;
        assert_eq!(error, "it ended with exit code 7: one; two\\u{1b}[1m; it printed `hello`");
        assert_eq!(told("exit 0").await, "it ended with exit code 0 and without a word");
        assert_eq!(told("kill -9 $$").await, "it was ended by signal 9 and without a word");
        assert_eq!(
            told("printf 'millstream-stdio token\\r\\n'; cat").await,
            "there is a terminal in between, which changes bytes: leave out what asks for one, such as `-t`"
        );
        // No pipe of the system fails so on demand.
        let broken = AnswerError::Broken { source: io::ErrorKind::ConnectionReset.into() };
        assert_eq!(broken.to_string(), "the pipe to it broke: connection reset");
        let error = told("while echo again; do :; done").await;
        assert!(error.starts_with("it printed 64 KiB and no connection began: it printed `"), "{error}");
    }

    #[tokio::test]
    async fn a_child_that_goes_while_it_is_used_says_why() {
        let mut pipe = Children::default().spawn(sh("echo gone away >&2; exit 3")).unwrap();
        let error = pipe.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.to_string(), "it ended with exit code 3: gone away");
    }

    #[tokio::test]
    async fn a_standard_error_that_somebody_holds_holds_nobody_up() {
        let children = Children::default();
        let mut pipe = children
            .spawn(sh("setsid sh -c 'echo $$; exec sleep 600' & read nothing; echo bye >&2"))
            .unwrap();
        let mut output = vec![0; 64];
        let length = pipe.read(&mut output).await.unwrap();
        let daemon: i32 = String::from_utf8_lossy(&output[..length]).trim().parse().unwrap();
        // The daemon has the standard output as well: the end of the pipe is not waited for either.
        drop(pipe);
        timeout(Duration::from_secs(20), children.end()).await.unwrap();
        kill_process_group(Pid::from_raw(daemon).unwrap(), Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn dropping_the_pipe_ends_a_child_that_does_not_want_to_and_its_group() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let children = Children::default();
        let script =
            format!("trap '' TERM; exec 5>'{}'; sleep 600 & echo up; wait; sleep 600", fifo.display());
        let mut pipe = children.spawn(sh(&script)).unwrap();
        // Ends when nobody of the group lives: each has the other end.
        let all_gone = tokio::task::spawn_blocking(move || std::fs::read(fifo));
        pipe.read_exact(&mut [0; 3]).await.unwrap();
        drop(pipe);
        timeout(Duration::from_secs(20), children.end()).await.unwrap();
        timeout(Duration::from_secs(20), all_gone).await.unwrap().unwrap().unwrap();
    }
}
