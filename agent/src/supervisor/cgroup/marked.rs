//! Processes in words, and those that bear the mark of a task, wherever they are.

use std::fs;

use millstream_common::{outcome::LeakedProcess, text::printable};

use crate::supervisor::stranger::Stranger;

/// Command line of a process.
const COMMAND_BYTES_MAX: usize = 256 - '…'.len_utf8();

/// A process with its command line as text, for people.
pub(crate) fn describe(pid: u32) -> LeakedProcess {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let mut command = read("cmdline");
    while command.last() == Some(&0) {
        command.pop();
    }
    for byte in &mut command {
        if *byte == 0 {
            *byte = b' ';
        }
    }
    if command.is_empty() {
        // It is so young or so dead that only its name is left.
        command = read("comm").trim_ascii_end().to_owned();
    }
    LeakedProcess { pid, command: printable(&command, COMMAND_BYTES_MAX) }
}

/// The mark that a process bears, if it does: the number of its task.
pub(crate) fn mark_of(pid: u32) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mark = environment.split(|&byte| byte == 0).find_map(|variable| variable.strip_prefix(MARK))?;
    Some(std::str::from_utf8(mark).ok()?.to_owned())
}

/// Finds what has left its containment: every process whose environment marks it as belonging to one of these tasks, held
/// for when it is killed, and in words.
pub(crate) fn find_marked(is_ours: impl Fn(&str) -> bool) -> Vec<(Stranger, LeakedProcess)> {
    let mut found = Vec::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if pid == std::process::id() {
            continue;
        }
        // Held before it is looked at: whoever bears the mark is who is held.
        let Some(process) = Stranger::find(pid) else { continue };
        if mark_of(pid).is_some_and(|mark| is_ours(&mark)) {
            found.push((process, describe(pid)));
        }
    }
    found
}

/// The variable that marks every process of a task.
const MARK: &[u8] = b"MILLSTREAM_TASK=";
