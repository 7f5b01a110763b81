//! The parameter tree: data apart from the test, asked for by key and path. Pure: text comes in, values go out.
//!
//! A tree is made of mappings (the nodes), lists and scalars. A parameter is a key of a node; a path says which nodes are
//! meant. Every value remembers where it was written, so that an answer and a fault can name file, line and column.
//! Reading YAML is the business of [`yaml`] alone.

use std::{fmt, sync::Arc};

use indexmap::IndexMap;
use millstream_common::text;
use serde::{Serialize, Serializer, de::DeserializeOwned};

pub(crate) mod sources;
pub(crate) mod yaml;

pub use sources::DefineStreamsError;
pub use yaml::ReadParamsError;

/// A tree of parameters, such as one read from a YAML file. Cheap to clone.
///
/// ```
/// # use millstream::Params;
/// let params: Params = "boot: {timeout: 10}\ncheck: {timeout: 1}".parse()?;
/// assert_eq!(params.get::<u64>("timeout", "*/boot/*")?, 10);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Params {
    root: Arc<Node>,
}

/// Where something was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    source: Arc<str>,
    /// Line and column, from 1; none when the source has no lines.
    place: Option<(u64, u64)>,
}

impl Origin {
    /// A source without lines, such as an argument or a variable.
    pub(crate) fn named(source: impl Into<Arc<str>>) -> Self {
        Self { source: source.into(), place: None }
    }

    pub(crate) fn at(source: &Arc<str>, line: u64, column: u64) -> Self {
        Self { source: Arc::clone(source), place: Some((line, column)) }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Some((line, column)) => write!(f, "{}:{line}:{column}", self.source),
            None => f.write_str(&self.source),
        }
    }
}

/// A value and where it was written.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) origin: Origin,
}

/// What stands at a place of the tree.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// Nothing.
    Null,
    /// A text, a number or a truth: as it was written, and as it is understood.
    Scalar { text: String, json: serde_json::Value },
    /// Values in order.
    List(Vec<Node>),
    /// Keys in the order in which they were written.
    Map(IndexMap<String, Entry>),
}

/// A key of a mapping, and what stands behind it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: Origin,
    pub(crate) node: Node,
}

impl Node {
    fn child(&self, name: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(entries) => entries.get(name).map(|entry| &entry.node),
            Value::List(nodes) => nodes.get(name.parse::<usize>().ok()?),
            Value::Null | Value::Scalar { .. } => None,
        }
    }

    fn children(&self) -> Box<dyn Iterator<Item = (String, &Self)> + '_> {
        match &self.value {
            Value::Map(entries) => Box::new(entries.iter().map(|(name, entry)| (name.clone(), &entry.node))),
            Value::List(nodes) => {
                Box::new(nodes.iter().enumerate().map(|(index, node)| (index.to_string(), node)))
            }
            Value::Null | Value::Scalar { .. } => Box::new(std::iter::empty()),
        }
    }

    /// The value as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Scalar { json, .. } => json.clone(),
            Value::List(nodes) => nodes.iter().map(Self::json).collect(),
            Value::Map(entries) => {
                entries.iter().map(|(key, entry)| (key.clone(), entry.node.json())).collect()
            }
        }
    }

    /// The value as a type. A text is wanted as it was written, even when it looks like a number.
    fn read<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_value(self.json()).or_else(|error| match &self.value {
            Value::Scalar { text, json } if !json.is_string() => {
                serde_json::from_value(serde_json::Value::String(text.clone())).map_err(|_| error)
            }
            _ => Err(error),
        })
    }
}

/// Why a parameter cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GetParamError {
    /// No node that is meant has the key.
    #[error("there is no parameter `{key}` at `{path}`{}", near.as_ref().map(|near| format!(": did you mean {near}?")).unwrap_or_default())]
    Missing {
        /// The key.
        key: String,
        /// The path.
        path: String,
        /// The nearest there is.
        near: Option<String>,
    },
    /// Several nodes that are meant have the key, with different values.
    #[error("parameter `{key}` at `{path}` is {first} and {second}: ask with a path that means one of them")]
    Clash {
        /// The key.
        key: String,
        /// The path.
        path: String,
        /// One value, and where it was written.
        first: String,
        /// Another value, and where it was written.
        second: String,
    },
    /// The value has another type.
    #[error("{origin}: parameter `{key}` cannot be read as `{type_name}`: {reason}")]
    Type {
        /// The key.
        key: String,
        /// Where it was written.
        origin: Origin,
        /// The type that was wanted.
        type_name: &'static str,
        /// Why not.
        reason: String,
    },
}

