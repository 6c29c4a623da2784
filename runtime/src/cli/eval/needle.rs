//! `thinkey eval needle`: a number in a text.

use super::retrieval::{self, Prompts};
use crate::cli::CliError;
use std::path::PathBuf;
use thinkey::eval::{read_text, retrieval::Test};

/// Arguments of `thinkey eval needle`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    prompts: Prompts,
    /// A text; of a .jsonl file, what its lines have under `text` or `context`
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let text = read_text(&arguments.text)?;
    retrieval::run(&arguments.prompts, "needle", Test::Needle(&text))
}
