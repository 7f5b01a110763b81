//! Which program is the agent on a host that has none, and how it gets there: once for each program, under the name of its
//! digest, by a shell script that says what it needs.
//!
//! The script is written to the standard input of a shell of the host. It becomes `stdio` when the program is there; else
//! it asks for the program, checks what it got, gives it its name in one step, and becomes `stdio` then. So half a program
//! never has the name, and two who bring it at once do not disturb each other. A host's own `millstream-agent` is used where
//! it is the same program byte for byte, and where the one that would be brought cannot be run: on another kind of machine,
//! or where nothing can be put. Then it is said, and never done for a program that was named.

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    pin::pin,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use millstream_common::{
    clock::{Ids as _, SystemIds},
    text::{hex, spoken},
};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    task::spawn_blocking,
    time::timeout,
};
use tracing::info;

use super::child::{Answer, AnswerError, ChildPipe, Children, Ended, is_greeting};
use crate::entry;

/// Names the program, after the definition and before everything that is found.
const VARIABLE: &str = "MILLSTREAM_AGENT";
/// The agent's own program.
const PROGRAM: &str = "millstream-agent";
/// What the script says when the program is not there; the machine of the host follows.
const NEED: &str = "millstream-need";
/// What it says when the host's own program stands in; its path follows.
const OWN: &str = "millstream-own";
/// What it says now and then while the program comes; the bytes that have come so far follow.
const TAKEN: &str = "millstream-taken";
/// How long the program may not come on, before the connection is taken for stuck.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// As many times may be said in that while that nothing more has come.
const STANDSTILLS_MAX: u32 = 4;
/// With what the script ends when trying again would not help.
const EXIT_USELESS: i32 = 120;
/// Digits of the digest that name a copy.
const NAME_DIGITS: usize = 16;
/// A piece of the program on its way.
const PIECE_BYTES: usize = 256 * 1024;
/// Machines as `uname -m` calls them, by their number in the head of a program.
const MACHINES: [(u16, &str); 6] =
    [(3, "i686"), (21, "ppc64le"), (22, "s390x"), (62, "x86_64"), (183, "aarch64"), (243, "riscv64")];

/// Starts what leads to a shell of the place, and makes the shell a relay to an agent, whose program is brought unless it is
/// there.
pub(crate) async fn dial(
    children: &Children,
    shell: Command,
    named: Option<&str>,
) -> Result<ChildPipe, BringError> {
    let program = find(named).await?;
    let leads_there = PathBuf::from(shell.get_program());
    let spawned = children.spawn(shell);
    let mut pipe = spawned.map_err(|source| BringError::Spawn { program: leads_there, source })?;
    bring(&mut pipe, &program, &SystemIds.token(), children).await?;
    Ok(pipe)
}

/// Why no program can be brought, or why it does not begin on its host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BringError {
    /// There is none.
    #[error(
        "there is no program to bring: `millstream-agent` is neither beside this program nor in PATH, and this program has no entry. Name one with `agent:` or {VARIABLE}, or add the line `millstream::entry!();` to the file of the test"
    )]
    NoProgram,
    /// What leads to the shell cannot be started.
    #[error("`{}` cannot be started: {}", program.display(), millstream_common::tls::reason(source))]
    Spawn {
        /// The program that should lead there.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It cannot be read.
    #[error("the program `{}` cannot be brought: {}", path.display(), millstream_common::tls::reason(source))]
    Read {
        /// The program.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is for other machines.
    #[error("the host is of the kind {host}, but `{}` is for {own}: give `agent:` the static build for {host}", path.display())]
    Machine {
        /// The program.
        path: PathBuf,
        /// What it is for.
        own: &'static str,
        /// What the host is.
        host: String,
    },
    /// The host has it and cannot start it.
    #[error("`{}` does not run there: {ended}. It may need newer libraries than the host has: give `agent:` the static build", path.display())]
    DoesNotRun {
        /// The program.
        path: PathBuf,
        /// How it ended.
        ended: Ended,
    },
    /// It does not arrive.
    #[error("nothing more of the program `{}` arrived for {} after {taken} of {} bytes", path.display(), spoken(SILENCE_MAX), size_bytes)]
    Stuck {
        /// The program.
        path: PathBuf,
        /// How much had arrived.
        taken: u64,
        /// How much there is.
        size_bytes: u64,
    },
    /// The other end did not answer.
    #[error(transparent)]
    Answer(#[from] AnswerError),
}

impl BringError {
    /// Whether trying again is useless.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::NoProgram
            | Self::Spawn { .. }
            | Self::Read { .. }
            | Self::Machine { .. }
            | Self::DoesNotRun { .. } => true,
            Self::Answer(AnswerError::Terminal | AnswerError::Noise { .. }) => true,
            Self::Answer(AnswerError::Ended { ended, .. }) => ended.code() == Some(EXIT_USELESS),
            Self::Stuck { .. } | Self::Answer(AnswerError::Broken { .. }) => false,
        }
    }
}

