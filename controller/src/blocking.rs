//! The same API for tests without an async runtime.
