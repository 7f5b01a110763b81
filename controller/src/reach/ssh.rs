//! A host behind OpenSSH: `ssh://tester@bar.example.com:22`. Nothing has to be installed there.
//!
//! It is the system's own client that connects, so that its keys, agent, known hosts, jump hosts and configuration hold. Each
//! pipe is a connection of its own, which notices by itself when the other side is gone.

use std::{process::Command as Process, time::Duration};

use millstream_common::{limits, text};

use super::{
    DialError, Dialing, Place, PlaceError, Reach, Releasing, address_error,
    child::{AnswerError, Children},
    keys_error, only_options,
    program::{self, BringError},
    tcp,
};

/// The client.
const PROGRAM: &str = "ssh";
/// Every key but the address.
const OPTIONS: [&str; 8] = ["host", "user", "port", "identity", "jump", "config", "options", "agent"];
/// What holds unless the definition's `options` say otherwise: of two that are given, the client takes the first.
const USUAL: [&str; 8] = [
    // Nobody is there to answer a question.
    "BatchMode=yes",
    "ConnectTimeout=10",
    // A connection that is silent is given up as fast as everywhere else.
    "ServerAliveInterval=5",
    "ServerAliveCountMax=2",
    // What a person's configuration may ask for, and what would be in the way of a pipe or of the other one.
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
    "EscapeChar=none",
    // A connection that somebody keeps open is used; none is left behind.
    "ControlMaster=no",
];
/// With what the client ends when it is not the host that has failed.
const EXIT_CLIENT: i32 = 255;
/// What of the client's words does not go away by itself, and what to do about it.
const LASTING: [(&str, &str); 7] = [
    ("Permission denied", KEY),
    ("Too many authentication failures", KEY),
    ("Host key verification failed", KNOWN),
    ("no matching ", "the two ends have no method in common: `options` can allow an older one"),
    ("Bad configuration", "see ssh_config(5)"),
    ("unsupported option", "see ssh_config(5)"),
    ("Can't open user config file", "see `config`"),
];
const KEY: &str = "log in by hand to see why, or give `identity` a key that the host takes";
const KNOWN: &str = "log in by hand once to see and keep its key, or add it to the known hosts";

/// A host and what the client is told.
#[derive(Debug)]
pub(crate) struct Ssh {
    host: String,
    user: Option<String>,
    /// Arguments of the client.
    arguments: Vec<String>,
    /// The place as a person writes it.
    description: String,
    /// The program that is to be brought, when it was named.
    agent: Option<String>,
    children: Children,
}

impl Ssh {
    pub(crate) fn new(place: &Place) -> Result<Self, PlaceError> {
        only_options(place, &OPTIONS)?;
        let option = |key: &str| place.options.get(key).filter(|value| !value.is_empty());
        let form = "give a host, with a user or a port if need be, as in `tester@bar.example.com:22`";
        let (user, address) = match place.address.trim_end_matches('/').rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, place.address.trim_end_matches('/')),
        };
        let (host, port) = tcp::split(address).ok_or_else(|| address_error(place, form))?;
        let user = match (user, option("user")) {
            (Some(_), Some(_)) => return Err(keys_error(place, "the user is given twice: remove one")),
            (user, key) => user.map(str::to_owned).or_else(|| key.cloned()),
        };
        let port = match (port, option("port")) {
            (Some(_), Some(_)) => return Err(keys_error(place, "the port is given twice: remove one")),
            (Some(port), None) => Some(port),
            (None, key) => match key.map(|text| text.parse().ok().filter(|port: &u16| *port > 0)) {
                Some(None) => return Err(keys_error(place, "`port` is a number from 1 to 65535")),
                port => port.flatten(),
            },
        };
        // The client would take either for one of its options.
        if host.starts_with('-') || user.as_ref().is_some_and(|user| user.is_empty() || user.starts_with('-'))
        {
            return Err(address_error(place, form));
        }
        let options: Vec<&str> = option("options").map(|lines| lines.lines().collect()).unwrap_or_default();
        let mut arguments = vec!["-T".to_owned()];
        let mut add = |flag: &str, value: &str| arguments.extend([flag.to_owned(), value.to_owned()]);
        if let Some(config) = option("config") {
            add("-F", &program::in_home(config).to_string_lossy());
        }
        if let Some(port) = port {
            add("-p", &port.to_string());
        }
        if let Some(user) = &user {
            add("-l", user);
        }
        if let Some(identity) = option("identity") {
            add("-i", &program::in_home(identity).to_string_lossy());
        }
        if let Some(jump) = option("jump") {
            add("-J", jump);
        }
        options.iter().for_each(|one| add("-o", one));
        if option("identity").is_some() {
            // Hosts cut off who tries one key after another.
            add("-o", "IdentitiesOnly=yes");
        }
        USUAL.iter().for_each(|one| add("-o", one));
        // Whatever shell the user has there understands this.
        arguments.extend(["--".to_owned(), host.clone(), "exec sh".to_owned()]);
        let description = describe(place, user.as_deref(), &host, port);
        Ok(Self {
            host,
            user,
            arguments,
            description,
            agent: option("agent").cloned(),
            children: Children::default(),
        })
    }

    fn failed(&self, error: &BringError) -> DialError {
        let hint = match error {
            BringError::Spawn { .. } => Some("install the client of OpenSSH"),
            BringError::Answer(AnswerError::Ended { ended, .. }) if ended.code() == Some(EXIT_CLIENT) => {
                LASTING.iter().find(|(words, _)| ended.said.contains(words)).map(|(_, hint)| *hint)
            }
            _ => None,
        };
        let reason = match hint {
            Some(hint) => format!("{}; {hint}", error.to_string().trim_end_matches('.')),
            None => error.to_string(),
        };
        let is_final = hint.is_some() || error.is_final();
        DialError::Program { what: PROGRAM.to_owned(), reason, is_final }
    }
}

