//! Barriers and topics, hosted for blocks, for main and for people.

pub mod barrier;
pub mod board;
pub mod hopeless;
pub mod host;
pub mod relay;
pub mod service;
pub mod topic;
