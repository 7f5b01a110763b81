//! The lines of a task: the newest are kept for those who follow it.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use millstream_common::{limits, text::printable};
use regex::Regex;
use tokio::sync::{oneshot, watch};

use super::Stage;

/// Lines of a running task that are kept for those who follow it.
const KEPT_LINES_COUNT: usize = 1_000;
/// Bytes of them.
const KEPT_BYTES: usize = 256 * 1024;

/// A line that a block printed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LogLine {
    /// The stream.
    pub stream: String,
    /// Number in the stream and block, such as `1-netserver`.
    pub task: String,
    /// Number of the task in the whole test.
    pub test_number: u32,
    /// Whether it was printed to standard error.
    pub is_stderr: bool,
    /// When its first byte was read, in nanoseconds since 1970 by the controller's clock.
    pub time_ns: u64,
    /// The text without its end of line. Broken UTF-8 is replaced; control characters are as they were printed, so show
    /// it by `Display`, which escapes them.
    pub text: String,
}

impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(self.text.as_bytes(), limits::LINE_BYTES_MAX))
    }
}

/// The newest lines of a task, and whoever waits for one.
#[derive(Debug)]
pub(crate) struct TaskLog {
    lines: Mutex<Lines>,
    /// Number of lines so far.
    pub(super) count: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Lines {
    kept: VecDeque<LogLine>,
    kept_bytes: usize,
    /// Number of the first line that is kept.
    first: u64,
    wanted: Vec<(Regex, oneshot::Sender<LogLine>)>,
}

impl TaskLog {
    pub(crate) fn new() -> Self {
        Self { lines: Mutex::default(), count: watch::Sender::new(0) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in the next line.
    pub(crate) fn push(&self, line: LogLine) {
        let mut lines = self.lock();
        for index in (0..lines.wanted.len()).rev() {
            if lines.wanted[index].0.is_match(&line.text) {
                let (_, waiting) = lines.wanted.swap_remove(index);
                // Whoever waited may have given up.
                let _told = waiting.send(line.clone());
            }
        }
        lines.kept_bytes += line.text.len();
        lines.kept.push_back(line);
        while lines.kept.len() > KEPT_LINES_COUNT || (lines.kept_bytes > KEPT_BYTES && lines.kept.len() > 1) {
            if let Some(old) = lines.kept.pop_front() {
                lines.kept_bytes -= old.text.len();
                lines.first += 1;
            }
        }
        let count = lines.first + u64::try_from(lines.kept.len()).unwrap_or(u64::MAX);
        drop(lines);
        self.count.send_replace(count);
    }

    /// The newest line.
    pub(crate) fn last(&self) -> Option<LogLine> {
        self.lock().kept.back().cloned()
    }

    /// A line that matches: one that is kept, or the next one to come.
    pub(super) fn matching(&self, pattern: Regex) -> oneshot::Receiver<LogLine> {
        let (sender, receiver) = oneshot::channel();
        let mut lines = self.lock();
        match lines.kept.iter().find(|line| pattern.is_match(&line.text)).cloned() {
            Some(line) => {
                let _told = sender.send(line);
            }
            None => lines.wanted.push((pattern, sender)),
        }
        receiver
    }

    /// The line with this number, or the oldest that is kept.
    pub(super) fn at(&self, number: u64) -> Option<(u64, LogLine)> {
        let lines = self.lock();
        let number = number.max(lines.first);
        let index = usize::try_from(number - lines.first).ok()?;
        lines.kept.get(index).map(|line| (number, line.clone()))
    }
}

/// The lines of a task, as they come.
#[derive(Debug)]
pub struct Logs {
    pub(super) log: Arc<TaskLog>,
    pub(super) count: watch::Receiver<u64>,
    pub(super) stage: watch::Receiver<Stage>,
    pub(super) next: u64,
}

impl Logs {
    /// The next line; none when the task has ended and every line was given. Whoever is too slow misses lines.
    ///
    /// # Cancel safety
    /// No line is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<LogLine> {
        loop {
            // Looked at before the lines: what came before the end is there when the end is.
            let over = *self.stage.borrow_and_update() == Stage::Finished;
            let _count = *self.count.borrow_and_update();
            if let Some((number, line)) = self.log.at(self.next) {
                self.next = number + 1;
                return Some(line);
            }
            if over {
                return None;
            }
            tokio::select! {
                _ = self.count.changed() => {}
                _ = self.stage.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> LogLine {
        LogLine {
            stream: "s".to_owned(),
            task: "1-b".to_owned(),
            test_number: 1,
            is_stderr: false,
            time_ns: 0,
            text: text.to_owned(),
        }
    }

    #[test]
    fn the_newest_lines_are_kept_and_numbered() {
        let log = TaskLog::new();
        for number in 0..KEPT_LINES_COUNT + 5 {
            log.push(line(&number.to_string()));
        }
        assert_eq!(log.at(0).unwrap(), (5, line("5")));
        assert_eq!(log.at(7).unwrap().1.text, "7");
        assert_eq!(log.at(5_000), None);
    }

    #[test]
    fn a_line_is_found_whether_it_came_before_or_after_the_question() {
        let log = TaskLog::new();
        log.push(line("listening on 1"));
        assert_eq!(log.matching(Regex::new("listening").unwrap()).try_recv().unwrap().text, "listening on 1");
        let mut later = log.matching(Regex::new("^done$").unwrap());
        assert!(later.try_recv().is_err());
        log.push(line("done"));
        assert_eq!(later.try_recv().unwrap().text, "done");
    }

    #[test]
    fn a_shown_line_cannot_move_the_cursor() {
        assert_eq!(line("\x1b[2J").to_string(), "\\u{1b}[2J");
    }
}
