//! The keys of a definition: those of its type, and those that every stream may have. Pure.

use std::{collections::BTreeMap, time::Duration};

use indexmap::IndexMap;
use millstream_common::{
    id::StreamName,
    limits,
    spec::{FailurePolicy, ResourceLimits},
    text,
};

use super::{Defaults, DefineStreamError, Defined, DefinitionFault, Held, Setting, listed, sounds_secret};
use crate::{
    params::{Entry, HIDDEN, Node, Origin, Value},
    reach::{container, slurm},
};

/// A type that is always there.
#[derive(Debug)]
pub(super) struct BuiltIn {
    pub(super) name: &'static str,
    /// The key that holds the address, when the type has one.
    pub(super) address: Option<&'static str>,
    /// Whether its keys may stand where others have an address, which then may be missing.
    pub(super) is_told_by_keys: bool,
    /// All keys that it takes.
    pub(super) keys: &'static [&'static str],
}

/// The types that are always there.
pub(super) const BUILT_IN: [BuiltIn; 8] = [
    BuiltIn {
        name: "command",
        address: Some("command"),
        is_told_by_keys: false,
        keys: &["command", "host", "bring", "agent"],
    },
    BuiltIn { name: "docker", address: Some("name"), is_told_by_keys: true, keys: &container::KEYS },
    BuiltIn { name: "local", address: None, is_told_by_keys: false, keys: &[] },
    BuiltIn { name: "podman", address: Some("name"), is_told_by_keys: true, keys: &container::KEYS },
    BuiltIn { name: "slurm", address: Some("allocation"), is_told_by_keys: true, keys: &slurm::KEYS },
    // Its user is the one who logs in, as whom blocks run.
    BuiltIn {
        name: "ssh",
        address: Some("host"),
        is_told_by_keys: false,
        keys: &["host", "user", "port", "identity", "jump", "config", "options", "agent"],
    },
    BuiltIn {
        name: "tls",
        address: Some("host"),
        is_told_by_keys: false,
        keys: &["host", "port", "authority", "certificate", "key", "revocations", "server_name"],
    },
    BuiltIn { name: "unix", address: Some("path"), is_told_by_keys: false, keys: &["path"] },
];

/// Other words that are understood, and the keys that they stand for: the file and its variable are called `ca`.
const ALIASES: [(&str, &str); 1] = [("ca", "authority")];

/// The key that a word stands for.
pub(super) fn meant(word: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == word).map_or(word, |(_, key)| key)
}

/// Keys that every stream may have.
pub(super) const COMMON: [&str; 10] =
    ["type", "env", "cwd", "user", "timeout", "wrap", "limits", "on_failure", "exclusive", "wait"];

/// The keys that a type takes; none when only the type itself knows them.
pub(super) fn own(kind: &str) -> Option<&'static [&'static str]> {
    built_in(kind).map(|built_in| built_in.keys)
}

/// Whether keys may stand where an address stands: `docker://create=yes,image=fedora`.
pub(super) fn is_told_by_keys(kind: &str) -> bool {
    built_in(kind).is_none_or(|built_in| built_in.is_told_by_keys)
}

fn built_in(kind: &str) -> Option<&'static BuiltIn> {
    BUILT_IN.iter().find(|built_in| built_in.name == kind)
}

/// A definition as a mapping.
pub(super) fn define(
    name: StreamName,
    origin: &Origin,
    entries: &IndexMap<String, Entry>,
) -> Result<Defined, DefineStreamError> {
    let reader = Reader { name: &name };
    let mut defined = Defined::local(name.clone(), origin.clone());
    match entries.get("type") {
        Some(kind) => {
            defined.kind = reader.text("type", &kind.node)?;
            if !is_word(&defined.kind) {
                return Err(reader.refused("type", &kind.node, "write one word, such as `tls`"));
            }
        }
        // What holds everywhere says nothing of a place: it is this machine.
        None if entries.keys().all(|key| COMMON.contains(&key.as_str())) => {}
        None => return Err(DefinitionFault::NoType { name: name.to_string() }.at(origin)),
    }
    add(&mut defined, entries)?;
    take_address(&mut defined, origin)?;
    Ok(defined)
}

