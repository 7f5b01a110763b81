//! Records of who ran what, when, where and with which outcome: to a journal where there is one, else to a file, in a thread of
//! their own.
//!
//! Nobody who serves calls waits for a disk or a journal: records wait in a bounded queue, and those that find it full or cannot
//! be written are counted as lost. A path that is a socket is spoken to as a journal, by its native protocol: one datagram a
//! record, a line `NAME=value` a field. Any other path is a file of JSON lines, which is opened again when it was moved away.

use std::{
    fmt::{self, Write as _},
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::{
        fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
        net::UnixDatagram,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use millstream_common::text::printable;
use tracing::{Level, enabled, error, info};

/// Where systemd's journal takes records.
pub const JOURNAL: &str = "/run/systemd/journal/socket";
/// Target of records in the agent's own log.
const AUDIT: &str = "millstream::audit";
/// Records that wait to be written: some seconds of starts and ends at the highest rate, less than 4 MiB.
const RECORDS_COUNT_MAX: usize = 4_096;
/// Records that are written at once.
const BATCH_COUNT: usize = 256;
/// One value.
const VALUE_BYTES_MAX: usize = 1_024;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    /// Names in lower case; all values are safe to print and have one line.
    fields: Vec<(&'static str, String)>,
}

impl Record {
    /// Of this kind, at this time.
    pub(crate) fn new(event: &'static str, time: String) -> Self {
        Self { fields: vec![("time", time), ("event", event.to_owned())] }
    }

    /// With one more field. An empty value says nothing and is left out.
    pub(crate) fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        let value = printable(value.to_string().as_bytes(), VALUE_BYTES_MAX);
        if !value.is_empty() {
            self.fields.push((name, value));
        }
        self
    }

    /// As one line of JSON.
    fn json_line(&self) -> String {
        let mut line = String::from("{");
        for (index, (name, value)) in self.fields.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            // Writing to a String cannot fail.
            let _ = write!(line, "{comma}\"{name}\":{}", serde_json::Value::from(value.as_str()));
        }
        line.push_str("}\n");
        line
    }

    /// As one datagram for a journal.
    fn datagram(&self) -> String {
        let told = |wanted: &str| {
            self.fields.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.as_str())
        };
        let words = ["event", "stream", "block", "call", "owner", "outcome", "reason"];
        let message: Vec<&str> = words.into_iter().filter_map(told).collect();
        let mut datagram =
            format!("MESSAGE={}\nPRIORITY=6\nSYSLOG_IDENTIFIER=millstream-agent\n", message.join(" "));
        for (name, value) in &self.fields {
            let _ = writeln!(datagram, "MILLSTREAM_{}={value}", name.to_ascii_uppercase());
        }
        datagram
    }
}

/// Why there is no place for records.
#[derive(Debug, thiserror::Error)]
#[error("failed to open the audit log `{}`: {}; make its directory writable for this user, or set `audit` to another path", path.display(), millstream_common::tls::reason(source))]
pub struct AuditError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

enum Order {
    Put(Record),
    /// Say when everything before it is written.
    Flush(SyncSender<()>),
}

/// The way to the thread that writes.
pub(crate) struct Audit {
    orders: Option<SyncSender<Order>>,
    lost: Arc<AtomicU64>,
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audit").field("lost", &self.lost).finish_non_exhaustive()
    }
}

impl Audit {
    /// Opens the place; without one, records go to the agent's own log.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self, AuditError> {
        let lost = Arc::new(AtomicU64::new(0));
        let Some(path) = path else { return Ok(Self { orders: None, lost }) };
        let failed = |source| AuditError { path: path.to_owned(), source };
        let place = Place::open(path).map_err(failed)?;
        let (orders, received) = sync_channel(RECORDS_COUNT_MAX);
        let mut writer = Writer { place, lost: Arc::clone(&lost), failing: false };
        let thread = std::thread::Builder::new().name("audit".to_owned());
        // It ends with the last sender.
        drop(thread.spawn(move || writer.run(&received)).map_err(failed)?);
        Ok(Self { orders: Some(orders), lost })
    }

    /// Whether anybody reads records: an agent of local streams keeps none, and makes none.
    pub(crate) fn is_wanted(&self) -> bool {
        self.orders.is_some() || enabled!(target: AUDIT, Level::INFO)
    }

    /// Puts a record, soon. Never waits.
    pub(crate) fn put(&self, record: Record) {
        let Some(orders) = &self.orders else {
            info!(target: AUDIT, "{}", record.json_line().trim_end());
            return;
        };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            orders.try_send(Order::Put(record))
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Records that are nowhere.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until everything that was put is written, at most `patience`. Blocking.
    pub(crate) fn flush(&self, patience: Duration) {
        let Some(orders) = &self.orders else { return };
        let (done, written) = sync_channel(1);
        if orders.try_send(Order::Flush(done)).is_err() || written.recv_timeout(patience).is_err() {
            error!("the last audit records may be lost");
        }
    }
}

enum Place {
    Journal { socket: UnixDatagram, path: PathBuf },
    File { file: File, path: PathBuf },
}

impl Place {
    fn open(path: &Path) -> io::Result<Self> {
        let is_socket = fs::metadata(path).is_ok_and(|found| found.file_type().is_socket());
        let path = path.to_owned();
        Ok(if is_socket {
            Self::Journal { socket: UnixDatagram::unbound()?, path }
        } else {
            Self::File { file: open_file(&path)?, path }
        })
    }

