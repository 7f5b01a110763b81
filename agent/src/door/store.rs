//! Keeps the store of shipped files within its bound, and in it what sessions need.
//!
//! A session holds every blob that it was told is there, and every one that it has brought: an empty file of that name in
//! the session's directory says so, so that the next agent knows it too. What is held is never evicted; the holds end with
//! the session. Space is made when something arrives and when a session ends, never by the clock. Blocking code.

use std::{
    collections::HashSet,
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use millstream_common::{clock::World, limits, spec::BlobDigest};
use tracing::{info, warn};

use super::supervisors::SessionDirectory;
use crate::supervisor::blobs::{ArrivingBlob, BlobError, Blobs};

/// The store with its bound. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    blobs: Blobs,
    /// Where all sessions lie, and with them their holds.
    sessions: PathBuf,
    limit_bytes: u64,
    world: World,
    /// Locked while a hold is made and while blobs are evicted: what is being held must not go meanwhile.
    space: Arc<Mutex<Space>>,
}

#[derive(Debug, Default)]
struct Space {
    /// Bytes of the blobs that are there.
    stored_bytes: u64,
    /// Bytes that were announced and are not stored yet.
    arriving_bytes: u64,
    /// When blobs were last evicted, since the start of the host.
    looked_at: Duration,
}

