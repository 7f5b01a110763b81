//! The rules of reaches in words, and what was found of each. Pure.

use std::{error::Error, fmt, path::PathBuf};

/// What every reach promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// What it calls its place: streams whose places are called the same share a session.
    DescribesItself,
    /// The name under which others find the host.
    NamesItsHost,
    /// A pipe comes to be within the time that a test gives it, and an agent answers on it.
    FirstContact,
    /// Control and bulk are pipes of their own.
    TwoPipes,
    /// Whoever gives up a dial leaves nothing that keeps the next one from working.
    CancelledDials,
    /// First in, first out.
    RunsInOrder,
    /// Several MiB of any bytes on both outputs.
    OutputIsWhole,
    /// Output is seen while the block runs.
    LogIsLive,
    /// Exit codes and signals.
    EndsAreTold,
    /// Shipped files, directories and programs.
    FilesArrive,
    /// Environment, parameters and secrets.
    ParametersArrive,
    /// The output directory as it was left.
    ArchiveComesHome,
    /// Barriers and topics between streams of this place and one of this machine.
    StreamsMeet,
    /// A task that runs is stopped, one that waits is cancelled.
    StopAndCancel,
    /// Nothing of an ended task runs on.
    TreesEnd,
    /// For a reach that survives a cut.
    OutputSurvivesCuts,
    /// For a reach that survives a cut.
    FilesSurviveCuts,
    /// For a reach that survives a cut.
    ArchiveSurvivesCuts,
    /// For a reach that survives a cut.
    PartiesSurviveCuts,
    /// For a reach that does not survive a cut.
    LossIsTold,
    /// What the reach has started itself.
    ReleaseLeavesNothing,
}

impl Rule {
    /// Every rule, in the order in which they are examined.
    pub const ALL: [Self; 21] = [
        Self::DescribesItself,
        Self::NamesItsHost,
        Self::FirstContact,
        Self::TwoPipes,
        Self::CancelledDials,
        Self::RunsInOrder,
        Self::OutputIsWhole,
        Self::LogIsLive,
        Self::EndsAreTold,
        Self::FilesArrive,
        Self::ParametersArrive,
        Self::ArchiveComesHome,
        Self::StreamsMeet,
        Self::StopAndCancel,
        Self::TreesEnd,
        Self::OutputSurvivesCuts,
        Self::FilesSurviveCuts,
        Self::ArchiveSurvivesCuts,
        Self::PartiesSurviveCuts,
        Self::LossIsTold,
        Self::ReleaseLeavesNothing,
    ];

    /// The promise as a sentence.
    #[must_use]
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::DescribesItself => "describe() gives the same line whenever it is asked",
            Self::NamesItsHost => "host() gives the same bare name or address whenever it is asked",
            Self::FirstContact => "an agent answers on a new pipe",
            Self::TwoPipes => "two pipes at once do not disturb each other",
            Self::CancelledDials => "a dial that is given up at any moment keeps no later one from working",
            Self::RunsInOrder => "tasks of a stream run one after another",
            Self::OutputIsWhole => "output comes byte for byte",
            Self::LogIsLive => "output is seen while the block runs",
            Self::EndsAreTold => "exit codes and signals are told as they were",
            Self::FilesArrive => "shipped files, directories and programs arrive as they are",
            Self::ParametersArrive => "environment, parameters and secrets arrive as they are",
            Self::ArchiveComesHome => "what a block leaves comes home as it is",
            Self::StreamsMeet => "streams of this place and of this machine meet at barriers and topics",
            Self::StopAndCancel => "what runs can be stopped, and what waits can be cancelled",
            Self::TreesEnd => "nothing of an ended task runs on",
            Self::OutputSurvivesCuts => "a cut amid output loses no byte and runs nothing twice",
            Self::FilesSurviveCuts => "a cut amid shipped files loses none of them",
            Self::ArchiveSurvivesCuts => "a cut amid an archive loses nothing of it",
            Self::PartiesSurviveCuts => "a cut amid a barrier takes no party away",
            Self::LossIsTold => "a cut ends what ran there, and it is told at once",
            Self::ReleaseLeavesNothing => "release() ends what the reach has started",
        }
    }

    /// Whether it concerns a reach that says this of [`survives_disconnect`](crate::reach::Reach::survives_disconnect).
    #[must_use]
    pub const fn applies(self, survives_disconnect: bool) -> bool {
        match self {
            Self::OutputSurvivesCuts
            | Self::FilesSurviveCuts
            | Self::ArchiveSurvivesCuts
            | Self::PartiesSurviveCuts => survives_disconnect,
            Self::LossIsTold => !survives_disconnect,
            _ => true,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.sentence())
    }
}

/// What was found of one rule.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// It holds.
    Kept,
    /// It does not.
    Broken {
        /// What was attempted, and what came instead.
        evidence: String,
    },
    /// It concerns reaches that survive a cut, and this one does not, or the other way round.
    DoesNotApply,
    /// An earlier rule is broken without which it cannot be examined.
    NotExamined,
}

