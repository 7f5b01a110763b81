//! Stands for a place that cannot be had: who dials it is told why.

use super::{DialError, Dialing, Reach};

/// A place that cannot be had.
#[derive(Debug)]
pub(crate) struct Nowhere {
    place: String,
    reason: String,
}

impl Nowhere {
    pub(crate) fn new(place: String, reason: String) -> Self {
        Self { place, reason }
    }
}

impl Reach for Nowhere {
    fn dial(&self) -> Dialing<'_> {
        let reason = self.reason.clone();
        Box::pin(std::future::ready(Err(DialError::Nowhere { reason })))
    }

    fn describe(&self) -> String {
        self.place.clone()
    }

    fn host(&self) -> String {
        self.place.clone()
    }
}
