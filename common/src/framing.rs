//! Messages in a gRPC body: a flag, a 4-byte big-endian length, the bytes. Pure.
//!
//! For the two ends of the relay, which pass messages on without understanding them. Compression is not spoken here.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

pub mod body;

/// Bytes before each message.
const PREFIX_BYTES: usize = 5;

/// A body that holds something else than messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeframeError {
    /// The flag says that the message is compressed, or something unknown.
    #[error("a message has flag {flag}: only uncompressed messages are taken")]
    Flag {
        /// The flag.
        flag: u8,
    },
    /// The message is larger than is allowed.
    #[error("a message has {length} bytes: at most {limit} are allowed")]
    TooLong {
        /// Its length.
        length: usize,
        /// The bound.
        limit: usize,
    },
}

/// A message with its prefix.
///
/// # Panics
/// For a message of 4 GiB, which no limit lets come here.
#[must_use]
pub fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).expect("messages are bounded far below 4 GiB"));
    frame.put_slice(message);
    frame.freeze()
}

/// Cuts a body, which arrives in any pieces, into messages.
#[derive(Debug)]
pub struct Deframer {
    limit: usize,
    /// Nothing, or the only piece: passed on without copying.
    piece: Bytes,
    /// Pieces of a message that is not complete, once there are several.
    gathered: BytesMut,
}

impl Deframer {
    /// Takes messages of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, piece: Bytes::new(), gathered: BytesMut::new() }
    }

    /// Takes in the next piece of the body.
    pub fn push(&mut self, piece: Bytes) {
        if self.piece.is_empty() && self.gathered.is_empty() {
            self.piece = piece;
            return;
        }
        if self.gathered.is_empty() {
            self.gathered.extend_from_slice(&std::mem::take(&mut self.piece));
        }
        self.gathered.extend_from_slice(&piece);
    }

    /// The next complete message.
    ///
    /// # Errors
    /// When what stands there is no message, or one that is too large. The body is useless from there on.
    pub fn next_message(&mut self) -> Result<Option<Bytes>, DeframeError> {
        if self.gathered.is_empty() {
            let Some(length) = announced(&self.piece, self.limit)? else { return Ok(None) };
            if self.piece.len() < PREFIX_BYTES + length {
                return Ok(None);
            }
            self.piece.advance(PREFIX_BYTES);
            return Ok(Some(self.piece.split_to(length)));
        }
        let Some(length) = announced(&self.gathered, self.limit)? else { return Ok(None) };
        if self.gathered.len() < PREFIX_BYTES + length {
            return Ok(None);
        }
        self.gathered.advance(PREFIX_BYTES);
        Ok(Some(self.gathered.split_to(length).freeze()))
    }

    /// Whether the body may end here: nothing is left of a message.
    #[must_use]
    pub fn is_between_messages(&self) -> bool {
        self.piece.is_empty() && self.gathered.is_empty()
    }
}

/// Length of the message that begins here, once its prefix is there.
fn announced(bytes: &[u8], limit: usize) -> Result<Option<usize>, DeframeError> {
    let Some(&[flag, a, b, c, d]) = bytes.first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
    if flag != 0 {
        return Err(DeframeError::Flag { flag });
    }
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if length > limit {
        return Err(DeframeError::TooLong { length, limit });
    }
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_are_found_in_any_pieces(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            cuts in prop::collection::vec(1_usize..20, 0..40),
        ) {
            let mut body: Bytes = messages.iter().flat_map(|m| framed(m)).collect::<Vec<u8>>().into();
            let mut deframer = Deframer::new(40);
            let mut found = Vec::new();
            for cut in cuts.into_iter().chain([usize::MAX]) {
                deframer.push(body.split_to(cut.min(body.len())));
                while let Some(message) = deframer.next_message().unwrap() {
                    found.push(message.to_vec());
                }
            }
            prop_assert_eq!(found, messages);
            prop_assert!(deframer.is_between_messages());
        }
    }

    #[test]
    fn a_long_or_compressed_message_is_refused_by_its_prefix() {
        let mut deframer = Deframer::new(3);
        deframer.push(Bytes::from_static(&[0, 0, 0, 0, 4]));
        assert_eq!(deframer.next_message(), Err(DeframeError::TooLong { length: 4, limit: 3 }));
        let mut deframer = Deframer::new(3);
        deframer.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
        assert_eq!(deframer.next_message(), Err(DeframeError::Flag { flag: 1 }));
    }
}
