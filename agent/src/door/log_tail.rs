//! The end of a task's log as lines of text, and what follows, for people. Reads the spool from disk: the task and its
//! controller notice nothing.

use std::{collections::VecDeque, io, sync::Arc};

use millstream_common::{
    convert,
    id::TaskId,
    log::{LogChannel, LogRecord},
    text::printable,
};
use millstream_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;

use super::{
    Shared,
    service::{field, task_in, unknown_task},
    supervisors::{Supervised, TaskView},
    watch::{blocking, damaged},
};
use crate::supervisor::spool::{RECORD_BYTES_MAX, SpoolReader};

/// Output in which the last lines are looked for.
const TAIL_BYTES_MAX: usize = 256 * 1024;
/// One line; a longer one is cut into several.
const LINE_BYTES_MAX: usize = 4_096;
/// The same when it is safe to print: escapes are longer than what they stand for.
const SHOWN_BYTES_MAX: usize = 8 * LINE_BYTES_MAX;
/// Lines that are shown unless somebody asks for another number.
const LINES_COUNT: usize = 10;
/// Lines of one message, and those that may be asked for.
const LINES_COUNT_MAX: usize = 1_000;
/// Messages that wait for a slow reader.
const MESSAGES_COUNT_MAX: usize = 1;

/// One message.
type Answer = Result<v1::ReadLogResponse, Status>;
/// What one reader gets.
pub(super) type Answers = mpsc::Receiver<Answer>;

/// Makes lines of records. Each output has its own.
#[derive(Debug, Default)]
struct Lines {
    /// What has no end yet, of standard output and of standard error.
    begun: [Vec<u8>; 2],
    /// Whether what comes next of an output may be the end of a line of which the beginning is not known: so it is wherever
    /// reading begins, unless the output begins there, too.
    cut: [bool; 2],
    ready: VecDeque<v1::LogLine>,
}

impl Lines {
    fn take(&mut self, record: &LogRecord) {
        let output = match record.channel {
            LogChannel::Stdout => 0,
            LogChannel::Stderr => 1,
            LogChannel::Mark => {
                let phase = String::from_utf8_lossy(&record.data);
                return self.put(record, format!("{phase} begins").as_bytes());
            }
        };
        if record.skipped_bytes > 0 {
            self.begun[output].clear();
            self.cut[output] = true;
            let said =
                format!("{} bytes of {} were not kept", record.skipped_bytes, ["stdout", "stderr"][output]);
            return self.put(&LogRecord { channel: LogChannel::Mark, ..record.clone() }, said.as_bytes());
        }
        if record.offset == 0 {
            self.cut[output] = false;
        }
        for piece in record.data.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = piece.strip_suffix(b"\n").map_or((piece, false), |text| (text, true));
            for part in text.chunks(LINE_BYTES_MAX) {
                if self.begun[output].len() + part.len() > LINE_BYTES_MAX {
                    self.flush(output, record);
                }
                self.begun[output].extend_from_slice(part);
            }
            if ends {
                self.end_line(output, record);
            }
        }
    }

    /// A line has its end; an empty one is a line, too.
    fn end_line(&mut self, output: usize, record: &LogRecord) {
        let text = std::mem::take(&mut self.begun[output]);
        if !std::mem::take(&mut self.cut[output]) {
            self.put(record, &text);
        }
    }

    /// Gives out what there is of a line, unless its beginning is not known.
    fn flush(&mut self, output: usize, record: &LogRecord) {
        let text = std::mem::take(&mut self.begun[output]);
        if !self.cut[output] && !text.is_empty() {
            self.put(record, &text);
        }
    }

    /// Nothing more is read: a line without an end is shown as it is.
    fn finish(&mut self, last: &LogRecord) {
        self.cut = [false; 2];
        for (output, channel) in [LogChannel::Stdout, LogChannel::Stderr].into_iter().enumerate() {
            self.flush(output, &LogRecord { channel, ..last.clone() });
        }
    }

    fn put(&mut self, record: &LogRecord, text: &[u8]) {
        self.ready.push_back(v1::LogLine {
            time: Some(convert::timestamp(record.read_time_ns)),
            channel: v1::LogChannel::from(record.channel).into(),
            text: printable(text, SHOWN_BYTES_MAX),
        });
    }

    /// Lets go of all but the last lines.
    fn keep_last(&mut self, count: usize) {
        let more = self.ready.len().saturating_sub(count);
        self.ready.drain(..more);
    }
}

