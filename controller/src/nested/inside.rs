//! The block's end: what streams look like that are opened inside a block, and the way to their agents.

use std::{
    env, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Once, PoisonError},
};

use millstream_common::{
    convert,
    id::StreamName,
    limits,
    pipe::BoxedPipe,
    spec::{FailurePolicy, ResourceLimits},
    sync_client,
};
use millstream_proto::v1::{
    self, dial_stream_request, dial_stream_response, nested_service_client::NestedServiceClient,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Status, transport::Channel};
use tracing::warn;

use super::{
    RESULTS_DIRECTORY,
    tunnel::{self, Piece},
};
use crate::{
    context::outside_of_runtimes,
    definition::{Defaults, Defined},
    driver::{Handle, Input},
    params::Origin,
    reach::{DialError, Dialing, Entrusted, Reach, Surroundings},
    streams::StreamShared,
};

/// Exit code of a process that SIGTERM has ended, as shells tell it.
const TERMINATED: i32 = 128 + 15;
/// Bytes of a pipe that neither end has taken.
const PIPE_BYTES: usize = 256 * 1024;

/// This process is a block: where its agent listens, and where its results come from.
#[derive(Debug, Clone)]
pub(crate) struct Inside {
    socket: PathBuf,
    output: PathBuf,
}

/// Why a block has no streams.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListError {
    /// Nobody answers.
    #[error("failed to reach the controller through `{}`: {reason}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What was said.
        reason: String,
    },
    /// The controller says no.
    #[error("{0}")]
    Refused(String),
}

impl Inside {
    /// What the environment says; none when this is no block.
    pub(crate) fn find() -> Option<Self> {
        let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Some(Self { socket: variable("MILLSTREAM_SYNC")?, output: variable("MILLSTREAM_OUTPUT")? })
    }

    /// A directory for the results of this block's own streams.
    pub(crate) fn results(&self) -> PathBuf {
        self.output.join(RESULTS_DIRECTORY)
    }

    /// The streams of the test, as they are inside this block. Holds the thread.
    pub(crate) fn streams(&self) -> Result<Vec<NestedStream>, ListError> {
        let refused = |reason: String| ListError::Connect { socket: self.socket.clone(), reason };
        let listed = outside_of_runtimes(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| refused(error.to_string()))?;
            runtime.block_on(async {
                let mut client = client(&self.socket).await.map_err(|error| refused(error.to_string()))?;
                let mut streams = Vec::new();
                let mut request = v1::ListStreamsRequest { from_index: 0 };
                loop {
                    let answer = client.list_streams(request).await;
                    let answer = answer.map_err(|status| ListError::Refused(status.message().to_owned()))?;
                    let answer = answer.into_inner();
                    streams.extend(answer.streams);
                    // An index that does not grow would be asked for without end.
                    if answer.next_index <= request.from_index {
                        return Ok(streams);
                    }
                    request.from_index = answer.next_index;
                }
            })
        })?;
        let wrong = || ListError::Refused("the controller describes a stream that cannot be".to_owned());
        listed.into_iter().map(|stream| NestedStream::new(stream, &self.socket).ok_or_else(wrong)).collect()
    }
}

/// Streams that are open in this process, and when they have ended.
type Open = (Handle, watch::Receiver<Option<Vec<String>>>);

/// A block that is asked to terminate closes its streams first, so that their results are complete. Then the process ends
/// with 128 and the signal's number, unless it has come to its end by itself meanwhile.
pub(crate) fn close_when_terminated(driver: Handle, ended: watch::Receiver<Option<Vec<String>>>) {
    static OPEN: Mutex<Vec<Open>> = Mutex::new(Vec::new());
    static WATCHED: Once = Once::new();
    let lock = || OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut open = lock();
    open.retain(|(_, ended)| ended.borrow().is_none());
    open.push((driver, ended));
    drop(open);
    WATCHED.call_once(|| {
        let watching = move || -> io::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                signal(SignalKind::terminate())?.recv().await;
                let open = std::mem::take(&mut *lock());
                for (driver, _) in &open {
                    driver.send(Input::Close);
                }
                for (_, mut ended) in open {
                    // An error means that the driver is gone: nothing to wait for.
                    drop(ended.wait_for(Option::is_some).await);
                }
                std::process::exit(TERMINATED);
            })
        };
        // Lives as long as the process: a signal that was taken over once has no other effect any more.
        let watcher = std::thread::Builder::new().name("millstream-signals".to_owned()).spawn(move || {
            if let Err(error) = watching() {
                warn!("streams will not be closed when this block is terminated: {error}");
            }
        });
        if let Err(error) = watcher {
            warn!("streams will not be closed when this block is terminated: {error}");
        }
    });
}

async fn client(socket: &Path) -> Result<NestedServiceClient<Channel>, sync_client::SyncError> {
    let channel = sync_client::channel(socket).await?;
    Ok(NestedServiceClient::new(channel)
        .max_decoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX))
}

