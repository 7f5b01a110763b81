//! An agent of this machine, through its Unix socket: `unix:///run/millstream/agent.sock`.

use std::path::PathBuf;

use tokio::net::UnixStream;

use super::{DialError, Dialing, Place, PlaceError, Reach, address_error, only_options};

/// The socket of an agent that runs already.
#[derive(Debug)]
pub(crate) struct Unix {
    path: PathBuf,
}

impl Unix {
    pub(crate) fn new(place: &Place) -> Result<Self, PlaceError> {
        only_options(place, &["path"])?;
        let address = if place.address.is_empty() { place.options.get("path") } else { Some(&place.address) };
        let path = PathBuf::from(address.cloned().unwrap_or_default());
        if !path.is_absolute() {
            return Err(address_error(
                place,
                "give the absolute path of the agent's socket, as in unix:///run/a.sock",
            ));
        }
        Ok(Self { path })
    }
}

impl Reach for Unix {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let pipe = UnixStream::connect(&self.path)
                .await
                .map_err(|source| DialError::Connect { address: self.describe(), source })?;
            Ok(Box::new(pipe) as _)
        })
    }

    fn describe(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    fn host(&self) -> String {
        // An agent behind a Unix socket is on this machine, where every other one may be, too.
        "localhost".to_owned()
    }

    fn what_to_check(&self) -> String {
        "Check that `millstream-agent` runs on this machine and listens on that socket".to_owned()
    }
}
