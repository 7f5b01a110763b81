//! What blocks ran in streams of their own: brought from where the block left it to `streams/` of its results, and put into
//! the global order.
//!
//! A block that was not marked is not looked at. What is read here was written by a block: nothing in it is used as a path.

use std::{
    fs,
    io::{self, Read as _},
    path::Path,
};

use serde_json::{Map, Value};

use super::timeline::{HostClock, stamp, unstamp};
use crate::nested::RESULTS_DIRECTORY;

/// Where the results of nested streams lie, in the directory of their task; those that were opened later get a number.
const HOME: &str = "streams";
/// Report of one nested test: as much as a hundred thousand tasks need.
const REPORT_BYTES_MAX: u64 = 128 * 1024 * 1024;

/// A task of a nested stream, as the test reports it.
#[derive(Debug, Clone)]
pub(crate) struct NestedTask {
    /// When it was enqueued, by the controller's clock.
    pub(crate) enqueue_time_ns: u64,
    /// What its own test says of it, with places and times as they are seen from here.
    pub(crate) report: Value,
}

/// The task that ran streams.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Within<'a> {
    /// What it is called: `server/1-netserver`.
    pub(crate) label: &'a str,
    /// Its directory: absolute.
    pub(crate) directory: &'a Path,
    /// The same, seen from the test's.
    pub(crate) relative: &'a str,
    /// Clock of its host.
    pub(crate) clock: HostClock,
}

/// Brings the results of a block's own streams to their place and tells its tasks, in their order.
///
/// # Errors
/// When they cannot be moved, or what the block says of them cannot be read.
pub(crate) fn bring_home(within: Within<'_>) -> io::Result<Vec<NestedTask>> {
    let left = within.directory.join(super::layout::DATA_DIRECTORY).join(RESULTS_DIRECTORY);
    if !fs::symlink_metadata(&left).is_ok_and(|left| left.is_dir()) {
        return Ok(Vec::new());
    }
    let mut runs: Vec<String> = Vec::new();
    for entry in fs::read_dir(&left)? {
        let entry = entry?;
        if let (true, Ok(name)) = (entry.file_type()?.is_dir(), entry.file_name().into_string()) {
            runs.push(name);
        }
    }
    runs.sort();
    let mut tasks = Vec::new();
    for (run, number) in runs.iter().zip(1..) {
        let home = if number == 1 { HOME.to_owned() } else { format!("{HOME}.{number}") };
        let to = within.directory.join(&home);
        fs::create_dir(&to)?;
        let from = left.join(run);
        move_entries(&from.join(HOME), &to)?;
        move_entries(&from, &to)?;
        tasks.extend(read_tasks(&to.join(super::layout::TEST_FILE), within, &home)?);
    }
    fs::remove_dir_all(&left)?;
    tasks.sort_by_key(|task| task.enqueue_time_ns);
    Ok(tasks)
}

/// Moves everything in a directory into another one. Nothing is overwritten: what would clash stays behind.
fn move_entries(from: &Path, to: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(from).is_ok_and(|from| from.is_dir()) {
        return Ok(());
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let place = to.join(entry.file_name());
        if fs::symlink_metadata(&place).is_err() {
            fs::rename(entry.path(), place)?;
        }
    }
    Ok(())
}

fn read_tasks(path: &Path, within: Within<'_>, home: &str) -> io::Result<Vec<NestedTask>> {
    // Ended before its streams were closed: their results are there, and nobody has reported them.
    if !fs::symlink_metadata(path).is_ok_and(|file| file.is_file()) {
        return Ok(Vec::new());
    }
    let mut text = Vec::new();
    fs::File::open(path)?.take(REPORT_BYTES_MAX).read_to_end(&mut text)?;
    let mut report: Map<String, Value> = serde_json::from_slice(&text)?;
    let Some(Value::Array(tasks)) = report.remove("tasks") else { return Ok(Vec::new()) };
    Ok(tasks.into_iter().filter_map(|task| seen_from_here(task, within, home)).collect())
}

/// A task as its own test reports it, with places and times of this one.
fn seen_from_here(task: Value, within: Within<'_>, home: &str) -> Option<NestedTask> {
    let Value::Object(mut task) = task else { return None };
    for name in ["enqueue_time", "start_time", "end_time"] {
        if let Some(time) = task.get_mut(name)
            && let Some(time_ns) = time.as_str().and_then(unstamp)
        {
            *time = stamp(within.clock.to_controller(time_ns)).into();
        }
    }
    let enqueue_time_ns = unstamp(task.get("enqueue_time")?.as_str()?)?;
    let directory = task.get("directory")?.as_str()?;
    let inner = directory.strip_prefix(HOME).and_then(|rest| rest.strip_prefix('/')).unwrap_or(directory);
    let directory = format!("{}/{home}/{inner}", within.relative);
    let label = match task.get("within").and_then(Value::as_str) {
        Some(deeper) => format!("{}/{deeper}", within.label),
        None => within.label.to_owned(),
    };
    task.insert("directory".to_owned(), directory.into());
    task.insert("within".to_owned(), label.into());
    Some(NestedTask { enqueue_time_ns, report: Value::Object(task) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn within(directory: &Path) -> Within<'_> {
        Within { label: "a/1-outer", directory, relative: "streams/a/1-outer", clock: HostClock::default() }
    }

    #[test]
    fn nested_results_come_to_their_place_and_into_the_order() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        for (run, time) in
            [("inner", "2026-11-21T22:37:25.000000Z"), ("inner.2", "2026-11-21T22:37:23.000000Z")]
        {
            let run = data.join(RESULTS_DIRECTORY).join(run);
            fs::create_dir_all(run.join("streams/x/1-y")).unwrap();
            fs::write(run.join("streams/x/1-y/stdout"), run.to_string_lossy().as_bytes()).unwrap();
            let task = serde_json::json!({
                "directory": "streams/x/1-y", "enqueue_time": time, "within": (time.contains("23.")).then_some("z/1-w"),
            });
            let report = serde_json::json!({"tasks": [task, 7]});
            fs::write(run.join("test.json"), report.to_string()).unwrap();
        }
        std::os::unix::fs::symlink("inner.2", data.join(RESULTS_DIRECTORY).join("latest")).unwrap();
        fs::write(data.join("own"), "kept").unwrap();
        let tasks = bring_home(within(directory.path())).unwrap();
        let told: Vec<String> = tasks
            .iter()
            .map(|task| format!("{} in {}", task.report["directory"], task.report["within"]))
            .collect();
        assert_eq!(
            told,
            [
                r#""streams/a/1-outer/streams.2/x/1-y" in "a/1-outer/z/1-w""#,
                r#""streams/a/1-outer/streams/x/1-y" in "a/1-outer""#
            ]
        );
        assert!(directory.path().join("streams/x/1-y/stdout").exists());
        assert!(directory.path().join("streams.2/test.json").exists());
        assert!(!data.join(RESULTS_DIRECTORY).exists() && data.join("own").exists());
    }

    #[test]
    fn a_block_that_ran_nothing_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        assert!(bring_home(within(directory.path())).unwrap().is_empty());
        assert!(!directory.path().join("streams").exists());
    }
}
