//! Values that go out and come back, and messages that are no values.

use bytes::Bytes;
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;

fn span(max: Duration) -> impl Strategy<Value = Duration> {
    (1_u64..=u64::try_from(max.as_nanos()).unwrap()).prop_map(Duration::from_nanos)
}

fn safe_path() -> impl Strategy<Value = SafePath> {
    vec("[a-zé ._-]{0,8}[a-z]", 1..5).prop_map(|parts| SafePath::new(parts.join("/")).unwrap())
}

fn source() -> impl Strategy<Value = FileSource> {
    prop_oneof![
        any::<[u8; 32]>().prop_map(|bytes| FileSource::Blob(BlobDigest::from_bytes(bytes))),
        vec(any::<u8>(), 0..100).prop_map(|bytes| FileSource::Inline(bytes.into())),
        "/[a-z/.]{0,20}".prop_map(FileSource::HostPath),
        safe_path().prop_map(FileSource::Link),
    ]
}

fn files() -> impl Strategy<Value = Vec<ShippedFile>> {
    let file = (
        safe_path(),
        select(vec![FilePlace::Work, FilePlace::Private]),
        1_u32..=0o777,
        option::of("[A-Z_]{1,10}"),
        any::<bool>(),
        source(),
    )
        .prop_map(|(path, place, mode, environment_name, environment_holds_directory, source)| {
            ShippedFile { path, place, mode, environment_name, environment_holds_directory, source }
        });
    vec(file, 0..6).prop_map(|mut files| {
        let mut seen = HashSet::new();
        files.retain(|file| seen.insert((file.place, file.path.clone())));
        files
    })
}

fn phase(phase: Phase) -> impl Strategy<Value = PhaseSpec> {
    let output = prop_oneof![
        Just(OutputDescriptors::Standard),
        (3..=9, 1..=6).prop_map(|(stdout, step)| OutputDescriptors::Moved {
            stdout,
            stderr: 3 + (stdout - 3 + step) % 7
        }),
    ];
    (
        "[a-z/]{1,9}",
        vec("[^\0]{0,12}", 0..4),
        option::of(span(limits::WAIT_MAX - Duration::from_millis(1))),
        output,
    )
        .prop_map(move |(program, arguments, timeout, output)| PhaseSpec {
            phase,
            argv: std::iter::once(program).chain(arguments).collect(),
            timeout: timeout.map(|timeout| timeout + Duration::from_millis(1)),
            output,
            reports_phases: false,
        })
}

prop_compose! {
    fn task_spec()(
        stream in "[a-z][a-z0-9 -]{0,20}",
        name in "[a-z][a-z0-9._-]{0,20}",
        numbers in (1_u32.., 1_u32..),
        files in files(),
        setup in option::of(phase(Phase::Setup)),
        run in phase(Phase::Run),
        teardown in option::of(phase(Phase::Teardown)),
        environment in proptest::collection::btree_map("[^=\0]{1,12}", "[^\0]{0,20}", 0..5),
        place in ("[a-z/.]{0,12}", option::of("[a-z0-9]{1,8}")),
        limits in (option::of(1_u64..), option::of(1_u64..), option::of(1_u64..)),
        grace in span(limits::GRACE_MAX),
        quota in (1_u64.., 1_u64..),
        expectation in select(vec![Expectation::Pass, Expectation::Fail, Expectation::Any]),
        drain in any::<bool>(),
        hold in any::<bool>(),
    ) -> TaskSpec {
        TaskSpec {
            stream: StreamName::new(stream).unwrap(),
            name: BlockName::new(name).unwrap(),
            stream_number: numbers.0,
            test_number: numbers.1,
            files,
            phases: setup.into_iter().chain([run]).chain(teardown).collect(),
            environment,
            working_directory: place.0,
            user: place.1,
            limits: ResourceLimits { memory_bytes: limits.0, pids_count: limits.1, cpu_millis: limits.2 },
            grace,
            log_head_bytes: quota.0,
            log_tail_bytes: quota.1,
            expectation,
            failure_policy: if drain { FailurePolicy::Drain } else { FailurePolicy::Continue },
            hold,
        }
    }
}

