//! A definition in one line: `type://address?key=value&key=value`, or a type alone. Pure.
//!
//! Containers, and types that were registered, may also be told their keys instead of an address:
//! `docker://create=yes,image=fedora`.

use millstream_common::id::StreamName;

use super::{
    DefineStreamError, Defined, DefinitionFault, Setting,
    keys::{self, Reader},
    sounds_secret,
};
use crate::params::{HIDDEN, Node, Origin};

pub(super) fn define(name: StreamName, url: &str, origin: &Origin) -> Result<Defined, DefineStreamError> {
    let refused = |expected: &str| {
        let url = masked(url).chars().take(256).collect();
        DefinitionFault::Url { name: name.to_string(), url, expected: expected.to_owned() }.at(origin)
    };
    if url.contains(char::is_control) {
        return Err(refused("it holds a control character"));
    }
    let (kind, rest) = url.split_once("://").unwrap_or((url, ""));
    if !keys::is_word(kind) {
        return Err(refused("write a URL, such as `tls://host:7433`"));
    }
    let own = keys::own(kind);
    let mut definition = Defined::local(name.clone(), origin.clone());
    definition.kind = kind.to_owned();
    let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
    let is_list_of_keys = keys::is_told_by_keys(kind) && address.contains('=');
    if !is_list_of_keys {
        definition.address = address.to_owned();
    }
    if address.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')) {
        return Err(refused(
            "a password in a URL is seen by everybody: write a mapping with `password: !file PATH`",
        ));
    }
    let listed = if is_list_of_keys { address } else { "" };
    let pairs = listed.split(',').chain(query.split('&')).filter(|pair| !pair.is_empty());
    let reader = Reader { name: &name };
    for pair in pairs {
        let (key, value) = pair.split_once('=').ok_or_else(|| refused("write its keys as `key=value`"))?;
        let key = if own.is_some() { keys::meant(key) } else { key };
        let is_own = own.map_or(!keys::COMMON.contains(&key), |own| own.contains(&key));
        if is_own {
            if definition.options.insert(key.to_owned(), Setting::given(key, value, origin)).is_some() {
                return Err(refused("it gives a key twice"));
            }
        } else if ["cwd", "user", "timeout", "wrap", "on_failure", "exclusive", "wait"].contains(&key) {
            reader.common(&mut definition, key, &Node::text(value, origin.clone()))?;
        } else if ["type", "env", "limits"].contains(&key) {
            return Err(refused("`env` and `limits` need the form of a mapping with `type`"));
        } else {
            return Err(keys::unknown_key(&name, key, own).at(origin));
        }
    }
    keys::check_address(&definition).map_err(refused)?;
    Ok(definition)
}

/// A URL without what may be a secret in it: what stands between user and host, and everything behind a key that sounds
/// like one.
pub(super) fn masked(url: &str) -> String {
    let begin = url.find("://").map_or(0, |at| at + 3);
    let (kind, rest) = url.split_at(begin);
    let mut shown = kind.to_owned();
    let authority = rest.find(['/', '?']).unwrap_or(rest.len());
    let rest = match rest[..authority]
        .rsplit_once('@')
        .and_then(|(user, _)| Some((user.split_once(':')?.0, user.len())))
    {
        Some((user, length)) => {
            shown += &format!("{user}:{HIDDEN}");
            &rest[length..]
        }
        None => rest,
    };
    for piece in rest.split_inclusive(['?', '&', ',']) {
        match piece.split_once('=') {
            // What the value is made of is not known: it may hold any of the separators.
            Some((key, _)) if sounds_secret(key) => return format!("{shown}{key}={HIDDEN}"),
            _ => shown += piece,
        }
    }
    shown
}
