//! Names and numbers, parsed once: a value of these types is valid wherever it is found.
//!
//! Pure: numbers that need randomness or a clock are made by [`crate::clock::Ids`], not here.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

use crate::limits;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("{what} is empty: give it at least one character")]
    Empty {
        /// Which kind of name.
        what: &'static str,
    },
    /// More bytes than a name may have.
    #[error("{what} has {length} bytes: at most {limit} are allowed")]
    TooLong {
        /// Which kind of name.
        what: &'static str,
        /// Bytes given.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// A character that cannot stand in a name.
    #[error("{what} `{}` has {} at byte {position}: use letters, digits, `-`, `_` or `.`", shown.escape_debug(), describe(*character))]
    Character {
        /// Which kind of name.
        what: &'static str,
        /// The name as given.
        shown: String,
        /// The first character that is refused.
        character: char,
        /// Its place.
        position: usize,
    },
    /// A name that means something else to a file system.
    #[error("{what} `{name}` is reserved by the file system: choose another")]
    Reserved {
        /// Which kind of name.
        what: &'static str,
        /// The name as given.
        name: String,
    },
}

fn describe(character: char) -> String {
    match character {
        '/' => "a `/`".to_owned(),
        c if c.is_control() => format!("a control character (U+{:04X})", u32::from(c)),
        c => format!("`{c}`"),
    }
}

/// The rules for names that become file names: not empty, bounded, no `/`, no `\`, no control or white-space
/// characters but the inner blank, not `.` or `..`.
fn check_file_name(what: &'static str, name: &str, limit: usize) -> Result<(), NameError> {
    check_text(what, name, limit)?;
    let refused = |c: char| c == '/' || c == '\\' || (c.is_whitespace() && c != ' ');
    if let Some((position, character)) = name.char_indices().find(|&(_, c)| refused(c)) {
        return Err(NameError::Character { what, shown: name.to_owned(), character, position });
    }
    if name == "." || name == ".." {
        return Err(NameError::Reserved { what, name: name.to_owned() });
    }
    Ok(())
}

/// The rules for names that are only shown: not empty, bounded, no control characters.
fn check_text(what: &'static str, name: &str, limit: usize) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty { what });
    }
    if name.len() > limit {
        return Err(NameError::TooLong { what, length: name.len(), limit });
    }
    if let Some((position, character)) = name.char_indices().find(|(_, c)| c.is_control()) {
        return Err(NameError::Character { what, shown: name.to_owned(), character, position });
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $what:literal, $limit:expr, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Parses a name.
            ///
            /// # Errors
            /// When it is empty, too long, or has a character that is refused.
            pub fn new(name: impl AsRef<str>) -> Result<Self, NameError> {
                let name = name.as_ref();
                $check($what, name, $limit)?;
                Ok(Self(name.into()))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::new(text).map_err(de::Error::custom)
            }
        }
    };
}

name_type!(
    /// Name of a stream: 1 to 64 bytes, usable as a file name.
    StreamName, "the stream name", limits::STREAM_NAME_BYTES_MAX, check_file_name
);
name_type!(
    /// Name of a block: 1 to 128 bytes, usable as a file name.
    BlockName, "the block name", limits::BLOCK_NAME_BYTES_MAX, check_file_name
);
name_type!(
    /// Name of a whole test: 1 to 128 bytes, usable as a file name.
    TestName, "the test name", limits::BLOCK_NAME_BYTES_MAX, check_file_name
);
name_type!(
    /// Name of a barrier: 1 to 128 bytes without control characters.
    BarrierName, "the barrier name", limits::BARRIER_NAME_BYTES_MAX, check_text
);
name_type!(
    /// Name of a topic: 1 to 128 bytes without control characters.
    TopicName, "the topic name", limits::BARRIER_NAME_BYTES_MAX, check_text
);

impl BlockName {
    /// The nearest valid block name to any text: what is refused becomes `-`, what is too long is cut, and nothing
    /// becomes `block`. For names that are derived, such as one made from a command line.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "what it makes is valid: only a mistake here could panic")]
    pub fn derived(text: &str) -> Self {
        let mut name = String::new();
        for c in text.trim().chars() {
            let kept = if c.is_alphanumeric() || "-_.+=,:@".contains(c) { c } else { '-' };
            if kept == '-' && name.ends_with('-') {
                continue;
            }
            if name.len() + kept.len_utf8() > limits::DERIVED_NAME_BYTES_MAX {
                break;
            }
            name.push(kept);
        }
        let name = name.trim_matches(['-', '.']);
        Self::new(if name.is_empty() { "block" } else { name }).expect("only valid characters were kept")
    }
}

macro_rules! uuid_type {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $type(Uuid);

        impl $type {
            /// Takes a number that was made elsewhere.
            #[must_use]
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The number itself.
            #[must_use]
            pub const fn uuid(self) -> Uuid {
                self.0
            }

            /// The last 12 hexadecimal digits, all of them random: for paths that must stay short.
            #[must_use]
            pub fn short(self) -> String {
                self.0.simple().to_string()[20..].to_owned()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0.hyphenated(), f)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0.hyphenated(), f)
            }
        }

        impl FromStr for $type {
            type Err = IdError;

            /// Only the canonical form is taken: 36 characters, lower case, with hyphens, version 7. A second spelling
            /// of the same number could otherwise name two directories.
            fn from_str(text: &str) -> Result<Self, IdError> {
                let refused = || IdError { what: $what, text: text.chars().take(64).collect() };
                let uuid = Uuid::try_parse(text).map_err(|_| refused())?;
                if uuid.get_version_num() != 7 || uuid.hyphenated().to_string() != text {
                    return Err(refused());
                }
                Ok(Self(uuid))
            }
        }
    };
}

/// A text that is not a number of the kind that was wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} `{}` is not a UUID of version 7 in its canonical form", text.escape_debug())]
pub struct IdError {
    what: &'static str,
    text: String,
}

uuid_type!(
    /// Number of a task, made by the controller before it first sends the task.
    TaskId, "the task id"
);
uuid_type!(
    /// Number of a session, made by the controller before it first opens it.
    SessionId, "the session id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_a_path_is_refused_with_its_place() {
        let error = StreamName::new("a/b").unwrap_err().to_string();
        assert_eq!(error, "the stream name `a/b` has a `/` at byte 1: use letters, digits, `-`, `_` or `.`");
    }

    #[test]
    fn a_control_character_is_shown_escaped() {
        let error = StreamName::new("a\nb").unwrap_err().to_string();
        assert!(error.contains("`a\\nb`") && error.contains("U+000A"), "{error}");
    }

    #[test]
    fn dots_are_reserved() {
        assert!(StreamName::new("..").is_err());
        assert!(StreamName::new("...").is_ok());
    }

    #[test]
    fn derived_names_are_always_valid() {
        assert_eq!(BlockName::derived("  /usr/bin/wget example.org ").as_str(), "usr-bin-wget-example.org");
        assert_eq!(BlockName::derived("///").as_str(), "block");
        assert_eq!(BlockName::derived("..").as_str(), "block");
    }

    #[test]
    fn only_the_canonical_form_of_a_number_is_taken() {
        let id = TaskId::from_uuid(Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, 1, 2)));
        let text = id.to_string();
        assert_eq!(text.parse::<TaskId>().unwrap(), id);
        assert!(text.to_uppercase().parse::<TaskId>().is_err());
        assert!(text.replace('-', "").parse::<TaskId>().is_err());
        assert!("00000000-0000-4000-8000-000000000000".parse::<TaskId>().is_err());
    }
}
