//! The command line: one file a command.

mod bench;
mod generate;
mod inspect;
mod pull;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use thinkey::{model::ModelError, sample::SamplingError, store::StoreError, text::TextError, weights::WeightsError};

/// Runs Llama-family models on a key cache that is really thinner.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer one prompt
    Generate(generate::Arguments),
    /// Fetch a model into the store, or find it there.
    Pull(pull::Arguments),
    /// Measure prefill and decode on this machine
    Bench(bench::Arguments),
    /// Show what a model is, and the bytes of its cache, whole and thin.
    Inspect(inspect::Arguments),
}

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
    /// The tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A sampling option.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The prompt is longer than the model can take.
    #[error(
        "{prompt} prompt tokens and {answer} for the answer are more than the model's context of {context}; \
         shorten the prompt or lower --max-tokens"
    )]
    Context {
        /// Tokens of the prompt.
        prompt: usize,
        /// Most tokens of the answer.
        answer: usize,
        /// Tokens the model was trained for.
        context: usize,
    },
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
    /// A prompt file.
    #[error("cannot read the prompt from {}: {cause}", path.display())]
    Prompt {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The output is closed.
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
    /// JSON cannot be written.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Parses the arguments and runs the command.
///
/// # Errors
/// Whatever the command says.
pub fn run() -> Result<(), CliError> {
    match Arguments::parse().command {
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Pull(arguments) => pull::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
    }
}
