//! Any program whose standard input and output reach an agent: `ip netns exec blue millstream-agent stdio`.
//!
//! With `bring: yes` the command is what goes in front of a shell of the place (`ip netns exec blue`, `nsenter …`,
//! `kubectl exec -i pod --`), and the agent is brought there.

use std::{path::PathBuf, process::Command as Process, time::Duration};

use millstream_common::{limits, text};

use super::{
    DialError, Dialing, Place, PlaceError, Reach, Releasing, address_error,
    child::{AnswerError, Children},
    only_options,
    program::{self, BringError},
    truth,
};

/// With what a shell ends when a program is not there, or cannot be run.
const EXIT_NOT_FOUND: [i32; 2] = [126, 127];
/// What a relay says behind its first word when it was not told a token.
const PLAIN: &str = "ready";

/// A command that gives a pipe.
#[derive(Debug)]
pub(crate) struct Command {
    words: Vec<String>,
    host: String,
    /// Whether the agent is brought; which, unless it is found.
    bring: Option<Option<String>>,
    children: Children,
}

impl Command {
    pub(crate) fn new(place: &Place) -> Result<Self, PlaceError> {
        only_options(place, &["command", "host", "bring", "agent"])?;
        let words = text::words(&place.address).map_err(|error| address_error(place, error.to_string()))?;
        if words.is_empty() {
            let reason =
                "write the command that leads to an agent, as in `ip netns exec blue millstream-agent stdio`";
            return Err(address_error(place, reason));
        }
        let option = |key: &str| place.options.get(key).cloned();
        let agent = option("agent");
        if agent.is_some() && !truth(place, "bring")? {
            return Err(super::keys_error(place, "`agent` names a program to bring: add `bring: yes`"));
        }
        Ok(Self {
            words,
            host: option("host").unwrap_or_else(|| "localhost".to_owned()),
            bring: truth(place, "bring")?.then_some(agent),
            children: Children::default(),
        })
    }

    fn failed(&self, reason: String, is_final: bool) -> DialError {
        DialError::Program { what: self.words[0].clone(), reason, is_final }
    }
}

impl Reach for Command {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let mut command = Process::new(&self.words[0]);
            command.args(&self.words[1..]);
            if let Some(agent) = &self.bring {
                command.arg("sh");
                let dialled = program::dial(&self.children, command, agent.as_deref()).await;
                return dialled.map(|pipe| Box::new(pipe) as _).map_err(|error| {
                    let not_found = matches!(&error, BringError::Answer(error) if is_not_found(error));
                    self.failed(error.to_string(), not_found || error.is_final())
                });
            }
            let spawned = self.children.spawn(command);
            let mut pipe = spawned.map_err(|source| {
                let error = BringError::Spawn { program: PathBuf::from(&self.words[0]), source };
                self.failed(error.to_string(), true)
            })?;
            let answered = pipe.answer(PLAIN).await;
            answered.map_err(|error| self.failed(error.to_string(), is_not_found(&error)))?;
            Ok(Box::new(pipe) as _)
        })
    }

    fn describe(&self) -> String {
        let bring = match &self.bring {
            None => String::new(),
            Some(None) => "?bring=yes".to_owned(),
            Some(Some(agent)) => format!("?bring=yes&agent={agent}"),
        };
        format!("command://{}{bring}", text::line(self.words.iter().map(String::as_str)))
    }

    fn host(&self) -> String {
        self.host.clone()
    }

    fn progress(&self) -> u64 {
        self.children.progress()
    }

    fn dial_max(&self) -> Duration {
        limits::REACH_MAX
    }

    fn what_to_check(&self) -> String {
        let words = text::line(self.words.iter().map(String::as_str));
        let (line, sign) = match self.bring {
            None => (words, "prints `millstream-stdio ready`"),
            Some(_) => (format!("{words} sh"), "is a shell there"),
        };
        format!("Check by hand that `{}` {sign}", text::printable(line.as_bytes(), limits::TEXT_BYTES_MAX))
    }

    fn release(&self) -> Releasing<'_> {
        Box::pin(async {
            self.children.end().await;
            Vec::new()
        })
    }
}

/// Whether a program was not found, which trying again does not change.
fn is_not_found(error: &AnswerError) -> bool {
    match error {
        AnswerError::Ended { ended, .. } => ended.code().is_some_and(|code| EXIT_NOT_FOUND.contains(&code)),
        AnswerError::Terminal | AnswerError::Noise { .. } => true,
        AnswerError::Broken { .. } => false,
    }
}
