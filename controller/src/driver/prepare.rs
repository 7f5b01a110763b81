//! From a scheduled block to a request: compiled off the loop, its files sent ahead.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use millstream_common::{
    convert,
    id::TaskId,
    outcome::{OutcomeKind, Phase, Reason, TaskEnd},
    spec::FailurePolicy,
};
use millstream_proto::v1;
use tracing::debug;

use super::{Driver, Input, scribe::with_causes};
use crate::{
    block::{
        Block, BlockError,
        compile::{Surroundings, Upload},
    },
    link::{Order, Sending},
    queue::Event,
    task::TaskShared,
    topology::Topology,
};

/// A compiled block.
pub(crate) struct Ready {
    /// All but the session's key and what depends on the queue.
    pub(super) request: v1::StartTaskRequest,
    pub(super) uploads: Vec<Upload>,
    pub(super) commands: BTreeMap<Phase, Vec<String>>,
    pub(super) drains: bool,
}

impl Driver {
    pub(super) fn prepare(&mut self, task: TaskId, stream: usize, link: usize) {
        let topology = self.topology();
        let (Some(state), Some(work)) = (self.streams.get(&stream), self.works.get_mut(&task)) else {
            return;
        };
        let Some(block) = work.block.take() else { return };
        let opened = &self.links[link].opened;
        let surroundings = Surroundings {
            stream: state.shared.name.clone(),
            host: state.shared.host().to_owned(),
            architecture: opened.host.architecture.clone(),
            python: Some(opened.capabilities.python.clone()).filter(|path| !path.is_empty()),
            is_local: state.shared.is_local(),
            defaults: state.shared.defaults().clone(),
            topology,
        };
        let (shared, inbox) = (Arc::clone(&work.shared), Arc::clone(&self.setup.inbox));
        let reads_files = block.reads_files();
        let compile = move || {
            let result = compile(&block, &surroundings, &shared).map(Box::new);
            if inbox.put(Input::Compiled { task, result }).is_err() {
                debug!("a block was compiled after the end of the test");
            }
        };
        // Files are not read on this thread; without any, going to another would take longer than compiling.
        if reads_files {
            drop(tokio::task::spawn_blocking(compile));
        } else {
            compile();
        }
    }

    /// What blocks are told of all streams. Made again when there are more of them, or after another host was reached.
    fn topology(&mut self) -> Topology {
        let streams = self.setup.shared.streams_count();
        if let Some((of, made)) = &self.topology
            && *of == streams
        {
            return made.clone();
        }
        let streams = self.setup.shared.streams();
        let hosts: HashMap<&str, &[String]> =
            self.links.iter().map(|link| (link.place.as_str(), &*link.opened.host.addresses)).collect();
        let made = Topology::of(&streams, |place| hosts.get(place).copied());
        self.topology = Some((streams.len(), made.clone()));
        made
    }

    pub(super) fn compiled(&mut self, task: TaskId, result: Result<Box<Ready>, BlockError>) {
        let Some(work) = self.works.get_mut(&task) else { return };
        let (stream, number) = (work.stream, work.shared.stream_number);
        match result {
            Ok(ready) => {
                let Ready { request, uploads, commands, drains } = *ready;
                work.request = Some(request);
                work.commands = commands;
                work.drains = drains;
                if uploads.is_empty() {
                    self.feed(stream, Event::Prepared { number });
                } else if let Some(state) = self.streams.get(&stream) {
                    let sending = Arc::new(Sending::of(&uploads));
                    work.sending = Some(Arc::clone(&sending));
                    self.links[state.link].link.order(Order::Upload { task, uploads, sending });
                }
            }
            Err(error) => {
                let end = TaskEnd::never_begun(OutcomeKind::Error, Reason::InvalidBlock, with_causes(&error));
                self.complete(task, end, None);
                self.feed(stream, Event::Refused { number });
            }
        }
    }
}

/// Compiles a block. Reads its files: blocks the thread.
fn compile(block: &Block, surroundings: &Surroundings, task: &TaskShared) -> Result<Ready, BlockError> {
    let compiled = block.compile(surroundings)?;
    let mut spec = compiled.spec;
    spec.stream_number = task.stream_number;
    spec.test_number = task.test_number;
    let commands = spec.phases.iter().map(|phase| (phase.phase, phase.argv.clone())).collect();
    let drains = spec.failure_policy == FailurePolicy::Drain;
    let spec = v1::TaskSpec::from(&spec);
    let spec_sha256 = convert::spec_sha256(&spec);
    let request = v1::StartTaskRequest {
        session: None,
        task_id: task.id.to_string(),
        spec: Some(spec),
        spec_sha256,
        secret_files: compiled.secret_files.iter().map(v1::ShippedFile::from).collect(),
        previous_number: 0,
    };
    Ok(Ready { request, uploads: compiled.uploads, commands, drains })
}
