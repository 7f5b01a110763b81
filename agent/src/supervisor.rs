//! One process per session: the one loop that selects, feeds the machines and performs their actions.

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
