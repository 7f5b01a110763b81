//! How this program starts itself again in another role: supervisor, shim, agent, relay, in-block command, block.
//!
//! A role and its arguments travel in the environment, never on the command line: the program may be a test binary whose
//! own command line belongs to its test harness. Nothing here knows what a role does.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{OpenOptionsExt as _, PermissionsExt as _, symlink},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{self, Command, ExitCode},
};

use millstream_common::sync_client::command::main as sync_command;
use serde::{Deserialize, Serialize};

/// Names the role. Every variable that belongs to the entry begins with these words or with `MILLSTREAM_ARG`.
pub const ROLE_VARIABLE: &str = "MILLSTREAM_ENTRY";
/// Set when the real outputs are on [`MOVED_STDOUT`] and [`MOVED_STDERR`].
pub const MOVED_VARIABLE: &str = "MILLSTREAM_ENTRY_MOVED";
/// Number of arguments of the role.
pub const COUNT_VARIABLE: &str = "MILLSTREAM_ARGC";
/// First part of the name of an argument; its number follows.
pub const ARGUMENT_VARIABLE: &str = "MILLSTREAM_ARG_";
/// Descriptor of the real standard output of a program whose harness prints first.
pub const MOVED_STDOUT: i32 = 3;
/// Descriptor of the real standard error of a program whose harness prints first.
pub const MOVED_STDERR: i32 = 4;
/// Lowest descriptor that may be handed to a role besides the standard ones: those below may be moved outputs.
pub const INHERITED_DESCRIPTOR_MIN: i32 = 10;
/// Name of the in-block command.
pub const SYNC_COMMAND: &str = "millstream-sync";

/// What this program is started as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The process that owns one session.
    Supervisor,
    /// The subreaper of one task on hosts without control groups of version 2.
    Shim,
    /// The in-block command `millstream-sync`.
    Sync,
    /// The agent of local streams.
    Child,
    /// One registered Rust function of this program.
    Block,
    /// The relay to the agent of this host.
    Stdio,
    /// The agent that such a relay has started.
    OnDemand,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 7] =
        [Self::Supervisor, Self::Shim, Self::Sync, Self::Child, Self::Block, Self::Stdio, Self::OnDemand];

    /// The role as it stands in the environment.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Supervisor => "supervisor",
            Self::Shim => "shim",
            Self::Sync => "sync",
            Self::Child => "child",
            Self::Block => "block",
            Self::Stdio => "stdio",
            Self::OnDemand => "on-demand",
        }
    }

    fn parse(word: &OsStr) -> Option<Self> {
        Self::ALL.into_iter().find(|role| word == role.word())
    }
}

/// What a role does with its arguments. It runs before any thread was started.
pub type Hook = fn(Vec<OsString>) -> ExitCode;

/// How to start this program again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relaunch {
    /// The program.
    pub program: PathBuf,
    /// Its own arguments: what its harness needs to reach the entry.
    pub arguments: Vec<OsString>,
    /// Whether its harness prints before the entry is reached; then the real outputs are given on descriptors 3 and 4.
    pub moved_output: bool,
}

