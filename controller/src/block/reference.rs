//! References: texts that name blocks, and the chain of resolvers that finds what they name.
//!
//! A resolver looks and tells; what a reference to none or to several blocks means is said here, once for all of them.
//! Resolving reads files and may start `python3`, so it is done where blocking is allowed.

use std::{fmt, sync::Arc};

use millstream_common::{
    id::BlockName,
    text::{self, UnclosedQuote, counted, printable},
};

use super::{Block, Kind};

mod functions;
mod programs;
mod python;

/// References that one reference may lead through before it is a block.
const DEPTH_MAX: usize = 8;
/// How many blocks an error lists.
const LISTED_COUNT_MAX: usize = 12;

/// How much of a reference an error shows.
const REFERENCE_SHOWN_BYTES: usize = 256;

/// A block that is named by a text, which resolvers make a block when it is run.
///
/// | text | block |
/// | --- | --- |
/// | `netserver` | a function of this program with `#[millstream::block]`; its arguments are the parameters of their names |
/// | `NetPerf.py:NetServer.test` | a method of a class in a Python file: `setUp`, the method, `tearDown` |
/// | `NetPerf:NetServer.test` | the same, where there is a file `NetPerf.py` |
/// | `NetPerf.py:NetServer` | all methods of it that begin with `test` |
/// | `NetPerf.py` | all methods of all its classes, but of those that are marked `:millstream: hidden`; a file without such classes is a program |
/// | `tools/load.sh 5` | a script of this machine, shipped, with its arguments |
/// | `wget example.org` | a program of the host, which this machine must have, too, so that spelling mistakes are found |
/// | `/usr/bin/wget example.org` | a program of the host |
///
/// Several blocks where one is asked for are an error; [`Stream::run_all_bg`](crate::Stream::run_all_bg) runs them all.
/// Resolvers of your own come first: [`StreamsBuilder::resolver`](crate::StreamsBuilder::resolver).
pub fn reference(text: impl Into<String>) -> Block {
    Block::new(Kind::Reference(Unresolved { text: text.into(), chain: Chain::default() }))
}

/// Finds the blocks that references name.
///
/// What is said of the reference (its parameters, its timeout, …) is added to the blocks that are found and wins over
/// what they say themselves. Expectations and barriers are those of the reference alone.
pub trait Resolver: Send + Sync {
    /// What errors call it, such as `scripts`.
    fn name(&self) -> &str;

    /// Finds what a reference names. May block the thread for a short time.
    fn resolve(&self, reference: &BlockReference) -> Resolution;
}

/// A reference as resolvers see it.
#[derive(Debug, Clone)]
pub struct BlockReference {
    text: String,
    on_host: bool,
}

impl BlockReference {
    /// The text as it was given.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether files are on the host already, by [`Block::no_copy`], and need not exist here.
    #[must_use]
    pub fn is_on_host(&self) -> bool {
        self.on_host
    }

    /// The text as words, split as a shell would: at spaces, but for those in quotes or behind a backslash.
    ///
    /// # Errors
    /// When a quote is not closed.
    pub fn words(&self) -> Result<Vec<String>, UnclosedQuote> {
        text::words(&self.text)
    }
}

/// What a resolver has found.
#[derive(Debug)]
#[non_exhaustive]
pub enum Resolution {
    /// The blocks, in their order. None at all is as good as [`Resolution::NotFound`].
    Found(Vec<Block>),
    /// Nothing: the next resolver is asked.
    NotFound {
        /// Where it looked and why that is nothing, such as "file `x.py` does not exist".
        tried: String,
        /// What may have been meant.
        nearest: Option<String>,
    },
    /// It is this resolver's, and it cannot be run: no other resolver is asked.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

impl Resolution {
    fn not_found(tried: impl Into<String>, nearest: Option<&str>) -> Self {
        Self::NotFound { tried: tried.into(), nearest: nearest.map(str::to_owned) }
    }
}

/// Why a reference is no block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// No resolver knows it.
    #[error("the reference `{}` names no block: {}", shown(reference), list_tried(tried))]
    NotFound {
        /// The reference.
        reference: String,
        /// What each resolver has tried.
        tried: Vec<Tried>,
    },
    /// It names several.
    #[error(
        "the reference `{}` names {}: {}; run one of them, or all with `run_all_bg` or `run_all_fg`",
        shown(reference), counted(blocks.len(), "block"), list(blocks)
    )]
    Several {
        /// The reference.
        reference: String,
        /// References to each of them.
        blocks: Vec<String>,
    },
    /// It names something that cannot be run.
    #[error("the reference `{}` cannot be run ({resolver}): {reason}", shown(reference))]
    Refused {
        /// The reference.
        reference: String,
        /// Who says so.
        resolver: String,
        /// Why, and what to do.
        reason: String,
    },
    /// It leads to references again and again.
    #[error(
        "the reference `{}` leads from one reference to the next, {DEPTH_MAX} times: last to `{}`",
        shown(reference),
        shown(last)
    )]
    Endless {
        /// The reference.
        reference: String,
        /// Where it has led to.
        last: String,
    },
}

/// What one resolver has tried.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tried {
    /// The resolver.
    pub resolver: String,
    /// Where it looked.
    pub what: String,
    /// What may have been meant.
    pub nearest: Option<String>,
}

fn shown(reference: &str) -> String {
    printable(reference.as_bytes(), REFERENCE_SHOWN_BYTES)
}

fn list_tried(tried: &[Tried]) -> String {
    let told = tried.iter().map(|tried| {
        let meant =
            tried.nearest.as_ref().map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
        format!("{}: {}{meant}", tried.resolver, tried.what)
    });
    told.collect::<Vec<_>>().join("; ")
}

