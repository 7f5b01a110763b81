//! The key `limits` of the configuration: how long a lease may be, and how much of the host one identity may have.

use std::{collections::BTreeMap, time::Duration};

use millstream_common::{
    limits,
    yaml::{Located, Value},
};

use super::{ConfigError, Reader};
use crate::session::{Bounds, Share};

const KEYS: &[&str] = &["identities", "lease", "sessions", "tasks"];
const SHARE_KEYS: &[&str] = &["sessions", "tasks"];

impl Reader<'_> {
    pub(super) fn bounds(&self, located: Located) -> Result<Bounds, ConfigError> {
        let mut bounds = Bounds::default();
        for (key, value) in self.mapping(located, "limits", "`limits`", KEYS)? {
            match key {
                "lease" => bounds.lease_max = self.lease(value)?,
                "identities" => bounds.named = self.identities(value)?,
                key => self.share(&mut bounds.each, key, value)?,
            }
        }
        Ok(bounds)
    }

    fn lease(&self, located: Located) -> Result<Duration, ConfigError> {
        let wanted = "a duration such as `30s` or `10m`, from 1 s to 24 h";
        let text = self.text("lease", located, wanted)?;
        humantime::parse_duration(&text.value)
            .ok()
            .filter(|span| (limits::LEASE_MIN..=limits::LEASE_MAX).contains(span))
            .ok_or(ConfigError::Value { place: text.place, key: "lease", wanted })
    }

    fn share(&self, share: &mut Share, key: &'static str, located: Located) -> Result<(), ConfigError> {
        let wanted = "a whole number of at least 1";
        let text = self.text(key, located, wanted)?;
        let count = text.value.parse().ok().filter(|count| *count > 0);
        let count: usize = count.ok_or(ConfigError::Value { place: text.place, key, wanted })?;
        match key {
            "sessions" => share.sessions = Some(count),
            _ => share.tasks = Some(count),
        }
        Ok(())
    }

    /// Shares by the names of those who have them.
    fn identities(&self, located: Located) -> Result<BTreeMap<String, Share>, ConfigError> {
        let place = self.place(located.mark);
        let Value::Map(entries) = located.value else {
            let wanted = "a mapping from names in certificates to `sessions` and `tasks`";
            return Err(ConfigError::Value { place, key: "identities", wanted });
        };
        let mut named = BTreeMap::new();
        for (name, (_, value)) in entries {
            let mut share = Share::default();
            for (key, value) in self.mapping(value, "identities", "an identity's limits", SHARE_KEYS)? {
                self.share(&mut share, key, value)?;
            }
            named.insert(name, share);
        }
        Ok(named)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use expect_test::{Expect, expect};

    use super::super::Config;

    fn check(text: &str, expected: &Expect) {
        let parsed = Config::parse(Path::new("agent.yaml"), text);
        expected.assert_eq(&match parsed {
            Ok(config) => format!("{:?}", config.bounds),
            Err(error) => error.to_string(),
        });
    }

    #[test]
    fn limits_are_read_for_everybody_and_for_those_who_are_named() {
        check(
            "limits: {lease: 10m, sessions: 4, identities: {ci: {sessions: 64, tasks: 5000}}}",
            &expect![[
                r#"Bounds { lease_max: 600s, each: Share { sessions: Some(4), tasks: None }, named: {"ci": Share { sessions: Some(64), tasks: Some(5000) }} }"#
            ]],
        );
    }

    #[test]
    fn wrong_limits_are_told_with_what_would_do() {
        check(
            "limits: {lease: 2d}",
            &expect!["agent.yaml:1:17: `lease` must be a duration such as `30s` or `10m`, from 1 s to 24 h"],
        );
        check(
            "limits: {sessions: 0}",
            &expect!["agent.yaml:1:20: `sessions` must be a whole number of at least 1"],
        );
        check(
            "limits: {identities: ci}",
            &expect![
                "agent.yaml:1:22: `identities` must be a mapping from names in certificates to `sessions` and `tasks`"
            ],
        );
        check(
            "limits: {identities: {ci: {session: 1}}}",
            &expect![
                "agent.yaml:1:28: `session` is no key of an identity's limits: did you mean `sessions`?"
            ],
        );
    }
}
