//! References to Rust functions of this program, by name.

use std::collections::BTreeMap;

use millstream_common::text::nearest;

use super::{BlockReference, Resolution, Resolver};
use crate::block::function::{Call, FUNCTIONS, Function};

/// Functions with `#[millstream::block]`: `netserver`, or with its module where several have the name.
pub(super) struct Functions;

impl Resolver for Functions {
    fn name(&self) -> &str {
        "functions"
    }

    fn resolve(&self, reference: &BlockReference) -> Resolution {
        let text = reference.text();
        let named = |function: &&'static Function| {
            let path = function.path();
            path == text || path.strip_suffix(text).is_some_and(|module| module.ends_with("::"))
        };
        // Their order in the program is the linker's.
        let found: BTreeMap<_, _> = FUNCTIONS.iter().filter(named).map(|found| (found.key, found)).collect();
        if !found.is_empty() {
            return Resolution::Found(
                found.values().map(|found| Call::by_name(found).into_block()).collect(),
            );
        }
        let names = FUNCTIONS.iter().map(Function::name);
        Resolution::not_found("no function of this program with `#[millstream::block]`", nearest(text, names))
    }
}
