//! The agent of Millstream: runs blocks of code on a host as supervised process trees.

pub mod child;
pub mod cli;
pub mod config;
pub mod door;
pub mod entry;
pub mod host;
pub mod on_demand;
pub mod pki;
mod private;
pub mod session;
pub mod stdio;
pub mod supervisor;
