//! Reads parameter trees from YAML: the one module that knows the YAML library.
//!
//! Keys keep their order and their spelling: the key 1 is the text "1". Every value keeps its line and column. What YAML
//! lets pass silently, a key given twice, is refused here with both places.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use indexmap::{IndexMap, map};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_yaml::{DuplicateKeyPolicy, Location, Spanned};

use super::{Entry, Node, Origin, Params, Value};

/// Bytes of one file of parameters.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Mappings and lists inside each other. A build without optimisation takes 40 KiB of stack for each, and a thread may
/// have 2 MiB.
const DEPTH_MAX: usize = 24;

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
    let options = serde_yaml::options! {
        // Repeated keys are refused below, with both places.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        budget: serde_yaml::budget! { max_depth: DEPTH_MAX },
    };
    let root: Spanned<Raw> = serde_yaml::from_str_with_options(text, options).map_err(|error| {
        let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
        let reason = match error.without_snippet() {
            serde_yaml::Error::Budget { .. } => {
                format!("it is nested deeper than {DEPTH_MAX} levels, or repeats itself without end")
            }
            other => other.to_string().split(" at line ").next().unwrap_or_default().to_owned(),
        };
        ReadParamsError::Yaml { origin: Origin::at(&source, line, column), reason }
    })?;
    Ok(Params::of(node(&source, text, root)?))
}

/// What the YAML library understands.
enum Raw {
    Null,
    Scalar(serde_json::Value),
    List(Vec<Spanned<Self>>),
    Map(Vec<(Spanned<String>, Spanned<Self>)>),
}

fn node(source: &Arc<str>, text: &str, raw: Spanned<Raw>) -> Result<Node, ReadParamsError> {
    let place = |spanned: &Location| Origin::at(source, spanned.line(), spanned.column());
    let value = match raw.value {
        Raw::Null => Value::Null,
        Raw::Scalar(json) => {
            let text = match &json {
                serde_json::Value::String(text) => text.clone(),
                other => written(text, &raw.defined).unwrap_or_else(|| other.to_string()),
            };
            Value::Scalar { text, json }
        }
        Raw::List(nodes) => {
            Value::List(nodes.into_iter().map(|raw| node(source, text, raw)).collect::<Result<_, _>>()?)
        }
        Raw::Map(pairs) => {
            let mut entries = IndexMap::with_capacity(pairs.len());
            for (key, raw) in pairs {
                let origin = place(&key.defined);
                match entries.entry(key.value) {
                    map::Entry::Vacant(vacant) => {
                        vacant.insert(Entry { key: origin, node: node(source, text, raw)? });
                    }
                    map::Entry::Occupied(there) => {
                        let (key, first) = (there.key().clone(), there.get().key.clone());
                        return Err(ReadParamsError::Duplicate { key, first, second: origin });
                    }
                }
            }
            Value::Map(entries)
        }
    };
    Ok(Node { value, origin: place(&raw.defined) })
}

/// A scalar as it stands in the text.
fn written(text: &str, location: &Location) -> Option<String> {
    let span = location.span();
    let start = usize::try_from(span.byte_offset()?).ok()?;
    let end = start.checked_add(usize::try_from(span.byte_len()?).ok()?)?;
    text.get(start..end).map(|scalar| scalar.trim().to_owned())
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping, a list or a scalar")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Scalar(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = access.next_element()? {
            nodes.push(node);
        }
        Ok(Raw::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = access.next_entry()? {
            pairs.push(pair);
        }
        Ok(Raw::Map(pairs))
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