/// Sends the last lines of a task, and with `follow` those that come until its end.
pub(super) fn read(shared: &Shared, request: &v1::ReadLogRequest) -> Result<Answers, Status> {
    let task = task_in("task_id", &request.task_id)?;
    let lines_count = match usize::try_from(request.lines_count) {
        Ok(0) => LINES_COUNT,
        Ok(count) if count <= LINES_COUNT_MAX => count,
        _ => return Err(field("lines_count", &format!("is more than {LINES_COUNT_MAX}"))),
    };
    let supervised = shared.session_of(task).ok_or_else(|| unknown_task(task))?;
    let (sender, answers) = mpsc::channel(MESSAGES_COUNT_MAX);
    let tail = Tail {
        supervised,
        task,
        sender,
        reader: None,
        position: 0,
        lines: Lines { cut: [true; 2], ..Lines::default() },
        last: None,
    };
    tokio::spawn(tail.run(lines_count, request.follow));
    Ok(answers)
}

impl Shared {
    /// The session that has a task.
    fn session_of(&self, task: TaskId) -> Option<Arc<Supervised>> {
        let sessions: Vec<_> = self.sessions().iter().map(|(id, _)| id).collect();
        let mut supervised = sessions.into_iter().filter_map(|id| self.supervised(id));
        supervised.find(|supervised| supervised.mirror().get(task).is_some())
    }
}

/// Why the reading ends before the log does.
enum Stop {
    /// Nobody takes the lines any more.
    Gone,
    /// The task's controller has fetched everything of it.
    Released,
    /// The log cannot be read.
    Unreadable(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        // The log goes before the task is forgotten.
        if error.kind() == io::ErrorKind::NotFound { Self::Released } else { Self::Unreadable(error) }
    }
}

struct Tail {
    supervised: Arc<Supervised>,
    task: TaskId,
    sender: mpsc::Sender<Answer>,
    reader: Option<Arc<SpoolReader>>,
    /// How far the log has been read.
    position: u64,
    lines: Lines,
    /// The record that was read last: a line without an end has its time.
    last: Option<LogRecord>,
}

impl Tail {
    async fn run(mut self, lines_count: usize, follow: bool) {
        let told = match self.tell(lines_count, follow).await {
            Ok(()) | Err(Stop::Gone) => return,
            Err(Stop::Released) => Status::not_found(format!(
                "task {} is over, and its controller has fetched everything of it",
                self.task
            )),
            Err(Stop::Unreadable(error)) => damaged(self.task, &error),
        };
        // The reader may have gone already.
        let _gone: Result<(), _> = self.sender.send(Err(told)).await;
    }

