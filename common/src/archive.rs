//! Archives of results: tar out, tar in; nothing can leave its directory.
