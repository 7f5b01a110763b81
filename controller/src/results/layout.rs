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
    use proptest::prelude::*;

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

    /// Any text as a block's name, the way a block without a name gets one: many texts have the same.
    fn any_block() -> impl Strategy<Value = BlockName> {
        "[ab/ .]{1,3}".prop_map(|text| BlockName::derived(&text))
    }

    proptest! {
        /// Whatever blocks are called, no two tasks of a test share a directory, and none leaves the test's.
        #[test]
        fn every_task_has_a_directory_of_its_own(tasks in prop::collection::vec((0..3_usize, any_block()), 0..40)) {
            let streams = ["a", "a.1", "1-a"].map(|name| StreamName::new(name).unwrap());
            for layout in [Layout::Queue, Layout::Flat] {
                let mut counts = [0; 3];
                let mut seen = std::collections::BTreeSet::new();
                for (index, (stream, block)) in tasks.iter().enumerate() {
                    counts[*stream] += 1;
                    let number = u32::try_from(index).unwrap() + 1;
                    let path = layout.task_directory(&streams[*stream], counts[*stream], number, block);
                    let normal = |part| matches!(part, std::path::Component::Normal(_));
                    prop_assert!(path.components().all(normal), "{}", path.display());
                    let depth = if layout == Layout::Queue { 3 } else { 1 };
                    prop_assert_eq!(path.components().count(), depth, "{}", path.display());
                    let first = path.components().next().unwrap().as_os_str().to_owned();
                    let taken = [TEST_FILE, DEBUG_FILE, WHITEBOARD_FILE, DATA_DIRECTORY];
                    prop_assert!(!taken.iter().any(|name| first == *name));
                    prop_assert!(layout == Layout::Queue || first != "streams");
                    prop_assert!(seen.insert(path), "two tasks share a directory");
                }
            }
        }
    }

    #[test]
    fn only_the_first_run_has_the_bare_name() {
        let test = TestName::new("multi_netperf").unwrap();
        assert_eq!(test_directory(&test, 1), "multi_netperf");
        assert_eq!(test_directory(&test, 2), "multi_netperf.2");
    }
}
