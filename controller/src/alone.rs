//! Blocks that run alone: what is written as a part of a scenario is also a program of its own.
//!
//! A block runs as ever, in a local stream with its own barriers, files and results; here its output goes where a program's
//! output goes, and its end becomes an exit code.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use crate::{
    block::{Block, reference},
    blocking::block_on,
    outcome::Outcome,
    streams::Streams,
    task::LogLine,
};

/// Names the block that a program with an entry is to run alone: a reference, such as a function's name.
pub const ALONE_VARIABLE: &str = "MILLSTREAM_ALONE";
/// Its parameters: a JSON object.
pub const ALONE_PARAMS_VARIABLE: &str = "MILLSTREAM_ALONE_PARAMS";

/// Exit code of a block that ended without one.
const EXIT_NONE: u8 = 1;
/// Exit code when nothing could be begun.
const EXIT_UNUSABLE: u8 = 125;

/// Runs one block on this machine, alone: its output is this program's output, and its exit code the result. Results lie
/// where they would for a test of the block's name. Blocks the thread.
///
/// A barrier that it enters must be for one party. Programs with [`enter`](crate::enter) or
/// [`entry!`](crate::entry!) run the block that the variable `MILLSTREAM_ALONE` names in this way, with the parameters of
/// `MILLSTREAM_ALONE_PARAMS`:
///
/// ```sh
/// MILLSTREAM_ALONE=netserver MILLSTREAM_ALONE_PARAMS='{"parties": 1}' cargo run --example netperf
/// ```
pub fn run_alone(block: impl Into<Block>) -> ExitCode {
    ExitCode::from(code_of(block.into()))
}

fn code_of(block: Block) -> u8 {
    block_on(run(block)).unwrap_or_else(|error| {
        complain(&format!("error: {error:?}"));
        EXIT_UNUSABLE
    })
}

async fn run(block: Block) -> crate::Result<u8> {
    let streams = Streams::builder(block.block_name().to_string())
        .only_given()
        .stream("alone", "local")
        .on_log(show)
        .open()?;
    let outcome = streams.get("alone")?.run_bg(block).outcome().await;
    let results = streams.results_dir().to_path_buf();
    streams.close().await?;
    if !outcome.passed() || !outcome.detail.is_empty() {
        complain(&outcome.sentence());
    }
    for line in outcome.whiteboard().lines() {
        complain(&format!("whiteboard: {}", millstream_common::text::printable(line.as_bytes(), 4096)));
    }
    complain(&format!("results: {}", results.display()));
    Ok(exit_code(&outcome))
}

/// Its own exit code when that says the same as its outcome.
fn exit_code(outcome: &Outcome) -> u8 {
    match outcome.exit_code().and_then(|code| u8::try_from(code).ok()) {
        _ if outcome.is_expected() => 0,
        Some(code) if code != 0 => code,
        _ => EXIT_NONE,
    }
}

/// As the block printed it: nobody stands between it and its terminal.
fn show(line: &LogLine) {
    let text = format!("{}\n", line.text);
    let _shown: io::Result<()> = if line.is_stderr {
        io::stderr().write_all(text.as_bytes())
    } else {
        io::stdout().write_all(text.as_bytes())
    };
}

/// Standard error may be closed; then there is nobody to tell.
fn complain(message: &str) {
    let _told: io::Result<()> = writeln!(io::stderr(), "{message}");
}

/// Runs the block that the environment names, if it names one.
pub(crate) fn run_named() -> Option<u8> {
    let text = std::env::var(ALONE_VARIABLE).ok()?;
    let mut block = reference(text);
    if let Ok(parameters) = std::env::var(ALONE_PARAMS_VARIABLE) {
        match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&parameters) {
            Ok(parameters) => {
                block = parameters.into_iter().fold(block, |block, (name, value)| block.param(name, value));
            }
            Err(error) => {
                complain(&format!(
                    "error: {ALONE_PARAMS_VARIABLE} is no JSON object, such as {{\"parties\": 1}}: {error}"
                ));
                return Some(EXIT_UNUSABLE);
            }
        }
    }
    Some(code_of(block))
}
