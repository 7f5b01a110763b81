//! The `millstream-sync` command: barriers, topics and the whiteboard for shells, and with `--json` for any language.
//!
//! Exit codes: 0 done; 1 the barrier broke, patience ended or nobody answered; 2 the command line is wrong or this is not
//! a block. What went wrong is one sentence on standard error, and with `--json` also `{"error": …}` on standard output.

use std::{
    env,
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{self, Read as _, Write},
    os::fd::AsFd as _,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{io::Interest, net::unix::pipe};

use super::{Content, Entry, Parties, PartiesError, Released, SyncError, TopicValue, blocking::SyncClient};
use crate::{limits, text};

const USAGE: &str = "\
Usage: millstream-sync [--json] COMMAND

  barrier NAME [PARTIES] [--timeout 60] [--payload TEXT | --payload -]
                             wait for all parties; prints them: place, name, payload
  publish TOPIC VALUE        append a value, `-` reads it; prints its index
  wait TOPIC [COUNT] [--timeout 60]
                             wait for the first COUNT values (1); prints them, one a line
  get TOPIC                  print the values that are there
  subscribe TOPIC [--from 0] [--once]
                             print the values and those that come later, while the block may do something else; with
                             --once wait for the next ones, print them and end; 1 when no other task is left to publish
  abort NAME REASON          break a barrier for everybody
  whiteboard [TEXT | -]      add a line to the task's whiteboard, or print it
  list                       print every barrier and topic

PARTIES is a number, `group` (also when it is left out: the group that the block was run on), `all` (every defined
stream), or one of these and more, such as `all+1`. Timeouts are seconds, or like 2m 30s.
Exit code: 0 done; 1 broken, timed out or nobody answered; 2 wrong usage, or not inside a block.
";

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("{0}: see `millstream-sync --help`")]
    Usage(String),
    #[error("{variable} is not set: `millstream-sync` works inside a block only")]
    NoVariable { variable: &'static str },
    #[error("the whiteboard would have {length} bytes: at most {limit} are allowed")]
    WhiteboardFull { length: u64, limit: u64 },
    #[error("failed to use `{}`", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("failed to read standard input")]
    Read {
        #[source]
        source: io::Error,
    },
    #[error("failed to print")]
    Print {
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Sync(#[from] SyncError),
}

impl CommandError {
    /// 2 for what will fail the same way wherever it is tried again, 1 for what happened.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_)
            | Self::NoVariable { .. }
            | Self::Sync(SyncError::NoSocket | SyncError::Connect { .. }) => 2,
            Self::Sync(SyncError::Refused { code: tonic::Code::InvalidArgument, .. }) => 2,
            Self::WhiteboardFull { .. } | Self::File { .. } | Self::Read { .. } | Self::Print { .. } => 1,
            Self::Sync(_) => 1,
        }
    }

    /// One word for programs.
    fn kind(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::NoVariable { .. } | Self::Sync(SyncError::NoSocket | SyncError::Connect { .. }) => {
                "no_block"
            }
            Self::Sync(SyncError::Broken(_)) => "broken",
            Self::Sync(SyncError::TimedOut(_)) => "timed_out",
            Self::Sync(SyncError::Gone(_)) => "gone",
            Self::Sync(_) => "refused",
            Self::WhiteboardFull { .. } | Self::File { .. } | Self::Read { .. } | Self::Print { .. } => {
                "file"
            }
        }
    }

    /// The whole chain as one sentence.
    fn sentence(&self) -> String {
        let mut sentence = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let told = cause.to_string();
            if !sentence.contains(&told) {
                sentence.push_str(": ");
                sentence.push_str(&told);
            }
            source = cause.source();
        }
        sentence
    }
}

/// Runs the command with its arguments, without the program's name.
#[must_use]
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    ExitCode::from(run(arguments, &mut out, &mut err))
}

/// Runs the command with given outputs and gives its exit code.
fn run(arguments: impl IntoIterator<Item = OsString>, out: &mut impl Write, err: &mut impl Write) -> u8 {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // Known even when the rest of the line is not understood.
    let json = arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json");
    let done = parse(arguments).and_then(|parsed| perform(parsed, out));
    match done {
        Ok(()) => 0,
        // Whoever read the output has seen enough, as with `subscribe … | head -1`.
        Err(CommandError::Print { source }) if source.kind() == io::ErrorKind::BrokenPipe => 0,
        Err(error) => {
            let sentence = error.sentence();
            // When even this cannot be printed, the exit code has to do.
            if json {
                let told = json!({"error": {"kind": error.kind(), "message": sentence}});
                drop(writeln!(out, "{told}"));
            }
            drop(writeln!(err, "millstream-sync: {sentence}"));
            error.exit_code()
        }
    }
}

