//! Every bound in the system, in one place: value, unit, reason. Pure.
//!
//! A bound that is not here does not exist: queues, messages, names, files and waits all take theirs from this page, and
//! an error that reports a bound names the constant's meaning in words.

use std::time::Duration;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
const GIB: u64 = 1024 * 1024 * 1024;

/// Name of a stream. It becomes a directory of the results, beside numbers and suffixes.
pub const STREAM_NAME_BYTES_MAX: usize = 64;
/// Name of a block or a test. It becomes a directory behind a number and a hyphen.
pub const BLOCK_NAME_BYTES_MAX: usize = 128;
/// Name that is derived from a command line: short enough to be read in a listing.
pub const DERIVED_NAME_BYTES_MAX: usize = 40;
/// Name of a barrier or topic.
pub const BARRIER_NAME_BYTES_MAX: usize = 128;
/// Token by which a party or a publication is known again.
pub const TOKEN_BYTES_MAX: usize = 64;
/// Free text that a controller or a person gives for others to read: reasons, display names, client names.
pub const TEXT_BYTES_MAX: usize = KIB;
/// A sentence about a task: it may quote what a container engine has said, from both its ends.
pub const SENTENCE_BYTES_MAX: usize = 4 * KIB;

/// Parties of one barrier generation: ten times the largest that was measured.
pub const BARRIER_PARTIES_MAX: u32 = 100_000;
/// Payload that a party brings to a barrier.
pub const BARRIER_PAYLOAD_BYTES_MAX: usize = 64 * KIB;
/// Payloads of one generation together: what every party is sent at the release.
pub const BARRIER_PAYLOADS_BYTES_MAX: usize = MIB / 2;
/// Barriers of one scope.
pub const BARRIERS_COUNT_MAX: usize = 100_000;
/// How long a party waits unless it says otherwise.
pub const BARRIER_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest wait that can be asked for, here and for phases: no wait is unbounded.
pub const WAIT_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a party whose connection broke still counts as entered.
pub const RECONNECTION_GRACE: Duration = Duration::from_secs(5);

/// Value of a topic.
pub const TOPIC_VALUE_BYTES_MAX: usize = 64 * KIB;
/// Values of one topic.
pub const TOPIC_VALUES_COUNT_MAX: usize = 100_000;
/// Bytes of all topics of one scope.
pub const TOPICS_BYTES_MAX: usize = 64 * MIB;
/// Topics of one scope.
pub const TOPICS_COUNT_MAX: usize = 100_000;

/// Values of a topic, or parties of a barrier, in one answer: with its envelope it fits in [`RELAY_MESSAGE_BYTES_MAX`].
pub const SYNC_ANSWER_BYTES_MAX: usize = 768 * KIB;
/// Parties that are all listed to each other at a release; of more, only those are listed that brought a payload: the
/// list goes to everybody, so that its cost grows with the square.
pub const BARRIER_ROLL_PARTIES_MAX: usize = 64;

/// Tasks that a barrier still misses, as far as they are listed.
pub const MISSING_LISTED_COUNT_MAX: usize = 64;
/// Parties of one barrier that are listed on the board: 100,000 would not fit in one answer.
pub const ARRIVALS_LISTED_COUNT_MAX: usize = 1_024;
/// Names of these parties together: with its times one barrier fits in one answer.
pub const ARRIVALS_LISTED_BYTES_MAX: usize = 512 * KIB;

