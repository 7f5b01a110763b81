//! What is on disk after what was taken in.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use bytes::Bytes;
use expect_test::{Expect, expect};
use millstream_common::{
    id::TaskId,
    outcome::{Expectation, OutcomeKind, Reason, TaskEnd},
};
use tempfile::TempDir;

use super::*;
use crate::results::report::TaskSubject;

fn test() -> TestName {
    "multi".parse().unwrap()
}

fn create(directory: &TempDir) -> ResultsWriter {
    ResultsWriter::create(directory.path(), &test(), Layout::Queue).unwrap()
}

fn task(writer: &ResultsWriter) -> TaskFiles {
    writer.task(&"server".parse().unwrap(), 1, 1, &"netserver".parse().unwrap())
}

fn record(channel: LogChannel, time_ns: u64, data: &str) -> LogRecord {
    let data = Bytes::copy_from_slice(data.as_bytes());
    LogRecord { channel, offset: 0, read_time_ns: time_ns, data, skipped_bytes: 0 }
}

fn report(files: &TaskFiles) -> TaskReport {
    let subject = TaskSubject {
        task_id: TaskId::from_uuid(uuid::Uuid::from_u128(0x0193_9b5e_0000_7000_8000_0000_0000_0000)),
        stream: "server".parse().unwrap(),
        host: "foo".to_owned(),
        stream_number: 1,
        test_number: 1,
        block: "netserver".parse().unwrap(),
        command: vec!["iperf3".to_owned(), "-s".to_owned()],
        expectation: Expectation::Pass,
        enqueue_time_ns: 1_000_000,
    };
    let mut end = TaskEnd::never_begun(OutcomeKind::Failed, Reason::Exited, "");
    end.start_time_ns = Some(5_000_000_000);
    end.run_duration = Duration::from_millis(1500);
    let mut clock = HostClock::default();
    clock.measure(1_000, 2_000_001_000, 1_000);
    TaskReport::new(subject, &end, clock, None, files.relative_directory().display().to_string())
}

/// Every file below a directory with its content.
fn tree(directory: &Path) -> String {
    let mut lines = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(next) = directories.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let name = path.strip_prefix(directory).unwrap().display().to_string();
                lines.push(format!("== {name}\n{}", fs::read_to_string(&path).unwrap()));
            }
        }
    }
    lines.sort();
    lines.join("")
}

fn check(records: &[LogRecord], expected: Expect) {
    let directory = tempfile::tempdir().unwrap();
    let mut files = task(&create(&directory));
    for record in records {
        files.log(record).unwrap();
    }
    let report = report(&files);
    let place = files.directory().to_owned();
    files.finish(&report).unwrap();
    fs::remove_file(place.join(layout::RESULT_FILE)).unwrap();
    expected.assert_eq(&tree(&place));
}