impl Relaunch {
    /// A program whose `main` begins with [`dispatch`].
    #[must_use]
    pub fn of_program(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), arguments: Vec::new(), moved_output: false }
    }

    /// The running program, when its `main` begins with [`dispatch`].
    ///
    /// # Errors
    /// When the system cannot tell the program's path.
    pub fn of_this_program() -> io::Result<Self> {
        Ok(Self::of_program(env::current_exe()?))
    }

    /// A test binary whose ignored test `entry_test` (its full path, such as `tests::__millstream_entry`) calls
    /// [`dispatch`].
    #[must_use]
    pub fn of_test_binary(program: impl Into<PathBuf>, entry_test: &str) -> Self {
        let arguments = ["--exact", entry_test, "--ignored", "--nocapture", "--test-threads=1"];
        Self { program: program.into(), arguments: arguments.map(OsString::from).into(), moved_output: true }
    }

    /// Variables that make the program take a role.
    #[must_use]
    pub fn environment(&self, role: Role, arguments: &[OsString]) -> Vec<(OsString, OsString)> {
        let mut variables = vec![
            (ROLE_VARIABLE.into(), role.word().into()),
            (COUNT_VARIABLE.into(), arguments.len().to_string().into()),
        ];
        if self.moved_output {
            variables.push((MOVED_VARIABLE.into(), "1".into()));
        }
        let numbered = arguments.iter().enumerate();
        variables
            .extend(numbered.map(|(n, value)| (format!("{ARGUMENT_VARIABLE}{n}").into(), value.clone())));
        variables
    }

    /// A command that starts the program in a role. Set its outputs as usual: they are moved out of the harness's way
    /// when need be. Further descriptors that it is to inherit must not be below [`INHERITED_DESCRIPTOR_MIN`].
    #[must_use]
    pub fn command(&self, role: Role, arguments: &[OsString]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).env_remove(MOVED_VARIABLE).envs(self.environment(role, arguments));
        if self.moved_output {
            move_outputs_at_exec(&mut command);
        }
        command
    }

    /// Puts the in-block command into `bin_directory`. A program that has its command line to itself is the command under
    /// another name, so that hosts without a shell have it too; for all others a shell script passes its arguments on by
    /// the environment and becomes the program.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_sync_command(&self, bin_directory: &Path) -> io::Result<PathBuf> {
        let path = bin_directory.join(SYNC_COMMAND);
        let fresh = bin_directory.join(format!(".{SYNC_COMMAND}.new"));
        // Left by a supervisor that died here.
        let _absent = fs::remove_file(&fresh);
        if self.arguments.is_empty() && !self.moved_output {
            symlink(&self.program, &fresh)?;
        } else {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&fresh)?;
            file.write_all(&self.sync_script())?;
            file.set_permissions(fs::Permissions::from_mode(0o755))?;
        }
        fs::rename(&fresh, &path)?;
        Ok(path)
    }

    fn sync_script(&self) -> Vec<u8> {
        let mut head = String::from(
            "#!/bin/sh\n# Barriers and topics for this block: becomes the program that runs here.\n",
        );
        let _ = write!(
            head,
            "millstream_n=0\n\
             for millstream_argument in \"$@\"; do\n\
             \teval \"{ARGUMENT_VARIABLE}$millstream_n=\\$millstream_argument; export {ARGUMENT_VARIABLE}$millstream_n\"\n\
             \tmillstream_n=$((millstream_n + 1))\n\
             done\n\
             {ROLE_VARIABLE}={} {COUNT_VARIABLE}=$#\n\
             export {ROLE_VARIABLE} {COUNT_VARIABLE}\n",
            Role::Sync.word(),
        );
        if self.moved_output {
            let _ = write!(
                head,
                "{MOVED_VARIABLE}=1\nexport {MOVED_VARIABLE}\n\
                 exec {MOVED_STDOUT}>&1 {MOVED_STDERR}>&2 >/dev/null 2>/dev/null\n"
            );
        }
        let mut script = head.into_bytes();
        script.extend_from_slice(b"exec ");
        script.extend(shell_quoted(self.program.as_os_str()));
        for argument in &self.arguments {
            script.push(b' ');
            script.extend(shell_quoted(argument));
        }
        script.push(b'\n');
        script
    }
}

/// A word that a shell takes literally.
fn shell_quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend_from_slice(b"'\\''"),
            other => quoted.push(other),
        }
    }
    quoted.push(b'\'');
    quoted
}

#[expect(unsafe_code, reason = "descriptors can be moved only between fork and exec")]
fn move_outputs_at_exec(command: &mut Command) {
    let moving = || {
        let null = {
            let opened =
                rustix::fs::open(c"/dev/null", rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty())?;
            // It may be 3 or 4, which the outputs are about to become.
            rustix::io::fcntl_dupfd_cloexec(&opened, MOVED_STDERR + 1)?
        };
        copy_descriptor(1, MOVED_STDOUT)?;
        copy_descriptor(2, MOVED_STDERR)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        Ok(())
    };
    // SAFETY: the closure only makes system calls that are safe between fork and exec: it allocates nothing and takes no
    // lock.
    unsafe {
        command.pre_exec(moving);
    }
}

/// Makes `to` name what `from` names, to be inherited.
#[expect(unsafe_code, reason = "the two descriptors are fixed numbers that this process was given")]
fn copy_descriptor(from: i32, to: i32) -> io::Result<()> {
    use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd};
    // SAFETY: `from` is open: it is a standard descriptor, or one that the starter of this process has passed. The owner
    // made for `to` is forgotten, so that nothing is closed twice.
    let (source, mut target) = unsafe { (BorrowedFd::borrow_raw(from), OwnedFd::from_raw_fd(to)) };
    let copied = rustix::io::dup2(source, &mut target);
    std::mem::forget(target);
    copied.map_err(io::Error::from)
}