/// The command line, understood.
#[derive(Debug, PartialEq)]
struct Parsed {
    json: bool,
    command: Command,
}

#[derive(Debug, PartialEq)]
enum Command {
    Help,
    Barrier { name: String, parties: Parties, timeout: Option<Duration>, payload: Option<String> },
    Publish { topic: String, value: String },
    Wait { topic: String, count: u32, timeout: Option<Duration> },
    Get { topic: String },
    Subscribe { topic: String, from: u64, once: bool },
    Abort { name: String, reason: String },
    Whiteboard { text: Option<String> },
    List,
}

fn usage(problem: impl Into<String>) -> CommandError {
    CommandError::Usage(problem.into())
}

fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Parsed, CommandError> {
    let mut words: Vec<String> = Vec::new();
    let mut options: Vec<(&'static str, String)> = Vec::new();
    let (mut json, mut help, mut plain, mut once) = (false, false, false, false);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let argument = argument
            .into_string()
            .map_err(|argument| usage(format!("argument `{}` is not UTF-8", argument.display())))?;
        let known = ["--timeout", "--payload", "--from"];
        let (name, inline) = match argument.split_once('=') {
            Some((name, value)) if argument.starts_with("--") => (name, Some(value.to_owned())),
            _ => (argument.as_str(), None),
        };
        match name {
            _ if plain => words.push(argument),
            "--" => plain = true,
            "--json" => json = true,
            "--once" => once = true,
            "--help" | "-h" => help = true,
            name if let Some(name) = known.into_iter().find(|known| *known == name) => {
                let next = || arguments.next().and_then(|value| value.into_string().ok());
                let value = inline.or_else(next).ok_or_else(|| usage(format!("{name} needs a value")))?;
                options.push((name, value));
            }
            name if name.starts_with("--") => {
                let near = text::nearest(name, known.into_iter().chain(["--json", "--once"]));
                let hint = near.map_or_else(String::new, |near| format!(", perhaps {near} was meant"));
                return Err(usage(format!("option {name} is unknown{hint}")));
            }
            _ => words.push(argument),
        }
    }
    let command = if help { Command::Help } else { understand(words, &options, once)? };
    Ok(Parsed { json, command })
}

fn understand(
    words: Vec<String>,
    options: &[(&'static str, String)],
    once: bool,
) -> Result<Command, CommandError> {
    let mut words = words.into_iter();
    let command = words.next().ok_or_else(|| usage("a command is missing"))?;
    let allowed: &[&str] = match command.as_str() {
        "barrier" => &["--timeout", "--payload"],
        "wait" => &["--timeout"],
        "subscribe" => &["--from"],
        _ => &[],
    };
    if let Some((name, _)) = options.iter().find(|(name, _)| !allowed.contains(name)) {
        return Err(usage(format!("`{command}` takes no {name}")));
    }
    if once && command != "subscribe" {
        return Err(usage(format!("`{command}` takes no --once")));
    }
    let option =
        |wanted: &str| options.iter().rev().find(|(name, _)| *name == wanted).map(|(_, value)| value);
    let timeout = option("--timeout").map(|value| seconds(value)).transpose()?;
    let mut needed = |what: &str| words.next().ok_or_else(|| usage(format!("`{command}` needs {what}")));
    let understood = match command.as_str() {
        "barrier" => Command::Barrier {
            name: needed("the name of a barrier")?,
            parties: words.next().map_or(Ok(Parties::group()), |value| {
                value.parse().map_err(|error: PartiesError| usage(error.to_string()))
            })?,
            timeout,
            payload: option("--payload").cloned(),
        },
        "publish" => Command::Publish { topic: needed("a topic")?, value: needed("a value")? },
        "wait" => Command::Wait {
            topic: needed("a topic")?,
            count: words.next().map_or(Ok(1), |value| number(&value, "the number of values"))?,
            timeout,
        },
        "get" => Command::Get { topic: needed("a topic")? },
        "subscribe" => Command::Subscribe {
            topic: needed("a topic")?,
            from: option("--from").map_or(Ok(0), |value| {
                value.parse().map_err(|_| usage(format!("--from is an index from 0, not `{value}`")))
            })?,
            once,
        },
        "abort" => Command::Abort { name: needed("the name of a barrier")?, reason: needed("a reason")? },
        "whiteboard" => Command::Whiteboard { text: words.next() },
        "list" => Command::List,
        "help" => Command::Help,
        other => {
            let commands = ["barrier", "publish", "wait", "get", "subscribe", "abort", "whiteboard", "list"];
            let hint = text::nearest(other, commands)
                .map_or_else(String::new, |near| format!(", perhaps `{near}` was meant"));
            return Err(usage(format!("command `{other}` is unknown{hint}")));
        }
    };
    match words.next() {
        Some(extra) => Err(usage(format!("`{command}` does not take `{extra}` as well"))),
        None => Ok(understood),
    }
}

fn number(value: &str, what: &str) -> Result<u32, CommandError> {
    match value.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(usage(format!("{what} is 1 to 100,000, not `{value}`"))),
    }
}

fn seconds(value: &str) -> Result<Duration, CommandError> {
    let parsed = match value.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => humantime::parse_duration(value).ok(),
    };
    match parsed {
        Some(timeout) if timeout <= limits::WAIT_MAX => Ok(timeout),
        _ => Err(usage(format!("--timeout is seconds, or like 2m 30s, of at most 7 days, not `{value}`"))),
    }
}

