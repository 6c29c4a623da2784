//! The command line: one file a command.

mod log;

use clap::{Parser, Subcommand};
use std::{io, path::PathBuf};
use thinkey_firmware_host::log::LogError;

/// The host's side of a thinkey device.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what a device logs, one line a record
    Log(log::Arguments),
}

/// What ends a command: one line, with the cause and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The firmware file explains no log.
    #[error("{}: {cause}", path.display())]
    Log {
        /// The firmware file.
        path: PathBuf,
        /// Why.
        cause: LogError,
    },
    /// A file or the standard input.
    #[error("cannot read {}: {cause}", path.display())]
    Input {
        /// The file; `-` is the standard input.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The output is closed.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Parses the arguments and runs the command.
///
/// # Errors
/// Whatever the command says.
pub fn run() -> Result<(), CliError> {
    match Arguments::parse().command {
        Command::Log(arguments) => log::run(&arguments),
    }
}
