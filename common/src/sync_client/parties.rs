//! How many parties a barrier is for: a number, the size of a group, or all streams.

use std::{fmt, str::FromStr};

/// How many parties a barrier is for, as one of them says it.
///
/// A number may be used as it is: `ctx.barrier("setup", 2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parties {
    /// So many, the one who says it included: 1 to 100,000.
    Count(u32),
    /// As many as the group has that the block was run on, and some more. For main and people: as many as those have said
    /// who wait there already.
    Group {
        /// How many come besides the group.
        more: u32,
    },
    /// As many as there are defined streams when the first party enters, and some more.
    All {
        /// How many come besides the streams.
        more: u32,
    },
}

impl Parties {
    /// The group that the block was run on.
    #[must_use]
    pub fn group() -> Self {
        Self::Group { more: 0 }
    }

    /// Every defined stream of the test that was not closed, whether or not anything was run on it yet: one party each. As
    /// many as are defined when the first party of a meeting enters, so a test defines them before it runs anything that meets: one that comes
    /// later is a party of the next meeting.
    #[must_use]
    pub fn all() -> Self {
        Self::All { more: 0 }
    }

    /// The same and so many more, such as main.
    #[must_use]
    pub fn and(self, others: u32) -> Self {
        match self {
            Self::Count(count) => Self::Count(count.saturating_add(others)),
            Self::Group { more } => Self::Group { more: more.saturating_add(others) },
            Self::All { more } => Self::All { more: more.saturating_add(others) },
        }
    }
}

impl Default for Parties {
    fn default() -> Self {
        Self::group()
    }
}

impl From<u32> for Parties {
    fn from(count: u32) -> Self {
        Self::Count(count)
    }
}

impl From<usize> for Parties {
    fn from(count: usize) -> Self {
        // What does not fit is refused like every number above 100,000.
        Self::Count(u32::try_from(count).unwrap_or(u32::MAX))
    }
}

impl From<i32> for Parties {
    fn from(count: i32) -> Self {
        // What is negative is refused like zero.
        Self::Count(u32::try_from(count).unwrap_or(0))
    }
}

impl fmt::Display for Parties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Group { more: 0 } => f.write_str("group"),
            Self::Group { more } => write!(f, "group+{more}"),
            Self::All { more: 0 } => f.write_str("all"),
            Self::All { more } => write!(f, "all+{more}"),
        }
    }
}

/// A text says no number of parties.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the number of parties is 1 to 100,000, `group` or `all`, or one of these with more, such as `all+1`, not `{text}`"
)]
pub struct PartiesError {
    text: String,
}

impl FromStr for Parties {
    type Err = PartiesError;

    fn from_str(text: &str) -> Result<Self, PartiesError> {
        let wrong = || PartiesError { text: text.to_owned() };
        let number = |digits: &str| digits.parse::<u32>().ok().filter(|&number| number > 0).ok_or_else(wrong);
        let (base, more) = match text.split_once('+') {
            Some((base, more)) => (base, number(more)?),
            None => (text, 0),
        };
        let base = match base {
            "group" => Self::group(),
            "all" => Self::all(),
            digits => Self::Count(number(digits)?),
        };
        Ok(base.and(more))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_read_back() {
        for text in ["1", "100000", "group", "group+1", "all", "all+2"] {
            assert_eq!(text.parse::<Parties>().unwrap().to_string(), text);
        }
        assert_eq!("2+1".parse::<Parties>().unwrap(), Parties::Count(3));
        for text in ["0", "-1", "", "+1", "all+", "all+0", "any", "1.5"] {
            assert!(
                text.parse::<Parties>().unwrap_err().to_string().ends_with(&format!("not `{text}`")),
                "{text}"
            );
        }
    }
}
