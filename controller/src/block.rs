//! Blocks: the pieces of code that streams run, and how they become tasks.

pub mod builder;
pub mod command;
pub mod compile;
pub mod function;
pub mod payload;