/// Adds keys to a definition whose type is known.
pub(super) fn add(defined: &mut Defined, entries: &IndexMap<String, Entry>) -> Result<(), DefineStreamError> {
    let name = defined.name.clone();
    let reader = Reader { name: &name };
    let own = own(&defined.kind);
    for (key, entry) in entries {
        let meant = if own.is_some() { meant(key) } else { key };
        let is_own = own.map_or(!COMMON.contains(&meant), |own| own.contains(&meant));
        if is_own {
            if meant != key && entries.contains_key(meant) {
                let (name, key, meant) = (name.to_string(), key.clone(), meant.to_owned());
                return Err(DefinitionFault::Alias { name, key, meant }.at(&entry.key));
            }
            defined.options.insert(meant.to_owned(), reader.setting(key, &entry.node)?);
        } else if COMMON.contains(&key.as_str()) {
            reader.common(defined, key, &entry.node)?;
        } else {
            return Err(unknown_key(&name, key, own).at(&entry.key));
        }
    }
    Ok(())
}

/// Whether a text can be the name of a type.
pub(super) fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 64
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+.-_".contains(c))
}

/// What can be told without looking anything up.
pub(super) fn check_address(definition: &Defined) -> Result<(), &'static str> {
    let address = definition.address.as_str();
    match definition.kind.as_str() {
        "local" if !address.is_empty() => Err("write `local` alone: it is always this machine"),
        "tls" if address.trim_end_matches('/').is_empty() => {
            Err("write a host and, unless it is 7433, a port, as in `tls://host:7433`")
        }
        "ssh" if address.trim_end_matches('/').is_empty() => {
            Err("write a host, with a user or a port if need be, as in `ssh://tester@host:22`")
        }
        "command" if address.is_empty() => Err(
            "write the command that leads to an agent, as in `command://ip netns exec blue millstream-agent stdio`",
        ),
        "unix" if !address.starts_with('/') => {
            Err("write the absolute path of the agent's socket, as in `unix:///run/millstream/agent.sock`")
        }
        _ => Ok(()),
    }
}

/// The key that holds the address, when the type has one.
pub(super) fn address_key(kind: &str) -> Option<&'static str> {
    built_in(kind).map_or(Some("host"), |built_in| built_in.address)
}

/// Moves the key that holds the address to its place.
pub(super) fn take_address(definition: &mut Defined, origin: &Origin) -> Result<(), DefineStreamError> {
    let Some(key) = address_key(&definition.kind) else { return Ok(()) };
    match definition.options.get(key) {
        Some(setting) if setting.secret => {
            let expected =
                "everybody sees where a stream is: write it without a tag, or as `!env-shown NAME`";
            let (name, given) = (definition.name.to_string(), setting.to_string());
            let (key, expected) = (key.to_owned(), expected.to_owned());
            let origin = setting.origin.clone();
            return Err(DefinitionFault::Value { name, key, given, expected }.at(&origin));
        }
        // Looked up when the stream is first used, and judged then.
        Some(Setting { value: Held::Elsewhere(_), .. }) => {}
        Some(Setting { value: Held::Here(address), .. }) => {
            // The words of a command may also stand in a list.
            definition.address = match address.strip_suffix('\n') {
                Some(items) if key == "command" => text::line(items.split('\n')),
                _ => address.clone(),
            };
            definition.options.remove(key);
            check_address(definition).map_err(|expected| {
                let (name, given) = (definition.name.to_string(), definition.address.clone());
                DefinitionFault::Value { name, key: key.to_owned(), given, expected: expected.to_owned() }
                    .at(origin)
            })?;
        }
        None if !is_told_by_keys(&definition.kind) => {
            let (name, kind) = (definition.name.to_string(), definition.kind.clone());
            return Err(DefinitionFault::Missing { name, kind, key }.at(origin));
        }
        None => {}
    }
    Ok(())
}

pub(super) fn unknown_key(
    name: &StreamName,
    key: &str,
    own: Option<&'static [&'static str]>,
) -> DefinitionFault {
    let own = own.unwrap_or_default();
    let known = || own.iter().chain(COMMON.iter().filter(|key| !own.contains(key))).copied();
    DefinitionFault::UnknownKey {
        name: name.to_string(),
        key: key.chars().take(64).collect(),
        near: text::nearest(key, known()).map(str::to_owned),
        known: listed(known()),
    }
}

/// What holds for every block is told to hosts and results.
const UNTAGGED: &str = "whoever looks at the host can see it: write it without a tag, or give it to blocks as a secret parameter";

