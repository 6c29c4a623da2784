//! The `thinkey-firmware-host` command.
#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("thinkey-firmware-host: {error}");
            ExitCode::FAILURE
        }
    }
}