/// First line of every `main`: when this process was started in a role, runs it and tells how it ended. A program that
/// has no blocks of its own.
#[must_use]
pub fn dispatch() -> Option<ExitCode> {
    dispatch_with(None)
}

/// As [`dispatch`], for a program whose Rust functions can be blocks: `block` runs one of them.
#[must_use]
pub fn dispatch_with(block: Option<Hook>) -> Option<ExitCode> {
    let Some(word) = env::var_os(ROLE_VARIABLE) else {
        let command = started_as(SYNC_COMMAND);
        return command.then(|| sync_command(env::args_os().skip(1)));
    };
    let role = Role::parse(&word);
    let moved = env::var_os(MOVED_VARIABLE).is_some();
    let arguments = take_arguments();
    if moved && let Err(error) = restore_outputs() {
        complain(&format!("the outputs of role `{}` cannot be put back: {error}", word.display()));
        return Some(ExitCode::from(EXIT_UNUSABLE));
    }
    let Some(role) = role else {
        complain(&format!("`{ROLE_VARIABLE}` names no role of this program: `{}`", word.display()));
        return Some(ExitCode::from(EXIT_UNUSABLE));
    };
    let hook: Option<Hook> = match role {
        Role::Supervisor => Some(crate::supervisor::main),
        Role::Shim => Some(crate::supervisor::shim::main),
        Role::Sync => Some(sync_command),
        Role::Child => return Some(with_itself(moved, arguments, crate::child::main)),
        Role::Stdio => return Some(with_itself(moved, arguments, crate::stdio::main)),
        Role::OnDemand => return Some(with_itself(moved, arguments, crate::on_demand::main)),
        Role::Block => block,
    };
    let Some(hook) = hook else {
        complain(&format!("this program cannot be started as `{}`", role.word()));
        return Some(ExitCode::from(EXIT_UNUSABLE));
    };
    Some(hook(arguments))
}

/// Whether this program was started under a name.
fn started_as(name: &str) -> bool {
    env::args_os().next().is_some_and(|program| Path::new(&program).file_name() == Some(OsStr::new(name)))
}

/// Runs a role that starts this program again: as this process was started, so can others be.
fn with_itself(
    moved_output: bool,
    arguments: Vec<OsString>,
    role: fn(Vec<OsString>, Relaunch) -> ExitCode,
) -> ExitCode {
    match env::current_exe() {
        Ok(program) => {
            let own_arguments = env::args_os().skip(1).collect();
            role(arguments, Relaunch { program, arguments: own_arguments, moved_output })
        }
        Err(error) => {
            complain(&format!("this program's own path cannot be found: {error}"));
            ExitCode::from(EXIT_UNUSABLE)
        }
    }
}

/// As [`dispatch_with`], for an entry inside a test harness: when a role was run, the process ends here, so that the
/// harness does not print its verdict on a block's output.
pub fn dispatch_and_exit(block: Option<Hook>) {
    if let Some(code) = dispatch_with(block) {
        let number = (0..=u8::MAX).find(|&number| ExitCode::from(number) == code);
        process::exit(number.map_or(1, i32::from));
    }
}

/// Exit code of a role that could not be taken.
const EXIT_UNUSABLE: u8 = 125;

/// Standard error may be closed; then there is nobody to tell.
fn complain(message: &str) {
    let _told: io::Result<()> = writeln!(io::stderr(), "millstream: {message}");
}

/// Takes the role's arguments out of the environment, and everything of the entry with them: what this process starts
/// must not take itself for one of its roles.
fn take_arguments() -> Vec<OsString> {
    let count = env::var(COUNT_VARIABLE).ok().and_then(|text| text.parse::<usize>().ok()).unwrap_or(0);
    let arguments = (0..count).map_while(|n| env::var_os(format!("{ARGUMENT_VARIABLE}{n}"))).collect();
    let ours: Vec<OsString> =
        env::vars_os().map(|(name, _)| name).filter(|name| is_entry_variable(name)).collect();
    for name in ours {
        remove_variable(&name);
    }
    arguments
}

/// Whether a variable belongs to the entry, and so must not reach a block.
#[must_use]
pub fn is_entry_variable(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name == COUNT_VARIABLE.as_bytes()
        || name.starts_with(ROLE_VARIABLE.as_bytes())
        || name.starts_with(ARGUMENT_VARIABLE.as_bytes())
}

#[expect(unsafe_code, reason = "the environment may be changed while there is one thread")]
fn remove_variable(name: &OsStr) {
    // SAFETY: `dispatch` is called first in `main`, or by a test harness that runs this alone and only waits for it:
    // nobody else reads the environment now.
    unsafe { env::remove_var(name) }
}

