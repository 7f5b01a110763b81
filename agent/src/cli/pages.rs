//! What a package has besides the program, made by the program itself: manual pages and completions.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::CommandLine;

/// Options of `completions`.
#[derive(Debug, Args)]
pub(super) struct Completions {
    /// For which shell.
    shell: Shell,
}

impl Completions {
    /// What the shell is to read.
    pub(super) fn text(&self) -> String {
        let mut command = CommandLine::command();
        let name = command.get_name().to_owned();
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut command, name, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// Options of `manual`.
#[derive(Debug, Args)]
pub(super) struct Manual {
    /// Where the pages go.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
#[error("failed to write `{}`: {}", path.display(), millstream_common::tls::reason(source))]
pub(super) struct WritePageError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> WritePageError {
    move |source| WritePageError { path: path.to_owned(), source }
}

impl Manual {
    /// Writes a page for each command and returns their paths.
    ///
    /// # Errors
    /// When one cannot be written.
    pub(super) fn write(&self) -> Result<Vec<PathBuf>, WritePageError> {
        fs::create_dir_all(&self.dir).map_err(failed(&self.dir))?;
        let mut command = CommandLine::command().disable_help_subcommand(true);
        // Names of commands and options of those above them are known to those below only then.
        command.build();
        let mut written = Vec::new();
        write_pages(&self.dir, &command, &mut written)?;
        Ok(written)
    }
}

fn write_pages(
    directory: &Path,
    command: &clap::Command,
    written: &mut Vec<PathBuf>,
) -> Result<(), WritePageError> {
    let page = clap_mangen::Man::new(command.clone());
    let path = directory.join(page.get_filename());
    let mut text = Vec::new();
    page.render(&mut text).and_then(|()| fs::write(&path, text)).map_err(failed(&path))?;
    written.push(path);
    command
        .get_subcommands()
        .filter(|below| !below.is_hide_set())
        .try_for_each(|below| write_pages(directory, below, written))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_pages_name_their_options() {
        let directory = tempfile::tempdir().unwrap();
        let written = Manual { dir: directory.path().join("man") }.write().unwrap();
        let names: Vec<_> =
            written.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
        for wanted in ["millstream-agent.1", "millstream-agent-serve.1", "millstream-agent-pki-issue.1"] {
            assert!(names.iter().any(|name| name == wanted), "{names:?}");
        }
        let issue = written.iter().find(|path| path.ends_with("millstream-agent-pki-issue.1")).unwrap();
        let text = fs::read_to_string(issue).unwrap();
        assert!(text.contains("\\-\\-address") && text.contains("Make a certificate with a role"), "{text}");
    }

    #[test]
    fn a_page_that_cannot_be_written_is_named() {
        let refused = Manual { dir: "/dev/null/man".into() }.write().unwrap_err();
        assert_eq!(refused.to_string(), "failed to write `/dev/null/man`: not a directory");
    }

    #[test]
    fn shells_complete_commands_and_options() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let text = Completions { shell }.text();
            assert!(text.contains("status") && text.contains("address"), "{shell}: {text}");
        }
    }
}
