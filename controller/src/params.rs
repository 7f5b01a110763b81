//! The parameter tree: data apart from the test, asked for by key and path. Pure: text comes in, values go out.
//!
//! A tree is made of mappings and lists (the nodes) and of values. A parameter is a key of a node; a path says which nodes
//! are meant. Everything remembers where it was written, so that an answer and a fault can name file, line and column, and
//! whether it is secret: what is secret is never shown. Reading YAML is the business of [`yaml`], looking up what is kept
//! in a file or a variable that of [`references`].

use std::{fmt, sync::Arc};

use indexmap::IndexMap;
use serde::{Serialize, Serializer};

mod change;
mod get;
mod path;
pub(crate) mod references;
pub(crate) mod sources;
pub(crate) mod yaml;

pub use change::SetParamError;
pub use get::GetParamError;
use path::Pattern;
pub use references::{Reference, ReferenceError};
pub use sources::DefineStreamsError;
pub use yaml::ReadParamsError;

/// What stands in the place of a secret, wherever something is shown.
pub(crate) const HIDDEN: &str = "…";

/// A tree of parameters, such as one read from a YAML file. Cheap to clone.
///
/// `Debug` and [`Serialize`] show it without its secrets: `…` stands for each.
///
/// ```
/// # use millstream::Params;
/// let params: Params = "boot: {timeout: 10}\ncheck: {timeout: 1}".parse()?;
/// assert_eq!(params.get::<u64>("timeout", "*/boot/*")?, 10);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
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

    /// The line of the test that calls the library.
    #[track_caller]
    pub(crate) fn of_caller() -> Self {
        let caller = std::panic::Location::caller();
        Self { source: caller.file().into(), place: Some((caller.line().into(), caller.column().into())) }
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

/// A value, where it was written, and whether anybody may see it.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) origin: Origin,
    /// Nothing of it is ever shown. What stands below it is secret as well.
    pub(crate) secret: bool,
}

/// What stands at a place of the tree.
#[derive(Clone)]
pub(crate) enum Value {
    /// Nothing.
    Null,
    /// A text, a number or a truth: as it was written, and as it is understood.
    Scalar { text: String, json: serde_json::Value },
    /// A text that is kept elsewhere.
    Reference(Reference),
    /// Values in order.
    List(Vec<Node>),
    /// Keys in the order in which they were written.
    Map(IndexMap<String, Entry>),
}

/// A key of a mapping, and what stands behind it.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) key: Origin,
    pub(crate) node: Node,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.shown(), self.origin)
    }
}

impl Node {
    /// A text.
    pub(crate) fn text(text: &str, origin: Origin) -> Self {
        let json = serde_json::Value::String(text.to_owned());
        Self { value: Value::Scalar { text: text.to_owned(), json }, origin, secret: false }
    }

    /// What a program says.
    fn of_json(json: serde_json::Value, origin: &Origin, secret: bool) -> Self {
        let value = match json {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Array(items) => {
                Value::List(items.into_iter().map(|item| Self::of_json(item, origin, secret)).collect())
            }
            serde_json::Value::Object(entries) => {
                let entry = |(key, value)| {
                    (key, Entry { key: origin.clone(), node: Self::of_json(value, origin, secret) })
                };
                Value::Map(entries.into_iter().map(entry).collect())
            }
            serde_json::Value::String(text) => Value::Scalar { text: text.clone(), json: text.into() },
            json => Value::Scalar { text: json.to_string(), json },
        };
        Self { value, origin: origin.clone(), secret }
    }

    fn child(&self, name: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(entries) => entries.get(name).map(|entry| &entry.node),
            Value::List(nodes) => nodes.get(list_index(name)?),
            Value::Null | Value::Scalar { .. } | Value::Reference(_) => None,
        }
    }

    fn children(&self) -> Box<dyn Iterator<Item = (String, &Self)> + '_> {
        match &self.value {
            Value::Map(entries) => Box::new(entries.iter().map(|(name, entry)| (name.clone(), &entry.node))),
            Value::List(nodes) => {
                Box::new(nodes.iter().enumerate().map(|(index, node)| (index.to_string(), node)))
            }
            Value::Null | Value::Scalar { .. } | Value::Reference(_) => Box::new(std::iter::empty()),
        }
    }

    /// Whether it, or anything in it, is secret.
    pub(crate) fn has_secret(&self) -> bool {
        self.secret || self.children().any(|(_, child)| child.has_secret())
    }

    /// Whether both say the same, wherever they were written. Nothing is looked up for that.
    fn says_the_same(&self, other: &Self) -> bool {
        match (&self.value, &other.value) {
            (Value::Null, Value::Null) => true,
            (Value::Scalar { json, .. }, Value::Scalar { json: other, .. }) => json == other,
            (Value::Reference(reference), Value::Reference(other)) => reference == other,
            (Value::List(nodes), Value::List(others)) => {
                nodes.len() == others.len() && nodes.iter().zip(others).all(|(a, b)| a.says_the_same(b))
            }
            (Value::Map(entries), Value::Map(others)) => {
                entries.len() == others.len()
                    && entries.iter().all(|(key, entry)| {
                        others.get(key).is_some_and(|other| entry.node.says_the_same(&other.node))
                    })
            }
            _ => false,
        }
    }

    /// As JSON that anybody may see.
    pub(crate) fn shown(&self) -> serde_json::Value {
        match &self.value {
            Value::Reference(reference) => reference.to_string().into(),
            _ if self.secret => HIDDEN.into(),
            Value::Null => serde_json::Value::Null,
            Value::Scalar { json, .. } => json.clone(),
            Value::List(nodes) => nodes.iter().map(Self::shown).collect(),
            Value::Map(entries) => {
                entries.iter().map(|(key, entry)| (key.clone(), entry.node.shown())).collect()
            }
        }
    }

    /// Marks it, and all that is in it, as secret.
    fn conceal(&mut self) {
        self.secret = true;
        match &mut self.value {
            Value::Null | Value::Scalar { .. } | Value::Reference(_) => {}
            Value::List(nodes) => nodes.iter_mut().for_each(Self::conceal),
            Value::Map(entries) => entries.values_mut().for_each(|entry| entry.node.conceal()),
        }
    }
}

/// The place in a list that a name means: digits without leading zeros, as they are counted.
fn list_index(name: &str) -> Option<usize> {
    let index: usize = name.parse().ok()?;
    (index.to_string() == name).then_some(index)
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
        Self::of(Node { value: Value::Null, origin: Origin::named("no parameters"), secret: false })
    }

    pub(crate) fn of(root: Node) -> Self {
        Self { root: Arc::new(root) }
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

/// Visits every node. The depth is bounded by whoever reads the tree.
fn walk<'a>(node: &'a Node, path: &mut Vec<String>, visit: &mut impl FnMut(&'a Node, &[String])) {
    visit(node, path);
    for (name, child) in node.children() {
        path.push(name);
        walk(child, path, visit);
        path.pop();
    }
}

impl fmt::Debug for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Params").field(&self.root).finish()
    }
}

impl Serialize for Params {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.root.shown().serialize(serializer)
    }
}

#[cfg(test)]
#[rustfmt::skip] // expectations are rewritten by their tool, which wants them on one line
mod tests;
