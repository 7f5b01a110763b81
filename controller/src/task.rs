//! A block that was scheduled: its handle and its outcome.