/// Reads values of one stream.
pub(super) struct Reader<'a> {
    pub(super) name: &'a StreamName,
}

impl Reader<'_> {
    /// A key that every stream may have.
    pub(super) fn common(
        &self,
        definition: &mut Defined,
        key: &str,
        node: &Node,
    ) -> Result<(), DefineStreamError> {
        let defaults: &mut Defaults = &mut definition.defaults;
        match key {
            "env" => defaults.env = self.texts(key, node)?,
            "cwd" => defaults.cwd = Some(self.text(key, node)?),
            "user" => defaults.user = Some(self.text(key, node)?),
            "timeout" => defaults.timeout = Some(self.duration(key, node)?),
            "wrap" => defaults.wrap = self.words(key, node)?,
            "limits" => defaults.limits = self.limits(key, node)?,
            "on_failure" => defaults.on_failure = self.policy(key, node)?,
            "exclusive" => definition.exclusive = self.truth(key, node)?,
            "wait" => definition.wait = Some(self.duration(key, node)?),
            // `type` was read before.
            _ => {}
        }
        Ok(())
    }

    fn refused(&self, key: &str, node: &Node, expected: impl Into<String>) -> DefineStreamError {
        let given = match &node.value {
            Value::Reference(reference) => reference.to_string(),
            _ if node.secret => HIDDEN.to_owned(),
            Value::Scalar { text, .. } => text.chars().take(64).collect(),
            Value::Null => String::new(),
            Value::List(_) => "[…]".to_owned(),
            Value::Map(_) => "{…}".to_owned(),
        };
        let (name, key) = (self.name.to_string(), key.to_owned());
        DefinitionFault::Value { name, key, given, expected: expected.into() }.at(&node.origin)
    }

    /// What the type itself wants to know: it alone may be secret, or kept elsewhere.
    fn setting(&self, key: &str, node: &Node) -> Result<Setting, DefineStreamError> {
        let value = match &node.value {
            Value::Scalar { text, .. } => Held::Here(text.clone()),
            Value::Reference(reference) => Held::Elsewhere(reference.clone()),
            // A line for each item, and an end for each line: so one item that holds spaces stays one.
            Value::List(nodes) => {
                let items: Result<Vec<_>, _> = nodes.iter().map(|node| self.text(key, node)).collect();
                Held::Here(items?.iter().map(|item| format!("{item}\n")).collect())
            }
            _ => return Err(self.refused(key, node, "write a text or a list of texts")),
        };
        Ok(Setting { value, secret: node.secret || sounds_secret(key), origin: node.origin.clone() })
    }

    fn text(&self, key: &str, node: &Node) -> Result<String, DefineStreamError> {
        match &node.value {
            Value::Reference(_) => Err(self.refused(key, node, UNTAGGED)),
            Value::Scalar { .. } if node.secret => Err(self.refused(key, node, UNTAGGED)),
            Value::Scalar { text, .. } => Ok(text.clone()),
            _ => Err(self.refused(key, node, "write a text")),
        }
    }

    fn texts(&self, key: &str, node: &Node) -> Result<BTreeMap<String, String>, DefineStreamError> {
        let Value::Map(entries) = &node.value else {
            return Err(self.refused(key, node, "write a mapping of names to texts"));
        };
        let inner = |name: &String| format!("{key}.{name}");
        entries
            .iter()
            .map(|(name, entry)| Ok((name.clone(), self.text(&inner(name), &entry.node)?)))
            .collect()
    }

    fn words(&self, key: &str, node: &Node) -> Result<Vec<String>, DefineStreamError> {
        match &node.value {
            Value::Scalar { .. } if node.secret => Err(self.refused(key, node, UNTAGGED)),
            Value::Scalar { text, .. } => Ok(text.split_whitespace().map(str::to_owned).collect()),
            Value::List(nodes) => nodes.iter().map(|node| self.text(key, node)).collect(),
            Value::Reference(_) => Err(self.refused(key, node, UNTAGGED)),
            Value::Null | Value::Map(_) => {
                Err(self.refused(key, node, "write a command, or a list of its words"))
            }
        }
    }

    fn truth(&self, key: &str, node: &Node) -> Result<bool, DefineStreamError> {
        match self.text(key, node)?.as_str() {
            "true" | "yes" | "on" => Ok(true),
            "false" | "no" | "off" => Ok(false),
            _ => Err(self.refused(key, node, "write `yes` or `no`")),
        }
    }

    fn policy(&self, key: &str, node: &Node) -> Result<FailurePolicy, DefineStreamError> {
        match self.text(key, node)?.as_str() {
            "continue" => Ok(FailurePolicy::Continue),
            "drain" => Ok(FailurePolicy::Drain),
            _ => Err(self.refused(key, node, "write `continue` or `drain`")),
        }
    }

    fn duration(&self, key: &str, node: &Node) -> Result<Duration, DefineStreamError> {
        let duration = duration(&self.text(key, node)?);
        let duration = duration.ok_or_else(|| {
            self.refused(key, node, "write a duration such as `30s`, `2m`, `1h30m`, or a number of seconds")
        })?;
        if duration.is_zero() || duration > limits::WAIT_MAX {
            return Err(self.refused(key, node, "write a duration of more than nothing and at most 7 days"));
        }
        Ok(duration)
    }

    fn limits(&self, key: &str, node: &Node) -> Result<ResourceLimits, DefineStreamError> {
        let Value::Map(entries) = &node.value else {
            return Err(self.refused(key, node, "write a mapping with `memory`, `pids` or `cpu`"));
        };
        let mut found = ResourceLimits::default();
        for (inner, entry) in entries {
            let full = format!("{key}.{inner}");
            let written = self.text(&full, &entry.node)?;
            let refused = |expected: &str| self.refused(&full, &entry.node, expected);
            match inner.as_str() {
                "memory" => {
                    let bytes = size(&written);
                    found.memory_bytes =
                        Some(bytes.ok_or_else(|| refused("write a size such as `512M`, `2G`, or bytes"))?);
                }
                "pids" => {
                    let count = written.parse().ok().filter(|&count: &u64| count > 0);
                    found.pids_count = Some(count.ok_or_else(|| refused("write a number from 1"))?);
                }
                "cpu" => {
                    let millis = processors(&written);
                    found.cpu_millis =
                        Some(millis.ok_or_else(|| refused("write a number of processors such as `1.5`"))?);
                }
                _ => {
                    let known = ["memory", "pids", "cpu"];
                    let fault = DefinitionFault::UnknownKey {
                        name: self.name.to_string(),
                        key: full,
                        near: text::nearest(inner, known).map(|near| format!("{key}.{near}")),
                        known: listed(known),
                    };
                    return Err(fault.at(&entry.key));
                }
            }
        }
        Ok(found)
    }
}