/// What was found of a reach. `Display` has one line for each rule, the same for every sound reach that survives cuts
/// (and for every one that does not) but for the place in the first line.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The place, as its reach describes it.
    pub place: String,
    /// Every rule that was asked for, in the order of [`Rule::ALL`].
    pub verdicts: Vec<(Rule, Verdict)>,
}

impl Report {
    /// Whether no rule is broken, and none was left out that applies.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.verdicts.iter().all(|(_, verdict)| matches!(verdict, Verdict::Kept | Verdict::DoesNotApply))
    }

    /// The rules that are broken, with the evidence.
    pub fn broken(&self) -> impl Iterator<Item = (Rule, &str)> {
        self.verdicts.iter().filter_map(|(rule, verdict)| match verdict {
            Verdict::Broken { evidence } => Some((*rule, evidence.as_str())),
            _ => None,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        for (rule, verdict) in &self.verdicts {
            match verdict {
                Verdict::Kept => write!(f, "\n  kept: {rule}")?,
                Verdict::Broken { evidence } => write!(f, "\n  BROKEN: {rule}: {evidence}")?,
                Verdict::DoesNotApply => write!(f, "\n  does not apply: {rule}")?,
                Verdict::NotExamined => write!(f, "\n  not examined: {rule}")?,
            }
        }
        Ok(())
    }
}

/// A reach that is not sound. `Display` and `Debug` name each broken rule with its evidence.
#[derive(Clone)]
#[non_exhaustive]
pub struct BrokenRules {
    /// What was found of every rule.
    pub report: Report,
    /// Where the results of the scenario lie.
    pub results: PathBuf,
}

impl fmt::Display for BrokenRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let broken: Vec<(Rule, &str)> = self.report.broken().collect();
        let rules = if broken.len() == 1 { "rule" } else { "rules" };
        write!(f, "{} breaks {} {rules} of reaches", self.report.place, broken.len())?;
        for (rule, evidence) in broken {
            write!(f, "\n  {rule}: {evidence}")?;
        }
        let left_out =
            self.report.verdicts.iter().filter(|(_, verdict)| *verdict == Verdict::NotExamined).count();
        if left_out > 0 {
            let rules = if left_out == 1 { "rule" } else { "rules" };
            write!(f, "\n  not examined therefore: {left_out} other {rules}")?;
        }
        write!(f, "\n  results of the scenario: {}", self.results.display())
    }
}

impl fmt::Debug for BrokenRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error for BrokenRules {}

/// Where verdicts are gathered.
#[derive(Debug)]
pub(super) struct Ledger {
    report: Report,
}

impl Ledger {
    pub(super) fn new(place: String, survives_disconnect: bool, only: Option<&[Rule]>) -> Self {
        let verdict = |rule: Rule| {
            if rule.applies(survives_disconnect) { Verdict::NotExamined } else { Verdict::DoesNotApply }
        };
        let wanted = |rule: &Rule| only.is_none_or(|only| only.contains(rule));
        let verdicts = Rule::ALL.into_iter().filter(wanted).map(|rule| (rule, verdict(rule))).collect();
        Self { report: Report { place, verdicts } }
    }

    /// Whether the rule is to be examined.
    pub(super) fn wants(&self, rule: Rule) -> bool {
        self.report.verdicts.iter().any(|(wanted, _)| *wanted == rule)
    }

    /// Notes what was found, if anybody asked. What was found broken stays so.
    pub(super) fn note(&mut self, rule: Rule, found: Result<(), String>) {
        let Some((_, verdict)) = self.report.verdicts.iter_mut().find(|(wanted, _)| *wanted == rule) else {
            return;
        };
        match found {
            Err(evidence) if !matches!(verdict, Verdict::Broken { .. }) => {
                *verdict = Verdict::Broken { evidence }
            }
            Ok(()) if *verdict == Verdict::NotExamined => *verdict = Verdict::Kept,
            _ => {}
        }
    }

    pub(super) fn close(self) -> Report {
        self.report
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn every_rule_is_listed_once_in_its_order() {
        assert!(Rule::ALL.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn a_reach_that_cannot_be_reached_breaks_one_rule_and_leaves_the_others_open() {
        let mut ledger = Ledger::new("vm://rawhide".to_owned(), true, None);
        ledger.note(Rule::DescribesItself, Ok(()));
        ledger.note(Rule::FirstContact, Err("no agent answered".to_owned()));
        ledger.note(Rule::FirstContact, Ok(()));
        let report = ledger.close();
        assert!(!report.is_sound());
        let error = BrokenRules { report, results: PathBuf::from("/tmp/x") };
        expect![[r#"
            vm://rawhide breaks 1 rule of reaches
              an agent answers on a new pipe: no agent answered
              not examined therefore: 18 other rules
              results of the scenario: /tmp/x"#]]
        .assert_eq(&error.to_string());
    }

    #[test]
    fn what_was_left_out_is_not_sound() {
        let report = Ledger::new("vm://rawhide".to_owned(), false, None).close();
        assert!(!report.is_sound());
        assert_eq!(report.broken().count(), 0);
    }
}
