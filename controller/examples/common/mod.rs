//! What every example needs and none is about: where its streams are, where results go, and how it ends.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use millstream::{Params, Streams, StreamsBuilder, blocking::block_on};

/// The arguments that all examples take.
#[derive(Debug, Parser)]
pub(crate) struct Place {
    /// A file that says where the streams are; on this machine when not given. May be given again: a later file adds to
    /// those before it and has the last word.
    #[arg(long)]
    streams: Vec<PathBuf>,
    /// Where results go.
    #[arg(long, default_value = "results")]
    results: PathBuf,
}

impl Place {
    /// Begins to open the streams of a test.
    pub(crate) fn builder(&self, test: &str) -> millstream::Result<StreamsBuilder> {
        let builder = Streams::builder(test).results_dir(&self.results);
        Ok(if self.streams.is_empty() { builder } else { builder.params(Params::load_all(&self.streams)?) })
    }
}

/// Runs an example with its arguments. The first thing that happens: this program may have been started as an agent, or as
/// the payload of a block.
pub(crate) fn main<A: Parser>(run: impl AsyncFnOnce(A) -> millstream::Result<()>) -> ExitCode {
    millstream::enter();
    match block_on(run(A::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}
