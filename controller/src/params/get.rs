//! Asking a tree: which value a key and a path mean, looked up where it is kept, as the type that is wanted.

use indexmap::IndexMap;
use millstream_common::text;
use serde::de::DeserializeOwned;

use super::{HIDDEN, Node, Origin, Params, Pattern, ReferenceError, Value};

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
    /// The value is kept elsewhere and cannot be had.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
}

impl Params {
    /// The parameter `key` of the nodes that `path` means.
    ///
    /// An absolute path (`/net/boot`) means one node. A relative one (`boot`, `*/boot`) means every node whose path ends
    /// so. `*` at the end means the node and all below it; elsewhere, `*` stands for any characters of one name. A value
    /// that is kept in a file or a variable is looked up now.
    ///
    /// # Errors
    /// When no node that is meant has the key, when two have it with different values, when it has another type, or when
    /// it is kept elsewhere and is not there.
    pub fn get<T: DeserializeOwned>(&self, key: &str, path: &str) -> Result<T, GetParamError> {
        match self.find(key, path)? {
            Some(node) => read(key, node),
            None => Err(self.missing(key, path)),
        }
    }

    /// As [`Params::get`], or `default` when no node that is meant has the key.
    ///
    /// # Errors
    /// As for [`Params::get`], unless it is only missing.
    pub fn get_or<T: DeserializeOwned>(&self, key: &str, path: &str, default: T) -> Result<T, GetParamError> {
        self.find(key, path)?.map_or(Ok(default), |node| read(key, node))
    }

    /// Every parameter of the nodes that `path` means: its key, its value, and whether it is secret; or why it cannot be
    /// had. Each is what [`Params::get`] gives.
    pub(crate) fn all_at(&self, path: &str) -> Vec<(String, bool, Result<serde_json::Value, GetParamError>)> {
        let mut keys: IndexMap<String, bool> = IndexMap::new();
        for node in self.meant(&Pattern::parse(path)) {
            let Value::Map(entries) = &node.value else { continue };
            for (key, entry) in entries {
                *keys.entry(key.clone()).or_default() |= entry.node.has_secret();
            }
        }
        keys.into_iter()
            .map(|(key, secret)| {
                let value = self.get(&key, path);
                (key, secret, value)
            })
            .collect()
    }

    fn find(&self, key: &str, path: &str) -> Result<Option<&Node>, GetParamError> {
        let mut found: Option<&Node> = None;
        for node in self.meant(&Pattern::parse(path)) {
            let Some(candidate) = node.child(key) else { continue };
            match found {
                None => found = Some(candidate),
                Some(first) if first.says_the_same(candidate) => {}
                Some(first) => {
                    return Err(GetParamError::Clash {
                        key: key.to_owned(),
                        path: path.to_owned(),
                        first: placed(first),
                        second: placed(candidate),
                    });
                }
            }
        }
        Ok(found)
    }

    pub(super) fn missing(&self, key: &str, path: &str) -> GetParamError {
        let all: Vec<(String, &Node)> =
            self.meant(&Pattern::parse("*")).into_iter().flat_map(Node::children).collect();
        let near = text::nearest(key, all.iter().map(|(name, _)| name.as_str()));
        let near = near.and_then(|near| all.iter().find(|(name, _)| name == near));
        let near = near.map(|(name, node)| format!("`{name}` at {}", node.origin));
        GetParamError::Missing { key: key.to_owned(), path: path.to_owned(), near }
    }
}

/// A value that anybody may see, and where it was written.
fn placed(node: &Node) -> String {
    let shown = match node.shown() {
        serde_json::Value::String(hidden) if hidden == HIDDEN => "secret".to_owned(),
        shown => format!("`{}`", text::printable(shown.to_string().as_bytes(), 60)),
    };
    format!("{shown} at {}", node.origin)
}

impl Node {
    /// The value as JSON, with everything that is kept elsewhere looked up.
    fn resolved(&self) -> Result<serde_json::Value, ReferenceError> {
        match &self.value {
            Value::Null => Ok(serde_json::Value::Null),
            Value::Scalar { json, .. } => Ok(json.clone()),
            Value::Reference(reference) => Ok(reference.look_up(&self.origin)?.into()),
            Value::List(nodes) => nodes.iter().map(Self::resolved).collect(),
            Value::Map(entries) => {
                entries.iter().map(|(key, entry)| Ok((key.clone(), entry.node.resolved()?))).collect()
            }
        }
    }
}

/// The value as a type. A text is wanted as it was written, even when it looks like a number; and what a variable or a
/// file holds is a text, even when a number is wanted.
fn read<T: DeserializeOwned>(key: &str, node: &Node) -> Result<T, GetParamError> {
    let json = node.resolved()?;
    let other = match (&node.value, &json) {
        (Value::Scalar { text, json }, _) if !json.is_string() => Some(text.clone().into()),
        (Value::Reference(_), serde_json::Value::String(text)) => serde_json::from_str(text).ok(),
        _ => None,
    };
    serde_json::from_value(json)
        .or_else(|error| other.and_then(|other| serde_json::from_value(other).ok()).ok_or(error))
        .map_err(|error| GetParamError::Type {
            key: key.to_owned(),
            origin: node.origin.clone(),
            type_name: std::any::type_name::<T>(),
            reason: if node.has_secret() {
                "what is there is secret and not shown".to_owned()
            } else {
                error.to_string()
            },
        })
}
