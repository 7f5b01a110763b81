//! Events and logs of tasks for those who watch, read from disk.
