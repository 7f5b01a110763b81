//! Where results lie: every path under a directory of results. Pure: names, no files.

use std::path::{Path, PathBuf};

use millstream_common::id::{BlockName, StreamName, TestName};

/// How the tasks of a test are laid out on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// A directory for each stream, its tasks in it by their number in the stream: `streams/server/1-netserver`.
    #[default]
    Queue,
    /// All tasks beside each other by their number in the test: `1-netserver`, `2-netperf`.
    Flat,
}

/// What everything of a test is called, in its directory.
pub(crate) const TEST_FILE: &str = "test.json";
/// What a stream is called.
pub(crate) const STREAM_FILE: &str = "stream.json";
/// What came of a task.
pub(crate) const RESULT_FILE: &str = "result.json";
/// Both outputs with times; of the test: what main and the controller did.
pub(crate) const DEBUG_FILE: &str = "debug.log";
/// Standard output, byte for byte.
pub(crate) const STDOUT_FILE: &str = "stdout";
/// Standard error, byte for byte.
pub(crate) const STDERR_FILE: &str = "stderr";
/// Short text for people.
pub(crate) const WHITEBOARD_FILE: &str = "whiteboard";
/// What a block left, or main.
pub(crate) const DATA_DIRECTORY: &str = "data";
/// Beside the tests: the newest of them.
pub(crate) const LATEST_LINK: &str = "latest";

impl Layout {
    /// Directory of a task, seen from the test's.
    #[must_use]
    pub(crate) fn task_directory(
        self,
        stream: &StreamName,
        stream_number: u32,
        test_number: u32,
        block: &BlockName,
    ) -> PathBuf {
        match self {
            Self::Queue => stream_directory(stream).join(format!("{stream_number}-{block}")),
            Self::Flat => PathBuf::from(format!("{test_number}-{block}")),
        }
    }
}

/// Directory of a stream, seen from the test's.
#[must_use]
pub(crate) fn stream_directory(stream: &StreamName) -> PathBuf {
    Path::new("streams").join(stream.as_str())
}

/// Directory of the nth run of a test, from 1, seen from the results'.
#[must_use]
pub(crate) fn test_directory(test: &TestName, run: u32) -> String {
    if run <= 1 { test.to_string() } else { format!("{test}.{run}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(layout: Layout, expected: &str) {
        let stream = StreamName::new("server").unwrap();
        let block = BlockName::new("netserver").unwrap();
        assert_eq!(layout.task_directory(&stream, 2, 7, &block), Path::new(expected));
    }

    #[test]
    fn the_default_sorts_by_stream_and_the_flat_one_by_global_order() {
        check(Layout::default(), "streams/server/2-netserver");
        check(Layout::Flat, "7-netserver");
    }

    #[test]
    fn only_the_first_run_has_the_bare_name() {
        let test = TestName::new("multi_netperf").unwrap();
        assert_eq!(test_directory(&test, 1), "multi_netperf");
        assert_eq!(test_directory(&test, 2), "multi_netperf.2");
    }
}
