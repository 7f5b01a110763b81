//! One suite over every reach: sound ones pass it with the same report, and each way of being unsound is told by the rule
//! that it breaks.

mod faulty;
mod guest;

use millstream::{
    Definition,
    blocking::block_on,
    conformance::{Check, check},
    reach,
};
use millstream_integration_tests::{agent::Agent, lab::Lab};

use guest::Guest;

/// What is said of every sound reach whose agent lives on when a pipe breaks.
pub(crate) fn survivor() -> String {
    "\
PLACE
  kept: describe() gives the same line whenever it is asked
  kept: host() gives the same bare name or address whenever it is asked
  kept: an agent answers on a new pipe
  kept: two pipes at once do not disturb each other
  kept: a dial that is given up at any moment keeps no later one from working
  kept: tasks of a stream run one after another
  kept: output comes byte for byte
  kept: output is seen while the block runs
  kept: exit codes and signals are told as they were
  kept: shipped files, directories and programs arrive as they are
  kept: environment, parameters and secrets arrive as they are
  kept: what a block leaves comes home as it is
  kept: streams of this place and of this machine meet at barriers and topics
  kept: what runs can be stopped, and what waits can be cancelled
  kept: nothing of an ended task runs on
  kept: a cut amid output loses no byte and runs nothing twice
  kept: a cut amid shipped files loses none of them
  kept: a cut amid an archive loses nothing of it
  kept: a cut amid a barrier takes no party away
  does not apply: a cut ends what ran there, and it is told at once
  kept: release() ends what the reach has started"
        .to_owned()
}

/// What is said of every sound reach whose agent ends with its pipes: other rules of cuts apply.
pub(crate) fn mortal() -> String {
    let told = |line: &str| match line.trim_start().split_once(": ") {
        Some(("kept", rule)) if rule.starts_with("a cut amid") => format!("  does not apply: {rule}"),
        Some(("does not apply", rule)) => format!("  kept: {rule}"),
        _ => line.to_owned(),
    };
    survivor().lines().map(told).collect::<Vec<_>>().join("\n")
}

/// Fails unless the reach is sound, with the same report as every other one of its kind.
pub(crate) fn is_sound(check: Check, expected: &str) {
    let report = block_on(check).unwrap();
    assert_eq!(report.to_string().replacen(&report.place, "PLACE", 1), expected);
}

#[test]
fn local_streams_are_sound() {
    is_sound(check("local"), &survivor());
}

#[test]
fn an_agent_behind_a_unix_socket_is_sound() {
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::start_on_socket(directory.path());
    is_sound(check(format!("unix://{}", agent.socket().display())), &survivor());
    assert_eq!(agent.session_directories(), Vec::<std::path::PathBuf>::new());
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn an_agent_behind_tls_is_sound() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let certificate = lab.authority().controller("conformance");
    let definition = Definition::url(agent.url())
        .key("authority", certificate.authority.display())
        .key("certificate", certificate.certificate.display())
        .key("key", certificate.key.display());
    lab.controller().namespace().run(|| is_sound(check(definition).alone(), &survivor()));
    assert_eq!(agent.session_directories(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn registered_reaches_are_sound_whether_their_agents_survive_or_not() {
    reach::register("guest", |place| Ok(Guest::named(&place.address, true)));
    reach::register("mortal-guest", |place| Ok(Guest::named(&place.address, false)));
    is_sound(check("guest://one"), &survivor());
    is_sound(check("mortal-guest://two"), &mortal());
}
