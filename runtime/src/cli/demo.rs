//! `thinkey` without a command: the default model answers a question about a long text, and shows what it took.

use super::{
    CliError,
    generate::{Form, Snapshots, one},
    options::Options,
};
use std::{io::Write, process::ExitCode};

/// A chapter of Alice's Adventures in Wonderland; its origin is told beside it.
const TEXT: &str = include_str!("../../assets/pig-and-pepper.txt");
const TITLE: &str = "chapter VI of Alice's Adventures in Wonderland";
const QUESTION: &str = "According to the text, what did the baby turn into? Answer in one short sentence.";

pub fn run() -> Result<ExitCode, CliError> {
    one(&Options::default(), format!("{TEXT}\n{QUESTION}"), false, Form::TextAndStats, Snapshots::default(), |tokens| {
        writeln!(std::io::stdout(), "Asking about {TITLE} ({tokens} tokens with the question): {QUESTION}\n")
    })
}
