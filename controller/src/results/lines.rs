//! Lines made of pieces of output. Pure: bytes in, lines out; reads no clock.
//!
//! A line is stamped with the time of its first byte. It is handed on when its end has arrived, or when it is as long as
//! a line may be: then it goes on as the next piece, marked as such. Nothing is lost or added but line ends.

use millstream_common::limits::LINE_BYTES_MAX;

/// A line, or a piece of one that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    /// When its first byte was read, in nanoseconds since 1970.
    pub(crate) time_ns: u64,
    /// The bytes, without the line end.
    pub(crate) text: &'a [u8],
    /// Whether it goes on where the line before was cut.
    pub(crate) is_continuation: bool,
}

/// Splits one output.
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    /// The beginning of a line whose end has not arrived.
    partial: Vec<u8>,
    partial_time_ns: u64,
    cut: bool,
}

impl LineSplitter {
    /// Takes in the next piece, and hands out every line that it completes.
    pub(crate) fn push(&mut self, mut data: &[u8], time_ns: u64, mut line: impl FnMut(Line<'_>)) {
        while !data.is_empty() {
            if self.partial.is_empty() {
                self.partial_time_ns = time_ns;
            }
            let room = LINE_BYTES_MAX - self.partial.len();
            let window = &data[..data.len().min(room + 1)];
            let Some((length, ended)) = memchr::memchr(b'\n', window)
                .map(|length| (length, true))
                .or((data.len() > room).then_some((room, false)))
            else {
                self.partial.extend_from_slice(data);
                return;
            };
            let (text, rest) = data.split_at(length);
            data = if ended { &rest[1..] } else { rest };
            self.hand_out(text, &mut line);
            self.cut = !ended;
        }
    }

    /// Hands out what has no line end, because nothing comes any more.
    pub(crate) fn finish(&mut self, mut line: impl FnMut(Line<'_>)) {
        if !self.partial.is_empty() {
            self.hand_out(b"", &mut line);
        }
        self.cut = false;
    }

    fn hand_out(&mut self, text: &[u8], line: &mut impl FnMut(Line<'_>)) {
        let (time_ns, is_continuation) = (self.partial_time_ns, self.cut);
        if self.partial.is_empty() {
            line(Line { time_ns, text, is_continuation });
            return;
        }
        self.partial.extend_from_slice(text);
        line(Line { time_ns, text: &self.partial, is_continuation });
        self.partial.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(pieces: &[&[u8]]) -> Vec<(u64, Vec<u8>, bool)> {
        let mut splitter = LineSplitter::default();
        let mut lines = Vec::new();
        let mut keep = |line: Line<'_>| lines.push((line.time_ns, line.text.to_vec(), line.is_continuation));
        for (time_ns, piece) in (1..).zip(pieces) {
            splitter.push(piece, time_ns, &mut keep);
        }
        splitter.finish(&mut keep);
        lines
    }

    #[test]
    fn a_line_has_the_time_of_its_first_byte() {
        let lines = split(&[b"one\ntw", b"o\nthr", b"ee"]);
        let expected = [(1, "one"), (1, "two"), (2, "three")];
        let expected: Vec<_> = expected.map(|(time, text)| (time, text.as_bytes().to_vec(), false)).into();
        assert_eq!(lines, expected);
    }

    #[test]
    fn a_line_that_is_too_long_goes_on_as_the_next() {
        let long = vec![b'x'; LINE_BYTES_MAX + 3];
        let lines = split(&[&long, b"yz\nend\n"]);
        let lengths: Vec<_> = lines.iter().map(|(_, text, cut)| (text.len(), *cut)).collect();
        assert_eq!(lengths, [(LINE_BYTES_MAX, false), (5, true), (3, false)]);
    }

    #[test]
    fn a_line_of_exactly_the_longest_length_is_not_cut() {
        let mut line = vec![b'x'; LINE_BYTES_MAX];
        line.push(b'\n');
        assert_eq!(split(&[&line, b"next\n"]).len(), 2);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            data in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'a')], 0..200),
            cuts in proptest::collection::vec(0..200_usize, 0..8),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&cut| cut < data.len()).collect();
            cuts.extend([0, data.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &data[pair[0]..pair[1]]).collect();
            let texts = |lines: Vec<(u64, Vec<u8>, bool)>| lines.into_iter().map(|(_, text, _)| text).collect::<Vec<_>>();
            prop_assert_eq!(texts(split(&pieces)), texts(split(&[&data])));
        }
    }
}
