//! Which agents are asked: named one by one, or in a file, which may be the one with a test's stream definitions.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use millstream_common::{
    tls,
    yaml::{self, Located, Value, YamlError},
};
use tonic::transport::Channel;

use super::{super::dial::Dialling, AskError};

/// Keys of a definition that say how an agent is dialled.
const KEYS: [(&str, &str); 5] = [
    ("authority", "authority"),
    ("ca", "authority"),
    ("certificate", "certificate"),
    ("key", "key"),
    ("server_name", "server_name"),
];

/// Why a file names no agents.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum HostsError {
    #[error("failed to read `{}`: {}", path.display(), tls::reason(source))]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{}`: {source}", path.display())]
    Yaml {
        path: PathBuf,
        #[source]
        source: YamlError,
    },
    #[error("`{}` has no `streams:` with definitions below it, and no agents line by line", path.display())]
    Empty { path: PathBuf },
}

/// One agent.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// What it is called.
    pub(super) name: String,
    agent: Result<String, String>,
    dialling: Dialling,
}

impl Target {
    pub(super) fn new(name: &str, agent: &str, dialling: &Dialling) -> Self {
        Self { name: name.to_owned(), agent: Ok(agent.to_owned()), dialling: dialling.clone() }
    }

    pub(super) async fn connect(&self) -> Result<Channel, AskError> {
        match &self.agent {
            Ok(agent) => Ok(self.dialling.connect(agent).await?),
            Err(kind) => Err(AskError::Kind { kind: kind.clone() }),
        }
    }
}

/// Reads a file: stream definitions when its name says that it is YAML, else an agent a line.
pub(super) fn read(path: &Path, dialling: &Dialling) -> Result<Vec<Target>, HostsError> {
    let failed = |source| HostsError::Read { path: path.to_owned(), source };
    let text = fs::read_to_string(path).map_err(failed)?;
    let is_yaml = path.extension().is_some_and(|end| end == "yaml" || end == "yml");
    let targets = if is_yaml {
        let root = yaml::parse(&text).map_err(|source| HostsError::Yaml { path: path.to_owned(), source })?;
        definitions(root, dialling)
    } else {
        let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
        lines.filter(|line| !line.is_empty()).map(|line| Target::new(line, line, dialling)).collect()
    };
    if targets.is_empty() { Err(HostsError::Empty { path: path.to_owned() }) } else { Ok(targets) }
}

/// What stands below `streams`, as far as it is at an agent. What a definition says besides is not for this command.
fn definitions(root: Located, dialling: &Dialling) -> Vec<Target> {
    let Value::Map(mut entries) = root.value else { return Vec::new() };
    let Some((_, (_, streams))) = entries.shift_remove_entry("streams") else { return Vec::new() };
    let Value::Map(streams) = streams.value else { return Vec::new() };
    streams.into_iter().map(|(name, (_, definition))| definition_target(name, definition, dialling)).collect()
}

fn definition_target(name: String, definition: Located, dialling: &Dialling) -> Target {
    let mut dialling = dialling.clone();
    let (kind, address) = match definition.value {
        Value::Scalar { text, .. } => {
            let (address, options) = text.split_once('?').unwrap_or((&text, ""));
            for (key, value) in options.split('&').filter_map(|option| option.split_once('=')) {
                set(&mut dialling, key, value);
            }
            let (kind, address) = address.split_once("://").unwrap_or((address, ""));
            (kind.to_owned(), address.to_owned())
        }
        Value::Map(entries) => {
            let text = |key: &str| match entries.get(key) {
                Some((_, Located { value: Value::Scalar { text, .. }, .. })) => text.clone(),
                _ => String::new(),
            };
            for (key, _) in KEYS {
                set(&mut dialling, key, &text(key));
            }
            let (host, port) = (text("host") + &text("path"), text("port"));
            (text("type"), if port.is_empty() { host } else { format!("{host}:{port}") })
        }
        Value::Null | Value::List(_) => ("local".to_owned(), String::new()),
    };
    let agent = match kind.as_str() {
        "tls" => Ok(format!("tls://{address}")),
        "unix" => Ok(address),
        _ => Err(kind),
    };
    Target { name, agent, dialling }
}

fn set(dialling: &mut Dialling, key: &str, value: &str) {
    let known = KEYS.iter().find(|(known, _)| *known == key);
    if let Some((_, meant)) = known.filter(|_| !value.is_empty()) {
        dialling.set(meant, value);
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(file: &str, text: &str, expected: &Expect) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(file);
        fs::write(&path, text).unwrap();
        let shown = match read(&path, &Dialling::default()) {
            Ok(targets) => targets
                .iter()
                .map(|target| format!("{} {:?} {}\n", target.name, target.agent, target.dialling.shown()))
                .collect(),
            Err(error) => error.to_string().replace(directory.path().to_str().unwrap(), "DIR"),
        };
        expected.assert_eq(&shown);
    }

    #[test]
    fn agents_stand_line_by_line() {
        check(
            "lab",
            "# the lab\ntls://10.0.0.1\n\n/run/a.sock # here\n",
            &expect![[r#"
            tls://10.0.0.1 Ok("tls://10.0.0.1") - - - -
            /run/a.sock Ok("/run/a.sock") - - - -
        "#]],
        );
        check(
            "lab",
            "# nobody\n",
            &expect!["`DIR/lab` has no `streams:` with definitions below it, and no agents line by line"],
        );
    }

    #[test]
    fn definitions_of_streams_name_agents_too() {
        let text = "streams:\n  a: tls://foo.example.com:7000?ca=/ca.pem\n  b: {type: tls, host: 10.0.0.7, port: 7434, key: /b.key}\n  \
                    c: unix:///run/a.sock\n  d: docker://image=fedora\n  e:\n";
        check(
            "lab.yaml",
            text,
            &expect![[r#"
            a Ok("tls://foo.example.com:7000") - - /ca.pem -
            b Ok("tls://10.0.0.7:7434") - /b.key - -
            c Ok("/run/a.sock") - - - -
            d Err("docker") - - - -
            e Err("local") - - - -
        "#]],
        );
        check(
            "lab.yaml",
            "other: 1\n",
            &expect![
                "`DIR/lab.yaml` has no `streams:` with definitions below it, and no agents line by line"
            ],
        );
    }
}
