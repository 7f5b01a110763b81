//! What this build says of itself to the other end, and how two ends that are not of one build agree. Pure.
//!
//! - A **number** stands for what all messages mean. It counts minor versions, and a build speaks its own and the one before:
//!   ends that are one minor version apart work together, ends that are more apart are told which one to update.
//! - A **feature** is something that can be missing within a number: a field that came later, which an older agent would
//!   ignore, or refuse without saying why. It comes with a word in [`Feature`]: agents tell the words that they know, and a
//!   controller requires those, and only those, that the session or the task at hand cannot do without, before anything of
//!   it runs. Words that one end does not know are nothing to it.

use std::{collections::BTreeSet, fmt};

/// Lowest protocol number that this build speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// Highest protocol number that this build speaks.
pub const PROTOCOL_MAX: u32 = 1;
/// Version of this build, for people.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// First word of the line with which a relay of standard input and output begins; a word that the dialling end gave, or
/// `ready`, follows. What was printed before, by a login shell for example, is noise.
pub const GREETING: &str = "millstream-stdio";

/// How the refusal of a session ends that a controller waits for in line: it asks again, and keeps its place.
pub const ASK_AGAIN: &str = ": ask again, the place is kept";
/// How the refusal of a session begins that this host had and that is over, whatever ended it.
pub const SESSION_GONE: &str = "session";
/// How it begins when the session's supervisor has died.
pub const SESSION_LOST: &str = "session lost";

macro_rules! features {
    ($($(#[$doc:meta])* $variant:ident = $word:literal, $purpose:literal;)*) => {
        /// What agents may lack although they speak the same number: one closed list, in the order of the words.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Feature {
            $($(#[$doc])* $variant,)*
        }

        impl Feature {
            /// Every feature that this build knows.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];
            /// Their words.
            pub const WORDS: &[&str] = &[$($word,)*];

            /// Its word on the wire.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }

            /// What it is good for, for people.
            #[must_use]
            pub const fn purpose(self) -> &'static str {
                match self {
                    $(Self::$variant => $purpose,)*
                }
            }
        }
    };
}

features! {
    /// `TaskSpec.hold`. An agent without it would not wait for the order to go.
    Hold = "hold", "to hold a prepared task until it is started";
    /// `OpenSessionRequest.wait_duration`. An agent without it keeps no place for who waits.
    Line = "line", "to wait in line for a host that is to be reserved";
    /// `PhaseSpec.reports_phases`. An agent without it would find that the task has another digest, and nobody why.
    ReportedPhases = "reported-phases", "to judge set-up and tear-down of a class apart";
    /// `StartTaskRequest.secret_files`. They are not in the digest: an agent without it would start the block without them.
    SecretFiles = "secret-files", "to hand over secret parameters";
}

impl Feature {
    /// Those of an agent's words that mean something here.
    pub fn known<'a>(words: impl IntoIterator<Item = &'a str>) -> BTreeSet<Self> {
        words.into_iter().filter_map(Self::of).collect()
    }

    fn of(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|feature| feature.word() == word)
    }
}

/// What one agent says of itself. Handed in, so that tests can have one of another build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Build {
    /// What it speaks.
    pub spoken: Spoken<'static>,
    /// The words of its features, in alphabetical order.
    pub features: &'static [&'static str],
}

impl Build {
    /// This build.
    pub const OURS: Self = Self { spoken: Spoken::OURS, features: Feature::WORDS };

    /// Checks, on the agent, the features that a controller cannot do without.
    ///
    /// # Errors
    /// When this agent lacks one; names it, both versions, and the end to update.
    pub fn require<'a>(
        &self,
        features: impl IntoIterator<Item = &'a str>,
        controller_version: &str,
    ) -> Result<(), ProtocolError> {
        match features.into_iter().find(|feature| !self.features.contains(feature)) {
            Some(feature) => Err(lacking(feature, self.spoken.version, controller_version)),
            None => Ok(()),
        }
    }
}