    /// Writes records; answers with how many were written before it failed.
    fn write(&mut self, records: &[Record]) -> Result<(), (usize, io::Error)> {
        match self {
            Self::Journal { socket, path } => {
                for (done, record) in records.iter().enumerate() {
                    let sent = socket.send_to(record.datagram().as_bytes(), &path);
                    sent.map_err(|error| (done, error))?;
                }
                Ok(())
            }
            Self::File { file, path } => {
                let text: String = records.iter().map(Record::json_line).collect();
                let written = reopen_if_moved(file, path).and_then(|()| file.write_all(text.as_bytes()));
                written.map_err(|error| (0, error))
            }
        }
    }
}

/// Whoever rotates logs moves the file away, or removes it.
fn reopen_if_moved(file: &mut File, path: &Path) -> io::Result<()> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) if (named.dev(), named.ino()) == (open.dev(), open.ino()) => {}
        _ => *file = open_file(path)?,
    }
    Ok(())
}

/// Who ran what is for administrators.
fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

struct Writer {
    place: Place,
    lost: Arc<AtomicU64>,
    /// Whether the last attempt failed: said once, not with each record.
    failing: bool,
}

impl Writer {
    fn run(&mut self, orders: &Receiver<Order>) {
        let mut batch = Vec::with_capacity(BATCH_COUNT);
        while let Ok(first) = orders.recv() {
            let mut order = Some(first);
            while let Some(Order::Put(record)) = order {
                batch.push(record);
                order = if batch.len() < BATCH_COUNT { orders.try_recv().ok() } else { None };
            }
            self.write(&mut batch);
            if let Some(Order::Flush(done)) = order {
                // Whoever asked may have lost patience.
                let _gone = done.try_send(());
            }
        }
    }

    fn write(&mut self, batch: &mut Vec<Record>) {
        if batch.is_empty() {
            return;
        }
        match self.place.write(batch) {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    info!("audit records are written again");
                }
            }
            Err((done, error)) => {
                let count = batch.len() - done;
                self.lost.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
                if !std::mem::replace(&mut self.failing, true) {
                    error!(%error, count, "audit records are lost");
                }
            }
        }
        batch.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn record(block: &str) -> Record {
        let record = Record::new("task.ended", "2026-11-21T22:37:25Z".to_owned());
        record
            .with("owner", "millstream://controller/alice")
            .with("block", block)
            .with("user", "")
            .with("exit_code", 3)
    }

    #[test]
    fn a_record_is_a_line_of_json_and_cannot_be_forged_by_a_name() {
        let line = record("evil\n\",\"owner\":\"root").json_line();
        assert_eq!(line.lines().count(), 1);
        let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(parsed["owner"], "millstream://controller/alice");
        assert_eq!(parsed["block"], "evil\\n\",\"owner\":\"root");
        assert_eq!((&parsed["exit_code"], &parsed["user"]), (&"3".into(), &serde_json::Value::Null));
    }

    #[test]
    fn a_journal_gets_a_datagram_a_record() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let journal = UnixDatagram::bind(&path).unwrap();
        journal.set_read_timeout(Some(PATIENCE)).unwrap();
        let audit = Audit::open(Some(&path)).unwrap();
        audit.put(record("netserver"));
        let mut datagram = [0; 4096];
        let length = journal.recv(&mut datagram).unwrap();
        assert_eq!(
            std::str::from_utf8(&datagram[..length]).unwrap(),
            "MESSAGE=task.ended netserver millstream://controller/alice\nPRIORITY=6\n\
             SYSLOG_IDENTIFIER=millstream-agent\nMILLSTREAM_TIME=2026-11-21T22:37:25Z\nMILLSTREAM_EVENT=task.ended\n\
             MILLSTREAM_OWNER=millstream://controller/alice\nMILLSTREAM_BLOCK=netserver\nMILLSTREAM_EXIT_CODE=3\n"
        );
        drop(journal);
        fs::remove_file(&path).unwrap();
        audit.put(record("nobody listens"));
        audit.flush(PATIENCE);
        assert_eq!(audit.lost(), 1);
        let _back = UnixDatagram::bind(&path).unwrap();
        audit.put(record("again"));
        audit.flush(PATIENCE);
        assert_eq!(audit.lost(), 1, "a journal that was started again is found");
    }

    #[test]
    fn a_file_that_was_moved_away_is_begun_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        fs::write(&path, "earlier\n").unwrap();
        let audit = Audit::open(Some(&path)).unwrap();
        audit.put(record("first"));
        audit.flush(PATIENCE);
        let moved = directory.path().join("audit.jsonl.1");
        fs::rename(&path, &moved).unwrap();
        audit.put(record("second"));
        audit.flush(PATIENCE);
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        assert!(read(&moved).starts_with("earlier\n") && read(&moved).contains("first"));
        assert!(!read(&moved).contains("second") && read(&path).contains("second"));
        assert_eq!(audit.lost(), 0);
    }

    #[test]
    fn a_place_that_cannot_be_had_is_told() {
        let error = Audit::open(Some(Path::new("/nowhere/audit.jsonl"))).unwrap_err();
        assert!(error.to_string().contains("`/nowhere/audit.jsonl`"), "{error}");
    }
}
