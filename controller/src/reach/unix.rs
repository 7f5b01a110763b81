//! A Unix socket of an agent on this machine.
