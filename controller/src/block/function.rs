//! Rust functions as blocks: what `#[millstream::block]` registers, and what a call of one carries.
//!
//! A function is known by a key that is the same in every process of this program; nothing here runs one.

use std::{collections::BTreeMap, fmt};

use millstream_common::limits;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::{Block, Kind, Parameter, payload::PayloadError};
use crate::context::BlockContext;

/// How a block of Rust ends: `?` takes any error. A value travels home as JSON and is had from the outcome with
/// [`Outcome::value`](crate::Outcome::value); at most 16 MiB.
pub type BlockResult<T = ()> = Result<T, BlockFailure>;

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

/// What a function with `#[millstream::block]` may return: nothing, or a result of a value that can be written as JSON,
/// whose error is any error.
#[diagnostic::on_unimplemented(
    message = "a block returns `millstream::BlockResult<T>`, another `Result<T, E>` of a value and an error, or nothing",
    label = "not a block's result"
)]
pub trait BlockReturn {
    /// The value as JSON; `null` for none.
    ///
    /// # Errors
    /// When the block has failed, or its value cannot be written.
    fn into_value(self) -> BlockResult<String>;
}

impl BlockReturn for () {
    fn into_value(self) -> BlockResult<String> {
        value_text(&())
    }
}

impl<T: Serialize> BlockReturn for Result<T, BlockFailure> {
    fn into_value(self) -> BlockResult<String> {
        value_text(&self?)
    }
}

impl<T: Serialize, E: Into<Box<dyn std::error::Error + Send + Sync>>> BlockReturn for Result<T, E> {
    fn into_value(self) -> BlockResult<String> {
        value_text(&self.map_err(BlockFailure::from)?)
    }
}

/// Why a value of a block does not travel.
#[derive(Debug, thiserror::Error)]
enum ValueRefused {
    #[error("the value that the block returns cannot be written as JSON")]
    NotJson(#[source] serde_json::Error),
    #[error("the value that the block returns has {length} bytes: at most {limit} travel; write it to a file in `ctx.output_dir()`", limit = limits::VALUE_BYTES_MAX)]
    TooLong { length: usize },
}

fn value_text(value: &impl Serialize) -> BlockResult<String> {
    let text = serde_json::to_string(value).map_err(ValueRefused::NotJson)?;
    if text.len() as u64 > limits::VALUE_BYTES_MAX {
        return Err(ValueRefused::TooLong { length: text.len() }.into());
    }
    Ok(text)
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
    /// Names of the arguments that travel, in their order.
    pub arguments: &'static [&'static str],
    /// Runs it.
    pub run: fn(&mut BlockContext, Arguments) -> BlockResult<String>,
}

impl Function {
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Its module and name.
    pub(crate) fn path(&self) -> &'static str {
        self.key.split_once('@').map_or(self.key, |(path, _)| path)
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
    arguments: Given,
}

