//! A process that is no child of ours: held so that what is done later is done to it, and not to another with its number.
//!
//! By a descriptor where the kernel gives one. Older kernels know processes by numbers alone: there it is the number
//! together with the time of the start, and what is done by number is checked against that right before.

use std::{fs, io, os::fd::OwnedFd, time::Duration};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;

use super::{
    kernel::{Kernel, kernel},
    process::watch,
};

/// How often a process is looked at whose end no kernel before Linux 5.3 tells.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// A process, living or dead.
#[derive(Debug)]
pub(crate) struct Stranger {
    pid: Pid,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Descriptor(OwnedFd),
    /// When it was started, as the kernel counts.
    Start(u64),
}

impl Stranger {
    /// The process that has this number now, if there is one. What is found by the number from here on, as long as this
    /// process lives, is about this process.
    pub(crate) fn find(pid: u32) -> Option<Self> {
        Self::find_on(kernel(), pid)
    }

    fn find_on(kernel: &Kernel, pid: u32) -> Option<Self> {
        let number = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let held = if kernel.has_descriptors {
            Held::Descriptor(pidfd_open(number, PidfdFlags::empty()).ok()?)
        } else {
            Held::Start(start_ticks(pid)?)
        };
        Some(Self { pid: number, held })
    }

    /// Kills it, unless it has ended by itself.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends it a signal, unless it has ended by itself.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        let sent = match &self.held {
            Held::Descriptor(process) => pidfd_send_signal(process, signal),
            // Between the look and the signal it may end, be reaped, and its number go to another process. For that all
            // numbers must be used up in that moment, for they are given in turn; nothing that such a kernel has excludes it.
            Held::Start(_) if self.is_there() => kill_process(self.pid, signal),
            Held::Start(_) => Ok(()),
        };
        match sent {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it has ended.
    ///
    /// # Cancel safety
    /// Safe: it changes nothing.
    pub(crate) async fn gone(self) {
        match self.held {
            Held::Descriptor(process) => match watch(process, Interest::READABLE) {
                // A process that has ended makes its descriptor readable, once and for all.
                Ok(process) => drop(process.readable().await),
                Err(error) => {
                    tracing::warn!(%error, "a process cannot be watched");
                    std::future::pending().await
                }
            },
            Held::Start(_) => {
                while self.is_there() {
                    tokio::time::sleep(LOOK_PAUSE).await;
                }
            }
        }
    }

    /// Whether the number still means the process that was started then.
    fn is_there(&self) -> bool {
        match self.held {
            Held::Descriptor(_) => true,
            Held::Start(ticks) => start_ticks(self.pid.as_raw_nonzero().get().unsigned_abs()) == Some(ticks),
        }
    }
}

/// When a living process was started; none for one that has ended, though nobody has reaped it.
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may hold anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_process_is_killed_and_its_end_is_seen_with_and_without_descriptors() {
        for kernel in [kernel(), &Kernel::OLD] {
            let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
            let found = Stranger::find_on(kernel, child.id()).unwrap();
            found.kill().unwrap();
            found.gone().await;
            assert!(!child.wait().unwrap().success());
            // Its number is free: whoever is not there cannot be found.
            assert!(Stranger::find_on(kernel, child.id()).is_none());
        }
    }

    #[tokio::test]
    async fn another_process_with_its_number_is_left_alone() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let found = Stranger::find_on(&Kernel::OLD, child.id()).unwrap();
        let earlier = Stranger { held: Held::Start(start_ticks(child.id()).unwrap() - 1), ..found };
        earlier.kill().unwrap();
        earlier.gone().await;
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
