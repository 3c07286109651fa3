//! What is told to an operator when something cannot be done: what is wrong, and what to do about it.

use std::fmt;

/// A refusal or an error, in words for an operator. Every failure that has a remedy carries it as the hint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What is wrong; a clause without capital letter or full stop.
    pub what: String,
    /// What to do, if there is something to be done.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a remedy that we know of.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), hint: None }
    }

    /// The same failure with what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}