/// Checks, on the controller, that an agent has what is needed of it.
///
/// # Errors
/// When it lacks a feature; names it, both versions, and the end to update.
pub fn check_features(
    needed: impl IntoIterator<Item = Feature>,
    told: &BTreeSet<Feature>,
    agent_version: &str,
) -> Result<(), ProtocolError> {
    match needed.into_iter().find(|feature| !told.contains(feature)) {
        Some(feature) => Err(lacking(feature.word(), agent_version, VERSION)),
        None => Ok(()),
    }
}

fn lacking(feature: &str, agent_version: &str, controller_version: &str) -> ProtocolError {
    let purpose = Feature::of(feature).map_or(String::new(), |feature| format!(" ({})", feature.purpose()));
    // What was there and is no more went for a reason: then it is the controller that has not kept up.
    let end = if order(agent_version) > order(controller_version) { "controller" } else { "agent" };
    ProtocolError::Feature {
        feature: crate::text::printable(feature.as_bytes(), 64),
        purpose,
        agent: shown_version(agent_version),
        controller: shown_version(controller_version),
        end,
    }
}

/// What versions are compared by: their numbers. A text that has none comes first.
fn order(version: &str) -> Vec<u64> {
    let numbers = version.split(['-', '+']).next().unwrap_or_default().split('.');
    numbers.map(str::parse).collect::<Result<_, _>>().unwrap_or_default()
}

