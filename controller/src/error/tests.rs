//! Texts of errors that no test can bring about without breaking the machine it runs on: as users would read them.

use std::{fmt::Write as _, io, path::PathBuf};

use expect_test::{Expect, expect};

use crate::{
    CloseError, DefineStreamsError, EntryError, OpenError, WriteResultsError,
    block::{BlockError, function::ArgumentError, payload::PayloadError},
    context::ContextError,
    nested::inside::ListError,
    reach::{DialError, PlaceError},
    sync::{
        host::{AwaitError, EnterError, PublishError},
        port::ListenError,
    },
};

fn check(errors: &[&dyn std::error::Error], expected: &Expect) {
    let mut told = String::new();
    for error in errors {
        write!(told, "{error}").unwrap();
        let mut cause = error.source();
        while let Some(error) = cause {
            // Some show what the system said in words of their own.
            if !told.ends_with(&error.to_string()) {
                write!(told, ": {error}").unwrap();
            }
            cause = error.source();
        }
        told.push('\n');
    }
    expected.assert_eq(&told);
}

fn denied() -> io::Error {
    io::Error::from_raw_os_error(13)
}

#[test]
fn programs_that_cannot_be_started_again() {
    let program = PathBuf::from("/tests/first");
    check(
        &[
            &EntryError::NoEntry,
            &EntryError::Missed { role: "child".into() },
            &EntryError::Program { reason: "no /proc".into() },
            &BlockError::Function(PayloadError::Entry(EntryError::NoEntry)),
            &PayloadError::Ambiguous { key: "tests::run" },
            &PayloadError::ProgramName { program: program.clone() },
            &DialError::NoLocalAgent,
            &DialError::LocalAgent { program, reason: "it ended with exit status: 1".into() },
            &OpenError::Driver(io::Error::from_raw_os_error(11)),
            &ArgumentError::Missing { name: "seconds" },
            &ArgumentError::Unreadable {
                name: "seconds",
                source: serde_json::from_str::<u32>("x").unwrap_err(),
            },
        ],
        &expect![[r#"
            nothing lets this program be started as an agent or a block: add the line `millstream::entry!();` to the test file, or call `millstream::enter()` first in its `main`
            this program was started as `child` but did other things first: call `millstream::enter()` in the first line of its `main`
            the path of this program cannot be told: no /proc
            the function cannot be run as a block: this program cannot be started again: nothing lets this program be started as an agent or a block: add the line `millstream::entry!();` to the test file, or call `millstream::enter()` first in its `main`
            two functions are registered as `tests::run`: give one another name
            the path of this program is not UTF-8: `/tests/first`
            no agent can be started for local streams: this program does not call `millstream::entry!();` and `millstream-agent` is not in PATH. Add the line `millstream::entry!();` to the file of the test
            the agent for local streams, `/tests/first`, did not start: it ended with exit status: 1
            the driver cannot be started: Resource temporarily unavailable (os error 11)
            argument `seconds` was not sent: the host runs another version of this program
            argument `seconds` cannot be read back from JSON: expected value at line 1 column 1
        "#]],
    );
}

#[test]
fn places_that_cannot_be_reached() {
    let (kind, address) = ("unix".to_owned(), "agent.sock".to_owned());
    check(
        &[
            &PlaceError::Address { kind, address, reason: "the path is not absolute".into() },
            &PlaceError::Credentials { place: "tls://lab".into(), reason: "there is no key".into() },
            &DialError::Resolve { host: "lab".into(), source: io::Error::other("no such name") },
            &DialError::Refused { address: "tls://lab".into(), reason: "unknown authority".into() },
            &DefineStreamsError::Variable,
        ],
        &expect![[r#"
            `unix` cannot use the address `agent.sock`: the path is not absolute
            tls://lab cannot be reached: there is no key
            failed to find an address for `lab`: no such name
            tls://lab refused the connection, or was refused: unknown authority
            MILLSTREAM_STREAMS is not UTF-8: write the path of a YAML file, or `name=url`, several with commas
        "#]],
    );
}

#[test]
fn surroundings_of_a_block_that_somebody_has_spoiled() {
    check(
        &[
            &ContextError::Variable { variable: "MILLSTREAM_TASK" },
            &ContextError::Stream("".parse::<millstream_common::id::StreamName>().unwrap_err()),
            &ContextError::Task("x".parse::<millstream_common::id::TaskId>().unwrap_err()),
            &ListError::Connect { socket: "/run/sync.sock".into(), reason: "it is gone".into() },
            &OpenError::Nested { reason: "it was not marked".into() },
        ],
        &expect![[r#"
            the environment lacks MILLSTREAM_TASK: this is no block of a stream, or it was removed
            MILLSTREAM_STREAM names no stream: the stream name is empty: give it at least one character
            MILLSTREAM_TASK is no number of a task: the task id `x` is not a UUID of version 7 in its canonical form
            failed to reach the controller through `/run/sync.sock`: it is gone
            streams cannot be opened inside this block: it was not marked
        "#]],
    );
}

#[test]
fn disks_and_ports_that_fail() {
    let path = || PathBuf::from("/results/t");
    check(
        &[
            &WriteResultsError::TooManyRuns { path: path() },
            &WriteResultsError::File { path: path(), source: denied() },
            &WriteResultsError::Archive {
                path: path(),
                source: millstream_common::archive::ExtractError::RefusedBefore,
            },
            &CloseError { left_behind: vec!["tls://lab: process 7 (sleep)".into()] },
            &ListenError::Listen { address: ([127, 0, 0, 1], 1).into(), source: denied() },
        ],
        &expect![[r#"
            `/results/t` holds 100000 runs of this test already: remove some
            failed to write the results file `/results/t`: Permission denied (os error 13)
            failed to take what the block left apart, in `/results/t`: the archive was refused before
            not everything could be tidied: tls://lab: process 7 (sleep)
            failed to listen on 127.0.0.1:1: Permission denied (os error 13)
        "#]],
    );
}

#[test]
fn tests_that_are_over() {
    let (name, topic) = ("met".parse().unwrap(), || "port".parse().unwrap());
    check(
        &[
            &EnterError::Over { name },
            &PublishError::Over { topic: topic() },
            &AwaitError::Over { topic: topic() },
        ],
        &expect![[r#"
            barrier `met` was not entered: the test is over
            nothing was published to topic `port`: the test is over
            topic `port` was not waited for: the test is over
        "#]],
    );
}