    async fn tell(&mut self, lines_count: usize, follow: bool) -> Result<(), Stop> {
        let mut changes = self.supervised.changes();
        changes.borrow_and_update();
        let mut view = self.view()?;
        if view.spool_position > 0 {
            let (reader, limit) = (self.reader().await?, view.spool_position);
            let window = TAIL_BYTES_MAX + RECORD_BYTES_MAX;
            self.position = blocking(move || reader.last_records(limit, window)).await?;
        }
        while self.take_in(view.spool_position).await? {
            self.lines.keep_last(lines_count);
        }
        if view.is_finished() || !follow {
            self.finish();
            self.lines.keep_last(lines_count);
        }
        self.send().await?;
        // A session that was closed says no more of its tasks.
        while follow && !view.is_finished() && self.supervised.mirror().supervisor_pid() > 0 {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Ok(()) },
                () = self.sender.closed() => return Err(Stop::Gone),
            }
            changes.borrow_and_update();
            view = self.view()?;
            while self.take_in(view.spool_position).await? {
                self.send().await?;
            }
        }
        self.finish();
        self.send().await
    }

    fn view(&self) -> Result<Arc<TaskView>, Stop> {
        self.supervised.mirror().get(self.task).cloned().ok_or(Stop::Released)
    }

    async fn reader(&mut self) -> io::Result<Arc<SpoolReader>> {
        if let Some(reader) = &self.reader {
            return Ok(Arc::clone(reader));
        }
        let path = self.supervised.directory.spool(self.task);
        let reader = Arc::new(blocking(move || SpoolReader::open(path)).await?);
        self.reader = Some(Arc::clone(&reader));
        Ok(reader)
    }

    /// Reads the next records before `limit`; false when there are none. So few at a time that lines of one byte take no more
    /// than some megabytes.
    async fn take_in(&mut self, limit: u64) -> Result<bool, Stop> {
        if self.position >= limit {
            return Ok(false);
        }
        let (reader, position) = (self.reader().await?, self.position);
        let (records, next) = blocking(move || reader.read(position, limit, RECORD_BYTES_MAX)).await?;
        for record in &records {
            self.lines.take(record);
        }
        self.position = next;
        let any = !records.is_empty();
        self.last = records.into_iter().next_back().or(self.last.take());
        Ok(any)
    }

    fn finish(&mut self) {
        if let Some(last) = &self.last {
            self.lines.finish(last);
        }
    }

    async fn send(&mut self) -> Result<(), Stop> {
        while !self.lines.ready.is_empty() {
            let count = self.lines.ready.len().min(LINES_COUNT_MAX);
            let lines = self.lines.ready.drain(..count).collect();
            let sent = self.sender.send(Ok(v1::ReadLogResponse { lines })).await;
            sent.map_err(|_| Stop::Gone)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn record(channel: LogChannel, offset: u64, data: &[u8]) -> LogRecord {
        let data = bytes::Bytes::copy_from_slice(data);
        LogRecord { channel, offset, read_time_ns: 1_000_000_000, data, skipped_bytes: 0 }
    }

    fn check(records: &[LogRecord], expected: &Expect) {
        let mut lines = Lines { cut: [true; 2], ..Lines::default() };
        for record in records {
            lines.take(record);
        }
        lines.finish(records.last().unwrap());
        let shown = lines.ready.iter().map(|line| {
            let text =
                if line.text.len() > 40 { format!("{} bytes", line.text.len()) } else { line.text.clone() };
            format!("{} {text}\n", line.channel().as_str_name().trim_start_matches("LOG_CHANNEL_"))
        });
        expected.assert_eq(&shown.collect::<String>());
    }

    #[test]
    fn each_output_has_lines_of_its_own_wherever_they_are_cut() {
        check(
            &[
                record(LogChannel::Mark, 0, b"run"),
                record(LogChannel::Stdout, 0, b"one\n\ntw"),
                record(LogChannel::Stderr, 0, b"oops \x1b[31m\n"),
                record(LogChannel::Stdout, 7, b"o\nprompt> "),
            ],
            &expect![[r"
                MARK run begins
                STDOUT one
                STDOUT 
                STDERR oops \u{1b}[31m
                STDOUT two
                STDOUT prompt> 
            "]],
        );
    }

    #[test]
    fn a_line_whose_beginning_is_not_known_is_left_out_and_a_long_one_is_cut() {
        let long = [b'x'; 10_000];
        let skipped = LogRecord { skipped_bytes: 77, ..record(LogChannel::Stdout, 20, b"") };
        check(
            &[
                record(LogChannel::Stdout, 9, b"rest of one\ntwo\n"),
                skipped,
                record(LogChannel::Stdout, 97, b"rest\nthree\n"),
                record(LogChannel::Stderr, 0, &long),
                record(LogChannel::Stderr, 10_000, b"\nend\n"),
            ],
            &expect![[r"
                STDOUT two
                MARK 77 bytes of stdout were not kept
                STDOUT three
                STDERR 4096 bytes
                STDERR 4096 bytes
                STDERR 1808 bytes
                STDERR end
            "]],
        );
    }
}
