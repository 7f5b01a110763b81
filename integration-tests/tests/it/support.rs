//! What several modules need: opening streams of a lab, and blocks that tell the test how far they are.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use millstream::{Block, Params, Result, Streams, shell};
use millstream_integration_tests::{authority::Certificate, lab::Lab, wait::wait_until};

/// How long anything may take that takes milliseconds on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// Runs asynchronous work on a runtime of its own.
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

/// Streams named as the lab's hosts, dialled with a controller's certificate of its own.
pub(crate) fn open(lab: &Lab, test: &str) -> Result<Streams> {
    open_with(lab, test, &lab.authority().controller(test))
}

/// As [`open`], with any certificate.
pub(crate) fn open_with(lab: &Lab, test: &str, certificate: &Certificate) -> Result<Streams> {
    let path = lab.directory().join(format!("{test}.yaml"));
    fs::write(&path, lab.definitions(certificate)).unwrap();
    let builder = Streams::builder(test).params(Params::load(&path)?);
    Ok(builder.results_dir(lab.directory().join("results")).open()?)
}

/// A block that prints numbered lines until the test lets it end, and tells on the side how far it is.
pub(crate) struct Ticker {
    /// As the test sees it.
    directory: PathBuf,
    /// As the block sees it.
    inside: PathBuf,
}

impl Ticker {
    pub(crate) fn new(directory: &Path) -> Self {
        Self::with_view(directory, directory)
    }

    /// For a block that sees other files than the test: `inside` is the directory as it sees it.
    pub(crate) fn with_view(directory: &Path, inside: &Path) -> Self {
        fs::create_dir_all(directory).unwrap();
        Self { directory: directory.to_path_buf(), inside: inside.to_path_buf() }
    }

    /// The block. Its last line is `end N` with the number of lines before.
    pub(crate) fn block(&self) -> Block {
        shell(self.text()).name("ticker")
    }

    /// The same as text for a shell.
    pub(crate) fn text(&self) -> String {
        format!(
            "cd {directory}\n\
             n=0\n\
             while [ ! -e go ]; do\n\
             \techo \"line $n\"\n\
             \tn=$((n + 1))\n\
             \techo $n >ticks.new && mv ticks.new ticks\n\
             \tsleep 0.05\n\
             done\n\
             echo \"end $n\"\n",
            directory = self.inside.display()
        )
    }

    /// Lines printed so far.
    pub(crate) fn ticks(&self) -> u64 {
        fs::read_to_string(self.directory.join("ticks"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Waits until it has printed `more` lines than now.
    pub(crate) fn wait_for_more(&self, more: u64) {
        let from = self.ticks();
        wait_until("the block goes on", SOON, || (self.ticks() >= from + more).then_some(()));
    }

    /// Lets it end.
    pub(crate) fn release(&self) {
        fs::write(self.directory.join("go"), "").unwrap();
    }

    /// Fails unless `stdout` is exactly what the block has printed.
    pub(crate) fn assert_complete(&self, stdout: &str) {
        let ticks = self.ticks();
        let expected: String =
            (0..ticks).map(|n| format!("line {n}\n")).chain([format!("end {ticks}\n")]).collect();
        assert!(ticks > 0);
        assert_eq!(stdout, expected);
    }
}