fn exit() -> impl Strategy<Value = Option<Exit>> {
    option::of(prop_oneof![(0..256).prop_map(Exit::Code), (1..65).prop_map(Exit::Signal)])
}

fn outcome() -> impl Strategy<Value = OutcomeKind> {
    use OutcomeKind::{Cancelled, Error, Failed, Killed, Lost, Passed, Stopped, TimedOut};
    select(vec![Passed, Failed, Killed, TimedOut, Cancelled, Stopped, Error, Lost])
}

fn any_phase() -> impl Strategy<Value = Phase> {
    select(vec![Phase::Setup, Phase::Run, Phase::Teardown])
}

prop_compose! {
    fn phase_end()(phase in any_phase(), outcome in outcome(), exit in exit(), duration in span(limits::WAIT_MAX)) -> PhaseEnd {
        PhaseEnd { phase, outcome, exit, duration }
    }
}

prop_compose! {
    fn task_end()(
        outcome in outcome(),
        reason in select(Reason::ALL.to_vec()),
        phase in option::of(any_phase()),
        exit in exit(),
        detail in "[a-zé ]{0,40}",
        times in (option::of(any::<u64>()), option::of(any::<u64>())),
        run_duration in span(limits::WAIT_MAX),
        phases in vec(phase_end(), 0..=3),
        leaked in vec((any::<u32>(), "[a-z /]{0,20}"), 0..5),
        leaked_count in any::<u32>(),
        counts in (any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()),
        digests in ("([0-9a-f]{64})?", "([0-9a-f]{64})?", "[0-9a-f]{64}"),
        archive in option::of(vec(any::<u8>(), 0..50)),
        lines in vec("[ -~]{0,30}", 0..=limits::LAST_LINES_COUNT),
        skipped in vec("[ -~]{0,30}", 0..4),
    ) -> TaskEnd {
        TaskEnd {
            outcome,
            reason,
            phase,
            exit,
            detail,
            start_time_ns: times.0,
            end_time_ns: times.1,
            run_duration,
            phases,
            leaked: leaked.into_iter().map(|(pid, command)| LeakedProcess { pid, command }).collect(),
            leaked_count,
            log: LogTotals {
                stdout_bytes: counts.0,
                stderr_bytes: counts.1,
                stdout_sha256: digests.0,
                stderr_sha256: digests.1,
                end_position: counts.2,
                truncated: counts.3,
            },
            archive: archive.map(|inline| ArchiveInfo {
                size_bytes: inline.len() as u64,
                sha256: digests.2,
                inline: inline.into(),
            }),
            last_lines: lines,
            skipped,
        }
    }
}

