//! Content-addressed files that controllers have shipped.
