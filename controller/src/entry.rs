//! How this program becomes agent and payload: the entry in a test binary or in a `main`, and the role of a block.
//!
//! The roles of the agent are its own; this room adds the one that calls a registered function. A program without an
//! entry is told which line to add, before anything is started.

use std::{
    ffi::OsString,
    io::{self, Write as _},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use millstream_agent::entry::{MOVED_STDERR, MOVED_STDOUT, ROLE_VARIABLE, Relaunch, Role, dispatch_and_exit};

use crate::{
    alone,
    block::{
        function::{Arguments, BlockFailure, Function},
        payload::ARGUMENTS_VARIABLE,
    },
    context::{BlockContext, outside_of_runtimes},
};

/// Lets a test binary be its own agent and the payload of its own Rust blocks. Write it once, at the top of the file.
///
/// It adds an ignored test that returns at once, unless this program has been started to do something for another test.
/// A program with a `main` of its own calls [`enter`] there instead; in such a program this does nothing.
#[macro_export]
macro_rules! entry {
    () => {
        #[cfg(test)]
        #[test]
        #[ignore = "lets this binary be agent and payload of its own tests"]
        #[doc(hidden)]
        fn __millstream_entry() {
            $crate::__private::enter_test();
        }

        #[cfg(test)]
        const _: () = {
            // Does not compile where a test harness would not find the function above.
            const _: fn() = self::__millstream_entry;

            #[$crate::__private::linkme::distributed_slice($crate::__private::ENTRIES)]
            #[linkme(crate = $crate::__private::linkme)]
            #[allow(unsafe_code, reason = "a registration is a static in a section of its own")]
            static MODULE: &str = ::core::module_path!();
        };
    };
}

/// Modules that have an `entry!()`.
#[linkme::distributed_slice]
pub static ENTRIES: [&'static str];

/// Whether `main` has called [`enter`].
static ENTERED: AtomicBool = AtomicBool::new(false);

/// First line of a `main` that opens streams: lets the program be its own agent and the payload of its own Rust blocks.
///
/// Returns at once in an ordinary run. In a process that was started to do something for another, it does that and ends
/// the process; and so it does when the variable `MILLSTREAM_ALONE` names a block to be run alone
/// ([`run_alone`](crate::run_alone)).
pub fn enter() {
    ENTERED.store(true, Ordering::Relaxed);
    // A `main` may be asynchronous; what runs here starts a runtime of its own.
    outside_of_runtimes(|| dispatch_and_exit(Some(run_block)));
    run_alone_and_exit();
}

/// Runs the block that the environment names, if it names one, and ends the process with its exit code.
fn run_alone_and_exit() {
    if let Some(code) = outside_of_runtimes(alone::run_named) {
        let _flushed: io::Result<()> = io::stdout().flush();
        std::process::exit(code.into());
    }
}

/// What the hidden test of [`entry!`](crate::entry) does.
#[doc(hidden)]
pub fn enter_test() {
    dispatch_and_exit(Some(run_block));
    run_alone_and_exit();
}

/// Why this program cannot be started again.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// No entry.
    #[error(
        "nothing lets this program be started as an agent or a block: add the line `millstream::entry!();` to the test file, or call `millstream::enter()` first in its `main`"
    )]
    NoEntry,
    /// This very process was started for another and went past its entry.
    #[error(
        "this program was started as `{role}` but did other things first: call `millstream::enter()` in the first line of its `main`"
    )]
    Missed {
        /// The role.
        role: String,
    },
    /// The program cannot be found.
    #[error("the path of this program cannot be told: {reason}")]
    Program {
        /// What the system said.
        reason: String,
    },
}

