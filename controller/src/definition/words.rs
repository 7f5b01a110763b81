//! A definition as code writes it: a URL, a type with its keys, or a reach that is there already. Pure.

use std::{fmt, sync::Arc, time::Duration};

use indexmap::IndexMap;
use millstream_common::{
    id::StreamName,
    spec::{FailurePolicy, ResourceLimits},
};

use super::{Defaults, DefineStreamError, Defined, DefinitionFault, keys, url};
use crate::{
    params::{Entry, Node, Origin, Reference, Value},
    reach::Reach,
};

/// Where a stream runs, as code says it. A text stands for [`Definition::url`], and a reach for [`Definition::reach`].
///
/// ```
/// # use millstream::Definition;
/// Definition::of("tls").key("host", "foo.example.com").key("port", 7433).env("LANG", "C");
/// ```
#[derive(Clone)]
#[must_use = "a definition does nothing until a stream is made of it"]
pub struct Definition {
    form: Form,
    keys: Vec<(String, Node)>,
    defaults: Defaults,
    exclusive: bool,
    wait: Option<Duration>,
    origin: Origin,
}

#[derive(Clone)]
enum Form {
    Url(String),
    Kind(String),
    Reach(Arc<dyn Reach>),
}

impl fmt::Debug for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match &self.form {
            Form::Url(text) => url::masked(text),
            Form::Kind(kind) => kind.clone(),
            Form::Reach(reach) => reach.describe(),
        };
        let keys: Vec<&String> = self.keys.iter().map(|(key, _)| key).collect();
        f.debug_struct("Definition").field("place", &place).field("keys", &keys).finish_non_exhaustive()
    }
}

impl Definition {
    fn new(form: Form) -> Self {
        let origin = Origin::named("the test");
        Self { form, keys: Vec::new(), defaults: Defaults::default(), exclusive: false, wait: None, origin }
    }

    /// This machine.
    pub fn local() -> Self {
        Self::of("local")
    }

    /// A place of a type, whose keys follow.
    pub fn of(kind: impl Into<String>) -> Self {
        Self::new(Form::Kind(kind.into()))
    }

    /// A place in one line, such as `tls://foo.example.com:7433`, or a type alone.
    pub fn url(url: impl Into<String>) -> Self {
        Self::new(Form::Url(url.into()))
    }

    /// A reach that was made by hand. It is released when the test is over, as all others are.
    pub fn reach(reach: Arc<dyn Reach>) -> Self {
        Self::new(Form::Reach(reach))
    }

    fn add(mut self, key: String, value: Value, secret: bool) -> Self {
        let origin = self.origin.clone();
        self.keys.push((key, Node { value, origin, secret }));
        self
    }

    /// A key of the type, or one that every stream may have, as it would stand in a file.
    pub fn key(self, key: impl Into<String>, value: impl fmt::Display) -> Self {
        let text = value.to_string();
        self.add(key.into(), Value::Scalar { json: text.clone().into(), text }, false)
    }

    /// A key whose value is never shown.
    pub fn secret(self, key: impl Into<String>, value: impl Into<String>) -> Self {
        let text = value.into();
        self.add(key.into(), Value::Scalar { json: text.clone().into(), text }, true)
    }

    /// A key whose value is kept in a file or a variable, looked up when the stream is first used, and never shown.
    pub fn kept(self, key: impl Into<String>, place: Reference) -> Self {
        self.add(key.into(), Value::Reference(place), true)
    }

    /// A variable of everything that runs there; a block's own wins.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.defaults.env.insert(name.into(), value.into());
        self
    }

    /// The working directory of everything that runs there.
    pub fn cwd(mut self, directory: impl Into<String>) -> Self {
        self.defaults.cwd = Some(directory.into());
        self
    }

    /// The user that everything runs as.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.defaults.user = Some(user.into());
        self
    }

    /// How long each block may take; at most 7 days.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.defaults.timeout = Some(timeout);
        self
    }

    /// A command in front of each block's own.
    pub fn wrap<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.defaults.wrap = argv.into_iter().map(Into::into).collect();
        self
    }

    /// Limits of each block's process tree.
    pub fn limits(mut self, limits: ResourceLimits) -> Self {
        self.defaults.limits = limits;
        self
    }

    /// After an unexpected end, nothing more runs in the stream.
    pub fn drain_on_failure(mut self) -> Self {
        self.defaults.on_failure = FailurePolicy::Drain;
        self
    }

    /// Reserves the host for this test.
    pub fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }

    /// How long the test waits in line for the host when others have it; at most 7 days.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// The stream of a name.
    ///
    /// # Errors
    /// When the name, the URL, or a key is refused.
    pub(crate) fn named(self, name: &str) -> Result<Defined, DefineStreamError> {
        let Self { form, keys, defaults, exclusive, wait, origin } = self;
        let name = StreamName::new(name).map_err(|error| DefinitionFault::Name(error).at(&origin))?;
        let mut entries: IndexMap<String, Entry> = IndexMap::new();
        for (key, node) in keys {
            let entry = Entry { key: origin.clone(), node };
            if entries.contains_key(&key) {
                return Err(DefinitionFault::Repeated { name: name.to_string(), key }.at(&origin));
            }
            entries.insert(key, entry);
        }
        let mut defined = match form {
            Form::Url(url) => {
                let mut defined = url::define(name, &url, &origin)?;
                keys::add(&mut defined, &entries)?;
                defined
            }
            Form::Kind(kind) => {
                entries.insert(
                    "type".to_owned(),
                    Entry { key: origin.clone(), node: Node::text(&kind, origin.clone()) },
                );
                keys::define(name, &origin, &entries)?
            }
            Form::Reach(reach) => {
                let mut defined = Defined::local(name, origin);
                "reach".clone_into(&mut defined.kind);
                keys::add(&mut defined, &entries)?;
                if let Some(key) = defined.options.keys().next() {
                    return Err(keys::unknown_key(&defined.name, key, Some(&[])).at(&defined.origin));
                }
                defined.reach = Some(reach);
                defined
            }
        };
        defined.exclusive |= exclusive;
        defined.wait = wait.or(defined.wait);
        defined.defaults.overlay(defaults);
        Ok(defined)
    }
}

impl Defaults {
    /// Puts what code says over what a URL or keys say.
    fn overlay(&mut self, over: Self) {
        self.env.extend(over.env);
        self.cwd = over.cwd.or(self.cwd.take());
        self.user = over.user.or(self.user.take());
        self.timeout = over.timeout.or(self.timeout);
        if !over.wrap.is_empty() {
            self.wrap = over.wrap;
        }
        if over.limits != ResourceLimits::default() {
            self.limits = over.limits;
        }
        if over.on_failure != FailurePolicy::default() {
            self.on_failure = over.on_failure;
        }
    }
}

impl From<&str> for Definition {
    fn from(url: &str) -> Self {
        Self::url(url)
    }
}

impl From<String> for Definition {
    fn from(url: String) -> Self {
        Self::url(url)
    }
}

impl From<&String> for Definition {
    fn from(url: &String) -> Self {
        Self::url(url)
    }
}

impl From<Arc<dyn Reach>> for Definition {
    fn from(reach: Arc<dyn Reach>) -> Self {
        Self::reach(reach)
    }
}
