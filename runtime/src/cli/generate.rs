//! `thinkey generate`: one answer to one prompt.

use super::{CliError, answer::answer, budget::Budget, interrupt, options::Options, stats::Stats};
use std::{
    fs,
    io::{self, Read, Write},
    path::PathBuf,
    process::ExitCode,
};
use thinkey::{
    generate::{End, Request},
    model::ModelError,
    text::Message,
};

/// Arguments of `thinkey generate`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The question or instruction; with none and no --file, standard input is read
    prompt: Option<String>,
    /// A text that is put before the prompt
    #[arg(long)]
    file: Option<PathBuf>,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Print speed and cache bytes after the answer
    #[arg(long)]
    stats: bool,
    /// Print answer and statistics as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: Options,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode, CliError> {
    let form = match (arguments.json, arguments.stats) {
        (true, _) => Form::Json,
        (false, true) => Form::TextAndStats,
        (false, false) => Form::Text,
    };
    one(&arguments.options, prompt(arguments)?, arguments.raw, form, |_| Ok(()))
}

/// How an answer is printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text,
    TextAndStats,
    Json,
}

/// Answers `prompt`, or continues it where `raw`. `announce` is told the number of prompt tokens before the weights are
/// loaded.
pub fn one(
    options: &Options,
    prompt: String,
    raw: bool,
    form: Form,
    announce: impl FnOnce(usize) -> io::Result<()>,
) -> Result<ExitCode, CliError> {
    let Options { model, cache, sampling } = options;
    let mut sampler = sampling.sampler()?;
    let (checkpoint, tokenizer) = model.open()?;
    let mut tokens = if raw {
        tokenizer.encode_plain(&prompt, true)?
    } else {
        tokenizer.encode(&model.template(&tokenizer)?.render(&[Message::user(prompt)], true)?, false)?
    };
    let planned = planned(options, checkpoint.config().context, tokens.len())?;
    let budget = Budget::plan(options, &checkpoint, planned, tokens.len())?;
    announce(tokens.len())?;
    let mut engine = model.load(&checkpoint)?;
    let mut session = cache.session(&engine, planned, &budget.design)?;

    interrupt::take_over()?;
    let mut out = io::stdout().lock();
    let request = Request {
        slot: 0,
        tokens: &mut tokens,
        sampler: &mut sampler,
        tokenizer: &tokenizer,
        max_tokens: sampling.max_tokens,
        continues: raw,
    };
    let reply = match form {
        Form::Json => answer(&mut engine, &mut session, request, io::sink()),
        _ => answer(&mut engine, &mut session, request, &mut out),
    };
    let reply = match reply {
        Err(CliError::Model(ModelError::Interrupted)) => {
            eprintln!("thinkey: interrupted before the answer began");
            return Ok(interrupt::code());
        }
        reply => reply?,
    };
    let stats = Stats::new(&reply, &session, &budget);
    match form {
        Form::Json => {
            serde_json::to_writer_pretty(&mut out, &stats.json(cache))?;
            writeln!(out)?;
        }
        Form::Text => writeln!(out)?,
        Form::TextAndStats => writeln!(out, "\n\n{stats}")?,
    }
    match reply.end {
        End::Interrupted => {
            eprintln!("thinkey: interrupted");
            return Ok(interrupt::code());
        }
        End::ContextFull => {
            eprintln!(
                "thinkey: the answer is cut off: the context of {planned} tokens is full; give a larger --context"
            );
        }
        End::Stop | End::MaxTokens => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Tokens to plan the cache for, where the prompt has `prompt` tokens and the model a context of `context`.
fn planned(options: &Options, context: usize, prompt: usize) -> Result<usize, CliError> {
    let answer = options.sampling.max_tokens;
    match options.cache.context(context)? {
        Some(planned) if planned < prompt => Err(CliError::SmallContext { prompt, planned, context }),
        Some(planned) => Ok(planned),
        None => match prompt.checked_add(answer) {
            Some(tokens) if tokens <= context => Ok(tokens),
            _ => Err(CliError::Prompt { prompt, answer, context }),
        },
    }
}

/// The text to answer: the file, then the prompt; standard input where neither is given.
fn prompt(arguments: &Arguments) -> Result<String, CliError> {
    let read = |path: &PathBuf| fs::read_to_string(path).map_err(|cause| CliError::Read { path: path.clone(), cause });
    Ok(match (&arguments.file, &arguments.prompt) {
        (None, None) => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).map_err(CliError::Input)?;
            text
        }
        (None, Some(prompt)) => prompt.clone(),
        (Some(file), None) => read(file)?,
        (Some(file), Some(prompt)) => format!("{}\n\n{prompt}", read(file)?),
    })
}
