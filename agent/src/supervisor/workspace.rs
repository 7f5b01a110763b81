//! Directories of one task: make, fill, seal, pack, remove.
