//! Paths with wild cards, and which nodes of a tree they mean. Pure.
//!
//! A path is names with `/` between them. With `/` in front it is absolute: it begins at the root. Otherwise it is
//! relative: anything may stand before it. `*` as the last name means the node and all that is below it; in any other
//! place, `*` stands for any characters of one name, none included.

/// A path with wild cards.
#[derive(Debug)]
pub(super) struct Pattern<'a> {
    names: Vec<&'a str>,
    /// Whether anything may stand before the names.
    open_start: bool,
    /// Whether anything may stand behind them.
    open_end: bool,
}

impl<'a> Pattern<'a> {
    pub(super) fn parse(path: &'a str) -> Self {
        let is_absolute = path.starts_with('/');
        let mut names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        let open_end = names.last() == Some(&"*");
        if open_end {
            names.pop();
        }
        let open_start = !is_absolute;
        if open_start && names.first() == Some(&"*") {
            names.remove(0);
        }
        Self { names, open_start, open_end }
    }

    /// The names, when the path means one place alone, there or not.
    pub(super) fn one_place(&self) -> Option<&[&'a str]> {
        let is_one = !self.open_start && !self.open_end && !self.names.iter().any(|name| name.contains('*'));
        is_one.then_some(&self.names[..])
    }

    /// Whether the node at a path is meant.
    pub(super) fn means(&self, path: &[String]) -> bool {
        let Some(room) = path.len().checked_sub(self.names.len()) else { return false };
        let starts = 0..=if self.open_start { room } else { 0 };
        starts.into_iter().any(|start| {
            (self.open_end || start == room)
                && self.names.iter().zip(&path[start..]).all(|(pattern, name)| glob(pattern, name))
        })
    }
}

/// Whether a name is meant by a pattern in which `*` stands for any characters.
fn glob(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(head) else { return false };
    let mut pieces: Vec<&str> = rest.split('*').collect();
    let last = pieces.pop().unwrap_or_default();
    // The first place where a piece stands is as good as any later one.
    for piece in pieces {
        let Some(at) = name.find(piece) else { return false };
        name = &name[at + piece.len()..];
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use regex::Regex;

    use super::*;

    /// What the documentation says of a path, as a regular expression over `/name/name`.
    fn model(path: &str) -> Regex {
        let mut names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        let below = if names.last() == Some(&"*") {
            names.pop();
            "(/[^/]*)*"
        } else {
            ""
        };
        let before = if path.starts_with('/') { "" } else { "(/[^/]*)*" };
        if !path.starts_with('/') && names.first() == Some(&"*") {
            names.remove(0);
        }
        let name = |name: &&str| format!("/{}", regex::escape(name).replace(r"\*", "[^/]*"));
        Regex::new(&format!("^{before}{}{below}$", names.iter().map(name).collect::<String>())).unwrap()
    }

    #[test]
    fn the_wild_card_stands_for_any_characters_of_one_name() {
        for (pattern, name, is_meant) in [
            ("client-*", "client-12", true),
            ("client-*", "client-", true),
            ("client-*", "client", false),
            ("*-1", "a-1-1", true),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "acb", false),
            ("a*a", "a", false),
            ("**", "", true),
        ] {
            assert_eq!(glob(pattern, name), is_meant, "{pattern} {name}");
        }
    }

    proptest! {
        #[test]
        fn a_path_means_what_its_documentation_says(
            path in "/?([ab*]{1,3}/){0,3}[ab*]{0,3}",
            node in prop::collection::vec("[ab]{1,3}", 0..5),
        ) {
            let text: String = node.iter().map(|name| format!("/{name}")).collect();
            prop_assert_eq!(Pattern::parse(&path).means(&node), model(&path).is_match(&text), "{} {}", path, text);
        }
    }
}
