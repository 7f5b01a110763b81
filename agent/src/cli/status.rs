//! What an agent does, as a table for people or as JSON for programs. Asks the same call that `grpcurl` would.

use std::{
    fmt::Write as _,
    fs, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::Args;
use millstream_common::{
    pipe::{self, BoxedPipe, ConnectError},
    text::{counted, spoken},
    tls::{self, TlsError, TlsPaths},
};
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use serde_json::{Value, json};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::config::{PORT, UNIX_SOCKET};

/// Options of `status`.
#[derive(Debug, Args)]
pub(super) struct Status {
    /// The agent: the path of its Unix socket, `tls://HOST[:PORT]`, or `tcp://ADDRESS[:PORT]` on this host.
    #[arg(default_value = UNIX_SOCKET)]
    agent: String,
    /// Certificate of the role operator or controller, for `tls://`.
    #[arg(long, value_name = "FILE", env = "MILLSTREAM_CERT")]
    certificate: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE", env = "MILLSTREAM_KEY")]
    key: Option<PathBuf>,
    /// Certificate of the authority.
    #[arg(long, value_name = "FILE", env = "MILLSTREAM_CA")]
    authority: Option<PathBuf>,
    /// Name in the agent's certificate, when it is dialled by another.
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub(super) enum StatusError {
    #[error(
        "`{text}` is no agent: give the path of a Unix socket, `tls://HOST[:PORT]` or `tcp://ADDRESS[:PORT]`"
    )]
    Address { text: String },
    #[error(
        "`{name}` is neither an address nor in /etc/hosts: give the address, and the name with `--server-name`"
    )]
    Name { name: String },
    #[error(
        "`{option}` is needed for `tls://`: the path of a file in PEM form, made by `millstream-agent pki issue`"
    )]
    Option { option: &'static str },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("`{agent}`: {source}")]
    Connect {
        agent: String,
        #[source]
        source: ConnectError,
    },
    #[error("`{agent}` gave no status: {}", pipe::call_failure(source))]
    Call {
        agent: String,
        #[source]
        source: Box<tonic::Status>,
    },
    #[error("failed to write to standard output")]
    Print(#[source] io::Error),
}

impl Status {
    pub(super) async fn run(self) -> Result<(), StatusError> {
        let channel = self.connect().await?;
        let mut client = AgentServiceClient::new(channel);
        let call = |source| StatusError::Call { agent: self.agent.clone(), source: Box::new(source) };
        let answer = client.get_status(v1::GetStatusRequest {}).await.map_err(call)?;
        let status = answer.into_inner().status.unwrap_or_default();
        let text = if self.json { format!("{:#}\n", as_json(&status)) } else { as_table(&status) };
        match io::Write::write_all(&mut io::stdout().lock(), text.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(StatusError::Print(error)),
            _ => Ok(()),
        }
    }

    async fn connect(&self) -> Result<tonic::transport::Channel, StatusError> {
        let connected = if let Some(rest) = self.agent.strip_prefix("tls://") {
            let (name, address) = dialled(rest)?;
            let (config, name) =
                tls::client_config(&self.tls_paths()?, self.server_name.as_deref().unwrap_or(name))?;
            pipe::endpoint_channel(|| async move {
                let stream = TcpStream::connect(address).await?;
                Ok(Box::new(TlsConnector::from(config).connect(name, stream).await?) as BoxedPipe)
            })
            .await
        } else if let Some(rest) = self.agent.strip_prefix("tcp://") {
            let (_, address) = dialled(rest)?;
            pipe::endpoint_channel(
                || async move { Ok(Box::new(TcpStream::connect(address).await?) as BoxedPipe) },
            )
            .await
        } else {
            let path = self.agent.strip_prefix("unix://").unwrap_or(&self.agent);
            if !path.contains('/') {
                return Err(StatusError::Address { text: self.agent.clone() });
            }
            pipe::endpoint_channel(
                || async move { Ok(Box::new(UnixStream::connect(path).await?) as BoxedPipe) },
            )
            .await
        };
        connected.map_err(|source| StatusError::Connect { agent: self.agent.clone(), source })
    }

    fn tls_paths(&self) -> Result<TlsPaths, StatusError> {
        let given = |path: &Option<PathBuf>, option| path.clone().ok_or(StatusError::Option { option });
        Ok(TlsPaths {
            certificate: given(&self.certificate, "--certificate")?,
            key: given(&self.key, "--key")?,
            authority: given(&self.authority, "--authority")?,
            revocations: None,
        })
    }
}

/// The host as it was named, and where it is dialled.
fn dialled(text: &str) -> Result<(&str, SocketAddr), StatusError> {
    let text = text.trim_end_matches('/');
    if let Ok(address) = text.parse::<SocketAddr>() {
        let host = text.rsplit_once(':').map_or(text, |(host, _)| host).trim_matches(['[', ']']);
        return Ok((host, address));
    }
    let bare = text.trim_matches(['[', ']']);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok((bare, SocketAddr::new(ip, PORT)));
    }
    let (host, port) = text.split_once(':').unwrap_or((text, ""));
    let port = if port.is_empty() { Ok(PORT) } else { port.parse() };
    let port = port.map_err(|_| StatusError::Address { text: text.to_owned() })?;
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let ip = in_hosts(host, &hosts).ok_or_else(|| StatusError::Name { name: host.to_owned() })?;
    Ok((host, SocketAddr::new(ip, port)))
}

