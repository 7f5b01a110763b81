//! Spools that are written, cut, damaged and read again.

use std::{fs, os::unix::fs::FileExt as _};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const LARGE: Quota = Quota { head_bytes: u64::MAX, tail_bytes: 1024 };

fn spool(quota: Quota) -> (TempDir, SpoolWriter) {
    let dir = tempfile::tempdir().unwrap();
    let writer = SpoolWriter::create(dir.path().join("spool"), quota).unwrap();
    (dir, writer)
}

fn read_all(dir: &TempDir, limit: u64, max_bytes: usize) -> Vec<LogRecord> {
    let reader = SpoolReader::open(dir.path().join("spool")).unwrap();
    let (mut records, mut position) = (Vec::new(), 0);
    loop {
        let (more, next) = reader.read(position, limit, max_bytes).unwrap();
        if more.is_empty() {
            return records;
        }
        records.extend(more);
        position = next;
    }
}

/// Every output as ranges: `Ok` bytes that are there, `Err` how many are missing. Checks that offsets join.
fn content(records: &[LogRecord], channel: LogChannel) -> Vec<Result<Vec<u8>, u64>> {
    let (mut parts, mut expected) = (Vec::<Result<Vec<u8>, u64>>::new(), 0);
    for record in records.iter().filter(|record| record.channel == channel) {
        assert_eq!(record.offset, expected, "records of a channel join");
        if record.skipped_bytes > 0 {
            expected += record.skipped_bytes;
            parts.push(Err(record.skipped_bytes));
        } else {
            expected += record.data.len() as u64;
            match parts.last_mut() {
                Some(Ok(bytes)) => bytes.extend_from_slice(&record.data),
                _ => parts.push(Ok(record.data.to_vec())),
            }
        }
    }
    parts
}

fn sha256(bytes: &[u8]) -> String {
    text::hex(&Sha256::digest(bytes))
}

#[test]
fn what_is_announced_can_be_read_while_more_is_written() {
    let (dir, mut writer) = spool(LARGE);
    let first = writer.append(LogChannel::Stdout, 1, b"one\n").unwrap();
    writer.append(LogChannel::Stderr, 2, b"two\n").unwrap();
    let records = read_all(&dir, first, RECORD_BYTES_MAX);
    assert_eq!(content(&records, LogChannel::Stdout), [Ok(b"one\n".to_vec())]);
    assert!(content(&records, LogChannel::Stderr).is_empty());
    let records = read_all(&dir, writer.position(), RECORD_BYTES_MAX);
    assert_eq!(content(&records, LogChannel::Stderr), [Ok(b"two\n".to_vec())]);
    assert_eq!(records[1].read_time_ns, 2);
}

#[test]
fn the_last_records_are_found_from_the_end_whatever_is_printed() {
    let (dir, mut writer) = spool(LARGE);
    let mut boundaries = vec![16];
    for number in 0..400_u32 {
        // What looks like a record, in the middle of one.
        let header =
            RecordHeader { length: 3, channel: LogChannel::Stdout, skipped: false, offset: 7, time_ns: 9 };
        let forged = [&number.to_le_bytes()[..], &header.encode(b"abc"), b"abc", &[1; 90]].concat();
        boundaries.push(writer.append(LogChannel::Stderr, number.into(), &forged).unwrap());
    }
    let limit = writer.position();
    let reader = SpoolReader::open(dir.path().join("spool")).unwrap();
    for window in [0, 20, 153, 154, 1_000, 20_000] {
        let found = reader.last_records(limit, window).unwrap();
        let first = boundaries.iter().copied().find(|at| limit - at <= window as u64);
        assert_eq!(Some(found), first, "{window}");
    }
    assert_eq!(reader.last_records(limit, 1 << 20).unwrap(), 16);
    assert_eq!(reader.last_records(boundaries[7], 306).unwrap(), boundaries[5]);
}

#[test]
fn a_record_that_does_not_fit_is_left_for_a_larger_read() {
    let (dir, mut writer) = spool(LARGE);
    let position = writer.append(LogChannel::Stdout, 1, &[7; 1000]).unwrap();
    let reader = SpoolReader::open(dir.path().join("spool")).unwrap();
    let (records, next) = reader.read(0, position, 500).unwrap();
    assert!(records.is_empty());
    let (records, next) = reader.read(next, position, 2000).unwrap();
    assert_eq!((records.len(), next), (1, position));
}

