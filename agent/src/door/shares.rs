//! How many tasks each identity has on this host, where the administrator limits it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use millstream_common::{
    id::{SessionId, TaskId},
    text::counted,
};

use super::Shared;
use crate::session::Owner;

/// Tasks that were handed to their supervisors and that no mirror knows yet, where their number is limited.
#[derive(Debug, Default)]
pub(super) struct Starts(Mutex<BTreeMap<TaskId, SessionId>>);

impl Starts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<TaskId, SessionId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These tasks were not taken, or are gone.
    pub(super) fn forget(&self, tasks: &[TaskId]) {
        let mut starts = self.lock();
        for task in tasks {
            starts.remove(task);
        }
    }
}

impl Shared {
    /// Counts a task that is about to be handed to its supervisor.
    ///
    /// # Errors
    /// When its owner has as many as it may have: the text says what to do.
    pub(crate) fn count_start(&self, owner: &Owner, session: SessionId, task: TaskId) -> Result<(), String> {
        let (limit, own) = {
            let sessions = self.sessions();
            let Some(limit) = sessions.bounds().of(owner).tasks else { return Ok(()) };
            let own = sessions.iter().filter(|(_, session)| session.owner == *owner);
            (limit, own.map(|(id, _)| id).collect::<Vec<_>>())
        };
        let supervised: BTreeMap<SessionId, _> =
            own.into_iter().filter_map(|id| Some((id, self.supervised(id)?))).collect();
        let is_known = |task: TaskId| supervised.values().any(|one| one.mirror().get(task).is_some());
        // Starts come many at a time, and the mirrors follow: what they do not know yet is counted too.
        let mut starts = self.starts.lock();
        starts.retain(|task, session| self.supervised(*session).is_some() && !is_known(*task));
        if starts.contains_key(&task) || is_known(task) {
            return Ok(());
        }
        let known: usize = supervised.values().map(|one| one.mirror().len()).sum();
        let tasks = known + starts.values().filter(|session| supervised.contains_key(session)).count();
        if tasks >= limit {
            return Err(format!(
                "{owner} has {} here, which is its limit `tasks` on this host: wait until some have ended, or ask the \
                 administrator to raise `limits` in agent.yaml",
                counted(tasks, "task")
            ));
        }
        starts.insert(task, session);
        Ok(())
    }
}
