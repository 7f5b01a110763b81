//! Bytes by the piece: blobs in, archives out.
//!
//! Decides nothing about sessions: its callers have checked who asks. All disk work runs on the blocking pool, one piece at
//! a time, so that neither a slow disk nor a slow peer holds anything but itself.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use millstream_common::{
    convert::{self, ConvertError, Problem},
    limits,
    spec::BlobDigest,
};
use millstream_proto::v1;
use tokio::task::JoinError;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::{store::Store, supervisors::SessionDirectory};
use crate::supervisor::blobs::BlobError;

/// Why bytes could not be taken in or handed out.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The request is not valid.
    #[error(transparent)]
    Request(#[from] ConvertError),
    /// The blob could not be stored.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The peer went away or broke off.
    #[error("the upload broke off: {}", .0.message())]
    Broken(Box<Status>),
    /// There is no archive of this task.
    #[error("the task left no results, or was released")]
    NoArchive,
    /// A position behind the end.
    #[error("the archive has {length} bytes: it cannot be read from {offset}")]
    Offset {
        /// Position asked for.
        offset: u64,
        /// Bytes of the archive.
        length: u64,
    },
    /// The archive cannot be read.
    #[error("failed to read the archive `{}`", path.display())]
    Read {
        /// The archive.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The work was thrown away because the agent ends.
    #[error("the agent is ending: try again")]
    Ending,
}

impl TransferError {
    /// What the caller is told. INVALID_ARGUMENT: correct the request or send the blob again; NOT_FOUND: there is nothing to
    /// fetch; OUT_OF_RANGE: begin earlier; RESOURCE_EXHAUSTED: the disk or the store is full; UNAVAILABLE: try again; INTERNAL: look into
    /// the host's store.
    #[must_use]
    pub fn status(&self) -> Status {
        let message = told(self);
        match self {
            Self::Request(_) | Self::Blob(BlobError::Length { .. } | BlobError::Digest { .. }) => {
                Status::invalid_argument(message)
            }
            Self::Blob(BlobError::TooLarge { .. } | BlobError::NoRoom { .. }) => {
                Status::resource_exhausted(message)
            }
            Self::Blob(BlobError::Missing { .. }) => Status::failed_precondition(message),
            Self::Blob(BlobError::Store { source, .. } | BlobError::Place { source, .. })
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                Status::resource_exhausted(message)
            }
            Self::Blob(BlobError::Store { .. } | BlobError::Place { .. }) | Self::Read { .. } => {
                Status::internal(message)
            }
            Self::Broken(status) => Status::clone(status),
            Self::NoArchive => Status::not_found(message),
            Self::Offset { .. } => Status::out_of_range(message),
            Self::Ending => Status::unavailable(message),
        }
    }
}

/// An error with its causes, in one line.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, TransferError> {
    tokio::task::spawn_blocking(work).await.map_err(|error: JoinError| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_) => TransferError::Ending,
    })
}

/// Tells which of these blobs are not there, in the same order; the session holds the others.
///
/// # Errors
/// When there are too many, or one is no digest.
pub(crate) async fn find_missing(
    store: &Store,
    session: &SessionDirectory,
    digests: Vec<String>,
) -> Result<Vec<String>, TransferError> {
    let (count, limit) = (digests.len(), limits::BLOBS_COUNT_MAX);
    if count > limit {
        return Err(ConvertError::new("blake3", Problem::TooMany { count, limit }).into());
    }
    let digests = digests
        .iter()
        .enumerate()
        .map(|(index, digest)| convert::blob_digest_in(&format!("blake3[{index}]"), digest))
        .collect::<Result<Vec<BlobDigest>, _>>()?;
    let (store, session) = (store.clone(), session.clone());
    let missing = blocking(move || store.missing(&session, &digests)).await?;
    Ok(missing.iter().map(ToString::to_string).collect())
}

