//! The parameter tree and its paths. Pure.
