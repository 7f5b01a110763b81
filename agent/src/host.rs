//! Facts about this host: name, kernel, addresses, interpreter, load. Read once where they do not change.

use std::{
    env, fs,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use millstream_proto::v1;

/// Facts that do not change while the agent runs.
#[must_use]
pub fn facts() -> v1::HostFacts {
    let system = rustix::system::uname();
    let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    v1::HostFacts {
        hostname: text(system.nodename()),
        kernel: format!("{} {}", text(system.sysname()), text(system.release())),
        architecture: text(system.machine()),
        // An empty container has no such file.
        distribution: fs::read_to_string("/etc/os-release")
            .map_or_else(|_| "unknown distribution".to_owned(), |text| distribution(&text)),
        processors_count: processors(),
        memory_bytes: memory("MemTotal:"),
        boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
        addresses: addresses(),
    }
}

/// How busy the host is now.
#[must_use]
pub fn load() -> v1::HostLoad {
    let averages = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let averages: Vec<_> = averages.split_whitespace().take(3).collect();
    v1::HostLoad { load_average: averages.join(" "), memory_available_bytes: memory("MemAvailable:") }
}

/// The Python 3 interpreter on the `PATH` of this process.
#[must_use]
pub fn python() -> Option<PathBuf> {
    find_on_path("python3", &env::var_os("PATH")?)
}

fn find_on_path(program: &str, path: &std::ffi::OsStr) -> Option<PathBuf> {
    env::split_paths(path)
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(program))
        .find(|candidate| {
            fs::metadata(candidate)
                .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        })
}

/// Bytes that are free for this user on the file system of a directory.
#[must_use]
pub fn free_bytes(directory: &Path) -> u64 {
    rustix::fs::statvfs(directory).map_or(0, |found| found.f_bavail.saturating_mul(found.f_frsize))
}

fn distribution(os_release: &str) -> String {
    let line = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
}

fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}

fn memory(which: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(which)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Addresses of interfaces that are up, loopback last: from the kernel's own tables, because the name service of a static
/// program must not be asked.
fn addresses() -> Vec<String> {
    let mut found = ipv4(&fs::read_to_string("/proc/net/fib_trie").unwrap_or_default());
    found.extend(ipv6(&fs::read_to_string("/proc/net/if_inet6").unwrap_or_default()));
    found.sort_by_key(|address| (address.is_loopback(), address.is_ipv6()));
    found.dedup();
    found.iter().map(ToString::to_string).collect()
}

/// Lines `|-- a.b.c.d` that are followed by `/32 host LOCAL`.
fn ipv4(fib_trie: &str) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    let mut last = None;
    for line in fib_trie.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse().ok();
        } else if line.starts_with("/32 host LOCAL")
            && let Some(address) = last
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// Lines of 32 digits, number of the interface, length of the prefix, scope, flags, name. Addresses of a link alone are
/// left out: they mean nothing without their interface.
fn ipv6(if_inet6: &str) -> Vec<IpAddr> {
    const SCOPE_LINK: &str = "20";
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let digits = words.next()?;
        let scope = words.nth(2)?;
        let number = u128::from_str_radix(digits, 16).ok()?;
        (scope != SCOPE_LINK).then(|| IpAddr::from(number.to_be_bytes()))
    };
    if_inet6.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_facts() {
        let facts = facts();
        assert!(!facts.hostname.is_empty() && facts.kernel.starts_with("Linux "), "{facts:?}");
        assert!(
            facts.memory_bytes > 0 && facts.processors_count > 0 && facts.boot_id.len() == 36,
            "{facts:?}"
        );
        assert!(facts.addresses.iter().any(|address| address == "127.0.0.1"), "{:?}", facts.addresses);
        assert_eq!(load().load_average.split(' ').count(), 3);
    }

    #[test]
    fn addresses_are_read_from_the_kernels_tables() {
        let trie = "Main:\n  +-- 10.0.0.0/24 2 0 2\n     |-- 10.0.0.0\n        /24 link UNICAST\n     |-- 10.0.0.7\n        /32 host LOCAL\n";
        assert_eq!(ipv4(trie), ["10.0.0.7".parse::<IpAddr>().unwrap()]);
        let table = "00000000000000000000000000000001 01 80 10 80       lo\nfe800000000000000000000000000001 02 40 20 80     eth0\n";
        assert_eq!(ipv6(table), ["::1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn the_distribution_is_read_without_its_quotes() {
        assert_eq!(distribution("ID=debian\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
    }

    #[test]
    fn only_what_can_be_executed_is_a_program() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("python3"), "").unwrap();
        assert_eq!(find_on_path("python3", directory.path().as_os_str()), None);
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(directory.path().join("python3"), mode).unwrap();
        assert!(find_on_path("python3", directory.path().as_os_str()).is_some());
    }
}