/// A stream of the test as the block has it.
#[derive(Debug)]
pub(crate) struct NestedStream {
    pub(crate) name: StreamName,
    definition: String,
    defaults: Defaults,
    same_host: bool,
    reach: Arc<Way>,
}

impl NestedStream {
    fn new(stream: v1::NestedStream, socket: &Path) -> Option<Self> {
        let name = StreamName::new(&stream.name).ok()?;
        let some = |text: String| (!text.is_empty()).then_some(text);
        let timeout = match &stream.timeout {
            None => None,
            Some(timeout) => Some(std::time::Duration::try_from(*timeout).ok()?),
        };
        let drains = stream.failure_policy == i32::from(v1::FailurePolicy::Drain);
        Some(Self {
            definition: stream.definition,
            same_host: stream.same_host,
            defaults: Defaults {
                env: stream.environment.into_iter().map(|variable| (variable.name, variable.value)).collect(),
                cwd: some(stream.working_directory),
                user: some(stream.user),
                timeout,
                wrap: stream.wrap,
                limits: stream.limits.map(ResourceLimits::from).unwrap_or_default(),
                on_failure: if drains { FailurePolicy::Drain } else { FailurePolicy::Continue },
            },
            reach: Arc::new(Way {
                socket: socket.to_owned(),
                stream: name.clone(),
                place: stream.place,
                host: stream.host,
                survives_disconnect: stream.survives_disconnect,
            }),
            name,
        })
    }

    /// The same for the handles and the driver.
    pub(crate) fn shared(self, index: usize, surroundings: &Surroundings) -> StreamShared {
        let mut defined = Defined::local(self.name, Origin::named("the test of this block"));
        if !self.same_host {
            "inherited".clone_into(&mut defined.kind);
        }
        defined.defaults = self.defaults;
        // Never exclusive: the test that the block belongs to would wait for itself.
        defined.reach = Some(self.reach);
        StreamShared::inherited(defined, self.definition, index, surroundings)
    }
}

/// The way to an agent through the controller.
#[derive(Debug)]
struct Way {
    socket: PathBuf,
    stream: StreamName,
    place: String,
    host: String,
    survives_disconnect: bool,
}

impl Way {
    async fn open(&self) -> Result<BoxedPipe, DialError> {
        let lost = |reason: String| DialError::Connect {
            address: format!("{} through the controller", self.place),
            source: io::Error::other(reason),
        };
        let refused = |status: Status| match status.code() {
            Code::Unavailable | Code::Unknown | Code::Cancelled => lost(status.message().to_owned()),
            _ => DialError::Refused { address: self.place.clone(), reason: status.message().to_owned() },
        };
        let mut client = client(&self.socket).await.map_err(|error| lost(error.to_string()))?;
        let (outbound, pieces) = mpsc::channel(tunnel::OUTBOUND_COUNT_MAX);
        let begin = tokio_stream::once(dial_stream_request::Piece::Stream(self.stream.to_string()));
        let pieces = ReceiverStream::new(pieces).map(|piece| match piece {
            Piece::Data(data) => dial_stream_request::Piece::Data(data),
            Piece::Taken(count) => dial_stream_request::Piece::TakenCount(count),
        });
        let requests = begin.chain(pieces).map(|piece| v1::DialStreamRequest { piece: Some(piece) });
        let mut answers = client.dial_stream(requests).await.map_err(refused)?.into_inner();
        match answers.message().await.map_err(refused)?.and_then(|answer| answer.piece) {
            Some(dial_stream_response::Piece::Opened(true)) => {}
            _ => return Err(lost("the controller did not say that the pipe is there".to_owned())),
        }
        // What is no piece ends the pipe, as the end of the call does.
        let answers = answers.map_while(|answer| match answer.ok()?.piece? {
            dial_stream_response::Piece::Data(data) => Some(Piece::Data(data)),
            dial_stream_response::Piece::TakenCount(count) => Some(Piece::Taken(count)),
            dial_stream_response::Piece::Opened(_) => None,
        });
        let (near, far) = tokio::io::duplex(PIPE_BYTES);
        // Ends with either end of the pipe.
        drop(tokio::spawn(tunnel::run(Box::new(far), answers, outbound)));
        Ok(Box::new(near))
    }
}

impl Reach for Way {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(self.open())
    }

    fn describe(&self) -> String {
        self.place.clone()
    }

    fn host(&self) -> String {
        self.host.clone()
    }

    fn survives_disconnect(&self) -> bool {
        self.survives_disconnect
    }

    fn entrust<'a>(
        &'a self,
        session: &'a Entrusted,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async {
            let request = v1::EntrustSessionRequest {
                stream: self.stream.to_string(),
                session_id: session.session_id.to_string(),
                secret: session.secret.clone(),
                lease_duration: Some(convert::duration(session.lease)),
                over: session.over,
            };
            let told = async {
                let mut client = client(&self.socket).await.map_err(|error| error.to_string())?;
                client.entrust_session(request).await.map_err(|status| status.message().to_owned())
            };
            if let Err(why) = told.await {
                warn!(
                    place = self.place,
                    why, "this session ends with its lease if this block does not end it"
                );
            }
        })
    }
}
