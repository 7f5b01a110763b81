//! Processes that are made, signalled and reaped, and why some cannot be.

use std::{
    fs,
    io::{PipeReader, Read as _},
    os::unix::fs::PermissionsExt as _,
};

use super::*;
use crate::supervisor::account;

struct Ran {
    exit: Exit,
    stdout: String,
    failure: Option<StartFailure>,
}

fn launch(argv: &[&str]) -> Launch {
    Launch {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        environment: vec![("PATH".to_owned(), "/nowhere:/usr/bin:/bin".to_owned())],
        working_directory: "/".into(),
        user: None,
        moved: None,
        held: false,
        reports: None,
    }
}

/// This one, and one that can do nothing that came later.
fn kernels() -> [&'static Kernel; 2] {
    [kernel(), &Kernel::OLD]
}

fn start(launch: &Launch) -> (Process, PipeReader) {
    start_on(kernel(), launch)
}

fn start_on(kernel: &Kernel, launch: &Launch) -> (Process, PipeReader) {
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let (reader, writer) = io::pipe().unwrap();
    let ends = (writer.as_fd(), writer.as_fd());
    let reports = launch.reports.map(|_| writer.as_fd());
    let channels = Channels { null: null.as_fd(), stdout: ends.0, stderr: ends.1, reports };
    (spawn_on(kernel, launch, channels, Placement::default()).unwrap(), reader)
}

fn wait(process: &mut Process) -> Exit {
    let pid = Pid::from_raw(i32::try_from(process.pid()).unwrap()).unwrap();
    waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
    assert!(process.has_ended());
    process.reap().unwrap().unwrap()
}

fn run(launch: &Launch) -> Ran {
    run_on(kernel(), launch)
}

fn run_on(kernel: &Kernel, launch: &Launch) -> Ran {
    let (mut process, mut reader) = start_on(kernel, launch);
    let mut stdout = String::new();
    reader.read_to_string(&mut stdout).unwrap();
    let exit = wait(&mut process);
    assert_eq!(process.reap().unwrap(), None, "reaped once");
    process.signal(libc::SIGKILL).unwrap();
    Ran { exit, stdout, failure: process.failure() }
}

fn refusal(launch: &Launch) -> String {
    let ran = run(launch);
    assert_eq!(ran.exit, Exit::Code(127));
    ran.failure.unwrap().refusal(launch).detail
}

#[test]
fn a_program_is_found_and_gets_its_arguments_environment_and_directory() {
    let mut launch = launch(&["sh", "-c", "echo $1 $GREETING $(pwd)", "x", "a b"]);
    launch.environment.push(("GREETING".to_owned(), "hello".to_owned()));
    launch.working_directory = "/usr".into();
    let ran = run(&launch);
    assert_eq!((ran.exit, &*ran.stdout, ran.failure), (Exit::Code(0), "a b hello /usr\n", None));
}

#[test]
fn a_program_starts_with_clean_signals_descriptors_and_a_group_of_its_own() {
    let script = "grep -E '^(SigBlk|SigIgn)' /proc/self/status; ls /proc/$$/fd; \
                  test $(ps -o pgid= -p $$) = $$ && test $(ps -o sid= -p $$) = $$ && echo leader";
    for kernel in kernels() {
        let ran = run_on(kernel, &launch(&["bash", "-c", script]));
        let mask = |name: &str| {
            let line = ran.stdout.lines().find(|line| line.starts_with(name)).unwrap();
            u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap()
        };
        // The C library keeps 32 and 33 for itself and lets nobody change them.
        assert_eq!((mask("SigBlk"), mask("SigIgn") & !(0b11 << 31)), (0, 0), "{}", ran.stdout);
        // Bash itself may keep 255.
        let descriptors: Vec<_> =
            ran.stdout.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|&n| n < 255).collect();
        assert_eq!(descriptors, [0, 1, 2], "{}", ran.stdout);
        assert!(ran.stdout.ends_with("leader\n"), "{}", ran.stdout);
    }
}

#[test]
fn outputs_can_be_moved_out_of_the_way() {
    let mut launch = launch(&["sh", "-c", "echo lost; echo also lost >&2; echo kept >&7; echo too >&3"]);
    launch.moved = Some((3, 7));
    for kernel in kernels() {
        assert_eq!(run_on(kernel, &launch).stdout, "kept\ntoo\n");
    }
}

#[test]
fn phases_are_told_on_a_descriptor_that_no_output_has() {
    let moved = OutputDescriptors::Moved { stdout: 9, stderr: 8 };
    assert_eq!((report_descriptor(OutputDescriptors::Standard), report_descriptor(moved)), (9, 7));
    let mut launch = launch(&["bash", "-c", "echo told >&7; echo lost; ls /proc/$$/fd >&9"]);
    (launch.moved, launch.reports) = (Some((9, 8)), Some(7));
    for kernel in kernels() {
        assert_eq!(run_on(kernel, &launch).stdout.replace("255\n", ""), "told\n0\n1\n2\n7\n8\n9\n");
    }
}

#[test]
fn codes_and_signals_are_told_apart() {
    assert_eq!(run(&launch(&["sh", "-c", "exit 3"])).exit, Exit::Code(3));
    assert_eq!(run(&launch(&["sh", "-c", "kill -USR1 $$"])).exit, Exit::Signal(libc::SIGUSR1));
}

