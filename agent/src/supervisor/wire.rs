//! Frames between the door and a supervisor: a length of 4 bytes, big-endian, and one message.
//!
//! Both directions are the same code. A frame longer than [`limits::SUPERVISOR_FRAME_BYTES_MAX`] is refused before any
//! memory is taken for it. Nothing here knows what a frame means.

use std::io;

use bytes::{Buf as _, BufMut as _, BytesMut};
use millstream_common::limits;
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Version of the frames, told in both hellos.
pub(crate) const PROTOCOL: u32 = 1;

/// Bytes of the length.
const HEADER_BYTES: usize = 4;
/// What a read asks for at least: most frames are far smaller.
const READ_BYTES: usize = 16 * 1024;

/// Why frames can no longer be exchanged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// The connection broke.
    #[error("the connection between agent and supervisor broke")]
    Broken(#[source] io::Error),
    /// The other end went away within a frame.
    #[error("the other end went away after {had} of {wanted} bytes of a frame")]
    Torn {
        /// Bytes that came.
        had: usize,
        /// Bytes of the frame.
        wanted: usize,
    },
    /// A frame is longer than any may be.
    #[error("a frame of {length} bytes is refused: at most {limit} are allowed", limit = limits::SUPERVISOR_FRAME_BYTES_MAX)]
    TooLong {
        /// Its length.
        length: usize,
    },
    /// The bytes are no message.
    #[error("a frame cannot be understood")]
    Garbled(#[source] prost::DecodeError),
}

/// Appends one frame to `out`.
///
/// # Errors
/// When the message is longer than a frame may be; `out` is as before.
pub(crate) fn encode<M: Message>(message: &M, out: &mut BytesMut) -> Result<(), WireError> {
    let length = message.encoded_len();
    let fits = u32::try_from(length).ok().filter(|_| length <= limits::SUPERVISOR_FRAME_BYTES_MAX);
    let Some(header) = fits else { return Err(WireError::TooLong { length }) };
    out.reserve(HEADER_BYTES + length);
    out.put_u32(header);
    message.encode(out).expect("the space was reserved");
    Ok(())
}

/// Bytes that came, on their way to being frames.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// The next complete frame, if it is there.
    ///
    /// # Errors
    /// When the frame is too long or no message; then nothing that follows can be trusted.
    pub(crate) fn next<M: Message + Default>(&mut self) -> Result<Option<M>, WireError> {
        let Some(length) = self.length()? else { return Ok(None) };
        if self.buffer.len() < HEADER_BYTES + length {
            // Room for the whole frame, so that a long one is read in few steps.
            self.buffer.reserve(HEADER_BYTES + length - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        // Shared, not copied: the `bytes` fields of the message point into it.
        let frame = self.buffer.split_to(length).freeze();
        M::decode(frame).map(Some).map_err(WireError::Garbled)
    }

    fn length(&self) -> Result<Option<usize>, WireError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*header)).unwrap_or(usize::MAX);
        if length > limits::SUPERVISOR_FRAME_BYTES_MAX {
            return Err(WireError::TooLong { length });
        }
        Ok(Some(length))
    }

    /// Where the next bytes are to be put.
    pub(crate) fn space(&mut self) -> &mut BytesMut {
        self.buffer.reserve(READ_BYTES);
        &mut self.buffer
    }

    /// Whether the other end may go away now: no frame has begun.
    fn end(&self) -> Result<(), WireError> {
        match self.length()? {
            None if self.buffer.is_empty() => Ok(()),
            length => {
                Err(WireError::Torn { had: self.buffer.len(), wanted: HEADER_BYTES + length.unwrap_or(0) })
            }
        }
    }
}

/// Reads frames.
#[derive(Debug)]
pub(crate) struct FrameReader<R> {
    source: R,
    decoder: Decoder,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `source`.
    pub(crate) fn new(source: R) -> Self {
        Self { source, decoder: Decoder::default() }
    }

    /// The next frame, or nothing when the other end has closed the connection between two frames.
    ///
    /// # Errors
    /// When the connection broke or what came is no frame.
    ///
    /// # Cancel safety
    /// Safe: what was read is kept for the next call.
    pub(crate) async fn next<M: Message + Default>(&mut self) -> Result<Option<M>, WireError> {
        loop {
            if let Some(frame) = self.decoder.next()? {
                return Ok(Some(frame));
            }
            if self.source.read_buf(self.decoder.space()).await.map_err(WireError::Broken)? == 0 {
                return self.decoder.end().map(|()| None);
            }
        }
    }
}

/// Writes frames.
#[derive(Debug)]
pub(crate) struct FrameWriter<W> {
    target: W,
    buffer: BytesMut,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes to `target`.
    pub(crate) fn new(target: W) -> Self {
        Self { target, buffer: BytesMut::new() }
    }

