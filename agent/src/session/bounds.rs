//! How much of a host one identity may have, and for how long its sessions may live without a word. Pure.

use std::{collections::BTreeMap, time::Duration};

use millstream_common::limits;

use super::Owner;

/// What the host's administrator allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Longest lease: whoever asks for more gets this one.
    pub lease_max: Duration,
    /// What every identity may have that is not named.
    pub each: Share,
    /// What those may have that are.
    pub named: BTreeMap<String, Share>,
}

/// What one identity may have at once. None: no bound but those of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Sessions, counting those that wait in line.
    pub sessions: Option<usize>,
    /// Tasks in all its sessions that its controllers have not let go of.
    pub tasks: Option<usize>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { lease_max: limits::LEASE_MAX, each: Share::default(), named: BTreeMap::new() }
    }
}

impl Bounds {
    /// What an identity may have. It is named as the status shows it, or by the name in its certificate alone.
    #[must_use]
    pub fn of(&self, owner: &Owner) -> Share {
        let short = owner.0.rsplit_once('/').map_or(owner.0.as_str(), |(_, name)| name);
        let named = self.named.get(&owner.0).or_else(|| self.named.get(short));
        named.map_or(self.each, |named| Share {
            sessions: named.sessions.or(self.each.sessions),
            tasks: named.tasks.or(self.each.tasks),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_identity_has_its_own_share_and_where_it_says_nothing_that_of_everybody() {
        let named = |name: &str, sessions| (name.to_owned(), Share { sessions: Some(sessions), tasks: None });
        let bounds = Bounds {
            each: Share { sessions: Some(2), tasks: Some(100) },
            named: BTreeMap::from([named("ci", 50), named("local user 0", 9)]),
            ..Bounds::default()
        };
        let of = |owner: &str| bounds.of(&Owner(owner.to_owned()));
        assert_eq!(of("millstream://controller/ci"), Share { sessions: Some(50), tasks: Some(100) });
        assert_eq!(of("millstream://controller/alice"), bounds.each);
        assert_eq!(of("local user 0").sessions, Some(9));
        assert_eq!(Bounds::default().of(&Owner("local user 0".to_owned())), Share::default());
    }
}
