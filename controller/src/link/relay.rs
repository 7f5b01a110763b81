//! Carries the calls of blocks between the agent and the sync service of this test. Understands none of them.

use millstream_common::limits;
use millstream_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use super::{Break, Connection, Shared, broken, lock};
use crate::sync::host::SyncHost;

/// Messages that wait for the connection: each holds every frame that was ready at one moment.
const MESSAGES_COUNT_MAX: usize = 64;

/// Serves the relay until it ends, which ends the connection.
pub(super) async fn serve(connection: Connection, shared: Shared, sync: SyncHost) -> Break {
    let (outbound, frames) = mpsc::channel::<Vec<v1::RelayFrame>>(MESSAGES_COUNT_MAX);
    let key = connection.session.key();
    let first = tokio_stream::once(v1::RelaySyncRequest { session: Some(key), frames: Vec::new() });
    let rest = ReceiverStream::new(frames).map(|frames| v1::RelaySyncRequest { session: None, frames });
    let mut control = connection.control;
    let mut inbound = match control.relay_sync(first.chain(rest)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return broken(&status),
    };
    // The host takes frames at its own pace; the connection's end is noticed here.
    let (forward, received) = mpsc::channel::<Vec<v1::RelayFrame>>(MESSAGES_COUNT_MAX);
    let reading = async move {
        loop {
            match inbound.message().await {
                Ok(Some(message)) => {
                    if forward.send(message.frames).await.is_err() {
                        return Break::Connection("the sync service ended".to_owned());
                    }
                }
                Ok(None) => return Break::Connection("the agent ended the relay".to_owned()),
                Err(status) => return broken(&status),
            }
        }
    };
    tokio::select! {
        why = reading => why,
        // An agent speaks for the tasks of its own session alone.
        () = sync.serve_relay_of(|task| lock(&shared.progress).contains_key(&task), ReceiverStream::new(received), outbound) => {
            Break::Connection("the sync service ended the relay".to_owned())
        }
    }
}

const _: () = assert!(MESSAGES_COUNT_MAX <= limits::RELAY_FRAMES_COUNT_MAX);
