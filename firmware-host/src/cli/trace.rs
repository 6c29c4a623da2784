//! `thinkey-firmware-host trace`: recorded with a model, replayed without.

use super::CliError;
use indicatif::ProgressBar;
use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
};
use thinkey::{
    engine::{Device, Engine, EngineOptions},
    model::transformer::{RECENT, WINDOW},
    policy::{self, CacheDesign, Calibration},
    text::Tokenizer,
    weights::Checkpoint,
};
use thinkey_core::Policy;
use thinkey_firmware_host::trace::{self, Differs, Outcome, Recording};

/// What to do with a trace.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Run a model and write what its heads are given and what the cache makes of it
    Record(Box<RecordArguments>),
    /// Compute a trace again, without the model, and compare
    Replay(ReplayArguments),
}

/// Options of `trace record`.
#[derive(clap::Args)]
pub struct RecordArguments {
    /// The model: a GGUF file or a folder
    model: PathBuf,
    /// The text that is read
    #[arg(long, value_name = "PATH")]
    text: PathBuf,
    /// The file to write
    #[arg(long, short, value_name = "PATH")]
    output: PathBuf,
    /// Cache policy, as of `thinkey generate` [default: the model's]
    #[arg(long)]
    policy: Option<Policy>,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 256)]
    prompt: usize,
    /// Steps after it
    #[arg(long, default_value_t = 64)]
    steps: usize,
    /// Heads to record, spread over the model
    #[arg(long, default_value_t = 4)]
    heads: usize,
}

/// Options of `trace replay`.
#[derive(clap::Args)]
pub struct ReplayArguments {
    /// The trace
    trace: PathBuf,
    /// By how much numbers may differ, as a share of the largest of their row
    #[arg(long, default_value_t = 1e-4)]
    tolerance: f32,
}

/// Runs the command.
///
/// # Errors
/// Files that cannot be read or written, models and policies that cannot be, and traces that come out otherwise.
pub fn run(command: &Command) -> Result<(), CliError> {
    match command {
        Command::Record(arguments) => record(arguments),
        Command::Replay(arguments) => replay(arguments),
    }
}

fn record(arguments: &RecordArguments) -> Result<(), CliError> {
    let RecordArguments { prompt, steps, heads, .. } = *arguments;
    let text =
        fs::read_to_string(&arguments.text).map_err(|cause| CliError::Input { path: arguments.text.clone(), cause })?;
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let tokenizer = Tokenizer::new(checkpoint.tokenizer()?)?;
    let calibration = Calibration::find(&checkpoint)?;
    let head_dim = checkpoint.config().head_dim;
    let policy = arguments.policy.unwrap_or_else(|| policy::default(head_dim, calibration.is_some(), Device::Ndarray));
    let design = CacheDesign::new(policy, checkpoint.config(), calibration.as_ref())?;
    let tokens = tokenizer.encode_plain(&text, true)?;
    let mut engine = Engine::load(&checkpoint, EngineOptions::default(), &mut |_, _| {})?;
    let recording = Recording { prompt, steps, window: WINDOW, recent: RECENT, heads };
    let bar = ProgressBar::new(0).with_message("recording");
    let recorded = trace::record(&mut engine, &design, &tokens, recording, &arguments.output, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let heads = recorded?;
    writeln!(
        io::stdout(),
        "{heads} heads of {prompt} tokens and {steps} steps, {policy}: {}",
        arguments.output.display()
    )?;
    Ok(())
}

fn replay(arguments: &ReplayArguments) -> Result<(), CliError> {
    let Outcome { model, replayed } = trace::replay(&arguments.trace, arguments.tolerance)?;
    if !replayed.same() {
        return Err(CliError::Differs { path: arguments.trace.clone(), found: Box::new(Differs(replayed)) });
    }
    writeln!(
        io::stdout(),
        "{model}: {} masks and {} outputs are as recorded; outputs differ by {:.1e} of a row's largest number at most",
        replayed.heads,
        replayed.compared,
        replayed.worst
    )?;
    Ok(())
}
