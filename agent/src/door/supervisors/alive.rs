//! Whether a supervisor lives: its socket answers, or its lock decides.

use millstream_common::limits;
use tokio::{net::UnixStream, time::sleep};
use tracing::error;

use super::SessionDirectory;

/// Connects to the supervisor of a session, or learns for certain that there is none: its lock is free. A supervisor that
/// is just ending has closed its socket and still holds its lock for a moment; one that is stuck is asked again and again.
pub(crate) async fn find_alive(directory: &SessionDirectory) -> Option<UnixStream> {
    let mut pause = limits::RECONNECT_PAUSE_MIN;
    loop {
        if let Ok(stream) = UnixStream::connect(directory.socket()).await {
            return Some(stream);
        }
        match directory.is_locked() {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => {
                error!(directory = %directory.path().display(), %error, "the lock of a session cannot be asked");
                return None;
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(limits::RECONNECT_PAUSE_MAX);
    }
}
