//! Blobs and archives on their way in and out.
