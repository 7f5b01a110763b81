//! What blocks are told of the other streams: names, hosts, addresses. Pure.
//!
//! Every block finds it in the file named by `MILLSTREAM_TOPOLOGY`. It holds no keys, no certificates and nothing that a
//! definition keeps secret.

use std::sync::Arc;

use bytes::Bytes;
use millstream_common::spec::BlobDigest;
use serde_json::{Map, Value, json};

use crate::streams::StreamShared;

/// Every defined stream as JSON, with its digest. Cloning shares it: it is made once for all tasks until it changes.
#[derive(Debug, Clone)]
pub(crate) struct Topology {
    pub(crate) content: Bytes,
    pub(crate) digest: BlobDigest,
}

impl Topology {
    /// `addresses` are known of places that have been reached.
    pub(crate) fn of<'a>(
        streams: &[Arc<StreamShared>],
        addresses: impl Fn(&str) -> Option<&'a [String]>,
    ) -> Self {
        let mut described = Map::new();
        for stream in streams {
            let place = stream.reach().describe();
            let entry = json!({
                "index": stream.index,
                "host": stream.host(),
                "addresses": addresses(&place).unwrap_or_default(),
                "place": place,
            });
            described.insert(stream.name.to_string(), entry);
        }
        let all = Value::Object(Map::from_iter([("streams".to_owned(), Value::Object(described))]));
        Self::from(Bytes::from(all.to_string()))
    }
}

impl From<Bytes> for Topology {
    fn from(content: Bytes) -> Self {
        Self { digest: BlobDigest::of(&content), content }
    }
}