fn perform(parsed: Parsed, out: &mut impl Write) -> Result<(), CommandError> {
    let json = parsed.json;
    let mut print = |human: &dyn Fn(&mut Vec<u8>) -> io::Result<()>, machine: Value| {
        let mut text = Vec::new();
        if json { writeln!(text, "{machine}") } else { human(&mut text) }
            .and_then(|()| out.write_all(&text))
            .and_then(|()| out.flush())
            .map_err(|source| CommandError::Print { source })
    };
    match parsed.command {
        Command::Help => print(&|out| out.write_all(USAGE.as_bytes()), json!({"usage": USAGE})),
        Command::Whiteboard { text } => {
            let path = env::var_os("MILLSTREAM_WHITEBOARD").map(PathBuf::from);
            let path = path.ok_or(CommandError::NoVariable { variable: "MILLSTREAM_WHITEBOARD" })?;
            match text {
                None => {
                    let content = match fs::read(&path) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                        other => other.map_err(|source| CommandError::File { path, source })?,
                    };
                    let shown = String::from_utf8_lossy(&content).into_owned();
                    print(&|out| out.write_all(&content), json!({"whiteboard": shown}))
                }
                Some(text) => {
                    write_whiteboard(path, &value_of(text)?)?;
                    print(&|_| Ok(()), json!({}))
                }
            }
        }
        command => {
            let client = SyncClient::from_environment()?;
            call(&client, command, &mut print)
        }
    }
}

fn write_whiteboard(path: PathBuf, content: &Content) -> Result<(), CommandError> {
    let mut line = content.bytes().to_vec();
    if !line.ends_with(b"\n") {
        line.push(b'\n');
    }
    let add = || {
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        let length = file.metadata()?.len().saturating_add(line.len() as u64);
        if length > limits::WHITEBOARD_BYTES_MAX {
            return Ok(Some(length));
        }
        file.write_all(&line).map(|()| None)
    };
    match add() {
        Ok(None) => Ok(()),
        Ok(Some(length)) => Err(CommandError::WhiteboardFull { length, limit: limits::WHITEBOARD_BYTES_MAX }),
        Err(source) => Err(CommandError::File { path, source }),
    }
}

/// Prints something, for people or for programs.
type Print<'a> = dyn FnMut(&dyn Fn(&mut Vec<u8>) -> io::Result<()>, Value) -> Result<(), CommandError> + 'a;