#[test]
fn a_held_process_begins_when_it_is_let_go_and_not_before() {
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("mark");
    let mut launch = launch(&["touch", mark.to_str().unwrap()]);
    launch.held = true;
    let (mut process, _reader) = start(&launch);
    assert!(process.reap().unwrap().is_none() && !mark.exists());
    process.let_go();
    process.let_go();
    assert_eq!(wait(&mut process), Exit::Code(0));
    assert!(mark.exists());
    // One whose maker is gone ends without having begun.
    fs::remove_file(&mark).unwrap();
    let (mut process, _reader) = start(&launch);
    process.gate = None;
    assert_eq!(wait(&mut process), Exit::Code(0));
    assert!(!mark.exists());
}

#[test]
fn a_held_process_keeps_nothing_of_ours_open() {
    for kernel in kernels() {
        let (mut ours, ours_end) = io::pipe().unwrap();
        // More than the kernel lists at once.
        let many: Vec<_> = (0..200).map(|_| ours_end.try_clone().unwrap()).collect();
        let mut held = launch(&["true"]);
        held.held = true;
        let (mut process, _reader) = start_on(kernel, &held);
        drop((ours_end, many));
        // Forked but not yet past closing: it does so without being let go, so that this read ends.
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        process.signal(libc::SIGKILL).unwrap();
        assert_eq!(wait(&mut process), Exit::Signal(libc::SIGKILL));
    }
}

#[test]
fn a_signal_reaches_the_whole_group() {
    for kernel in kernels() {
        let script = "sleep 1000 & echo up; wait";
        let (mut process, mut reader) = start_on(kernel, &launch(&["sh", "-c", script]));
        let mut up = [0; 3];
        reader.read_exact(&mut up).unwrap();
        process.signal(libc::SIGTERM).unwrap();
        assert_eq!(wait(&mut process), Exit::Signal(libc::SIGTERM));
        // Its end is seen when both have let the pipe go.
        assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
    }
}

#[test]
fn why_a_program_cannot_start_is_one_clear_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode: u32| {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    assert_eq!(
        refusal(&launch(&["no-such-program"])),
        "`no-such-program` is not on this host's PATH (/nowhere:/usr/bin:/bin): install it or give its whole path"
    );
    assert_eq!(refusal(&launch(&["./no-such-file"])), "`./no-such-file` does not exist (looked up from `/`)");
    let plain = file("plain", "#!/bin/sh\n", 0o644);
    assert_eq!(
        refusal(&launch(&[&plain])),
        format!("`{plain}` may not be executed: give it and its directories execute permission")
    );
    let orphan = file("orphan", "#!/no/such/interpreter\n", 0o755);
    assert_eq!(
        refusal(&launch(&[&orphan])),
        format!("`{orphan}` exists but the interpreter or loader that it names does not")
    );
    let text = file("text", "echo hello\n", 0o755);
    assert_eq!(
        refusal(&launch(&[&text])),
        format!("`{text}` is no program: a script needs a first line such as `#!/bin/sh`")
    );
    let mut homeless = launch(&["true"]);
    homeless.working_directory = "/no/such/directory".into();
    assert_eq!(
        refusal(&homeless),
        "the working directory `/no/such/directory` cannot be entered: No such file or directory (os error 2)"
    );
}

#[test]
#[ignore = "needs root: it alone can become another user"]
fn another_user_is_become() {
    let mut launch = launch(&["sh", "-c", "id -u; id -g; id -G"]);
    let nobody = account::find("nobody").unwrap();
    launch.user = Some(nobody.clone());
    let groups: Vec<_> = nobody.groups.iter().map(u32::to_string).collect();
    let expected = format!("{}\n{}\n{}\n", nobody.uid, nobody.gid, groups.join(" "));
    assert_eq!(run(&launch).stdout, expected);
}

#[test]
fn a_user_that_cannot_be_become_is_refused() {
    let mut launch = launch(&["true"]);
    let mut nobody = account::find("nobody").unwrap();
    // The kernel takes no such group, not even from root; to others it refuses any.
    nobody.groups = vec![u32::MAX];
    launch.user = Some(nobody);
    let told = refusal(&launch);
    assert!(told.starts_with("cannot become user `nobody`: "), "{told}");
    assert!(told.ends_with("; the agent must run as root for that"), "{told}");
}

#[test]
fn a_program_that_is_being_written_is_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("busy");
    fs::copy("/bin/true", &path).unwrap();
    let writer = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let (mut process, _reader) = start(&launch(&[path.to_str().unwrap()]));
    // It has met the busy file once at least: its own command line is still ours.
    drop(writer);
    assert_eq!(wait(&mut process), Exit::Code(0));
    assert_eq!(process.failure(), None);
}

#[test]
fn a_nul_is_refused_before_a_process_is_made() {
    let null = fs::File::open("/dev/null").unwrap();
    let ends = (null.as_fd(), null.as_fd());
    let channels = Channels { null: null.as_fd(), stdout: ends.0, stderr: ends.1, reports: None };
    let launch = launch(&["true", "a\0b"]);
    let error = spawn(&launch, channels, Placement::default()).unwrap_err();
    assert_eq!(error.refusal(&launch).detail, "failed to start `true`: the argument list holds a NUL");
}
