//! Results on disk.

pub mod layout;
pub mod report;
pub mod timeline;
pub mod writer;
