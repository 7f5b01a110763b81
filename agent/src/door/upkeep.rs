//! The host in an operator's hands: draining it, and dealing with what ended sessions have left behind. Kept across restarts of
//! the agent.
//!
//! What follows from it for those who ask for sessions is decided by the machine of sessions.

use std::{
    io,
    sync::{Arc, PoisonError},
    time::Duration,
};

use millstream_common::{limits, text::printable};
use millstream_proto::v1;
use tokio::{task::JoinSet, time::timeout};
use tonic::Status;
use tracing::{error, info, warn};

use super::{
    Shared,
    identity::Caller,
    status::clock_text,
    supervisors::{self, SessionDirectory, Supervised, Supervisors},
    survivors::{self, Origin, Record, Survivor},
};
use crate::session::{Drain, Event};

/// Survivors that are kept in mind: enough to say that a host is not clean.
const SURVIVORS_COUNT_MAX: usize = 64;
/// How long what has been killed may take to go before it is called a survivor: it has been waited for before, except what was
/// killed last, and whoever closes the session waits.
const GOING_MAX: Duration = Duration::from_secs(1);

impl Shared {
    /// Takes up what an earlier agent has kept: a drain goes on, survivors that are still there are watched again.
    pub(super) fn recall(self: &Arc<Self>) {
        let mut kept = match Record::read(&self.state) {
            Ok(kept) => kept,
            Err(error) => {
                // Better one session too many than an agent that serves nobody.
                warn!(%error, "what an earlier agent has kept of this host cannot be read: it is taken as clean and ready");
                return;
            }
        };
        if kept.boot_id != self.host.boot_id {
            kept.survivors.clear();
        }
        let sessions = supervisors::sessions_directory(&self.state);
        kept.survivors.retain(|survivor| survivor.is_there(&sessions));
        if let Some(drain) = kept.drain.clone() {
            info!(%drain, "draining still");
            self.tell(Event::DrainBegan(drain.clone()));
            let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
            record.drain = Some(drain);
        }
        self.add_survivors(kept.survivors);
    }

    /// Takes no new sessions from now on, also after a restart; tells how many go on.
    pub(crate) fn drain(&self, reason: &str, caller: &Caller) -> Result<u32, Status> {
        if reason.len() > limits::TEXT_BYTES_MAX {
            let message = format!("reason: has more than {} bytes", limits::TEXT_BYTES_MAX);
            return Err(Status::invalid_argument(message));
        }
        let drain = Drain {
            reason: printable(reason.trim().as_bytes(), limits::TEXT_BYTES_MAX),
            by: caller.owner(),
            since: clock_text(self.world.clock.wall_ns()),
        };
        self.keep_record(|record| record.drain = Some(drain.clone())).map_err(not_kept)?;
        info!(%caller, %drain, "draining");
        self.ledger.drained(&drain);
        self.tell(Event::DrainBegan(drain));
        let going_on = self.sessions().holding_count();
        Ok(u32::try_from(going_on).unwrap_or(u32::MAX))
    }

    /// Takes sessions again; tells whether that is a change.
    pub(crate) fn undrain(&self, caller: &Caller) -> Result<bool, Status> {
        self.keep_record(|record| record.drain = None).map_err(not_kept)?;
        let was_draining = self.sessions().draining().is_some();
        self.tell(Event::DrainEnded);
        info!(%caller, was_draining, "taking sessions");
        self.ledger.undrained(caller);
        Ok(was_draining)
    }

    /// Tries again to end and remove what was left behind; answers with what is there still. Once begun it finishes.
    pub(crate) async fn clean(
        self: &Arc<Self>,
        force: bool,
        caller: &Caller,
    ) -> Result<Vec<Survivor>, Status> {
        let (shared, caller) = (Arc::clone(self), caller.clone());
        let cleaning = tokio::spawn(async move {
            let left = shared.clean_once().await;
            info!(%caller, force, left = left.len(), "cleaned");
            shared.ledger.cleaned(&caller, force, left.len());
            if force {
                shared.forget(|survivor| left.contains(survivor));
            }
            left
        });
        cleaning.await.map_err(|error| Status::internal(error.to_string()))
    }

    async fn clean_once(self: &Arc<Self>) -> Vec<Survivor> {
        let known = self.survivors();
        let mut ending = JoinSet::new();
        for survivor in known.clone() {
            let (shared, directory) = (Arc::clone(self), self.left_directory(&survivor));
            ending.spawn(async move {
                if survivor.pid > 0 {
                    drop(timeout(limits::KILL_MAX, survivor.end()).await);
                } else if let Some(directory) = directory {
                    let removed = tokio::task::spawn_blocking(move || directory.remove()).await;
                    if !matches!(removed, Ok(Ok(()))) {
                        shared.last_errors.add(&*shared.world.clock, &survivor.line());
                    }
                }
            });
        }
        ending.join_all().await;
        let sessions = supervisors::sessions_directory(&self.state);
        let (left, gone): (Vec<_>, Vec<_>) =
            known.into_iter().partition(|survivor| survivor.is_there(&sessions));
        self.forget(|survivor| gone.contains(survivor));
        left
    }

