//! What people see on a terminal, which here is a pseudo-terminal: drawn in place, after its size, and gone at the end.

use std::process::Command;

use millstream_integration_tests::{agent::Agent, tools};

/// Watches an agent on a terminal of 30 lines, makes it smaller, and interrupts. Prints what the terminal got, and the exit code.
const LOOK: &str = r#"
import fcntl, os, pty, select, struct, sys, termios
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.argv[1], [sys.argv[1], "status", "--watch", sys.argv[2]])
got = b""
def size(rows):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 40, 0, 0))
def read():
    global got
    assert select.select([terminal], [], [], 60)[0], got
    try:
        got += os.read(terminal, 65536)
    except OSError:
        return False
    return True
size(30)
while b"sessions" not in got: read()
got = got if b"more lines" not in got else b"too small: " + got
size(4)
while b"more lines: make the" not in got: read()
os.write(terminal, b"\x03")
while read(): pass
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(ascii(got.decode()))
"#;

#[test]
#[ignore = "needs python3: integration-tests/run"]
fn a_watched_status_is_drawn_in_place_fits_the_terminal_and_leaves_it_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::start_here(directory.path(), "");
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", LOOK]).arg(tools::agent_program()).arg(agent.socket());
    let printed = tools::run(&mut python);
    let (code, got) = printed.trim_end().split_once('\n').unwrap();
    assert_eq!(code, "0", "{got}");
    let got = got.trim_matches('\'');
    assert!(got.starts_with(r"\x1b[?1049h\x1b[?25l\x1b[Hagent "), "{got}");
    assert!(got.ends_with(r"\x1b[?25h\x1b[?1049l"), "{got}");
    // The line of addresses, or of the host, is longer than this terminal is wide.
    for line in got.split(r"\r\n") {
        let text = line.rsplit(r"\x1b[H").next().unwrap().split(r"\x1b").next().unwrap();
        assert!(text.len() <= 40 + r"\u2026".len(), "{line}");
    }
}
