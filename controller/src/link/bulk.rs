//! What is large: files to the host, long logs and archives from it, on a connection of its own.
//!
//! Jobs live as long as the session, over any number of connections: each goes on where it was. Nothing here renews a
//! lease, starts or ends a task.

use std::{io::Read as _, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use millstream_common::{id::TaskId, limits, outcome::TaskEnd, pipe, spec::BlobDigest, text::printable};
use millstream_proto::v1;
use tokio::{
    sync::{Mutex, Semaphore, mpsc},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{
    Client, Connection, Report, Reports, Sending, Shared,
    events::{Wanted, record, settle},
    lock,
    open::dial,
    session_is_gone,
};
use crate::{
    block::compile::{Upload, UploadSource},
    driver::scribe::Recorder,
    reach::Reach,
};

/// Archives that are fetched at once: each is written to disk while it arrives.
const ARCHIVES_AT_ONCE: usize = 4;

/// Files that are sent at once.
const UPLOADS_AT_ONCE: usize = 4;

/// Pieces of a file that are read ahead of the connection.
const PIECES_AHEAD: usize = 4;

/// Pause after a bulk call that failed while the session lives.
const PAUSE: Duration = Duration::from_millis(200);

/// Bulk work of one session.
pub(super) struct Bulk {
    shared: Arc<Parts>,
    jobs: JoinSet<()>,
}

struct Parts {
    reach: Arc<dyn Reach>,
    shared: Shared,
    reports: Reports,
    /// The bulk connection, made when first needed, and the number of the control connection that it belongs to.
    client: Mutex<Option<(u64, Client)>>,
    archives: Semaphore,
    uploads: Semaphore,
    /// Blobs that are on the host, or on their way: whoever needs one waits for the lock of who brings it.
    blobs: Mutex<std::collections::BTreeSet<BlobDigest>>,
}

impl Bulk {
    pub(super) fn new(reach: Arc<dyn Reach>, shared: Shared, reports: Reports) -> Self {
        let parts = Parts {
            reach,
            shared,
            reports,
            client: Mutex::new(None),
            archives: Semaphore::new(ARCHIVES_AT_ONCE),
            uploads: Semaphore::new(UPLOADS_AT_ONCE),
            blobs: Mutex::default(),
        };
        Self { shared: Arc::new(parts), jobs: JoinSet::new() }
    }

    /// Begins to fetch what does not come with the session's events.
    pub(super) fn begin(&mut self, wanted: Wanted) {
        self.tidy();
        let parts = Arc::clone(&self.shared);
        match wanted {
            Wanted::Log { task } => self.jobs.spawn(async move { parts.log(task).await }),
            Wanted::Archive { task } => self.jobs.spawn(async move { parts.archive(task).await }),
        };
    }

    /// Begins to bring blobs to the host.
    pub(super) fn upload(&mut self, task: TaskId, uploads: Vec<Upload>, sending: Arc<Sending>) {
        self.tidy();
        let parts = Arc::clone(&self.shared);
        self.jobs.spawn(async move {
            let result = parts.upload(uploads, &sending).await;
            (parts.reports)(Report::Uploaded { task, result }).await;
        });
    }

    /// Forgets jobs that are done.
    fn tidy(&mut self) {
        while self.jobs.try_join_next().is_some() {}
    }
}

/// Why a bulk call has to be given up.
enum Failed {
    /// The connection: the job goes on with the next one.
    Connection,
    /// The host says so.
    Refused(String),
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        let again = pipe::is_transport_failure(&status)
            || session_is_gone(&status)
            || matches!(status.code(), Code::Unavailable | Code::Cancelled);
        if again {
            // A session that is gone is the control connection's to report; it ends all jobs.
            Self::Connection
        } else {
            Self::Refused(printable(status.message().as_bytes(), limits::TEXT_BYTES_MAX))
        }
    }
}

impl Parts {
    /// The bulk connection that belongs to the newest control connection. Waits while there is none.
    async fn connection(&self) -> (Connection, Client) {
        let mut watch = self.shared.connection.clone();
        loop {
            let Ok(current) = watch.wait_for(Option::is_some).await.map(|current| current.clone()) else {
                // The session is over, and with it this job.
                return std::future::pending().await;
            };
            let Some(connection) = current else { continue };
            let mut client = self.client.lock().await;
            if let Some((number, client)) = &*client
                && *number == connection.number
            {
                return (connection, client.clone());
            }
            match dial(&*self.reach).await {
                Ok(new) => {
                    *client = Some((connection.number, new.clone()));
                    return (connection, new);
                }
                Err(_not_yet) => {
                    drop(client);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Forgets a connection that failed.
    async fn drop_connection(&self, failed: &Connection) {
        let mut client = self.client.lock().await;
        if client.as_ref().is_some_and(|(number, _)| *number == failed.number) {
            *client = None;
        }
        drop(client);
        tokio::time::sleep(PAUSE).await;
    }

    fn recorder(&self, task: TaskId) -> Option<Recorder> {
        lock(&self.shared.progress).get(&task).map(|incoming| incoming.recorder.clone())
    }

    /// Reads the rest of a log to its end.
    async fn log(&self, task: TaskId) {
        let Some(recorder) = self.recorder(task) else { return };
        let problem = loop {
            let (connection, client) = self.connection().await;
            match self.log_once(task, &recorder, &connection, client).await {
                Ok(()) => break None,
                Err(Failed::Connection) => self.drop_connection(&connection).await,
                Err(Failed::Refused(why)) => break Some(format!("the rest of the log cannot be had: {why}")),
            }
        };
        if let Some(incoming) = lock(&self.shared.progress).get_mut(&task) {
            incoming.log_arrived = true;
            incoming.problem = incoming.problem.take().or(problem);
        }
        settle(task, &self.shared, &self.reports).await;
    }

    async fn log_once(
        &self,
        task: TaskId,
        recorder: &Recorder,
        connection: &Connection,
        mut client: Client,
    ) -> Result<(), Failed> {
        let position = lock(&self.shared.progress).get(&task).map_or(0, |incoming| incoming.position);
        let request = v1::WatchTaskRequest {
            session: Some(connection.session.key()),
            task_id: task.to_string(),
            position,
            known: Vec::new(),
        };
        let mut events = client.watch_task(request).await?.into_inner();
        while let Some(message) = events.message().await? {
            for event in message.events {
                match event.event {
                    Some(v1::task_event::Event::Log(chunk)) => {
                        let next = chunk.next_position;
                        record(recorder, chunk).await.map_err(Failed::Refused)?;
                        if let Some(incoming) = lock(&self.shared.progress).get_mut(&task) {
                            incoming.position = next;
                        }
                    }
                    Some(v1::task_event::Event::End(_)) => return Ok(()),
                    _ => {}
                }
            }
        }
        Err(Failed::Connection)
    }

    /// Fetches an archive to its end.
    async fn archive(&self, task: TaskId) {
        let end: Option<Box<TaskEnd>> =
            lock(&self.shared.progress).get(&task).and_then(|incoming| incoming.end.clone());
        let (Some(info), Some(recorder)) = (end.and_then(|end| end.archive), self.recorder(task)) else {
            return;
        };
        let _permit = self.archives.acquire().await;
        recorder.archive_begins(info.size_bytes, &info.sha256);
        let mut offset = 0;
        let problem = loop {
            let (connection, client) = self.connection().await;
            match self.archive_once(task, &recorder, &connection, client, &mut offset).await {
                Ok(()) if offset == info.size_bytes => break None,
                Ok(()) | Err(Failed::Connection) if offset < info.size_bytes => {
                    self.drop_connection(&connection).await
                }
                Ok(()) | Err(Failed::Connection) => {
                    break Some("the archive is longer than announced".to_owned());
                }
                Err(Failed::Refused(why)) => break Some(format!("the results cannot be had: {why}")),
            }
        };
        if problem.is_none() {
            recorder.archive_ends();
        }
        if let Some(incoming) = lock(&self.shared.progress).get_mut(&task) {
            incoming.archive_arrived = true;
            incoming.problem = incoming.problem.take().or(problem);
        }
        settle(task, &self.shared, &self.reports).await;
    }

    async fn archive_once(
        &self,
        task: TaskId,
        recorder: &Recorder,
        connection: &Connection,
        mut client: Client,
        offset: &mut u64,
    ) -> Result<(), Failed> {
        let request = v1::FetchArchiveRequest {
            session: Some(connection.session.key()),
            task_id: task.to_string(),
            offset: *offset,
        };
        let mut pieces = client.fetch_archive(request).await?.into_inner();
        while let Some(message) = pieces.message().await? {
            *offset += u64::try_from(message.data.len()).unwrap_or(u64::MAX);
            recorder.archive_piece(message.data).await;
        }
        Ok(())
    }

    /// Brings what is missing of these blobs to the host.
    async fn upload(&self, uploads: Vec<Upload>, sending: &Arc<Sending>) -> Result<(), String> {
        // One task at a time asks and sends: the next one finds what this one brought.
        let mut there = self.blobs.lock().await;
        let (known, wanted): (Vec<&Upload>, Vec<&Upload>) =
            uploads.iter().partition(|upload| there.contains(&upload.digest));
        known.iter().for_each(|upload| sending.arrived(upload.size_bytes));
        for some in wanted.chunks(limits::BLOBS_COUNT_MAX) {
            let missing = loop {
                let (connection, client) = self.connection().await;
                match find_missing(some, &connection, client).await {
                    Ok(missing) => break missing,
                    Err(Failed::Connection) => self.drop_connection(&connection).await,
                    Err(Failed::Refused(why)) => return Err(why),
                }
            };
            for upload in some {
                if !missing.contains(&upload.digest.to_string()) {
                    sending.arrived(upload.size_bytes);
                    continue;
                }
                let _permit = self.uploads.acquire().await;
                loop {
                    let (connection, client) = self.connection().await;
                    match send(upload, &connection, client, sending).await {
                        Ok(()) => {
                            sending.arrived(0);
                            break;
                        }
                        Err(Failed::Connection) => self.drop_connection(&connection).await,
                        Err(Failed::Refused(why)) => return Err(why),
                    }
                }
            }
            there.extend(some.iter().map(|upload| upload.digest));
        }
        Ok(())
    }
}

async fn find_missing(
    uploads: &[&Upload],
    connection: &Connection,
    mut client: Client,
) -> Result<Vec<String>, Failed> {
    let request = v1::FindMissingBlobsRequest {
        session: Some(connection.session.key()),
        blake3: uploads.iter().map(|upload| upload.digest.to_string()).collect(),
    };
    Ok(client.find_missing_blobs(request).await?.into_inner().missing_blake3)
}

/// Sends one blob.
async fn send(
    upload: &Upload,
    connection: &Connection,
    mut client: Client,
    sending: &Arc<Sending>,
) -> Result<(), Failed> {
    let sending = Arc::clone(sending);
    let (pieces, receiver) = mpsc::channel(PIECES_AHEAD);
    let first = v1::UploadBlobRequest {
        session: Some(connection.session.key()),
        blake3: upload.digest.to_string(),
        size_bytes: upload.size_bytes,
        data: Bytes::new(),
    };
    let reading = match upload.source.clone() {
        UploadSource::Bytes(bytes) => {
            tokio::spawn(async move { send_bytes(first, bytes, &pieces, &sending).await })
        }
        UploadSource::Path(path) => {
            tokio::task::spawn_blocking(move || send_file(first, path, &pieces, &sending))
        }
    };
    let answered = client.upload_blob(ReceiverStream::new(receiver)).await;
    // Dropping the call has closed the channel: the reader ends. What went wrong here explains what the host said.
    match reading.await {
        Ok(Err(why)) => Err(Failed::Refused(why)),
        Ok(Ok(())) | Err(_) => answered.map(drop).map_err(Failed::from),
    }
}

async fn send_bytes(
    first: v1::UploadBlobRequest,
    mut bytes: Bytes,
    pieces: &mpsc::Sender<v1::UploadBlobRequest>,
    sending: &Sending,
) -> Result<(), String> {
    let mut message = first;
    loop {
        message.data = bytes.split_to(bytes.len().min(limits::CHUNK_BYTES));
        sending.piece(message.data.len());
        if pieces.send(message).await.is_err() || bytes.is_empty() {
            return Ok(());
        }
        message = v1::UploadBlobRequest::default();
    }
}

fn send_file(
    first: v1::UploadBlobRequest,
    path: PathBuf,
    pieces: &mpsc::Sender<v1::UploadBlobRequest>,
    sending: &Sending,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("failed to read `{}`: {error}", path.display());
    let mut file = std::fs::File::open(&path).map_err(failed)?;
    let mut message = first;
    loop {
        let mut data = Vec::with_capacity(limits::CHUNK_BYTES);
        let length = u64::try_from(limits::CHUNK_BYTES).unwrap_or(u64::MAX);
        (&mut file).take(length).read_to_end(&mut data).map_err(failed)?;
        let is_last = data.len() < limits::CHUNK_BYTES;
        sending.piece(data.len());
        message.data = data.into();
        if pieces.blocking_send(message).is_err() || is_last {
            return Ok(());
        }
        message = v1::UploadBlobRequest::default();
    }
}
