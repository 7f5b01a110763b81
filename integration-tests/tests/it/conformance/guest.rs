//! A reach such as a user writes: an agent of its own in a process of its own, started when it is first dialled, ended when
//! it is released, or with the last of its pipes.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use millstream::reach::{DialError, Dialing, Reach, Releasing};
use millstream_integration_tests::tools;
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};

/// The place.
#[derive(Debug)]
pub(super) struct Guest {
    name: String,
    survives: bool,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    agent: Option<Running>,
    pipes: usize,
}

/// An agent that ends when its standard input does.
#[derive(Debug)]
struct Running {
    child: Child,
    directory: TempDir,
}

impl Running {
    fn start() -> Self {
        let private = fs::Permissions::from_mode(0o700);
        let directory = tempfile::Builder::new().prefix("guest-").permissions(private).tempdir().unwrap();
        let mut command = Command::new(tools::agent_program());
        command.args(["stdio", "--child", "--directory"]).arg(directory.path());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { child, directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    pub(super) fn named(name: &str, survives: bool) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), survives, state: Arc::default() })
    }

    /// The process of its agent, while there is one.
    pub(super) fn process(&self) -> Option<u32> {
        lock(&self.state).agent.as_ref().map(|agent| agent.child.id())
    }
}

impl Reach for Guest {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            // Counted before anything is awaited, and until it is dropped: whoever gives up the dial takes it back.
            let (pipe, socket) = {
                let mut state = lock(&self.state);
                let socket = state.agent.get_or_insert_with(Running::start).socket();
                state.pipes += 1;
                (Counted { state: Arc::clone(&self.state), survives: self.survives }, socket)
            };
            let stream = UnixStream::connect(socket)
                .await
                .map_err(|source| DialError::Connect { address: self.describe(), source })?;
            Ok(Box::new(GuestPipe { stream, _counted: pipe }) as _)
        })
    }

    fn describe(&self) -> String {
        format!("guest://{}", self.name)
    }

    fn host(&self) -> String {
        self.name.clone()
    }

    fn survives_disconnect(&self) -> bool {
        self.survives
    }

    fn release(&self) -> Releasing<'_> {
        Box::pin(async {
            let agent = lock(&self.state).agent.take();
            tokio::task::spawn_blocking(|| drop(agent)).await.unwrap();
            Vec::new()
        })
    }
}

/// One pipe that there is.
struct Counted {
    state: Arc<Mutex<State>>,
    survives: bool,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.pipes -= 1;
        if state.pipes == 0 && !self.survives {
            state.agent = None;
        }
    }
}

struct GuestPipe {
    stream: UnixStream,
    _counted: Counted,
}

impl AsyncRead for GuestPipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for GuestPipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
