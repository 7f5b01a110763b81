//! Puts results on disk while tasks run. Blocks the thread that calls it; holds no lock while it writes a task's files.
//!
//! Files appear when there is something to put into them: a task that prints nothing has neither `stdout` nor `stderr`.
//! What is buffered is written by [`TaskFiles::flush`], which the driver calls when a task has been silent, and by
//! [`TaskFiles::finish`]. Nothing is renamed into place and nothing is synced: `result.json` is written last.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use millstream_common::{
    archive::{ExtractError, Extractor},
    id::{BlockName, StreamName, TestName},
    log::{LogChannel, LogRecord},
};
use serde::Serialize;

use super::{
    layout::{self, Layout},
    lines::{Line, LineSplitter},
    report::{StreamReport, TaskReport, TestReport},
    timeline::{HostClock, stamp},
};

/// Bytes that wait for a write to a file. Larger pieces are written as they are.
const BUFFER_BYTES: usize = 64 * 1024;
/// Bytes of stamped lines that wait: a piece of 256 KiB of short lines makes about this much.
const STAMPED_BYTES: usize = 512 * 1024;
/// Runs of one test that are kept beside each other.
const RUNS_COUNT_MAX: u32 = 100_000;

/// Why results are not on disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteResultsError {
    /// The directory cannot be made.
    #[error("results cannot be kept in `{}`: make it writable, or name another directory with `results_dir`", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There are too many runs.
    #[error("`{}` holds {RUNS_COUNT_MAX} runs of this test already: remove some", path.display())]
    TooManyRuns {
        /// The directory.
        path: PathBuf,
    },
    /// An archive cannot be taken apart.
    #[error("failed to take what the block left apart, in `{}`", path.display())]
    Archive {
        /// The task's directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: ExtractError,
    },
    /// A file cannot be written.
    #[error("failed to write the results file `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The results of one test.
#[derive(Debug, Clone)]
pub(crate) struct ResultsWriter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    directory: PathBuf,
    layout: Layout,
    debug: Mutex<BufWriter<File>>,
}

impl ResultsWriter {
    /// Makes a directory for one run of a test: never one that exists.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn create(results: &Path, test: &TestName, layout: Layout) -> Result<Self, WriteResultsError> {
        let refused = |source| WriteResultsError::Directory { path: results.to_owned(), source };
        // An absolute path stays right when the test changes its directory.
        let results = std::path::absolute(results).map_err(refused)?;
        fs::create_dir_all(&results).map_err(refused)?;
        let (name, directory) = new_run(&results, test)?;
        point_latest_to(&results, &name).map_err(refused)?;
        let path = directory.join(layout::DEBUG_FILE);
        let debug = File::create_new(&path).map_err(file_error(&path))?;
        let debug = Mutex::new(BufWriter::with_capacity(BUFFER_BYTES, debug));
        Ok(Self { shared: Arc::new(Shared { directory, layout, debug }) })
    }

    /// The directory of this run: absolute.
    #[must_use]
    pub(crate) fn directory(&self) -> &Path {
        &self.shared.directory
    }

    /// Writes what is known of a stream; again when more is known.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn stream(&self, report: &StreamReport) -> Result<(), WriteResultsError> {
        let directory = self.shared.directory.join(layout::stream_directory(&report.name));
        fs::create_dir_all(&directory).map_err(file_error(&directory))?;
        write_json(&directory.join(layout::STREAM_FILE), report)
    }

    /// The files of one task. Nothing is made before there is something to write.
    #[must_use]
    pub(crate) fn task(
        &self,
        stream: &StreamName,
        stream_number: u32,
        test_number: u32,
        block: &BlockName,
    ) -> TaskFiles {
        let layout = self.shared.layout;
        let relative = layout.task_directory(stream, stream_number, test_number, block);
        TaskFiles {
            directory: self.shared.directory.join(&relative),
            relative,
            exists: false,
            clock: HostClock::default(),
            stdout: None,
            stderr: None,
            debug: None,
        }
    }

    /// Adds a line to the log of main and the controller.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn debug(&self, time_ns: u64, text: &str) -> Result<(), WriteResultsError> {
        let stamp = stamp(time_ns);
        let mut debug = self.shared.debug.lock().unwrap_or_else(PoisonError::into_inner);
        for line in text.lines() {
            writeln!(debug, "{stamp} {line}").map_err(|source| self.debug_error(source))?;
        }
        Ok(())
    }

    /// Writes what is buffered of that log.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn flush(&self) -> Result<(), WriteResultsError> {
        let mut debug = self.shared.debug.lock().unwrap_or_else(PoisonError::into_inner);
        debug.flush().map_err(|source| self.debug_error(source))
    }

    fn debug_error(&self, source: io::Error) -> WriteResultsError {
        WriteResultsError::File { path: self.shared.directory.join(layout::DEBUG_FILE), source }
    }

    /// Appends a line to main's own whiteboard.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn whiteboard(&self, line: &str) -> Result<(), WriteResultsError> {
        let path = self.shared.directory.join(layout::WHITEBOARD_FILE);
        let file = OpenOptions::new().append(true).create(true).open(&path);
        file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())).map_err(file_error(&path))
    }

    /// Main's own directory of data: made when it is first asked for.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn data_directory(&self) -> Result<PathBuf, WriteResultsError> {
        let path = self.shared.directory.join(layout::DATA_DIRECTORY);
        fs::create_dir_all(&path).map_err(file_error(&path))?;
        Ok(path)
    }

    /// Writes what came of the whole test, after everything else.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn finish_test(&self, report: &TestReport) -> Result<(), WriteResultsError> {
        self.flush()?;
        write_json(&self.shared.directory.join(layout::TEST_FILE), report)
    }
}