/// How to start this program again.
///
/// # Errors
/// When nothing in it would notice why it was started.
pub(crate) fn relaunch() -> Result<Relaunch, EntryError> {
    if let Some(role) = std::env::var_os(ROLE_VARIABLE) {
        return Err(EntryError::Missed { role: role.to_string_lossy().into_owned() });
    }
    static PROGRAM: OnceLock<Result<std::path::PathBuf, EntryError>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        std::env::current_exe().map_err(|error| EntryError::Program { reason: error.to_string() })
    });
    let program = program.clone()?;
    // Building the test anew while it runs takes its program away.
    if !program.exists() {
        let reason = format!("`{}` was replaced or removed while it ran", program.display());
        return Err(EntryError::Program { reason });
    }
    if ENTERED.load(Ordering::Relaxed) {
        return Ok(Relaunch::of_program(program));
    }
    let module = ENTRIES.first().ok_or(EntryError::NoEntry)?;
    // Names of tests do not begin with the crate, module paths do.
    let test = match module.split_once("::") {
        Some((_, inner)) => format!("{inner}::__millstream_entry"),
        None => "__millstream_entry".to_owned(),
    };
    Ok(Relaunch::of_test_binary(program, &test))
}

/// This program, and shell commands that make a copy of it, whose path is in `$program`, a relay to the agent of its host
/// that greets with `$token`.
///
/// # Errors
/// As [`relaunch`].
pub(crate) fn as_relay() -> Result<(std::path::PathBuf, String), EntryError> {
    let again = relaunch()?;
    let quoted = |text: &OsString| millstream_common::text::quoted(&text.to_string_lossy());
    let mut script = String::new();
    for (name, value) in again.environment(Role::Stdio, &["$token".into()]) {
        // The one argument is the shell's to fill in.
        let value = if value == "$token" { "\"$token\"".to_owned() } else { quoted(&value) };
        script += &format!("export {}={value}; ", name.to_string_lossy());
    }
    script += "exec \"$program\"";
    for argument in &again.arguments {
        script += &format!(" {}", quoted(argument));
    }
    if again.moved_output {
        // What its harness prints must not be taken for the relay's. Why it does not run at all is still to be seen.
        script += &format!(" {MOVED_STDOUT}>&1 {MOVED_STDERR}>&2 >/dev/null");
    }
    Ok((again.program, script))
}

/// Exit code of a block that could not be called.
const EXIT_UNUSABLE: u8 = 125;
/// Exit code of a block that panicked: what a Rust program has by itself.
const EXIT_PANICKED: u8 = 101;

/// Calls one registered function, in a process that was started for it.
fn run_block(arguments: Vec<OsString>) -> ExitCode {
    let code = match prepare(&arguments) {
        Err(message) => {
            complain(&format!("error: {message}"));
            EXIT_UNUSABLE
        }
        // The context outlives a panic only to be dropped.
        Ok((function, mut context, arguments)) => {
            match catch_unwind(AssertUnwindSafe(|| (function.run)(&mut context, arguments))) {
                // Nothing is left for a block without a value: most tasks then have no archive at all.
                Ok(Ok(value)) if value == "null" => 0,
                Ok(Ok(value)) => match context.leave_value(&value) {
                    Ok(()) => 0,
                    Err(error) => {
                        complain(&format!("error: {}", BlockFailure::from(error)));
                        1
                    }
                },
                Ok(Err(failure)) => {
                    complain(&format!("error: {failure}"));
                    1
                }
                // The message and its place were printed when it panicked.
                Err(_) => EXIT_PANICKED,
            }
        }
    };
    let _flushed: io::Result<()> = io::stdout().flush();
    ExitCode::from(code)
}

fn prepare(arguments: &[OsString]) -> Result<(&'static Function, BlockContext, Arguments), String> {
    let key = arguments.first().and_then(|key| key.to_str()).ok_or("no block was named")?;
    let function = Function::find(key).ok_or_else(|| {
        format!("this program has no block `{key}`: it is not the one that the controller runs")
    })?;
    let context = BlockContext::from_environment().map_err(|error| error.to_string())?;
    let path = std::env::var_os(ARGUMENTS_VARIABLE)
        .ok_or_else(|| format!("the environment lacks {ARGUMENTS_VARIABLE}"))?;
    let text = std::fs::read_to_string(&path)
        .map_err(|error| format!("the arguments in `{}` cannot be read: {error}", path.display()))?;
    let arguments = Arguments::parse(&text)
        .map_err(|error| format!("the arguments in `{}` cannot be read: {error}", path.display()))?;
    Ok((function, context, arguments))
}

/// Standard error may be closed; then there is nobody to tell.
fn complain(message: &str) {
    let _told: io::Result<()> = writeln!(io::stderr(), "{message}");
}
