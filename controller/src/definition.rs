//! Stream definitions from data. Pure.
