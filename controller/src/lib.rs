//! Blocks of code in *streams* on many hosts from inside one test, held at *barriers*.
//!
//! A [`Block`] is a piece of code: shell text, a program, Python, a script, or a Rust function of this very file. A
//! [`Stream`] is a named place where blocks run one after another: on this machine, or on any host where an agent runs.
//! A [`Task`] is one block scheduled on one stream, and an [`Outcome`] is what came of it.
//!
//! ```no_run
//! use millstream::{BlockContext, BlockResult, Ready, Streams, shell};
//!
//! millstream::entry!(); // lets this test binary be the agent of local streams, and the payload of its own blocks
//!
//! #[millstream::block]
//! fn greet(ctx: &mut BlockContext, name: String) -> BlockResult {
//!     ctx.barrier("met", 2)?; // waits for the other stream
//!     ctx.whiteboard(format!("hello {name}"))?;
//!     Ok(())
//! }
//!
//! # #[tokio::main]
//! async fn two_streams_meet() -> millstream::Result<()> {
//!     let streams = Streams::open("two_streams_meet")?; // connects nothing: streams start when first used
//!     let server = streams.get("server")?.run_bg(shell("echo listening; millstream-sync barrier met 2; sleep 60"));
//!     server.ready(Ready::log("listening")).await?;
//!     let outcome = streams.get("client")?.run_fg(greet("world".to_owned())).await?;
//!     println!("{}", outcome.whiteboard());
//!     server.stop().await; // ends as `stopped`, which is no failure
//!     streams.wait().await?; // every unexpected end of any task, one failure for each cause
//!     streams.close().await
//! }
//! # fn main() -> millstream::Result<()> { two_streams_meet() }
//! ```
//!
//! Where streams run is data: `MILLSTREAM_STREAMS=server=tls://foo.example.com,client=local` moves the test above to
//! another host. See [`definition`] for files, [`reach`] for places of your own, and [`conformance`] for whether they are sound.
//!
//! # Bird's eye
//!
//! Handles ([`Streams`], [`Stream`], [`Task`]) number what is scheduled and hand it to the *driver*, one loop on a thread
//! of its own. It feeds one pure queue for each stream, and one *link* for each agent, which keeps a session there by
//! a lease. Agents run what blocks were compiled to and know none of their kinds. Barriers and topics are hosted here
//! ([`sync`]) and reached by blocks through their agent. Results are written while they arrive ([`results`]).
//!
//! No call needs a runtime, and [`blocking`] has the waits for plain tests.

// The macros name this crate as its users do; its own tests use them, too.
#[cfg(test)]
extern crate self as millstream;

pub mod alone;
pub mod block;
pub mod blocking;
pub mod conformance;
pub mod context;
pub mod definition;
mod driver;
pub mod entry;
pub mod error;
mod link;
mod nested;
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

pub use alone::run_alone;
pub use block::function::{BlockFailure, BlockResult};
pub use block::{
    Block, BlockError, BlockReference, Command, Resolution, ResolveError, Resolver, exec, python, reference,
    script, shell,
};
pub use context::{BlockContext, ContextError};
pub use definition::{DefineStreamError, Definition, DefinitionFault};
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
    ValueError,
};
pub use params::{
    DefineStreamsError, GetParamError, Origin, Params, ReadParamsError, Reference, ReferenceError,
    SetParamError,
};
pub use results::{Layout, WriteResultsError};
pub use stream::{Blocks, StartError, Started, Stream, StreamGroup, start_together};
pub use streams::{CloseError, MeetError, OpenError, Parties, StreamError, Streams, StreamsBuilder};
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