/// One gRPC message of a control call.
pub const CONTROL_MESSAGE_BYTES_MAX: usize = 2 * MIB;
/// One gRPC message of a bulk call: a chunk and its envelope.
pub const BULK_MESSAGE_BYTES_MAX: usize = 4 * MIB;
/// Bytes of one piece of a log or an archive: four HTTP/2 frames of the largest size would not be faster.
pub const CHUNK_BYTES: usize = 256 * KIB;
/// Bytes of log records or archive in one message.
pub const CHUNKS_MESSAGE_BYTES_MAX: usize = MIB;
/// HTTP/2 frame: the default of 16 KiB costs a third of the processor time of a transfer.
pub const HTTP2_FRAME_BYTES: u32 = 1024 * 1024;
/// HTTP/2 window of one call: 4 MiB is 50 ms at 80 MB/s.
pub const HTTP2_STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// HTTP/2 window of a connection.
pub const HTTP2_CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// HTTP/2 calls at once on one connection.
pub const HTTP2_CALLS_MAX: u32 = 1_024;
/// HTTP/2 resets that a peer may provoke before its connection is ended; the library's default is no limit.
pub const HTTP2_LOCAL_RESETS_MAX: usize = 1_024;
/// HTTP/2 calls that a peer may reset before we have taken them in; more ends its connection.
pub const HTTP2_PENDING_RESETS_MAX: usize = 20;
/// HTTP/2 headers of one call.
pub const HTTP2_HEADERS_BYTES_MAX: u32 = 16 * 1024;
/// How often a silent connection is asked whether it lives, and how long it may think about it.
pub const KEEPALIVE: Duration = Duration::from_secs(5);
/// From accepting a connection to the end of its TLS handshake and the beginning of HTTP/2 on it.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Connections of one agent that have not finished their handshake.
pub const HANDSHAKES_COUNT_MAX: usize = 64;
/// Of these, from one address: a slow one must not keep the others out.
pub const HANDSHAKES_PER_ADDRESS_MAX: usize = 32;
/// How long what was sent may stay unacknowledged before the kernel gives a connection up.
pub const TCP_SILENCE_MAX: Duration = Duration::from_secs(10);
/// Connections of one agent.
pub const CONNECTIONS_COUNT_MAX: usize = 1_024;
/// Connections of one agent from one address.
pub const CONNECTIONS_PER_ADDRESS_MAX: usize = 256;
/// How long accepting rests after the system refused to accept (no descriptors left, for example).
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Lease of a session unless the controller asks otherwise.
pub const LEASE: Duration = Duration::from_secs(30);
/// Shortest lease.
pub const LEASE_MIN: Duration = Duration::from_secs(1);
/// Longest lease.
pub const LEASE_MAX: Duration = Duration::from_secs(24 * 3600);
/// How long results of a session whose lease is over are kept.
pub const EXPIRED_RESULTS_KEPT: Duration = Duration::from_secs(600);
/// Sessions of one agent.
pub const SESSIONS_COUNT_MAX: usize = 256;
/// How long the agent keeps the call of a controller that waits for a reserved host before it answers who holds it.
pub const OPEN_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long a place in the line of waiting controllers is kept between two calls.
pub const OPEN_PLACE_KEPT: Duration = Duration::from_secs(10);
/// Tasks of one session that are not released.
pub const SESSION_TASKS_COUNT_MAX: usize = 16_384;
/// Tasks of one stream that the controller hands over ahead of the running one. With 50 ms between the two ends and
/// 0.5 ms a task, 100 are needed to keep the host busy; 128 leaves room.
pub const STREAM_WINDOW_COUNT: usize = 128;
/// Streams of one test.
pub const STREAMS_COUNT_MAX: usize = 10_000;
/// Empty directories of released tasks that a session keeps for the next ones: half a window, so that closing the session
/// is not held up by removing them.
pub const SPARES_COUNT_MAX: usize = 64;
/// Tasks of one test.
pub const TEST_TASKS_COUNT_MAX: usize = 1_000_000;

/// How long a test waits in line for a host that others have, unless it says otherwise.
pub const LINE_WAIT: Duration = Duration::from_secs(600);
/// How long others may have waited for a host that a test holds while it waits itself for one that comes earlier in the
/// order: then it waits no longer.
pub const LINE_YIELD: Duration = Duration::from_secs(30);
/// How long a host may take to be reached; waiting in line for it does not count.
pub const REACH_MAX: Duration = Duration::from_secs(30);
/// How long an engine may fetch the image of a container; only then begins the time in which the container has to be reached.
pub const IMAGE_MAX: Duration = Duration::from_secs(600);
/// First pause before a connection is tried again; doubled each time.
pub const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause before a connection is tried again.
pub const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Deadline of a whole test unless it is set.
pub const TEST_DEADLINE: Duration = Duration::from_secs(3600);
/// How long dropping the streams waits for hosts to end their sessions.
pub const CLOSE_MAX: Duration = Duration::from_secs(5);

/// How long an agent that was asked to end goes on with the calls that it has. Some never end by themselves, and as long as it
/// waits for them no other agent can take its place.
pub const DOOR_END_MAX: Duration = Duration::from_secs(1);

/// Between SIGTERM and SIGKILL unless a block says otherwise.
pub const GRACE: Duration = Duration::from_secs(5);
/// Longest grace period.
pub const GRACE_MAX: Duration = Duration::from_secs(600);
/// Limit of a teardown that sets none.
pub const TEARDOWN_MAX: Duration = Duration::from_secs(60);
/// From SIGKILL to giving a process up as one that cannot be ended.
pub const KILL_MAX: Duration = Duration::from_secs(5);
/// How long output that is still in a pipe is read after its tree is dead.
pub const DRAIN_MAX: Duration = Duration::from_secs(2);

