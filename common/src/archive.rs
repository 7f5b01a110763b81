//! Results as an archive: tar out of a directory, tar into a directory. Nothing can leave its directory.
//!
//! The archive of a task has the entries `whiteboard` and `data/…`, in strict ustar with PAX headers where names or sizes
//! need them: regular files, directories and symbolic links that stay inside. [`pack()`] leaves out whatever else it finds and
//! says so; [`Extractor`] refuses whatever else it is given, because there only a fault or an attack can be its source.
//! Both work through directory handles and follow no link. Neither knows where an archive travels, or of which task it is.

mod extract;
mod header;
mod pack;
#[cfg(test)]
mod tests;

pub use extract::{ExtractError, Extracted, Extractor};
pub use header::Refusal;
pub use pack::{PackError, Packed, pack};

/// Entry for the whiteboard of a task.
pub const WHITEBOARD: &str = "whiteboard";
/// Entry for the output directory of a task.
pub const DATA: &str = "data";
