//! A session as its host knows it, and how a host says that one is gone.

use std::time::Duration;

use millstream_common::{
    id::SessionId,
    outcome::Reason,
    protocol::{SESSION_GONE, SESSION_LOST},
};
use millstream_proto::v1;
use tonic::{Code, Status};

use crate::reach::Entrusted;

/// A session as the host knows it.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) secret: String,
    /// Zero for whoever only ends it.
    pub(crate) epoch: u64,
}

impl Session {
    pub(super) fn key(&self) -> v1::SessionKey {
        v1::SessionKey { session_id: self.id.to_string(), epoch: self.epoch, secret: self.secret.clone() }
    }

    pub(super) fn entrusted(&self, lease: Duration, over: bool) -> Entrusted {
        Entrusted { session_id: self.id, secret: self.secret.clone(), lease, over }
    }
}

/// Why the session is gone, if that is what the host says.
pub(super) fn session_gone(status: &Status) -> Option<Reason> {
    let is_gone = status.code() == Code::FailedPrecondition && status.message().starts_with(SESSION_GONE);
    let died = status.message().starts_with(SESSION_LOST);
    is_gone.then_some(if died { Reason::SupervisorDied } else { Reason::LeaseExpired })
}

pub(super) fn session_is_gone(status: &Status) -> bool {
    session_gone(status).is_some()
}