proptest! {
    #[test]
    fn a_specification_comes_back_as_it_was(spec in task_spec()) {
        let wire = v1::TaskSpec::from(&spec);
        let decoded = v1::TaskSpec::decode(&*wire.encode_to_vec()).unwrap();
        prop_assert_eq!(spec_sha256(&wire), spec_sha256(&decoded), "the digest survives the wire");
        prop_assert_eq!(TaskSpec::try_from(decoded).unwrap(), spec);
    }

    #[test]
    fn an_end_comes_back_as_it_was(end in task_end()) {
        let wire = v1::TaskEnd::from(&end).encode_to_vec();
        prop_assert_eq!(TaskEnd::try_from(v1::TaskEnd::decode(&*wire).unwrap()).unwrap(), end);
    }

    #[test]
    fn a_log_record_comes_back_as_it_was(
        channel in select(vec![LogChannel::Stdout, LogChannel::Stderr, LogChannel::Mark]),
        offset in 0..u64::MAX - 1000,
        read_time_ns in any::<u64>(),
        data in vec(any::<u8>(), 0..100),
        skipped_bytes in 0_u64..1000,
    ) {
        let skipped_bytes = if data.is_empty() { skipped_bytes } else { 0 };
        let record = LogRecord { channel, offset, read_time_ns, data: data.into(), skipped_bytes };
        let wire = v1::LogRecord::from(&record).encode_to_vec();
        prop_assert_eq!(LogRecord::try_from(v1::LogRecord::decode(&*wire).unwrap()).unwrap(), record);
    }

    #[test]
    fn no_bytes_make_a_conversion_panic(bytes in vec(any::<u8>(), 0..200)) {
        convert_all(&bytes);
    }

    #[test]
    fn no_damaged_message_makes_a_conversion_panic(
        spec in task_spec(),
        end in task_end(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        for mut bytes in [v1::TaskSpec::from(&spec).encode_to_vec(), v1::TaskEnd::from(&end).encode_to_vec()] {
            for (at, byte) in &damage {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            convert_all(&bytes);
        }
    }
}

/// Reads bytes as every message there is; whatever can be decoded is converted, and what is a value is checked to stay one.
fn convert_all(bytes: &[u8]) {
    if let Ok(spec) = v1::TaskSpec::decode(bytes)
        && let Ok(spec) = TaskSpec::try_from(spec)
    {
        assert_eq!(TaskSpec::try_from(v1::TaskSpec::from(&spec)).unwrap(), spec);
    }
    if let Ok(end) = v1::TaskEnd::decode(bytes)
        && let Ok(end) = TaskEnd::try_from(end)
    {
        assert_eq!(TaskEnd::try_from(v1::TaskEnd::from(&end)).unwrap(), end);
    }
    if let Ok(record) = v1::LogRecord::decode(bytes)
        && let Ok(record) = LogRecord::try_from(record)
    {
        assert_eq!(LogRecord::try_from(v1::LogRecord::from(&record)).unwrap(), record);
    }
    if let Ok(file) = v1::ShippedFile::decode(bytes) {
        let _secret = secret_files_in(vec![file]);
    }
}

fn good() -> v1::TaskSpec {
    v1::TaskSpec {
        stream: "server".to_owned(),
        name: "block".to_owned(),
        stream_number: 1,
        test_number: 1,
        phases: vec![run(&["true"])],
        expectation: v1::Expectation::Pass.into(),
        failure_policy: v1::FailurePolicy::Continue.into(),
        ..Default::default()
    }
}

fn run(argv: &[&str]) -> v1::PhaseSpec {
    let argv = argv.iter().map(ToString::to_string).collect();
    v1::PhaseSpec { phase: v1::Phase::Run.into(), argv, ..Default::default() }
}

fn file(path: &str) -> v1::ShippedFile {
    v1::ShippedFile {
        path: path.to_owned(),
        place: v1::FilePlace::Work.into(),
        source: Some(v1::shipped_file::Source::Inline(Bytes::from_static(b"x"))),
        ..Default::default()
    }
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[test]
fn every_bound_is_checked_and_named() {
    use v1::shipped_file::Source;
    type Change = Box<dyn Fn(&mut v1::TaskSpec)>;
    let phases =
        |phases: Vec<v1::PhaseSpec>| -> Change { Box::new(move |spec| spec.phases = phases.clone()) };
    let files = |files: Vec<v1::ShippedFile>| -> Change { Box::new(move |spec| spec.files = files.clone()) };
    let variable =
        |name: &str, value: &str| v1::EnvironmentVariable { name: name.to_owned(), value: value.to_owned() };
    let variables = |list: Vec<v1::EnvironmentVariable>| -> Change {
        Box::new(move |spec| spec.environment = list.clone())
    };
    let from = |source: Source| v1::ShippedFile { source: Some(source), ..file("a") };
    let of = |phase: v1::Phase| v1::PhaseSpec { phase: phase.into(), ..run(&["true"]) };
    let moved = |stdout, stderr| v1::PhaseSpec {
        stdout_descriptor: stdout,
        stderr_descriptor: stderr,
        ..run(&["true"])
    };
    let large = "x".repeat(200_000);
    let inline_bytes = Bytes::from(vec![0; limits::INLINE_FILE_BYTES_MAX]);
    let inline_files = (0..9).map(|n| v1::ShippedFile {
        source: Some(Source::Inline(inline_bytes.clone())),
        ..file(&format!("{n}"))
    });
    let cases: Vec<(Change, &str)> = vec![
        (
            Box::new(|spec| spec.stream = "a/b".to_owned()),
            "stream: the stream name `a/b` has a `/` at byte 1",
        ),
        (Box::new(|spec| spec.name = String::new()), "name: the block name is empty"),
        (Box::new(|spec| spec.stream_number = 0), "stream_number: is 0: must be between 1 and"),
        (Box::new(|spec| spec.test_number = 0), "test_number: is 0"),
        (Box::new(|spec| spec.expectation = 0), "expectation: holds 0, which is no known expectation"),
        (
            Box::new(|spec| spec.failure_policy = 99),
            "failure_policy: holds 99, which is no known failure policy",
        ),
        (Box::new(|spec| spec.working_directory = "a\0b".to_owned()), "working_directory: holds a NUL"),
        (
            Box::new(|spec| spec.working_directory = "a".repeat(5000)),
            "working_directory: has 5000 bytes: at most 4096",
        ),
        (Box::new(|spec| spec.user = "\0".to_owned()), "user: holds a NUL"),
        (
            Box::new(|spec| spec.grace_duration = seconds(601)),
            "grace_duration: is 601s: must be between 0ns and 600s",
        ),
        (
            Box::new(|spec| spec.grace_duration = seconds(-1)),
            "grace_duration: is no span of time: -1 s and 0 ns",
        ),
        (phases(vec![]), "phases: have no phase `run`"),
        (phases(vec![of(v1::Phase::Setup)]), "phases: have no phase `run`"),
        (
            phases(vec![run(&["true"]), of(v1::Phase::Setup)]),
            "phases[1].phase: setup comes after run: the order is",
        ),
        (phases(vec![run(&["true"]), run(&["true"])]), "phases[1].phase: run comes after run"),
        (phases(vec![of(v1::Phase::Unspecified)]), "phases[0].phase: holds 0, which is no known phase"),
        (phases(vec![of(v1::Phase::Setup), run(&["a\0b"])]), "phases[1].argv[0]: holds a NUL"),
        (phases(vec![run(&[])]), "phases[0].argv: is empty"),
        (phases(vec![run(&[""])]), "phases[0].argv[0]: is empty"),
        (phases(vec![run(&["echo", &large])]), "phases[0].argv: has 200006 bytes: at most 131072"),
        (
            phases(vec![v1::PhaseSpec { timeout: seconds(0), ..run(&["a"]) }]),
            "phases[0].timeout: is 0ns: must be between 1ms",
        ),
        (
            phases(vec![v1::PhaseSpec { timeout: seconds(700_000), ..run(&["a"]) }]),
            "phases[0].timeout: is 700000s",
        ),
        (phases(vec![moved(2, 3)]), "phases[0].stdout_descriptor: is 2: must be between 3 and 9"),
        (phases(vec![moved(3, 0)]), "phases[0].stderr_descriptor: is 0: must be between 3 and 9"),
        (phases(vec![moved(3, 10)]), "phases[0].stderr_descriptor: is 10"),
        (phases(vec![moved(3, u32::MAX)]), "phases[0].stderr_descriptor: is 4294967295"),
        (
            phases(vec![of(v1::Phase::Setup), v1::PhaseSpec { reports_phases: true, ..run(&["a"]) }]),
            "phases[1].reports_phases: is only for a task of one phase",
        ),
        (phases(vec![moved(4, 4)]), "phases[0].stderr_descriptor: `4` stands twice"),
        (variables(vec![variable("", "x")]), "environment[0].name: is empty"),
        (variables(vec![variable("A=B", "x")]), "environment[0].name: holds a `=`"),
        (variables(vec![variable("A", "x"), variable("B", "\0")]), "environment[1].value: holds a NUL"),
        (variables(vec![variable("A", &large)]), "environment[0].value: has 200000 bytes"),
        (variables(vec![variable(&"A".repeat(256), "")]), "environment[0].name: has 256 bytes: at most 255"),
        (variables(vec![variable("A", "x"), variable("A", "y")]), "environment[1].name: `A` stands twice"),
        (
            variables(vec![variable("A", ""); limits::ENVIRONMENT_COUNT_MAX + 1]),
            "environment: has 4097 entries",
        ),
        (files(vec![file("../x")]), "files[0].path: path `../x` is refused: it has a component `.` or `..`"),
        (files(vec![file("/x")]), "files[0].path: path `/x` is refused: it is absolute"),
        (files(vec![file("x"), file("x")]), "files[1].path: `x` stands twice"),
        (
            files(vec![v1::ShippedFile { place: 0, ..file("x") }]),
            "files[0].place: holds 0, which is no known place",
        ),
        (files(vec![v1::ShippedFile { source: None, ..file("x") }]), "files[0].source: is missing"),
        (files(vec![from(Source::BlobBlake3("ABC".to_owned()))]), "files[0].blob_blake3: is not a digest"),
        (files(vec![from(Source::HostPath("etc".to_owned()))]), "files[0].host_path: `etc` is not absolute"),
        (files(vec![from(Source::HostPath("/\0".to_owned()))]), "files[0].host_path: holds a NUL"),
        (
            files(vec![from(Source::LinkTarget("../x".to_owned()))]),
            "files[0].link_target: path `../x` is refused",
        ),
        (
            files(vec![from(Source::Inline(vec![0; 65_537].into()))]),
            "files[0].inline: has 65537 bytes: at most 65536",
        ),
        (
            files(vec![v1::ShippedFile { environment_name: "A=".to_owned(), ..file("x") }]),
            "files[0].environment_name: holds a `=`",
        ),
        (files(inline_files.collect()), "files.inline: has 589824 bytes: at most 524288"),
        (files(vec![file("x"); limits::FILES_COUNT_MAX + 1]), "files: has 10001 entries: at most 10000"),
    ];
    TaskSpec::try_from(good()).unwrap();
    for (change, expected) in cases {
        let mut spec = good();
        change(&mut spec);
        let error = TaskSpec::try_from(spec).unwrap_err().to_string();
        assert!(error.starts_with(expected), "`{error}` does not begin with `{expected}`");
    }
}

#[test]
fn what_is_unset_has_its_default() {
    let spec = TaskSpec::try_from(v1::TaskSpec { files: vec![file("x")], ..good() }).unwrap();
    assert_eq!(spec.grace, limits::GRACE);
    assert_eq!((spec.log_head_bytes, spec.log_tail_bytes), (limits::LOG_HEAD_BYTES, limits::LOG_TAIL_BYTES));
    assert_eq!(spec.files[0].mode, 0o644);
    let mode = |mode| ShippedFile::try_from(v1::ShippedFile { mode, ..file("x") }).unwrap().mode;
    assert_eq!(mode(0o104_755), 0o755, "permission bits alone count");
}

#[test]
fn secret_files_are_inline_and_closed() {
    let open = v1::ShippedFile { mode: 0o644, ..file("key") };
    assert_eq!(secret_files_in(vec![open]).unwrap()[0].mode, 0o600);
    let source = Some(v1::shipped_file::Source::HostPath("/etc/shadow".to_owned()));
    let error = secret_files_in(vec![file("a"), v1::ShippedFile { source, ..file("b") }]).unwrap_err();
    assert_eq!(error.to_string(), "secret_files[1].source: is not inline: a secret file must be");
    let error = secret_files_in(vec![file("a"), file("..")]).unwrap_err();
    assert!(error.to_string().starts_with("secret_files[1].path: "), "{error}");
}

#[test]
fn texts_of_an_end_are_made_safe_and_never_refused() {
    let end = v1::TaskEnd {
        outcome: v1::OutcomeKind::Failed.into(),
        reason: v1::Reason::Exited.into(),
        detail: "\x1b[31m".to_owned() + &"d".repeat(5000),
        last_lines: vec!["\r\n".repeat(500); 50],
        skipped: vec!["s".to_owned(); 500],
        ..Default::default()
    };
    let end = TaskEnd::try_from(end).unwrap();
    assert!(end.detail.starts_with("\\u{1b}[31m") && end.detail.len() <= limits::TEXT_BYTES_MAX + 3);
    assert_eq!(
        (end.last_lines.len(), end.skipped.len()),
        (limits::LAST_LINES_COUNT, limits::SKIPPED_COUNT_MAX)
    );
    assert_eq!(
        TaskEnd::try_from(v1::TaskEnd::from(&end)).unwrap(),
        end,
        "making it safe again changes nothing"
    );
}

#[test]
fn an_end_that_contradicts_itself_is_refused() {
    let end = |change: fn(&mut v1::TaskEnd)| {
        let mut end = v1::TaskEnd::from(&TaskEnd::never_begun(OutcomeKind::Error, Reason::StartFailed, "x"));
        change(&mut end);
        TaskEnd::try_from(end).unwrap_err().to_string()
    };
    let archive =
        || v1::ArchiveInfo { size_bytes: 1, sha256: "0".repeat(64), inline: Bytes::from_static(b"x") };
    assert_eq!(end(|end| end.reason = 0), "reason: holds 0, which is no known reason");
    assert_eq!(
        end(|end| (end.exit_code, end.signal) = (Some(1), Some(9))),
        "signal: is set together with `exit_code`"
    );
    assert_eq!(
        end(|end| end.log.as_mut().unwrap().stdout_sha256 = "x".to_owned()),
        "log.stdout_sha256: is not a digest of 64 lower-case hexadecimal digits"
    );
    assert!(end(|end| end.phases = vec![v1::PhaseEnd::default()]).starts_with("phases[0].phase: holds 0"));
    assert!(end(|end| end.phases = vec![v1::PhaseEnd::default(); 4]).starts_with("phases: has 4 entries"));
    assert!(
        TaskEnd::try_from(v1::TaskEnd {
            archive: Some(archive()),
            ..v1::TaskEnd::from(&TaskEnd::never_begun(OutcomeKind::Error, Reason::StartFailed, "x"))
        })
        .is_ok()
    );
    let wrong = ArchiveInfo::try_from(v1::ArchiveInfo { size_bytes: 2, ..archive() }).unwrap_err();
    assert_eq!(wrong.to_string(), "inline: has 1 bytes, but 2 are announced");
    let huge = ArchiveInfo::try_from(v1::ArchiveInfo { size_bytes: u64::MAX, ..archive() }).unwrap_err();
    assert!(huge.to_string().starts_with("size_bytes: is 18446744073709551615"), "{huge}");
}

#[test]
fn a_log_record_that_contradicts_itself_is_refused() {
    let good = || v1::LogRecord {
        channel: 1,
        read_time: Some(timestamp(1)),
        data: Bytes::from_static(b"x"),
        ..Default::default()
    };
    let error = |record: v1::LogRecord| LogRecord::try_from(record).unwrap_err().to_string();
    assert!(LogRecord::try_from(good()).is_ok());
    assert_eq!(
        error(v1::LogRecord { channel: 0, ..good() }),
        "channel: holds 0, which is no known log channel"
    );
    assert_eq!(error(v1::LogRecord { read_time: None, ..good() }), "read_time: is missing");
    assert_eq!(
        error(v1::LogRecord { skipped_bytes: 1, ..good() }),
        "skipped_bytes: is set together with `data`"
    );
    assert!(error(v1::LogRecord { offset: u64::MAX, ..good() }).starts_with("offset: is "));
    assert!(
        error(v1::LogRecord { data: vec![0; limits::CHUNK_BYTES + 1].into(), ..good() })
            .starts_with("data: has 262145 bytes")
    );
}

#[test]
fn instants_are_never_refused() {
    assert_eq!(timestamp_ns(&timestamp(u64::MAX)), u64::MAX);
    assert_eq!(timestamp_ns(&prost_types::Timestamp { seconds: -1, nanos: 5 }), 0);
    assert_eq!(timestamp_ns(&prost_types::Timestamp { seconds: i64::MAX, nanos: i32::MAX }), u64::MAX);
}
