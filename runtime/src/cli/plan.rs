//! `thinkey plan`: the memory that a model takes, before it is loaded, and what fits.

use super::{
    CliError,
    budget::share,
    inspect::lambda,
    memory::available_bytes,
    options::{PolicyOptions, threads},
};
use indicatif::HumanBytes;
use serde_json::{Value, json};
use std::{
    io::{self, Write},
    num::NonZeroUsize,
};
use thinkey::{
    engine::Device,
    model::transformer::{RECENT, WINDOW},
    plan::{MemoryPlan, Planner, Size, Workload},
    policy::Calibration,
    store::{DEFAULT, Store},
    weights::Checkpoint,
};
use thinkey_core::Lambda;

/// Arguments of `thinkey plan`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A model in the store or a path
    #[arg(default_value = DEFAULT.id)]
    model: String,
    /// Show what fits this, weights included, as 2GiB or 500MB; the program itself and the tokenizer come on top
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Tokens that a sequence holds [default: the model's context]
    #[arg(long, value_name = "TOKENS")]
    context: Option<NonZeroUsize>,
    /// Most tokens that are read at once [default: the whole context]
    #[arg(long, value_name = "TOKENS")]
    prompt: Option<NonZeroUsize>,
    /// Sequences at a time
    #[arg(long, default_value = "1", value_name = "SEQUENCES")]
    batch: NonZeroUsize,
    #[command(flatten)]
    policy: PolicyOptions,
    /// Share of key channels to prune in place of the policy's, 0 ≤ λ < 1
    #[arg(long, value_parser = lambda)]
    lambda: Option<Lambda>,
    /// Newest tokens kept whole
    #[arg(long, default_value_t = RECENT)]
    recent: usize,
    /// Threads on the processor [default: all cores]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Where the model is to be computed
    #[arg(long, default_value_t)]
    device: Device,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let checkpoint = Checkpoint::open(&Store::open()?.resolve(&arguments.model)?)?;
    let config = checkpoint.config();
    let context = match arguments.context.map(NonZeroUsize::get) {
        Some(planned) if planned > config.context => {
            return Err(CliError::LargeContext { planned, context: config.context });
        }
        planned => planned.unwrap_or(config.context),
    };
    let calibration = Calibration::find(&checkpoint)?;
    let policy = arguments.policy.policy(config, calibration.is_some(), arguments.device);
    let policy = arguments.lambda.map_or(Ok(policy), |lambda| policy.with_lambda(lambda))?;
    let workload = Workload {
        context,
        prompt: arguments.prompt.map(NonZeroUsize::get),
        slots: arguments.batch.get(),
        policy,
        recent: arguments.recent,
        window: WINDOW,
        threads: threads(arguments.threads),
    };
    let planner = Planner::new(&checkpoint, calibration.as_ref()).on(arguments.device);
    let free = arguments.memory.map(|Size(bytes)| bytes as usize).or_else(|| available_bytes(arguments.device));
    let free = free.unwrap_or(usize::MAX);
    let (policy, settled) = planner.settle(&workload, free)?;
    if let Some((lambda, reason)) = settled {
        eprintln!("thinkey: λ = {}: {reason}", share(lambda));
    }
    let workload = Workload { policy, ..workload };
    let report = Report::new(&planner, workload, arguments.memory)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, &report.json(&checkpoint))?;
        writeln!(out)?;
    } else {
        report.print(&checkpoint, &mut out)?;
    }
    Ok(())
}

/// A workload, and the same with every channel kept.
struct Report {
    workload: Workload,
    thin: MemoryPlan,
    whole: MemoryPlan,
    /// Bytes of the same tokens without blocks and masks.
    whole_cache: usize,
    fit: Option<Fit>,
}

/// What fits a budget, as planned and with every channel kept.
struct Fit {
    budget: usize,
    context: [Option<usize>; 2],
    batch: [Option<usize>; 2],
    lambda: Option<Lambda>,
}

/// The parts of a plan: headings, and what is under them.
fn parts(plan: &MemoryPlan) -> [(&'static str, Vec<(&'static str, usize)>); 4] {
    let MemoryPlan { weights, cache, scratch, prompt, step, logits, upkeep, .. } = *plan;
    [
        ("weights", vec![("mapped", weights.mapped), ("converted", weights.converted)]),
        (
            "cache",
            vec![
                ("prefix keys", cache.prefix_keys),
                ("prefix values", cache.prefix_values),
                ("sinks", cache.sinks),
                ("recent tokens", cache.recent),
                ("corrections", cache.corrections),
                ("query energies", cache.energies),
                ("token ranks", cache.ranks),
                ("masks", cache.masks),
                ("page tables", cache.tables),
            ],
        ),
        (
            "prefill",
            vec![
                ("activations", prompt),
                ("chunks", scratch.chunks),
                ("packed keys and values", scratch.packed),
                ("weight panels", scratch.panels),
            ],
        ),
        (
            "decode",
            vec![("activations", step), ("attention tasks", scratch.tasks), ("logits", logits), ("upkeep", upkeep)],
        ),
    ]
}