    /// Directory of a session that is over, unless it has come to life again.
    fn left_directory(&self, survivor: &Survivor) -> Option<SessionDirectory> {
        let session_id = survivor.origin.session_id.parse().ok()?;
        self.sessions().get(session_id).is_none().then(|| self.directory(session_id))
    }

    /// Everything that is known to be left behind.
    pub(crate) fn survivors(&self) -> Vec<Survivor> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).survivors.clone()
    }

    /// A session is over: looks for what is left of it. `told` is what could not be ended, as far as it is known.
    pub(super) async fn look_behind(self: &Arc<Self>, supervised: &Arc<Supervised>, told: Vec<String>) {
        // In a simulation what ran is not among the processes of this host.
        if let Supervisors::Elsewhere(_) = self.starter.supervisors {
            return;
        }
        let session_id = supervised.session_id;
        let origin = {
            let sessions = self.sessions();
            let Some(session) = sessions.get(session_id) else { return };
            Origin {
                session_id: session_id.to_string(),
                owner: session.owner.to_string(),
                client: session.client.clone(),
                since: clock_text(self.world.clock.wall_ns()),
            }
        };
        let looked_at = Arc::clone(supervised);
        let finding = tokio::task::spawn_blocking(move || survivors::find(&looked_at, &told, &origin));
        let mut found = survivors::still_there(finding.await.unwrap_or_default(), GOING_MAX).await;
        // A session is looked at when its supervisor is gone, and when it is closed.
        let known = self.survivors();
        found.retain(|survivor| !known.iter().any(|known| known.is(survivor)));
        if found.is_empty() {
            return;
        }
        let lines: Vec<String> = found.iter().map(Survivor::line).collect();
        error!(session = %session_id, survivors = ?lines, "not everything of a session could be removed");
        self.last_errors
            .add(&*self.world.clock, &format!("session {session_id} left behind: {}", lines.join(", ")));
        for line in &lines {
            supervised.page.left_behind(line);
        }
        self.add_survivors(found);
    }

    fn add_survivors(self: &Arc<Self>, found: Vec<Survivor>) {
        let mut added = Vec::new();
        let kept = self.keep_record(|record| {
            for survivor in found {
                let is_known = record.survivors.iter().any(|known| known.is(&survivor));
                if !is_known && record.survivors.len() < SURVIVORS_COUNT_MAX {
                    record.survivors.push(survivor.clone());
                    added.push(survivor);
                }
            }
        });
        if let Err(error) = kept {
            warn!(%error, "what is left behind is not on record: the next agent will not know of it");
        }
        self.tell_survivors();
        for survivor in added.into_iter().filter(|survivor| survivor.pid > 0) {
            let shared = Arc::clone(self);
            // Not among the tasks that an ending agent waits for: it may be a long time.
            tokio::spawn(async move {
                survivor.gone().await;
                shared.forget(|known| *known == survivor);
            });
        }
    }

    fn forget(self: &Arc<Self>, is_gone: impl Fn(&Survivor) -> bool) {
        let mut forgotten = 0;
        let kept = self.keep_record(|record| {
            let before = record.survivors.len();
            record.survivors.retain(|survivor| !is_gone(survivor));
            forgotten = before - record.survivors.len();
        });
        if let Err(error) = kept {
            warn!(%error, "the record of this host cannot be kept");
        }
        if forgotten == 0 {
            return;
        }
        self.tell_survivors();
        if self.survivors().is_empty() {
            info!("the host is clean again");
            self.sweep_groups();
        }
    }

    fn tell_survivors(&self) {
        let survivors = self.survivors().iter().map(Survivor::line).collect();
        self.tell(Event::LeftBehind { survivors });
    }

    /// Changes the record, on disk and here. A drain that cannot be kept does not begin or end; what was found or is gone is
    /// so, whether it is on disk or not.
    fn keep_record(&self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let before = record.clone();
        record.boot_id.clone_from(&self.host.boot_id);
        change(&mut record);
        if *record == before {
            return Ok(());
        }
        let written = record.write(&self.state);
        if written.is_err() && record.drain != before.drain {
            *record = before;
        }
        written
    }
}

fn not_kept(error: io::Error) -> Status {
    Status::unavailable(format!(
        "nothing was changed, because it cannot be kept in the state directory: {error}"
    ))
}

/// A drain as operators see it.
pub(super) fn drain_status(drain: &Drain) -> v1::DrainStatus {
    v1::DrainStatus {
        reason: drain.reason.clone(),
        owner: drain.by.to_string(),
        begin_time: drain.since.parse().ok(),
    }
}