/// Everything that makes it this place, in one line.
fn describe(place: &Place, user: Option<&str>, host: &str, port: Option<u16>) -> String {
    let user = user.map(|user| format!("{user}@")).unwrap_or_default();
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let port = port.map(|port| format!(":{port}")).unwrap_or_default();
    let mut description = format!("ssh://{user}{host}{port}");
    let mut separator = '?';
    for key in ["identity", "jump", "config", "options", "agent"] {
        let Some(value) = place.options.get(key) else { continue };
        description += &format!("{separator}{key}={}", place.shown(key, value));
        separator = '&';
    }
    text::printable(description.as_bytes(), limits::TEXT_BYTES_MAX)
}

impl Reach for Ssh {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let mut client = Process::new(PROGRAM);
            client.args(&self.arguments);
            let dialled = program::dial(&self.children, client, self.agent.as_deref()).await;
            dialled.map(|pipe| Box::new(pipe) as _).map_err(|error| self.failed(&error))
        })
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn host(&self) -> String {
        self.host.clone()
    }

    fn progress(&self) -> u64 {
        self.children.progress()
    }

    fn dial_max(&self) -> Duration {
        limits::REACH_MAX
    }

    fn what_to_check(&self) -> String {
        let user = self.user.as_ref().map(|user| format!("{user}@")).unwrap_or_default();
        format!("Check that `ssh {user}{}` logs in from here, with nothing to answer", self.host)
    }

    fn release(&self) -> Releasing<'_> {
        Box::pin(async {
            self.children.end().await;
            Vec::new()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssh(address: &str, options: &[(&str, &str)]) -> Result<Ssh, String> {
        let mut place = Place::new("ssh", address);
        place.options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Ssh::new(&place).map_err(|error| error.to_string())
    }

    #[test]
    fn the_client_is_told_what_the_definition_says_before_what_is_usual() {
        let options = [
            ("identity", "/keys/one"),
            ("jump", "gate"),
            ("config", "/c"),
            ("options", "BatchMode=no\nCiphers=x\n"),
        ];
        let made = ssh("tester@bar:2222/", &options).unwrap();
        let line = made.arguments.join(" ");
        let begin = "-T -F /c -p 2222 -l tester -i /keys/one -J gate -o BatchMode=no -o Ciphers=x -o IdentitiesOnly=yes -o BatchMode=yes";
        assert!(line.starts_with(begin), "{line}");
        assert!(line.ends_with(" -- bar exec sh"), "{line}");
        assert_eq!(
            made.describe(),
            "ssh://tester@bar:2222?identity=/keys/one&jump=gate&config=/c&options=BatchMode=no,Ciphers=x"
        );
        assert_eq!(made.host(), "bar");
        assert_eq!(ssh("[::1]:22", &[("user", "a")]).unwrap().describe(), "ssh://a@[::1]:22");
    }

    #[test]
    fn what_would_be_an_option_of_the_client_is_no_host() {
        for bad in ["", "-oProxyCommand=x", "-l@host", "@host", "host:0", "a b"] {
            let error = ssh(bad, &[]).unwrap_err();
            assert!(error.contains("give a host, with a user or a port if need be"), "{bad}: {error}");
        }
        assert!(ssh("host", &[("user", "-v")]).is_err());
        assert!(ssh("a@host", &[("user", "b")]).unwrap_err().contains("the user is given twice"));
        assert!(ssh("host:1", &[("port", "2")]).unwrap_err().contains("the port is given twice"));
        assert!(ssh("host", &[("port", "x")]).unwrap_err().contains("from 1 to 65535"));
    }
}