fn sum(parts: &[(&'static str, usize)]) -> usize {
    parts.iter().map(|(_, bytes)| bytes).sum()
}

impl Report {
    fn new(planner: &Planner<'_>, workload: Workload, memory: Option<Size>) -> Result<Self, CliError> {
        let all = Workload { policy: workload.policy.with_lambda(Lambda::WHOLE)?, ..workload };
        let fit = |budget| Fit {
            budget,
            context: [&workload, &all].map(|workload| planner.longest_context(workload, budget)),
            batch: [&workload, &all].map(|workload| planner.largest_batch(workload, budget)),
            lambda: planner.smallest_lambda(&workload, budget),
        };
        let plan = planner.design(workload.policy)?.plan(workload.slots, workload.context, workload.recent);
        let (thin, whole) = (planner.plan(&workload)?, planner.plan(&all)?);
        Ok(Self {
            workload,
            thin,
            whole,
            whole_cache: plan.whole_bytes(),
            fit: memory.map(|Size(bytes)| fit(bytes as usize)),
        })
    }

    fn json(&self, checkpoint: &Checkpoint) -> Value {
        let Workload { context, prompt, slots, policy, recent, window, threads } = self.workload;
        let plan = |plan: &MemoryPlan| {
            let mut json = json!({ "total": plan.total(), "heap": plan.heap(), "not_at_once": plan.not_at_once() });
            for (heading, parts) in parts(plan) {
                let mut group = json!({ "total": sum(&parts) });
                for (name, bytes) in parts {
                    group[name.replace(' ', "_")] = bytes.into();
                }
                json[heading] = group;
            }
            json
        };
        json!({
            "model": checkpoint.config().name, "path": checkpoint.path(),
            "context": context, "prompt": prompt.unwrap_or(context).min(context), "batch": slots,
            "policy": policy.to_string(), "lambda": policy.lambda().map(share), "recent": recent, "window": window,
            "threads": threads, "keys": policy.keys.name(), "values": policy.values.name(),
            "bytes": plan(&self.thin),
            "lambda_0_bytes": plan(&self.whole),
            "whole_cache_bytes": self.whole_cache,
            "fits": self.fit.as_ref().map(|fit| json!({
                "memory": fit.budget,
                "fits": self.thin.total() <= fit.budget,
                "longest_context": fit.context[0], "largest_batch": fit.batch[0],
                "smallest_lambda": fit.lambda.map(share),
                "lambda_0": { "longest_context": fit.context[1], "largest_batch": fit.batch[1] },
            })),
        })
    }

    fn print(&self, checkpoint: &Checkpoint, out: &mut impl Write) -> io::Result<()> {
        let config = checkpoint.config();
        let Workload { context, slots, policy, recent, threads, .. } = self.workload;
        // Where each prompt or each layer has its own, there is no λ of all.
        let thin = policy.lambda().map_or_else(|| "policy".to_owned(), |lambda| format!("λ = {}", share(lambda)));
        let mut row = |name: &str, thin: String, whole: String| {
            writeln!(out, "{}", format!("{name:26} {thin:>12} {whole:>12}").trim_end())
        };
        let bytes = |bytes: usize| HumanBytes(bytes as u64).to_string();
        row(config.name.as_deref().unwrap_or("(no name)"), thin, "λ = 0".to_owned())?;
        for ((heading, thin), (_, whole)) in parts(&self.thin).into_iter().zip(parts(&self.whole)) {
            row(heading, bytes(sum(&thin)), bytes(sum(&whole)))?;
            for ((name, thin), (_, whole)) in thin.into_iter().zip(whole) {
                row(&format!("  {name}"), bytes(thin), bytes(whole))?;
            }
        }
        let apart = [&self.thin, &self.whole].map(MemoryPlan::not_at_once);
        if apart != [0, 0] {
            row("not at once", format!("-{}", bytes(apart[0])), format!("-{}", bytes(apart[1])))?;
        }
        row("total", bytes(self.thin.total()), bytes(self.whole.total()))?;
        if let Some(Fit { budget, context, batch, lambda }) = self.fit {
            let fits = |plan: &MemoryPlan| if plan.total() <= budget { "fits" } else { "too large" }.to_owned();
            let [most, [batch, batch_whole]] = [context, batch].map(|most| most.map(count));
            row("", String::new(), String::new())?;
            row(&format!("in {}", bytes(budget)), fits(&self.thin), fits(&self.whole))?;
            row("  longest context", most[0].clone(), most[1].clone())?;
            row("  largest batch", batch, batch_whole)?;
            row("  smallest λ", lambda.map_or_else(none, |lambda| share(lambda).to_string()), String::new())?;
        }
        let (cache, whole) = (self.thin.cache.total(), self.whole_cache);
        writeln!(
            out,
            "\n{slots} × {context} tokens, the newest {recent} whole, {policy}, {threads} threads; the cache is {:.1}% of {}, \
             what the same tokens take whole",
            100.0 * cache as f64 / whole as f64,
            bytes(whole),
        )
    }
}

fn count(most: Option<usize>) -> String {
    most.map_or_else(none, |most| most.to_string())
}

fn none() -> String {
    "none".to_owned()
}
