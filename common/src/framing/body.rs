//! Bodies of gRPC calls as messages: what arrives is cut into them, what leaves is framed. For the two ends of the relay.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame};
use tonic::{Status, codegen::http::HeaderMap};

use super::{DeframeError, Deframer, framed};

/// What a body holds next.
#[derive(Debug)]
pub enum Piece {
    /// A message.
    Message(Bytes),
    /// What stands behind the last message.
    Trailers(HeaderMap),
    /// Nothing more.
    End,
}

/// Why a body has no next message.
#[derive(Debug, thiserror::Error)]
pub enum ReadError<E> {
    /// It broke off.
    #[error("the body broke off")]
    Broken(#[source] E),
    /// It holds something else than messages.
    #[error(transparent)]
    Framing(#[from] DeframeError),
    /// It ends too early.
    #[error("the body ends in the middle of a message")]
    Incomplete,
}

/// The messages of a body.
#[derive(Debug)]
pub struct Messages<B> {
    body: B,
    deframer: Deframer,
}

impl<B: Body<Data = Bytes> + Unpin> Messages<B> {
    /// Takes messages of at most `limit` bytes.
    pub fn new(body: B, limit: usize) -> Self {
        Self { body, deframer: Deframer::new(limit) }
    }

    /// What comes next. Not to be asked again after an error, the trailers or the end.
    ///
    /// # Errors
    /// When the body cannot be read on.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Piece, ReadError<B::Error>>> {
        loop {
            if let Some(message) = self.deframer.next_message()? {
                return Poll::Ready(Ok(Piece::Message(message)));
            }
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Err(ReadError::Broken(error))),
                None if self.deframer.is_between_messages() => return Poll::Ready(Ok(Piece::End)),
                None => return Poll::Ready(Err(ReadError::Incomplete)),
            };
            match frame.into_data() {
                Ok(data) => self.deframer.push(data),
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        return Poll::Ready(Ok(Piece::Trailers(trailers)));
                    }
                }
            }
        }
    }

    /// The same as a future.
    ///
    /// # Errors
    /// When the body cannot be read on.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Piece, ReadError<B::Error>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }
}

/// A message as a piece of a body.
#[must_use]
pub fn message_frame(message: &[u8]) -> Frame<Bytes> {
    Frame::data(framed(message))
}

/// The end of a call as the last piece of its body.
#[must_use]
pub fn end_frame(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    // Fails only for a message that cannot be a header; it is encoded so that it can.
    drop(status.add_header(&mut trailers));
    Frame::trailers(trailers)
}
