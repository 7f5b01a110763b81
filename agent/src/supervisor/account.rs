//! Users of this host, read from `/etc/passwd` and `/etc/group`.
//!
//! The system's own look-up loads libraries of the host into this program, which a static binary does not survive on
//! every distribution. So users that only a directory service knows are unknown here, and the error says where was looked.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// A user of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Account {
    /// Login name; the number as text when there is no name.
    pub(crate) name: String,
    /// Number of the user.
    pub(crate) uid: u32,
    /// Number of the first group.
    pub(crate) gid: u32,
    /// All groups, the first one included, in ascending order.
    pub(crate) groups: Vec<u32>,
    /// Home directory.
    pub(crate) home: PathBuf,
    /// Login shell.
    pub(crate) shell: String,
}

/// Why there is no such account.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FindAccountError {
    /// The file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No line has the name or number.
    #[error("user `{user}` does not exist on this host: `/etc/passwd` has no such line")]
    Unknown {
        /// As asked for.
        user: String,
    },
}

/// Finds a user by name or number.
///
/// # Errors
/// When a file cannot be read or nobody has that name or number.
pub(crate) fn find(user: &str) -> Result<Account, FindAccountError> {
    let read = |path: &str| {
        // Names need not be UTF-8; a line with another name must not hide the rest.
        fs::read(path)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .map_err(|source| FindAccountError::Read { path: Path::new(path).to_owned(), source })
    };
    let users = read("/etc/passwd")?;
    // A host without groups has users all the same.
    let groups = read("/etc/group").unwrap_or_default();
    find_in(user, &users, &groups).ok_or_else(|| FindAccountError::Unknown { user: user.to_owned() })
}

fn find_in(user: &str, users: &str, groups: &str) -> Option<Account> {
    // A name that consists of digits wins over the number, as everywhere.
    let mut account =
        users.lines().filter_map(parse_user).find(|account| account.name == user).or_else(|| {
            let number = user.parse::<u32>().ok()?;
            users.lines().filter_map(parse_user).find(|account| account.uid == number)
        })?;
    let also = groups.lines().filter_map(|line| parse_membership(line, &account.name));
    account.groups.extend(also);
    account.groups.sort_unstable();
    account.groups.dedup();
    Some(account)
}

fn parse_user(line: &str) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let (_password, uid, gid) = (fields.next()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let (_comment, home, shell) = (fields.next()?, fields.next()?, fields.next().unwrap_or_default());
    Some(Account {
        name: name.to_owned(),
        uid,
        gid,
        groups: vec![gid],
        home: if home.is_empty() { "/".into() } else { home.into() },
        shell: if shell.is_empty() { "/bin/sh".to_owned() } else { shell.to_owned() },
    })
}

fn parse_membership(line: &str, user: &str) -> Option<u32> {
    let mut fields = line.split(':');
    let (_name, _password, gid, members) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    members.split(',').any(|member| member.trim() == user).then(|| gid.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/bash\n# a comment\nbroken line\n\
                         tester:x:1000:100:A Tester,,,:/home/tester:/bin/zsh\n1000:x:7:7::/:\n";
    const GROUPS: &str = "users:x:100:\nwheel:x:10:root,tester\ndialout:x:20:tester\nodd\n";

    #[test]
    fn a_user_has_its_groups() {
        let tester = find_in("tester", USERS, GROUPS).unwrap();
        assert_eq!((tester.uid, tester.gid, tester.groups), (1000, 100, vec![10, 20, 100]));
        assert_eq!((tester.home.to_str(), &*tester.shell), (Some("/home/tester"), "/bin/zsh"));
    }

    #[test]
    fn a_name_wins_over_a_number_and_defaults_fill_what_is_empty() {
        let odd = find_in("1000", USERS, GROUPS).unwrap();
        assert_eq!((odd.uid, &*odd.shell, odd.home.to_str()), (7, "/bin/sh", Some("/")));
        assert_eq!(find_in("0", USERS, GROUPS).unwrap().name, "root");
        assert_eq!(find_in("nobody-here", USERS, GROUPS), None);
    }

    #[test]
    fn this_host_has_a_root() {
        assert_eq!(find("root").unwrap().uid, 0);
        let error = find("no-such-user").unwrap_err().to_string();
        assert_eq!(error, "user `no-such-user` does not exist on this host: `/etc/passwd` has no such line");
    }
}
