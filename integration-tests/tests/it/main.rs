//! The end-to-end tests: real processes, sockets, certificates and network namespaces, a module a feature.
//!
//! Tests that need root or a package are ignored with the reason, so that `cargo test` names them; `integration-tests/run`
//! installs what they need and runs them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod lab;
mod tidy;