    /// Adds a frame to what will be written by [`Self::flush`].
    ///
    /// # Errors
    /// When the message is longer than a frame may be.
    pub(crate) fn push<M: Message>(&mut self, message: &M) -> Result<(), WireError> {
        encode(message, &mut self.buffer)
    }

    /// Bytes that wait to be written.
    pub(crate) fn pending_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Writes everything that was pushed.
    ///
    /// # Errors
    /// When the connection broke.
    ///
    /// # Cancel safety
    /// Safe: what was not written is kept for the next call.
    pub(crate) async fn flush(&mut self) -> Result<(), WireError> {
        while !self.buffer.is_empty() {
            if self.target.write_buf(&mut self.buffer).await.map_err(WireError::Broken)? == 0 {
                return Err(WireError::Broken(io::ErrorKind::WriteZero.into()));
            }
        }
        self.target.flush().await.map_err(WireError::Broken)
    }

    /// Writes one frame.
    ///
    /// # Errors
    /// When the message is too long or the connection broke.
    ///
    /// # Cancel safety
    /// Safe: what was not written is kept and goes out with the next frame.
    pub(crate) async fn send<M: Message>(&mut self, message: &M) -> Result<(), WireError> {
        self.push(message)?;
        self.flush().await
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use millstream_proto::supervisor::v1::{
        DoorFrame, DoorHello, Reply, SupervisorFrame, door_frame, supervisor_frame,
    };
    use proptest::prelude::*;

    use super::*;

    fn reply(number: u64, text: &str) -> SupervisorFrame {
        let reply = Reply { request_id: number, message: text.to_owned(), ..Reply::default() };
        SupervisorFrame { frame: Some(supervisor_frame::Frame::Reply(reply)) }
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_wherever_they_are_cut(
            texts in prop::collection::vec(".{0,200}", 0..8),
            cuts in prop::collection::vec(1_usize..64, 1..200),
        ) {
            let mut wire = BytesMut::new();
            for (number, text) in texts.iter().enumerate() {
                encode(&reply(number as u64, text), &mut wire).unwrap();
            }
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            let mut cuts = cuts.iter().cycle();
            while !wire.is_empty() {
                let cut = (*cuts.next().unwrap()).min(wire.len());
                decoder.space().extend_from_slice(&wire.split_to(cut));
                while let Some(frame) = decoder.next::<SupervisorFrame>().unwrap() {
                    got.push(frame);
                }
            }
            let sent: Vec<_> = texts.iter().enumerate().map(|(n, text)| reply(n as u64, text)).collect();
            prop_assert_eq!(got, sent);
            prop_assert!(decoder.end().is_ok());
        }
    }

    #[tokio::test]
    async fn both_directions_share_a_connection() {
        let (door, supervisor) = tokio::io::duplex(64);
        let (door_read, door_write) = tokio::io::split(door);
        let (supervisor_read, supervisor_write) = tokio::io::split(supervisor);
        let hello = DoorHello { protocol: PROTOCOL, incarnation: "x".repeat(500) };
        let sent = DoorFrame { request_id: 0, frame: Some(door_frame::Frame::Hello(hello)) };
        let (mut to_supervisor, mut to_door) =
            (FrameWriter::new(door_write), FrameWriter::new(supervisor_write));
        let (mut at_supervisor, mut at_door) =
            (FrameReader::new(supervisor_read), FrameReader::new(door_read));
        let answer = reply(1, "there");
        let (a, b, got, told) = tokio::join!(
            to_supervisor.send(&sent),
            to_door.send(&answer),
            at_supervisor.next::<DoorFrame>(),
            at_door.next::<SupervisorFrame>(),
        );
        a.unwrap();
        b.unwrap();
        assert_eq!(got.unwrap(), Some(sent));
        assert_eq!(told.unwrap(), Some(answer));
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_by_its_header_alone() {
        let mut reader = FrameReader::new(&[0xff_u8, 0xff, 0xff, 0xff][..]);
        let error = reader.next::<DoorFrame>().await.unwrap_err();
        assert!(matches!(error, WireError::TooLong { length: 0xffff_ffff }), "{error}");
        let long = reply(1, &"x".repeat(limits::SUPERVISOR_FRAME_BYTES_MAX));
        assert!(matches!(encode(&long, &mut BytesMut::new()), Err(WireError::TooLong { .. })));
    }

    #[tokio::test]
    async fn going_away_is_clean_between_frames_only() {
        assert!(FrameReader::new(&[][..]).next::<DoorFrame>().await.unwrap().is_none());
        let error = FrameReader::new(&[0, 0, 0, 9, 1][..]).next::<DoorFrame>().await.unwrap_err();
        assert_eq!(error.to_string(), "the other end went away after 5 of 13 bytes of a frame");
        let garbled = Bytes::from_static(&[0, 0, 0, 2, 0xff, 0xff]);
        let error = FrameReader::new(&garbled[..]).next::<DoorFrame>().await.unwrap_err();
        assert!(matches!(error, WireError::Garbled(_)), "{error}");
    }
}
