//! Which protocol numbers this build speaks, and how two ends agree on one. Pure.

/// Lowest protocol number that this build speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// Highest protocol number that this build speaks.
pub const PROTOCOL_MAX: u32 = 1;
/// Version of this build, for people.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Features that an agent of this build has and that a controller may require by name; in alphabetical order.
pub const FEATURES: &[&str] = &["archive-offset", "hold", "relay-replay", "secret-files"];

/// Why two ends have no protocol in common.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The other end is older.
    #[error(
        "the controller (version {theirs}) speaks protocol {min} to {max}, the agent (version {VERSION}) needs at least {PROTOCOL_MIN}: update the controller"
    )]
    ControllerTooOld {
        /// Lowest number it speaks.
        min: u32,
        /// Highest number it speaks.
        max: u32,
        /// Its version, made safe to print.
        theirs: String,
    },
    /// This end is older.
    #[error(
        "the controller (version {theirs}) speaks protocol {min} to {max}, the agent (version {VERSION}) at most {PROTOCOL_MAX}: update the agent"
    )]
    AgentTooOld {
        /// Lowest number it speaks.
        min: u32,
        /// Highest number it speaks.
        max: u32,
        /// Its version, made safe to print.
        theirs: String,
    },
    /// A range without numbers.
    #[error("protocol numbers {min} to {max} are no range: update the controller")]
    NoRange {
        /// Lowest number given.
        min: u32,
        /// Highest number given.
        max: u32,
    },
    /// A feature that this end lacks.
    #[error(
        "the controller needs the feature `{feature}`, which the agent (version {VERSION}) lacks: update the agent"
    )]
    Feature {
        /// Its name, made safe to print.
        feature: String,
    },
}

/// The highest number that an agent of this build and a controller with these numbers both speak.
///
/// # Errors
/// When there is none; says which end to update.
pub fn agree(min: u32, max: u32, version: &str) -> Result<u32, ProtocolError> {
    let theirs = crate::text::printable(version.as_bytes(), 64);
    if min == 0 || min > max {
        return Err(ProtocolError::NoRange { min, max });
    }
    if max < PROTOCOL_MIN {
        return Err(ProtocolError::ControllerTooOld { min, max, theirs });
    }
    if min > PROTOCOL_MAX {
        return Err(ProtocolError::AgentTooOld { min, max, theirs });
    }
    Ok(max.min(PROTOCOL_MAX))
}

/// Checks the features that a controller cannot do without.
///
/// # Errors
/// When one is not known here.
pub fn require<'a>(features: impl IntoIterator<Item = &'a str>) -> Result<(), ProtocolError> {
    for feature in features {
        if !FEATURES.contains(&feature) {
            let feature = crate::text::printable(feature.as_bytes(), 64);
            return Err(ProtocolError::Feature { feature });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_end_is_the_one_to_update() {
        assert_eq!(agree(1, 1, "0.1.0"), Ok(1));
        assert_eq!(agree(1, 9, "9.0.0"), Ok(PROTOCOL_MAX));
        let error = agree(8, 9, "9.0.0\x1b").unwrap_err().to_string();
        assert!(error.contains("update the agent") && !error.contains('\x1b'), "{error}");
        assert!(agree(0, 1, "").is_err() && agree(2, 1, "").is_err());
    }

    #[test]
    fn an_unknown_feature_is_refused_by_name() {
        assert!(FEATURES.is_sorted());
        assert_eq!(require(["hold"]), Ok(()));
        let error = require(["hold", "teleport"]).unwrap_err().to_string();
        assert!(error.contains("`teleport`") && error.contains("update the agent"), "{error}");
    }
}