/// Puts the outputs that were moved out of the harness's way back in their place.
#[expect(unsafe_code, reason = "the two descriptors are fixed numbers that this process was given")]
fn restore_outputs() -> io::Result<()> {
    use std::os::fd::{FromRawFd as _, OwnedFd};
    // What the harness has printed so far must go where it belongs, which is nowhere.
    io::stdout().flush()?;
    copy_descriptor(MOVED_STDOUT, 1)?;
    copy_descriptor(MOVED_STDERR, 2)?;
    for moved in [MOVED_STDOUT, MOVED_STDERR] {
        // SAFETY: whoever set the variable has opened these two for this process alone.
        drop(unsafe { OwnedFd::from_raw_fd(moved) });
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{io::Read as _, process::Stdio};

    use super::*;

    /// Lets this test binary take the roles of an agent. It is no test: an ordinary run does nothing here.
    #[test]
    #[ignore = "an entry, started by other tests"]
    fn __millstream_entry() {
        dispatch_and_exit(Some(echo));
    }

    /// How to start this test binary as an agent would start itself.
    pub(crate) fn this_test_binary() -> Relaunch {
        Relaunch::of_test_binary(env::current_exe().unwrap(), "entry::tests::__millstream_entry")
    }

    fn echo(arguments: Vec<OsString>) -> ExitCode {
        println!("{arguments:?} {:?}", env::var_os(ROLE_VARIABLE));
        eprintln!("to standard error");
        io::stdout().flush().unwrap();
        ExitCode::from(7)
    }

    #[test]
    fn a_role_gets_its_arguments_and_clean_outputs_behind_a_test_harness() {
        let arguments = ["one", "two words", ""].map(OsString::from);
        let output = this_test_binary().command(Role::Block, &arguments).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "[\"one\", \"two words\", \"\"] None\n");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "to standard error\n");
        assert_eq!(output.status.code(), Some(7));
    }

    /// Whoever starts a program need not have anything open where the outputs are moved to.
    #[test]
    #[expect(unsafe_code, reason = "descriptors can be closed only between fork and exec")]
    fn outputs_are_moved_where_nothing_was_open() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo the harness; echo moved >&3; echo too >&4"]);
        // SAFETY: two system calls. What is closed belongs to the other process, which uses none of it any more.
        unsafe {
            command.pre_exec(|| {
                [MOVED_STDOUT, MOVED_STDERR].into_iter().for_each(|number| rustix::io::close(number));
                Ok(())
            });
        }
        move_outputs_at_exec(&mut command);
        let output = command.output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "moved\n");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "too\n");
    }

    #[test]
    fn an_unknown_role_is_refused_by_name() {
        let mut command = this_test_binary().command(Role::Block, &[]);
        let output = command.env(ROLE_VARIABLE, "blok").output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(told, "millstream: `MILLSTREAM_ENTRY` names no role of this program: `blok`\n");
    }

    #[test]
    fn the_in_block_command_passes_awkward_arguments_on_and_keeps_the_outputs_apart() {
        let directory = tempfile::tempdir().unwrap();
        let relaunch = this_test_binary();
        let mut script = relaunch.sync_script();
        // The script is tested with the one role that echoes.
        let at = script.windows(4).position(|window| window == b"sync").unwrap();
        script.splice(at..at + 4, *b"block");
        let path = directory.path().join("command");
        fs::write(&path, script).unwrap();
        let mut child = Command::new("sh")
            .arg(&path)
            .args(["a b", "$HOME", "it's", "*", "line\nbreak"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut told = String::new();
        child.stdout.take().unwrap().read_to_string(&mut told).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
        assert_eq!(told, "[\"a b\", \"$HOME\", \"it's\", \"*\", \"line\\nbreak\"] None\n");
    }

    #[test]
    fn the_in_block_command_is_the_program_itself_or_a_script_behind_a_harness() {
        let directory = tempfile::tempdir().unwrap();
        let path = Relaunch::of_program("/opt/it's here/agent").write_sync_command(directory.path()).unwrap();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("/opt/it's here/agent"));

        let behind = Relaunch::of_test_binary("/opt/it's here/test", "tests::entry");
        assert_eq!(behind.write_sync_command(directory.path()).unwrap(), path);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("\nexec '/opt/it'\\''s here/test' '--exact' 'tests::entry' "), "{text}");
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
    }
}
