//! Which barriers can no longer be met, and why. Pure.