fn call(client: &SyncClient, command: Command, print: &mut Print<'_>) -> Result<(), CommandError> {
    match command {
        Command::Barrier { name, parties, timeout, payload } => {
            let payload = match payload {
                None => Bytes::new(),
                Some(payload) => Bytes::copy_from_slice(value_of(payload)?.bytes()),
            };
            let entry = Entry { parties, timeout, payload, display_name: None };
            let released = client.barrier(&name, entry)?;
            print(&|out| print_released(out, &released), released_json(&released))
        }
        Command::Publish { topic, value } => {
            let index = client.publish(&topic, value_of(value)?)?;
            print(&|out| writeln!(out, "{index}"), json!({"index": index}))
        }
        Command::Wait { topic, count, timeout } => {
            let values = client.wait(&topic, count, timeout)?;
            print(&|out| values.iter().try_for_each(|value| print_value(out, value)), values_json(&values))
        }
        Command::Get { topic } => {
            let values = client.get(&topic)?;
            print(&|out| values.iter().try_for_each(|value| print_value(out, value)), values_json(&values))
        }
        Command::Subscribe { topic, from, once: true } => {
            let (runtime, calls) = client.parts();
            let values = runtime.block_on(calls.subscribe(&topic, from).wait_batch())?;
            print(&|out| values.iter().try_for_each(|value| print_value(out, value)), values_json(&values))
        }
        Command::Subscribe { topic, from, once: false } => {
            let (runtime, calls) = client.parts();
            let mut values = calls.subscribe(&topic, from);
            loop {
                let next = runtime.block_on(async {
                    tokio::select! {
                        next = values.next() => next,
                        // As with `subscribe … | head -1`: nobody would ever notice on a quiet topic.
                        () = reader_gone() => Ok(None),
                    }
                });
                let Some(value) = next? else { return Ok(()) };
                print(&|out| print_value(out, &value), value_json(&value))?;
            }
        }
        Command::Abort { name, reason } => {
            client.abort(&name, &reason)?;
            print(&|_| Ok(()), json!({}))
        }
        Command::List => {
            let (runtime, calls) = client.parts();
            let (barriers, topics) =
                runtime.block_on(async { (calls.barriers().await, calls.topics().await) });
            let (barriers, topics) = (barriers?, topics?);
            let machine = json!({
                "barriers": barriers.iter().map(|b| json!({
                    "name": b.name, "generation": b.generation, "state": b.state, "parties": b.parties,
                    "arrivals": b.arrivals.iter().map(|a| &a.name).collect::<Vec<_>>(),
                    "missing": b.missing, "broken": b.broken,
                })).collect::<Vec<_>>(),
                "topics": topics.iter().map(|t| json!({
                    "name": t.name, "count": t.count, "size_bytes": t.size_bytes,
                })).collect::<Vec<_>>(),
            });
            let human = |out: &mut Vec<u8>| {
                for b in &barriers {
                    let entered = b.arrivals.len();
                    writeln!(
                        out,
                        "barrier {} generation {}: {}, {entered} of {}",
                        b.name, b.generation, b.state, b.parties
                    )?;
                    b.arrivals.iter().try_for_each(|a| writeln!(out, "  entered: {}", a.name))?;
                    b.missing.iter().try_for_each(|line| writeln!(out, "  missing: {line}"))?;
                    if !b.broken.is_empty() {
                        writeln!(out, "  {}", b.broken)?;
                    }
                }
                topics.iter().try_for_each(|t| {
                    writeln!(
                        out,
                        "topic {}: {}",
                        t.name,
                        text::counted(usize::try_from(t.count).unwrap_or(usize::MAX), "value")
                    )
                })
            };
            print(&human, machine)
        }
        Command::Help | Command::Whiteboard { .. } => Ok(()),
    }
}

/// Resolves when whoever reads our standard output through a pipe has closed it; never for other outputs.
async fn reader_gone() {
    // Only watched, never written to, so that the mode of the pipe, which others may share, stays as it is.
    let watch = || pipe::Sender::from_owned_fd_unchecked(io::stdout().as_fd().try_clone_to_owned()?);
    match watch() {
        Ok(pipe) if pipe.ready(Interest::ERROR).await.is_ok() => {}
        // A file cannot be watched, and is never closed by a reader.
        _ => std::future::pending().await,
    }
}

/// A value from the command line; `-` reads it. What is text stays text.
fn value_of(argument: String) -> Result<Content, CommandError> {
    if argument != "-" {
        return Ok(Content::Text(argument));
    }
    let mut bytes = Vec::new();
    // One byte more than anything here may have, so that too much is refused and not cut.
    let limit = limits::WHITEBOARD_BYTES_MAX + 1;
    io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(|source| CommandError::Read { source })?;
    Ok(match String::from_utf8(bytes) {
        Ok(text) => Content::Text(text),
        Err(error) => Content::Data(error.into_bytes().into()),
    })
}

fn print_released(out: &mut Vec<u8>, released: &Released) -> io::Result<()> {
    for party in &released.parties {
        write!(out, "{}\t{}\t", party.arrival, party.name)?;
        out.extend_from_slice(&party.payload);
        out.push(b'\n');
    }
    Ok(())
}

fn print_value(out: &mut Vec<u8>, value: &TopicValue) -> io::Result<()> {
    out.extend_from_slice(value.content.bytes());
    out.push(b'\n');
    Ok(())
}

fn released_json(released: &Released) -> Value {
    let parties = released.parties.iter().map(|party| {
        let mut object = bytes_json("payload", &party.payload);
        object["name"] = json!(party.name);
        object["arrival"] = json!(party.arrival);
        object
    });
    json!({
        "generation": released.generation,
        "arrival": released.arrival,
        "waited_seconds": released.waited.as_secs_f64(),
        "parties": parties.collect::<Vec<_>>(),
    })
}

fn values_json(values: &[TopicValue]) -> Value {
    json!({"values": values.iter().map(value_json).collect::<Vec<_>>()})
}

fn value_json(value: &TopicValue) -> Value {
    let mut object = match &value.content {
        Content::Text(text) => json!({"value": text}),
        Content::Data(data) => json!({"value_hex": hex(data)}),
    };
    object["index"] = json!(value.index);
    object["publisher"] = json!(value.publisher);
    object
}

/// Bytes as text when they are text, else in hexadecimal digits under another name.
fn bytes_json(name: &str, bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!({name: text}),
        Err(_) => json!({format!("{name}_hex"): hex(bytes)}),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
