//! What a door may ask of a session, and what it is answered.
//!
//! Every request is taken in at once; what follows from it is told later. Repeating one is harmless.

use std::{fs, io, sync::Arc, time::Duration};

use millstream_common::{
    convert::{duration, duration_in, id_in, reason_in, secret_files_in},
    id::TaskId,
    limits,
    outcome::Reason,
    spec::TaskSpec,
};
use millstream_proto::{
    supervisor::v1::{
        CloseSession, DoorFrame, KeepLease, ReleaseTasks, Reply, SignalTask, StartTask, door_frame,
        supervisor_frame,
    },
    v1,
};
use prost::Message as _;
use tonic::Code;
use tracing::{info, warn};

use super::{
    super::{
        attendant::{SPEC_FILE, SharedSpool, task_dir},
        queue,
        task::{self, Machine, SessionEnd},
        wire::PROTOCOL,
    },
    Session, Task, wire_state,
};

impl Session {
    /// Takes in what the door says.
    pub(in crate::supervisor) fn take_frame(&mut self, frame: DoorFrame) {
        // Whatever waited while the host slept must not be served by a session that is over.
        self.pass_time();
        let request_id = frame.request_id;
        let answer = match frame.frame {
            Some(door_frame::Frame::Hello(hello)) => {
                if hello.protocol != PROTOCOL {
                    warn!(theirs = hello.protocol, ours = PROTOCOL, "the door speaks another protocol");
                }
                return;
            }
            Some(door_frame::Frame::Relay(frames)) => return self.around.relay.incoming(frames),
            Some(door_frame::Frame::RelayAttached(relay)) => {
                return self.around.relay.attached(relay.attached);
            }
            Some(door_frame::Frame::Close(CloseSession {})) => return self.close(request_id),
            Some(door_frame::Frame::Keep(keep)) => self.keep(&keep),
            Some(door_frame::Frame::Start(start)) => self.start(start),
            Some(door_frame::Frame::Signal(signal)) => self.signal(&signal),
            Some(door_frame::Frame::Release(release)) => self.release(&release),
            None => Err((Code::Unimplemented, "this supervisor does not know that request".to_owned())),
        };
        let mut reply =
            answer.unwrap_or_else(|(code, message)| Reply { code: code as u32, message, ..Reply::default() });
        if request_id > 0 {
            reply.request_id = request_id;
            self.reply(supervisor_frame::Frame::Reply(reply));
        }
    }

    fn expired(&self) -> Result<(), Refused> {
        if self.lease.over_since.is_some() || !self.closing.is_empty() {
            return Err((Code::FailedPrecondition, "session expired: open another".to_owned()));
        }
        Ok(())
    }

    fn keep(&mut self, keep: &KeepLease) -> Answer {
        self.expired()?;
        let range = limits::LEASE_MIN..=limits::LEASE_MAX;
        let asked = duration_in("lease_duration", keep.lease_duration.as_ref(), range).map_err(invalid)?;
        // A request of an older epoch that was held up on its way changes nothing.
        if keep.epoch >= self.lease.epoch {
            self.lease.epoch = keep.epoch;
            self.lease.duration = asked.unwrap_or(self.lease.duration);
            self.lease.ends = self.around.world.clock.since_boot() + self.lease.duration;
        }
        Ok(Reply { lease_left: Some(duration(self.lease_left())), ..Reply::default() })
    }

    /// Puts a task into its queue. A put of number and digest: repeated, it answers from what is known.
    fn start(&mut self, start: StartTask) -> Answer {
        self.expired()?;
        let id: TaskId = id_in("task_id", &start.task_id).map_err(invalid)?;
        if let Some(known) = self.tasks.get(&id) {
            return if known.digest == start.spec_sha256 {
                let reply = start_reply(wire_state(known.machine.stage(), known.end.is_some()), false);
                let stream = known.spec.stream.clone();
                self.feed_queue(&stream, queue::Event::Follows { task: id, previous: start.previous_number });
                Ok(reply)
            } else {
                Err((
                    Code::AlreadyExists,
                    format!("task {id} is known with another specification: give the new one another number"),
                ))
            };
        }
        if self.tasks.len() >= limits::SESSION_TASKS_COUNT_MAX {
            return Err((
                Code::ResourceExhausted,
                format!("the session has {} tasks that are not released", limits::SESSION_TASKS_COUNT_MAX),
            ));
        }
        let Some(wire) = start.spec else {
            return Err((Code::InvalidArgument, "spec: is missing".to_owned()));
        };
        let encoded = wire.encode_to_vec();
        let spec = TaskSpec::try_from(wire).map_err(invalid)?;
        let secret_files = secret_files_in(start.secret_files).map_err(invalid)?;
        let has_spare = self.keep_spec(id, &spec, &encoded).map_err(|error| {
            (Code::ResourceExhausted, format!("the task cannot be kept in the session's directory: {error}"))
        })?;
        let (stream, number, previous) = (spec.stream.clone(), spec.stream_number, start.previous_number);
        let task = Task {
            machine: Machine::new(&spec),
            spec: Arc::new(spec),
            digest: start.spec_sha256,
            orders: None,
            secret_files,
            has_spare,
            spool: SharedSpool::default(),
            end: None,
            changed_ns: self.around.world.clock.wall_ns(),
        };
        self.tasks.insert(id, task);
        self.tell_in_passing(id);
        self.feed_queue(&stream, queue::Event::Added { task: id, number, previous });
        let state =
            self.tasks.get(&id).map_or(v1::TaskState::Queued, |task| wire_state(task.machine.stage(), false));
        Ok(start_reply(state, true))
    }

