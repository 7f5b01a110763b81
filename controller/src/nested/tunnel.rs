//! A byte pipe through a call: pieces both ways, no more of them under way than the other end has room for.
//!
//! The relay that carries the call has no flow control of its own and ends a call whose reader is slow; so each end counts
//! what the other has taken. Both ends are the same.

use bytes::{Bytes, BytesMut};
use millstream_common::pipe::BoxedPipe;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{Semaphore, mpsc},
};
use tokio_stream::{Stream, StreamExt as _};

/// Pieces with data that may be under way in each direction. With as many answers to those of the other direction they fit
/// into the 16 messages of one call that the relay keeps for a slow reader.
const WINDOW_COUNT: usize = 6;
/// Bytes of one piece.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces that wait for the call: everything that may be under way.
pub(super) const OUTBOUND_COUNT_MAX: usize = 2 * WINDOW_COUNT + 1;

/// What travels.
#[derive(Debug)]
pub(super) enum Piece {
    /// Bytes.
    Data(Bytes),
    /// So many pieces with data were taken.
    Taken(u32),
}

/// Carries bytes until one end of the pipe or of the call is over.
pub(super) async fn run(
    pipe: BoxedPipe,
    inbound: impl Stream<Item = Piece> + Send,
    outbound: mpsc::Sender<Piece>,
) {
    let (mut from_pipe, mut to_pipe) = tokio::io::split(pipe);
    let room = Semaphore::new(WINDOW_COUNT);
    let (queue, mut waiting) = mpsc::channel::<Bytes>(WINDOW_COUNT);

    let reading = async {
        let mut buffer = BytesMut::new();
        // The semaphore is never closed.
        while let Ok(permit) = room.acquire().await {
            permit.forget();
            buffer.reserve(PIECE_BYTES);
            let mut piece = (&mut from_pipe).take(PIECE_BYTES as u64);
            match piece.read_buf(&mut buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
            if outbound.send(Piece::Data(buffer.split().freeze())).await.is_err() {
                return;
            }
        }
    };
    let hearing = async {
        let mut inbound = std::pin::pin!(inbound);
        while let Some(piece) = inbound.next().await {
            match piece {
                Piece::Taken(count) => room.add_permits((count as usize).min(WINDOW_COUNT)),
                // More than there is room for: the other end does not keep to what was agreed.
                Piece::Data(data) => {
                    if queue.try_send(data).is_err() {
                        break;
                    }
                }
            }
        }
        drop(queue);
    };
    let writing = async {
        while let Some(data) = waiting.recv().await {
            if to_pipe.write_all(&data).await.is_err() || to_pipe.flush().await.is_err() {
                return;
            }
            if outbound.send(Piece::Taken(1)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = reading => {}
        // What was heard before the end is written.
        ((), ()) = async { tokio::join!(hearing, writing) } => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    /// Two tunnels joined back to back, as the two ends of one call.
    fn joined() -> (tokio::io::DuplexStream, tokio::io::DuplexStream) {
        let (near, near_end) = tokio::io::duplex(16 * 1024);
        let (far, far_end) = tokio::io::duplex(16 * 1024);
        let (to_far, at_far) = mpsc::channel(OUTBOUND_COUNT_MAX);
        let (to_near, at_near) = mpsc::channel(OUTBOUND_COUNT_MAX);
        drop(tokio::spawn(run(Box::new(near_end), ReceiverStream::new(at_near), to_far)));
        drop(tokio::spawn(run(Box::new(far_end), ReceiverStream::new(at_far), to_near)));
        (near, far)
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_however_slowly_they_are_read() {
        let (near, far) = joined();
        let (mut near_read, mut near_write) = tokio::io::split(near);
        let (mut far_read, mut far_write) = tokio::io::split(far);
        let sent: Vec<u8> = (0..2_000_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        let (down, up) = (sent.clone(), sent.clone());
        let writing = tokio::spawn(async move {
            near_write.write_all(&down).await.unwrap();
            far_write.write_all(&up).await.unwrap();
            (near_write, far_write)
        });
        let mut got = vec![0; sent.len()];
        far_read.read_exact(&mut got).await.unwrap();
        assert!(got == sent);
        near_read.read_exact(&mut got).await.unwrap();
        assert!(got == sent);
        writing.await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_one_side_is_the_end_of_the_other() {
        let (mut near, mut far) = joined();
        near.write_all(b"last words").await.unwrap();
        drop(near);
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"last words");
    }
}
