//! One process per session: the one loop that selects, feeds the machines and performs their actions.

pub(crate) mod account;
pub mod blobs;
pub mod cgroup;
pub mod process;
pub mod queue;
pub mod relay;
pub mod shim;
pub mod spool;
pub mod task;
pub mod wire;
pub mod workspace;

use std::{ffi::OsString, process::ExitCode};

/// The role `supervisor`.
pub(crate) fn main(_arguments: Vec<OsString>) -> ExitCode {
    ExitCode::FAILURE
}
