//! The command of a container engine: started, listened to, and quoted whole when it refuses.

use std::{
    io,
    process::{self, ExitStatus, Stdio},
};

use millstream_common::text::printable;
use tokio::process::Command;

use super::super::child::{AnswerError, Said, hear_out};

/// The most of a command that is quoted.
const ASKED_BYTES_MAX: usize = 512;
/// What is kept of each output of an engine: its end.
const SAID_BYTES_MAX: usize = 64 * 1024;
/// How much is quoted of the beginning of what it says, and of the end.
const QUOTED_BYTES_MAX: (usize, usize) = (1024, 2048);

/// The command of an engine: `podman`, or several words such as `sudo -n docker`.
#[derive(Debug, Clone)]
pub(super) struct Engine {
    words: Vec<String>,
}

/// Why an engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum EngineError {
    /// There is no such command.
    #[error(
        "there is no `{program}` on this machine: install it, or name the engine's command with the key `engine`"
    )]
    Missing {
        /// The command.
        program: String,
    },
    /// It cannot be started.
    #[error("`{asked}` cannot be started: {source}")]
    Start {
        /// The whole command.
        asked: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It gave no pipe.
    #[error("`{asked}`{}: {error}", next_step(&error.to_string()))]
    Silent {
        /// The whole command.
        asked: String,
        /// How it ended.
        error: AnswerError,
    },
    /// It refused.
    #[error("`{asked}` ended with {}{}: {}", spoken(*status), next_step(said), shortened(said))]
    Refused {
        /// The whole command.
        asked: String,
        /// How it ended.
        status: ExitStatus,
        /// Everything that it said.
        said: String,
    },
}

impl EngineError {
    /// Whether there is no such container, or it has ended.
    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::Refused { said, .. } => found_in(&GONE, said),
            Self::Silent { error, .. } => found_in(&GONE, &error.to_string()),
            Self::Missing { .. } | Self::Start { .. } => false,
        }
    }

    /// Whether the engine is doing already what it refuses.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self, Self::Refused { said, .. } if found_in(&["already in progress"], said))
    }
}

impl Engine {
    /// The engine behind these words; there is at least one.
    pub(super) fn new(words: Vec<String>) -> Self {
        assert!(!words.is_empty(), "the type's own name stands for no words");
        Self { words }
    }

    /// The engine with further arguments, to be started.
    pub(super) fn command(&self, arguments: &[String]) -> process::Command {
        let mut command = process::Command::new(&self.words[0]);
        command.args(&self.words[1..]).args(arguments);
        command
    }

    /// The whole command as a person would type it, words alone.
    pub(super) fn asked(&self, arguments: &[String]) -> String {
        let words: Vec<&str> = self.words.iter().chain(arguments).map(String::as_str).collect();
        printable(words.join(" ").as_bytes(), ASKED_BYTES_MAX)
    }

    /// Why the command could not be started.
    pub(super) fn not_started(&self, arguments: &[String], source: io::Error) -> EngineError {
        if source.kind() == io::ErrorKind::NotFound {
            return EngineError::Missing { program: self.words[0].clone() };
        }
        EngineError::Start { asked: self.asked(arguments), source }
    }

    /// Runs the engine to its end, and returns what it printed.
    ///
    /// # Errors
    /// When it cannot be started, or ends with anything but success.
    ///
    /// # Cancel safety
    /// The engine's command is killed when this is dropped; what the engine has done until then stays done.
    pub(super) async fn run(&self, arguments: &[String]) -> Result<String, EngineError> {
        let failed = |source| self.not_started(arguments, source);
        let mut command = Command::from(self.command(arguments));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().map_err(failed)?;
        let (output, errors) = (Said::keeping(SAID_BYTES_MAX), Said::keeping(SAID_BYTES_MAX));
        let listening = [
            child.stdout.take().map(|pipe| tokio::spawn(output.clone().listen(pipe))),
            child.stderr.take().map(|pipe| tokio::spawn(errors.clone().listen(pipe))),
        ];
        let status = child.wait().await.map_err(failed)?;
        // What it has left running may hold its outputs open.
        for listening in listening.into_iter().flatten() {
            hear_out(listening).await;
        }
        if status.success() {
            return Ok(output.text());
        }
        let said = lines(&errors.text()).or_else(|| lines(&output.text()));
        Err(EngineError::Refused {
            asked: self.asked(arguments),
            status,
            said: said.unwrap_or_else(|| "it said nothing".to_owned()),
        })
    }
}

