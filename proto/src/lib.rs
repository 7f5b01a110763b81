//! The wire, and nothing else: the generated messages and services of `millstream.v1`.
//!
//! The `.proto` files beside this crate are the documentation; their comments are repeated on the generated items and
//! travel with [`FILE_DESCRIPTOR_SET`], so that server reflection shows them to people. No code here decides anything:
//! a message becomes a value of the domain in `millstream_common::convert`, and nowhere else.

/// Services and messages between controllers, agents and blocks.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("millstream.v1");
}

/// Frames between an agent's front door and the supervisors that it has started. Not for users.
pub mod supervisor {
    /// Version 1 of the frames.
    #[allow(
        missing_docs,
        missing_debug_implementations,
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        clippy::restriction,
        reason = "generated"
    )]
    pub mod v1 {
        tonic::include_proto!("millstream.supervisor.v1");
    }
}

/// Everything that reflection needs: all files with their imports and comments, encoded as a `FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/millstream.v1.descriptors.bin"));
