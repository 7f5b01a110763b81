//! From a definition to the place that it means: what is kept elsewhere is looked up, when the stream is first used.

use super::{Defined, Held, keys};
use crate::{params::ReferenceError, reach::Place};

impl Defined {
    /// The place, with everything in clear.
    ///
    /// # Errors
    /// When something that is kept elsewhere is not there.
    pub(crate) fn place(&self) -> Result<Place, ReferenceError> {
        let mut place = Place::new(&self.kind, &self.address);
        for (key, setting) in &self.options {
            let value = match &setting.value {
                Held::Here(text) => text.clone(),
                Held::Elsewhere(reference) => reference.look_up(&setting.origin)?,
            };
            if setting.secret {
                place.secrets.insert(key.clone());
            }
            place.options.insert(key.clone(), value);
        }
        // An address that was kept elsewhere.
        if let Some(address) = keys::address_key(&self.kind).and_then(|key| place.options.remove(key)) {
            place.address = address;
        }
        Ok(place)
    }
}
