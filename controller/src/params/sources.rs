//! Where stream definitions come from, and who has the first word: the environment, then code, then the test's own
//! parameters, then the configuration of the user, then that of the machine.
//!
//! Each source only adds names that those before it leave open, so that one variable moves a whole test to other hosts.
//! Reads the environment and files; what they say is judged in [`crate::definition`].

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use super::{Origin, Params, ReadParamsError};
use crate::definition::{self, DEFAULT_PATH, DefineStreamError, Defined, Definitions};

/// Names a YAML file with definitions at `/streams/*`, or holds definitions itself: `server=tls://foo,client=local`.
/// What has a `=` is the latter.
pub(crate) const STREAMS_VARIABLE: &str = "MILLSTREAM_STREAMS";

/// Why the streams of a test are not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DefineStreamsError {
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadParamsError),
    /// A definition is not valid.
    #[error(transparent)]
    Define(#[from] DefineStreamError),
    /// The variable is no text.
    #[error(
        "{STREAMS_VARIABLE} is not UTF-8: write the path of a YAML file, or `name=url`, several with commas"
    )]
    Variable,
}

/// What there is besides the test itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sources {
    /// The variable, when it is set.
    pub(crate) variable: Option<OsString>,
    /// Files of configuration; those in front have the first word. They need not exist.
    pub(crate) files: Vec<PathBuf>,
}

impl Sources {
    /// Those of this process.
    #[must_use]
    pub(crate) fn of_this_process() -> Self {
        let variable = env::var_os(STREAMS_VARIABLE).filter(|value| !value.is_empty());
        let home = env::var_os("HOME").map(|home| Path::new(&home).join(".config"));
        let user =
            env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute()).or(home);
        let user = user.map(|directory| directory.join("millstream/config.yaml"));
        Self {
            variable,
            files: user.into_iter().chain([PathBuf::from("/etc/millstream/config.yaml")]).collect(),
        }
    }

    /// Every definition, in the order of the sources; of the paths, those in front have the first word.
    ///
    /// # Errors
    /// When a source cannot be read, or a definition in it is not valid.
    pub(crate) fn definitions(
        &self,
        code: Vec<Defined>,
        params: &Params,
        paths: &[String],
    ) -> Result<Vec<Defined>, DefineStreamsError> {
        let mut all = Definitions::default();
        if let Some(variable) = &self.variable {
            let text = variable.to_str().ok_or(DefineStreamsError::Variable)?;
            all.add_missing(if text.contains('=') {
                definition::from_inline(text, &Origin::named(STREAMS_VARIABLE))?
            } else {
                definition::from_params(&Params::load(text)?, DEFAULT_PATH)?
            });
        }
        all.add_missing(code);
        for path in paths {
            all.add_missing(definition::from_params(params, path)?);
        }
        for file in self.files.iter().filter(|file| file.exists()) {
            all.add_missing(definition::from_params(&Params::load(file)?, DEFAULT_PATH)?);
        }
        Ok(all.in_order())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn check(variable: Option<&str>, file: &str, expected: &[&str]) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        fs::write(&path, file).unwrap();
        let text = |text: &str| text.replace("FILE", path.to_str().unwrap());
        let absent = directory.path().join("absent.yaml");
        let sources =
            Sources { variable: variable.map(|v| text(v).into()), files: vec![absent, path.clone()] };
        let code = definition::Definition::url("tls://code").named("code").unwrap();
        let params: Params = "streams: {code: local, own: local}".parse().unwrap();
        let shown = match sources.definitions(vec![code], &params, &[DEFAULT_PATH.to_owned()]) {
            Ok(all) => all.iter().map(|one| format!("{} {one}", one.name)).collect(),
            Err(error) => vec![error.to_string().replace(path.to_str().unwrap(), "FILE")],
        };
        assert_eq!(shown, expected);
    }

    #[test]
    fn each_source_adds_what_those_before_it_leave_open() {
        let file = "streams: {own: tls://file, more: tls://file}";
        check(None, file, &["code tls://code", "own local", "more tls://file"]);
        check(Some("own=tls://v,new=local"), "other: 1", &["own tls://v", "new local", "code tls://code"]);
        check(Some("FILE"), file, &["own tls://file", "more tls://file", "code tls://code"]);
    }

    #[test]
    fn a_bad_source_is_named() {
        let nowhere = ["failed to read the parameters in `/nonexistent.yaml`"];
        check(Some("/nonexistent.yaml"), "", &nowhere);
        let file = "streams: {a: /x}";
        let fault = "FILE:1:14: stream `a` has the address `/x`: write a URL, such as `tls://host:7433`";
        check(None, file, &[fault]);
    }
}
