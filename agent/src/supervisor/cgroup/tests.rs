//! Control groups that are found, inhabited, limited, killed and removed.

use std::process::{Command, Stdio};

use millstream_common::{limits::KILL_MAX, spec::ResourceLimits};

use super::*;

const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw,nsdelegate
";
const MEMBERSHIPS: &str = "4:memory:/jobs/17\n1:cpu,cpuacct:/\n0::/user.slice/a:b\n";

#[test]
fn groups_are_found_wherever_they_are_mounted() {
    let found = Hierarchies::parse(HYBRID, MEMBERSHIPS);
    assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified/user.slice/a:b")));
    assert_eq!(found.memory.as_deref(), Some(Path::new("/sys/fs/cgroup/memory/jobs/17")));
    assert_eq!(found.cpu.as_deref(), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct/")));
    assert_eq!(found.pids, None);
}

#[test]
fn a_mount_of_a_part_shows_that_part_alone() {
    let part = "1 1 0:1 /pods/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    let found = Hierarchies::parse(part, "0::/pods/x/inner\n");
    assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/inner")));
    assert_eq!(Hierarchies::parse(part, "0::/elsewhere\n").unified, None);
    assert_eq!(Hierarchies::parse("", ""), Hierarchies::default());
}

fn group(name: &str) -> Group {
    let parent = Hierarchies::find().unified.expect("a writable control group of version 2 is mounted");
    Group::create(parent.join(format!("millstream-test-{}-{name}", std::process::id()))).unwrap()
}

#[tokio::test]
#[ignore = "needs root: control groups are its own"]
async fn who_daemonised_is_listed_and_ends_with_its_group() {
    let group = group("daemon");
    let join = group.path().join("cgroup.procs");
    let script = format!("echo $$ > {}; (setsid sleep 1000 &) ; (setsid sleep 1001 &)", join.display());
    let mut shell = Command::new("sh");
    // Those that stay behind must not hold this test's own outputs.
    shell.args(["-c", &script]).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(shell.status().unwrap().success());
    assert!(!group.remove_if_empty());
    let begun = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            let mut commands: Vec<_> =
                group.processes().into_iter().map(|pid| describe(pid).command).collect();
            commands.sort();
            if commands == ["sleep 1000", "sleep 1001"] {
                break;
            }
            // They are being made: each look is another one.
            tokio::task::yield_now().await;
        }
    });
    let begun = begun.await;
    assert!(!group.wait_until_empty(Duration::from_millis(1)).await.unwrap());
    group.kill().unwrap();
    assert!(begun.is_ok(), "both daemons are listed");
    assert!(group.wait_until_empty(KILL_MAX).await.unwrap());
    assert!(group.remove_if_empty());
}

#[test]
#[ignore = "needs root: control groups are its own"]
fn groups_that_a_block_has_made_go_too() {
    let group = group("nested");
    fs::create_dir_all(group.path().join("a/b")).unwrap();
    assert!(!group.remove_if_empty());
    group.remove().unwrap();
    assert!(!group.path().exists());
}

#[test]
#[ignore = "needs root: control groups are its own"]
fn limits_are_set_entered_and_removed() {
    let hierarchies = Hierarchies::find();
    let wanted = ResourceLimits { memory_bytes: Some(64 << 20), pids_count: Some(17), cpu_millis: Some(500) };
    let name = format!("millstream-test-{}-limits", std::process::id());
    let container = group("limits");
    let mut groups = LimitGroups::create(&hierarchies, Some(&container), &name, &wanted).unwrap();
    assert_eq!(groups.joins().unwrap().len(), groups.directories.len());
    assert!(!groups.out_of_memory());
    let made = groups.directories.clone();
    groups.remove();
    container.remove().unwrap();
    assert!(made.iter().all(|directory| !directory.exists()));
}

#[test]
fn what_left_its_containment_is_found_by_its_mark() {
    let mark = format!("mark-of-{}", std::process::id());
    let mut child = Command::new("sleep").arg("1000").env("MILLSTREAM_TASK", &mark).spawn().unwrap();
    // The environment is in place once the program has begun; before, the child looks like this test.
    let found = loop {
        let found = find_marked(|found| found == mark);
        if !found.is_empty() {
            break found;
        }
    };
    assert_eq!(found[0].1.command, "sleep 1000");
    found[0].0.kill().unwrap();
    assert!(!child.wait().unwrap().success());
}
