//! One barrier and its generations. Pure.
