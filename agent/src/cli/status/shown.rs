//! The status of agents in words: one in full, as a table or as JSON, and many in a row each. Asks nobody.

use std::fmt::Write as _;

use millstream_common::{
    convert,
    text::{counted, spoken},
};
use millstream_proto::v1;
use serde_json::{Value, json};

use super::{super::upkeep::survivor_line, Answer};
use crate::door::status::clock_text;

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

pub(super) fn as_table(status: &v1::AgentStatus) -> String {
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
    if let Some(certificate) = &status.certificate {
        line("certificate", certificate_line(certificate));
    }
    line("sessions", status.sessions.len().to_string());
    for session in &status.sessions {
        session_lines(session, &mut out);
    }
    for (place, waiting) in (1..).zip(&status.waiting) {
        let _ = writeln!(out, "{:<12} {}", "in line", waiting_line(place, waiting));
    }
    for survivor in &status.survivors {
        let _ = writeln!(out, "{}", survivor_line(survivor));
    }
    for error in &status.last_errors {
        let _ = writeln!(out, "error        {error}");
    }
    out
}

fn waiting_line(place: u32, waiting: &v1::WaitingStatus) -> String {
    let since = waiting.asked_time.as_ref().map_or_else(String::new, shown_time);
    let exclusive = if waiting.exclusive { ", exclusive" } else { "" };
    format!("{place}. {} ({}{exclusive}) since {since}", waiting.owner, waiting.client)
}

fn certificate_line(certificate: &v1::CertificateStatus) -> String {
    let until = certificate.expire_time.as_ref().map_or_else(String::new, shown_time);
    let renewal = match (&certificate.renew_time, certificate.trouble.as_str()) {
        (None, "") => "nobody renews it".to_owned(),
        (None, trouble) => format!("NOT USABLE: {trouble}"),
        (Some(at), "") => format!("is renewed at {}", shown_time(at)),
        (Some(at), trouble) => format!("NOT RENEWED ({trouble}), tried again at {}", shown_time(at)),
    };
    format!("{}, until {until}, {renewal}", certificate.identity)
}

fn shown_time(time: &prost_types::Timestamp) -> String {
    clock_text(convert::timestamp_ns(time))
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
        // What a block prints tells more than that it runs.
        let prints = task.state() == v1::TaskState::Running && !task.last_line.is_empty();
        let said = if prints || task.explanation.is_empty() { &task.last_line } else { &task.explanation };
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
            said,
        );
    }
}

pub(super) fn as_json(status: &v1::AgentStatus) -> Value {
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
        "drain": status.drain.as_ref().map(|drain| json!({
            "reason": drain.reason,
            "owner": drain.owner,
            "begin_time": drain.begin_time.as_ref().map(ToString::to_string),
        })),
        "survivors": status.survivors.iter().map(survivor_json).collect::<Vec<_>>(),
        "sessions": status.sessions.iter().map(session_json).collect::<Vec<_>>(),
        "waiting": status.waiting.iter().map(waiting_json).collect::<Vec<_>>(),
        "last_errors": status.last_errors,
        "certificate": status.certificate.as_ref().map(|certificate| json!({
            "identity": certificate.identity,
            "expire_time": certificate.expire_time.as_ref().map(shown_time),
            "renew_time": certificate.renew_time.as_ref().map(shown_time),
            "trouble": certificate.trouble,
        })),
    })
}

/// The columns of [`row`].
const COLUMNS: [&str; 8] = ["AGENT", "STATE", "SESSIONS", "RUNNING", "LOAD", "FREE", "UP", "WHO"];

/// One agent in a row: its state, how busy it is, and who has it. None is one that has not answered yet.
pub(super) fn row(agent: &str, answer: Option<&Answer>) -> Vec<String> {
    let status = match answer {
        None => return vec![agent.to_owned(), "asked".to_owned()],
        Some(Err(error)) => return vec![agent.to_owned(), format!("unreachable: {error}")],
        Some(Ok(status)) => status,
    };
    let tasks = status.sessions.iter().flat_map(|session| &session.tasks);
    let running = tasks.filter(|task| task.state() == v1::TaskState::Running).count();
    let load = status.load.as_ref().and_then(|load| load.load_average.split(' ').next()).unwrap_or_default();
    let free = status.spool.as_ref().map_or(0, |spool| spool.free_bytes);
    let who = status.sessions.iter().map(|session| {
        let exclusive = if session.exclusive { ", exclusive" } else { "" };
        format!(
            "{} ({}{exclusive})",
            session.owner.trim_start_matches("millstream://controller/"),
            session.client
        )
    });
    let mut who: Vec<String> = who.collect();
    if !status.waiting.is_empty() {
        who.push(format!("{} in line", status.waiting.len()));
    }
    if !status.state_reason.is_empty() {
        who.push(status.state_reason.clone());
    }
    vec![
        agent.to_owned(),
        word(status.state().as_str_name(), "AGENT_STATE_", status.state()),
        status.sessions.len().to_string(),
        running.to_string(),
        load.to_owned(),
        bytes(free),
        span(status.uptime.as_ref()),
        who.join("; "),
    ]
}

/// All of them below each other.
pub(super) fn rows<'a>(answers: impl Iterator<Item = (&'a str, Option<&'a Answer>)>) -> String {
    let mut table: Vec<Vec<String>> = vec![COLUMNS.map(str::to_owned).to_vec()];
    table.extend(answers.map(|(agent, answer)| row(agent, answer)));
    let width = |column: usize| {
        // What is in the last column of a row may be as long as it likes.
        let cells = table.iter().filter(|row| column + 1 < row.len()).map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
    let mut out = String::new();
    for row in &table {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

fn seconds(duration: Option<&prost_types::Duration>) -> f64 {
    let duration = duration.and_then(|duration| std::time::Duration::try_from(*duration).ok());
    duration.unwrap_or_default().as_secs_f64()
}

fn survivor_json(survivor: &v1::Survivor) -> Value {
    json!({
        "pid": survivor.pid,
        "what": survivor.what,
        "session_id": survivor.session_id,
        "owner": survivor.owner,
        "client": survivor.client,
        "block": survivor.block,
        "find_time": survivor.find_time.as_ref().map(ToString::to_string),
    })
}

fn waiting_json(waiting: &v1::WaitingStatus) -> Value {
    json!({
        "owner": waiting.owner,
        "client": waiting.client,
        "exclusive": waiting.exclusive,
        "asked_time": waiting.asked_time.as_ref().map(ToString::to_string),
    })
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
