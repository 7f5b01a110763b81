//! The one error type that a test's `?` meets: it gathers the errors of single operations and adds nothing to them.

use std::{error::Error as StdError, fmt, sync::Arc};

use crate::{
    conformance::BrokenRules,
    outcome::{FailureReport, Outcome, ValueError},
    params::{GetParamError, ReadParamsError, SetParamError},
    results::WriteResultsError,
    stream::StartError,
    streams::{CloseError, MeetError, OpenError, StreamError},
    task::ReadyError,
};

/// What a test returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A task ended in a way that was not expected.
///
/// `Display` is the outcome's own sentence with the last lines of output.
#[derive(Clone)]
pub struct UnexpectedEnd(pub Arc<Outcome>);

impl fmt::Display for UnexpectedEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  results: {}", self.0, self.0.results.display())
    }
}

impl fmt::Debug for UnexpectedEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl StdError for UnexpectedEnd {}

/// Anything that can go wrong in a test's own calls, one variant for each operation.
///
/// `Debug` shows the same as `Display` and then each cause on a line of its own: it is what the test harness prints when
/// a test returns an error.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A task ended unexpectedly.
    #[error(transparent)]
    Task(#[from] UnexpectedEnd),
    /// Tasks ended unexpectedly.
    #[error(transparent)]
    Failures(#[from] FailureReport),
    /// Streams were not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A stream cannot be had.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A task was never ready.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// The value of a task cannot be had.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// Tasks were not started together.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Main did not meet others.
    #[error(transparent)]
    Meet(#[from] MeetError),
    /// Results of main were not written.
    #[error(transparent)]
    Results(#[from] WriteResultsError),
    /// Parameters were not read.
    #[error(transparent)]
    ReadParams(#[from] ReadParamsError),
    /// A parameter cannot be had.
    #[error(transparent)]
    GetParam(#[from] GetParamError),
    /// A parameter cannot be set.
    #[error(transparent)]
    SetParam(#[from] SetParamError),
    /// Not everything was tidied.
    #[error(transparent)]
    Close(#[from] CloseError),
    /// A reach is not sound.
    #[error(transparent)]
    Conformance(#[from] BrokenRules),
    /// The test's own reading or writing failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut cause = self.source();
        while let Some(error) = cause {
            write!(f, "\n  caused by: {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
