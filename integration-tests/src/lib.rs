//! The harness of the end-to-end tests: hosts as network namespaces, each with the real agent and its own certificate.
//!
//! A [`lab::Lab`] is a switch, a place for the controller and any number of hosts, all in namespaces of their own, so that
//! addresses never meet anything outside. Nothing here checks anything about Millstream; the tests do. What has no event
//! to wait for is looked at again and again with a bound, in [`wait`] and nowhere else.

pub mod agent;
pub mod authority;
pub mod engine;
pub mod lab;
pub mod machine;
pub mod namespace;
pub mod package;
pub mod processes;
pub mod slurm;
pub mod sshd;
pub mod tools;
pub mod wait;
