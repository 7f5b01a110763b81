//! Starts supervisors, finds those of an earlier agent, speaks with them.
