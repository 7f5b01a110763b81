//! One topic: an append-only list. Pure.
