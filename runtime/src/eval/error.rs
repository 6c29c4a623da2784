//! Why nothing can be measured.

use crate::{model::ModelError, policy::DesignError, text::TextError};
use std::{io, path::PathBuf};
use thinkey_core::Error;

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A policy cannot be, or not for this model.
    #[error("policy {policy}: {cause}")]
    Design {
        /// The policy, in one line.
        policy: String,
        /// Why.
        cause: DesignError,
    },
    /// The cache cannot be planned, or what is measured is not a number.
    #[error(transparent)]
    Core(#[from] Error),
    /// A number that must not be zero is.
    #[error("{what} must be at least 1")]
    Zero {
        /// What it counts.
        what: &'static str,
    },
    /// More tokens are asked for than the model can take.
    #[error("{needed} tokens are more than the model's context of {context}; ask for fewer")]
    Context {
        /// Tokens asked for.
        needed: usize,
        /// Tokens the model was trained for.
        context: usize,
    },
    /// The text is too short.
    #[error(
        "{needed} tokens of text are needed, and there are {available}; give a longer text, or ask for fewer tokens"
    )]
    ShortText {
        /// Tokens of one window.
        needed: usize,
        /// Tokens of the text.
        available: usize,
    },
    /// Windows would measure the same tokens more than once.
    #[error(
        "{windows} windows are so close in a text of this length that they would measure the same tokens again; ask for at \
         most {most}, or give a longer text"
    )]
    Crowded {
        /// Windows asked for.
        windows: usize,
        /// Windows that there is room for.
        most: usize,
    },
    /// A prompt is too short for what it must hold.
    #[error("a prompt of {length} tokens has no room: fact and question need {least} with a token around them")]
    ShortPrompt {
        /// Tokens asked for.
        length: usize,
        /// Tokens needed.
        least: usize,
    },
    /// A depth is beyond the prompt.
    #[error("a depth of {depth}% is outside 0 to 100")]
    Depth {
        /// As given.
        depth: usize,
    },
    /// A text cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A line of a JSON-lines file has no text.
    #[error("line {line} of {} is no JSON object with a string under \"text\" or \"context\"", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
    /// A plot cannot be drawn.
    #[error("cannot draw a plot: {0}")]
    Plot(String),
}
