//! Rust functions as blocks: what `#[millstream::block]` registers, and what a call of one carries.
//!
//! A function is known by a key that is the same in every process of this program; nothing here runs one.

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::{Block, Kind};
use crate::context::BlockContext;

/// How a block of Rust ends: `?` takes any error.
pub type BlockResult = Result<(), BlockFailure>;

/// Why a block of Rust has failed: any error, or a text.
///
/// It is printed with all its causes on the block's standard error, and the block ends with exit code 1.
pub struct BlockFailure(Box<dyn std::error::Error + Send + Sync>);

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for BlockFailure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl fmt::Debug for BlockFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for BlockFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// What a function with `#[millstream::block]` may return: nothing, or a result whose error is any error.
#[diagnostic::on_unimplemented(
    message = "a block returns `millstream::BlockResult`, another `Result<(), E>` of an error, or nothing",
    label = "not a block's result"
)]
pub trait BlockReturn {
    /// As a block's result.
    ///
    /// # Errors
    /// When the block has failed.
    fn into_result(self) -> BlockResult;
}

impl BlockReturn for () {
    fn into_result(self) -> BlockResult {
        Ok(())
    }
}

impl BlockReturn for BlockResult {
    fn into_result(self) -> BlockResult {
        self
    }
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> BlockReturn for Result<(), E> {
    fn into_result(self) -> BlockResult {
        self.map_err(BlockFailure::from)
    }
}

/// Every registered function of this program.
#[linkme::distributed_slice]
pub static FUNCTIONS: [Function];

/// A registered function.
pub struct Function {
    /// Module, name, line and column: the same in every process of this program, and in no other function.
    pub key: &'static str,
    /// Name of the function.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&mut BlockContext, Arguments) -> BlockResult,
}

impl Function {
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// The function with a key.
    pub(crate) fn find(key: &str) -> Option<&'static Self> {
        FUNCTIONS.iter().find(|function| function.key == key)
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key)
    }
}

/// A function and the arguments that it is to be called with.
#[derive(Debug, Clone)]
pub struct Call {
    function: &'static Function,
    /// Each argument as JSON; or the first that cannot be written, and why.
    arguments: Result<Vec<Box<RawValue>>, (&'static str, String)>,
}

impl Call {
    /// A call without arguments yet.
    #[must_use]
    pub fn new(function: &'static Function) -> Self {
        Self { function, arguments: Ok(Vec::new()) }
    }

    /// Adds the next argument.
    #[must_use]
    pub fn argument(mut self, name: &'static str, value: &impl Serialize) -> Self {
        if let Ok(arguments) = &mut self.arguments {
            match serde_json::value::to_raw_value(value) {
                Ok(value) => arguments.push(value),
                Err(error) => self.arguments = Err((name, error.to_string())),
            }
        }
        self
    }

    /// The block that makes the call.
    pub fn into_block(self) -> Block {
        Block::new(Kind::Function(self))
    }

    pub(crate) fn function(&self) -> &'static Function {
        self.function
    }

    /// The arguments as one JSON text.
    pub(crate) fn arguments(&self) -> Result<String, (&'static str, String)> {
        let arguments = self.arguments.as_ref().map_err(Clone::clone)?;
        serde_json::to_string(arguments).map_err(|error| ("all arguments", error.to_string()))
    }
}

/// The arguments of a call as they arrived.
#[derive(Debug)]
pub struct Arguments(std::vec::IntoIter<Box<RawValue>>);

impl Arguments {
    /// Reads what [`Call::arguments`] wrote.
    pub(crate) fn parse(text: &str) -> Result<Self, serde_json::Error> {
        Ok(Self(serde_json::from_str::<Vec<Box<RawValue>>>(text)?.into_iter()))
    }

    /// The next argument.
    ///
    /// # Errors
    /// When what was sent cannot be read as its type.
    pub fn next<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T, ArgumentError> {
        let value = self.0.next().ok_or(ArgumentError::Missing { name })?;
        serde_json::from_str(value.get()).map_err(|source| ArgumentError::Unreadable { name, source })
    }
}

/// Why an argument of a block did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentError {
    /// It was not sent.
    #[error("argument `{name}` was not sent: the host runs another version of this program")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// It was written as JSON but cannot be read back.
    #[error("argument `{name}` cannot be read back from JSON")]
    Unreadable {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    static NOTHING: Function = Function { key: "nothing", name: "nothing", run: |_, _| Ok(()) };

    #[test]
    fn arguments_travel_with_their_types() {
        let call = Call::new(&NOTHING).argument("a", &u128::MAX).argument("b", &Some("x")).argument("c", &());
        let mut arguments = Arguments::parse(&call.arguments().unwrap()).unwrap();
        assert_eq!(arguments.next::<u128>("a").unwrap(), u128::MAX);
        assert_eq!(arguments.next::<Option<String>>("b").unwrap().as_deref(), Some("x"));
        arguments.next::<()>("c").unwrap();
        assert!(matches!(arguments.next::<u8>("d"), Err(ArgumentError::Missing { name: "d" })));
    }

    #[test]
    fn an_argument_that_is_no_json_is_named() {
        let map = std::collections::BTreeMap::from([((1, 2), 3)]);
        let (name, reason) = Call::new(&NOTHING).argument("map", &map).arguments().unwrap_err();
        assert_eq!((name, reason.as_str()), ("map", "key must be a string"));
    }

    #[test]
    fn a_failure_tells_all_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("failed to listen")]
        struct Listen(#[source] std::io::Error);
        let failure = BlockFailure::from(Listen(std::io::Error::other("no port left")));
        assert_eq!(failure.to_string(), "failed to listen: no port left");
        assert_eq!(BlockFailure::from("plain text").to_string(), "plain text");
    }
}
