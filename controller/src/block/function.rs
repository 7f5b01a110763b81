//! Rust functions of this binary as blocks.
