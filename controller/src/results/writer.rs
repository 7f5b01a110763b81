//! Writes results while tasks run.
