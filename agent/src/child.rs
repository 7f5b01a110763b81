//! The agent of local streams: a child of the test, with its supervisor inside.
