//! The end-to-end tests: real processes, sockets, certificates and network namespaces, a module a feature.
//!
//! Tests that need root or a package are ignored with the reason, so that `cargo test` names them; `integration-tests/run`
//! installs what they need and runs them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod access;
mod avocado;
mod bad_input;
mod barriers;
mod certificates;
mod commands;
mod conformance;
mod containers;
mod crashes;
mod examples;
mod install;
mod lab;
mod logs;
mod look;
mod nested;
mod old_kernel;
mod on_demand;
mod operating;
mod reaches_document;
mod sharing;
mod slurm;
mod ssh;
mod stand_ins;
mod static_agent;
mod support;
mod sync;
mod terminal;
mod tidy;
mod trees;
mod two_hosts;
mod upkeep;
mod versions;

// Local streams of these tests run in this very program.
millstream::entry!();
