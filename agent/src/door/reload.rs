//! New certificates and revocations reach a running agent: the kernel tells when a file changes.
//!
//! A set of files that does not fit together, such as a certificate whose key is still being written, changes nothing: what
//! worked stays, and the log says why. What a change means for those who are connected is decided by [`super::admission`].

use std::{
    collections::BTreeSet,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use millstream_common::tls::{ServerTls, TlsPaths};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tracing::{info, warn};

use super::{admission::Admission, renewing::CertificateNote};

/// Files of one set are written one after another: this long after the last change they are looked at.
const SETTLE: Duration = Duration::from_millis(300);

/// Replaces the configuration whenever a file behind it has changed, or on SIGHUP. Runs until dropped.
pub async fn keep_fresh(paths: TlsPaths, admission: Arc<Admission>, note: Arc<CertificateNote>) {
    let watch = watch_directories(&paths);
    if let Err(error) = &watch {
        warn!(%error, "files of certificates are not watched: send SIGHUP after changing them");
    }
    let Ok(mut hangup) = signal(SignalKind::hangup()) else {
        warn!("SIGHUP is not listened to");
        return;
    };
    let mut watch = watch.ok();
    loop {
        tokio::select! {
            _ = hangup.recv() => {}
            changed = next_change(&mut watch) => if let Err(error) = changed {
                warn!(%error, "files of certificates are not watched any more: send SIGHUP after changing them");
                watch = None;
                continue;
            },
        }
        sleep(SETTLE).await;
        load(&paths, &admission);
        note.look_again();
    }
}

fn load(paths: &TlsPaths, admission: &Admission) {
    match ServerTls::load(paths) {
        Ok(fresh) => {
            info!(certificate = %paths.certificate.display(), "certificates loaded");
            admission.replace(fresh);
        }
        Err(error) => warn!(%error, "new certificates cannot be used: the old ones stay"),
    }
}

/// Watches the directories and not the files: a file that is replaced by renaming is another file.
pub(super) fn watch_directories(paths: &TlsPaths) -> io::Result<AsyncFd<OwnedFd>> {
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let directory = |path: &PathBuf| path.parent().unwrap_or(Path::new("/")).to_owned();
    let files = [&paths.certificate, &paths.key, &paths.authority].into_iter();
    let directories: BTreeSet<PathBuf> = files.chain(&paths.revocations).map(directory).collect();
    for directory in directories {
        inotify::add_watch(&watch, &directory, WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO)?;
    }
    registered(watch)
}

#[expect(unsafe_code, reason = "the runtime cannot see that the descriptor stays open")]
fn registered(watch: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what is returned, which takes it out of the runtime before it closes it.
    let registered = unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) };
    registered.map_err(io::Error::from)
}

/// Waits until something has changed, and takes all that is known of it: what it was does not matter.
pub(super) async fn next_change(watch: &mut Option<AsyncFd<OwnedFd>>) -> io::Result<()> {
    let Some(watch) = watch else { return std::future::pending().await };
    loop {
        let mut ready = watch.readable().await?;
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        match ready.try_io(|watch| Ok(rustix::io::read(watch.get_ref(), &mut buffer)?.0.len())) {
            Ok(read) => return read.map(drop),
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use millstream_common::tls::Role;
    use tokio::time::timeout;

    use super::*;
    use crate::pki::{Authority, Wanted};

    #[tokio::test]
    async fn a_new_certificate_is_used_and_a_broken_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let now = millstream_common::clock::World::system().clock.wall_ns();
        let authority = Authority::init(directory.path(), "lab", now).unwrap();
        let wanted = |name: &str| Wanted {
            role: Role::Agent,
            name: name.to_owned(),
            hosts: vec!["localhost".to_owned()],
            valid: Duration::from_secs(3600),
        };
        let issued = authority.issue(&wanted("one"), now).unwrap();
        let other = authority.issue(&wanted("two"), now).unwrap();
        let paths = TlsPaths {
            certificate: issued.certificate,
            key: issued.key,
            authority: directory.path().join("ca.pem"),
            revocations: None,
        };
        let admission = Admission::new(ServerTls::load(&paths).unwrap());
        let mut watch = Some(watch_directories(&paths).unwrap());
        let before = admission.config();
        // Half of a pair: the key is still the old one.
        std::fs::rename(&other.certificate, &paths.certificate).unwrap();
        timeout(Duration::from_secs(10), next_change(&mut watch)).await.unwrap().unwrap();
        load(&paths, &admission);
        assert!(Arc::ptr_eq(&before, &admission.config()));
        std::fs::rename(&other.key, &paths.key).unwrap();
        timeout(Duration::from_secs(10), next_change(&mut watch)).await.unwrap().unwrap();
        load(&paths, &admission);
        assert!(!Arc::ptr_eq(&before, &admission.config()));
    }
}
