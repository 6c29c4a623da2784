//! `thinkey eval energy`: ranks, skew and overlap of masks, head by head; and other scores beside the exact one.

use super::{Common, table};
use crate::cli::{CliError, inspect::lambda, progress};
use std::{io::Write, path::PathBuf};
use thinkey::{
    eval::{
        energy::{self, BEST, EnergyOptions, HeadEnergy, SHARE, ScoreReport},
        html, read_text,
        stats::Estimate,
    },
    model::transformer::WINDOW,
};
use thinkey_core::{Lambda, policy::Score};

/// Arguments of `thinkey eval energy`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// A text; of a .jsonl file, what its lines have under `text` or `context`
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Prompts, taken evenly from the text
    #[arg(long, default_value_t = 8)]
    windows: usize,
    /// Newest queries of a prompt that score
    #[arg(long, default_value_t = WINDOW)]
    window: usize,
    /// Share of the channels that the compared masks prune, 0 ≤ λ < 1
    #[arg(long, default_value = "0.5", value_parser = lambda)]
    lambda: Lambda,
    /// Scores whose masks and times are compared with those of `query`
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "sample(128),sample(256),sample(512),sketch(8),sketch(16),sketch(32),l2,l1"
    )]
    scores: Vec<Score>,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let Arguments { common, text, tokens, windows, window, lambda, scores } = arguments;
    let text = read_text(text)?;
    let mut bench = common.open()?;
    let text = bench.tokenizer.encode_plain(&text, false)?;
    let options = EnergyOptions { tokens: *tokens, windows: *windows, window: *window, lambda: *lambda, scores };
    let bar = progress::counted("heads", 0).with_message("measuring");
    let mut tell = |done: usize, of: usize| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    };
    let text = (bench.tokenizer.prefix(), &text[..]);
    let report = energy::measure(&mut bench.engine, text, options, &mut tell)?;
    bar.finish_and_clear();

    let table = |out: &mut dyn Write| {
        writeln!(
            out,
            "{windows} prompts of {tokens} tokens, the newest {window} queries score; ranks are how many of {} directions hold \
             {:.0}% of the energy, masks prune λ = {}\n",
            report.head_dim,
            100.0 * SHARE,
            report.lambda,
        )?;
        let head = ["layer", "head", "rank of logits", "centred", "rank of keys"].map(String::from);
        let best = BEST.map(|best| format!("best {best}%"));
        let mut rows = vec![head.into_iter().chain(best).chain(["overlap".to_owned(), "Jaccard".to_owned()]).collect()];
        for head in &report.heads {
            rows.push(row([head.layer.to_string(), head.head.to_string()], std::slice::from_ref(head)));
        }
        rows.push(row(["mean".to_owned(), String::new()], &report.heads));
        table(out, &rows)?;
        if report.scoring.scores.is_empty() { Ok(()) } else { scoring(out, &report.scoring, report.heads.len()) }
    };
    bench.publish(&report, table, |model| html::energy(model, &report))
}

/// Scores beside the exact one, of a model with so many heads.
fn scoring(out: &mut dyn Write, report: &ScoreReport, heads: usize) -> std::io::Result<()> {
    let milliseconds = |microseconds: f64| format!("{:.2}", microseconds * heads as f64 / 1e3);
    writeln!(
        out,
        "\nscores beside the exact one: how much of its mask they find, how much of its score their mask holds, and ms for all \
         {heads} heads on one thread (a prompt is read in {:.0} ms)\n",
        report.reading_milliseconds
    )?;
    let mut rows = vec![["score", "overlap", "score held", "ms", "times as fast"].map(String::from).to_vec()];
    let whole = ["100.0%", "100.0%"].map(String::from);
    rows.push([&["query".to_owned()], &whole[..], &[milliseconds(report.microseconds), "1.000".to_owned()]].concat());
    for row in &report.scores {
        let shares = [row.overlap, row.held].map(|share| format!("{:.1}%", 100.0 * share.mean));
        let times = [milliseconds(row.microseconds), format!("{:.3}", row.faster)];
        rows.push([&[row.score.to_string()], &shares[..], &times[..]].concat());
    }
    table(out, &rows)
}

/// A row of means over `heads`.
fn row(name: [String; 2], heads: &[HeadEnergy]) -> Vec<String> {
    let mean = |of: &dyn Fn(&HeadEnergy) -> f64| Estimate::of(&heads.iter().map(of).collect::<Vec<_>>()).mean;
    let share = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{:.1}%", 100.0 * share));
    // Of all heads or of none.
    let shared = |of: &dyn Fn(&HeadEnergy) -> Option<f64>| {
        share(heads.iter().all(|head| of(head).is_some()).then(|| mean(&|head| of(head).unwrap_or_default())))
    };
    let ranks =
        [mean(&|head| head.logit_rank.mean), mean(&|head| head.centred_rank.mean), mean(&|head| head.key_rank.mean)]
            .map(|rank| format!("{rank:.1}"));
    let skew = [0, 1, 2].map(|best| share(Some(mean(&|head| head.skew[best].mean))));
    let masks = [shared(&|head| head.overlap), shared(&|head| head.jaccard)];
    name.into_iter().chain(ranks).chain(skew).chain(masks).collect()
}