/// All lines of a text in one.
fn lines(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    (!lines.is_empty()).then(|| printable(lines.join("; ").as_bytes(), usize::MAX))
}

/// How a command ended, as people say it.
fn spoken(status: ExitStatus) -> String {
    status.code().map_or_else(|| status.to_string(), |code| format!("exit code {code}"))
}

/// The whole when it is not long; else its beginning and its end, where engines give their reasons.
fn shortened(said: &str) -> String {
    let (head, tail) = QUOTED_BYTES_MAX;
    if said.len() <= head + tail {
        return said.to_owned();
    }
    format!(
        "{} … {}",
        &said[..said.floor_char_boundary(head)],
        &said[said.ceil_char_boundary(said.len() - tail)..]
    )
}

/// Words by which engines say that a container is not there, or has ended.
const GONE: [&str; 5] = [
    "no such container",
    "no container with name",
    "is not running",
    "container state improper",
    "is paused",
];
/// Refusals by words of engines, and what to do about each.
const NEXT_STEPS: [(&[&str], &str); 5] = [
    (
        &["cannot connect to the docker daemon", "permission denied while trying to connect"],
        "start the daemon, or let this user use it",
    ),
    (
        &[
            "no such image",
            "unable to find image",
            "image not known",
            "did not resolve to an alias",
            "pull access denied",
            "trying to pull",
        ],
        "check the name of the image, or pull it first",
    ),
    (
        &["already in use"],
        "remove the container of this name, or leave `name` out: then it gets one of its own",
    ),
    (&GONE, "start a container of this name, or let one be made with `image`"),
    (
        &["no such file or directory", "exec format error"],
        "give `agent` the static build for this processor: `deploy/build-static` makes one",
    ),
];

fn found_in(words: &[&str], said: &str) -> bool {
    let said = said.to_lowercase();
    words.iter().any(|word| said.contains(word))
}

/// What to do about a refusal, when that is known.
fn next_step(said: &str) -> String {
    let known = NEXT_STEPS.iter().find(|(words, _)| found_in(words, said));
    known.map(|(_, step)| format!(" ({step})")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(words: &[&str]) -> Engine {
        Engine::new(words.iter().map(|word| (*word).to_owned()).collect())
    }

    async fn refused(words: &[&str], argument: &str) -> String {
        engine(words).run(&[argument.to_owned()]).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn a_refusal_is_quoted_with_its_exit_code_and_the_next_step() {
        let refusal = "echo 'Error: one line' >&2; echo 'no container with name \"x\"' >&2; exit 125";
        assert_eq!(
            refused(&["sh", "-c"], refusal).await,
            format!(
                "`sh -c {refusal}` ended with exit code 125 (start a container of this name, or let one be made with \
                 `image`): Error: one line; no container with name \"x\""
            )
        );
        assert_eq!(
            refused(&["sh", "-c"], "echo out; exit 3").await,
            "`sh -c echo out; exit 3` ended with exit code 3: out"
        );
        assert_eq!(refused(&["false"], "x").await, "`false x` ended with exit code 1: it said nothing");
        assert_eq!(
            refused(&["sh", "-c"], "kill -9 $$").await,
            "`sh -c kill -9 $$` ended with signal: 9 (SIGKILL): it said nothing"
        );
    }

    #[test]
    fn what_is_long_is_quoted_from_both_ends() {
        let long = format!("begin {} end", "ö".repeat(4000));
        let quoted = shortened(&long);
        assert!(quoted.starts_with("begin ö") && quoted.ends_with("ö end") && quoted.contains(" … "));
        assert!(quoted.len() < 3200, "{}", quoted.len());
        assert_eq!(shortened("short"), "short");
    }

    #[tokio::test]
    async fn an_engine_that_is_not_there_is_named() {
        assert_eq!(
            refused(&["no-such-engine"], "ps").await,
            "there is no `no-such-engine` on this machine: install it, or name the engine's command with the key `engine`"
        );
    }
}
