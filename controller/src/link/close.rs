//! Ends a session on its host, and tells what could not be ended or asked.
//!
//! Every attempt is bounded: a test must come to its end whatever its hosts do. What cannot be asked ends by itself with
//! its lease, and whoever closes is told so.

use std::{sync::atomic::Ordering, time::Duration};

use millstream_common::{
    clock::World,
    limits, pipe,
    text::{printable, spoken},
};
use millstream_proto::v1;
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    Client, Loop, Session,
    open::{OpenError, dial},
    session_is_gone,
};
use crate::reach::Reach;

/// How sessions of one host are ended.
#[derive(Debug)]
pub(crate) struct Closing<'a> {
    pub(crate) reach: &'a dyn Reach,
    pub(crate) world: &'a World,
    pub(crate) lease: Duration,
}

impl Closing<'_> {
    /// Asks the host to end everything of a session that has no connection but may still run there. What it could not end,
    /// or that it could not be asked, comes back as text.
    pub(crate) async fn unconnected(&self, session: &Session) -> Vec<String> {
        if !self.reach.survives_disconnect() {
            // It went with the connection.
            return Vec::new();
        }
        let deadline = self.world.clock.now() + limits::CLOSE_MAX;
        let mut pause = limits::RECONNECT_PAUSE_MIN;
        let mut why = "it did not answer".to_owned();
        loop {
            match timeout_at(deadline, dial(self.reach)).await {
                Ok(Ok(control)) => return self.until(deadline, control, session).await,
                Ok(Err(
                    OpenError::Again(last) | OpenError::Pending(last) | OpenError::InLine { why: last, .. },
                )) => why = last,
                Ok(Err(OpenError::Final { why, .. })) => return vec![self.unasked(&why)],
                Err(_elapsed) => return vec![self.unasked(&why)],
            }
            if self.world.clock.now() + pause >= deadline {
                return vec![self.unasked(&why)];
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(limits::RECONNECT_PAUSE_MAX);
        }
    }

    /// The same on a connection that works.
    async fn until(&self, deadline: Instant, mut control: Client, session: &Session) -> Vec<String> {
        let request = v1::CloseSessionRequest { session: Some(session.key()) };
        let place = self.reach.describe();
        let left = match timeout_at(deadline, control.close_session(request)).await {
            Ok(Ok(response)) => {
                let survivors = response.into_inner().survivors;
                survivors.iter().map(|text| format!("{place}: {}", printable(text.as_bytes(), 512))).collect()
            }
            // A session that is gone has left nothing to close.
            Ok(Err(status)) if session_is_gone(&status) => Vec::new(),
            Ok(Err(status)) => return vec![self.unasked(&pipe::call_failure(&status))],
            Err(_elapsed) => {
                return vec![format!(
                    "{place} did not end its session within {}: it ends by itself within {}",
                    spoken(limits::CLOSE_MAX),
                    spoken(self.lease)
                )];
            }
        };
        let _told =
            timeout(limits::CLOSE_MAX, self.reach.entrust(&session.entrusted(self.lease, true))).await;
        left
    }

    fn unasked(&self, why: &str) -> String {
        format!(
            "{} could not be asked to end its session ({why}): it ends by itself within {}",
            self.reach.describe(),
            spoken(self.lease)
        )
    }
}

impl Loop {
    fn closing(&self) -> Closing<'_> {
        Closing { reach: &*self.reach, world: &self.world, lease: self.options.lease }
    }

    /// Asks the host to end everything of a session, on a connection that works. What it could not end, or that it could
    /// not be asked, comes back as text.
    pub(super) async fn close(&self, control: Client, session: &Session) -> Vec<String> {
        self.closing().until(self.world.clock.now() + limits::CLOSE_MAX, control, session).await
    }

    /// The same for a session that has no connection: because it was lost, or because nobody heard whether it was opened.
    pub(super) async fn close_previous(&mut self) -> Vec<String> {
        match self.previous.take() {
            Some(session) => self.closing().unconnected(&session).await,
            None => Vec::new(),
        }
    }

    /// Tells a host that this test waits for it no longer: whoever is behind it in line shall not wait for its next asking.
    pub(super) async fn leave_line(&self, mut control: Client, session: &Session) {
        let deadline = self.world.clock.now() + limits::CLOSE_MAX;
        let request = v1::CloseSessionRequest { session: Some(session.key()) };
        // A host that does not hear of it gives the place up by itself.
        let _told = timeout_at(deadline, control.close_session(request)).await;
        self.asked.store(false, Ordering::Relaxed);
    }
}
