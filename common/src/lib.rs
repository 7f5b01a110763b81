//! What both ends of Millstream share.
//!
//! Imports point one way: `proto <- common <- agent <- controller`. Nothing here starts a process, owns a session or
//! schedules a task. The rooms marked pure ([`id`], [`limits`], [`outcome`], [`spec`], [`text`]) touch no files, no clock
//! and no runtime.

pub mod archive;
pub mod clock;
pub mod convert;
pub mod framing;
pub mod id;
pub mod limits;
pub mod log;
pub mod outcome;
pub mod pipe;
pub mod protocol;
pub mod spec;
pub mod sync_client;
pub mod text;
pub mod tls;
pub mod tree;
pub mod yaml;
