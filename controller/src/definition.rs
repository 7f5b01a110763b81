//! Where streams run: definitions from parameters, from code and from the environment.

use std::{collections::BTreeMap, time::Duration};

use millstream_common::spec::{FailurePolicy, ResourceLimits};

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
