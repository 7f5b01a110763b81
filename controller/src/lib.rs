//! Blocks of code in streams on many hosts from inside one test, held at barriers.

pub mod block;
pub mod blocking;
pub mod context;
pub mod definition;
pub mod driver;
pub mod entry;
pub mod error;
pub mod link;
pub mod outcome;
pub mod params;
pub mod queue;
pub mod reach;
pub mod results;
pub mod stream;
pub mod streams;
pub mod sync;
pub mod task;
pub mod topology;
