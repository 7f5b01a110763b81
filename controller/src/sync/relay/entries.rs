//! Calls that enter barriers: the ones that thousands make at the same moment.
//!
//! They have no task each; whoever brings a decision about puts the answers here, and the link takes them out together.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use millstream_proto::v1;
use tokio::sync::Notify;
use tonic::Status;

use super::Outgoing;
use crate::sync::CallId;

/// The entries of one link.
#[derive(Default)]
pub(super) struct Entries {
    waiting: Mutex<HashMap<u64, CallId>>,
    /// One answer a call, so that the calls of a session bound it.
    answers: Mutex<Vec<Outgoing>>,
    /// Woken when there are answers.
    pub(super) some: Notify,
}

impl Entries {
    /// The calls that wait, by the relay's number.
    pub(super) fn waiting(&self) -> MutexGuard<'_, HashMap<u64, CallId>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answers that are ready.
    pub(super) fn answers(&self) -> MutexGuard<'_, Vec<Outgoing>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an answer down, unless the call has gone or begun anew meanwhile.
    pub(super) fn answer(&self, call_id: u64, call: CallId, answer: Result<Bytes, Status>) {
        let mut waiting = self.waiting();
        if waiting.get(&call_id) != Some(&call) {
            return;
        }
        waiting.remove(&call_id);
        drop(waiting);
        let (message, status) = match answer {
            Ok(message) => (Some(message), Status::ok("")),
            Err(status) => (None, status),
        };
        let end = v1::RelayEnd { code: status.code() as u32, message: status.message().to_owned() };
        let mut answers = self.answers();
        answers.push(Outgoing { call_id, message, end: Some(end) });
        let first = answers.len() == 1;
        drop(answers);
        if first {
            self.some.notify_one();
        }
    }
}
