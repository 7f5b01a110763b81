//! Tasks on an installed agent: what runs while the agent is upgraded, rolled back, restarted and killed; what blocks find on
//! a host whose agent is a service; and what is left when the package is removed.

use std::{collections::BTreeMap, path::Path};

use millstream::{Ready, Result, Streams, exec, shell};
use millstream_integration_tests::{lab::Lab, machine::Machine, package::Package, tools, wait::wait_until};

use super::{boot, bring_certificate, next_package, package};
use crate::support::{SOON, Ticker, open};

/// A lab with one machine on which the agent was installed from its package and enabled.
struct Installed {
    machine: Machine,
    lab: Lab,
}

impl Installed {
    fn new() -> Self {
        let lab = Lab::new(&["one"]);
        let machine = boot(&lab, "one");
        let installed = Self { machine, lab };
        installed.install(package());
        // It runs whatever the C library of a host is.
        assert_eq!(
            installed.machine.run("dpkg-query --show --showformat='${Depends}' millstream-agent"),
            "adduser"
        );
        let address = installed.lab.host("one").address().to_string();
        bring_certificate(&installed.machine, &installed.lab.authority().agent("one", &address));
        installed.machine.run("systemctl enable --quiet --now millstream-agent");
        installed
    }

    fn install(&self, package: &Package) {
        self.machine.bring(&package.debian, "/srv/agent.deb");
        self.machine.run("dpkg --install /srv/agent.deb 2>&1");
    }

    /// The version of the program that the agent runs, which must be the one that is installed.
    fn running_version(&self) -> String {
        let program = format!("/proc/{}/exe", self.agent());
        let told = self.machine.run(&format!("readlink {program} && {program} --version"));
        let version = told.strip_prefix("/usr/bin/millstream-agent\nmillstream-agent ");
        version
            .unwrap_or_else(|| panic!("a replaced file would be a deleted one: {told}"))
            .trim_end()
            .to_owned()
    }

    /// The agent's process, once it is ready.
    fn agent(&self) -> String {
        wait_until("the agent runs", SOON, || {
            let told = self.machine.run("systemctl show -p ActiveState -p MainPID --value millstream-agent");
            let (pid, state) = told.trim().split_once('\n')?;
            (state == "active").then(|| pid.to_owned())
        })
    }

    fn controller<T: Send>(&self, test: &str, work: impl AsyncFnOnce(&Streams) -> Result<T> + Send) -> T {
        let done = self.lab.controller().block_on(|| async {
            let streams = open(&self.lab, test)?;
            let done = work(&streams).await?;
            streams.close().await?;
            Result::<T>::Ok(done)
        });
        done.unwrap_or_else(|error| panic!("{error}\n{}", self.machine.journal()))
    }

