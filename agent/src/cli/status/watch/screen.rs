//! A page that is shown in place on a terminal: as much of it as there is room for, drawn again when the terminal has another
//! size, and gone without a trace at the end.

use std::io;

use rustix::termios::tcgetwinsize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::super::{StatusError, print};

/// The terminal's other screen, which programs in full use, without a cursor; and back.
const BEGIN: &str = "\x1b[?1049h\x1b[?25l";
const END: &str = "\x1b[?25h\x1b[?1049l";
/// What a terminal is taken for that does not say its size.
const SIZE: (usize, usize) = (24, 80);

/// What a person has done.
pub(super) enum Seen {
    /// The terminal has another size.
    Resized,
    /// Enough was seen.
    Ended,
}

/// The terminal, for as long as this lives.
pub(super) struct Screen {
    resized: Signal,
    interrupted: Signal,
    terminated: Signal,
}

impl Screen {
    pub(super) fn begin() -> Result<Self, StatusError> {
        let listen = |kind| signal(kind).map_err(StatusError::Print);
        let screen = Self {
            resized: listen(SignalKind::window_change())?,
            interrupted: listen(SignalKind::interrupt())?,
            terminated: listen(SignalKind::terminate())?,
        };
        print(BEGIN)?;
        Ok(screen)
    }

    /// Waits for a person to do something.
    pub(super) async fn seen(&mut self) -> Seen {
        tokio::select! {
            _ = self.resized.recv() => Seen::Resized,
            _ = self.interrupted.recv() => Seen::Ended,
            _ = self.terminated.recv() => Seen::Ended,
        }
    }

    /// Draws a page in the place of the one before; answers whether anybody looks.
    #[expect(clippy::unused_self, reason = "only who has the terminal may draw on it")]
    pub(super) fn show(&mut self, page: &str) -> Result<bool, StatusError> {
        let size = tcgetwinsize(io::stdout()).ok().map(|size| (size.ws_row.into(), size.ws_col.into()));
        print(&frame(page, size.filter(|size| *size > (0, 0)).unwrap_or(SIZE)))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone.
        drop(print(END));
    }
}

/// A page as it is drawn: each line over the one that was there, cut at the edge, and nothing below the last.
fn frame(page: &str, (rows, columns): (usize, usize)) -> String {
    let lines: Vec<&str> = page.lines().collect();
    let room = if lines.len() > rows { rows.saturating_sub(1) } else { lines.len() };
    let more = format!("… {} more lines: make the terminal higher", lines.len() - room);
    let shown = lines[..room].iter().copied().chain((room < lines.len()).then_some(more.as_str()));
    let cut = |line: &str| line.chars().take(columns).collect::<String>();
    let drawn: Vec<String> = shown.map(|line| cut(line) + "\x1b[K").collect();
    format!("\x1b[H{}\x1b[J", drawn.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_drawn_in_place_and_never_beyond_the_edge() {
        assert_eq!(frame("one\ntwo\n", (24, 80)), "\x1b[Hone\x1b[K\ntwo\x1b[K\x1b[J");
        assert_eq!(frame("äöü…\n", (24, 3)), "\x1b[Häöü\x1b[K\x1b[J");
        let page: String = (1..=5).map(|number| format!("line {number}\n")).collect();
        assert_eq!(
            frame(&page, (3, 80)),
            "\x1b[Hline 1\x1b[K\nline 2\x1b[K\n… 3 more lines: make the terminal higher\x1b[K\x1b[J"
        );
        assert_eq!(frame(&page, (5, 80)).matches('\n').count(), 4);
    }
}
