//! What the keys of a container say: which one is meant, what a new one is made of, when it is removed. Pure.

use millstream_common::text;

use crate::reach::{Place, PlaceError, address_error, keys_error, truth};

/// Keys that say how a new container is made, and mean nothing for one that runs already.
const OF_NEW: [&str; 7] = ["remove", "mounts", "network", "memory", "cpus", "pids", "options"];

/// When a container that was made is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remove {
    /// When the test ends, however it ends.
    Always,
    /// When every task that ran there ended as expected.
    OnSuccess,
    /// By a person.
    Never,
}

/// Which container is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Recipe {
    /// One that runs already.
    Running {
        /// Its name.
        name: String,
    },
    /// A new one.
    New {
        /// Its name.
        name: String,
        /// What it is made of.
        image: String,
        /// When it is removed.
        remove: Remove,
        /// Whether it shares the network of the engine's host.
        shares_network: bool,
        /// What the keys mean as options of the engine.
        options: Vec<String>,
    },
}

impl Recipe {
    /// Reads the keys. A new container that nobody named gets the fresh name.
    ///
    /// # Errors
    /// When they contradict each other, or name no container.
    pub(super) fn of(place: &Place, fresh_name: &str) -> Result<Self, PlaceError> {
        let key = |key: &str| place.options.get(key).map(String::as_str);
        let refused = |reason: String| keys_error(place, reason);
        let name = place.address.as_str();
        if !name.is_empty() && !is_name(name) {
            return Err(address_error(place, "a container is named with letters, digits, `_`, `.` and `-`"));
        }
        let create = if key("create").is_some() { truth(place, "create")? } else { key("image").is_some() };
        let Some(image) = key("image").filter(|_| create) else {
            if create {
                return Err(refused("a container is made of an image: add `image`".to_owned()));
            }
            if let Some(key) =
                OF_NEW.into_iter().chain(["image"]).find(|key| place.options.contains_key(*key))
            {
                return Err(refused(format!(
                    "`{key}` is for a container that is made, and this one is to run already: remove `{key}`, or let \
                     one be made with `image` and without `create: no`"
                )));
            }
            if name.is_empty() {
                return Err(address_error(
                    place,
                    "name a container that runs, or say with `image` what a new one is made of",
                ));
            }
            return Ok(Self::Running { name: name.to_owned() });
        };
        if image.is_empty() || image.starts_with('-') {
            return Err(refused(format!("`image` is `{}`, which names no image", image.escape_debug())));
        }
        let remove = match key("remove") {
            None | Some("always") => Remove::Always,
            Some("on-success") => Remove::OnSuccess,
            Some("never") => Remove::Never,
            Some(word) => {
                return Err(refused(format!(
                    "`remove` is `{}`: write `always`, `on-success` or `never`",
                    word.escape_debug()
                )));
            }
        };
        let mut options = Vec::new();
        for mount in words(place, "mounts")? {
            options.extend(["--volume".to_owned(), mount]);
        }
        for (key, option) in
            [("network", "--network"), ("memory", "--memory"), ("cpus", "--cpus"), ("pids", "--pids-limit")]
        {
            options.extend(
                place.options.get(key).into_iter().flat_map(|value| [option.to_owned(), value.clone()]),
            );
        }
        options.extend(words(place, "options")?);
        Ok(Self::New {
            name: if name.is_empty() { fresh_name } else { name }.to_owned(),
            image: image.to_owned(),
            remove,
            shares_network: key("network") == Some("host"),
            options,
        })
    }

    /// The container's name.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Running { name } | Self::New { name, .. } => name,
        }
    }
}

/// A list is a line for each item; a text is cut as a shell would cut it.
pub(super) fn words(place: &Place, key: &str) -> Result<Vec<String>, PlaceError> {
    let Some(given) = place.options.get(key) else { return Ok(Vec::new()) };
    if given.contains('\n') {
        return Ok(given.lines().map(str::to_owned).collect());
    }
    text::words(given).map_err(|error| keys_error(place, format!("`{key}`: {error}")))
}

/// Nothing else may stand where the engine expects a name: it could be taken for an option.
fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

#[cfg(test)]
#[rustfmt::skip] // expectations are rewritten by their tool, which wants them on one line
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(address: &str, options: &[(&str, &str)], expected: Expect) {
        let mut place = Place::new("podman", address);
        place.options.extend(options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        expected.assert_eq(&match Recipe::of(&place, "fresh") {
            Ok(recipe) => format!("{recipe:?}"),
            Err(error) => error.to_string(),
        });
    }

    #[test]
    fn keys_say_which_container_is_meant() {
        check("box", &[], expect![[r#"Running { name: "box" }"#]]);
        check("box", &[("create", "no")], expect![[r#"Running { name: "box" }"#]]);
        check("", &[("image", "fedora"), ("create", "yes"), ("remove", "always")], expect![[r#"New { name: "fresh", image: "fedora", remove: Always, shares_network: false, options: [] }"#]]);
        check("box", &[("image", "fedora"), ("remove", "on-success"), ("network", "host")], expect![[r#"New { name: "box", image: "fedora", remove: OnSuccess, shares_network: true, options: ["--network", "host"] }"#]]);
        check("", &[("image", "x"), ("remove", "never"), ("mounts", "/a:/b /c:/d:ro"), ("network", "lab"), ("memory", "1G"), ("cpus", "1.5"), ("pids", "100"), ("options", "--privileged\n--env=A=b c\n")], expect![[r#"New { name: "fresh", image: "x", remove: Never, shares_network: false, options: ["--volume", "/a:/b", "--volume", "/c:/d:ro", "--network", "lab", "--memory", "1G", "--cpus", "1.5", "--pids-limit", "100", "--privileged", "--env=A=b c"] }"#]]);
    }

    #[test]
    fn keys_that_name_no_container_are_refused_with_the_next_step() {
        check("", &[], expect!["`podman` cannot use the address ``: name a container that runs, or say with `image` what a new one is made of"]);
        check("", &[("create", "yes")], expect!["`podman` cannot be had: a container is made of an image: add `image`"]);
        check("box", &[("create", "perhaps")], expect!["`podman` cannot be had: `create` is `perhaps`: write `yes` or `no`"]);
        check("box", &[("create", "no"), ("image", "fedora")], expect!["`podman` cannot be had: `image` is for a container that is made, and this one is to run already: remove `image`, or let one be made with `image` and without `create: no`"]);
        check("box", &[("remove", "always")], expect!["`podman` cannot be had: `remove` is for a container that is made, and this one is to run already: remove `remove`, or let one be made with `image` and without `create: no`"]);
        check("box", &[("image", "x"), ("remove", "sometimes")], expect!["`podman` cannot be had: `remove` is `sometimes`: write `always`, `on-success` or `never`"]);
        check("--privileged", &[], expect!["`podman` cannot use the address `--privileged`: a container is named with letters, digits, `_`, `.` and `-`"]);
        check("a/b", &[], expect!["`podman` cannot use the address `a/b`: a container is named with letters, digits, `_`, `.` and `-`"]);
        check("", &[("image", "--privileged")], expect!["`podman` cannot be had: `image` is `--privileged`, which names no image"]);
    }
}
