//! YAML as a tree that knows where everything stands: the one module that knows the YAML library.
//!
//! Keys keep their order and their spelling: the key 1 is the text "1". Every key and value keeps its line and column,
//! scalars also keep the characters they were written with. What YAML lets pass silently, a key given twice, is refused.
//! Depth and size are bounded. Reads no files, and knows nothing of what the tree is for.

use std::fmt;

use indexmap::{IndexMap, map};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_yaml::{DuplicateKeyPolicy, Location, Spanned, Tagged};

/// Mappings and lists inside each other. A build without optimisation takes 48 KiB of stack for each, and a thread may
/// have 2 MiB.
const DEPTH_MAX: usize = 24;

/// Tags that the YAML language itself defines, such as `!!str`: they say how a scalar is read.
const LANGUAGE_TAG: &str = "tag:yaml.org,2002:";

/// Line and column in a text, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Line.
    pub line: u64,
    /// Column, in characters.
    pub column: u64,
}

impl Mark {
    fn of(location: &Location) -> Self {
        Self { line: location.line(), column: location.column() }
    }
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Located {
    /// The value.
    pub value: Value,
    /// Where it stands.
    pub mark: Mark,
    /// What was written in front of it, such as `!secret`; none for the tags of the language itself.
    pub tag: Option<String>,
}

/// What stands at a place of the tree.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nothing, or `~`.
    Null,
    /// A text, a number or a truth.
    Scalar {
        /// As it was written; the content of a quoted text.
        text: String,
        /// As it is understood.
        json: serde_json::Value,
    },
    /// Values in order.
    List(Vec<Located>),
    /// Keys in the order in which they were written, each once.
    Map(IndexMap<String, (Mark, Located)>),
}

/// Why a text is no tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum YamlError {
    /// It is no YAML, or too deep or too large.
    #[error("{reason}")]
    Syntax {
        /// Where.
        mark: Mark,
        /// What is wrong.
        reason: String,
    },
    /// A key stands twice in one mapping.
    #[error("key `{key}` is given twice")]
    Twice {
        /// The key.
        key: String,
        /// Its first place.
        first: Mark,
        /// Its second place.
        second: Mark,
    },
}

/// Reads a text.
///
/// # Errors
/// When it is no YAML, gives a key twice, or is too deep or too large.
pub fn parse(text: &str) -> Result<Located, YamlError> {
    let options = serde_yaml::options! {
        // Repeated keys are refused below, with both places.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        budget: serde_yaml::budget! { max_depth: DEPTH_MAX },
    };
    let root: Node = serde_yaml::from_str_with_options(text, options).map_err(|error| {
        let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
        let reason = match error.without_snippet() {
            serde_yaml::Error::Budget { .. } => {
                format!("it is nested deeper than {DEPTH_MAX} levels, or repeats itself without end")
            }
            other => other.to_string().split(" at line ").next().unwrap_or_default().to_owned(),
        };
        YamlError::Syntax { mark: Mark { line, column }, reason }
    })?;
    located(text, root)
}

/// What the YAML library understands, with its place and its tag.
type Node = Spanned<Tagged<Raw>>;

enum Raw {
    Null,
    Scalar(serde_json::Value),
    List(Vec<Node>),
    Map(Vec<(Spanned<String>, Node)>),
}

fn located(text: &str, node: Node) -> Result<Located, YamlError> {
    let Tagged(raw, tag) = node.value;
    let value = match raw {
        Raw::Null => Value::Null,
        Raw::Scalar(json) => {
            let text = match &json {
                serde_json::Value::String(text) => text.clone(),
                other => written(text, &node.defined).unwrap_or_else(|| other.to_string()),
            };
            Value::Scalar { text, json }
        }
        Raw::List(nodes) => {
            Value::List(nodes.into_iter().map(|node| located(text, node)).collect::<Result<_, _>>()?)
        }
        Raw::Map(pairs) => {
            let mut entries = IndexMap::with_capacity(pairs.len());
            for (key, node) in pairs {
                let mark = Mark::of(&key.defined);
                match entries.entry(key.value) {
                    map::Entry::Vacant(vacant) => {
                        vacant.insert((mark, located(text, node)?));
                    }
                    map::Entry::Occupied(there) => {
                        let (key, first) = (there.key().clone(), there.get().0);
                        return Err(YamlError::Twice { key, first, second: mark });
                    }
                }
            }
            Value::Map(entries)
        }
    };
    let tag = tag.filter(|tag| !tag.starts_with(LANGUAGE_TAG) && tag != "!");
    Ok(Located { value, mark: Mark::of(&node.defined), tag })
}

