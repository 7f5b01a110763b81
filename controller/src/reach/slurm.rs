//! The nodes of an allocation that a Slurm cluster grants: `slurm://sweep?partition=debug&nodes=2&time=10m`.
//!
//! Streams whose definitions ask for the same share one allocation in a test, and each takes the next node of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use millstream_common::{limits, text};

mod allocation;

use allocation::{Allocation, NodeError, Request};

use super::{
    DialError, Dialing, Place, PlaceError, Reach, Releasing, address_error, keys_error, only_options,
};
use crate::definition;

/// All that a definition may say.
pub(crate) const KEYS: [&str; 11] = [
    "allocation",
    "partition",
    "nodes",
    "time",
    "account",
    "constraint",
    "options",
    "configuration",
    "node",
    "queue",
    "agent",
];
/// Nodes of one allocation: a test with more would have as many sessions.
const NODES_MAX: usize = 1_024;

/// The allocations of one test.
#[derive(Debug, Default)]
pub(crate) struct Allocations(Mutex<BTreeMap<String, Shared>>);

/// One of them, and which of its nodes are taken.
#[derive(Debug)]
struct Shared {
    allocation: Arc<Allocation>,
    taken: BTreeSet<usize>,
}

impl Allocations {
    /// The node that a definition means: the one that it names, else the next that no stream has.
    pub(crate) fn node(&self, place: &Place) -> Result<Node, PlaceError> {
        only_options(place, &KEYS)?;
        let request = request(place)?;
        let number = |key: &str, most: usize| match place.options.get(key) {
            None => Ok(None),
            Some(text) => match text.parse::<usize>() {
                Ok(number) if (1..=most).contains(&number) => Ok(Some(number)),
                _ => Err(keys_error(
                    place,
                    format!("`{key}` is `{}`: write a number from 1 to {most}", text.escape_debug()),
                )),
            },
        };
        let wanted = number("node", request.nodes)?;
        let wait = duration(place, "queue")?.unwrap_or(limits::TEST_DEADLINE);
        let label = if request.name.is_empty() { described(place) } else { request.name.clone() };
        let mut allocations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = allocations.entry(label.clone()).or_insert_with(|| Shared {
            allocation: Arc::new(Allocation::new(request.clone())),
            taken: BTreeSet::new(),
        });
        if shared.allocation.request != request {
            return Err(keys_error(
                place,
                format!(
                    "the allocation `{label}` is defined in two ways: give both streams the same keys, or two names"
                ),
            ));
        }
        let free = (0..request.nodes).find(|node| !shared.taken.contains(node));
        let Some(index) = wanted.map(|node| node - 1).or(free) else {
            let (nodes, plural) = (request.nodes, if request.nodes == 1 { "" } else { "s" });
            return Err(keys_error(
                place,
                format!(
                    "the allocation `{label}` has {nodes} node{plural}, and other streams have taken all: raise `nodes`, or share one with `node: 1`"
                ),
            ));
        };
        shared.taken.insert(index);
        Ok(Node { allocation: Arc::clone(&shared.allocation), index, label, wait })
    }
}

