//! A block becomes the one primitive that agents know.
