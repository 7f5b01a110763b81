//! The `millstream-agent` program: arguments, tracing, run, exit code.

fn main() -> std::process::ExitCode {
    millstream_agent::entry::dispatch().unwrap_or_default()
}