#[test]
fn head_gap_and_tail_are_exact() {
    let (dir, mut writer) = spool(Quota { head_bytes: 10, tail_bytes: 8 });
    writer.mark(Phase::Run, 1).unwrap();
    writer.append(LogChannel::Stdout, 2, b"0123456").unwrap();
    let position = writer.append(LogChannel::Stderr, 3, b"abcdef").unwrap();
    for piece in [&b"789"[..], b"uvw", b"xyzABCDEF"] {
        assert_eq!(
            writer.append(LogChannel::Stdout, 4, piece).unwrap(),
            position,
            "the tail is not announced"
        );
    }
    let totals = writer.finish();
    let records = read_all(&dir, totals.end_position, RECORD_BYTES_MAX);
    assert_eq!(
        content(&records, LogChannel::Stdout),
        [Ok(b"0123456".to_vec()), Err(7), Ok(b"yzABCDEF".to_vec())]
    );
    assert_eq!(content(&records, LogChannel::Stderr), [Ok(b"abc".to_vec()), Err(3)]);
    assert!(
        records.iter().rposition(|r| r.skipped_bytes > 0) < records.iter().rposition(|r| !r.data.is_empty())
    );
    assert!(totals.truncated);
    assert_eq!(totals.stdout_sha256, sha256(b"0123456789uvwxyzABCDEF"));
    assert_eq!((totals.stdout_bytes, totals.stderr_bytes), (22, 6));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the tail files are gone");
}

#[test]
fn a_tail_that_never_overflowed_loses_nothing() {
    let (dir, mut writer) = spool(Quota { head_bytes: 4, tail_bytes: 8 });
    writer.append(LogChannel::Stdout, 1, b"0123456789ab").unwrap();
    let totals = writer.finish();
    assert!(!totals.truncated);
    let records = read_all(&dir, totals.end_position, RECORD_BYTES_MAX);
    assert_eq!(content(&records, LogChannel::Stdout), [Ok(b"0123456789ab".to_vec())]);
}

#[test]
fn marks_survive_when_the_output_around_them_is_dropped() {
    let (dir, mut writer) = spool(Quota { head_bytes: 4, tail_bytes: 4 });
    writer.mark(Phase::Setup, 1).unwrap();
    writer.append(LogChannel::Stdout, 2, b"aaaaaa").unwrap();
    writer.mark(Phase::Run, 3).unwrap();
    writer.append(LogChannel::Stdout, 4, b"bbbbbbbbbbbbbbbbbbbbbbbbb").unwrap();
    writer.append(LogChannel::Stdout, 4, b"ccc").unwrap();
    writer.mark(Phase::Teardown, 5).unwrap();
    let totals = writer.finish();
    let records = read_all(&dir, totals.end_position, RECORD_BYTES_MAX);
    let marks: Vec<&[u8]> = records
        .iter()
        .filter(|record| record.channel == LogChannel::Mark)
        .map(|record| &*record.data)
        .collect();
    assert_eq!(marks, [&b"setup"[..], b"run", b"teardown"]);
    assert_eq!(content(&records, LogChannel::Stdout), [Ok(b"aaaa".to_vec()), Err(26), Ok(b"bccc".to_vec())]);
}

