//! A single-threaded subreaper for hosts without control groups of version 2.