    /// Does something while a task runs: it goes on, passes, and no line of its output is missing.
    fn beside_a_task(&self, test: &str, work: impl FnOnce(&Ticker) + Send) {
        let ticker = Ticker::with_view(&self.machine.path("/srv/ticker"), Path::new("/srv/ticker"));
        self.controller(test, async |streams| {
            let task = streams.get("one")?.run_bg(ticker.block());
            ticker.wait_for_more(5);
            work(&ticker);
            ticker.release();
            let outcome = task.outcome().await;
            assert!(outcome.passed(), "{outcome}\n{}", self.machine.journal());
            ticker.assert_complete(&outcome.stdout());
            Ok(())
        });
    }
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn tasks_go_on_while_the_package_is_upgraded_and_rolled_back() {
    let installed = Installed::new();
    installed.beside_a_task("upgrade", |ticker| {
        let mut before = installed.agent();
        let mut is_another = |version: &str| {
            before = wait_until("another agent runs", SOON, || {
                Some(installed.agent()).filter(|now| *now != before)
            });
            assert_eq!(installed.running_version(), version);
            ticker.wait_for_more(20);
        };
        let (present, next) = (package(), next_package());
        installed.install(next);
        is_another(&next.version);
        installed.install(present);
        is_another(&present.version);
        installed.machine.run("systemctl restart millstream-agent");
        is_another(&present.version);
        // All processes of the unit, as `systemctl kill` does it unless told otherwise.
        installed.machine.run("systemctl kill --signal=KILL millstream-agent");
        is_another(&present.version);
    });
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn an_agent_is_started_again_while_the_groups_of_its_blocks_hand_controllers_on() {
    let installed = Installed::new();
    installed.beside_a_task("controllers", |_ticker| {
        let before = installed.agent();
        // As a task with limits does it, with whatever controller there is: refused if a process lived in such a group.
        installed.machine.run(
            "cd /sys/fs/cgroup; controller=$(cut -d ' ' -f 1 cgroup.controllers); [ -n \"$controller\" ]\n\
             for group in . system.slice system.slice/millstream-blocks.service; do\n\
             echo \"+$controller\" >\"$group/cgroup.subtree_control\"\n\
             done",
        );
        installed.machine.run("systemctl restart millstream-agent");
        assert_ne!(installed.agent(), before);
    });
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn blocks_of_an_installed_agent_see_the_host_as_it_is() {
    let installed = Installed::new();
    let told = installed.controller("view", async |streams| {
        let stream = streams.get("one")?;
        let look = "grep -E '^(NoNewPrivs|Seccomp|CapEff):' /proc/self/status\n\
                    cat /proc/self/oom_score_adj\n\
                    echo $HOME; ulimit -Hn\n\
                    touch /tmp/seen /etc/seen /usr/seen /root/seen";
        let told = stream.run_fg(shell(look)).await?.stdout();
        // Another user passes through the directories of the agent to its own.
        let block = shell("id -un >mine; cat mine; pwd >$MILLSTREAM_WHITEBOARD").user("nobody");
        let outcome = stream.run_fg(block).await?;
        assert_eq!(outcome.stdout(), "nobody\n");
        let group = stream.run_fg(exec(["cat", "/proc/self/cgroup"])).await?.stdout();
        assert!(group.contains("/system.slice/millstream-blocks.service/"), "{group}");
        Ok(told)
    });
    let capabilities = installed.machine.run("grep ^CapEff: /proc/self/status");
    // As many files as the unit says, or as this machine can give.
    let files: u32 = installed.machine.run("ulimit -Hn").trim().parse().unwrap();
    let files = files.min(524_288);
    let expected = format!("{capabilities}NoNewPrivs:\t0\nSeccomp:\t0\n0\n/root\n{files}\n");
    assert_eq!(told, expected);
    installed.machine.run("ls /tmp/seen /etc/seen /usr/seen /root/seen");
    the_journal_tells_who_ran_what(&installed.machine);
}

/// As docs/operating.md has it: one record each for the block of the user `nobody` and for what came of it.
fn the_journal_tells_who_ran_what(machine: &Machine) {
    type Record = BTreeMap<String, serde_json::Value>;
    let find = |event: &str, field: &str| {
        let owner = "millstream://controller/view";
        let query = format!(
            "journalctl --output=json MILLSTREAM_OWNER={owner} MILLSTREAM_EVENT={event} MILLSTREAM_{field}"
        );
        let lines = wait_until("the journal has the record", SOON, || {
            Some(machine.run(&query)).filter(|lines| !lines.is_empty())
        });
        assert_eq!(lines.lines().count(), 1, "{lines}");
        serde_json::from_str::<Record>(&lines).unwrap()
    };
    let field = |record: &Record, name: &str| {
        let value = record.get(name).and_then(serde_json::Value::as_str);
        value.unwrap_or_else(|| panic!("no {name} in {record:?}")).to_owned()
    };
    let accepted = find("task.accepted", "USER=nobody");
    let ended = find("task.ended", &format!("TASK={}", field(&accepted, "MILLSTREAM_TASK")));
    for record in [&accepted, &ended] {
        for (name, value) in [
            ("SYSLOG_IDENTIFIER", "millstream-agent"),
            ("_SYSTEMD_UNIT", "millstream-agent.service"),
            ("PRIORITY", "6"),
            ("MILLSTREAM_HOST", "one"),
            ("MILLSTREAM_STREAM", "one"),
        ] {
            assert_eq!(field(record, name), value, "{record:?}");
        }
        for name in ["TIME", "CLIENT", "SESSION", "BLOCK"] {
            field(record, &format!("MILLSTREAM_{name}"));
        }
    }
    assert!(field(&accepted, "MILLSTREAM_PROGRAM").contains("sh"), "{accepted:?}");
    for (name, value) in
        [("OUTCOME", "passed"), ("REASON", "exited"), ("EXIT_CODE", "0"), ("LOGGED_BYTES", "7")]
    {
        assert_eq!(field(&ended, &format!("MILLSTREAM_{name}")), value, "{ended:?}");
    }
    assert!(field(&ended, "MILLSTREAM_START_TIME") <= field(&ended, "MILLSTREAM_END_TIME"), "{ended:?}");
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn removing_the_package_ends_what_runs_and_purging_it_leaves_only_certificates() {
    let installed = Installed::new();
    let machine = &installed.machine;
    let work = || async {
        let streams = open(&installed.lab, "removed")?;
        // It tidies up when it is asked to end. Its daemon is no child of anybody, and deaf.
        let block = shell(
            "setsid sh -c 'trap \"\" TERM; sleep 67676767' &\n\
             trap 'echo tidied >/srv/tidied; exit' TERM\n\
             sleep 78787878 & echo up; wait",
        );
        let task = streams.get("one")?.run_bg(block);
        task.ready(Ready::log("up")).await?;
        machine.run("dpkg --remove millstream-agent 2>&1");
        let left = machine.output("pgrep -l 'sleep|millstream'");
        assert_eq!(String::from_utf8_lossy(&left.stdout), "");
        assert_eq!(machine.run("cat /srv/tidied"), "tidied\n", "blocks are asked before they are killed");
        let told = streams.close().await.unwrap_err().to_string();
        assert!(told.contains("connection refused"), "{told}");
        Result::<()>::Ok(())
    };
    installed.lab.controller().block_on(work).unwrap();
    machine.run("dpkg --purge millstream-agent 2>&1");
    let left = machine
        .run("find /etc /usr /var /run -path /run/systemd -prune -o -path '*millstream*' -print | sort");
    let certificates = ["", "/agent.key", "/agent.pem", "/ca.pem", "/revoked.pem"];
    assert_eq!(left, certificates.map(|name| format!("/etc/millstream{name}\n")).concat());
    assert!(!machine.output("command -v millstream-agent").status.success());
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn on_an_installed_host_members_of_its_group_may_look() {
    let installed = Installed::new();
    let machine = &installed.machine;
    machine.run("useradd --create-home tester");
    let look =
        || machine.output("setpriv --reuid tester --regid tester --init-groups millstream-agent status");
    let refused = look();
    assert!(!refused.status.success());
    let told = tools::both(&refused);
    assert!(told.contains("permission denied; be root, or a member of the group"), "{told}");
    machine.run("usermod --append --groups millstream tester");
    let told = look();
    assert!(told.status.success(), "{}", tools::both(&told));
}
