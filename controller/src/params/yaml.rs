//! Reads parameter trees from YAML files and texts, and says what is wrong with one by file, line and column.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use millstream_common::{
    text::{nearest, printable},
    yaml::{self, Located, Mark, YamlError},
};

use super::{Entry, Node, Origin, Params, Reference, Value};

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
    /// A tag that nobody knows.
    #[error("{origin}: the tag `{tag}` is unknown: {}", match near { Some(near) => format!("did you mean `{near}`?"), None => format!("there are {}", TAGS.join(", ")) })]
    UnknownTag {
        /// Where.
        origin: Origin,
        /// The tag.
        tag: String,
        /// The nearest there is.
        near: Option<String>,
    },
    /// A tag that says where a value is kept stands before something that says no such thing.
    #[error("{origin}: behind `{tag}` stands {}", if tag.starts_with("!env") { "the name of a variable, as in `!env LAB_PASSWORD`" } else { "the path of a file, as in `!file ~/.lab-password`" })]
    NoReference {
        /// Where.
        origin: Origin,
        /// The tag.
        tag: &'static str,
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
        Reader { source: path.display().to_string().into(), beside: path.parent(), secrets: BTreeSet::new() }
            .read(&text)
    }

    /// Reads several YAML files and puts each over those before it, as [`Params::merge`] does.
    ///
    /// # Errors
    /// When one of them cannot be read, or is not valid.
    pub fn load_all<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self, ReadParamsError> {
        paths.into_iter().try_fold(Self::empty(), |params, path| Ok(params.merge(Self::load(path)?)))
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
    Reader { source: source.into(), beside: None, secrets: BTreeSet::new() }.read(text)
}

/// What stands in front of values.
const TAGS: [&str; 5] = ["!secret", "!env", "!file", "!env-shown", "!file-shown"];

/// Reads one text.
struct Reader<'a> {
    source: Arc<str>,
    /// The directory that files are relative to.
    beside: Option<&'a Path>,
    /// Line and column of everything that is marked as secret, or stands in something that is: an alias of it, which has
    /// its place, is as secret.
    secrets: BTreeSet<(u64, u64)>,
}

fn conceal(located: &Located, inherited: bool, secrets: &mut BTreeSet<(u64, u64)>) {
    let secret = inherited || located.tag.as_deref() == Some("!secret");
    if secret {
        secrets.insert((located.mark.line, located.mark.column));
    }
    match &located.value {
        yaml::Value::Null | yaml::Value::Scalar { .. } => {}
        yaml::Value::List(nodes) => nodes.iter().for_each(|inner| conceal(inner, secret, secrets)),
        yaml::Value::Map(entries) => entries.values().for_each(|(_, inner)| conceal(inner, secret, secrets)),
    }
}

impl Reader<'_> {
    fn at(&self, mark: Mark) -> Origin {
        Origin::at(&self.source, mark.line, mark.column)
    }

    fn read(mut self, text: &str) -> Result<Params, ReadParamsError> {
        match yaml::parse(text) {
            Ok(root) => {
                conceal(&root, false, &mut self.secrets);
                Ok(Params::of(self.node(root, false)?))
            }
            Err(YamlError::Syntax { mark, reason }) => {
                Err(ReadParamsError::Yaml { origin: self.at(mark), reason })
            }
            Err(YamlError::Twice { key, first, second }) => {
                Err(ReadParamsError::Duplicate { key, first: self.at(first), second: self.at(second) })
            }
        }
    }

    fn node(&self, located: Located, mut secret: bool) -> Result<Node, ReadParamsError> {
        let origin = self.at(located.mark);
        secret |= self.secrets.contains(&(located.mark.line, located.mark.column));
        match located.tag.as_deref() {
            None => {}
            Some("!secret") => secret = true,
            Some(tag) => return self.reference(tag, &located.value, origin, secret),
        }
        let value = match located.value {
            yaml::Value::Null => Value::Null,
            yaml::Value::Scalar { text, json } => Value::Scalar { text, json },
            yaml::Value::List(nodes) => Value::List(
                nodes.into_iter().map(|inner| self.node(inner, secret)).collect::<Result<_, _>>()?,
            ),
            yaml::Value::Map(entries) => {
                let entry = |(key, (mark, inner))| {
                    Ok((key, Entry { key: self.at(mark), node: self.node(inner, secret)? }))
                };
                Value::Map(entries.into_iter().map(entry).collect::<Result<_, _>>()?)
            }
        };
        Ok(Node { value, origin, secret })
    }

    fn reference(
        &self,
        tag: &str,
        value: &yaml::Value,
        origin: Origin,
        secret: bool,
    ) -> Result<Node, ReadParamsError> {
        let Some(tag) = TAGS.into_iter().find(|known| *known == tag) else {
            let near = nearest(tag, TAGS).map(str::to_owned);
            return Err(ReadParamsError::UnknownTag { origin, tag: printable(tag.as_bytes(), 64), near });
        };
        let text = match value {
            yaml::Value::Scalar { text, .. } if !text.is_empty() => text,
            _ => return Err(ReadParamsError::NoReference { origin, tag }),
        };
        let reference = if tag.starts_with("!env") {
            Reference::Environment(text.clone())
        } else {
            Reference::file(text, self.beside)
        };
        let secret = secret || !tag.ends_with("-shown");
        Ok(Node { value: Value::Reference(reference), origin, secret })
    }
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