impl Store {
    /// Opens the store at the start of an agent: what was arriving when the last one ended is removed, and so is what is too
    /// old or too much.
    ///
    /// # Errors
    /// When its directory cannot be used.
    pub(crate) fn open(
        directory: PathBuf,
        sessions: PathBuf,
        limit_bytes: u64,
        world: World,
    ) -> Result<Self, BlobError> {
        let blobs = Blobs::open(directory)?;
        if let Err(error) = blobs.remove_unfinished() {
            warn!(%error, "what was left of interrupted uploads cannot be removed");
        }
        let store = Self { blobs, sessions, limit_bytes, world, space: Arc::default() };
        store.evict(&mut store.space(), 0)?;
        Ok(store)
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all blobs, those that are arriving included.
    pub(crate) fn used_bytes(&self) -> u64 {
        let space = self.space();
        space.stored_bytes.saturating_add(space.arriving_bytes)
    }

    /// How many bytes all blobs may have together.
    pub(crate) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Which of these blobs are not there, in the same order. Those that are there are held by the session from now on.
    pub(crate) fn missing(&self, session: &SessionDirectory, digests: &[BlobDigest]) -> Vec<BlobDigest> {
        digests.iter().filter(|digest| !self.hold(session, digest)).copied().collect()
    }

    /// Whether a blob is there; if so, it stays as long as the session.
    fn hold(&self, session: &SessionDirectory, digest: &BlobDigest) -> bool {
        let mark = session.held_blobs().join(digest.to_string());
        if mark.exists() {
            return self.blobs.missing(&[*digest]).is_empty();
        }
        let _nothing_is_evicted = self.space();
        if !self.blobs.missing(&[*digest]).is_empty() {
            return false;
        }
        if let Err(error) = make_mark(session, &mark) {
            // It was used just now, so that it is the last to go.
            warn!(%digest, %error, "a shipped file is not held for its session");
        }
        true
    }

    /// Begins to store a blob for a session, or finds that it is there. Makes space for it.
    ///
    /// # Errors
    /// When it is too large, does not fit beside what sessions hold, or no file can be made.
    pub(crate) fn begin(
        &self,
        session: &SessionDirectory,
        digest: BlobDigest,
        size_bytes: u64,
    ) -> Result<Option<ArrivingForSession>, BlobError> {
        if self.hold(session, &digest) {
            return Ok(None);
        }
        let room = self.reserve(digest, size_bytes)?;
        let blob = self.blobs.begin(digest, size_bytes)?;
        Ok(Some(ArrivingForSession { blob, room, session: session.clone() }))
    }

    fn reserve(&self, digest: BlobDigest, size_bytes: u64) -> Result<Room, BlobError> {
        let mut space = self.space();
        let free = |space: &Space| {
            self.limit_bytes.saturating_sub(space.stored_bytes).saturating_sub(space.arriving_bytes)
        };
        // What is larger than any blob may be is refused by the store itself, and for it nothing goes.
        if free(&space) < size_bytes && size_bytes <= limits::BLOB_BYTES_MAX {
            self.evict(&mut space, size_bytes)?;
            if free(&space) < size_bytes {
                let (used_bytes, limit_bytes) =
                    (space.stored_bytes.saturating_add(space.arriving_bytes), self.limit_bytes);
                return Err(BlobError::NoRoom { digest, size_bytes, used_bytes, limit_bytes });
            }
        }
        space.arriving_bytes = space.arriving_bytes.saturating_add(size_bytes);
        Ok(Room { store: self.clone(), digest, size_bytes })
    }

    /// A session has ended and with it its holds: what it leaves over goes now.
    pub(crate) fn session_ended(&self) {
        let mut space = self.space();
        let since = self.world.clock.since_boot().saturating_sub(space.looked_at);
        let is_full = space.stored_bytes.saturating_add(space.arriving_bytes) > self.limit_bytes;
        if !is_full && since < limits::BLOBS_LOOKED_AT_MAX {
            return;
        }
        if let Err(error) = self.evict(&mut space, 0) {
            warn!(%error, "shipped files that nobody needs are not removed");
        }
    }

    /// Removes what is too old, and what nobody holds until `needed_bytes` are free beside what is arriving.
    fn evict(&self, space: &mut Space, needed_bytes: u64) -> Result<(), BlobError> {
        let held = self.held();
        let limit = self.limit_bytes.saturating_sub(needed_bytes).saturating_sub(space.arriving_bytes);
        let evicted = self.blobs.evict(limit, self.world.clock.wall_ns(), |digest| held.contains(digest))?;
        space.stored_bytes = evicted.kept_bytes;
        space.looked_at = self.world.clock.since_boot();
        if evicted.count > 0 {
            info!(
                count = evicted.count,
                bytes = evicted.bytes,
                kept_bytes = evicted.kept_bytes,
                "shipped files evicted"
            );
        }
        Ok(())
    }

    /// What all sessions hold, as their directories tell.
    fn held(&self) -> HashSet<BlobDigest> {
        let sessions = fs::read_dir(&self.sessions).into_iter().flatten().flatten();
        let marks = sessions.flat_map(|session| {
            let holds = session.path().join(SessionDirectory::HELD_BLOBS);
            fs::read_dir(holds).into_iter().flatten().flatten()
        });
        marks.filter_map(|mark| BlobDigest::parse(mark.file_name().to_str()?)).collect()
    }
}

fn make_mark(session: &SessionDirectory, mark: &std::path::Path) -> io::Result<()> {
    match fs::create_dir(session.held_blobs()) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::File::create(mark).map(drop)
}

/// Room that is kept for a blob while it arrives.
#[derive(Debug)]
struct Room {
    store: Store,
    digest: BlobDigest,
    size_bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut space = self.store.space();
        space.arriving_bytes = space.arriving_bytes.saturating_sub(self.size_bytes);
    }
}

/// A blob that is arriving for a session. Dropping it forgets what has arrived.
#[derive(Debug)]
pub(crate) struct ArrivingForSession {
    blob: ArrivingBlob,
    room: Room,
    session: SessionDirectory,
}