fn request(place: &Place) -> Result<Request, PlaceError> {
    let is_plain = |text: &str| {
        text.len() <= 64
            && !text.starts_with('-')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    if !is_plain(&place.address) {
        return Err(address_error(
            place,
            "write a name for the allocation, of letters, digits, `.`, `_` and `-`",
        ));
    }
    let nodes = match place.options.get("nodes").map(|text| text.parse()) {
        None => 1,
        Some(Ok(nodes)) if (1..=NODES_MAX).contains(&nodes) => nodes,
        Some(_) => return Err(keys_error(place, format!("`nodes` is no number from 1 to {NODES_MAX}"))),
    };
    let time = duration(place, "time")?.unwrap_or(limits::TEST_DEADLINE);
    // Minutes are what the scheduler counts in: it would round down.
    let minutes = time.as_secs().div_ceil(60);
    let mut arguments = vec![format!("--time={minutes}")];
    for key in ["partition", "account", "constraint"] {
        arguments.extend(place.options.get(key).map(|value| format!("--{key}={value}")));
    }
    if let Some(options) = place.options.get("options") {
        match options.strip_suffix('\n') {
            // A list, with a line for each item.
            Some(items) => arguments.extend(items.split('\n').map(str::to_owned)),
            None => arguments.extend(
                text::words(options).map_err(|error| keys_error(place, format!("`options`: {error}")))?,
            ),
        }
    }
    let option = |key: &str| place.options.get(key).cloned();
    Ok(Request {
        name: place.address.clone(),
        nodes,
        arguments,
        configuration: option("configuration"),
        agent: option("agent"),
    })
}

fn duration(place: &Place, key: &str) -> Result<Option<Duration>, PlaceError> {
    let Some(text) = place.options.get(key) else { return Ok(None) };
    match definition::duration(text).filter(|time| !time.is_zero() && *time <= limits::WAIT_MAX) {
        Some(time) => Ok(Some(time)),
        None => Err(keys_error(
            place,
            format!(
                "`{key}` is `{}`: write a duration such as `10m` or `2h`, at most 7 days",
                text.escape_debug()
            ),
        )),
    }
}

/// What an allocation without a name is called: what it asks for.
fn described(place: &Place) -> String {
    let shown = place
        .options
        .iter()
        .filter(|(key, _)| !["configuration", "node", "queue", "agent"].contains(&key.as_str()));
    let words: Vec<String> = shown.map(|(key, value)| format!("{key}={}", place.shown(key, value))).collect();
    if words.is_empty() { "any".to_owned() } else { words.join(",") }
}

/// One node of an allocation.
#[derive(Debug)]
pub(crate) struct Node {
    allocation: Arc<Allocation>,
    /// Which, from 0.
    index: usize,
    label: String,
    /// How long the scheduler may take.
    wait: Duration,
}

impl Reach for Node {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            match self.allocation.dial(self.index).await {
                Ok(pipe) => Ok(Box::new(pipe) as _),
                Err(NodeError::Pending(reason)) => Err(DialError::Pending { reason }),
                Err(error) => {
                    Err(DialError::Denied { reason: error.to_string(), is_final: error.is_final() })
                }
            }
        })
    }

    fn describe(&self) -> String {
        format!("slurm://{}/{}", self.label, self.index + 1)
    }

    fn host(&self) -> String {
        // Nobody knows it before the scheduler has decided.
        self.allocation.name(self.index).unwrap_or_else(|| format!("node-{}", self.index + 1))
    }

    fn knows_host(&self) -> bool {
        self.allocation.name(self.index).is_some()
    }

    fn progress(&self) -> u64 {
        self.allocation.progress(self.index)
    }

    fn dial_max(&self) -> Duration {
        limits::REACH_MAX
    }

    fn reach_max(&self) -> Duration {
        self.wait + limits::REACH_MAX
    }

    fn what_to_check(&self) -> String {
        "Check what `squeue` says of its job, and `sinfo` of its node".to_owned()
    }

    fn release(&self) -> Releasing<'_> {
        Box::pin(self.allocation.release(self.index))
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn place(name: &str, options: &[(&str, &str)]) -> Place {
        let mut place = Place::new("slurm", name);
        place.options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        place
    }

    fn refused(allocations: &Allocations, name: &str, options: &[(&str, &str)], expected: &Expect) {
        expected.assert_eq(&allocations.node(&place(name, options)).unwrap_err().to_string());
    }

    #[test]
    fn each_stream_takes_the_next_node_of_the_same_allocation() {
        let allocations = Allocations::default();
        let take = |name: &str, options: &[(&str, &str)]| {
            allocations.node(&place(name, options)).unwrap().describe()
        };
        assert_eq!(take("sweep", &[("nodes", "3")]), "slurm://sweep/1");
        assert_eq!(take("sweep", &[("nodes", "3"), ("node", "3")]), "slurm://sweep/3");
        assert_eq!(take("sweep", &[("nodes", "3")]), "slurm://sweep/2");
        // Shared on purpose.
        assert_eq!(take("sweep", &[("nodes", "3"), ("node", "2")]), "slurm://sweep/2");
        assert_eq!(take("other", &[]), "slurm://other/1");
        assert_eq!(take("", &[("partition", "debug"), ("nodes", "2")]), "slurm://nodes=2,partition=debug/1");
        assert_eq!(take("", &[("partition", "debug"), ("nodes", "2")]), "slurm://nodes=2,partition=debug/2");
    }

    #[test]
    fn what_cannot_be_had_is_said_with_what_would_help() {
        let allocations = Allocations::default();
        allocations.node(&place("sweep", &[])).unwrap();
        let refused = |name: &str, options: &[(&str, &str)], expected: Expect| {
            refused(&allocations, name, options, &expected)
        };
        refused(
            "sweep",
            &[],
            expect![
                "`slurm` cannot be had: the allocation `sweep` has 1 node, and other streams have taken all: raise `nodes`, or share one with `node: 1`"
            ],
        );
        refused(
            "sweep",
            &[("time", "5m")],
            expect![
                "`slurm` cannot be had: the allocation `sweep` is defined in two ways: give both streams the same keys, or two names"
            ],
        );
        refused(
            "other",
            &[("nodes", "0")],
            expect!["`slurm` cannot be had: `nodes` is no number from 1 to 1024"],
        );
        refused(
            "other",
            &[("nodes", "2"), ("node", "3")],
            expect!["`slurm` cannot be had: `node` is `3`: write a number from 1 to 2"],
        );
        refused(
            "other",
            &[("time", "soon")],
            expect![
                "`slurm` cannot be had: `time` is `soon`: write a duration such as `10m` or `2h`, at most 7 days"
            ],
        );
        refused(
            "other",
            &[("partitoin", "debug")],
            expect![
                "`slurm` does not know the key `partitoin`: it takes `allocation`, `partition`, `nodes`, `time`, `account`, `constraint`, `options`, `configuration`, `node`, `queue`, `agent` (did you mean `partition`?)"
            ],
        );
        refused(
            "two words",
            &[],
            expect![
                "`slurm` cannot use the address `two words`: write a name for the allocation, of letters, digits, `.`, `_` and `-`"
            ],
        );
    }

    #[test]
    fn what_salloc_is_told_follows_from_the_keys() {
        let told = |options: &[(&str, &str)]| request(&place("", options)).unwrap().arguments.join(" ");
        assert_eq!(told(&[]), "--time=60");
        assert_eq!(
            told(&[("time", "90s"), ("partition", "debug"), ("account", "qa"), ("constraint", "ib")]),
            "--time=2 --partition=debug --account=qa --constraint=ib"
        );
        assert_eq!(told(&[("options", "--qos=high --mem 2G")]), "--time=60 --qos=high --mem 2G");
        assert_eq!(
            told(&[("options", "--comment=two words\n--qos=high\n")]),
            "--time=60 --comment=two words --qos=high"
        );
    }
}
