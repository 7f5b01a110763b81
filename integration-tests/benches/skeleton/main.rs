//! Speed of the skeleton, beside what the machine itself can do, in alternating rounds of one run:
//! `cargo bench -p millstream-integration-tests --bench skeleton`, as root.
//!
//! Every figure is a median over rounds, every ratio the median of the ratios within each round: absolute times of a small
//! virtual machine move with its load, ratios hardly do. Files lie in memory where there is a `/dev/shm`.

#![expect(clippy::print_stdout, reason = "a benchmark says what it measured")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]
#![expect(clippy::disallowed_methods, reason = "it measures real time")]
#![expect(clippy::cast_precision_loss, reason = "figures for people")]

mod frames;
mod limits;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use millstream::{BlockContext, BlockResult, Params, Streams, exec, shell};
use millstream_integration_tests::{agent::Agent, authority::Authority, namespace::Namespace};

/// Rounds of each comparison.
const ROUNDS: usize = 9;
/// Calls of each kind in a round of the latency comparison.
const CALLS: usize = 20;
/// Bytes of the long log.
const LOG_BYTES: u64 = 1 << 30;
/// Files of the archive, of 4 KiB each.
const FILES: usize = 10_000;

fn main() {
    millstream::enter();
    let directory = tempfile::Builder::new().prefix("b-").tempdir_in(shared_memory()).unwrap();
    let place = Namespace::create("bench");
    let authority = Authority::create(&directory.path().join("authority"));
    let agent = Agent::start(
        &place,
        std::net::Ipv4Addr::LOCALHOST,
        &authority.agent("bench", "127.0.0.1"),
        &directory.path().join("agent"),
    );
    let certificate = authority.controller("bench");
    let definitions = format!(
        "streams:\n  local: local\n  tls:\n    type: tls\n    host: 127.0.0.1\n    ca: {}\n    certificate: {}\n    key: {}\n",
        certificate.authority.display(),
        certificate.certificate.display(),
        certificate.key.display()
    );
    let path = directory.path().join("lab.yaml");
    std::fs::write(&path, definitions).unwrap();
    let url = format!(
        "tls://127.0.0.1?ca={}&certificate={}&key={}",
        certificate.authority.display(),
        certificate.certificate.display(),
        certificate.key.display()
    );
    place.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            latency(&path, directory.path()).await;
            for parties in [2, 100] {
                barriers(&path, directory.path(), &url, parties).await;
            }
            log(&path, directory.path()).await;
            archive(&path, directory.path()).await;
        });
    });
    frames::rounds();
    drop(agent);
}

fn shared_memory() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}

fn open(definitions: &Path, directory: &Path, name: &str) -> Streams {
    Streams::builder(name)
        .params(Params::load(definitions).unwrap())
        .results_dir(directory.join("results"))
        .open()
        .unwrap()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// One line: the limit, then each of ours with its ratio to the limit of the same round.
fn report(what: &str, unit: &str, limit: &[f64], ours: &[(&str, Vec<f64>)]) {
    println!("{what}: limit {:.3} {unit}", median(limit.to_vec()));
    for (name, values) in ours {
        let ratios = values.iter().zip(limit).map(|(value, limit)| value / limit).collect();
        println!("  {name}: {:.3} {unit}, {:.2} x limit", median(values.clone()), median(ratios));
    }
}

/// One trivial command, from the call to its outcome with log and results directory.
async fn latency(definitions: &Path, directory: &Path) {
    let streams = open(definitions, directory, "latency");
    let (mut limit, mut local, mut tls) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        limit.push(median((0..CALLS).map(|_| milliseconds(limits::spawn_and_wait())).collect()));
        for (name, medians) in [("local", &mut local), ("tls", &mut tls)] {
            let stream = streams.get(name).unwrap();
            // The first call of all starts the agent or dials it.
            stream.run_fg(exec(["true"])).await.unwrap();
            let mut times = Vec::new();
            for _ in 0..CALLS {
                let begin = Instant::now();
                stream.run_fg(exec(["true"])).await.unwrap();
                times.push(milliseconds(begin.elapsed()));
            }
            medians.push(median(times));
        }
    }
    streams.close().await.unwrap();
    report("run_fg(exec([\"true\"]))", "ms", &limit, &[("local", local), ("tls loopback", tls)]);
}

