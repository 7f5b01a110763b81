//! Frames of blocks' calls on their way between a controller and a supervisor. Understands none of them.

use std::sync::Arc;

use millstream_common::{id::SessionId, limits};
use millstream_proto::v1;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use tracing::info;

use crate::door::supervisors::{RelayBatch, Supervised};

/// One controller's hold of the relay of a session.
pub(super) struct Relay {
    pub(super) number: u64,
    pub(super) supervised: Arc<Supervised>,
    pub(super) session_id: SessionId,
}

impl Relay {
    /// Carries frames both ways until either end goes or another controller takes the relay.
    pub(super) async fn run(
        self,
        first: Vec<v1::RelayFrame>,
        mut from_controller: Streaming<v1::RelaySyncRequest>,
        mut from_blocks: mpsc::Receiver<RelayBatch>,
        to_controller: mpsc::Sender<Result<v1::RelaySyncResponse, Status>>,
    ) {
        let inward = async {
            let mut frames = first;
            loop {
                if !frames.is_empty()
                    && let Err(error) = self.supervised.relay(frames).await
                {
                    return Some(Status::from(error));
                }
                match from_controller.message().await {
                    Ok(Some(message)) => frames = message.frames,
                    Ok(None) => return None,
                    Err(status) => {
                        info!(session = %self.session_id, %status, "a relay broke");
                        return None;
                    }
                }
            }
        };
        let outward = async {
            while let Some(batch) = from_blocks.recv().await {
                let mut frames = batch.into_frames();
                // What has come meanwhile goes along: many parties share a few messages.
                while let Ok(more) = from_blocks.try_recv() {
                    frames.extend(more.into_frames());
                    if frames.len() >= limits::RELAY_FRAMES_COUNT_MAX {
                        break;
                    }
                }
                for message in in_messages(frames) {
                    if to_controller.send(Ok(message)).await.is_err() {
                        return None;
                    }
                }
            }
            Some(Status::aborted("the relay was taken by a newer call, or has to be taken again"))
        };
        let ended = tokio::select! {
            ended = inward => ended,
            ended = outward => ended,
        };
        self.supervised.detach_relay(self.number);
        if let Some(status) = ended {
            // The controller may have gone already.
            let _gone = to_controller.send(Err(status)).await;
        }
    }
}

/// Puts frames into messages of bounded size, in order.
fn in_messages(frames: Vec<v1::RelayFrame>) -> Vec<v1::RelaySyncResponse> {
    let mut messages = Vec::new();
    let mut together = Vec::new();
    let mut bytes = 0;
    for frame in frames {
        let length = prost::Message::encoded_len(&frame);
        if bytes + length > limits::CONTROL_MESSAGE_BYTES_MAX && !together.is_empty() {
            messages.push(v1::RelaySyncResponse { frames: std::mem::take(&mut together) });
            bytes = 0;
        }
        bytes += length;
        together.push(frame);
    }
    if !together.is_empty() {
        messages.push(v1::RelaySyncResponse { frames: together });
    }
    messages
}
