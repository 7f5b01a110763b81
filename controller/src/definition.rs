//! Where streams run: definitions from a parameter tree, from code and from the environment. Pure: data comes in,
//! definitions or a fault with its place go out; nothing is dialled, looked up or read here.
//!
//! A definition says the type of a place, its address, what else the type wants to know, and what holds for every block
//! that runs there. Types that are not built in are words alone: whether there is one, and what it takes, is found when
//! the stream is first used.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use indexmap::IndexMap;
use millstream_common::{
    id::{NameError, StreamName},
    spec::{FailurePolicy, ResourceLimits},
};

use crate::{
    params::{HIDDEN, Node, Origin, Params, Reference, Value},
    reach::Reach,
};

mod keys;
pub(crate) use keys::duration;
mod place;
mod url;
mod words;

pub use words::Definition;

/// Path under which streams are defined unless a test names another.
pub const DEFAULT_PATH: &str = "/streams/*";

/// What a definition says about everything that runs in its stream. A block's own word comes first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Defaults {
    /// Environment; a block's own variables win.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// User to run as.
    pub user: Option<String>,
    /// Limit of set-up and run.
    pub timeout: Option<Duration>,
    /// Command in front of the block's own.
    pub wrap: Vec<String>,
    /// Limits of the process tree.
    pub limits: ResourceLimits,
    /// What becomes of the stream when a task ends unexpectedly.
    pub on_failure: FailurePolicy,
}

/// Where one stream runs.
#[derive(Clone)]
pub(crate) struct Defined {
    /// Name of the stream.
    pub(crate) name: StreamName,
    /// The type of the place: `local`, `tls`, `unix`, or another word.
    pub(crate) kind: String,
    /// What stands behind `://`, or the key `host` (`path` for `unix`, `command` for `command`); empty when nothing does.
    pub(crate) address: String,
    /// Everything else that the type wants to know.
    pub(crate) options: BTreeMap<String, Setting>,
    /// Whether the host is reserved for this test.
    pub(crate) exclusive: bool,
    /// How long the test waits in line for the host.
    pub(crate) wait: Option<Duration>,
    /// What holds for every block that runs there.
    pub(crate) defaults: Defaults,
    /// Where the definition was written.
    pub(crate) origin: Origin,
    /// The reach itself, when code gave it instead of a type.
    pub(crate) reach: Option<Arc<dyn Reach>>,
}

impl fmt::Debug for Defined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {self} {:?}", self.name, self.defaults)
    }
}

/// What a type of places wants to know.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    value: Held,
    /// It is never shown.
    secret: bool,
    origin: Origin,
}

/// Where a setting is.
#[derive(Clone, PartialEq, Eq)]
enum Held {
    Here(String),
    Elsewhere(Reference),
}

impl Setting {
    fn given(key: &str, text: &str, origin: &Origin) -> Self {
        Self { value: Held::Here(text.to_owned()), secret: sounds_secret(key), origin: origin.clone() }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Held::Elsewhere(reference) => reference.fmt(f),
            Held::Here(_) if self.secret => f.write_str(HIDDEN),
            Held::Here(text) => f.write_str(&text.trim_end().replace('\n', " ")),
        }
    }
}

impl fmt::Debug for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether what stands behind a key is secret, marked or not.
fn sounds_secret(key: &str) -> bool {
    ["password", "passphrase", "secret", "token"].iter().any(|word| key.contains(word))
}

impl Defined {
    /// A stream on this machine.
    #[must_use]
    pub(crate) fn local(name: StreamName, origin: Origin) -> Self {
        Self {
            name,
            kind: "local".to_owned(),
            address: String::new(),
            options: BTreeMap::new(),
            exclusive: false,
            wait: None,
            defaults: Defaults::default(),
            origin,
            reach: None,
        }
    }
}

impl fmt::Display for Defined {
    /// The place as one line. Secrets are left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reach) = &self.reach {
            return f.write_str(&reach.describe());
        }
        f.write_str(&self.kind)?;
        if !self.address.is_empty() {
            write!(f, "://{}", self.address)?;
        }
        let mut separator = '?';
        for (key, setting) in &self.options {
            write!(f, "{separator}{key}={setting}")?;
            separator = '&';
        }
        Ok(())
    }
}

/// Why a stream cannot be defined: what is wrong, and where it was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {fault}")]
pub struct DefineStreamError {
    /// Where it was written.
    pub origin: Origin,
    /// What is wrong.
    pub fault: Box<DefinitionFault>,
}