/// A scalar as it stands in the text.
fn written(text: &str, location: &Location) -> Option<String> {
    let span = location.span();
    let start = usize::try_from(span.byte_offset()?).ok()?;
    let end = start.checked_add(usize::try_from(span.byte_len()?).ok()?)?;
    text.get(start..end).map(|scalar| scalar.trim().to_owned())
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping, a list or a scalar")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = access.next_element()? {
            nodes.push(node);
        }
        Ok(Raw::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = access.next_entry()? {
            pairs.push(pair);
        }
        Ok(Raw::Map(pairs))
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    use super::*;

    /// Everything the tree knows, on one line.
    fn shown(located: &Located) -> String {
        let tag = located.tag.as_ref().map(|tag| format!("{tag} ")).unwrap_or_default();
        let value = match &located.value {
            Value::Null => "~".to_owned(),
            Value::Scalar { text, json } => format!("{text}={json}"),
            Value::List(items) => format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(", ")),
            Value::Map(entries) => {
                let entry = |(key, (mark, value)): (&String, &(Mark, Located))| {
                    format!("{key}@{}:{} {}", mark.line, mark.column, shown(value))
                };
                format!("{{{}}}", entries.iter().map(entry).collect::<Vec<_>>().join(", "))
            }
        };
        format!("{}:{} {tag}{value}", located.mark.line, located.mark.column)
    }

    fn check(text: &str, expected: Expect) {
        expected.assert_eq(&match parse(text) {
            Ok(located) => shown(&located),
            Err(YamlError::Syntax { mark, reason }) => format!("{}:{} {reason}", mark.line, mark.column),
            Err(YamlError::Twice { key, first, second }) => format!("{key}: {first:?} {second:?}"),
        });
    }

    #[test]
    fn everything_knows_its_place_and_its_spelling() {
        check(
            "b: 010\na: [yes, 'no', ~, 1.50]\n1: x\n",
            expect![[
                r#"1:1 {b@1:1 1:4 010="010", a@2:1 2:4 [2:5 yes=true, 2:10 no="no", 2:16 ~, 2:19 1.50=1.5], 1@3:1 3:4 x="x"}"#
            ]],
        );
        check("", expect!["1:1 ~"]);
        check("# nothing\n", expect!["2:1 ~"]);
    }

    #[test]
    fn tags_of_users_are_kept_and_those_of_the_language_followed() {
        check(
            "a: !secret 0123\nb: !secret 12\nc: !secret {d: !!str 5}\ne: ! 7\nf: !env\ng: !file 'x y'\n",
            expect![[
                r#"1:1 {a@1:1 1:12 !secret 0123="0123", b@2:1 2:12 !secret 12=12, c@3:1 3:12 !secret {d@3:13 3:22 5="5"}, e@4:1 4:6 7="7", f@5:1 5:8 !env ~, g@6:1 6:10 !file x y="x y"}"#
            ]],
        );
    }

    #[test]
    fn aliases_and_merges_have_the_place_of_what_they_repeat() {
        check(
            "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n",
            expect![
                "1:1 {a@1:1 1:7 {x@1:8 1:11 1=1}, b@2:1 1:7 {x@1:8 1:11 1=1}, c@3:1 3:4 {y@3:13 3:16 2=2, x@1:8 1:11 1=1}}"
            ],
        );
    }

    #[test]
    fn a_key_given_twice_is_refused_also_when_it_is_spelled_differently() {
        check("a:\n  c: 1\n  c: 2\n", expect!["c: Mark { line: 2, column: 3 } Mark { line: 3, column: 3 }"]);
        check("1: a\n'1': b\n", expect!["1: Mark { line: 1, column: 1 } Mark { line: 2, column: 1 }"]);
    }

    #[test]
    fn what_is_no_yaml_is_told_with_its_place() {
        check("a: [1\n", expect!["1:4 unclosed bracket '['"]);
        check("a: b: c\n", expect!["1:5 mapping values are not allowed in this context"]);
        check("x: *nope\n", expect!["1:4 alias references unknown anchor"]);
        check("? [a]\n: b\n", expect!["1:3 expected string scalar"]);
        check("a: !!int hunter2\n", expect!["1:10 invalid u64"]);
    }

    #[test]
    fn a_tree_is_as_deep_as_the_bound_and_no_deeper() {
        let deep = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(parse(&deep(DEPTH_MAX)).is_ok());
        check(
            &deep(DEPTH_MAX + 1),
            expect!["1:25 it is nested deeper than 24 levels, or repeats itself without end"],
        );
        check(&deep(200), expect!["1:25 it is nested deeper than 24 levels, or repeats itself without end"]);
    }

    #[test]
    fn a_tree_that_repeats_itself_is_bounded() {
        let mut bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for pair in b"abcdefgh".windows(2) {
            let (from, to) = (char::from(pair[0]), char::from(pair[1]));
            bomb += &format!("{to}: &{to} [{}]\n", vec![format!("*{from}"); 9].join(", "));
        }
        assert!(parse(&bomb).is_err());
    }

    proptest! {
        /// Whatever stands there, it is read or refused, with a place inside the text.
        #[test]
        fn any_text_is_read_or_refused(text in "[-a-c0-2:!&*\\[\\]{},'\"#~<?|> \n]{0,40}") {
            match parse(&text) {
                Ok(_) | Err(YamlError::Twice { .. }) => {}
                Err(YamlError::Syntax { mark, .. }) => {
                    let lines = u64::try_from(text.lines().count()).unwrap();
                    prop_assert!(mark.line <= lines + 1, "{mark:?}");
                }
            }
        }
    }
}
