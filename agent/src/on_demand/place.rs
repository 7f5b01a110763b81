//! A place of its own that whoever came here has named although the system knows of none, such as what a scheduler has granted:
//! it has an agent of its own, which does not stay when nobody uses it, for then the place is given back.

use std::{
    env,
    ffi::{OsStr, OsString},
    time::Duration,
};

use crate::door::base_environment;

/// Names the place.
const NAME: &str = "MILLSTREAM_PLACE";
/// Says which variables of the place its blocks have, besides the usual ones: words such as `JOB`, `JOB_*` for all that begin
/// so, and `JOB=1` for one that is given here.
const VARIABLES: &str = "MILLSTREAM_PLACE_VARIABLES";
/// How long the agent of such a place stays without being used.
pub(super) const IDLE: Duration = Duration::from_millis(100);

/// The name, where there is one.
pub(super) fn name() -> Option<OsString> {
    env::var_os(NAME).filter(|place| !place.is_empty())
}

/// What blocks find in their environment.
pub(super) fn environment() -> Vec<(String, String)> {
    let words = if name().is_some() { env::var(VARIABLES).unwrap_or_default() } else { String::new() };
    // What is no text cannot be passed on.
    let there: Vec<_> =
        env::vars_os().filter_map(|(name, value)| Some((text(&name)?, text(&value)?))).collect();
    with(base_environment(), &words, &there)
}

fn text(word: &OsStr) -> Option<String> {
    word.to_str().map(str::to_owned)
}

/// The usual variables, and those that the words name. What comes later holds.
fn with(
    mut environment: Vec<(String, String)>,
    words: &str,
    there: &[(String, String)],
) -> Vec<(String, String)> {
    let mut set = |name: &str, value: &str| {
        environment.retain(|(other, _)| other != name);
        environment.push((name.to_owned(), value.to_owned()));
    };
    for word in words.split_whitespace() {
        match (word.split_once('='), word.strip_suffix('*')) {
            (Some((name, value)), _) => set(name, value),
            (None, begin) => {
                let meant = |name: &str| begin.map_or(name == word, |begin| name.starts_with(begin));
                there.iter().filter(|(name, _)| meant(name)).for_each(|(name, value)| set(name, value));
            }
        }
    }
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_the_variables_that_are_named_and_no_others() {
        let pairs = |text: &str| -> Vec<(String, String)> {
            let pair =
                |word: &str| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
            text.split_whitespace().filter_map(pair).collect()
        };
        let there = pairs("JOB_ID=7 JOB_NODES=a,b NODE=0 STEP=3 PATH=/step");
        let found = with(pairs("PATH=/bin HOME=/root"), "JOB_* NODE=1 GONE HOME=/x", &there);
        assert_eq!(found, pairs("PATH=/bin JOB_ID=7 JOB_NODES=a,b NODE=1 HOME=/x"));
        assert_eq!(with(pairs("PATH=/bin"), "", &there), pairs("PATH=/bin"));
    }
}