#[test]
fn torn_and_damaged_records_are_found_with_their_place() {
    let (dir, mut writer) = spool(LARGE);
    let first = writer.append(LogChannel::Stdout, 1, b"first").unwrap();
    let end = writer.append(LogChannel::Stdout, 2, b"second").unwrap();
    let path = dir.path().join("spool");
    let reader = SpoolReader::open(&path).unwrap();
    let damage = |position, limit| {
        let error = reader.read(position, limit, RECORD_BYTES_MAX).unwrap_err();
        error.get_ref().unwrap().downcast_ref::<SpoolDamage>().unwrap().clone()
    };
    assert_eq!(damage(0, end - 1).position, first, "an end inside a record");
    assert_eq!(damage(first + 3, end).position, first + 3, "a position inside a record");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"X", end - 1).unwrap();
    assert_eq!(damage(0, end).what, "a record does not match its checksum");
    assert_eq!(damage(first, end).position, first);
    file.set_len(end - 2).unwrap();
    assert_eq!(damage(first, end).what, "a record is cut off");
    file.set_len(first).unwrap();
    assert_eq!(damage(0, end).what, "the file ends before the end that was announced");
    file.set_len(3).unwrap();
    assert_eq!(SpoolReader::open(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn the_last_lines_are_those_of_both_outputs() {
    let (_dir, mut writer) = spool(LARGE);
    for number in 0..30 {
        writer.append(LogChannel::Stdout, 1, format!("line {number}\n").as_bytes()).unwrap();
    }
    writer.append(LogChannel::Stderr, 1, b"a\nb\r\nhalf").unwrap();
    writer.append(LogChannel::Stderr, 1, b" a line").unwrap();
    let lines = writer.last_lines();
    assert_eq!(lines.len(), limits::LAST_LINES_COUNT);
    assert_eq!(lines[0], "line 23");
    assert_eq!(lines[7..], ["a", "b", "half a line"]);
    writer.append(LogChannel::Stderr, 1, b"!\n").unwrap();
    assert_eq!(writer.last_line().unwrap(), "half a line!");
    let many: String = (0..1000).map(|number| format!("{number}\n")).collect();
    writer.append(LogChannel::Stdout, 1, many.as_bytes()).unwrap();
    assert_eq!(writer.last_lines(), (990..1000).map(|number| number.to_string()).collect::<Vec<_>>());
    writer.append(LogChannel::Stdout, 1, &vec![b'x'; 100_000]).unwrap();
    let line = writer.last_line().unwrap();
    assert!(line.ends_with('…') && line.len() <= limits::LAST_LINE_BYTES_MAX + 3);
}

#[test]
fn a_full_disk_costs_output_but_neither_counts_nor_order() {
    let (dir, mut writer) = spool(LARGE);
    writer.append(LogChannel::Stdout, 1, b"kept").unwrap();
    // A descriptor that cannot be written to stands in for a disk that is full.
    let path = dir.path().join("spool");
    let good = std::mem::replace(&mut writer.file, File::open(&path).unwrap());
    let before = writer.position();
    writer.append(LogChannel::Stdout, 2, b"lost").unwrap_err();
    assert_eq!(writer.position(), before);
    writer.file = good;
    writer.append(LogChannel::Stdout, 3, b"back").unwrap();
    let totals = writer.finish();
    assert!(totals.truncated && writer.first_error().is_some());
    assert_eq!(totals.stdout_sha256, sha256(b"keptlostback"));
    let records = read_all(&dir, totals.end_position, RECORD_BYTES_MAX);
    assert_eq!(content(&records, LogChannel::Stdout), [Ok(b"kept".to_vec()), Err(4), Ok(b"back".to_vec())]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn head_and_tail_hold_what_the_quota_says(
        pieces in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 1..40)), 0..60),
        head_bytes in 0_usize..200,
        tail_bytes in 1_usize..100,
        max_bytes in 68_usize..400,
    ) {
        let (dir, mut writer) = spool(Quota { head_bytes: head_bytes as u64, tail_bytes: tail_bytes as u64 });
        let (mut all, mut outputs) = (Vec::new(), [Vec::new(), Vec::new()]);
        for (is_stderr, piece) in &pieces {
            let channel = if *is_stderr { LogChannel::Stderr } else { LogChannel::Stdout };
            writer.append(channel, 1, piece).unwrap();
            for byte in piece {
                all.push((*is_stderr, *byte));
            }
            outputs[usize::from(*is_stderr)].extend_from_slice(piece);
        }
        let totals = writer.finish();
        let records = read_all(&dir, totals.end_position, max_bytes);
        let kept = |from: &[(bool, u8)], stderr| from.iter().filter(|b| b.0 == stderr).map(|b| b.1).collect::<Vec<u8>>();
        let head = head_bytes.min(all.len());
        let tail = all.len().saturating_sub(tail_bytes).max(head);
        prop_assert_eq!(totals.truncated, tail > head);
        for (stderr, channel) in [(false, LogChannel::Stdout), (true, LogChannel::Stderr)] {
            let (before, after) = (kept(&all[..head], stderr), kept(&all[tail..], stderr));
            let missing = kept(&all[head..tail], stderr).len() as u64;
            let mut expected = Vec::new();
            if missing > 0 {
                expected.extend((!before.is_empty()).then_some(Ok(before)));
                expected.push(Err(missing));
                expected.extend((!after.is_empty()).then_some(Ok(after)));
            } else if !before.is_empty() || !after.is_empty() {
                expected.push(Ok([before, after].concat()));
            }
            prop_assert_eq!(content(&records, channel), expected);
        }
        prop_assert_eq!(totals.stdout_sha256, sha256(&outputs[0]));
        prop_assert_eq!(totals.stderr_sha256, sha256(&outputs[1]));
    }
}

/// Prints what appends and reads cost in processor time, which other work on the machine does not blur:
/// `cargo test --release -p millstream-agent spool_speed -- --ignored --nocapture`.
#[test]
#[ignore = "measures; run it alone, in release"]
fn spool_speed() {
    fn seconds(work: impl FnOnce()) -> f64 {
        let now = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        };
        let start = now();
        work();
        now() - start
    }
    let line = b"0123456789 abcdefghijklmnopqrstuvwxyz 0123456789 abcdefghijklmnopqrstuvwxyz 012\n";
    for (size, total) in [(256 * 1024, 1 << 30), (64 * 1024, 1 << 30), (4096, 1 << 28), (80, 1 << 26)] {
        let (dir, mut writer) = spool(Quota::default());
        let piece: Vec<u8> = line.iter().copied().cycle().take(size).collect();
        let count = total / size;
        let wrote = seconds(|| {
            for _ in 0..count {
                writer.append(LogChannel::Stdout, 1, &piece).unwrap();
            }
        });
        let limit = writer.position();
        let reader = SpoolReader::open(dir.path().join("spool")).unwrap();
        let read = seconds(|| {
            let mut position = 0;
            while position < limit {
                position = reader.read(position, limit, 1 << 20).unwrap().1;
            }
        });
        let rate = |seconds: f64| (count * size) as f64 / seconds / 1e6;
        let each = wrote * 1e6 / count as f64;
        println!(
            "{size:>7} B: append {:.0} MB/s, {each:.2} us each; read {:.0} MB/s",
            rate(wrote),
            rate(read)
        );
    }
    let data = vec![7_u8; 1 << 28];
    let sha256 = seconds(|| assert_ne!(Sha256::digest(&data)[..4], [0; 4]));
    let crc32 = seconds(|| assert_ne!(crc32fast::hash(&data), 0));
    println!("SHA-256 {:.0} MB/s, CRC-32 {:.0} MB/s", 268.4 / sha256, 268.4 / crc32);
}