impl ArrivingForSession {
    /// Takes in the next bytes.
    ///
    /// # Errors
    /// When they are more than was announced, or the disk is full.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.blob.write(bytes)
    }

    /// Ends the blob, checks it, stores it and holds it for the session. Returns whether it was there already.
    ///
    /// # Errors
    /// When its length or digest is not what was announced. It is not stored then.
    pub(crate) fn finish(self) -> Result<bool, BlobError> {
        let Self { blob, room, session } = self;
        let mut space = room.store.space();
        let existed = blob.finish()?;
        if !existed {
            space.stored_bytes = space.stored_bytes.saturating_add(room.size_bytes);
        }
        drop(space);
        // Nobody else has had a chance to let it go: it was used last.
        room.store.hold(&session, &room.digest);
        Ok(existed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        state: tempfile::TempDir,
        store: Store,
    }

    fn open(state: &std::path::Path, limit_bytes: u64) -> Store {
        let sessions = super::super::supervisors::sessions_directory(state);
        Store::open(state.join("blobs"), sessions, limit_bytes, World::system()).unwrap()
    }

    fn bench(limit_bytes: u64) -> Bench {
        let state = tempfile::tempdir().unwrap();
        let store = open(state.path(), limit_bytes);
        Bench { state, store }
    }

    impl Bench {
        fn session(&self) -> SessionDirectory {
            let session = World::system().ids.session_id();
            let directory = SessionDirectory::of(self.state.path(), session, None);
            directory.create().unwrap();
            directory
        }

        fn put(&self, session: &SessionDirectory, content: &[u8]) -> Result<BlobDigest, BlobError> {
            let digest = BlobDigest::of(content);
            if let Some(mut blob) = self.store.begin(session, digest, content.len() as u64)? {
                blob.write(content)?;
                assert!(!blob.finish()?);
            }
            Ok(digest)
        }
    }

    #[test]
    fn what_an_open_session_needs_stays_and_the_rest_makes_room() {
        let bench = bench(300);
        let (open, over) = (bench.session(), bench.session());
        let kept = bench.put(&open, &[1; 100]).unwrap();
        let left = bench.put(&over, &[2; 100]).unwrap();
        over.remove().unwrap();
        // Both were needed once; only one is needed still, though the other was used later.
        let third = bench.put(&open, &[3; 200]).unwrap();
        assert_eq!(bench.store.missing(&open, &[kept, left, third]), [left]);
        assert_eq!(bench.store.used_bytes(), 300);
    }

    #[test]
    fn what_does_not_fit_beside_what_is_needed_is_refused_and_takes_no_room() {
        let bench = bench(300);
        let session = bench.session();
        bench.put(&session, &[1; 200]).unwrap();
        let refused = bench.put(&session, &[2; 101]).unwrap_err();
        assert!(matches!(refused, BlobError::NoRoom { used_bytes: 200, limit_bytes: 300, .. }), "{refused}");
        let arriving = bench.store.begin(&session, BlobDigest::of(b"x"), 100).unwrap().unwrap();
        assert_eq!(bench.store.used_bytes(), 300);
        assert!(bench.put(&session, b"y").is_err(), "what is arriving has its place");
        drop(arriving);
        bench.put(&session, &[3; 100]).unwrap();
    }

    #[test]
    fn the_next_agent_knows_what_is_held_and_keeps_its_own_bound() {
        let bench = bench(1_000);
        let (open_session, over) = (bench.session(), bench.session());
        let kept = bench.put(&open_session, &[1; 100]).unwrap();
        let left = bench.put(&over, &[2; 100]).unwrap();
        fs::write(bench.state.path().join("blobs/.arriving-1-1"), "half").unwrap();
        over.remove().unwrap();
        let next = open(bench.state.path(), 100);
        assert_eq!(next.missing(&open_session, &[kept, left]), [left]);
        assert_eq!(next.used_bytes(), 100);
        assert_eq!(fs::read_dir(bench.state.path().join("blobs")).unwrap().count(), 1);
    }

    #[test]
    fn the_end_of_a_session_frees_what_is_over_the_bound() {
        let bench = bench(1_000);
        let session = bench.session();
        bench.put(&session, &[1; 100]).unwrap();
        let smaller = open(bench.state.path(), 50);
        assert_eq!(smaller.used_bytes(), 100, "it is needed");
        session.release_blobs();
        smaller.session_ended();
        assert_eq!(smaller.used_bytes(), 0);
    }
}
