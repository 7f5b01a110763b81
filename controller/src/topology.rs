//! What blocks are told of the other streams: names, hosts, addresses. Pure.
//!
//! Every block finds it in the file named by `MILLSTREAM_TOPOLOGY`. It holds no keys, no certificates and nothing that a
//! definition keeps secret.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::streams::StreamShared;

/// Every defined stream as JSON. `addresses` are known of hosts that have been reached.
pub(crate) fn describe(
    streams: &[Arc<StreamShared>],
    addresses: impl Fn(&StreamShared) -> Option<Vec<String>>,
) -> Vec<u8> {
    let mut described = Map::new();
    for stream in streams {
        let entry = json!({
            "index": stream.index,
            "host": stream.host(),
            "place": stream.reach().describe(),
            "addresses": addresses(stream).unwrap_or_default(),
        });
        described.insert(stream.name.to_string(), entry);
    }
    Value::Object(Map::from_iter([("streams".to_owned(), Value::Object(described))])).to_string().into_bytes()
}