/// What is wrong with a definition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DefinitionFault {
    /// The stream cannot have this name.
    #[error("{0}")]
    Name(NameError),
    /// Two streams have one name.
    #[error("stream `{name}` is defined twice, first at {first}: give one another name")]
    Duplicate {
        /// The name.
        name: StreamName,
        /// The place of the first.
        first: Origin,
    },
    /// There is something else where streams should be defined.
    #[error("`{path}` should define streams: write a mapping of names, or a list")]
    NotStreams {
        /// The path.
        path: String,
    },
    /// Nothing is where streams should be defined.
    #[error("there is nothing at `{path}`, where streams should be defined")]
    Nowhere {
        /// The path.
        path: String,
    },
    /// Several nodes could be meant.
    #[error("`{path}` could also mean the node at {second}: name the streams by their absolute path")]
    Ambiguous {
        /// The path.
        path: String,
        /// Another node.
        second: Origin,
    },
    /// It is neither a URL nor a mapping.
    #[error("stream `{name}` is neither a URL, such as `tls://host:7433`, nor a mapping with `type`")]
    NotADefinition {
        /// The stream.
        name: String,
    },
    /// It has no type.
    #[error("stream `{name}` does not say its type: add `type`, as in `type: tls`")]
    NoType {
        /// The stream.
        name: String,
    },
    /// Nobody knows the key.
    #[error("stream `{name}` has the unknown key `{}`: {}", key.escape_debug(), hint(near.as_deref(), known))]
    UnknownKey {
        /// The stream.
        name: String,
        /// The key.
        key: String,
        /// The nearest key.
        near: Option<String>,
        /// All keys that the stream's type takes.
        known: String,
    },
    /// Code gives a key twice.
    #[error("stream `{name}` is given the key `{key}` twice: remove one")]
    Repeated {
        /// The stream.
        name: String,
        /// The key.
        key: String,
    },
    /// A key stands beside another word for it.
    #[error("stream `{name}` has `{meant}` and `{key}`, which mean the same: remove `{key}`")]
    Alias {
        /// The stream.
        name: String,
        /// The other word.
        key: String,
        /// The key.
        meant: String,
    },
    /// A key is missing.
    #[error("stream `{name}` of type `{kind}` lacks the key `{key}`")]
    Missing {
        /// The stream.
        name: String,
        /// Its type.
        kind: String,
        /// The key.
        key: &'static str,
    },
    /// The whole definition is marked as secret.
    #[error(
        "stream `{name}` is marked as secret, but everybody sees where a stream is: write a mapping and mark what is secret in it"
    )]
    Secret {
        /// The stream.
        name: String,
    },
    /// A value is refused.
    #[error("`{key}` of stream `{name}` is `{}`: {expected}", given.escape_debug())]
    Value {
        /// The stream.
        name: String,
        /// The key.
        key: String,
        /// The value.
        given: String,
        /// What would be right.
        expected: String,
    },
    /// A URL is refused.
    #[error("stream `{name}` has the address `{}`: {expected}", url.escape_debug())]
    Url {
        /// The stream.
        name: String,
        /// The URL.
        url: String,
        /// What would be right.
        expected: String,
    },
    /// A list of definitions in one text is refused.
    #[error("`{}` is no stream definition: write `name=url`, several with commas, or the path of a YAML file", item.escape_debug())]
    Inline {
        /// The part that is refused.
        item: String,
    },
}

fn hint(near: Option<&str>, known: &str) -> String {
    match near {
        Some(near) => format!("did you mean `{near}`? (there are {known})"),
        None => format!("use one of {known}"),
    }
}

pub(crate) fn listed<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

impl DefinitionFault {
    fn at(self, origin: &Origin) -> DefineStreamError {
        DefineStreamError { origin: origin.clone(), fault: Box::new(self) }
    }
}

/// The streams that a parameter tree defines under a path, in their order.
///
/// # Errors
/// When one of them is not valid, or when nothing is there though the path is not the default one.
pub(crate) fn from_params(params: &Params, path: &str) -> Result<Vec<Defined>, DefineStreamError> {
    let parents = params.parents(path);
    let parent = match parents[..] {
        [parent] => parent,
        [] if path == DEFAULT_PATH => return Ok(Vec::new()),
        [] => return Err(DefinitionFault::Nowhere { path: path.to_owned() }.at(params.origin())),
        [first, second, ..] => {
            let second = second.origin.clone();
            return Err(DefinitionFault::Ambiguous { path: path.to_owned(), second }.at(&first.origin));
        }
    };
    let mut definitions = Definitions::default();
    match &parent.value {
        Value::Map(entries) => {
            for (name, entry) in entries {
                definitions.add(define(name, &entry.key, &entry.node)?)?;
            }
        }
        Value::List(nodes) => {
            for (index, node) in nodes.iter().enumerate() {
                let (name, origin, node) = list_item(index, node);
                definitions.add(define(&name, origin, node)?)?;
            }
        }
        Value::Null => {}
        Value::Scalar { .. } | Value::Reference(_) => {
            return Err(DefinitionFault::NotStreams { path: path.to_owned() }.at(&parent.origin));
        }
    }
    Ok(definitions.in_order())
}

