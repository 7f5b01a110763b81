//! Refusals: of whoever dials, of calls, of sessions, of tasks. Each is counted, and has one line in the log and one on record,
//! unless somebody makes it a flood: then the next line says how many were left out.

use std::{fmt, net::SocketAddr, sync::PoisonError};

use millstream_common::{id::TaskId, text::printable};
use tracing::info;

use super::{Ledger, Page, counts::Count};
use crate::door::identity::{CallRefusal, Peer, Source, place_of};

/// Longest name of a call on record.
const CALL_BYTES_MAX: usize = 128;

/// One refusal.
struct Refusal<'a> {
    count: Count,
    /// One of the words that are counted.
    word: &'static str,
    event: &'static str,
    /// What the log calls it.
    what: &'static str,
    source: Source,
    peer: String,
    /// Who was refused, as far as it is known, and under which name that is on record.
    who: (&'static str, &'a dyn fmt::Display),
    /// Fields of the record that others do not have.
    more: Vec<(&'static str, String)>,
    reason: &'a dyn fmt::Display,
    /// What somebody can do about it, where the reason does not say so.
    next: &'static str,
}

impl Ledger {
    fn refused(&self, refusal: Refusal<'_>) {
        self.counts.add(refusal.count, refusal.word);
        let told = {
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            refusals.note(refusal.source, self.clock.since_boot())
        };
        let Some(left_out) = told else { return };
        let Refusal { word, event, what, peer, who: (role, who), more, reason, next, .. } = refusal;
        let of = |name: &str| more.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str());
        info!(
            %peer, claims = (role == "claims").then(|| who.to_string()), caller = (role == "owner").then(|| who.to_string()),
            call = of("call"), task = of("task"), %reason, next = (!next.is_empty()).then_some(next), left_out, "{what}"
        );
        let mut record = self.record(event).with("peer", peer).with(role, who);
        for (name, value) in more {
            record = record.with(name, value);
        }
        record = record.with("reason", word).with("detail", reason);
        if left_out > 0 {
            record = record.with("left_out", left_out);
        }
        self.audit.put(record);
    }

    /// Somebody who dialled was sent away. `claims` is whom the certificate named, which nobody has checked.
    pub(crate) fn peer_refused(
        &self,
        address: Option<SocketAddr>,
        claims: Option<&str>,
        word: &'static str,
        reason: &dyn fmt::Display,
        next: &'static str,
    ) {
        self.refused(Refusal {
            count: Count::PeersRefused,
            word,
            event: "peer.refused",
            what: "peer sent away",
            source: address.map_or(Source::Unnamed, |address| Source::Address(address.ip())),
            peer: place_of(address),
            who: ("claims", &claims.unwrap_or("nothing")),
            more: Vec::new(),
            reason,
            next,
        });
    }

    /// A call reached no handler.
    pub(crate) fn call_refused(&self, peer: Option<&Peer>, call: &str, refusal: &CallRefusal) {
        let call = printable(call.as_bytes(), CALL_BYTES_MAX);
        let unknown: &dyn fmt::Display = &"unknown";
        self.refused(Refusal {
            count: Count::CallsRefused,
            word: refusal.word(),
            event: "call.refused",
            what: "call refused",
            source: peer.map_or(Source::Unnamed, Peer::source),
            peer: peer.map_or_else(String::new, Peer::place),
            who: ("owner", peer.map_or(unknown, |peer| &peer.caller)),
            more: vec![("call", call)],
            reason: refusal,
            next: "",
        });
    }

    /// Somebody has shown a key to a session that is not his.
    pub(crate) fn key_refused(&self, peer: &Peer, session: impl fmt::Display, refusal: &dyn fmt::Display) {
        self.refused(Refusal {
            count: Count::CallsRefused,
            word: "not_yours",
            event: "call.refused",
            what: "call refused",
            source: peer.source(),
            peer: peer.place(),
            who: ("owner", &peer.caller),
            more: vec![("session", session.to_string())],
            reason: refusal,
            next: "",
        });
    }

    /// Somebody got no session, for a reason in one of the words that are counted.
    pub(crate) fn session_refused(
        &self,
        peer: &Peer,
        client: &str,
        word: &'static str,
        reason: &dyn fmt::Display,
    ) {
        self.refused(Refusal {
            count: Count::SessionsRefused,
            word,
            event: "session.refused",
            what: "session refused",
            source: peer.source(),
            peer: peer.place(),
            who: ("owner", &peer.caller),
            more: vec![("client", client.to_owned())],
            reason,
            next: "",
        });
    }
}

impl Page {
    /// A task was not taken in, because its owner has as many as it may have.
    pub(crate) fn task_refused(&self, peer: &Peer, task: TaskId, reason: &str) {
        self.ledger.refused(Refusal {
            count: Count::TasksRefused,
            word: "share_used_up",
            event: "task.refused",
            what: "task refused",
            source: peer.source(),
            peer: peer.place(),
            who: ("owner", &self.owner),
            more: vec![
                ("client", self.client.clone()),
                ("session", self.session.clone()),
                ("task", task.to_string()),
            ],
            reason: &reason,
            next: "",
        });
    }
}