/// The name service is not asked: its modules crash a static program on hosts with another C library.
fn in_hosts(name: &str, hosts: &str) -> Option<IpAddr> {
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines.map(str::split_whitespace).find_map(|mut words| {
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    })
}

fn span(duration: Option<&prost_types::Duration>) -> String {
    let duration = duration.and_then(|duration| std::time::Duration::try_from(*duration).ok());
    spoken(duration.unwrap_or_default())
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut tenths = count.saturating_mul(10);
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1_024;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]) }
}

fn word<E: Into<i32> + Copy>(name: &str, prefix: &str, _: E) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

fn as_table(status: &v1::AgentStatus) -> String {
    let mut out = String::new();
    let host = status.host.clone().unwrap_or_default();
    let can = status.capabilities.clone().unwrap_or_default();
    let load = status.load.clone().unwrap_or_default();
    let spool = status.spool.clone().unwrap_or_default();
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{name:<12} {value}");
        }
    };
    let state = word(status.state().as_str_name(), "AGENT_STATE_", status.state());
    let reason =
        if status.state_reason.is_empty() { String::new() } else { format!(": {}", status.state_reason) };
    line("agent", format!("{} on {}, {state}{reason}", status.version, host.hostname));
    line("uptime", span(status.uptime.as_ref()));
    line("host", format!("{}, {}, {}", host.distribution, host.kernel, host.architecture));
    line(
        "size",
        format!(
            "{}, {} memory",
            counted(usize::try_from(host.processors_count).unwrap_or(0), "processor"),
            bytes(host.memory_bytes)
        ),
    );
    line("load", format!("{}, {} memory available", load.load_average, bytes(load.memory_available_bytes)));
    line("addresses", host.addresses.join(", "));
    line("contains by", format!("{}, limits by {}", can.containment, can.limits));
    line("python", can.python);
    line(
        "disk",
        format!(
            "{}: sessions {}, blobs {} of {}, {} free",
            spool.directory,
            bytes(spool.sessions_bytes),
            bytes(spool.blobs_bytes),
            bytes(spool.blobs_bytes_max),
            bytes(spool.free_bytes)
        ),
    );
    line("sessions", status.sessions.len().to_string());
    for session in &status.sessions {
        session_lines(session, &mut out);
    }
    for error in &status.last_errors {
        let _ = writeln!(out, "error        {error}");
    }
    out
}

fn session_lines(session: &v1::SessionStatus, out: &mut String) {
    let mut more = Vec::new();
    more.push(if session.connected { "connected".to_owned() } else { "not connected".to_owned() });
    more.push(format!("lease {}", span(session.lease_left.as_ref())));
    if session.exclusive {
        more.push("exclusive".to_owned());
    }
    more.push(counted(usize::try_from(session.tasks_count).unwrap_or(0), "task"));
    let _ = writeln!(
        out,
        "  {}  {} ({}): {}",
        session.session_id,
        session.owner,
        session.client,
        more.join(", ")
    );
    for task in &session.tasks {
        let state = word(task.state().as_str_name(), "TASK_STATE_", task.state());
        let phase = match task.state() {
            v1::TaskState::Running => {
                format!("({})", word(task.phase().as_str_name(), "PHASE_", task.phase()))
            }
            _ => String::new(),
        };
        let _ = writeln!(
            out,
            "    {:<12} {:<20} {:<18} {:>10}  {}",
            task.stream,
            task.block,
            format!("{state}{phase}"),
            bytes(task.logged_bytes),
            if task.explanation.is_empty() { &task.last_line } else { &task.explanation },
        );
    }
}