/// An item of a list is a definition, named by its place in the list, or a mapping of its name to a definition.
fn list_item(index: usize, node: &Node) -> (String, &Origin, &Node) {
    if let Value::Map(entries) = &node.value
        && let Some((name, entry)) = entries.first()
        && entries.len() == 1
        && name != "type"
    {
        return (name.clone(), &entry.key, &entry.node);
    }
    (index.to_string(), &node.origin, node)
}

/// One stream as a variable defines it: a name, and a URL or a type alone.
///
/// # Errors
/// When the name or the URL is refused.
fn from_url(name: &str, url: &str, origin: Origin) -> Result<Defined, DefineStreamError> {
    let name = StreamName::new(name).map_err(|error| DefinitionFault::Name(error).at(&origin))?;
    url::define(name, url, &origin)
}

/// Several streams in one text: `server=tls://foo:7433,client=local`.
///
/// # Errors
/// When one of them is refused, or two have one name.
pub(crate) fn from_inline(text: &str, origin: &Origin) -> Result<Vec<Defined>, DefineStreamError> {
    let mut items: Vec<String> = Vec::new();
    for part in text.split(',') {
        // A comma may also stand in a URL: only what looks like the beginning of a definition is one.
        match items.last_mut() {
            Some(last) if !begins_definition(part) => {
                last.push(',');
                last.push_str(part);
            }
            _ => items.push(part.to_owned()),
        }
    }
    let mut definitions = Definitions::default();
    for item in items {
        let item = item.trim();
        let Some((name, url)) = item.split_once('=') else {
            return Err(DefinitionFault::Inline { item: url::masked(item) }.at(origin));
        };
        definitions.add(from_url(name.trim(), url.trim(), origin.clone())?)?;
    }
    Ok(definitions.in_order())
}

fn begins_definition(part: &str) -> bool {
    part.split_once('=')
        .is_some_and(|(name, url)| !name.contains("://") && (url.contains("://") || url.trim() == "local"))
}

/// Definitions of one source, each name once.
#[derive(Debug, Default)]
pub(crate) struct Definitions {
    by_name: IndexMap<Arc<str>, Defined>,
}

impl Definitions {
    /// Adds a definition.
    ///
    /// # Errors
    /// When there is one of this name.
    pub(crate) fn add(&mut self, definition: Defined) -> Result<(), DefineStreamError> {
        if let Some(first) = self.by_name.get(definition.name.as_str()) {
            let first = first.origin.clone();
            let origin = definition.origin.clone();
            return Err(DefinitionFault::Duplicate { name: definition.name, first }.at(&origin));
        }
        self.by_name.insert(definition.name.as_str().into(), definition);
        Ok(())
    }

    /// Adds what a source says that has less of a say: names that are there already stay as they are.
    pub(crate) fn add_missing(&mut self, definitions: Vec<Defined>) {
        for definition in definitions {
            self.by_name.entry(definition.name.as_str().into()).or_insert(definition);
        }
    }

    /// In the order in which they were added.
    pub(crate) fn in_order(self) -> Vec<Defined> {
        self.by_name.into_values().collect()
    }
}

fn define(name: &str, origin: &Origin, node: &Node) -> Result<Defined, DefineStreamError> {
    let name = StreamName::new(name).map_err(|error| DefinitionFault::Name(error).at(origin))?;
    match &node.value {
        // A name alone asks for the default: this machine.
        Value::Null => Ok(Defined::local(name, origin.clone())),
        Value::Scalar { .. } | Value::Reference(_) if node.secret => {
            Err(DefinitionFault::Secret { name: name.to_string() }.at(&node.origin))
        }
        Value::Scalar { text, .. } => {
            let mut definition = url::define(name, text, &node.origin)?;
            definition.origin = origin.clone();
            Ok(definition)
        }
        Value::Map(entries) => keys::define(name, origin, entries),
        Value::List(_) | Value::Reference(_) => {
            Err(DefinitionFault::NotADefinition { name: name.to_string() }.at(&node.origin))
        }
    }
}

#[cfg(test)]
#[rustfmt::skip] // expectations are rewritten by their tool, which wants them on one line
mod tests;
