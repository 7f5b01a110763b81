//! Puts in place what a task needs before its first phase.
//!
//! Everything that can be refused is refused here, in one sentence. No process of the block exists yet.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use millstream_common::{
    outcome::Reason,
    spec::{FileSource, ShippedFile},
};
use tracing::warn;

use super::{Attendant, Outputs, Staged, locked, socket_path, told_in_full};
use crate::{
    entry::is_entry_variable,
    supervisor::{
        account::{self, Account},
        blobs::Owner,
        reports::Reports,
        spool::{Quota, SpoolWriter},
        task::Refusal,
        workspace::{Workspace, WorkspaceError},
    },
};

/// Files that are put in place without leaving the supervisor's thread.
const QUICK_FILES_COUNT_MAX: usize = 8;

impl Attendant {
    pub(super) async fn prepare(&mut self) -> Result<Staged, Refusal> {
        let account = self.account()?;
        let owner = account.as_ref().map(|account| Owner { uid: account.uid, gid: account.gid });
        let workspace = self.make_workspace(owner).await?;
        let exhausted = |what: &str, error: &dyn std::fmt::Display| Refusal {
            reason: Reason::HostExhausted,
            detail: format!("failed to {what}: {error}"),
        };
        let quota = Quota { head_bytes: self.spec.log_head_bytes, tail_bytes: self.spec.log_tail_bytes };
        let spool =
            SpoolWriter::create_on(Arc::clone(&self.around.host.disk), self.directory.join("spool"), quota)
                .map_err(|error| exhausted("make the log of the task", &error))?;
        *locked(&self.spool) = Some(spool);
        let with_reports = self.spec.phases.iter().any(|phase| phase.reports_phases);
        let (outputs, ends) =
            Outputs::new(with_reports).map_err(|error| exhausted("make the output pipes", &error))?;
        let tree = self.around.host.processes.tree(self.task, &self.spec.limits, ends)?;
        let socket = socket_path(&self.around.session_dir, self.task);
        let opened = self.around.relay.open(self.task, &socket, owner.map(|owner| (owner.uid, owner.gid)));
        let has_socket = match opened {
            Ok(()) => true,
            Err(error) => {
                // A block that meets nobody can run without it; one that does is told by the missing file.
                warn!(task_id = %self.task, error = %told_in_full(&error), "no sync socket for this task");
                false
            }
        };
        let environment = self.environment(&workspace, account.as_ref(), &socket);
        Ok(Staged {
            workspace,
            environment,
            account,
            tree,
            outputs,
            reports: Reports::default(),
            begun: false,
            launch: None,
            has_socket,
        })
    }

    /// Whom the block runs as, when that is not who we are.
    fn account(&self) -> Result<Option<Account>, Refusal> {
        let Some(user) = &self.spec.user else { return Ok(None) };
        let refused = |detail| Refusal { reason: Reason::UserRefused, detail };
        let account = account::find(user).map_err(|error| refused(told_in_full(&error)))?;
        let own = rustix::process::geteuid();
        if account.uid == own.as_raw() {
            return Ok(None);
        }
        if !own.is_root() {
            return Err(refused(format!(
                "the agent runs as user number {} and cannot become `{user}`: run it as root, or as that user",
                own.as_raw()
            )));
        }
        Ok(Some(account))
    }

    async fn make_workspace(&mut self, owner: Option<Owner>) -> Result<Workspace, Refusal> {
        let secret_files = std::mem::take(&mut self.secret_files);
        let is_small =
            |file: &ShippedFile| !matches!(file.source, FileSource::Blob(_)) || file.mode & 0o111 != 0;
        let all = || self.spec.files.iter().chain(&secret_files);
        let made = if all().count() <= QUICK_FILES_COUNT_MAX && all().all(is_small) {
            let blobs = &self.around.blobs;
            Workspace::create(&self.directory, &self.spec, &secret_files, blobs, self.has_spare, owner)
        } else {
            let (directory, spec, blobs) =
                (self.directory.clone(), self.spec.clone(), self.around.blobs.clone());
            let has_spare = self.has_spare;
            let making =
                move || Workspace::create(&directory, &spec, &secret_files, &blobs, has_spare, owner);
            tokio::task::spawn_blocking(making).await.unwrap_or_else(|error| {
                let source = io::Error::other(error);
                Err(WorkspaceError::Directory { path: self.directory.clone(), source })
            })
        };
        made.map_err(|error| Refusal { reason: error.reason(), detail: told_in_full(&error) })
    }

    /// The whole environment of the block. What stands later wins.
    fn environment(
        &self,
        workspace: &Workspace,
        account: Option<&Account>,
        socket: &Path,
    ) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let base = self.around.base_environment.iter().filter(|(name, _)| !is_entry_variable(name.as_ref()));
        let mut variables: BTreeMap<String, String> = base.cloned().collect();
        if let Some(account) = account {
            variables.extend([
                ("HOME".to_owned(), text(&account.home)),
                ("USER".to_owned(), account.name.clone()),
                ("LOGNAME".to_owned(), account.name.clone()),
                ("SHELL".to_owned(), account.shell.clone()),
            ]);
        }
        variables.extend(self.spec.environment.iter().map(|(name, value)| (name.clone(), value.clone())));
        variables.extend(workspace.variables().iter().cloned());
        variables.extend([
            ("MILLSTREAM_OUTPUT".to_owned(), text(workspace.output())),
            ("MILLSTREAM_WHITEBOARD".to_owned(), text(workspace.whiteboard())),
            ("MILLSTREAM_PRIVATE".to_owned(), text(workspace.private())),
            ("MILLSTREAM_SYNC".to_owned(), text(socket)),
            ("MILLSTREAM_TASK".to_owned(), self.task.to_string()),
            ("MILLSTREAM_STREAM".to_owned(), self.spec.stream.to_string()),
        ]);
        let commands = text(&self.around.session_dir.join("bin"));
        let path =
            variables.entry("PATH".to_owned()).or_insert_with(|| "/usr/local/bin:/usr/bin:/bin".to_owned());
        *path = format!("{commands}:{path}");
        variables.into_iter().collect()
    }
}
