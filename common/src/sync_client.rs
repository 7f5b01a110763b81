//! Barriers and topics over a Unix socket, as a block uses them.