    /// Gives the task a directory and keeps the specification there, so that whoever finds it knows what the task was.
    /// Whether it is a spare, with directories in it. Those of a task that runs as another user must belong to that user.
    fn keep_spec(&self, id: TaskId, spec: &TaskSpec, encoded: &[u8]) -> io::Result<bool> {
        use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
        let directory = task_dir(&self.config.session_dir, id);
        let has_spare = spec.user.is_none() && self.around.spares.claim(&directory);
        if !has_spare {
            match fs::DirBuilder::new().mode(0o711).create(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        let path = directory.join(SPEC_FILE);
        let written = || {
            self.around.host.disk.admit(&path, encoded.len())?;
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            io::Write::write_all(&mut file, encoded)
        };
        written().map(|()| has_spare).inspect_err(|_| {
            // Nobody has this task, and whoever asks again must find nothing of it: a spare has directories already.
            if let Err(left) = self.around.spares.retire(&directory) {
                warn!(%left, "a task that was not taken leaves something behind");
            }
        })
    }

    fn signal(&mut self, signal: &SignalTask) -> Answer {
        let id: TaskId = id_in("task_id", &signal.task_id).map_err(invalid)?;
        if !self.tasks.contains_key(&id) {
            return Err((Code::NotFound, format!("task {id} is not known in this session")));
        }
        let event = match v1::SignalKind::try_from(signal.kind) {
            Ok(v1::SignalKind::Go) => task::Event::GoOrdered,
            Ok(v1::SignalKind::Cancel) => task::Event::CancelOrdered,
            Ok(v1::SignalKind::Stop) => {
                let range = Duration::ZERO..=limits::GRACE_MAX;
                let grace =
                    duration_in("grace_duration", signal.grace_duration.as_ref(), range).map_err(invalid)?;
                let reason = match signal.reason {
                    0 => Reason::Stopped,
                    number => reason_in("reason", number).map_err(invalid)?,
                };
                task::Event::StopOrdered { grace, deadline: reason == Reason::TestDeadline }
            }
            Ok(v1::SignalKind::Signal) => match i32::try_from(signal.signal) {
                Ok(number @ 1..=64) => task::Event::SignalOrdered(number),
                _ => return Err((Code::InvalidArgument, "signal: must be from 1 to 64".to_owned())),
            },
            _ => return Err((Code::InvalidArgument, format!("kind: {} is no kind of signal", signal.kind))),
        };
        self.feed(id, event);
        let state = self
            .tasks
            .get(&id)
            .map_or(v1::TaskState::Finished, |task| wire_state(task.machine.stage(), task.end.is_some()));
        Ok(Reply { state: state.into(), ..Reply::default() })
    }

    /// Forgets finished tasks and removes their directories. Repeating it succeeds.
    fn release(&mut self, release: &ReleaseTasks) -> Answer {
        let mut directories = Vec::new();
        for id in &release.task_ids {
            let id: TaskId = id_in("task_ids", id).map_err(invalid)?;
            match self.tasks.get(&id) {
                Some(task) if task.end.is_none() => {
                    let message = format!("task {id} has not ended: stop or cancel it first");
                    return Err((Code::FailedPrecondition, message));
                }
                Some(_) => {
                    self.tasks.remove(&id);
                    self.changed.remove(&id);
                    self.passing.remove(&id);
                    directories.push(task_dir(&self.config.session_dir, id));
                }
                None => {}
            }
        }
        if !directories.is_empty() {
            // Not on this thread: there may be many files, and nobody waits for it.
            let spares = self.around.spares.clone();
            drop(tokio::task::spawn_blocking(move || {
                for directory in directories {
                    if let Err(error) = spares.retire(&directory) {
                        warn!(path = %directory.display(), %error, "the directory of a task is left behind");
                    }
                }
            }));
        }
        Ok(Reply::default())
    }

    fn close(&mut self, request_id: u64) {
        let first = self.closing.is_empty();
        self.closing.push(request_id);
        if first {
            info!(tasks = self.unfinished(), "closing the session");
            self.around.relay.controller_gone();
            self.end_everything(SessionEnd::Closed);
        } else {
            self.finish_if_done();
        }
    }
}

type Refused = (Code, String);
type Answer = Result<Reply, Refused>;

fn invalid(error: impl std::fmt::Display) -> Refused {
    (Code::InvalidArgument, error.to_string())
}

fn start_reply(state: v1::TaskState, accepted: bool) -> Reply {
    let start = v1::StartTaskResponse { state: state.into(), accepted_by_this_call: accepted };
    Reply { start: Some(start), ..Reply::default() }
}
