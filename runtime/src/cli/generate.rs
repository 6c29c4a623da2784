//! `thinkey generate`: one answer to one prompt.

use super::{CliError, answer::answer, budget::Budget, interrupt, options::Options, stats::Stats};
use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};
use thinkey::{
    engine::Origin,
    generate::{End, Request},
    model::ModelError,
    text::Message,
};
use thinkey_core::snapshot::{Snapshot, SnapshotError};

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
    /// Write a snapshot of the cache to this file after the answer
    #[arg(long, value_name = "SNAPSHOT")]
    save: Option<PathBuf>,
    /// Go on with a snapshot of the same model and policy: the prompt is put behind its text, as it is, and may be empty
    #[arg(long, value_name = "SNAPSHOT")]
    restore: Option<PathBuf>,
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
    let snapshots = Snapshots { restore: arguments.restore.as_deref(), save: arguments.save.as_deref() };
    one(&arguments.options, prompt(arguments)?, arguments.raw, form, snapshots, |_| Ok(()))
}

/// Files that the cache comes from and goes to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Snapshots<'a> {
    pub restore: Option<&'a Path>,
    pub save: Option<&'a Path>,
}

/// How an answer is printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text,
    TextAndStats,
    Json,
}

/// Answers `prompt`, or continues it where `raw` or where it goes on with a snapshot. `announce` is told the number of prompt tokens before the weights are
/// loaded.
pub fn one(
    options: &Options,
    prompt: String,
    raw: bool,
    form: Form,
    snapshots: Snapshots<'_>,
    announce: impl FnOnce(usize) -> io::Result<()>,
) -> Result<ExitCode, CliError> {
    let Options { model, cache, sampling } = options;
    let mut sampler = sampling.sampler()?;
    let (checkpoint, tokenizer) = model.open()?;
    let restored = snapshots.restore.map(|path| Ok::<_, CliError>((path, read(path)?))).transpose()?;
    let refused = |path: &Path, cause| CliError::Snapshot { path: path.to_owned(), cause: Box::new(cause) };
    let restored = match &restored {
        Some((path, bytes)) => Some((*path, Snapshot::open(bytes).map_err(|cause| refused(path, cause))?)),
        None => None,
    };
    let raw = raw || restored.is_some();
    let mut tokens = if let Some((_, snapshot)) = &restored {
        let mut tokens: Vec<u32> = snapshot.tokens().collect();
        tokens.extend(tokenizer.encode_plain(&prompt, false)?);
        tokens
    } else if raw {
        tokenizer.encode_plain(&prompt, true)?
    } else {
        tokenizer.encode(&model.template(&tokenizer)?.render(&[Message::user(prompt)], true)?, false)?
    };
    let planned = planned(options, checkpoint.config().context, tokens.len())?;
    let budget = Budget::plan(options, &checkpoint, planned, tokens.len())?;
    announce(tokens.len())?;
    let mut engine = model.load(&checkpoint)?;
    let mut session = cache.session(&engine, planned, &budget.design)?;
    let origin = || Origin { model: checkpoint.fingerprint(), policy: *budget.design.policy() };
    if let Some((path, snapshot)) = &restored {
        session.restore(0, &origin(), snapshot).map_err(|cause| match cause {
            SnapshotError::Policy { .. } => CliError::OtherPolicy {
                path: (*path).to_owned(),
                found: Box::new(snapshot.header().policy),
                expected: Box::new(origin().policy),
            },
            cause => refused(path, cause),
        })?;
    }

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
    if let Some(path) = snapshots.save {
        let bytes = session.save(0, &origin(), &tokens).map_err(|cause| refused(path, cause))?;
        fs::write(path, bytes).map_err(|cause| CliError::Write { path: path.to_owned(), cause })?;
    }
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

/// The bytes of a file.
fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    fs::read(path).map_err(|cause| CliError::Read { path: path.to_owned(), cause })
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
