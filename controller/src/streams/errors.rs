//! Why streams cannot be had, opened, closed or met with.

use millstream_common::{
    id::{NameError, StreamName},
    text::counted,
};

use crate::{
    definition::DefineStreamError,
    params::{DefineStreamsError, SetParamError},
    reach::PlaceError,
    results::WriteResultsError,
    sync::host::{AwaitError, EnterError, PublishError},
};
/// Why a stream cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// It cannot have this name.
    #[error(transparent)]
    Name(NameError),
    /// Nobody defined it, and it is not to be defined on first use.
    #[error("stream `{name}` is not defined: there are {known}{}", nearest.as_ref().map(|word| format!(" (did you mean `{word}`?)")).unwrap_or_default())]
    Unknown {
        /// Its name.
        name: StreamName,
        /// The streams that there are.
        known: String,
        /// The one that was probably meant.
        nearest: Option<String>,
    },
    /// There are not as many.
    #[error("there is no stream {index}: {} defined", counted_are(*count))]
    NoIndex {
        /// The index.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// There is one of this name already.
    #[error("stream `{name}` is defined already: give the new one another name")]
    Taken {
        /// Its name.
        name: StreamName,
    },
    /// Its definition is not valid.
    #[error(transparent)]
    Definition(#[from] DefineStreamError),
    /// A single task has no place: it is neither the name of a stream nor a definition.
    #[error("`{}` is no defined stream{}, and no definition in one line either", place.escape_debug(), nearest.as_ref().map(|word| format!(" (did you mean `{word}`?)")).unwrap_or_default())]
    NoPlace {
        /// What was given.
        place: String,
        /// The stream that was probably meant.
        nearest: Option<String>,
        /// Why it is no definition.
        #[source]
        source: Box<StreamError>,
    },
    /// Its place cannot be had: its type is unknown, or does not take what it was told, or something that is kept elsewhere
    /// is not there. [`PlaceError`] says which.
    #[error("stream `{name}`, defined by {origin}: {reason}")]
    Place {
        /// Its name.
        name: StreamName,
        /// Where it was defined.
        origin: String,
        /// What is wrong.
        reason: PlaceError,
    },
    /// The pattern is no regular expression.
    #[error("`{pattern}` selects no streams: {reason}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
}

fn counted_are(count: usize) -> String {
    let verb = if count == 1 { "is" } else { "are" };
    format!("{} {verb}", counted(count, "stream"))
}

/// Why streams cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The test cannot have this name.
    #[error(transparent)]
    Name(NameError),
    /// A definition is not valid.
    #[error(transparent)]
    Definition(#[from] DefineStreamError),
    /// A stream cannot be had.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Definitions cannot be read, or one of them is not valid.
    #[error(transparent)]
    Definitions(#[from] DefineStreamsError),
    /// A parameter of the builder cannot be set.
    #[error(transparent)]
    Param(#[from] SetParamError),
    /// There is no place for results.
    #[error(transparent)]
    Results(#[from] WriteResultsError),
    /// The deadline or the lease is out of its bounds.
    #[error("{what} of {given} is not possible: at least {min}, at most {max}")]
    Span {
        /// Which.
        what: &'static str,
        /// What was given.
        given: String,
        /// The least.
        min: String,
        /// The most.
        max: String,
    },
    /// This is a block that has no streams.
    #[error("streams cannot be opened inside this block: {reason}")]
    Nested {
        /// Why, and what to do.
        reason: String,
    },
    /// The system has no thread to give.
    #[error("the driver cannot be started")]
    Driver(#[source] std::io::Error),
}

/// Why closing was not clean.
#[derive(Debug, Clone, thiserror::Error)]
#[error("not everything could be tidied: {}", .left_behind.join("; "))]
pub struct CloseError {
    /// What was left behind, in words.
    pub left_behind: Vec<String>,
}

/// Why main did not meet others, or was not told anything.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeetError {
    /// A name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A barrier was not passed.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// A value was not published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Values did not come.
    #[error(transparent)]
    Await(#[from] AwaitError),
}
