//! What `thinkey eval passkey` and `thinkey eval needle` have in common.

use super::{Common, Policies, table};
use crate::cli::{CliError, progress};
use std::io::Write;
use thinkey::eval::{
    html,
    retrieval::{self, RetrievalOptions, Test},
};

/// Which prompts there are.
#[derive(clap::Args)]
pub struct Prompts {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    policies: Policies,
    /// Tokens of a prompt
    #[arg(long, value_delimiter = ',', default_value = "1024,2048,4096", value_name = "TOKENS")]
    lengths: Vec<usize>,
    /// Where the number is told, in percent of the prompt: 0 is the beginning
    #[arg(long, value_delimiter = ',', default_value = "0,25,50,75,100", value_name = "PERCENT")]
    depths: Vec<usize>,
    /// Prompts of each length and depth
    #[arg(long, default_value_t = 2)]
    trials: usize,
    /// Same seed, same prompts
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub fn run(prompts: &Prompts, name: &'static str, test: Test<'_>) -> Result<(), CliError> {
    let mut bench = prompts.common.open()?;
    let options = RetrievalOptions {
        lengths: prompts.lengths.clone(),
        depths: prompts.depths.clone(),
        trials: prompts.trials,
        seed: prompts.seed,
    };
    let bar = progress::counted("prompts", 0).with_message(name);
    let mut tell = |done: usize, of: usize| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    };
    let policies = &prompts.policies.policies;
    let report = retrieval::measure(
        &mut bench.engine,
        bench.calibration.as_ref(),
        &bench.tokenizer,
        test,
        policies,
        &options,
        &mut tell,
    )?;
    bar.finish_and_clear();

    let table = |out: &mut dyn Write| {
        let RetrievalOptions { lengths, depths, trials, .. } = &report.options;
        writeln!(out, "{name}: numbers found, of {trials} by depth and length in tokens")?;
        for row in &report.policies {
            let share = 100.0 * row.total as f64 / row.asked as f64;
            writeln!(out, "\n{}: {} of {} ({share:.0}%)", row.policy, row.total, row.asked)?;
            let head = [String::new()].into_iter().chain(lengths.iter().map(usize::to_string));
            let lines = depths.iter().zip(&row.found).map(|(depth, found)| {
                [format!("  {depth}%")].into_iter().chain(found.iter().map(usize::to_string)).collect()
            });
            table(out, &[head.collect()].into_iter().chain(lines).collect::<Vec<_>>())?;
        }
        Ok(())
    };
    bench.publish(&report, table, |model| html::retrieval(model, name, &report))
}
