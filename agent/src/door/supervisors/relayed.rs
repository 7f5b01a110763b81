//! Relayed frames on their way to the one controller that has the relay of a session.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use millstream_proto::v1;
use tokio::sync::mpsc;

/// Where relayed frames of blocks go: to the one controller that has the relay now.
pub(super) struct RelaySink {
    pub(super) number: u64,
    pub(super) frames: mpsc::Sender<RelayBatch>,
    pub(super) waiting_bytes: Arc<AtomicUsize>,
}

/// Relayed frames on their way to a controller.
pub(crate) struct RelayBatch {
    pub(super) frames: Vec<v1::RelayFrame>,
    pub(super) bytes: usize,
    pub(super) waiting_bytes: Arc<AtomicUsize>,
}

impl RelayBatch {
    /// Takes the frames; they no longer wait.
    pub(crate) fn into_frames(self) -> Vec<v1::RelayFrame> {
        self.waiting_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.frames
    }
}
