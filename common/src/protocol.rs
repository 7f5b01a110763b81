//! Which protocol numbers this build speaks, and how two ends agree on one. Pure.

use std::fmt;

/// Lowest protocol number that this build speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// Highest protocol number that this build speaks.
pub const PROTOCOL_MAX: u32 = 1;
/// Version of this build, for people.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Features that an agent of this build has and that a controller may require by name; in alphabetical order.
pub const FEATURES: &[&str] = &["archive-offset", "hold", "relay-replay", "secret-files"];
/// First word of the line with which a relay of standard input and output begins; a word that the dialling end gave, or
/// `ready`, follows. What was printed before, by a login shell for example, is noise.
pub const GREETING: &str = "millstream-stdio";

/// How the refusal of a session ends that a controller waits for in line: it asks again, and keeps its place.
pub const ASK_AGAIN: &str = ": ask again, the place is kept";

/// What one end speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spoken<'a> {
    /// Lowest protocol number.
    pub min: u32,
    /// Highest protocol number.
    pub max: u32,
    /// Version, for people; made safe to print where it is shown.
    pub version: &'a str,
}

impl Spoken<'static> {
    /// What this build speaks.
    pub const OURS: Self = Self { min: PROTOCOL_MIN, max: PROTOCOL_MAX, version: VERSION };
}

impl Spoken<'_> {
    /// The highest number that this agent and a controller both speak.
    ///
    /// # Errors
    /// When there is none; names both versions, and the end to update.
    pub fn agree(self, controller: Spoken<'_>) -> Result<u32, ProtocolError> {
        let Spoken { min, max, .. } = controller;
        if min == 0 || min > max {
            return Err(ProtocolError::NoRange { min, max });
        }
        let (agent, controller) = (Shown::of(self), Shown::of(controller));
        if max < self.min {
            return Err(ProtocolError::ControllerTooOld { agent, controller });
        }
        if min > self.max {
            return Err(ProtocolError::AgentTooOld { agent, controller });
        }
        Ok(max.min(self.max))
    }

    /// Checks the number that an agent says was agreed on with this controller.
    ///
    /// # Errors
    /// When this controller does not speak it; names both versions, and the end to update.
    pub fn check_agreed(self, number: u32, agent_version: &str) -> Result<(), ProtocolError> {
        let agent = Shown::of(Spoken { min: number, max: number, version: agent_version });
        let controller = Shown::of(self);
        if number < self.min {
            return Err(ProtocolError::AgentTooOld { agent, controller });
        }
        if number > self.max {
            return Err(ProtocolError::ControllerTooOld { agent, controller });
        }
        Ok(())
    }
}

/// What one end speaks, as it is shown: `version 0.1.0, which speaks protocol 1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown(String);

impl Shown {
    fn of(spoken: Spoken<'_>) -> Self {
        let version = match spoken.version {
            "" => "of an unknown version".to_owned(),
            version => format!("of version {}", crate::text::printable(version.as_bytes(), 64)),
        };
        let numbers = if spoken.min == spoken.max {
            format!("protocol {}", spoken.min)
        } else {
            format!("protocols {} to {}", spoken.min, spoken.max)
        };
        Self(format!("{version} speaks {numbers}"))
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why two ends have no protocol in common.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The controller is the older one.
    #[error("the agent {agent}, the controller {controller}: update the controller")]
    ControllerTooOld {
        /// The agent.
        agent: Shown,
        /// The controller.
        controller: Shown,
    },
    /// The agent is the older one.
    #[error("the agent {agent}, the controller {controller}: update the agent")]
    AgentTooOld {
        /// The agent.
        agent: Shown,
        /// The controller.
        controller: Shown,
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
    Spoken::OURS.agree(Spoken { min, max, version })
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
    fn both_versions_and_the_older_end_are_named() {
        let newer = Spoken { min: PROTOCOL_MAX + 1, max: PROTOCOL_MAX + 2, version: "9.0.0" };
        let error = newer.agree(Spoken::OURS).unwrap_err().to_string();
        let ours = format!("of version {VERSION} speaks protocol 1");
        assert_eq!(
            error,
            format!(
                "the agent of version 9.0.0 speaks protocols 2 to 3, the controller {ours}: update the controller"
            )
        );
        let error = Spoken::OURS.check_agreed(0, "").unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "the agent of an unknown version speaks protocol 0, the controller {ours}: update the agent"
            )
        );
        assert_eq!(Spoken::OURS.check_agreed(PROTOCOL_MAX, "9.0.0"), Ok(()));
    }

    #[test]
    fn an_unknown_feature_is_refused_by_name() {
        assert!(FEATURES.is_sorted());
        assert_eq!(require(["hold"]), Ok(()));
        let error = require(["hold", "teleport"]).unwrap_err().to_string();
        assert!(error.contains("`teleport`") && error.contains("update the agent"), "{error}");
    }
}
