//! The `millstream-agent` program: arguments, tracing, run, exit code.

fn main() {}