#[test]
fn outputs_are_kept_byte_for_byte_and_together_with_times() {
    use LogChannel::{Mark, Stderr, Stdout};
    check(
        &[
            record(Mark, 1_000, "phase run"),
            record(Stdout, 2_000, "one\ntw"),
            record(Stderr, 3_000, "bad\n"),
            record(Stdout, 4_000, "o\nthree"),
            record(Mark, 5_000, "phase teardown"),
        ],
        expect![[r#"
            == debug.log
            1970-01-01T00:00:00.000001Z -------- phase run
            1970-01-01T00:00:00.000002Z stdout   one
            1970-01-01T00:00:00.000003Z stderr   bad
            1970-01-01T00:00:00.000002Z stdout   two
            1970-01-01T00:00:00.000004Z stdout   three
            1970-01-01T00:00:00.000005Z -------- phase teardown
            == stderr
            bad
            == stdout
            one
            two
            three"#]],
    );
}

#[test]
fn what_was_not_kept_is_marked_in_both_files() {
    let mut gap = record(LogChannel::Stdout, 1_000, "");
    gap.skipped_bytes = 42;
    check(
        &[record(LogChannel::Stdout, 0, "head"), gap, record(LogChannel::Stdout, 2_000, "tail\n")],
        expect![[r#"
            == debug.log
            1970-01-01T00:00:00.000000Z stdout   head
            1970-01-01T00:00:00.000001Z -------- stdout: [millstream: 42 bytes were not kept here]
            1970-01-01T00:00:00.000002Z stdout   tail
            == stdout
            head
            [millstream: 42 bytes were not kept here]
            tail
        "#]],
    );
}

#[test]
fn a_task_without_output_has_no_output_files() {
    check(&[], expect![""]);
}

#[test]
fn the_result_says_everything_on_the_controllers_clock() {
    let directory = tempfile::tempdir().unwrap();
    let files = task(&create(&directory));
    let (place, report) = (files.directory().to_owned(), report(&files));
    files.finish(&report).unwrap();
    expect![[r#"
        {
          "task_id": "01939b5e-0000-7000-8000-000000000000",
          "stream": "server",
          "host": "foo",
          "stream_number": 1,
          "test_number": 1,
          "block": "netserver",
          "command": [
            "iperf3",
            "-s"
          ],
          "outcome": "failed",
          "expectation": "pass",
          "is_expected": false,
          "reason": "exited",
          "phase": null,
          "exit_code": null,
          "signal": null,
          "detail": "",
          "caused_by": null,
          "enqueue_time": "1970-01-01T00:00:00.001000Z",
          "start_time": "1970-01-01T00:00:03.000000Z",
          "end_time": null,
          "run_seconds": 1.5,
          "phases": [],
          "leaked": [],
          "leaked_count": 0,
          "log": {
            "stdout_bytes": 0,
            "stderr_bytes": 0,
            "stdout_sha256": "",
            "stderr_sha256": "",
            "truncated": false
          },
          "archive": null,
          "last_lines": [],
          "directory": "streams/server/1-netserver"
        }
    "#]]
    .assert_eq(&fs::read_to_string(place.join(layout::RESULT_FILE)).unwrap());
}

#[test]
fn an_existing_run_is_never_touched_and_latest_names_the_newest() {
    let directory = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..3)
        .map(|_| create(&directory).directory().file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["multi", "multi.2", "multi.3"]);
    let latest = fs::read_link(directory.path().join("latest")).unwrap();
    assert_eq!(latest, Path::new("multi.3"));
    let latest = ResultsWriter::create(directory.path(), &"latest".parse().unwrap(), Layout::Flat).unwrap();
    assert!(latest.directory().ends_with("latest.2"));
}

#[test]
fn tests_that_begin_at_once_do_not_share_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let directories: std::collections::BTreeSet<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..8).map(|_| scope.spawn(|| create(&directory))).collect();
        runs.into_iter().map(|run| run.join().unwrap().directory().to_owned()).collect()
    });
    assert_eq!(directories.len(), 8);
    assert!(
        fs::read_dir(directory.path())
            .unwrap()
            .all(|entry| { !entry.unwrap().file_name().to_string_lossy().starts_with('.') })
    );
}

#[test]
fn a_directory_that_cannot_be_used_is_named_with_the_way_out() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("results");
    fs::write(&file, "").unwrap();
    let error = ResultsWriter::create(&file, &test(), Layout::Queue).unwrap_err().to_string();
    let error = error.replace(file.to_str().unwrap(), "FILE");
    expect![
        "results cannot be kept in `FILE`: make it writable, or name another directory with `results_dir`"
    ]
    .assert_eq(&error);
}

#[test]
fn files_appear_while_the_task_runs() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = task(&create(&directory));
    files.log(&record(LogChannel::Stdout, 0, "listening\nand")).unwrap();
    files.flush().unwrap();
    let read = |name| fs::read_to_string(files.directory().join(name)).unwrap();
    assert_eq!(read("stdout"), "listening\nand");
    assert_eq!(read("debug.log"), "1970-01-01T00:00:00.000000Z stdout   listening\n");
    let mode = fs::metadata(files.directory()).unwrap().permissions().mode();
    assert_eq!(mode & 0o700, 0o700);
}

#[test]
fn main_has_a_log_a_whiteboard_and_data_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let writer = create(&directory);
    writer.debug(1_000, "opened\nstreams").unwrap();
    writer.whiteboard("42 Gbit/s").unwrap();
    fs::write(writer.data_directory().unwrap().join("plot"), "x").unwrap();
    writer.flush().unwrap();
    expect![[r#"
        == data/plot
        x== debug.log
        1970-01-01T00:00:00.000001Z opened
        1970-01-01T00:00:00.000001Z streams
        == whiteboard
        42 Gbit/s
    "#]]
    .assert_eq(&tree(writer.directory()));
}
