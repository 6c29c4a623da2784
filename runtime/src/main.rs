//! The `thinkey` command.
#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run().unwrap_or_else(|error| {
        eprintln!("thinkey: {error}");
        ExitCode::FAILURE
    })
}
