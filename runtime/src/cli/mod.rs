//! The command line: one file a command.

mod inspect;
mod pull;

use clap::{Parser, Subcommand};
use thinkey::{store::StoreError, weights::WeightsError};

/// Runs Llama-family models on a key cache that is really thinner.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch a model into the store, or find it there.
    Pull(pull::Arguments),
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
        Command::Pull(arguments) => pull::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
    }
}