impl Default for Params {
    fn default() -> Self {
        Self::empty()
    }
}

impl Params {
    /// A tree without parameters.
    #[must_use]
    pub fn empty() -> Self {
        Self::of(Node { value: Value::Null, origin: Origin::named("no parameters") })
    }

    pub(crate) fn of(root: Node) -> Self {
        Self { root: Arc::new(root) }
    }

    /// The parameter `key` of the nodes that `path` means.
    ///
    /// An absolute path (`/net/boot`) means one node. A relative one (`boot`, `*/boot`) means every node whose path ends
    /// so. `*` at the end means the node and all below it; elsewhere, `*` stands for any characters of one name.
    ///
    /// # Errors
    /// When no node that is meant has the key, when two have it with different values, or when it has another type.
    pub fn get<T: DeserializeOwned>(&self, key: &str, path: &str) -> Result<T, GetParamError> {
        match self.find(key, path)? {
            Some(node) => read(key, node),
            None => Err(self.missing(key, path)),
        }
    }

    /// As [`Params::get`], or `default` when no node that is meant has the key.
    ///
    /// # Errors
    /// When two nodes have the key with different values, or when it has another type.
    pub fn get_or<T: DeserializeOwned>(&self, key: &str, path: &str, default: T) -> Result<T, GetParamError> {
        self.find(key, path)?.map_or(Ok(default), |node| read(key, node))
    }

    fn find(&self, key: &str, path: &str) -> Result<Option<&Node>, GetParamError> {
        let pattern = Pattern::parse(path);
        let mut found: Option<&Node> = None;
        for node in self.meant(&pattern) {
            let Some(candidate) = node.child(key) else { continue };
            match found {
                None => found = Some(candidate),
                Some(first) if first.json() == candidate.json() => {}
                Some(first) => {
                    let shown = |node: &Node| {
                        let value = text::printable(node.json().to_string().as_bytes(), 60);
                        format!("`{value}` at {}", node.origin)
                    };
                    return Err(GetParamError::Clash {
                        key: key.to_owned(),
                        path: path.to_owned(),
                        first: shown(first),
                        second: shown(candidate),
                    });
                }
            }
        }
        Ok(found)
    }

    fn missing(&self, key: &str, path: &str) -> GetParamError {
        let anywhere = Pattern::parse("*");
        let all: Vec<(String, &Node)> = self.meant(&anywhere).into_iter().flat_map(Node::children).collect();
        let near = text::nearest(key, all.iter().map(|(name, _)| name.as_str()));
        let near = near.and_then(|near| all.iter().find(|(name, _)| name == near));
        let near = near.map(|(name, node)| format!("`{name}` at {}", node.origin));
        GetParamError::Missing { key: key.to_owned(), path: path.to_owned(), near }
    }

    /// Every node that a pattern means, in the order in which they were written.
    fn meant(&self, pattern: &Pattern<'_>) -> Vec<&Node> {
        let mut meant = Vec::new();
        let mut path = Vec::new();
        walk(&self.root, &mut path, &mut |node, path| {
            if pattern.means(path) {
                meant.push(node);
            }
        });
        meant
    }

    /// Where the tree was written.
    pub(crate) fn origin(&self) -> &Origin {
        &self.root.origin
    }

    /// The nodes whose children a path such as `/streams/*` names.
    pub(crate) fn parents(&self, path: &str) -> Vec<&Node> {
        let path = path.strip_suffix("/*").unwrap_or(path);
        self.meant(&Pattern::parse(if path.is_empty() { "/" } else { path }))
    }
}

