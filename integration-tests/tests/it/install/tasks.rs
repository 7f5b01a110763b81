//! Tasks on an installed agent: what runs while the agent is upgraded, rolled back, restarted and killed; what blocks find on
//! a host whose agent is a service; and what is left when the package is removed.

use std::path::Path;

use millstream::{Ready, Result, Streams, exec, shell};
use millstream_integration_tests::{lab::Lab, machine::Machine, tools, wait::wait_until};

use super::{boot, bring_certificate, package};
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
        installed.install("0.1.0");
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

    fn install(&self, version: &str) {
        let place = format!("/srv/{version}.deb");
        if !self.machine.path(&place).exists() {
            self.machine.bring(&package(version).debian, &place);
        }
        self.machine.run(&format!("dpkg --install {place} 2>&1"));
        let installed = self.machine.run("dpkg-query --show --showformat='${Version}' millstream-agent");
        assert_eq!(installed, version);
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
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn tasks_go_on_while_the_package_is_upgraded_and_rolled_back() {
    let installed = Installed::new();
    let ticker = Ticker::with_view(&installed.machine.path("/srv/ticker"), Path::new("/srv/ticker"));
    installed.controller("upgrade", async |streams| {
        let task = streams.get("one")?.run_bg(ticker.block());
        ticker.wait_for_more(5);
        let mut before = installed.agent();
        let mut is_another = || {
            before = wait_until("another agent runs", SOON, || {
                Some(installed.agent()).filter(|now| *now != before)
            });
            ticker.wait_for_more(20);
        };
        installed.install("0.2.0");
        is_another();
        installed.install("0.1.0");
        is_another();
        installed.machine.run("systemctl restart millstream-agent");
        is_another();
        // All processes of the unit, as `systemctl kill` does it unless told otherwise.
        installed.machine.run("systemctl kill --signal=KILL millstream-agent");
        is_another();
        ticker.release();
        let outcome = task.outcome().await;
        assert!(outcome.passed(), "{outcome}\n{}", installed.machine.journal());
        ticker.assert_complete(&outcome.stdout());
        Ok(())
    });
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn an_agent_is_started_again_while_the_groups_of_its_blocks_hand_controllers_on() {
    let installed = Installed::new();
    let ticker = Ticker::with_view(&installed.machine.path("/srv/ticker"), Path::new("/srv/ticker"));
    installed.controller("controllers", async |streams| {
        let task = streams.get("one")?.run_bg(ticker.block());
        ticker.wait_for_more(5);
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
        ticker.release();
        let outcome = task.outcome().await;
        assert!(outcome.passed(), "{outcome}\n{}", installed.machine.journal());
        ticker.assert_complete(&outcome.stdout());
        Ok(())
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
}

#[test]
#[ignore = "needs root, systemd, openssh and cargo-deb: integration-tests/run"]
fn removing_the_package_ends_what_runs_and_purging_it_leaves_only_certificates() {
    let installed = Installed::new();
    let machine = &installed.machine;
    let work = || async {
        let streams = open(&installed.lab, "removed")?;
        // A daemon too, which is no child of anybody.
        let block = shell("(setsid sleep 67676767 &)\necho up\nexec sleep 78787878");
        let task = streams.get("one")?.run_bg(block);
        task.ready(Ready::log("up")).await?;
        machine.run("dpkg --remove millstream-agent 2>&1");
        let left = machine.output("pgrep -l 'sleep|millstream'");
        assert_eq!(String::from_utf8_lossy(&left.stdout), "");
        let told = streams.close().await.unwrap_err().to_string();
        assert!(told.contains("connection refused"), "{told}");
        Result::<()>::Ok(())
    };
    installed.lab.controller().block_on(work).unwrap();
    machine.run("dpkg --purge millstream-agent 2>&1");
    let left =
        machine.run("find /etc/millstream /var/lib/millstream /run/millstream -type f 2>/dev/null || true");
    let mut left: Vec<_> = left.lines().collect();
    left.sort_unstable();
    assert_eq!(
        left,
        ["agent.key", "agent.pem", "ca.pem", "revoked.pem"].map(|name| format!("/etc/millstream/{name}"))
    );
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
