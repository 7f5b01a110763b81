//! One defined stream: its name, what was said of it, and the way to its agent, which is made when it is first wanted.
//!
//! Defining a stream costs a few texts: no file is read, no reach is made and nothing is dialled for a stream that nobody
//! uses. One that cannot be had is a fault of whoever asks for it, and of nobody else.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use millstream_common::id::StreamName;

use super::StreamError;
use crate::{
    definition::{Defaults, Defined},
    reach::{self, Reach, nowhere::Nowhere},
};

/// What the driver and the handles know of a stream.
pub(crate) struct StreamShared {
    pub(crate) name: StreamName,
    pub(crate) index: usize,
    defined: Defined,
    /// The definition as the test outside of this block shows it, when it is that test's stream.
    inherited: Option<String>,
    surroundings: reach::Surroundings,
    /// Set once the place could be had.
    reached: OnceLock<Reached>,
    /// What is told instead where there is nobody to tell an error to.
    nowhere: OnceLock<Reached>,
}

/// The way to the agent.
struct Reached {
    reach: Arc<dyn Reach>,
    /// What the host is called until it is known.
    before: String,
    host: OnceLock<String>,
}

impl Reached {
    fn by(reach: Arc<dyn Reach>) -> Self {
        let before = reach.host();
        Self { reach, before, host: OnceLock::new() }
    }

    fn host(&self) -> &str {
        if self.host.get().is_none() && self.reach.knows_host() {
            return self.host.get_or_init(|| self.reach.host());
        }
        self.host.get().unwrap_or(&self.before)
    }
}

impl fmt::Debug for StreamShared {
    /// Without the reach: its author may not have thought of secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamShared")
            .field("name", &self.name)
            .field("definition", &self.definition())
            .finish_non_exhaustive()
    }
}

impl StreamShared {
    pub(super) fn new(defined: Defined, index: usize, surroundings: &reach::Surroundings) -> Self {
        Self {
            name: defined.name.clone(),
            index,
            defined,
            inherited: None,
            surroundings: surroundings.clone(),
            reached: OnceLock::new(),
            nowhere: OnceLock::new(),
        }
    }

    /// A stream of the test that this block belongs to, with the definition as that test shows it.
    pub(crate) fn inherited(
        defined: Defined,
        line: String,
        index: usize,
        surroundings: &reach::Surroundings,
    ) -> Self {
        Self { inherited: Some(line), ..Self::new(defined, index, surroundings) }
    }

    /// The same place under another name.
    pub(super) fn renamed(&self, name: StreamName, index: usize) -> Self {
        let mut again = Self::new(Defined { name, ..self.defined.clone() }, index, &self.surroundings);
        again.inherited.clone_from(&self.inherited);
        // The very same: making it again might lead to another node of an allocation. Why there is none is told by whoever
        // uses it.
        if let Ok(reached) = self.reached() {
            again.reached.get_or_init(|| Reached::by(Arc::clone(&reached.reach)));
        }
        again
    }

    /// Makes the way to the agent, unless it is there.
    ///
    /// # Errors
    /// When the place cannot be had. It is tried again the next time.
    pub(crate) fn locate(&self) -> Result<(), StreamError> {
        self.reached().map(drop)
    }

    fn reached(&self) -> Result<&Reached, StreamError> {
        if let Some(reached) = self.reached.get() {
            return Ok(reached);
        }
        let made = match &self.defined.reach {
            Some(reach) => Ok(Arc::clone(reach)),
            None => self
                .defined
                .place()
                .map_err(reach::PlaceError::Reference)
                .and_then(|place| reach::resolve(&place, &self.surroundings)),
        };
        let reach = made.map_err(|reason| StreamError::Place {
            name: self.name.clone(),
            origin: self.defined.origin.to_string(),
            reason,
        })?;
        Ok(self.reached.get_or_init(|| Reached::by(reach)))
    }

    /// The way to the agent, or one that leads nowhere and says why.
    fn reached_or_nowhere(&self) -> &Reached {
        // Not tried for each task again: whoever wants to know asks by `locate`.
        if let (None, Some(nowhere)) = (self.reached.get(), self.nowhere.get()) {
            return nowhere;
        }
        self.reached().unwrap_or_else(|error| {
            self.nowhere.get_or_init(|| {
                let place = self.definition();
                let host = match self.defined.address.as_str() {
                    "" => self.defined.kind.clone(),
                    address => address.to_owned(),
                };
                let reach = Arc::new(Nowhere::new(place, error.to_string()));
                Reached { reach, before: host.clone(), host: OnceLock::from(host) }
            })
        })
    }

    pub(crate) fn reach(&self) -> &Arc<dyn Reach> {
        &self.reached_or_nowhere().reach
    }

    pub(crate) fn host(&self) -> &str {
        self.reached_or_nowhere().host()
    }

    /// The definition as one line, without its secrets.
    pub(crate) fn definition(&self) -> String {
        self.inherited.clone().unwrap_or_else(|| self.defined.to_string())
    }

    /// What holds for every block that runs there.
    pub(crate) fn defaults(&self) -> &Defaults {
        &self.defined.defaults
    }

    /// Whether it is on this machine, as a child of this program.
    pub(crate) fn is_local(&self) -> bool {
        self.defined.kind == "local"
    }

    /// Whether the host is to be reserved.
    pub(crate) fn exclusive(&self) -> bool {
        self.defined.exclusive
    }

    /// How long the test waits in line for the host, when the definition says so.
    pub(crate) fn wait(&self) -> Option<Duration> {
        self.defined.wait
    }

    /// The reach, when somebody made it by hand and gave it.
    pub(crate) fn made_by_hand(&self) -> Option<&Arc<dyn Reach>> {
        self.defined.reach.as_ref().filter(|_| self.inherited.is_none())
    }
}