fn read<T: DeserializeOwned>(key: &str, node: &Node) -> Result<T, GetParamError> {
    node.read().map_err(|error| GetParamError::Type {
        key: key.to_owned(),
        origin: node.origin.clone(),
        type_name: std::any::type_name::<T>(),
        reason: error.to_string(),
    })
}

/// Visits every node. The depth is bounded by whoever reads the tree.
fn walk<'a>(node: &'a Node, path: &mut Vec<String>, visit: &mut impl FnMut(&'a Node, &[String])) {
    visit(node, path);
    for (name, child) in node.children() {
        path.push(name);
        walk(child, path, visit);
        path.pop();
    }
}

impl Serialize for Params {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.root.json().serialize(serializer)
    }
}

/// A path with wild cards.
#[derive(Debug)]
struct Pattern<'a> {
    names: Vec<&'a str>,
    /// Whether anything may stand before the names.
    open_start: bool,
    /// Whether anything may stand behind them.
    open_end: bool,
}

impl<'a> Pattern<'a> {
    fn parse(path: &'a str) -> Self {
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

    fn means(&self, path: &[String]) -> bool {
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
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name.strip_prefix(head).is_some_and(|tail| {
            let ends = tail.char_indices().map(|(index, _)| index).chain([tail.len()]);
            ends.into_iter().any(|index| glob(rest, &tail[index..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    const TREE: &str = "\
net:
  boot: {timeout: 10, image: 1.10}
  check: {timeout: 1}
disk:
  boot: {timeout: 10, retries: 3}
  client-1: {rate: fast}
hosts: [{name: a}, {name: b}]
";

    fn check(key: &str, path: &str, expected: Expect) {
        let params = yaml::parse("lab.yaml", TREE).unwrap();
        let text = match params.get::<serde_json::Value>(key, path) {
            Ok(value) => value.to_string(),
            Err(error) => error.to_string(),
        };
        expected.assert_eq(&text);
    }

    #[test]
    fn an_absolute_path_means_one_node() {
        check("timeout", "/net/check", expect!["1"]);
        check(
            "timeout",
            "/boot",
            expect!["there is no parameter `timeout` at `/boot`: did you mean `timeout` at lab.yaml:2:19?"],
        );
        check("net", "/", expect![[r#"{"boot":{"image":1.1,"timeout":10},"check":{"timeout":1}}"#]]);
    }

    #[test]
    fn a_relative_path_means_every_node_that_ends_so() {
        check("timeout", "*/boot/*", expect!["10"]);
        check("timeout", "boot", expect!["10"]);
        check("rate", "*/client-*", expect![[r#""fast""#]]);
        check("name", "*/hosts/1", expect![[r#""b""#]]);
    }

    #[test]
    fn two_values_for_one_question_are_a_clash_that_names_both_places() {
        check(
            "timeout",
            "/net/*",
            expect![
                "parameter `timeout` at `/net/*` is `10` at lab.yaml:2:19 and `1` at lab.yaml:3:20: ask with a path that means one of them"
            ],
        );
        check(
            "timeout",
            "*",
            expect![
                "parameter `timeout` at `*` is `10` at lab.yaml:2:19 and `1` at lab.yaml:3:20: ask with a path that means one of them"
            ],
        );
    }

    #[test]
    fn a_missing_parameter_names_the_nearest() {
        check(
            "retreis",
            "*/boot/*",
            expect![
                "there is no parameter `retreis` at `*/boot/*`: did you mean `retries` at lab.yaml:5:32?"
            ],
        );
        check("zebra", "*", expect!["there is no parameter `zebra` at `*`"]);
    }

    #[test]
    fn a_text_is_had_as_it_was_written_and_a_wrong_type_is_named_with_its_place() {
        let params = yaml::parse("lab.yaml", TREE).unwrap();
        assert_eq!(params.get::<String>("image", "/net/boot").unwrap(), "1.10");
        assert_eq!(params.get_or("absent", "*", 7).unwrap(), 7);
        let error = params.get::<u64>("rate", "*").unwrap_err();
        expect![[r#"lab.yaml:6:20: parameter `rate` cannot be read as `u64`: invalid type: string "fast", expected u64"#]]
            .assert_eq(&error.to_string());
    }
}
