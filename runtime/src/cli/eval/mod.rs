//! `thinkey eval`: how good cache policies are. One file a measurement, and here what they share.

mod energy;
mod needle;
mod passkey;
mod ppl;
mod retrieval;

use super::{CliError, options::ProcessorOptions, progress, pull::pull};
use clap::Subcommand;
use serde::Serialize;
use serde_json::json;
use std::{
    fs::File,
    io::{self, Write},
    path::PathBuf,
};
use thinkey::{
    engine::{Device, Engine},
    eval::EvalError,
    policy::Calibration,
    store::{DEFAULT, Store},
    text::Tokenizer,
    weights::Checkpoint,
};
use thinkey_core::policy::Policy;

/// Arguments of `thinkey eval`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Perplexity, and divergence from the whole cache, of a text's next tokens
    Ppl(ppl::Arguments),
    /// Find a number that is told once among sentences that repeat
    Passkey(passkey::Arguments),
    /// Find a number that is told once in a text
    Needle(needle::Arguments),
    /// How few directions and channels hold what queries and keys say to each other
    Energy(energy::Arguments),
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    match &arguments.what {
        What::Ppl(arguments) => ppl::run(arguments),
        What::Passkey(arguments) => passkey::run(arguments),
        What::Needle(arguments) => needle::run(arguments),
        What::Energy(arguments) => energy::run(arguments),
    }
}

/// Which model measures, and where the report goes.
#[derive(clap::Args)]
struct Common {
    /// A model in the store (pulled if it is missing) or a path
    #[arg(default_value = DEFAULT.id)]
    model: String,
    /// Where to compute
    #[arg(long, default_value_t = Device::Ndarray)]
    device: Device,
    #[command(flatten)]
    processor: ProcessorOptions,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a report with plots, as one HTML file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// What is compared.
#[derive(clap::Args)]
struct Policies {
    /// A cache policy, as `think` or `choice=top(.5),keys=int4`; give several, they share every prompt. The whole cache is
    /// always the first
    #[arg(long = "policy", value_name = "POLICY", required = true)]
    policies: Vec<Policy>,
}

/// A model that measures.
struct Bench {
    engine: Engine,
    calibration: Option<Calibration>,
    tokenizer: Tokenizer,
    /// What the model is called.
    name: String,
    /// Opened before anything is measured, so that nothing is measured in vain.
    html: Option<(PathBuf, File)>,
    json: bool,
}

impl Common {
    /// Opens the report and loads the model.
    fn open(&self) -> Result<Bench, CliError> {
        let checkpoint = Checkpoint::open(&pull(&Store::open()?, &self.model)?)?;
        let (tokenizer, calibration) = (Tokenizer::new(checkpoint.tokenizer()?)?, Calibration::find(&checkpoint)?);
        let html = match &self.html {
            Some(path) => {
                let file = File::create(path).map_err(|cause| CliError::Write { path: path.clone(), cause })?;
                Some((path.clone(), file))
            }
            None => None,
        };
        let bar = progress::layers("loading", checkpoint.config().layers);
        let options = self.processor.engine(self.device);
        let engine = Engine::load(&checkpoint, options, &mut |done, _| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        let name = checkpoint.config().name.clone().unwrap_or_else(|| self.model.clone());
        Ok(Bench { engine, calibration, tokenizer, name, html, json: self.json })
    }
}

impl Bench {
    /// Puts a report where it was asked for: `table` on standard output unless it is to be JSON, `html` in its file.
    fn publish(
        self,
        report: &impl Serialize,
        table: impl FnOnce(&mut dyn Write) -> io::Result<()>,
        html: impl FnOnce(&str) -> Result<String, EvalError>,
    ) -> Result<(), CliError> {
        let mut out = io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, &json!({ "model": self.name, "report": report }))?;
            writeln!(out)?;
        } else {
            writeln!(out, "{}", self.name)?;
            table(&mut out)?;
        }
        if let Some((path, mut file)) = self.html {
            let html = html(&self.name)?;
            file.write_all(html.as_bytes()).map_err(|cause| CliError::Write { path, cause })?;
        }
        Ok(())
    }
}

/// Writes cells in columns, the first of each row to the left and the others to the right.
fn table(out: &mut dyn Write, rows: &[Vec<String>]) -> io::Result<()> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:width$}"),
            _ => format!("{cell:>width$}"),
        });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}
