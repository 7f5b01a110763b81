//! What can be said about a block of any kind: parameters, environment, files, limits, expectations.
//!
//! Every method keeps what it was given, valid or not: a fault is reported when the block is run, as its outcome.

use std::{path::PathBuf, time::Duration};

use millstream_common::{
    id::{BarrierName, BlockName},
    spec::{Expectation, ResourceLimits},
};
use serde::Serialize;

use super::{Block, Command, FileRequest, Parameter};
use crate::params::Params;

impl Block {
    /// Gives the block a parameter: in the JSON file named by `MILLSTREAM_PARAMS`, and in the variable
    /// `MILLSTREAM_PARAM_<NAME>` (upper case, other characters than letters and digits as `_`; texts as they are,
    /// everything else as JSON).
    pub fn param(mut self, name: impl Into<String>, value: impl Serialize) -> Self {
        self.insert_parameter(name.into(), &value, false);
        self
    }

    /// Gives the block a parameter that nobody else should see: it is in the JSON file alone, which only the block's
    /// user can read, and never in an environment, a status or the results.
    pub fn secret_param(mut self, name: impl Into<String>, value: impl Serialize) -> Self {
        self.insert_parameter(name.into(), &value, true);
        self
    }

    /// Gives the block every parameter of the nodes of a tree that `path` means: each with the value that
    /// [`Params::get`] gives for its key and this path, now. What is secret is given as by [`Block::secret_param`]. A
    /// parameter that the block has already is replaced.
    pub fn params(mut self, params: &Params, path: &str) -> Self {
        let all = params.all_at(path);
        if all.is_empty() {
            let value = Err("this path of the tree has no parameters".to_owned());
            self.parameters.insert(path.to_owned(), Parameter { value, secret: false });
        }
        for (name, secret, value) in all {
            let value = value.map_err(|error| error.to_string());
            self.parameters.insert(name, Parameter { value, secret });
        }
        self
    }

    fn insert_parameter(&mut self, name: String, value: &impl Serialize, secret: bool) {
        let value =
            serde_json::to_value(value).map_err(|error| format!("it cannot be written as JSON: {error}"));
        self.parameters.insert(name, Parameter { value, secret });
    }

    /// Sets a variable of the block's environment; it wins over the stream's and the host's.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    /// Ends the block, and its set-up if it has one, as `timed out` when it takes longer; at most 7 days.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Ships a file into the block's working directory, under its own file name. Hosts keep content by its digest: it
    /// travels once.
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.push(FileRequest { path: path.into(), directory: false });
        self
    }

    /// Ships a directory, with all that is in it, into the block's working directory, under its own name. Symbolic links
    /// must stay inside it. Empty directories are not shipped.
    pub fn dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.push(FileRequest { path: path.into(), directory: true });
        self
    }

    /// Says that the block's script, files and directories exist on the host already, under the same absolute paths:
    /// nothing is shipped, the script is executed where it is, and files are linked into the working directory.
    pub fn no_copy(mut self) -> Self {
        self.no_copy = true;
        self
    }

    /// Runs the block as another user of the host.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Runs the block in another directory of the host: absolute, or relative to its own working directory.
    pub fn cwd(mut self, directory: impl Into<String>) -> Self {
        self.working_directory = Some(directory.into());
        self
    }

    /// Names the block, and so its directory among the results: 1 to 128 bytes, no `/`, no control characters.
    pub fn name(mut self, name: impl AsRef<str>) -> Self {
        self.name = Some(BlockName::new(name));
        self
    }

    /// Puts a command in front of the block's own, such as `["strace", "-f"]`. Set-up and tear-down are not wrapped.
    pub fn wrap<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.wrap = argv.into_iter().map(Into::into).collect();
        self
    }

    /// Limits memory, processes and processor time of the whole process tree. A host that cannot set a limit refuses the
    /// block.
    pub fn limits(mut self, limits: ResourceLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Runs a command before the block. When it fails, the block is skipped and has failed in phase `setup`.
    pub fn setup(mut self, command: impl Into<Command>) -> Self {
        self.setup = Some(command.into());
        self
    }

    /// Runs a command after the block, whatever became of it, for at most 60 s.
    pub fn teardown(mut self, command: impl Into<Command>) -> Self {
        self.teardown = Some(command.into());
        self
    }

    /// How long the host waits between asking the block to terminate and killing it: 5 s unless set, at most 10 minutes.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = Some(grace);
        self
    }

    /// The block should fail: passing is the unexpected end.
    pub fn expect_failure(mut self) -> Self {
        self.expectation = Expectation::Fail;
        self
    }

    /// The block may fail or pass: neither is unexpected.
    pub fn allow_failure(mut self) -> Self {
        self.expectation = Expectation::Any;
        self
    }

    /// Declares the barriers that the block takes part in: nobody waits for it at others. Without this call it may enter
    /// any; with an empty list it enters none, as a stressor does.
    pub fn joins<'a>(mut self, barriers: impl IntoIterator<Item = &'a str>) -> Self {
        self.joins = Some(barriers.into_iter().map(BarrierName::new).collect());
        self
    }

    /// The block may run blocks itself: [`Streams::open`](crate::Streams::open) inside it gives it the streams of the test,
    /// with queues, barriers and topics of their own. What they leave lies in `streams/` of this task's results.
    pub fn may_run_streams(mut self) -> Self {
        self.may_run_streams = true;
        self
    }

    /// How much of what the block prints is kept: so many bytes from the beginning and from the end. What is between is
    /// counted, and the place is marked. 4 GiB and 1 MiB unless set.
    pub fn log_quota(mut self, head_bytes: u64, tail_bytes: u64) -> Self {
        self.log_quota = Some((head_bytes, tail_bytes));
        self
    }
}