/// A program that can be brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    path: PathBuf,
    size_bytes: u64,
    /// SHA-256, which hosts have a tool for.
    digest: String,
    /// What it is for, where its head says so.
    machine: Option<&'static str>,
    /// How it becomes a relay.
    how: How,
    /// Whether somebody named it, so that no other may stand in for it.
    is_named: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum How {
    /// The agent's own program.
    Agent,
    /// A test binary: shell commands that make its path, in `$program`, the relay with the greeting `$token`.
    Entry(String),
}

/// Finds the program to bring: the one that the definition names, the one of the variable, the agent's own beside this
/// program or in the path, this very program.
pub(crate) async fn find(named: Option<&str>) -> Result<Arc<Program>, BringError> {
    let variable = || env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let (path, how, is_named) = match named.map(in_home).or_else(variable) {
        Some(path) => (path, How::Agent, true),
        None => match found() {
            Some(path) => (path, How::Agent, false),
            None => {
                let (path, script) = entry::as_relay().map_err(|_| BringError::NoProgram)?;
                (path, How::Entry(script), false)
            }
        },
    };
    spawn_blocking(move || look_at(path, how, is_named)).await.expect("reading a file does not panic")
}

/// A path as people write it.
pub(crate) fn in_home(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

/// The agent's own program, beside this one (tests lie one directory below it) or in the path.
fn found() -> Option<PathBuf> {
    let this = env::current_exe().ok()?;
    let beside = this.ancestors().skip(1).take(2).map(Path::to_owned);
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path: Vec<PathBuf> = env::split_paths(&path).collect();
    beside.chain(in_path).map(|directory| directory.join(PROGRAM)).find(|program| program.is_file())
}

/// Which file it was: a program that was built anew is another one.
type Version = (PathBuf, u64, i64, i64);

/// Programs that were read: reading one of a hundred megabytes for each connection would be felt.
static KNOWN: Mutex<BTreeMap<Version, Arc<Program>>> = Mutex::new(BTreeMap::new());

fn look_at(path: PathBuf, how: How, is_named: bool) -> Result<Arc<Program>, BringError> {
    let read = || {
        let mut file = File::open(&path)?;
        let found = file.metadata()?;
        let version = (path.clone(), found.size(), found.mtime(), found.mtime_nsec());
        // Whoever comes meanwhile wants the same program, and waits for it here.
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) =
            known.get(&version).filter(|program| program.how == how && program.is_named == is_named)
        {
            return Ok(Arc::clone(program));
        }
        let (mut digest, mut head, mut piece) = (Sha256::new(), None, vec![0; PIECE_BYTES]);
        loop {
            let length = file.read(&mut piece)?;
            if length == 0 {
                break;
            }
            head.get_or_insert_with(|| piece[..length.min(20)].to_vec());
            digest.update(&piece[..length]);
        }
        let program = Arc::new(Program {
            path: path.clone(),
            size_bytes: found.size(),
            digest: hex(&digest.finalize()),
            machine: head.as_deref().and_then(machine),
            how: how.clone(),
            is_named,
        });
        known.insert(version, Arc::clone(&program));
        Ok(program)
    };
    read().map_err(|source| BringError::Read { path: path.clone(), source })
}

/// What an ELF program is for.
fn machine(head: &[u8]) -> Option<&'static str> {
    let number = match head {
        [0x7f, b'E', b'L', b'F', _, 2, .., high, low] if head.len() == 20 => {
            u16::from_be_bytes([*high, *low])
        }
        [0x7f, b'E', b'L', b'F', .., low, high] if head.len() == 20 => u16::from_le_bytes([*low, *high]),
        _ => return None,
    };
    MACHINES.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

