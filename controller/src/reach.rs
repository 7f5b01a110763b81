//! Gives a byte pipe to an agent.

pub mod local;
pub mod tcp;
pub mod unix;