fn shown_version(version: &str) -> String {
    match version {
        "" => "of an unknown version".to_owned(),
        version => format!("of version {}", crate::text::printable(version.as_bytes(), 64)),
    }
}

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
        let version = shown_version(spoken.version);
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
    /// The agent lacks a feature.
    #[error(
        "the controller {controller} needs the feature `{feature}`{purpose}, which the agent {agent} lacks: update the {end}"
    )]
    Feature {
        /// Its word, made safe to print.
        feature: String,
        /// What it is for, where that is known.
        purpose: String,
        /// The agent's version.
        agent: String,
        /// The controller's version.
        controller: String,
        /// Which of them to update.
        end: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    /// What two ends agree on, and what they say that cannot.
    fn check(agents: &[(u32, u32, &str)], controllers: &[(u32, u32, &str)], expected: Expect) {
        let mut told = String::new();
        for &(min, max, version) in agents {
            let agent = Spoken { min, max, version };
            for &(min, max, version) in controllers {
                let agreed = agent.agree(Spoken { min, max, version });
                let said =
                    agreed.map_or_else(|error| error.to_string(), |number| format!("protocol {number}"));
                told += &format!("{} and {}: {said}\n", agent.version, version.escape_default());
            }
        }
        expected.assert_eq(&told);
    }

    /// What is said, whatever version this build has.
    fn ours(error: &ProtocolError) -> String {
        error.to_string().replace(&format!("controller of version {VERSION}"), "controller of version OURS")
    }

    #[test]
    fn one_minor_version_apart_works_and_more_is_told_which_end_to_update() {
        let builds = [(1, 1, "0.1.0"), (1, 2, "0.2.0"), (2, 3, "0.3.0")];
        check(
            &builds,
            &builds,
            expect![[r#"
            0.1.0 and 0.1.0: protocol 1
            0.1.0 and 0.2.0: protocol 1
            0.1.0 and 0.3.0: the agent of version 0.1.0 speaks protocol 1, the controller of version 0.3.0 speaks protocols 2 to 3: update the agent
            0.2.0 and 0.1.0: protocol 1
            0.2.0 and 0.2.0: protocol 2
            0.2.0 and 0.3.0: protocol 2
            0.3.0 and 0.1.0: the agent of version 0.3.0 speaks protocols 2 to 3, the controller of version 0.1.0 speaks protocol 1: update the controller
            0.3.0 and 0.2.0: protocol 2
            0.3.0 and 0.3.0: protocol 3
        "#]],
        );
    }

    #[test]
    fn a_number_counts_minor_versions_and_a_build_speaks_its_own_and_the_one_before() {
        let [major, minor, _] = order(VERSION)[..] else { panic!("{VERSION} has three numbers") };
        assert_eq!(major, 0, "say here how the count goes on");
        let own = u32::try_from(minor).unwrap();
        assert_eq!(
            (PROTOCOL_MIN, PROTOCOL_MAX),
            ((own - 1).max(1), own),
            "a new minor version has the next number"
        );
    }

    #[test]
    fn what_is_no_range_or_no_text_is_refused_and_harmless() {
        let numbers = [(0, 1, "0.1.0"), (2, 1, "0.1.0"), (8, 9, "9.0.0\x1b"), (9, 9, "")];
        check(
            &[(1, 1, "0.1.0")],
            &numbers,
            expect![[r#"
            0.1.0 and 0.1.0: protocol numbers 0 to 1 are no range: update the controller
            0.1.0 and 0.1.0: protocol numbers 2 to 1 are no range: update the controller
            0.1.0 and 9.0.0\u{1b}: the agent of version 0.1.0 speaks protocol 1, the controller of version 9.0.0\u{1b} speaks protocols 8 to 9: update the agent
            0.1.0 and : the agent of version 0.1.0 speaks protocol 1, the controller of an unknown version speaks protocol 9: update the agent
        "#]],
        );
    }

    #[test]
    fn the_number_that_an_agent_answers_is_checked() {
        let refused = |number, version| ours(&Spoken::OURS.check_agreed(number, version).unwrap_err());
        expect!["the agent of an unknown version speaks protocol 0, the controller of version OURS speaks protocol 1: update the agent"].assert_eq(&refused(0, ""));
        expect!["the agent of version 9.0.0 speaks protocol 2, the controller of version OURS speaks protocol 1: update the controller"].assert_eq(&refused(PROTOCOL_MAX + 1, "9.0.0"));
        assert_eq!(Spoken::OURS.check_agreed(PROTOCOL_MAX, "9.0.0"), Ok(()));
    }

    #[test]
    fn a_feature_that_the_agent_lacks_is_named_with_both_versions_and_the_end_to_update() {
        assert!(Feature::WORDS.is_sorted() && Feature::ALL.is_sorted());
        let of = |version, features| Build { spoken: Spoken { min: 1, max: 1, version }, features };
        let mut told = String::new();
        for (version, features) in
            [("0.0.9", &["hold"][..]), ("0.1.0", &[]), ("0.10.0", &["other"]), ("", &[])]
        {
            let agent = of(version, features);
            // Asked by the agent, and by a controller of this build: one answer, in the same words.
            let asked = agent.require(["line"], VERSION);
            let known = Feature::known(agent.features.iter().copied());
            assert_eq!(asked, check_features([Feature::Line], &known, version));
            told += &format!("{}\n", ours(&asked.unwrap_err()));
        }
        told += &format!("{}\n", of("0.1.0", &[]).require(["tele\x1bport"], "dev").unwrap_err());
        expect![[r#"
            the controller of version OURS needs the feature `line` (to wait in line for a host that is to be reserved), which the agent of version 0.0.9 lacks: update the agent
            the controller of version OURS needs the feature `line` (to wait in line for a host that is to be reserved), which the agent of version 0.1.0 lacks: update the agent
            the controller of version OURS needs the feature `line` (to wait in line for a host that is to be reserved), which the agent of version 0.10.0 lacks: update the controller
            the controller of version OURS needs the feature `line` (to wait in line for a host that is to be reserved), which the agent of an unknown version lacks: update the agent
            the controller of version dev needs the feature `tele\u{1b}port`, which the agent of version 0.1.0 lacks: update the controller
        "#]].assert_eq(&told);
    }

    #[test]
    fn words_that_one_end_does_not_know_are_nothing_to_it() {
        assert_eq!(Feature::known(["hold", "teleport"]), [Feature::Hold].into());
        let known = Feature::known(Feature::WORDS.iter().copied().chain(["teleport"]));
        assert_eq!(check_features(Feature::ALL.iter().copied(), &known, "9.0.0"), Ok(()));
        assert_eq!(Build::OURS.require(Feature::WORDS.iter().copied(), "0.0.1"), Ok(()));
    }
}