/// Makes the shell behind a pipe the relay to an agent; brings the program when it is not there.
async fn bring(
    pipe: &mut ChildPipe,
    program: &Program,
    token: &str,
    children: &Children,
) -> Result<(), BringError> {
    // Whoever refuses to read has ended or does so: the answer says why.
    let _told = pipe.write_all(program.script(token).as_bytes()).await;
    let mut answer = program.answer(pipe, token).await?;
    if answer.word == NEED {
        if let Some(own) = program.machine.filter(|own| *own != answer.rest) {
            let (path, host) = (program.path.clone(), answer.rest);
            return Err(BringError::Machine { path, own, host });
        }
        answer = program.send(pipe, token, children).await?;
    }
    if answer.word == OWN {
        let brought = program.path.display();
        info!(own = answer.rest, %brought, "the host's own agent stands in for the one that cannot be run there");
        answer = program.answer(pipe, token).await?;
    }
    if is_greeting(&answer) {
        return Ok(());
    }
    let ended = Ended { status: None, said: format!("it answered `{}`", answer.word) };
    Err(AnswerError::Ended { ended, noise: String::new() }.into())
}

impl Program {
    /// The file and its digest, when it is the agent's own program and needs no shell to become one.
    pub(crate) fn file(&self) -> Option<(&Path, &str)> {
        matches!(self.how, How::Agent).then_some((&*self.path, &self.digest))
    }

    /// Sends the program, and listens meanwhile: whoever does not want it any more says so, and may not read on.
    async fn send(
        &self,
        pipe: &mut ChildPipe,
        token: &str,
        children: &Children,
    ) -> Result<Answer, BringError> {
        let mut input = pipe.take_input();
        let sent = async {
            let Some(input) = &mut input else { return Ok(()) };
            self.pass(input).await.map_err(|source| BringError::Read { path: self.path.clone(), source })
        };
        let answer = {
            let answer = self.arrival(pipe, token, children);
            let (mut sent, mut answer) = (pin!(sent), pin!(answer));
            tokio::select! {
                answer = &mut answer => answer?,
                sent = &mut sent => {
                    sent?;
                    answer.await?
                }
            }
        };
        pipe.put_input(input);
        Ok(answer)
    }

    /// Passes the file on. An error is one of reading it: why nobody takes it is learned from what comes back.
    async fn pass(&self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let mut file = tokio::fs::File::open(&self.path).await?;
        let (mut piece, mut left) = (vec![0; PIECE_BYTES], self.size_bytes);
        // Not a byte more, for what follows is the pipe's.
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let length = file.read(&mut piece[..most]).await?;
            if length == 0 {
                return Err(io::Error::other("it has become shorter while it was read"));
            }
            if to.write_all(&piece[..length]).await.is_err() {
                return Ok(());
            }
            left -= length as u64;
        }
        Ok(())
    }

    /// Waits for the answer behind the program, as long as more of it arrives.
    async fn arrival(
        &self,
        pipe: &mut ChildPipe,
        token: &str,
        children: &Children,
    ) -> Result<Answer, BringError> {
        let (mut taken, mut standstills) = (0, 0);
        loop {
            let answered = timeout(SILENCE_MAX, self.answer(pipe, token)).await;
            match answered {
                Ok(Ok(answer)) if answer.word == TAKEN => {
                    let now = answer.rest.trim().parse().unwrap_or(0);
                    if now > taken {
                        (taken, standstills) = (now, 0);
                        children.progressed();
                    } else {
                        standstills += 1;
                    }
                }
                Ok(answer) => return answer,
                Err(_elapsed) => standstills = STANDSTILLS_MAX,
            }
            if standstills >= STANDSTILLS_MAX {
                let (path, size_bytes) = (self.path.clone(), self.size_bytes);
                return Err(BringError::Stuck { path, taken, size_bytes });
            }
        }
    }

    async fn answer(&self, pipe: &mut ChildPipe, token: &str) -> Result<Answer, BringError> {
        pipe.answer(token).await.map_err(|error| match error {
            AnswerError::Ended { ended, .. } if does_not_run(&ended) => {
                BringError::DoesNotRun { path: self.path.clone(), ended }
            }
            other => other.into(),
        })
    }

    /// What the shell of the host is told.
    fn script(&self, token: &str) -> String {
        let name = format!("agent-{}", &self.digest[..NAME_DIGITS]);
        let (size, digest, machine) = (self.size_bytes, &self.digest, self.machine.unwrap_or_default());
        let stands_in = if self.is_named { "no" } else { "yes" };
        let mut script = format!(
            "{{\ntoken={token} name={name} size={size} digest={digest} machine={machine} stands_in={stands_in}\n"
        );
        let _ = match &self.how {
            How::Agent => {
                writeln!(script, "become() {{ program=$1; exec \"$program\" stdio --greeting \"$token\"; }}")
            }
            How::Entry(become_relay) => writeln!(script, "become() {{ program=$1; {become_relay}; }}"),
        };
        script.push_str(SCRIPT);
        script
    }
}

