//! Memory is planned before the weights are loaded: `--max-memory` and `--lambda auto`.

use super::{CliError, inspect::lambda, memory::available_bytes, options::Options};
use indicatif::HumanBytes;
use serde_json::{Value, json};
use std::{fmt, str::FromStr};
use thinkey::{
    plan::{MemoryPlan, Planner, Workload},
    policy::{CacheDesign, Calibration},
    weights::Checkpoint,
};
use thinkey_core::{Lambda, channel::dynamic::Reason};

/// λ as the command line gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LambdaChoice {
    /// This one.
    Fixed(Lambda),
    /// The smallest that fits `--max-memory`.
    Auto,
}

impl FromStr for LambdaChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { lambda(text).map(Self::Fixed) }
    }
}

/// λ as a number.
pub fn share(lambda: Lambda) -> f64 {
    f64::from(lambda.per_mille()) / 1000.0
}

/// What a model is run with, once its memory is planned.
#[derive(Clone, Debug)]
pub struct Budget {
    /// What the cache does and keeps.
    pub design: CacheDesign,
    /// Whether its λ was found.
    auto: bool,
    /// λ as what is free has settled it, and why.
    settled: Option<(Lambda, Reason)>,
    /// Bytes planned.
    planned: usize,
    /// Bytes allowed.
    allowed: Option<usize>,
}

impl Budget {
    /// Plans a sequence of `context` tokens of which at most `prompt` are fed at once; nothing is loaded yet.
    ///
    /// # Errors
    /// [`CliError::Memory`] where it does not fit `--max-memory`, [`CliError::AutoWithoutBudget`].
    pub fn plan(options: &Options, checkpoint: &Checkpoint, context: usize, prompt: usize) -> Result<Self, CliError> {
        let allowed = options.cache.max_memory();
        let choice = options.cache.lambda();
        let auto = choice == Some(LambdaChoice::Auto);
        if auto && allowed.is_none() {
            return Err(CliError::AutoWithoutBudget);
        }
        let (calibration, device) = (Calibration::find(checkpoint)?, options.model.device());
        let planner = Planner::new(checkpoint, calibration.as_ref()).on(device);
        let policy = options.cache.policy(checkpoint.config(), calibration.is_some(), device);
        let policy = match choice {
            None => policy,
            Some(LambdaChoice::Fixed(lambda)) => policy.with_lambda(lambda)?,
            // Where nothing fits, what is needed is told for the least that there is.
            Some(LambdaChoice::Auto) => match planner.largest_lambda(policy) {
                Some(lambda) => policy.with_lambda(lambda)?,
                None => policy,
            },
        };
        let workload = options.workload(context, Some(prompt), policy);
        let free = allowed.or_else(|| available_bytes(device)).unwrap_or(usize::MAX);
        let (policy, settled) = planner.settle(&workload, free)?;
        let workload = Workload { policy, ..workload };
        let Some(budget) = allowed else {
            let planned = planner.plan(&workload)?.total();
            return Ok(Self { design: planner.design(policy)?, auto, settled, planned, allowed });
        };
        let found = if auto { planner.smallest_lambda(&workload, budget) } else { None };
        let policy = found.map_or(Ok(policy), |lambda| policy.with_lambda(lambda))?;
        let plan = planner.plan(&Workload { policy, ..workload })?;
        if plan.total() > budget {
            return Err(CliError::Memory(Box::new(TooLarge::new(&planner, &workload, &plan, budget))));
        }
        let budget = Self { design: planner.design(policy)?, auto, settled, planned: plan.total(), allowed };
        if let (true, Some(allowed)) = (auto, allowed) {
            let lambda = budget.design.policy().lambda().map_or(0.0, share);
            eprintln!("thinkey: λ = {lambda} is the smallest that fits {}", HumanBytes(allowed as u64));
        }
        Ok(budget)
    }

    /// Whether λ was found and not given.
    pub fn is_auto(&self) -> bool {
        self.auto
    }

    /// Bytes planned and allowed, and why λ is what it is, where what is free has settled it.
    pub fn json(&self) -> Value {
        let settled =
            self.settled.map(|(lambda, reason)| json!({ "lambda": share(lambda), "why": reason.to_string() }));
        json!({ "planned": self.planned, "allowed": self.allowed, "settled": settled })
    }
}

/// Shown where memory is limited, as a line without an end.
impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((lambda, reason)) = self.settled {
            write!(f, "λ = {}: {reason}", share(lambda))?;
            if self.allowed.is_some() {
                writeln!(f)?;
            }
        }
        if let Some(allowed) = self.allowed {
            let (planned, allowed) = (HumanBytes(self.planned as u64), HumanBytes(allowed as u64));
            write!(f, "memory: planned {planned} of {allowed} allowed")?;
            // Where each prompt or each layer has its own, there is no λ of all.
            if let Some(lambda) = self.design.policy().lambda().map(share) {
                write!(f, ", λ = {lambda} {}", if self.auto { "chosen" } else { "given" })?;
            }
        }
        Ok(())
    }
}

/// A plan that does not fit, and the ways out. Shown as one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    needed: usize,
    allowed: usize,
    weights: usize,
    planned: usize,
    context: Option<usize>,
    lambda: Option<Lambda>,
}

impl TooLarge {
    fn new(planner: &Planner<'_>, workload: &Workload, plan: &MemoryPlan, allowed: usize) -> Self {
        Self {
            needed: plan.total(),
            allowed,
            weights: plan.weights.total(),
            planned: workload.context,
            context: planner.longest_context(workload, allowed),
            lambda: planner.smallest_lambda(workload, allowed),
        }
    }
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { needed, allowed, weights, planned, context, lambda } = *self;
        let bytes = |bytes: usize| HumanBytes(bytes as u64);
        write!(
            f,
            "{planned} tokens need {needed} bytes ({}), more than the {allowed} ({}) of --max-memory; ",
            bytes(needed),
            bytes(allowed),
        )?;
        match (context, lambda.map(share)) {
            (Some(context), Some(lambda)) => {
                write!(f, "give --context {context} for prompt and answer, --lambda {lambda}, or")?;
            }
            (Some(context), None) => {
                write!(f, "give --context {context} for prompt and answer (no --lambda is enough), or")?;
            }
            (None, Some(lambda)) => write!(f, "give --lambda {lambda} (no --context is short enough), or")?,
            (None, None) => write!(f, "no --context is short enough and no --lambda is enough: give")?,
        }
        write!(f, " a smaller model (the weights of this one take {})", bytes(weights))
    }
}
