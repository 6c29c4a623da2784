//! `thinkey eval passkey`: a number among sentences that repeat.

use super::retrieval::{self, Prompts};
use crate::cli::CliError;
use thinkey::eval::retrieval::Test;

/// Arguments of `thinkey eval passkey`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    prompts: Prompts,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    retrieval::run(&arguments.prompts, "passkey", Test::Passkey)
}
