//! Reads parameter trees from YAML files and texts, and says what is wrong with one by file, line and column.

use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use millstream_common::yaml::{self, Located, Mark, YamlError};

use super::{Entry, Node, Origin, Params, Value};

/// Bytes of one file of parameters.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Why there is no parameter tree.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadParamsError {
    /// The file cannot be read.
    #[error("failed to read the parameters in `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is too large.
    #[error("the parameters in `{}` have {length} bytes: at most {FILE_BYTES_MAX} are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: u64,
    },
    /// The text is no YAML.
    #[error("{origin}: {reason}")]
    Yaml {
        /// Where.
        origin: Origin,
        /// What is wrong.
        reason: String,
    },
    /// A key stands twice in one mapping.
    #[error("{second}: key `{key}` is given twice, first at {first}: remove one")]
    Duplicate {
        /// The key.
        key: String,
        /// Its first place.
        first: Origin,
        /// Its second place.
        second: Origin,
    },
}

impl Params {
    /// Reads a YAML file.
    ///
    /// # Errors
    /// When it cannot be read, or is not valid: with file, line and column.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ReadParamsError> {
        let path = path.as_ref();
        let failed = |source| ReadParamsError::File { path: path.to_owned(), source };
        let length = fs::metadata(path).map_err(failed)?.len();
        if length > FILE_BYTES_MAX {
            return Err(ReadParamsError::TooLarge { path: path.to_owned(), length });
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        parse(&path.display().to_string(), &text)
    }
}

impl FromStr for Params {
    type Err = ReadParamsError;

    fn from_str(text: &str) -> Result<Self, ReadParamsError> {
        parse("parameters", text)
    }
}

/// Reads YAML text; `source` is what it is called in errors.
pub(crate) fn parse(source: &str, text: &str) -> Result<Params, ReadParamsError> {
    let source: Arc<str> = source.into();
    let at = |mark: Mark| Origin::at(&source, mark.line, mark.column);
    match yaml::parse(text) {
        Ok(root) => Ok(Params::of(node(&source, root))),
        Err(YamlError::Syntax { mark, reason }) => Err(ReadParamsError::Yaml { origin: at(mark), reason }),
        Err(YamlError::Twice { key, first, second }) => {
            Err(ReadParamsError::Duplicate { key, first: at(first), second: at(second) })
        }
    }
}

fn node(source: &Arc<str>, located: Located) -> Node {
    let at = |mark: Mark| Origin::at(source, mark.line, mark.column);
    let value = match located.value {
        yaml::Value::Null => Value::Null,
        yaml::Value::Scalar { text, json } => Value::Scalar { text, json },
        yaml::Value::List(nodes) => Value::List(nodes.into_iter().map(|inner| node(source, inner)).collect()),
        yaml::Value::Map(entries) => {
            let entry = |(key, (mark, inner))| (key, Entry { key: at(mark), node: node(source, inner) });
            Value::Map(entries.into_iter().map(entry).collect())
        }
    };
    Node { value, origin: at(located.mark) }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(text: &str, expected: Expect) {
        expected.assert_eq(&match parse("lab.yaml", text) {
            Ok(params) => serde_json::to_string(&params).unwrap(),
            Err(error) => error.to_string(),
        });
    }

    #[test]
    fn scalars_keep_their_spelling_and_keys_their_order() {
        check("b: 010\na: [yes, 'no', ~]\n1: x\n", expect![[r#"{"1":"x","a":[true,"no",null],"b":"010"}"#]]);
        check("", expect!["null"]);
    }

    #[test]
    fn a_key_given_twice_names_both_places_also_when_it_is_spelled_differently() {
        check(
            "a: 1\nb:\n  c: 1\n  c: 2\n",
            expect!["lab.yaml:4:3: key `c` is given twice, first at lab.yaml:3:3: remove one"],
        );
        check(
            "1: a\n'1': b\n",
            expect!["lab.yaml:2:1: key `1` is given twice, first at lab.yaml:1:1: remove one"],
        );
    }

    #[test]
    fn what_is_no_yaml_is_told_with_its_place() {
        check("a: [1\n", expect!["lab.yaml:1:4: unclosed bracket '['"]);
        check("a: b: c\n", expect!["lab.yaml:1:5: mapping values are not allowed in this context"]);
        check("x: *nope\n", expect!["lab.yaml:1:4: alias references unknown anchor"]);
        check("? [a]\n: b\n", expect!["lab.yaml:1:3: expected string scalar"]);
    }

    #[test]
    fn a_tree_without_end_is_refused() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        check(
            &deep,
            expect!["lab.yaml:1:25: it is nested deeper than 24 levels, or repeats itself without end"],
        );
        let bomb = "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e]\ng: [*f, *f, *f, *f, *f, *f, *f, *f, *f]\n";
        assert!(parse("lab.yaml", bomb).is_err());
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = Params::load("/nonexistent/lab.yaml").unwrap_err();
        assert_eq!(error.to_string(), "failed to read the parameters in `/nonexistent/lab.yaml`");
    }
}
