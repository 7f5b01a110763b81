//! A byte pipe that gRPC can be served on and dialled through.
