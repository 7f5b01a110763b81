//! Blocks of code in streams on many hosts from inside one test, held at barriers.

// The macros name this crate as its users do; its own tests use them, too.
#[cfg(test)]
extern crate self as millstream;

pub mod block;
pub mod blocking;
pub mod context;
pub mod definition;
mod driver;
pub mod entry;
pub mod error;
mod link;
pub mod outcome;
pub mod params;
mod queue;
pub mod reach;
pub mod results;
pub mod stream;
pub mod streams;
pub mod sync;
pub mod task;
mod topology;

pub use block::function::{BlockFailure, BlockResult};
pub use block::{Block, BlockError, Command, exec, python, script, shell};
pub use context::{BlockContext, ContextError};
pub use definition::{DefineStreamError, DefinitionFault};
pub use entry::{EntryError, enter};
pub use error::{Error, Result, UnexpectedEnd};
pub use millstream_common::{
    id::{BlockName, StreamName, TaskId, TestName},
    spec::ResourceLimits,
    sync_client::{Entry as BarrierEntry, Party, Released, SyncError},
};
pub use millstream_macros::block;
pub use outcome::{
    CausedBy, Exit, Expectation, Failure, FailureReport, Outcome, OutcomeKind, Phase, Reason, Report,
};
pub use params::{DefineStreamsError, GetParamError, Origin, Params, ReadParamsError};
pub use results::{Layout, WriteResultsError};
pub use stream::{StartError, Started, Stream, StreamGroup, start_together};
pub use streams::{CloseError, MeetError, OpenError, StreamError, Streams, StreamsBuilder};
pub use task::{LogLine, Logs, Prepared, Ready, ReadyError, Running, Task};

/// What the macros of this crate expand to. Not for users: it may change at any time.
#[doc(hidden)]
pub mod __private {
    pub use linkme;

    /// Compiles for types that can be arguments of a block.
    pub fn assert_travels<T: serde::Serialize + serde::de::DeserializeOwned>() {}

    pub use crate::{
        block::function::{Arguments, BlockReturn, Call, FUNCTIONS, Function},
        entry::{ENTRIES, enter_test},
    };
}
