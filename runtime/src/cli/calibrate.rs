//! `thinkey calibrate`: measures once how many channels each head of a model is worth.

use super::{CliError, options::ModelOptions, progress};
use serde_json::json;
use std::{io::Write, num::NonZeroUsize, ops::ControlFlow, path::PathBuf};
use thinkey::{
    eval::{read_text, spread},
    policy::{CacheDesign, Calibration},
};
use thinkey_core::{
    Lambda,
    policy::{Choice, Policy},
};

/// Arguments of `thinkey calibrate`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The text that is read: prose of the kind that the model will see
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Windows of the text, spread evenly over it
    #[arg(long, default_value = "8")]
    windows: NonZeroUsize,
    /// Tokens of a window
    #[arg(long, default_value = "2048")]
    tokens: NonZeroUsize,
    /// Where to write the calibration [default: beside the model, where it is found again]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let (checkpoint, tokenizer) = arguments.model.open()?;
    let text = tokenizer.encode_plain(&read_text(&arguments.text)?, false)?;
    let (count, length) = (arguments.windows.get(), arguments.tokens.get());
    let context = checkpoint.config().context;
    if length > context {
        return Err(CliError::LargeContext { planned: length, context });
    }
    let windows = spread((tokenizer.prefix(), &text), length, count, length)?;
    let mut engine = arguments.model.load(&checkpoint)?;
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let bar = progress::counted("windows", count).with_message("measuring");
    let calibration = Calibration::measure(&mut engine, &windows, &mut |done| {
        bar.set_position(done as u64);
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    let path = arguments.out.clone().unwrap_or_else(|| Calibration::path(checkpoint.path()));
    calibration.write(&path)?;

    let config = checkpoint.config();
    let mut out = std::io::stdout().lock();
    let mut tables = Vec::new();
    for per_mille in (300..=800).step_by(100) {
        let lambda = Lambda::from_per_mille(per_mille)?;
        let policy = Policy { choice: Choice::Calibrated { lambda, multiple: 8 }, ..Policy::FULL };
        tables.push((per_mille, CacheDesign::new(policy, config, Some(&calibration))?));
    }
    let kept = |design: &CacheDesign, layer| -> Vec<usize> {
        (0..config.kv_heads).map(|head| design.kept(layer, head)).collect()
    };
    if arguments.json {
        let tables = tables.iter().map(|(per_mille, design)| {
            let kept: Vec<_> = (0..config.layers).map(|layer| kept(design, layer)).collect();
            json!({ "lambda": f64::from(*per_mille) / 1000.0, "kept": kept })
        });
        let report = json!({ "path": path, "windows": count, "tokens": length, "tables": tables.collect::<Vec<_>>() });
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "wrote {}: {count} windows of {length} tokens", path.display())?;
    for (per_mille, design) in &tables {
        writeln!(out, "\nchannels kept at λ = {}, of {} a head", f64::from(*per_mille) / 1000.0, config.head_dim)?;
        for layer in 0..config.layers {
            let row: Vec<_> = kept(design, layer).iter().map(|kept| format!("{kept:4}")).collect();
            writeln!(out, "  layer {layer:2} {}", row.concat())?;
        }
    }
    Ok(())
}