/// Stores one blob from its first message, whose session has been checked, and all that follow, and holds it for the
/// session. Returns whether it was there already; then the bytes are not waited for.
///
/// # Errors
/// When what arrives is not what the first message announces, the peer breaks off, or the disk or the store is full. Nothing
/// of the blob is kept then.
///
/// # Cancel safety
/// What has arrived is forgotten when this is dropped.
pub(crate) async fn receive<S>(
    store: &Store,
    session: &SessionDirectory,
    first: v1::UploadBlobRequest,
    mut more: S,
) -> Result<bool, TransferError>
where
    S: Stream<Item = Result<v1::UploadBlobRequest, Status>> + Unpin,
{
    let digest = convert::blob_digest_in("blake3", &first.blake3)?;
    let (size_bytes, store, session) = (first.size_bytes, store.clone(), session.clone());
    let begun = blocking(move || store.begin(&session, digest, size_bytes));
    let Some(mut blob) = begun.await?? else { return Ok(true) };
    let mut piece = first.data;
    loop {
        let (length, limit) = (piece.len(), limits::CHUNKS_MESSAGE_BYTES_MAX);
        if length > limit {
            return Err(ConvertError::new("data", Problem::TooLong { length, limit }).into());
        }
        blob = blocking(move || blob.write(&piece).map(|()| blob)).await??;
        match more.next().await {
            None => break,
            Some(Err(status)) => return Err(TransferError::Broken(Box::new(status))),
            Some(Ok(next)) => {
                if next.session.is_some() || !next.blake3.is_empty() || next.size_bytes != 0 {
                    let problem = Problem::Conflict { other: "data" };
                    return Err(ConvertError::new("session, blake3 or size_bytes", problem).into());
                }
                piece = next.data;
            }
        }
    }
    blocking(move || blob.finish()).await?.map_err(Into::into)
}

/// An archive that is being handed out.
#[derive(Debug)]
pub struct ArchivePieces {
    file: Arc<File>,
    path: PathBuf,
    offset: u64,
    length: u64,
    ready: VecDeque<Bytes>,
}

impl ArchivePieces {
    /// Opens the archive of a finished task at any offset, its length included.
    ///
    /// # Errors
    /// When there is none, or the offset lies behind its end.
    pub async fn open(path: &Path, offset: u64) -> Result<Self, TransferError> {
        let path = path.to_owned();
        blocking(move || {
            let failed = |source: io::Error| match source.kind() {
                io::ErrorKind::NotFound => TransferError::NoArchive,
                _ => TransferError::Read { path: path.clone(), source },
            };
            let file = File::open(&path).map_err(failed)?;
            let length = file.metadata().map_err(failed)?.len();
            if offset > length {
                return Err(TransferError::Offset { offset, length });
            }
            Ok(Self { file: Arc::new(file), path, offset, length, ready: VecDeque::new() })
        })
        .await?
    }

