//! What a command tells of phases of its own, line by line. Pure.
//!
//! The descriptor is the block's: anybody in it may write anything. What is no report, or comes out of order, is passed
//! over, so that a task has at most three beginnings, three causes and one end. What follows from them is not decided here.

use millstream_common::{outcome::Phase, text::printable};

/// Holds the number of the descriptor.
pub(crate) const REPORTS_VARIABLE: &str = "MILLSTREAM_PHASES";
/// Longest line; what is behind it is left out.
const LINE_BYTES_MAX: usize = 1024;
/// Longest cause or remark: there is room beside it in the sentence of a record.
const WORDS_BYTES_MAX: usize = 640;

/// One thing that was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Report {
    /// A phase has begun; the one before it is over.
    Began(Phase),
    /// The phase that runs has failed, and why.
    Failed(String),
    /// The last phase is over; a remark, which may be empty.
    Ended(String),
}

/// Reads reports. Repeats and disorder are harmless.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    line: Vec<u8>,
    phase: Option<Phase>,
    failed: bool,
    ended: bool,
}

impl Reports {
    /// Takes in what was read, in pieces of any length.
    pub(crate) fn take(&mut self, bytes: &[u8], told: &mut Vec<Report>) {
        for &byte in bytes {
            if byte != b'\n' {
                if self.line.len() < LINE_BYTES_MAX {
                    self.line.push(byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            told.extend(self.report(&String::from_utf8_lossy(&line)));
        }
    }

    fn report(&mut self, line: &str) -> Option<Report> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let words = printable(rest.as_bytes(), WORDS_BYTES_MAX);
        match (word, self.phase) {
            _ if self.ended => None,
            ("begin", before) => {
                let phase = [Phase::Setup, Phase::Run, Phase::Teardown]
                    .into_iter()
                    .find(|phase| phase.to_string() == rest)
                    .filter(|&phase| before.is_none_or(|before| before < phase))?;
                (self.phase, self.failed) = (Some(phase), false);
                Some(Report::Began(phase))
            }
            ("failed", Some(_)) if !self.failed => {
                self.failed = true;
                Some(Report::Failed(words))
            }
            ("end", Some(_)) => {
                self.ended = true;
                Some(Report::Ended(words))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pieces: &[&[u8]]) -> Vec<Report> {
        let (mut reports, mut told) = (Reports::default(), Vec::new());
        for piece in pieces {
            reports.take(piece, &mut told);
        }
        told
    }

    #[test]
    fn lines_come_in_pieces() {
        assert_eq!(
            told(&[b"begin se", b"tup\nbegin run\nfailed no", b" port\nbegin teardown\nend\n"]),
            [
                Report::Began(Phase::Setup),
                Report::Began(Phase::Run),
                Report::Failed("no port".to_owned()),
                Report::Began(Phase::Teardown),
                Report::Ended(String::new()),
            ]
        );
    }

    #[test]
    fn what_is_no_report_or_out_of_order_is_passed_over() {
        let noise: &[u8] = b"failed early\nend\nbegin lunch\n\xff\xfe\nbegin run\nbegin setup\nbegin run\nfailed a\nfailed b\n";
        let after: &[u8] = b"end skipped: x\x07\nbegin teardown\nend\n";
        assert_eq!(
            told(&[noise, after]),
            [
                Report::Began(Phase::Run),
                Report::Failed("a".to_owned()),
                Report::Ended("skipped: x\\u{7}".to_owned()),
            ]
        );
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let (mut reports, mut told) = (Reports::default(), Vec::new());
        reports.take(b"begin run\nfailed ", &mut told);
        for _ in 0..1000 {
            reports.take(&[b'x'; 4096], &mut told);
        }
        assert!(reports.line.len() <= LINE_BYTES_MAX);
        reports.take(b"\nend\n", &mut told);
        assert_eq!(told.len(), 3);
    }
}