fn list(blocks: &[String]) -> String {
    let mut listed: Vec<String> =
        blocks.iter().take(LISTED_COUNT_MAX).map(|block| format!("`{block}`")).collect();
    if blocks.len() > LISTED_COUNT_MAX {
        listed.push(format!("and {} more", blocks.len() - LISTED_COUNT_MAX));
    }
    listed.join(", ")
}

/// A reference that was not resolved yet.
#[derive(Clone)]
pub(super) struct Unresolved {
    text: String,
    chain: Chain,
}

impl Unresolved {
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn derived_name(&self) -> BlockName {
        let inside = self.text.split_once(".py:").map(|(_, inside)| inside);
        BlockName::derived(inside.unwrap_or_else(|| {
            let (program, rest) = self.text.split_once(' ').unwrap_or((&self.text, ""));
            let begin = self.text.len() - rest.len() - usize::from(!rest.is_empty());
            let file = program.rsplit('/').next().unwrap_or(program).len();
            &self.text[begin - file..]
        }))
    }
}

/// Resolvers in the order in which they are asked.
#[derive(Clone)]
pub(crate) struct Chain(Arc<[Arc<dyn Resolver>]>);

impl Default for Chain {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|resolver| resolver.name())).finish()
    }
}

impl Chain {
    /// Those of the user, then those that everybody has.
    pub(crate) fn new(mut resolvers: Vec<Arc<dyn Resolver>>) -> Self {
        resolvers.push(Arc::new(functions::Functions));
        resolvers.push(Arc::new(python::Python));
        resolvers.push(Arc::new(programs::Programs));
        resolvers.push(Arc::new(programs::Scripts));
        Self(resolvers.into())
    }

    fn resolve(&self, reference: &BlockReference) -> Result<Vec<Block>, ResolveError> {
        let mut asked = Vec::new();
        for resolver in self.0.iter() {
            let name = || resolver.name().to_owned();
            match resolver.resolve(reference) {
                Resolution::Found(blocks) if !blocks.is_empty() => return Ok(blocks),
                Resolution::Found(_) => {
                    asked.push(Tried { resolver: name(), what: "found nothing".to_owned(), nearest: None });
                }
                Resolution::NotFound { tried, nearest } => {
                    asked.push(Tried { resolver: name(), what: tried, nearest });
                }
                Resolution::Refused { reason } => {
                    let reference = reference.text.clone();
                    return Err(ResolveError::Refused { reference, resolver: name(), reason });
                }
            }
        }
        Err(ResolveError::NotFound { reference: reference.text.clone(), tried: asked })
    }
}

impl Block {
    /// Says who resolves references; on any other block it does nothing.
    pub(crate) fn resolved_by(mut self, chain: &Chain) -> Self {
        if let Kind::Reference(unresolved) = &mut self.kind {
            unresolved.chain = chain.clone();
        }
        self
    }

    /// Every block that it stands for, itself unless it is a reference. Reads files: blocks the thread.
    pub(crate) fn expand(&self) -> Result<Vec<Self>, ResolveError> {
        self.expand_within(DEPTH_MAX)
    }

    fn expand_within(&self, depth: usize) -> Result<Vec<Self>, ResolveError> {
        let Kind::Reference(unresolved) = &self.kind else { return Ok(vec![self.clone()]) };
        let reference = BlockReference { text: unresolved.text.clone(), on_host: self.no_copy };
        if depth == 0 {
            let text = unresolved.text.clone();
            return Err(ResolveError::Endless { reference: text.clone(), last: text });
        }
        let mut blocks = Vec::new();
        for found in unresolved.chain.resolve(&reference)? {
            let block = self.said_of(found).resolved_by(&unresolved.chain);
            let further = block.expand_within(depth - 1).map_err(|error| match error {
                ResolveError::Endless { last, .. } => {
                    ResolveError::Endless { reference: unresolved.text.clone(), last }
                }
                other => other,
            });
            blocks.extend(further?);
        }
        Ok(blocks)
    }

    /// The one block that it stands for, under the name that the reference has.
    pub(super) fn the_one(&self) -> Result<Self, ResolveError> {
        let mut blocks = self.expand()?;
        match blocks.pop() {
            Some(block) if blocks.is_empty() => {
                let name = self.name.clone().unwrap_or_else(|| Ok(self.block_name()));
                Ok(Self { name: Some(name), ..block })
            }
            last => {
                blocks.extend(last);
                let Kind::Reference(unresolved) = &self.kind else { return Ok(self.clone()) };
                let blocks = blocks.iter().map(|block| block.kind.described()).collect();
                Err(ResolveError::Several { reference: unresolved.text.clone(), blocks })
            }
        }
    }

    /// What was found, with what was said of the reference.
    fn said_of(&self, found: Self) -> Self {
        let mut all = self.clone();
        all.kind = found.kind;
        all.name = self.name.clone().or(found.name);
        all.parameters = found.parameters;
        all.parameters.extend(self.parameters.clone());
        all.environment = found.environment;
        all.environment.extend(self.environment.clone());
        all.timeout = self.timeout.or(found.timeout);
        all.files = found.files;
        all.files.extend(self.files.iter().cloned());
        all.no_copy |= found.no_copy;
        all.user = self.user.clone().or(found.user);
        all.working_directory = self.working_directory.clone().or(found.working_directory);
        all.wrap = if self.wrap.is_empty() { found.wrap } else { self.wrap.clone() };
        all.limits = super::compile::merged(self.limits, found.limits);
        all.setup = self.setup.clone().or(found.setup);
        all.teardown = self.teardown.clone().or(found.teardown);
        all.grace = self.grace.or(found.grace);
        all.log_quota = self.log_quota.or(found.log_quota);
        all
    }
}

#[cfg(test)]
mod tests;
