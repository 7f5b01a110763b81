//! What an agent must have for a session or a task, where agents differ.
//!
//! Asks for nothing that the session or the task can do without: an older agent runs all the rest.

use std::{collections::BTreeSet, sync::Arc};

use millstream_common::protocol::{Feature, ProtocolError, check_features};
use millstream_proto::v1;

use super::LinkOptions;

/// The features of the agent behind one connection.
#[derive(Debug, Clone)]
pub(super) struct Features {
    agent_version: Arc<str>,
    told: BTreeSet<Feature>,
}

impl Features {
    pub(super) fn told(agent_version: &str, capabilities: &v1::Capabilities) -> Self {
        let words = capabilities.features.iter().map(String::as_str);
        Self { agent_version: agent_version.into(), told: Feature::known(words) }
    }

    /// Keeps those that an earlier agent of the session had as well: it may have been replaced meanwhile, but its supervisor
    /// goes on, and a task goes through both.
    pub(super) fn also_of(&mut self, earlier: &Self) {
        if !self.told.is_subset(&earlier.told) {
            self.agent_version = Arc::clone(&earlier.agent_version);
        }
        self.told.retain(|feature| earlier.told.contains(feature));
    }

    /// Whether a task can be handed over.
    pub(super) fn admit(&self, request: &v1::StartTaskRequest) -> Result<(), ProtocolError> {
        check_features(of_task(request), &self.told, &self.agent_version)
    }
}

/// What a session needs.
pub(super) fn of_session(options: &LinkOptions) -> impl Iterator<Item = Feature> {
    let waits_in_line = options.exclusive && !options.wait.is_zero();
    waits_in_line.then_some(Feature::Line).into_iter()
}

/// What a task needs.
fn of_task(request: &v1::StartTaskRequest) -> impl Iterator<Item = Feature> {
    let spec = request.spec.as_ref();
    let needs = move |feature: &Feature| match feature {
        Feature::Hold => spec.is_some_and(|spec| spec.hold),
        Feature::ReportedPhases => {
            spec.is_some_and(|spec| spec.phases.iter().any(|phase| phase.reports_phases))
        }
        Feature::SecretFiles => !request.secret_files.is_empty(),
        // Of the session.
        Feature::Line => false,
    };
    Feature::ALL.iter().copied().filter(needs)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expect_test::expect;
    use millstream_common::protocol::VERSION;

    use super::*;

    fn words(features: impl Iterator<Item = Feature>) -> Vec<&'static str> {
        features.map(Feature::word).collect()
    }

    #[test]
    fn nothing_is_needed_that_is_not_asked_for() {
        let options = |exclusive, wait| LinkOptions {
            lease: Duration::ZERO,
            exclusive,
            wait,
            in_block: false,
            holdings: Arc::default(),
            client: String::new(),
        };
        let wait = Duration::from_secs(1);
        assert_eq!(words(of_session(&options(true, wait))), ["line"]);
        assert!(words(of_session(&options(false, wait))).is_empty());
        assert!(words(of_session(&options(true, Duration::ZERO))).is_empty());

        let phase = v1::PhaseSpec { phase: v1::Phase::Run.into(), ..Default::default() };
        let task = |spec| v1::StartTaskRequest { spec: Some(spec), ..Default::default() };
        let plain = v1::TaskSpec { phases: vec![phase.clone()], ..Default::default() };
        let held = v1::TaskSpec { hold: true, ..plain.clone() };
        let reporting =
            v1::TaskSpec { phases: vec![v1::PhaseSpec { reports_phases: true, ..phase }], ..plain.clone() };
        let secret =
            v1::StartTaskRequest { secret_files: vec![v1::ShippedFile::default()], ..task(plain.clone()) };
        for (request, needed) in [
            (task(plain), &[][..]),
            (task(held), &["hold"]),
            (task(reporting), &["reported-phases"]),
            (secret, &["secret-files"]),
        ] {
            assert_eq!(words(of_task(&request)), needed);
        }
    }

    #[test]
    fn a_session_has_what_all_its_agents_had() {
        let told = |version, features: &[&str]| {
            let features = features.iter().map(|&feature| feature.to_owned()).collect();
            Features::told(version, &v1::Capabilities { features, ..Default::default() })
        };
        let held = v1::TaskSpec { hold: true, ..Default::default() };
        let request = v1::StartTaskRequest { spec: Some(held), ..Default::default() };
        let first = told("0.0.9", &["line"]);
        let mut upgraded = told("0.1.0", &["hold", "line", "teleport"]);
        assert_eq!(upgraded.admit(&request), Ok(()));
        upgraded.also_of(&first);
        let told = upgraded.admit(&request).unwrap_err().to_string().replace(VERSION, "OURS");
        expect!["the controller of version OURS needs the feature `hold` (to hold a prepared task until it is started), which the agent of version 0.0.9 lacks: update the agent"].assert_eq(&told);
    }
}
