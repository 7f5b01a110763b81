//! What can go wrong for the user of the library, one enum an operation.
