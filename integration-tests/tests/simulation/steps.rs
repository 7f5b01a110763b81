//! What programs do in a simulation, and how it is written as the words of a command.

use std::fmt;

use millstream::{Block, Phase, exec};

/// Name of the only program there is.
pub(crate) const PROGRAM: &str = "script";
/// Tells a program which test it belongs to.
pub(crate) const TEST_VARIABLE: &str = "SIMULATED_TEST";

/// One thing that a program does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Print {
        stderr: bool,
        bytes: usize,
    },
    Pause {
        millis: u64,
    },
    Meet {
        barrier: String,
        parties: u32,
    },
    /// Does not end when it is asked to.
    Stubborn,
    /// Leaves a file of so many bytes among the results.
    Leave {
        bytes: usize,
    },
    Publish {
        topic: String,
    },
    /// Waits until a topic has so many values.
    Await {
        topic: String,
        count: u32,
    },
    /// Listens to a topic from its first value on, until so many have come.
    Follow {
        topic: String,
        count: u32,
    },
    Exit {
        code: i32,
    },
}

/// What a block does, phase by phase. Without steps, there is no set-up or tear-down.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    pub(crate) setup: Vec<Step>,
    pub(crate) run: Vec<Step>,
    pub(crate) teardown: Vec<Step>,
}

impl Program {
    /// One that has nothing but its run.
    pub(crate) fn of(run: Vec<Step>) -> Self {
        Self { run, ..Self::default() }
    }

    /// As a block of the test of this number.
    pub(crate) fn block(&self, test: u32) -> Block {
        let mut block = exec(command(Phase::Run, &self.run)).env(TEST_VARIABLE, test.to_string());
        if !self.setup.is_empty() {
            block = block.setup(command(Phase::Setup, &self.setup));
        }
        if !self.teardown.is_empty() {
            block = block.teardown(command(Phase::Teardown, &self.teardown));
        }
        block
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Print { stderr: false, bytes } => write!(f, "stdout={bytes}"),
            Self::Print { stderr: true, bytes } => write!(f, "stderr={bytes}"),
            Self::Pause { millis } => write!(f, "pause={millis}"),
            Self::Meet { barrier, parties } => write!(f, "meet={parties}:{barrier}"),
            Self::Stubborn => f.write_str("stubborn"),
            Self::Leave { bytes } => write!(f, "leave={bytes}"),
            Self::Publish { topic } => write!(f, "publish={topic}"),
            Self::Await { topic, count } => write!(f, "await={count}:{topic}"),
            Self::Follow { topic, count } => write!(f, "follow={count}:{topic}"),
            Self::Exit { code } => write!(f, "exit={code}"),
        }
    }
}

impl Step {
    pub(crate) fn parse(word: &str) -> Option<Self> {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        Some(match key {
            "stdout" | "stderr" => Self::Print { stderr: key == "stderr", bytes: value.parse().ok()? },
            "pause" => Self::Pause { millis: value.parse().ok()? },
            "meet" | "await" | "follow" => {
                let (count, name) = value.split_once(':')?;
                let (count, name) = (count.parse().ok()?, name.to_owned());
                match key {
                    "meet" => Self::Meet { barrier: name, parties: count },
                    "await" => Self::Await { topic: name, count },
                    _ => Self::Follow { topic: name, count },
                }
            }
            "stubborn" => Self::Stubborn,
            "leave" => Self::Leave { bytes: value.parse().ok()? },
            "publish" => Self::Publish { topic: value.to_owned() },
            "exit" => Self::Exit { code: value.parse().ok()? },
            _ => return None,
        })
    }
}

/// The command that does these steps in a phase.
fn command(phase: Phase, steps: &[Step]) -> Vec<String> {
    let words = [PROGRAM.to_owned(), phase.to_string()];
    words.into_iter().chain(steps.iter().map(ToString::to_string)).collect()
}
