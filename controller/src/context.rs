//! What a Rust block finds inside its own process.
