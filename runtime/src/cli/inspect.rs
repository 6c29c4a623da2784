//! `thinkey inspect`: what a model is, and the bytes of its cache, whole and thin.

use super::CliError;
use indicatif::HumanBytes;
use serde_json::json;
use std::{collections::BTreeMap, io::Write};
use thinkey::{
    store::{DEFAULT, Store},
    text::TemplateSource,
    weights::Checkpoint,
};
use thinkey_core::{Lambda, StorageKind};

/// Arguments of `thinkey inspect`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A model in the store or a path
    #[arg(default_value = DEFAULT.id)]
    model: String,
    /// Share of key channels to prune, 0 ≤ λ < 1
    #[arg(long, default_value = "0.5", value_parser = lambda)]
    lambda: Lambda,
    /// Newest tokens kept whole
    #[arg(long, default_value_t = thinkey::model::transformer::RECENT)]
    recent: usize,
    /// Tokens to plan for [default: the model's context]
    #[arg(long)]
    context: Option<usize>,
    /// Print the whole chat template
    #[arg(long)]
    template: bool,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// λ from the command line, to the nearest thousandth.
pub fn lambda(text: &str) -> Result<Lambda, String> {
    let value: f64 = text.parse().map_err(|_| format!("λ is a number from 0 up to, not including, 1; not {text:?}"))?;
    let per_mille = (value * 1000.0).round();
    if !(0.0..1000.0).contains(&per_mille) || value < 0.0 {
        return Err(format!("λ of {text} is outside 0 ≤ λ < 1"));
    }
    // In range, see above.
    Lambda::from_per_mille(per_mille as u16).map_err(|error| error.to_string())
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let path = Store::open()?.resolve(&arguments.model)?;
    let checkpoint = Checkpoint::open(&path)?;
    let config = checkpoint.config();
    let tokens = arguments.context.unwrap_or(config.context);
    let plan = config.cache_plan(1, tokens, arguments.recent, StorageKind::F16);
    let kept = arguments.lambda.kept(config.head_dim);
    let thin = plan.bytes(|_, _| kept)?;
    let whole = plan.whole_bytes();
    let heads = config.layers * config.kv_heads;
    let (whole_token, thin_token) = (heads * config.head_dim * 4, heads * (kept + config.head_dim) * 2);
    let mut formats: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    let tensors: Vec<_> = checkpoint.tensors().collect();
    for tensor in &tensors {
        let (count, bytes) = formats.entry(tensor.format).or_default();
        *count += 1;
        *bytes += tensor.bytes;
    }
    // A tokenizer that cannot be used is worth a line here, and ends the other commands.
    let template = match checkpoint.tokenizer() {
        Ok(source) => TemplateSource::of(&source).map_err(CliError::from),
        Err(error) => Err(error.into()),
    };
    let lambda = f64::from(arguments.lambda.per_mille()) / 1000.0;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        let formats: BTreeMap<_, _> =
            formats.iter().map(|(name, (count, bytes))| (*name, json!({ "tensors": count, "bytes": bytes }))).collect();
        let mut report = json!({
            "path": path,
            "file": checkpoint.kind().to_string(),
            "architecture": config.architecture.to_string(),
            "name": config.name,
            "layers": config.layers, "width": config.width, "heads": config.heads, "kv_heads": config.kv_heads,
            "head_dim": config.head_dim, "feed_forward": config.feed_forward, "vocab": config.vocab,
            "context": config.context, "sliding_window": config.sliding_window,
            "chat_template": template.ok().flatten().map(|it| json!({ "from": it.from, "text": it.text })),
            "weights": { "bytes": checkpoint.size_bytes(), "formats": formats },
            "cache": {
                "tokens": tokens, "kind": "f16", "lambda": lambda, "kept": kept, "recent": arguments.recent,
                "bytes_per_token": { "whole": whole_token, "thin": thin_token },
                "bytes": { "whole": whole, "planned": thin.total() },
            },
        });
        if arguments.tensors {
            let list = tensors.iter().map(
                |tensor| json!({ "name": tensor.name, "shape": tensor.shape, "format": tensor.format, "bytes": tensor.bytes }),
            );
            report["tensors"] = list.collect();
        }
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{}", config.name.as_deref().unwrap_or("(no name)"))?;
    writeln!(
        out,
        "  file          {} ({}, {})",
        path.display(),
        checkpoint.kind(),
        HumanBytes(checkpoint.size_bytes())
    )?;
    writeln!(out, "  architecture  {}, {} layers of {} channels", config.architecture, config.layers, config.width)?;
    writeln!(
        out,
        "  attention     {} query heads on {} KV heads of {} channels",
        config.heads, config.kv_heads, config.head_dim
    )?;
    writeln!(out, "  feed-forward  {}", config.feed_forward)?;
    writeln!(out, "  vocabulary    {}", config.vocab)?;
    writeln!(out, "  context       {} tokens", config.context)?;
    if let Some(window) = config.sliding_window {
        writeln!(out, "  window        {window} tokens")?;
    }
    match &template {
        Ok(Some(it)) => writeln!(out, "  chat template {}, {} characters", it.from, it.text.chars().count())?,
        Ok(None) => writeln!(out, "  chat template none")?,
        Err(error) => writeln!(out, "  chat template cannot be read: {error}")?,
    }
    for (name, (count, bytes)) in &formats {
        writeln!(out, "  weights       {name}: {count} tensors, {}", HumanBytes(*bytes))?;
    }
    writeln!(
        out,
        "  cache         {whole_token} bytes a token whole, {thin_token} in the prefix at λ = {lambda} (f16, {kept} of {} channels)",
        config.head_dim
    )?;
    writeln!(
        out,
        "                {tokens} tokens: {} whole, {} planned ({:.1}%)",
        HumanBytes(whole as u64),
        HumanBytes(thin.total() as u64),
        100.0 * thin.total() as f64 / whole as f64
    )?;
    if let (true, Ok(Some(it))) = (arguments.template, &template) {
        writeln!(out, "\n{}", it.text.trim_end())?;
    }
    if arguments.tensors {
        for tensor in &tensors {
            writeln!(
                out,
                "  {:40} {:16} {:6} {}",
                tensor.name,
                format!("{:?}", tensor.shape),
                tensor.format,
                tensor.bytes
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lambda_is_read_to_the_thousandth() {
        assert_eq!(lambda("0.4").unwrap().per_mille(), 400);
        assert_eq!(lambda("0").unwrap(), Lambda::WHOLE);
        assert_eq!(lambda(".999").unwrap().per_mille(), 999);
        for bad in ["1", "-0.1", "NaN", "inf", "half", "0.9999"] {
            assert!(lambda(bad).is_err(), "{bad}");
        }
    }
}
