//! The command line: one file a command.

mod host;
mod log;
mod run;
mod sim;
mod talk;
mod trace;

use clap::{Parser, Subcommand};
use std::{io, path::PathBuf};
use thinkey::{
    model::ModelError,
    policy::{CalibrationError, DesignError},
    text::TextError,
    weights::WeightsError,
};
use thinkey_core::link::{VERSION, message::Code};
use thinkey_firmware_host::{
    engine::LoadError,
    log::LogError,
    sim::SimError,
    trace::{Differs, TraceFileError},
};

/// A thinkey device on a host, and the host's side of one.
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
    /// Run a scenario on a board that is not there
    Sim(sim::Arguments),
    /// Record what a model's heads are given, or replay it without the model
    #[command(subcommand)]
    Trace(trace::Command),
    /// Be a device: serve a model over a line
    Run(run::Arguments),
    /// Ask a device for an answer
    Talk(talk::Arguments),
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
    /// A file that is to be written.
    #[error("cannot write {}: {cause}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The line.
    #[error("cannot open the line {line}: {cause}")]
    Line {
        /// Which.
        line: String,
        /// Why.
        cause: io::Error,
    },
    /// The model's file is not in the store.
    #[error(transparent)]
    Store(#[from] thinkey::store::StoreError),
    /// The model cannot be served.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Ctrl-C cannot be taken over.
    #[error("cannot take over Ctrl-C: {0}")]
    Interrupt(ctrlc::Error),
    /// The device says no.
    #[error("the device refuses ({code:?}): {detail}")]
    Failed {
        /// Its code.
        code: Code,
        /// Its words.
        detail: String,
    },
    /// The device is of another version.
    #[error(
        "the device speaks version {device} of the protocol, and this program version {VERSION}; use a program of its release"
    )]
    Version {
        /// The device's.
        device: u16,
    },
    /// The device was switched off, or another client spoke to it.
    #[error(
        "the device began anew, and the request is lost: it was switched off, or spoke to another client; ask again"
    )]
    Restarted,
    /// Nobody is there.
    #[error("no device answers on {line} within {seconds} s; is one running there, at this speed?")]
    Silence {
        /// The line.
        line: String,
        /// How long.
        seconds: u64,
    },
    /// A snapshot came over the line otherwise than was said.
    #[error("the snapshot is damaged: it is not what the device said; save it again")]
    Snapshot,
    /// The line is closed.
    #[error("the line was closed before the answer ended")]
    Closed,
    /// The client has no room, or a message is too long.
    #[error(transparent)]
    Core(#[from] thinkey_core::Error),
    /// The output is closed.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// A scenario that cannot be run.
    #[error(transparent)]
    Sim(#[from] SimError),
    /// A scenario in which something did not come out as expected.
    #[error("{unmet} of {all} expectations are not met")]
    Unmet {
        /// How many did not.
        unmet: usize,
        /// How many there are.
        all: usize,
    },
    /// A model's file.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A model's calibration.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// A model's tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A model that cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A policy that the model cannot have.
    #[error(transparent)]
    Design(#[from] DesignError),
    /// A trace that cannot be recorded or replayed.
    #[error(transparent)]
    Trace(#[from] TraceFileError),
    /// A trace that came out otherwise.
    #[error("{}: not as recorded: {found}", path.display())]
    Differs {
        /// The trace.
        path: PathBuf,
        /// What differs.
        found: Box<Differs>,
    },
}

/// Parses the arguments and runs the command.
///
/// # Errors
/// Whatever the command says.
pub fn run() -> Result<(), CliError> {
    match Arguments::parse().command {
        Command::Log(arguments) => log::run(&arguments),
        Command::Sim(arguments) => sim::run(&arguments),
        Command::Trace(command) => trace::run(&command),
        Command::Run(arguments) => run::run(&arguments),
        Command::Talk(arguments) => talk::run(&arguments),
    }
}
