//! The collection of streams: what a test opens, waits for and closes.
