//! `thinkey calibrate`: measures once how many channels each head of a model is worth, or shows what was measured.

use super::{CliError, options::ModelOptions, progress};
use serde_json::json;
use std::{io::Write, num::NonZeroUsize, ops::ControlFlow, path::PathBuf};
use thinkey::{
    eval::{read_text, spread},
    model::ModelConfig,
    policy::{CacheDesign, Calibration, DesignError},
    weights::Checkpoint,
};
use thinkey_core::{
    Lambda,
    policy::{Choice, Policy},
};

/// Arguments of `thinkey calibrate`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The text that is read: prose of the kind that the model will see. Without it, what has been measured is shown
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Windows of the text, spread evenly over it
    #[arg(long, default_value = "8")]
    windows: NonZeroUsize,
    /// Tokens of a window
    #[arg(long, default_value = "2048")]
    tokens: NonZeroUsize,
    /// Where to write the calibration [default: beside the model, where it is found again]
    #[arg(long, value_name = "FILE", requires = "text")]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let (checkpoint, tokenizer) = arguments.model.open()?;
    let (calibration, written) = match &arguments.text {
        Some(text) => {
            let text = tokenizer.encode_plain(&read_text(text)?, false)?;
            let calibration = measure(arguments, &checkpoint, (tokenizer.prefix(), &text))?;
            let path = arguments.out.clone().unwrap_or_else(|| Calibration::path(checkpoint.path()));
            calibration.write(&path)?;
            (calibration, Some(path))
        }
        None => (Calibration::find(&checkpoint)?.ok_or(DesignError::NotCalibrated)?, None),
    };
    show(arguments.json, checkpoint.config(), &calibration, written)
}

/// Reads windows of a text: the tokens that the model expects before it, and its own.
fn measure(arguments: &Arguments, checkpoint: &Checkpoint, text: (&[u32], &[u32])) -> Result<Calibration, CliError> {
    let (count, length) = (arguments.windows.get(), arguments.tokens.get());
    let context = checkpoint.config().context;
    if length > context {
        return Err(CliError::LargeContext { planned: length, context });
    }
    let windows = spread(text, length, count, length)?;
    let mut engine = arguments.model.load(checkpoint)?;
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let bar = progress::counted("windows", count).with_message("measuring");
    let calibration = Calibration::measure(&mut engine, &windows, &mut |done| {
        bar.set_position(done as u64);
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    Ok(calibration)
}

/// Shows T by head and by layer for some λ.
fn show(
    as_json: bool,
    config: &ModelConfig,
    calibration: &Calibration,
    written: Option<PathBuf>,
) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    let mut tables = Vec::new();
    for per_mille in (300..=800).step_by(100) {
        let lambda = Lambda::from_per_mille(per_mille)?;
        let policy = Policy { choice: Choice::Calibrated { lambda, multiple: 8 }, ..Policy::FULL };
        let design = match CacheDesign::new(policy, config, Some(calibration)) {
            // Small heads have no room for every λ.
            Err(DesignError::Lambda { .. }) => continue,
            design => design?,
        };
        // A model of very many layers has no table by layer.
        let layers = calibration.layers(config, lambda, 8).ok();
        let layers = layers.map(|table| Policy { choice: Choice::Layers { table }, ..Policy::FULL }.to_string());
        tables.push((per_mille, design, layers));
    }
    let kept = |design: &CacheDesign, layer| -> Vec<usize> {
        (0..config.kv_heads).map(|head| design.kept(layer, head)).collect()
    };
    let (windows, tokens) = (calibration.windows(), calibration.tokens());
    if as_json {
        let tables = tables.iter().map(|(per_mille, design, layers)| {
            let kept: Vec<_> = (0..config.layers).map(|layer| kept(design, layer)).collect();
            json!({ "lambda": f64::from(*per_mille) / 1000.0, "kept": kept, "layers": layers })
        });
        let report =
            json!({ "path": written, "windows": windows, "tokens": tokens, "tables": tables.collect::<Vec<_>>() });
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    let wrote = written.map_or_else(|| "measured before".to_owned(), |path| format!("wrote {}", path.display()));
    writeln!(out, "{wrote}: {windows} windows of {tokens} tokens")?;
    for (per_mille, design, layers) in &tables {
        writeln!(out, "\nchannels kept at λ = {}, of {} a head", f64::from(*per_mille) / 1000.0, config.head_dim)?;
        for layer in 0..config.layers {
            let row: Vec<_> = kept(design, layer).iter().map(|kept| format!("{kept:4}")).collect();
            writeln!(out, "  layer {layer:2} {}", row.concat())?;
        }
        if let Some(layers) = layers {
            writeln!(out, "  one T a layer: {layers}")?;
        }
    }
    Ok(())
}