    /// The next piece of at most [`limits::CHUNK_BYTES`]; none at the end. Reads a few pieces ahead: at most 1 MiB.
    ///
    /// # Errors
    /// When the archive cannot be read, or became shorter.
    ///
    /// # Cancel safety
    /// No piece is lost when this is dropped.
    pub async fn next(&mut self) -> Result<Option<Bytes>, TransferError> {
        if let Some(piece) = self.ready.pop_front() {
            return Ok(Some(piece));
        }
        let left = usize::try_from(self.length - self.offset).unwrap_or(usize::MAX);
        let wanted = left.min(limits::CHUNKS_MESSAGE_BYTES_MAX);
        if wanted == 0 {
            return Ok(None);
        }
        let (file, offset) = (Arc::clone(&self.file), self.offset);
        let read = blocking(move || read_at(&file, offset, wanted)).await?;
        let failed = |source| TransferError::Read { path: self.path.clone(), source };
        let mut bytes = read.map_err(failed)?;
        if bytes.is_empty() {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        self.offset += bytes.len() as u64;
        while bytes.len() > limits::CHUNK_BYTES {
            self.ready.push_back(bytes.split_to(limits::CHUNK_BYTES));
        }
        self.ready.push_back(bytes);
        Ok(self.ready.pop_front())
    }
}

fn read_at(file: &File, offset: u64, wanted: usize) -> io::Result<Bytes> {
    let mut buffer = Vec::with_capacity(wanted);
    loop {
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut buffer), offset) {
            Ok(_) => {
                buffer.truncate(wanted);
                return Ok(buffer.into());
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use millstream_common::clock::World;
    use tonic::Code;

    use super::*;

    fn store() -> (tempfile::TempDir, Store, SessionDirectory) {
        let dir = tempfile::tempdir().unwrap();
        let world = World::system();
        let session = SessionDirectory::of(dir.path(), world.ids.session_id(), None);
        session.create().unwrap();
        let sessions = dir.path().join("sessions");
        let store = Store::open(dir.path().join("blobs"), sessions, 1 << 20, world).unwrap();
        (dir, store, session)
    }

    fn first(content: &[u8], announced: u64, data: &[u8]) -> v1::UploadBlobRequest {
        v1::UploadBlobRequest {
            session: Some(v1::SessionKey::default()),
            blake3: BlobDigest::of(content).to_string(),
            size_bytes: announced,
            data: Bytes::copy_from_slice(data),
        }
    }

    fn piece(data: &[u8]) -> Result<v1::UploadBlobRequest, Status> {
        Ok(v1::UploadBlobRequest { data: Bytes::copy_from_slice(data), ..Default::default() })
    }

    #[tokio::test]
    async fn a_blob_arrives_in_pieces_and_is_asked_for_no_more() {
        let (_dir, store, session) = store();
        let (have, want) = (BlobDigest::of(b"abcdef").to_string(), BlobDigest::of(b"other").to_string());
        let asked = vec![want.clone(), have.clone()];
        assert_eq!(find_missing(&store, &session, asked.clone()).await.unwrap(), asked);
        let more = tokio_stream::iter([piece(b"cd"), piece(b""), piece(b"ef")]);
        assert!(!receive(&store, &session, first(b"abcdef", 6, b"ab"), more).await.unwrap());
        assert_eq!(find_missing(&store, &session, asked).await.unwrap(), [want]);
        assert!(receive(&store, &session, first(b"abcdef", 6, b""), tokio_stream::pending()).await.unwrap());
    }

    #[tokio::test]
    async fn what_is_not_what_was_announced_has_its_status_and_leaves_nothing() {
        let (dir, store, session) = store();
        let other = v1::UploadBlobRequest { blake3: "00".to_owned(), ..first(b"x", 1, b"x") };
        let again = Ok(first(b"x", 1, b""));
        let cases = [
            (first(b"abc", 3, b"ab"), vec![piece(b"X")], Code::InvalidArgument),
            (first(b"abc", 3, b"ab"), vec![], Code::InvalidArgument),
            (first(b"abc", 3, b"abcd"), vec![], Code::InvalidArgument),
            (first(b"abc", u64::MAX, b"abc"), vec![], Code::ResourceExhausted),
            (first(b"abc", 3, b"ab"), vec![Err(Status::cancelled("gone"))], Code::Cancelled),
            (other, vec![], Code::InvalidArgument),
            (first(b"x", 1, b"x"), vec![again], Code::InvalidArgument),
            (first(b"x", 9, &vec![0; limits::CHUNKS_MESSAGE_BYTES_MAX + 1]), vec![], Code::InvalidArgument),
        ];
        for (first, more, code) in cases {
            let error = receive(&store, &session, first, tokio_stream::iter(more)).await.unwrap_err();
            assert_eq!(error.status().code(), code, "{error}");
            assert_eq!(std::fs::read_dir(dir.path().join("blobs")).unwrap().count(), 0);
        }
        let many = vec![BlobDigest::of(b"").to_string(); limits::BLOBS_COUNT_MAX + 1];
        assert_eq!(
            find_missing(&store, &session, many).await.unwrap_err().status().code(),
            Code::InvalidArgument
        );
        let error = find_missing(&store, &session, vec!["../x".to_owned()]).await.unwrap_err();
        assert_eq!(
            error.status().message(),
            "blake3[0]: is not a digest of 64 lower-case hexadecimal digits"
        );
    }

    #[tokio::test]
    async fn an_archive_can_be_read_from_any_offset() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive.tar");
        let error = ArchivePieces::open(&path, 0).await.unwrap_err();
        assert_eq!(error.status().code(), Code::NotFound);
        let content: Vec<u8> = (0..2_500_000_u32).map(|number| (number % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        for offset in [0, 1, 262_144, 1_048_577, content.len() - 1, content.len()] {
            let mut pieces = ArchivePieces::open(&path, offset as u64).await.unwrap();
            let mut read = Vec::new();
            while let Some(piece) = pieces.next().await.unwrap() {
                assert!(!piece.is_empty() && piece.len() <= limits::CHUNK_BYTES);
                read.extend_from_slice(&piece);
            }
            assert!(read == content[offset..], "from {offset}");
        }
        let error = ArchivePieces::open(&path, content.len() as u64 + 1).await.unwrap_err();
        assert_eq!(error.status().code(), Code::OutOfRange);
        let mut pieces = ArchivePieces::open(&path, 0).await.unwrap();
        std::fs::write(&path, "").unwrap();
        assert_eq!(pieces.next().await.unwrap_err().status().code(), Code::Internal);
    }
}
