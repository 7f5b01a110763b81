//! The front door: decodes, authorises, asks, encodes; runs no user code.

pub mod acceptor;
pub mod identity;
pub mod reload;
pub mod service;
pub mod status;
pub mod supervisors;
pub mod uploads;
pub mod watch;
