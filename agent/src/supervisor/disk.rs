//! Whether a disk takes what is about to be written.
//!
//! Handed in beside the processes, so that a simulation can let a disk be full for a while. The real one has nothing to say
//! here: it answers when the write is made, and whoever writes takes both answers alike.

use std::{fmt, io, path::Path, sync::Arc};

use super::{
    SupervisorConfig,
    processes::{HostProcesses, Processes},
};

/// A disk, as those who write to it ask it.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Asked before so many bytes are written into a file of a task: its specification, its mark, its spool, its record.
    ///
    /// # Errors
    /// What the write would say.
    fn admit(&self, file: &Path, bytes: usize) -> io::Result<()>;
}

/// The disk of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostDisk;

impl Disk for HostDisk {
    fn admit(&self, _file: &Path, _bytes: usize) -> io::Result<()> {
        Ok(())
    }
}

/// What a supervisor runs on.
#[derive(Debug, Clone)]
pub struct Host {
    /// Where processes come from.
    pub processes: Arc<dyn Processes>,
    /// Where files go.
    pub disk: Arc<dyn Disk>,
}

impl Host {
    /// This host, for a supervisor with this configuration.
    ///
    /// # Errors
    /// When `/dev/null` cannot be opened.
    pub fn real(config: &SupervisorConfig) -> io::Result<Self> {
        Ok(Self { processes: Arc::new(HostProcesses::new(config)?), disk: Arc::new(HostDisk) })
    }
}