fn as_json(status: &v1::AgentStatus) -> Value {
    let host = status.host.clone().unwrap_or_default();
    let can = status.capabilities.clone().unwrap_or_default();
    let load = status.load.clone().unwrap_or_default();
    let spool = status.spool.clone().unwrap_or_default();
    json!({
        "version": status.version,
        "protocol_min": status.protocol_min,
        "protocol_max": status.protocol_max,
        "incarnation": status.incarnation,
        "uptime_seconds": seconds(status.uptime.as_ref()),
        "state": word(status.state().as_str_name(), "AGENT_STATE_", status.state()),
        "state_reason": status.state_reason,
        "host": {
            "hostname": host.hostname,
            "kernel": host.kernel,
            "architecture": host.architecture,
            "distribution": host.distribution,
            "processors_count": host.processors_count,
            "memory_bytes": host.memory_bytes,
            "boot_id": host.boot_id,
            "addresses": host.addresses,
        },
        "capabilities": {
            "containment": can.containment,
            "limits": can.limits,
            "python": can.python,
            "features": can.features,
        },
        "load": {
            "load_average": load.load_average,
            "memory_available_bytes": load.memory_available_bytes,
        },
        "spool": {
            "directory": spool.directory,
            "sessions_bytes": spool.sessions_bytes,
            "blobs_bytes": spool.blobs_bytes,
            "blobs_bytes_max": spool.blobs_bytes_max,
            "free_bytes": spool.free_bytes,
        },
        "sessions": status.sessions.iter().map(session_json).collect::<Vec<_>>(),
        "last_errors": status.last_errors,
    })
}

fn seconds(duration: Option<&prost_types::Duration>) -> f64 {
    let duration = duration.and_then(|duration| std::time::Duration::try_from(*duration).ok());
    duration.unwrap_or_default().as_secs_f64()
}

fn session_json(session: &v1::SessionStatus) -> Value {
    json!({
        "session_id": session.session_id,
        "owner": session.owner,
        "client": session.client,
        "open_time": session.open_time.as_ref().map(ToString::to_string),
        "lease_left_seconds": seconds(session.lease_left.as_ref()),
        "exclusive": session.exclusive,
        "connected": session.connected,
        "supervisor_pid": session.supervisor_pid,
        "tasks_count": session.tasks_count,
        "tasks": session.tasks.iter().map(task_json).collect::<Vec<_>>(),
    })
}

fn task_json(task: &v1::TaskStatus) -> Value {
    json!({
        "task_id": task.task_id,
        "stream": task.stream,
        "block": task.block,
        "state": word(task.state().as_str_name(), "TASK_STATE_", task.state()),
        "phase": word(task.phase().as_str_name(), "PHASE_", task.phase()),
        "pid": task.pid,
        "start_time": task.start_time.as_ref().map(ToString::to_string),
        "logged_bytes": task.logged_bytes,
        "last_line": task.last_line,
        "outcome": word(task.outcome().as_str_name(), "OUTCOME_KIND_", task.outcome()),
        "explanation": task.explanation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_dialled_by_number_or_by_the_table_of_this_host() {
        let shown = |text| {
            dialled(text).map(|(host, address)| format!("{host} {address}")).map_err(|e| e.to_string())
        };
        assert_eq!(shown("10.0.0.1"), Ok(format!("10.0.0.1 10.0.0.1:{PORT}")));
        assert_eq!(shown("[::1]:99"), Ok("::1 [::1]:99".to_owned()));
        assert!(shown("no-such-host.invalid").unwrap_err().contains("--server-name"));
        assert_eq!(in_hosts("B", "# c\n10.1.2.3 a b # d\n"), Some(IpAddr::from([10, 1, 2, 3])));
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(bytes(17), "17 B");
        assert_eq!(bytes(1_536), "1.5 KiB");
        assert_eq!(bytes(u64::from(u32::MAX) + 1), "4.0 GiB");
    }

    #[test]
    fn a_table_has_a_line_for_each_task() {
        let task = v1::TaskStatus {
            stream: "server".to_owned(),
            block: "iperf3".to_owned(),
            state: v1::TaskState::Running.into(),
            phase: v1::Phase::Run.into(),
            last_line: "listening".to_owned(),
            ..v1::TaskStatus::default()
        };
        let session = v1::SessionStatus {
            owner: "millstream://controller/x".to_owned(),
            tasks: vec![task],
            ..v1::SessionStatus::default()
        };
        let status = v1::AgentStatus { sessions: vec![session], ..v1::AgentStatus::default() };
        let table = as_table(&status);
        assert!(table.contains("server       iperf3               running(run)"), "{table}");
        assert_eq!(as_json(&status)["sessions"][0]["tasks"][0]["state"], "running");
    }
}
