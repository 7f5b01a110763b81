//! The last lines of a task's output, followed while it is written. Pure.

use std::collections::VecDeque;

use millstream_common::limits;

/// Follows the lines of one channel, so that the last ones can be repeated in the terminal record.
#[derive(Debug, Default)]
pub(super) struct LineTail {
    /// Beginning of the line that has not ended yet.
    pub(super) unfinished: Vec<u8>,
}

/// One byte more than is shown: so a cut is seen to be one.
const LINE_KEPT_BYTES: usize = limits::LAST_LINE_BYTES_MAX + 1;

impl LineTail {
    pub(super) fn feed(&mut self, piece: &[u8], lines: &mut VecDeque<Vec<u8>>) {
        let Some(end) = memchr::memrchr(b'\n', piece) else {
            extend_line(&mut self.unfinished, piece);
            return;
        };
        let (ended, begun) = (&piece[..end], &piece[end + 1..]);
        // From the end backward: a piece of 256 KiB has thousands of lines, and ten matter.
        if let Some(newline) = memchr::memrchr_iter(b'\n', ended).nth(limits::LAST_LINES_COUNT - 1) {
            ended[newline + 1..].split(|&byte| byte == b'\n').for_each(|line| push_line(lines, line));
        } else {
            let mut parts = ended.split(|&byte| byte == b'\n');
            extend_line(&mut self.unfinished, parts.next().unwrap_or_default());
            push_line(lines, &self.unfinished);
            parts.for_each(|line| push_line(lines, line));
        }
        self.unfinished.clear();
        extend_line(&mut self.unfinished, begun);
    }
}

fn extend_line(line: &mut Vec<u8>, more: &[u8]) {
    let room = LINE_KEPT_BYTES.saturating_sub(line.len());
    line.extend_from_slice(&more[..room.min(more.len())]);
}

fn push_line(lines: &mut VecDeque<Vec<u8>>, line: &[u8]) {
    // The oldest line's memory becomes the newest line's.
    let mut kept =
        if lines.len() < limits::LAST_LINES_COUNT { None } else { lines.pop_front() }.unwrap_or_default();
    kept.clear();
    extend_line(&mut kept, line.strip_suffix(b"\r").unwrap_or(line));
    lines.push_back(kept);
}
