//! What ends a command.

use super::budget::TooLarge;
use rustyline::error::ReadlineError;
use std::{io, path::PathBuf};
use thinkey::{
    eval::EvalError,
    model::ModelError,
    policy::{CalibrationError, DesignError},
    sample::SamplingError,
    store::StoreError,
    text::TextError,
    weights::WeightsError,
};
use thinkey_core::{Policy, policy::PolicyError, snapshot::SnapshotError};

/// What ends a command: one line, with the cause and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A model file.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] thinkey_core::Error),
    /// The cache's policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The cache's policy, for this model.
    #[error(transparent)]
    Design(#[from] DesignError),
    /// The model's calibration.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// The tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A sampling option.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// Prompt and answer are more than the model can take.
    #[error(
        "{prompt} prompt tokens and {answer} for the answer are more than the model's context of {context}; \
         shorten the prompt or lower --max-tokens"
    )]
    Prompt {
        /// Tokens of the prompt.
        prompt: usize,
        /// Most tokens of the answer.
        answer: usize,
        /// Tokens the model was trained for.
        context: usize,
    },
    /// `--context` is more than the model can take.
    #[error("--context {planned} is more than the model's context of {context}; give at most that")]
    LargeContext {
        /// As given.
        planned: usize,
        /// Tokens the model was trained for.
        context: usize,
    },
    /// The prompt is longer than `--context`.
    #[error(
        "the prompt has {prompt} tokens, more than --context {planned}; shorten it or give a larger --context (the \
         model's is {context})"
    )]
    SmallContext {
        /// Tokens of the prompt.
        prompt: usize,
        /// As given.
        planned: usize,
        /// Tokens the model was trained for.
        context: usize,
    },
    /// The plan does not fit `--max-memory`.
    #[error("{0}")]
    Memory(Box<TooLarge>),
    /// λ is to follow from a limit that is not given.
    #[error("--lambda auto is the smallest λ that fits --max-memory; give --max-memory SIZE, or a λ")]
    AutoWithoutBudget,
    /// A benchmark goes deeper than the model can.
    #[error(
        "the benchmark needs {needed} tokens, more than the model's context of {context}; lower --prefill or --depth"
    )]
    Depth {
        /// Tokens needed.
        needed: usize,
        /// Tokens the model was trained for.
        context: usize,
    },
    /// A file that an option names.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// What is measured.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// A file that an option names cannot be written.
    #[error("cannot write {}: {cause}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A snapshot that is not taken or restored.
    #[error("{}: {cause}", path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: Box<SnapshotError>,
    },
    /// A snapshot of a cache that does something else.
    #[error("{}: the snapshot is of policy {found}, but the session is of {expected}", path.display())]
    OtherPolicy {
        /// The file.
        path: PathBuf,
        /// Its policy.
        found: Box<Policy>,
        /// That of the session.
        expected: Box<Policy>,
    },
    /// Standard input.
    #[error("cannot read standard input: {0}")]
    Input(io::Error),
    /// The terminal.
    #[error("cannot read from the terminal: {0}")]
    Terminal(ReadlineError),
    /// Ctrl-C cannot be taken over.
    #[error("cannot handle Ctrl-C: {0}")]
    Interrupt(ctrlc::Error),
    /// The output is closed.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// JSON cannot be written.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
}