/// Whether the host has the program and cannot run it: a loader, or a shell, has said so.
fn does_not_run(ended: &Ended) -> bool {
    matches!(ended.code(), Some(126 | 127)) && ended.said.contains("agent-") || ended.said.contains("GLIBC")
}

/// All of it is read before any of it is done, for it is a group: the shell's own input is what the program comes by.
const SCRIPT: &str = include_str!("program/bring.sh");

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    /// A shell with a home of its own, or what stands for one.
    fn shell(home: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env("HOME", home).env_remove("XDG_CACHE_HOME");
        command
    }

    fn program(directory: &Path, text: &str) -> PathBuf {
        let path = directory.join("agent");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    async fn refusal(agent: &Path, shell: Command) -> BringError {
        dial(&Children::default(), shell, agent.to_str()).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_brought_is_told_with_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path().join("home");
        let absent = directory.path().join("absent");
        let error = refusal(&absent, shell(&home, &["sh"])).await;
        let expected =
            format!("the program `{}` cannot be brought: no such file or directory", absent.display());
        assert_eq!((error.to_string(), error.is_final()), (expected, true));

        let agent = program(directory.path(), "#!/nonexistent/loader\n");
        let error = refusal(&agent, shell(&home, &["sh"])).await;
        let text = error.to_string();
        assert!(
            text.starts_with(&format!(
                "`{}` does not run there: it ended with exit code 12",
                agent.display()
            ))
        );
        assert!(
            text.ends_with(". It may need newer libraries than the host has: give `agent:` the static build"),
            "{text}"
        );
        assert!(error.is_final());
        assert_eq!(
            BringError::NoProgram.to_string(),
            "there is no program to bring: `millstream-agent` is neither beside this program nor in PATH, and this program has no entry. Name one with `agent:` or MILLSTREAM_AGENT, or add the line `millstream::entry!();` to the file of the test"
        );
    }

    /// What a shell of a host does that takes some of the program and no more.
    const STUCK: &str = "read -r _; read -r line; token=${line#token=}; token=${token%% *}\n\
        echo \"millstream-need $token anything\"\n\
        for taken in 3 7 7 7 7 7; do echo \"millstream-taken $token $taken\"; done; cat >/dev/null";

    #[tokio::test]
    async fn a_program_that_comes_on_is_waited_for_and_one_that_does_not_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let agent = program(directory.path(), "twelve bytes");
        let children = Children::default();
        let stuck = shell(directory.path(), &["sh", "-c", STUCK]);
        let error = dial(&children, stuck, agent.to_str()).await.unwrap_err();
        let expected =
            format!("nothing more of the program `{}` arrived for 20 s after 7 of 12 bytes", agent.display());
        assert_eq!((error.to_string(), error.is_final()), (expected, false));
        assert_eq!(children.progress(), 2);
        children.end().await;
    }

    #[tokio::test]
    async fn a_program_that_becomes_shorter_on_its_way_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let agent = program(directory.path(), "twelve bytes");
        let found = find(agent.to_str()).await.unwrap();
        fs::write(&agent, "less").unwrap();
        let error = found.pass(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.to_string(), "it has become shorter while it was read");
        fs::write(&agent, "twelve bytes and more").unwrap();
        let mut passed = Vec::new();
        found.pass(&mut passed).await.unwrap();
        assert_eq!(passed, b"twelve bytes");
    }
}
