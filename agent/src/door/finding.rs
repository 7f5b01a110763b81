//! Sessions without their controller or supervisor: found again at the start of an agent, expired, lost, and removed when their
//! results have aged. Decides nothing about who may have one: the machine in `session.rs` does.

use std::{fs, path::Path, sync::Arc, time::Duration};

use millstream_common::{id::SessionId, limits, outcome::Reason};
use tracing::{debug, error, info, warn};

use super::{
    Shared,
    ledger::{Page, SessionEnd},
    supervisors::{self, Kept, Notice, SessionDirectory, Supervised},
};
use crate::{
    session::{Event, Found, Owner, Secret},
    supervisor::{cgroup::claim, session_group_name},
};

/// How long finding the supervisors of an earlier agent may take: they are asked at once, and each answers in a moment.
const FIND_MAX: Duration = Duration::from_secs(15);

/// Whether a supervisor lives below a state directory, whichever agent has started it. What cannot be asked counts as one.
pub(crate) fn has_supervisors(state: &Path) -> bool {
    let entries = fs::read_dir(supervisors::sessions_directory(state)).into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<SessionId>().ok());
    ids.map(|id| SessionDirectory::of(state, id, None)).any(|session| session.is_locked().unwrap_or(true))
}

impl Shared {
    /// Finds the sessions of an earlier agent: attaches to supervisors that live, recovers what the dead ones have left.
    pub(super) async fn find_sessions(self: &Arc<Self>) {
        let directory = supervisors::sessions_directory(&self.state);
        let Ok(entries) = fs::read_dir(&directory) else { return };
        let mut finding = tokio::task::JoinSet::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(session_id) = name.to_str().and_then(|name| name.parse::<SessionId>().ok()) else {
                warn!(path = %entry.path().display(), "this is no session: remove it by hand");
                continue;
            };
            let shared = Arc::clone(self);
            finding.spawn(async move { shared.find_session(session_id).await });
        }
        if tokio::time::timeout(FIND_MAX, finding.join_all()).await.is_err() {
            warn!(
                "some supervisors do not answer: their sessions are not known until the agent is started again"
            );
        }
    }

    /// Removes empty control groups that killed agents and supervisors have left. Nobody waits for it.
    pub(super) fn sweep_groups(&self) {
        let Some(own) = self.starter.cgroup.clone() else { return };
        let (sessions, clock) = (supervisors::sessions_directory(&self.state), Arc::clone(&self.world.clock));
        self.tracker.spawn_blocking(move || {
            let entries = fs::read_dir(sessions).into_iter().flatten().flatten();
            let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<SessionId>().ok());
            claim::sweep(&own, &ids.map(session_group_name).collect(), &*clock);
        });
    }

    /// Removes this agent's control group, unless sessions outlive the agent.
    pub(super) fn leave_group(&self) {
        if let Some(group) = &self.starter.cgroup
            && let Err(error) = fs::remove_dir(group)
        {
            debug!(group = %group.display(), %error, "the control group of this agent stays");
        }
    }

    async fn find_session(self: Arc<Self>, session_id: SessionId) {
        let bare = SessionDirectory::of(&self.state, session_id, None);
        let kept = match bare.kept() {
            Ok(kept) => kept,
            Err(error) => {
                // Half made, when an agent died while it opened the session: nobody has it and nothing runs in it.
                warn!(session = %session_id, %error, "a session without a record is removed");
                if supervisors::find_alive(&bare).await.is_some() {
                    warn!(session = %session_id, "a supervisor lives in it: it ends with its lease");
                    return;
                }
                let removed = tokio::task::spawn_blocking(move || bare.remove());
                if !matches!(removed.await, Ok(Ok(()))) {
                    warn!(session = %session_id, "it could not be removed");
                }
                return;
            }
        };
        let directory = SessionDirectory::of(&self.state, session_id, kept.cgroup.clone());
        let rebooted = kept.boot_id != self.host.boot_id;
        let page = self.ledger.page(session_id, &kept.owner, &kept.client);
        let attached = if rebooted { None } else { self.attach(session_id, &directory, page.clone()).await };
        let found = |lease_left| found(session_id, &kept, lease_left);
        match attached {
            Some((supervised, lease_left)) => {
                info!(session = %session_id, owner = %kept.owner, tasks = supervised.mirror().len(), "session found again");
                self.tell(Event::Found(found(lease_left)));
                if lease_left.is_zero() {
                    self.tell(Event::LeaseExpired { session_id });
                }
                self.fill(session_id, supervised);
            }
            None => {
                let reason = if rebooted { Reason::HostRebooted } else { Reason::SupervisorDied };
                let ended = directory.ended();
                if ended.is_some() {
                    info!(session = %session_id, owner = %kept.owner, "results of an ended session found");
                } else {
                    warn!(session = %session_id, owner = %kept.owner, %reason, "session found without a supervisor");
                    directory.kill_everything().await;
                }
                let orphaned = tokio::task::spawn_blocking(move || {
                    Supervised::orphaned(session_id, directory, reason, page)
                });
                let Ok(supervised) = orphaned.await else { return };
                self.tell(Event::Found(found(Duration::ZERO)));
                self.fill(session_id, Arc::clone(&supervised));
                if !rebooted {
                    self.look_behind(&supervised, Vec::new()).await;
                }
                match ended {
                    None => self.take_notice(session_id, Notice::Died),
                    Some(ended) if ended.lost => {
                        self.tell(Event::SupervisorDied { session_id });
                        self.remove_at(session_id, ended.results_end());
                    }
                    Some(ended) => {
                        self.tell(Event::LeaseExpired { session_id });
                        self.tell(Event::Settled { session_id });
                        self.remove_at(session_id, ended.results_end());
                    }
                }
            }
        }
    }

    /// Connects to a supervisor that an earlier agent has started, or makes sure that it is dead.
    async fn attach(
        &self,
        session_id: SessionId,
        directory: &SessionDirectory,
        page: Page,
    ) -> Option<(Arc<Supervised>, Duration)> {
        let stream = supervisors::find_alive(directory).await?;
        let begun = Supervised::begin(
            session_id,
            directory.clone(),
            stream,
            self.incarnation.clone(),
            self.notices.clone(),
            true,
            page,
        );
        match begun.await {
            Ok(begun) => Some(begun),
            Err(error) => {
                error!(session = %session_id, %error, "a supervisor does not answer: its tasks are ended");
                None
            }
        }
    }

    fn fill(&self, session_id: SessionId, supervised: Arc<Supervised>) {
        if self.slot(session_id).set(supervised).is_err() {
            warn!(session = %session_id, "a session was found twice");
        }
    }

    /// A supervisor has told something that concerns the whole agent.
    pub(super) fn take_notice(self: &Arc<Self>, session_id: SessionId, notice: Notice) {
        match notice {
            Notice::LeaseExpired => {
                info!(session = %session_id, "lease expired");
                self.record_end(session_id, SessionEnd::Expired);
                self.tell(Event::LeaseExpired { session_id });
            }
            Notice::Settled => {
                self.tell(Event::Settled { session_id });
                self.remove_at(session_id, self.world.clock.since_boot() + limits::EXPIRED_RESULTS_KEPT);
            }
            Notice::Died => {
                self.last_errors
                    .add(&*self.world.clock, &format!("the supervisor of session {session_id} is gone"));
                self.record_end(session_id, SessionEnd::Lost);
                self.tell(Event::SupervisorDied { session_id });
                self.look_behind_later(session_id);
                let now = self.world.clock.since_boot();
                self.directory(session_id).record_loss(now);
                self.remove_at(session_id, now + limits::EXPIRED_RESULTS_KEPT);
            }
            // Whoever watches the status sees that it has no process any more.
            Notice::Gone => {
                self.look_behind_later(session_id);
                self.status_has_changed();
            }
        }
    }

    fn record_end(&self, session_id: SessionId, how: SessionEnd) {
        if let Some(supervised) = self.supervised(session_id) {
            supervised.page.ended(how);
        }
    }

    /// A session whose supervisor has gone by itself: nobody waits for what is found.
    fn look_behind_later(self: &Arc<Self>, session_id: SessionId) {
        let Some(supervised) = self.supervised(session_id) else { return };
        // Whoever closes it looks as well, and knows more: what the supervisor has said.
        if supervised.mirror().is_closing() {
            return;
        }
        let shared = Arc::clone(self);
        self.tracker.spawn(async move { shared.look_behind(&supervised, Vec::new()).await });
    }

    /// Nothing of a session will run any more: what was shipped for it is not held. Its results are kept until a moment since
    /// the start of the host, for a controller that was away.
    fn remove_at(self: &Arc<Self>, session_id: SessionId, end: Duration) {
        let (directory, store) = (self.directory(session_id), self.store.clone());
        self.tracker.spawn_blocking(move || {
            directory.release_blobs();
            store.session_ended();
        });
        let shared = Arc::clone(self);
        self.tracker.spawn(async move {
            tokio::time::sleep(end.saturating_sub(shared.world.clock.since_boot())).await;
            let survivors = shared.close(session_id).await;
            info!(session = %session_id, survivors = survivors.len(), "results of an ended session removed");
        });
    }
}

fn found(session_id: SessionId, kept: &Kept, lease_left: Duration) -> Found {
    let (owner, secret): (Owner, Secret) = (kept.owner.clone(), kept.secret.clone());
    Found {
        session_id,
        secret,
        owner,
        client: kept.client.clone(),
        epoch: kept.epoch,
        lease: kept.lease(),
        lease_left,
        exclusive: kept.exclusive,
        open_time_ns: kept.open_time_ns,
    }
}
