//! Values that are kept elsewhere, in a file or a variable, and looked up when they are asked for.
//!
//! A reference is looked up each time, so that a renewed credential is used; nothing is looked up before somebody asks.

use std::{
    env, fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
};

use millstream_common::tls;

use super::Origin;

/// Bytes of a value that is kept elsewhere: a credential is a line or a page.
const VALUE_BYTES_MAX: u64 = 1024 * 1024;

/// Where a value is kept: `!env NAME` or `!file PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reference {
    /// In a variable of this process.
    Environment(String),
    /// In a file of this host, without the line's end behind it. `~/` is the home directory.
    File(PathBuf),
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment(name) => write!(f, "!env {name}"),
            Self::File(path) => write!(f, "!file {}", path.display()),
        }
    }
}

/// Why a value that is kept elsewhere cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The variable is not set.
    #[error(
        "{origin}: the variable `{name}` is not set: set it for this program, or name another with `!env`"
    )]
    Unset {
        /// Where it is asked for.
        origin: Origin,
        /// The variable.
        name: String,
    },
    /// The file cannot be read.
    #[error("{origin}: failed to read `{}`: {}; write the file, or name another with `!file`", path.display(), tls::reason(source))]
    File {
        /// Where it is asked for.
        origin: Origin,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What is there is no text.
    #[error("{origin}: what `{reference}` leads to is not UTF-8: a value is a text")]
    NoText {
        /// Where it is asked for.
        origin: Origin,
        /// The reference.
        reference: Reference,
    },
    /// The file is too large.
    #[error("{origin}: `{}` has more than {VALUE_BYTES_MAX} bytes, which no value has", path.display())]
    TooLarge {
        /// Where it is asked for.
        origin: Origin,
        /// The file.
        path: PathBuf,
    },
}

impl Reference {
    /// A file as it is written in another one, whose directory relative paths begin at.
    pub(super) fn file(path: &str, beside: Option<&Path>) -> Self {
        let is_of_home = path.starts_with("~/");
        Self::File(match beside {
            Some(directory) if !is_of_home => directory.join(path),
            _ => PathBuf::from(path),
        })
    }

    /// Looks the value up.
    ///
    /// # Errors
    /// When it is not there, or is no text: with the place `origin`, where it is asked for.
    pub(crate) fn look_up(&self, origin: &Origin) -> Result<String, ReferenceError> {
        let no_text = || ReferenceError::NoText { origin: origin.clone(), reference: self.clone() };
        match self {
            Self::Environment(name) => match env::var_os(name) {
                Some(value) => value.into_string().map_err(|_| no_text()),
                None => Err(ReferenceError::Unset { origin: origin.clone(), name: name.clone() }),
            },
            Self::File(path) => {
                let path = home(path);
                let failed =
                    |source| ReferenceError::File { origin: origin.clone(), path: path.clone(), source };
                let mut bytes = Vec::new();
                let file = fs::File::open(&path).map_err(failed)?;
                file.take(VALUE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
                if bytes.len() as u64 > VALUE_BYTES_MAX {
                    return Err(ReferenceError::TooLarge { origin: origin.clone(), path });
                }
                let mut text = String::from_utf8(bytes).map_err(|_| no_text())?;
                // The end of the line that every editor leaves is no part of the value.
                if text.ends_with('\n') {
                    text.pop();
                    if text.ends_with('\r') {
                        text.pop();
                    }
                }
                Ok(text)
            }
        }
    }
}

fn home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), env::var_os("HOME")) {
        (Ok(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up(reference: &Reference) -> String {
        match reference.look_up(&Origin::named("lab.yaml")) {
            Ok(value) => value,
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_file_gives_its_text_without_the_last_line_end() {
        let directory = tempfile::tempdir().unwrap();
        for (content, value) in [("a\n", "a"), ("a\r\n", "a"), ("a\nb\n\n", "a\nb\n"), ("", "")] {
            fs::write(directory.path().join("x"), content).unwrap();
            assert_eq!(look_up(&Reference::file("x", Some(directory.path()))), value);
        }
    }

    #[test]
    fn what_cannot_be_had_is_told_with_its_place_and_the_next_step() {
        assert_eq!(
            look_up(&Reference::File("/nonexistent/x".into())),
            "lab.yaml: failed to read `/nonexistent/x`: no such file or directory; write the file, or name another with `!file`"
        );
        assert_eq!(
            look_up(&Reference::Environment("MILLSTREAM_NOT_SET".to_owned())),
            "lab.yaml: the variable `MILLSTREAM_NOT_SET` is not set: set it for this program, or name another with `!env`"
        );
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        fs::write(&path, [0xff]).unwrap();
        let error = look_up(&Reference::File(path.clone()));
        assert_eq!(
            error,
            format!("lab.yaml: what `!file {}` leads to is not UTF-8: a value is a text", path.display())
        );
        fs::File::create(&path).unwrap().set_len(VALUE_BYTES_MAX + 1).unwrap();
        let error = look_up(&Reference::File(path));
        assert!(error.ends_with("has more than 1048576 bytes, which no value has"), "{error}");
    }

    #[test]
    fn a_tilde_is_the_home_directory() {
        let expected =
            env::var_os("HOME").map_or_else(|| PathBuf::from("~/x"), |home| PathBuf::from(home).join("x"));
        assert_eq!(home(Path::new("~/x")), expected);
        assert_eq!(Reference::file("~/x", Some(Path::new("/lab"))), Reference::File("~/x".into()));
    }
}