/// Files of one task.
pub const FILES_COUNT_MAX: usize = 10_000;
/// Content of one inline file.
pub const INLINE_FILE_BYTES_MAX: usize = 64 * KIB;
/// Content of all inline files of a task.
pub const INLINE_FILES_BYTES_MAX: usize = 512 * KIB;
/// Arguments of one phase; the kernel's own limit for one argument is 128 KiB.
pub const ARGV_BYTES_MAX: usize = 128 * KIB;
/// Variables of one task.
pub const ENVIRONMENT_COUNT_MAX: usize = 4_096;
/// Name of one variable.
pub const ENVIRONMENT_NAME_BYTES_MAX: usize = 255;
/// Name of a user of a host; the kernel has no limit, the usual tools stop at 32.
pub const USER_NAME_BYTES_MAX: usize = 256;
/// Value of one variable.
pub const ENVIRONMENT_VALUE_BYTES_MAX: usize = 128 * KIB;
/// One blob.
pub const BLOB_BYTES_MAX: u64 = 8 * GIB;
/// Blobs of one host together; past it, the least recently used go that no open session needs.
pub const BLOBS_BYTES_MAX: u64 = 32 * GIB;
/// How long a blob is kept without being used.
pub const BLOB_AGE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long an agent goes without looking for blobs that are too old; it looks when a session ends.
pub const BLOBS_LOOKED_AT_MAX: Duration = Duration::from_secs(3600);
/// Blobs asked for in one call.
pub const BLOBS_COUNT_MAX: usize = 10_000;

/// Output kept from the beginning unless a block says otherwise.
pub const LOG_HEAD_BYTES: u64 = 4 * GIB;
/// Output kept from the end unless a block says otherwise.
pub const LOG_TAIL_BYTES: u64 = MIB as u64;
/// Output of one task that travels with the session's events; the rest goes on the bulk connection.
pub const LOG_INLINE_BYTES_MAX: u64 = 64 * 1024;
/// Lines of a task's output that are repeated in its terminal record.
pub const LAST_LINES_COUNT: usize = 10;
/// One such line.
pub const LAST_LINE_BYTES_MAX: usize = 256;
/// Processes that had to be ended after the last phase and are named in the terminal record.
pub const LEAKED_COUNT_MAX: usize = 64;
/// Entries of the output directory that were left out of the archive and are named in the terminal record.
pub const SKIPPED_COUNT_MAX: usize = 64;
/// One line as a watcher gets it; longer ones are cut into pieces of this size.
pub const LINE_BYTES_MAX: usize = 64 * KIB;
/// Archive that travels with the terminal record.
pub const ARCHIVE_INLINE_BYTES_MAX: u64 = 64 * 1024;
/// Entries of one archive.
pub const ARCHIVE_ENTRIES_COUNT_MAX: u64 = 1_000_000;
/// Depth of a path in an archive or in a shipped directory.
pub const PATH_DEPTH_MAX: usize = 64;
/// One component of such a path.
pub const PATH_COMPONENT_BYTES_MAX: usize = 255;
/// Such a path as a whole.
pub const PATH_BYTES_MAX: usize = 4_096;
/// Bytes of one archive.
pub const ARCHIVE_BYTES_MAX: u64 = 64 * GIB;
/// The value that a function returns, as JSON.
pub const VALUE_BYTES_MAX: u64 = 16 * MIB as u64;
/// The whiteboard of a task.
pub const WHITEBOARD_BYTES_MAX: u64 = MIB as u64;

/// One message of a relayed call.
pub const RELAY_MESSAGE_BYTES_MAX: usize = MIB;
/// Messages of all relayed calls of one session that are kept for a repeat, or wait for a block that reads slowly.
pub const RELAY_KEPT_BYTES_MAX: usize = 64 * MIB;
/// Messages that wait for one block that reads slowly, before its call is ended.
pub const RELAY_UNREAD_BYTES_MAX: usize = 4 * MIB;
/// Connections of one task to its socket.
pub const RELAY_CONNECTIONS_COUNT_MAX: usize = 1_024;
/// Relayed calls of one session at once.
pub const RELAY_CALLS_COUNT_MAX: usize = 16_384;
/// Frames that wait for the relay of one session. Each is at most one message of [`CONTROL_MESSAGE_BYTES_MAX`].
pub const RELAY_FRAMES_COUNT_MAX: usize = 1_024;
/// Frames that wait between a door and a supervisor, each way: a window of starts for eight streams fits.
pub const SUPERVISOR_FRAMES_COUNT_MAX: usize = 1_024;
/// One frame between a door and a supervisor: a control message and its envelope.
pub const SUPERVISOR_FRAME_BYTES_MAX: usize = 4 * MIB;
