//! A definition in one line: `type://address?key=value&key=value`, or a type alone. Pure.
//!
//! A type that was registered may also be told its keys instead of an address: `docker://create=yes,image=fedora`.

use millstream_common::id::StreamName;

use super::{
    DefineStreamError, Definition, DefinitionFault, Kinds,
    keys::{self, Reader},
    unknown_type,
};
use crate::params::{Node, Origin, Value};

pub(super) fn define(
    name: StreamName,
    url: &str,
    origin: &Origin,
    kinds: &Kinds,
) -> Result<Definition, DefineStreamError> {
    let refused = |expected: &str| {
        let url = url.chars().take(256).collect();
        DefinitionFault::Url { name: name.to_string(), url, expected: expected.to_owned() }.at(origin)
    };
    if url.contains(char::is_control) {
        return Err(refused("it holds a control character"));
    }
    let (kind, rest) = url.split_once("://").unwrap_or((url, ""));
    if !kinds.names().contains(&kind) {
        let is_word =
            !kind.is_empty() && kind.chars().all(|c| c.is_ascii_alphanumeric() || "+.-_".contains(c));
        if !is_word {
            return Err(refused("write a URL, such as `tls://host:7433`"));
        }
        return Err(unknown_type(&name, kind, kinds).at(origin));
    }
    let own = kinds.keys(kind);
    let mut definition = Definition::local(name.clone(), origin.clone());
    definition.kind = kind.to_owned();
    let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
    let is_list_of_keys = own.is_none() && address.contains('=');
    if !is_list_of_keys {
        definition.address = address.to_owned();
    }
    let listed = if is_list_of_keys { address } else { "" };
    let pairs = listed.split(',').chain(query.split('&')).filter(|pair| !pair.is_empty());
    let reader = Reader { name: &name };
    for pair in pairs {
        let (key, value) = pair.split_once('=').ok_or_else(|| refused("write its keys as `key=value`"))?;
        let key = if own.is_some() { keys::meant(key) } else { key };
        let is_own = own.map_or(!keys::COMMON.contains(&key), |own| own.contains(&key));
        if is_own {
            if definition.options.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(refused("it gives a key twice"));
            }
        } else if ["cwd", "user", "timeout", "wrap", "on_failure", "exclusive"].contains(&key) {
            let json = serde_json::Value::String(value.to_owned());
            let node = Node { value: Value::Scalar { text: value.to_owned(), json }, origin: origin.clone() };
            reader.common(&mut definition, key, &node)?;
        } else if ["type", "env", "limits"].contains(&key) {
            return Err(refused("`env` and `limits` need the form of a mapping with `type`"));
        } else {
            return Err(keys::unknown_key(&name, key, own).at(origin));
        }
    }
    keys::check_address(&definition).map_err(refused)?;
    Ok(definition)
}