/// `30s`, `2m`, `1h30m`, `500ms`, `1.5` (seconds).
pub(crate) fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(end);
        let tail = tail.trim_start();
        let end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let unit = match unit {
            "ms" => 0.001,
            "s" | "sec" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        let part = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * unit).ok()?;
        total = total.checked_add(part)?;
        rest = tail.trim_start();
    }
    Some(total)
}

/// `512M`, `2G`, `2GiB`, `1048576`: multiples of 1024.
fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|&bytes| bytes > 0)
}

/// `1.5` processors are 1500 thousandths.
fn processors(text: &str) -> Option<u64> {
    let (whole, fraction) = text.trim().split_once('.').unwrap_or((text.trim(), ""));
    let thousandths = format!("{fraction:0<3}");
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(&thousandths) || thousandths.len() > 3 {
        return None;
    }
    let millis = whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(thousandths.parse().ok()?)?;
    (millis > 0).then_some(millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_sizes_and_processors_are_read_as_people_write_them() {
        let seconds = |text| duration(text).map(|duration| duration.as_secs_f64());
        assert_eq!(seconds("30"), Some(30.0));
        assert_eq!(seconds("1h30m"), Some(5400.0));
        assert_eq!(seconds("500 ms"), Some(0.5));
        for bad in ["", "s", "1x", "-1", "1h30", "1..2s", "inf", "nan"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
        assert_eq!(size("512M"), Some(512 << 20));
        assert_eq!(size("2 GiB"), Some(2 << 30));
        assert_eq!(size("99999999999G"), None);
        assert_eq!(size("0"), None);
        assert_eq!(processors("1.5"), Some(1500));
        assert_eq!(processors("2"), Some(2000));
        assert_eq!(processors(".5"), None);
        assert_eq!(processors("0.0001"), None);
    }
}
