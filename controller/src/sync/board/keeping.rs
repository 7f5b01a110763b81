//! The part of the board that remembers decided meetings, within bounds: for the results, and for parties that come back
//! for a decision that the network lost. Pure.

use std::sync::Arc;

use millstream_common::limits;

use super::{Board, MeetingRecord, WaitRecord};
use crate::sync::barrier::Decided;

/// Waits in the results; of later ones only the meetings are kept.
const RECORDED_WAITS_COUNT_MAX: usize = 200_000;
/// Parties whose decision can be asked for again: twice the largest meeting.
const LATCHED_PARTIES_COUNT_MAX: usize = 2 * limits::BARRIER_PARTIES_MAX as usize;
/// Payloads kept for that.
const LATCHED_PAYLOADS_BYTES_MAX: usize = 16 * 1024 * 1024;

impl Board {
    /// Notes a meeting for the results.
    pub(super) fn record(&mut self, decided: &Decided) {
        let meeting = &decided.meeting;
        let room = RECORDED_WAITS_COUNT_MAX.saturating_sub(self.recorded_waits);
        let listed = meeting.arrivals.len().min(room);
        self.recorded_waits += listed;
        if self.records.len() >= RECORDED_WAITS_COUNT_MAX {
            return;
        }
        let waits = meeting.arrivals.iter().take(listed).map(|arrival| WaitRecord {
            speaker: arrival.speaker,
            label: arrival.label.clone(),
            entered: arrival.entered,
            waited: decided.at.duration_since(arrival.entered),
        });
        let broken = decided.as_break();
        self.records.push(MeetingRecord {
            name: meeting.name.clone(),
            generation: meeting.generation,
            parties: meeting.parties,
            decided: decided.at,
            broken: broken.map(|cause| cause.sentence.clone()),
            culprit: broken.and_then(|cause| cause.culprit.clone()),
            by_hand: meeting.by_hand.clone(),
            waits: waits.collect(),
            omitted: meeting.arrivals.len() - listed,
        });
    }

    /// Bounds what can be asked for again: whole meetings go, oldest first.
    pub(super) fn keep_latched(&mut self, index: usize, decided: Arc<Decided>) {
        self.latched_parties += decided.meeting.arrivals.len();
        self.latched_bytes += decided.payload_bytes();
        self.latched.push_back((index, decided));
        while self.latched.len() > 1
            && (self.latched_parties > LATCHED_PARTIES_COUNT_MAX
                || self.latched_bytes > LATCHED_PAYLOADS_BYTES_MAX
                || self.latched.len() > LATCHED_PARTIES_COUNT_MAX)
        {
            let Some((index, old)) = self.latched.pop_front() else { break };
            self.latched_parties -= old.meeting.arrivals.len();
            self.latched_bytes -= old.payload_bytes();
            self.barriers[index].barrier.forget(&old);
        }
    }
}