/// Makes the first directory that does not exist yet. Two tests that begin at once get two.
fn new_run(results: &Path, test: &TestName) -> Result<(String, PathBuf), WriteResultsError> {
    for run in 1..=RUNS_COUNT_MAX {
        let name = layout::test_directory(test, run);
        let directory = results.join(&name);
        match fs::create_dir(&directory) {
            Ok(()) => return Ok((name, directory)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(WriteResultsError::Directory { path: directory, source }),
        }
    }
    Err(WriteResultsError::TooManyRuns { path: results.to_owned() })
}

/// Lets `latest` name the run, in one step. A directory of that name, of a test that is called so, is left alone.
fn point_latest_to(results: &Path, name: &str) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let fresh = results.join(format!(".latest-{}-{number}", std::process::id()));
    let latest = results.join(layout::LATEST_LINK);
    if fs::symlink_metadata(&latest).is_ok_and(|there| !there.is_symlink()) {
        return Ok(());
    }
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    symlink(name, &fresh)?;
    fs::rename(&fresh, &latest)
}

/// The files of one task.
#[derive(Debug)]
pub(crate) struct TaskFiles {
    directory: PathBuf,
    relative: PathBuf,
    exists: bool,
    clock: HostClock,
    stdout: Option<Output>,
    stderr: Option<Output>,
    debug: Option<StampedLog>,
}

impl TaskFiles {
    /// The task's directory: absolute. It exists once something was written.
    #[must_use]
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The same, seen from the test's directory.
    #[must_use]
    pub(crate) fn relative_directory(&self) -> &Path {
        &self.relative
    }

    /// Tells how the host's clock compares: lines that come from now on are stamped on the controller's.
    pub(crate) fn set_clock(&mut self, clock: HostClock) {
        self.clock = clock;
    }

    /// Takes in the archive of what the block left: the whiteboard and `data/` appear when it is finished.
    ///
    /// # Errors
    /// When the task's directory cannot be made or written.
    pub(crate) fn extractor(&mut self) -> Result<Extractor, WriteResultsError> {
        let directory = self.make_directory()?;
        let refused = |source| WriteResultsError::Archive { path: directory.to_owned(), source };
        Extractor::new(directory).map_err(refused)
    }

    /// Makes the task's directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn make_directory(&mut self) -> Result<&Path, WriteResultsError> {
        if !self.exists {
            make_directory(&self.directory).map_err(file_error(&self.directory))?;
            self.exists = true;
        }
        Ok(&self.directory)
    }

    /// Takes in the next record, in order.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn log(&mut self, record: &LogRecord) -> Result<(), WriteResultsError> {
        self.make_directory()?;
        let time_ns = self.clock.to_controller(record.read_time_ns);
        let debug = match &mut self.debug {
            Some(debug) => debug,
            none => none.insert(StampedLog::create(&self.directory)?),
        };
        let (output, name) = match record.channel {
            LogChannel::Mark => return debug.mark(time_ns, &record.data),
            LogChannel::Stdout => (&mut self.stdout, layout::STDOUT_FILE),
            LogChannel::Stderr => (&mut self.stderr, layout::STDERR_FILE),
        };
        let output = match output {
            Some(output) => output,
            none => none.insert(Output::create(&self.directory, name)?),
        };
        if record.skipped_bytes > 0 {
            let note = format!("[millstream: {} bytes were not kept here]", record.skipped_bytes);
            output.write(format!("\n{note}\n").as_bytes())?;
            return debug.mark(time_ns, format!("{name}: {note}").as_bytes());
        }
        output.write(&record.data)?;
        debug.output(record.channel, time_ns, &record.data)
    }

    /// Writes what is buffered, so that people see it. The beginning of a line waits for its end.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn flush(&mut self) -> Result<(), WriteResultsError> {
        for output in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            output.flush()?;
        }
        self.debug.as_mut().map_or(Ok(()), StampedLog::flush)
    }

    /// Completes the files. The last is `result.json`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn finish(mut self, report: &TaskReport) -> Result<(), WriteResultsError> {
        self.make_directory()?;
        if let Some(debug) = &mut self.debug {
            debug.finish_lines()?;
        }
        self.flush()?;
        write_json(&self.directory.join(layout::RESULT_FILE), report)
    }
}

