//! Changing a tree: merging others over it, and setting single parameters from code. Pure.

use std::sync::Arc;

use indexmap::IndexMap;
use serde::Serialize;

use super::{Entry, GetParamError, Node, Origin, Params, Pattern, Value, list_index};

/// Why a parameter cannot be set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetParamError {
    /// The path has a wild card, and nothing that it means has the key.
    #[error("{0}; to add it, name one node by its absolute path")]
    Missing(GetParamError),
    /// A part of the path is a value.
    #[error(
        "parameter `{key}` cannot be set at `{path}`: `{name}` at {origin} is neither a mapping nor a list that has it"
    )]
    NoNode {
        /// The key.
        key: String,
        /// The path.
        path: String,
        /// The part.
        name: String,
        /// Where it was written.
        origin: Origin,
    },
    /// The value cannot be written as JSON.
    #[error("parameter `{key}` cannot be set at `{path}`: {reason}")]
    Value {
        /// The key.
        key: String,
        /// The path.
        path: String,
        /// Why not.
        reason: String,
    },
}

impl Params {
    /// Puts another tree over this one. Mappings are joined key by key, and keys keep their order, new ones behind; any
    /// other value, and a list, takes the place of what was there. What was secret stays secret.
    #[must_use]
    pub fn merge(mut self, later: Self) -> Self {
        let root = Arc::make_mut(&mut self.root);
        // A file without anything in it changes nothing.
        if !matches!(later.root.value, Value::Null) {
            overlay(root, Arc::unwrap_or_clone(later.root));
        }
        self
    }

    /// Sets a parameter from code, so that [`Params::get`] with the same key and path gives the value.
    ///
    /// An absolute path without wild cards means one node, which is made when it is not there. Any other path replaces the
    /// parameter wherever the nodes that are meant have it. What was secret stays secret.
    ///
    /// # Errors
    /// When a part of the path is a value, when nothing that a path with wild cards means has the key, or when the value
    /// cannot be written as JSON.
    #[track_caller]
    pub fn set(&mut self, key: &str, path: &str, value: impl Serialize) -> Result<(), SetParamError> {
        self.put(key, path, serde_json::to_value(value), false, &Origin::of_caller())
    }

    /// As [`Params::set`], and marks the value as secret: it is never shown.
    ///
    /// # Errors
    /// As for [`Params::set`].
    #[track_caller]
    pub fn set_secret(&mut self, key: &str, path: &str, value: impl Serialize) -> Result<(), SetParamError> {
        self.put(key, path, serde_json::to_value(value), true, &Origin::of_caller())
    }

    pub(crate) fn put(
        &mut self,
        key: &str,
        path: &str,
        value: Result<serde_json::Value, serde_json::Error>,
        secret: bool,
        origin: &Origin,
    ) -> Result<(), SetParamError> {
        let json = value.map_err(|error| SetParamError::Value {
            key: key.to_owned(),
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        let node = Node::of_json(json, origin, secret);
        let pattern = Pattern::parse(path);
        let root = Arc::make_mut(&mut self.root);
        let done = match pattern.one_place() {
            Some(names) => make(root, names, key, node).map_err(|(name, origin)| SetParamError::NoNode {
                key: key.to_owned(),
                path: path.to_owned(),
                name,
                origin,
            }),
            None => Ok(replace(root, &mut Vec::new(), &pattern, key, &node)),
        };
        if done? { Ok(()) } else { Err(SetParamError::Missing(self.missing(key, path))) }
    }
}

/// Puts a later value over an earlier one.
fn overlay(earlier: &mut Node, later: Node) {
    match (&mut earlier.value, later.value) {
        (Value::Map(entries), Value::Map(others)) => {
            for (key, mut other) in others {
                match entries.get_mut(&key) {
                    Some(entry) => overlay(&mut entry.node, other.node),
                    None => {
                        if earlier.secret {
                            other.node.conceal();
                        }
                        entries.insert(key, other);
                    }
                }
            }
            if later.secret {
                earlier.conceal();
            }
        }
        (_, value) => replace_value(earlier, Node { value, origin: later.origin, secret: later.secret }),
    }
}

/// Puts a value at one place, and makes the nodes on the way to it. When a part of the way is a value, its name and place.
fn make(root: &mut Node, names: &[&str], key: &str, new: Node) -> Result<bool, (String, Origin)> {
    let mut node = root;
    let mut here = "/";
    for name in names.iter().copied().chain([key]) {
        let origin = node.origin.clone();
        let Some(next) = step(node, name, &new.origin) else { return Err((here.to_owned(), origin)) };
        (node, here) = (next, name);
    }
    replace_value(node, new);
    Ok(true)
}

/// What stands behind a name, made when it is not there; none in a value, and behind the end of a list.
fn step<'a>(node: &'a mut Node, name: &str, origin: &Origin) -> Option<&'a mut Node> {
    if matches!(node.value, Value::Null) {
        node.value = Value::Map(IndexMap::new());
    }
    let secret = node.secret;
    match &mut node.value {
        Value::Map(entries) => {
            let empty = || Node { value: Value::Null, origin: origin.clone(), secret };
            Some(
                &mut entries
                    .entry(name.to_owned())
                    .or_insert_with(|| Entry { key: origin.clone(), node: empty() })
                    .node,
            )
        }
        Value::List(nodes) => nodes.get_mut(list_index(name)?),
        Value::Null | Value::Scalar { .. } | Value::Reference(_) => None,
    }
}

/// Puts a value in the place of another, whatever both are.
fn replace_value(place: &mut Node, new: Node) {
    let secret = place.secret;
    *place = new;
    if secret {
        place.conceal();
    }
}

/// Replaces a parameter wherever it is; whether it was anywhere.
fn replace(node: &mut Node, path: &mut Vec<String>, pattern: &Pattern<'_>, key: &str, new: &Node) -> bool {
    let mut found = false;
    let names: Vec<String> = node.children().map(|(name, _)| name).collect();
    // What is replaced is not looked into: the new value is no part of what the path meant.
    let is_meant = pattern.means(path);
    for name in names {
        let Some(child) = step(node, &name, &new.origin) else { continue };
        if is_meant && name == key {
            replace_value(child, new.clone());
            found = true;
            continue;
        }
        path.push(name);
        found |= replace(child, path, pattern, key, new);
        path.pop();
    }
    found
}
