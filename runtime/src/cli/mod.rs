//! The command line: one file a command, and beside them what commands share.

mod answer;
mod bench;
mod budget;
mod calibrate;
mod chat;
mod demo;
mod doctor;
mod error;
mod eval;
mod generate;
mod input;
mod inspect;
mod interrupt;
mod memory;
mod options;
mod plan;
mod progress;
mod pull;
mod stats;

use clap::{Parser, Subcommand};
pub use error::CliError;
use std::process::ExitCode;

/// Runs Llama-family models on a key cache that is really thinner.
///
/// Without a command, the default model answers a question about a long text, and speed and cache bytes are shown.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Answer one prompt
    Generate(generate::Arguments),
    /// Talk with a model; every turn is appended to the thin cache
    Chat(chat::Arguments),
    /// Fetch a model into the store, or find it there
    Pull(pull::Arguments),
    /// Measure prefill and decode on this machine
    Bench(bench::Arguments),
    /// Measure how good cache policies are: divergence, retrieval, energy
    Eval(eval::Arguments),
    /// Plan the memory that a model takes, and show what fits
    Plan(plan::Arguments),
    /// Measure once how many channels each head of a model is worth
    Calibrate(calibrate::Arguments),
    /// Show what this machine has, what would run on it and, where CUDA cannot be used, why
    Doctor(doctor::Arguments),
    /// Show what a model is, and the bytes of its cache, whole and thin
    Inspect(inspect::Arguments),
}

/// Parses the arguments and runs the command.
///
/// # Errors
/// Whatever the command says.
pub fn run() -> Result<ExitCode, CliError> {
    let done = |()| ExitCode::SUCCESS;
    match Arguments::parse().command {
        None => demo::run(),
        Some(Command::Generate(arguments)) => generate::run(&arguments),
        Some(Command::Chat(arguments)) => chat::run(&arguments),
        Some(Command::Pull(arguments)) => pull::run(&arguments).map(done),
        Some(Command::Bench(arguments)) => bench::run(&arguments).map(done),
        Some(Command::Eval(arguments)) => eval::run(&arguments).map(done),
        Some(Command::Plan(arguments)) => plan::run(&arguments).map(done),
        Some(Command::Calibrate(arguments)) => calibrate::run(&arguments).map(done),
        Some(Command::Doctor(arguments)) => doctor::run(&arguments).map(done),
        Some(Command::Inspect(arguments)) => inspect::run(&arguments).map(done),
    }
}
