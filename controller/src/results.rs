//! Results on disk: where everything lies, and how it gets there while tasks run.
//!
//! [`layout`] names every path, [`lines`] makes lines of pieces, [`timeline`] brings the clocks of hosts together,
//! [`report`] is what the JSON files say, and [`writer`] alone touches the disk. Nothing here decides when a task is over.

pub(crate) mod layout;
pub(crate) mod lines;
pub(crate) mod nested;
pub(crate) mod report;
pub(crate) mod timeline;
pub(crate) mod writer;

pub use layout::Layout;
pub use writer::WriteResultsError;