/// Makes a directory. The one that holds it is almost always there.
fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir_all(path),
        other => other,
    }
}

/// One output, byte for byte.
#[derive(Debug)]
struct Output {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Output {
    fn create(directory: &Path, name: &str) -> Result<Self, WriteResultsError> {
        let path = directory.join(name);
        let file = File::create_new(&path).map_err(file_error(&path))?;
        Ok(Self { path, file: BufWriter::with_capacity(BUFFER_BYTES, file) })
    }

    fn write(&mut self, data: &[u8]) -> Result<(), WriteResultsError> {
        self.file.write_all(data).map_err(file_error(&self.path))
    }

    fn flush(&mut self) -> Result<(), WriteResultsError> {
        self.file.flush().map_err(file_error(&self.path))
    }
}

/// `debug.log`: lines of both outputs with times, and marks.
#[derive(Debug)]
struct StampedLog {
    path: PathBuf,
    file: File,
    stdout: LineSplitter,
    stderr: LineSplitter,
    stamped: Stamped,
}

/// Lines that wait to be written.
#[derive(Debug, Default)]
struct Stamped {
    bytes: Vec<u8>,
    /// The newest time as text: most lines have the one before them.
    time_ns: Option<u64>,
    time: String,
}

impl Stamped {
    fn line(&mut self, time_ns: u64, tag: &str, text: &[u8]) {
        if self.time_ns != Some(time_ns) {
            self.time = stamp(time_ns);
            self.time_ns = Some(time_ns);
        }
        self.bytes.reserve(self.time.len() + tag.len() + text.len() + 1);
        self.bytes.extend_from_slice(self.time.as_bytes());
        self.bytes.extend_from_slice(tag.as_bytes());
        self.bytes.extend_from_slice(text);
        self.bytes.push(b'\n');
    }
}

impl StampedLog {
    fn create(directory: &Path) -> Result<Self, WriteResultsError> {
        let path = directory.join(layout::DEBUG_FILE);
        let file = File::create_new(&path).map_err(file_error(&path))?;
        let (stdout, stderr) = (LineSplitter::default(), LineSplitter::default());
        Ok(Self { path, file, stdout, stderr, stamped: Stamped::default() })
    }

    fn output(&mut self, channel: LogChannel, time_ns: u64, data: &[u8]) -> Result<(), WriteResultsError> {
        let stamped = &mut self.stamped;
        match channel {
            LogChannel::Stdout => self.stdout.push(data, time_ns, |line| out_line(stamped, line)),
            LogChannel::Stderr => self.stderr.push(data, time_ns, |line| error_line(stamped, line)),
            LogChannel::Mark => {}
        }
        self.write_when_full()
    }

    fn mark(&mut self, time_ns: u64, text: &[u8]) -> Result<(), WriteResultsError> {
        // What was begun before the mark must not seem to belong to what comes after it.
        self.finish_lines()?;
        let text = millstream_common::text::printable(text, millstream_common::limits::SENTENCE_BYTES_MAX);
        self.stamped.line(time_ns, " -------- ", text.as_bytes());
        self.write_when_full()
    }

    fn finish_lines(&mut self) -> Result<(), WriteResultsError> {
        let stamped = &mut self.stamped;
        self.stdout.finish(|line| out_line(stamped, line));
        self.stderr.finish(|line| error_line(stamped, line));
        self.write_when_full()
    }

    fn write_when_full(&mut self) -> Result<(), WriteResultsError> {
        if self.stamped.bytes.len() < STAMPED_BYTES { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), WriteResultsError> {
        let written = self.file.write_all(&self.stamped.bytes);
        self.stamped.bytes.clear();
        written.map_err(file_error(&self.path))
    }
}

fn out_line(stamped: &mut Stamped, line: Line<'_>) {
    let tag = if line.is_continuation { " stdout+  " } else { " stdout   " };
    stamped.line(line.time_ns, tag, line.text);
}

fn error_line(stamped: &mut Stamped, line: Line<'_>) {
    let tag = if line.is_continuation { " stderr+  " } else { " stderr   " };
    stamped.line(line.time_ns, tag, line.text);
}

fn write_json(path: &Path, report: &impl Serialize) -> Result<(), WriteResultsError> {
    let mut text = serde_json::to_vec_pretty(report).map_err(io::Error::from).map_err(file_error(path))?;
    text.push(b'\n');
    fs::write(path, text).map_err(file_error(path))
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> WriteResultsError + '_ {
    |source| WriteResultsError::File { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
