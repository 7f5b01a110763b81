//! The `millstream-agent` program: arguments, tracing, run, exit code.

use std::process::ExitCode;

use millstream_agent::{cli, entry};

fn main() -> ExitCode {
    // Started again in another role, such as supervisor or in-block command: nothing else happens in this process.
    if let Some(code) = entry::dispatch() {
        return code;
    }
    cli::run()
}
