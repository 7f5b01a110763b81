//! What the machine itself can do: the same work with nothing of ours in it.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::event::epoll;

/// Starts `true` and waits for its end.
pub(crate) fn spawn_and_wait() -> Duration {
    let begin = Instant::now();
    assert!(Command::new("true").status().unwrap().success());
    begin.elapsed()
}

/// Reads the output of a child from a pipe and writes it to a file.
pub(crate) fn pipe_to_file(bytes: u64, path: &Path) -> Duration {
    let begin = Instant::now();
    let mut command = Command::new("head");
    let mut child =
        command.args(["-c", &bytes.to_string(), "/dev/zero"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stdout.take().unwrap();
    let mut file = File::create(path).unwrap();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match pipe.read(&mut buffer).unwrap() {
            0 => break,
            length => file.write_all(&buffer[..length]).unwrap(),
        }
    }
    assert!(child.wait().unwrap().success());
    let elapsed = begin.elapsed();
    std::fs::remove_file(path).unwrap();
    elapsed
}

/// Packs a directory with tar into a tar that unpacks it.
pub(crate) fn tar_to_tar(source: &Path, target: &Path) -> Duration {
    std::fs::create_dir(target).unwrap();
    let begin = Instant::now();
    let mut pack = Command::new("tar")
        .arg("-C")
        .arg(source)
        .args(["-cf", "-", "."])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let unpack = Command::new("tar")
        .arg("-C")
        .arg(target)
        .args(["-xf", "-"])
        .stdin(pack.stdout.take().unwrap())
        .status();
    assert!(unpack.unwrap().success() && pack.wait().unwrap().success());
    begin.elapsed()
}

/// Median of a round of a barrier on one epoll loop, a TCP connection a party.
pub(crate) fn barrier_round(parties: usize, rounds: usize) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let host = thread::spawn(move || host_barrier(&listener, parties));
    let clients: Vec<_> = (0..parties)
        .map(|_| {
            thread::spawn(move || {
                let mut connection = TcpStream::connect(address).unwrap();
                connection.set_nodelay(true).unwrap();
                let mut meet = || {
                    let begin = Instant::now();
                    connection.write_all(&[1]).unwrap();
                    connection.read_exact(&mut [0]).unwrap();
                    begin.elapsed()
                };
                // Nobody measures while somebody is still being started.
                meet();
                let mut times: Vec<Duration> = (0..rounds).map(|_| meet()).collect();
                times.sort();
                times[times.len() / 2]
            })
        })
        .collect();
    let mut medians: Vec<Duration> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    host.join().unwrap();
    medians.sort();
    medians[medians.len() / 2]
}

/// Lets all go when all have come, again and again, until the first one leaves.
fn host_barrier(listener: &TcpListener, parties: usize) {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let mut connections: Vec<TcpStream> = (0..parties).map(|_| listener.accept().unwrap().0).collect();
    for (index, connection) in connections.iter().enumerate() {
        connection.set_nodelay(true).unwrap();
        epoll::add(&poll, connection, epoll::EventData::new_u64(index as u64), epoll::EventFlags::IN)
            .unwrap();
    }
    let mut events = Vec::with_capacity(parties);
    let mut entered = 0;
    loop {
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None).unwrap();
        for event in events.drain(..) {
            let index = usize::try_from(event.data.u64()).unwrap();
            if connections[index].read(&mut [0]).unwrap_or(0) == 0 {
                return;
            }
            entered += 1;
        }
        if entered == parties {
            entered = 0;
            for connection in &mut connections {
                connection.write_all(&[1]).unwrap();
            }
        }
    }
}