/// Where the arguments of a call come from.
#[derive(Debug, Clone)]
enum Given {
    /// Each argument as JSON; or the first that cannot be written, and why.
    Values(Result<Vec<Box<RawValue>>, (&'static str, String)>),
    /// From the block's parameters of the same names.
    Parameters,
}

impl Call {
    /// A call without arguments yet.
    #[must_use]
    pub fn new(function: &'static Function) -> Self {
        Self { function, arguments: Given::Values(Ok(Vec::new())) }
    }

    /// A call that takes its arguments from the block's parameters.
    pub(crate) fn by_name(function: &'static Function) -> Self {
        Self { function, arguments: Given::Parameters }
    }

    /// Adds the next argument.
    #[must_use]
    pub fn argument(mut self, name: &'static str, value: &impl Serialize) -> Self {
        if let Given::Values(Ok(arguments)) = &mut self.arguments {
            match serde_json::value::to_raw_value(value) {
                Ok(value) => arguments.push(value),
                Err(error) => self.arguments = Given::Values(Err((name, error.to_string()))),
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
    pub(super) fn arguments(&self, parameters: &BTreeMap<String, Parameter>) -> Result<String, PayloadError> {
        let function = self.function.name;
        let unwritable = |argument, reason| PayloadError::Argument { function, argument, reason };
        let text = match &self.arguments {
            Given::Values(Err((argument, reason))) => return Err(unwritable(argument, reason.clone())),
            Given::Values(Ok(arguments)) => serde_json::to_string(arguments),
            Given::Parameters => {
                let mut values = Vec::new();
                for &argument in self.function.arguments {
                    match parameters.get(argument) {
                        None => return Err(PayloadError::NoArgument { function, argument }),
                        Some(Parameter { secret: true, .. }) => {
                            return Err(PayloadError::SecretArgument { function, argument });
                        }
                        Some(Parameter { value: Err(reason), .. }) => {
                            return Err(unwritable(argument, reason.clone()));
                        }
                        Some(Parameter { value: Ok(value), .. }) => values.push(value),
                    }
                }
                serde_json::to_string(&values)
            }
        };
        text.map_err(|error| unwritable("all arguments", error.to_string()))
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

    static NOTHING: Function = Function {
        key: "nothing",
        name: "nothing",
        arguments: &["a", "b"],
        run: |_, _| Ok("null".to_owned()),
    };

    #[test]
    fn arguments_travel_with_their_types() {
        let call = Call::new(&NOTHING).argument("a", &u128::MAX).argument("b", &Some("x")).argument("c", &());
        let mut arguments = Arguments::parse(&call.arguments(&BTreeMap::new()).unwrap()).unwrap();
        assert_eq!(arguments.next::<u128>("a").unwrap(), u128::MAX);
        assert_eq!(arguments.next::<Option<String>>("b").unwrap().as_deref(), Some("x"));
        arguments.next::<()>("c").unwrap();
        assert!(matches!(arguments.next::<u8>("d"), Err(ArgumentError::Missing { name: "d" })));
    }

    #[test]
    fn an_argument_that_is_no_json_is_named() {
        let map = std::collections::BTreeMap::from([((1, 2), 3)]);
        let error = Call::new(&NOTHING).argument("map", &map).arguments(&BTreeMap::new()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "argument `map` of `nothing` cannot be written as JSON: key must be a string"
        );
    }

    #[test]
    fn a_call_by_name_takes_its_arguments_from_the_parameters() {
        let parameter = |value: i32, secret| Parameter { value: Ok(value.into()), secret };
        let mut parameters = BTreeMap::from([("b".to_owned(), parameter(2, false))]);
        let call = Call::by_name(&NOTHING);
        let told = call.arguments(&parameters).unwrap_err().to_string();
        assert_eq!(told, "`nothing` takes `a`: give it to the reference with `.param(\"a\", …)`");
        parameters.insert("a".to_owned(), parameter(1, false));
        assert_eq!(call.arguments(&parameters).unwrap(), "[1,2]");
        parameters.insert("a".to_owned(), parameter(1, true));
        assert_eq!(
            call.arguments(&parameters).unwrap_err().to_string(),
            "argument `a` of `nothing` is a secret parameter, and arguments are no secrets: let the function read it with `ctx.param`"
        );
    }

    #[test]
    fn what_a_block_returns_is_json_within_its_bound() {
        assert_eq!(().into_value().unwrap(), "null");
        assert_eq!(BlockResult::Ok((1, "a")).into_value().unwrap(), "[1,\"a\"]");
        let failed: Result<u8, &str> = Err("no port");
        assert_eq!(failed.into_value().unwrap_err().to_string(), "no port");
        let map = std::collections::BTreeMap::from([((1, 2), 3)]);
        assert_eq!(
            BlockResult::Ok(map).into_value().unwrap_err().to_string(),
            "the value that the block returns cannot be written as JSON: key must be a string"
        );
        let long = "x".repeat(usize::try_from(limits::VALUE_BYTES_MAX).unwrap());
        assert_eq!(
            BlockResult::Ok(long).into_value().unwrap_err().to_string(),
            "the value that the block returns has 16777218 bytes: at most 16777216 travel; write it to a file in `ctx.output_dir()`"
        );
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