/// Meets `rounds` times and leaves the median of its waits on the whiteboard, in milliseconds.
#[millstream::block]
fn party(ctx: &mut BlockContext, parties: usize, rounds: usize) -> BlockResult {
    // Nobody measures while somebody is still being started.
    ctx.barrier("all-here", parties)?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        let begin = Instant::now();
        ctx.barrier("round", parties)?;
        times.push(milliseconds(begin.elapsed()));
    }
    ctx.whiteboard(median(times))?;
    Ok(())
}

/// One round of a barrier, each party a process with a connection of its own, all arriving at once.
async fn barriers(definitions: &Path, directory: &Path, url: &str, parties: usize) {
    const MEETINGS: usize = 50;
    let (mut limit, mut tls) = (Vec::new(), Vec::new());
    let streams = open(definitions, directory, &format!("barrier-{parties}"));
    for _ in 0..3 {
        limit.push(milliseconds(limits::barrier_round(parties, MEETINGS)));
        // All parties are on the one agent: each in a stream of its own.
        let tasks: Vec<_> = (0..parties)
            .map(|number| {
                let stream = streams.add(format!("party-{}-{number}", limit.len()), url).unwrap();
                stream.run_bg(party(parties, MEETINGS))
            })
            .collect();
        let mut medians = Vec::new();
        for task in tasks {
            medians.push(task.wait().await.unwrap().whiteboard().trim().parse().unwrap());
        }
        tls.push(median(medians));
    }
    streams.close().await.unwrap();
    report(&format!("barrier round of {parties} parties"), "ms", &limit, &[("relayed, tls loopback", tls)]);
}

/// A gibibyte of output, from the block to a file of the results.
async fn log(definitions: &Path, directory: &Path) {
    let streams = open(definitions, directory, "log");
    let rate = |time: Duration| LOG_BYTES as f64 / 1e6 / time.as_secs_f64();
    let (mut limit, mut local, mut tls) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..3 {
        limit.push(rate(limits::pipe_to_file(LOG_BYTES, &directory.join("copy"))));
        for (name, rates) in [("local", &mut local), ("tls", &mut tls)] {
            let stream = streams.get(name).unwrap();
            stream.run_fg(exec(["true"])).await.unwrap();
            let begin = Instant::now();
            let outcome =
                stream.run_fg(exec(["head", "-c", &LOG_BYTES.to_string(), "/dev/zero"])).await.unwrap();
            rates.push(rate(begin.elapsed()));
            assert_eq!(std::fs::metadata(outcome.stdout_path()).unwrap().len(), LOG_BYTES);
            std::fs::remove_file(outcome.stdout_path()).unwrap();
        }
    }
    streams.close().await.unwrap();
    report("log of 1 GiB", "MB/s", &limit, &[("local", local), ("tls loopback", tls)]);
}

/// Ten thousand small files: from the end of the block to the unpacked directory.
async fn archive(definitions: &Path, directory: &Path) {
    let source = directory.join("files");
    std::fs::create_dir(&source).unwrap();
    for number in 0..FILES {
        std::fs::write(source.join(format!("file-{number}")), vec![b'x'; 4096]).unwrap();
    }
    let streams = open(definitions, directory, "archive");
    let (mut limit, mut local, mut tls) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..5 {
        limit.push(milliseconds(limits::tar_to_tar(&source, &directory.join(format!("unpacked-{round}")))));
        for (name, times) in [("local", &mut local), ("tls", &mut tls)] {
            let stream = streams.get(name).unwrap();
            stream.run_fg(exec(["true"])).await.unwrap();
            let copy = shell(format!("cp {}/* \"$MILLSTREAM_OUTPUT\"", source.display()));
            let begin = Instant::now();
            let outcome = stream.run_fg(copy).await.unwrap();
            times.push(milliseconds(begin.elapsed().saturating_sub(outcome.duration)));
            assert_eq!(std::fs::read_dir(outcome.data()).unwrap().count(), FILES);
        }
    }
    streams.close().await.unwrap();
    report("archive of 10,000 files of 4 KiB", "ms", &limit, &[("local", local), ("tls loopback", tls)]);
}
