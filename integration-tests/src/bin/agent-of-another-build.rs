//! The real agent, but for what it says of itself: as an older or a newer build would, by `MILLSTREAM_TEST_BUILD`.

use std::{env, process::ExitCode};

use millstream_agent::{cli, entry};
use millstream_common::protocol::{Build, Spoken};

/// One that lacks whatever can be missing.
const OLDER: Build = Build { spoken: Spoken { version: "0.0.9", ..Spoken::OURS }, features: &[] };
/// One that speaks the next protocol as well, has what nobody here knows, and has dropped what this build knows.
const NEWER: Build = Build {
    spoken: Spoken { min: Spoken::OURS.max, max: Spoken::OURS.max + 1, version: "9.0.0" },
    features: &["hold", "teleport"],
};

fn main() -> ExitCode {
    if let Some(code) = entry::dispatch() {
        return code;
    }
    let build = env::var("MILLSTREAM_TEST_BUILD").unwrap_or_default();
    match build.as_str() {
        "older" => cli::run_as(OLDER),
        "newer" => cli::run_as(NEWER),
        build => panic!("MILLSTREAM_TEST_BUILD is `{build}`: it is `older` or `newer`"),
    }
}
