//! `thinkey eval ppl`: perplexity and divergence by policy.

use super::{Common, Policies, table};
use crate::cli::{CliError, progress};
use std::{io::Write, path::PathBuf};
use thinkey::eval::{
    html,
    perplexity::{self, PLANNED, PerplexityOptions},
    read_text,
    stats::Estimate,
};

/// Arguments of `thinkey eval ppl`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    policies: Policies,
    /// A text; of a .jsonl file, what its lines have under `text` or `context`
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window that are read as a prompt
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    prefix: usize,
    /// Tokens of a window that are predicted after it, one by one
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    predict: usize,
    /// Windows, taken evenly from the text
    #[arg(long, default_value_t = 16)]
    windows: usize,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let Arguments { common, policies, text, prefix, predict, windows } = arguments;
    let text = read_text(text)?;
    let mut bench = common.open()?;
    let text = bench.tokenizer.encode_plain(&text, false)?;
    let options = PerplexityOptions { prefix: *prefix, predict: *predict, windows: *windows };
    let bar = progress::counted("tokens", windows.saturating_mul(*predict));
    let mut tell = |step: perplexity::Step| {
        let doing = if step.predicted == 0 { "reading" } else { "predicting in" };
        bar.set_message(format!("{doing} window {} of {windows}", step.window + 1));
        bar.set_position((step.window * predict + step.predicted) as u64);
    };
    let text = (bench.tokenizer.prefix(), &text[..]);
    let report = perplexity::measure(
        &mut bench.engine,
        bench.calibration.as_ref(),
        text,
        &policies.policies,
        options,
        &mut tell,
    )?;
    bar.finish_and_clear();

    let table = |out: &mut dyn Write| {
        writeln!(
            out,
            "{windows} windows of a text of {} tokens: {prefix} read, {predict} predicted (± standard error over windows)\n",
            report.text,
        )?;
        let head = ["policy", "perplexity", "more", "KL to the first", "same top", "B/token", "of f16"];
        let planned = format!("at {PLANNED}");
        let head = head.into_iter().chain([planned.as_str(), "of f16", "decode/s"]);
        let mut rows = vec![head.map(String::from).collect::<Vec<_>>()];
        for row in &report.policies {
            let [at_prefix, at_planned] = row.planned;
            rows.push(vec![
                row.policy.to_string(),
                within(row.perplexity, 3),
                within(row.excess, 3),
                within(row.divergence, 5),
                format!("{:.2}%", 100.0 * row.agreement.mean),
                format!("{:.0}", at_prefix.per_token),
                format!("{:.1}%", 100.0 * at_prefix.share),
                format!("{:.0}", at_planned.per_token),
                format!("{:.1}%", 100.0 * at_planned.share),
                format!("{:.0}", row.decode_rate),
            ]);
        }
        table(out, &rows)?;
        let allocated = report.policies.iter().map(|row| row.allocated);
        let bytes: Vec<_> = allocated.map(|cache| cache.bytes.to_string()).collect();
        writeln!(out, "\nbytes allocated for {} tokens, in this order: {}", prefix + predict, bytes.join(", "))
    };
    bench.publish(&report, table, |model| html::perplexity(model, &report))
}

fn within(estimate: Estimate, decimals: usize) -> String {
    let Estimate { mean, error } = estimate;
    match error {
        Some(error) => format!("{mean:.decimals$} ± {error:.decimals$}"),
        None => format!("{mean:.decimals$}"),
    }
}
