//! What came out.

use super::{Board, Time};
use serde::Serialize;
use std::fmt;
use thinkey::plan::{MemoryPlan, Size};

/// What a scenario came to.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The scenario.
    pub scenario: String,
    /// The board.
    pub board: Board,
    /// The model.
    pub model: String,
    /// Bytes that the system leaves.
    pub budget: Size,
    /// What each policy came to.
    pub policies: Vec<PolicyReport>,
    /// What was expected, and whether it came out.
    pub checks: Vec<Check>,
}

/// What a policy came to.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    /// As the scenario writes it.
    pub policy: String,
    /// As it was planned, where that differs: a model without calibration gives every head as many channels.
    pub planned: String,
    /// Bytes by part.
    pub parts: Parts,
    /// Bytes of the whole f16 cache of as many tokens.
    pub whole: Size,
    /// Whether all parts fit what the system leaves at first.
    pub fits: bool,
    /// The longest context that does.
    pub longest: Option<usize>,
    /// The answers, as far as they came.
    pub answers: Vec<Answer>,
    /// How the requests went over the link, where there is one.
    pub link: Option<LinkReport>,
    /// Limits that were broken.
    pub broken: Vec<Broken>,
    /// Cache and budget over time.
    pub timeline: Vec<Sample>,
}

/// The planner's numbers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Parts {
    /// Weights, mapped and converted.
    pub weights: Size,
    /// The cache, as it is allocated.
    pub cache: Size,
    /// Buffers, activations, logits and what holds them together.
    pub buffers: Size,
    /// What is not there at the same time as all others.
    pub not_at_once: Size,
    /// Most that is there at once.
    pub total: Size,
}

impl From<&MemoryPlan> for Parts {
    fn from(plan: &MemoryPlan) -> Self {
        let (weights, cache) = (plan.weights.total(), plan.cache.total());
        let buffers = plan.heap() - plan.weights.converted - cache;
        let [weights, cache, buffers, not_at_once, total] =
            [weights, cache, buffers, plan.not_at_once(), plan.total()].map(|bytes| Size(bytes as u64));
        Self { weights, cache, buffers, not_at_once, total }
    }
}

/// A request and its answer.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Answer {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens that came.
    pub tokens: usize,
    /// Tokens that were asked for, or after which it was cancelled.
    pub asked: usize,
    /// When it began.
    pub at: Time,
    /// From there to its first token, at least.
    pub first: Time,
    /// The longest time of a token after it, at least.
    pub step: Time,
    /// How often it was begun again.
    pub restarts: usize,
}

/// How the requests of a script went over a link.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LinkReport {
    /// Requests answered to the last token that was wanted.
    pub answered: usize,
    /// Requests that failed, and said so.
    pub failed: usize,
    /// Requests of which nothing came in time.
    pub lost: usize,
    /// Tokens that arrived.
    pub tokens: usize,
    /// Tokens among them that were not the ones sent.
    pub wrong: usize,
    /// Sessions that ended before their time.
    pub restarts: u32,
    /// Damaged frames.
    pub damaged: u32,
    /// Frames sent again.
    pub resent: u32,
    /// When all was said, if it was.
    pub over: Option<Time>,
}

/// A limit that was broken.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Broken {
    /// When.
    pub at: Time,
    /// Bytes that were needed.
    pub needed: Size,
    /// Bytes that there were.
    pub budget: Size,
}

/// How things stand at some time.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// When.
    pub at: Time,
    /// Tokens held.
    pub tokens: usize,
    /// Bytes of the cache that they take.
    pub held: Size,
    /// Bytes of the cache that are allocated.
    pub allocated: Size,
    /// Bytes that the budget leaves for the cache.
    pub room: Size,
}

/// Something expected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The policy that it was expected of.
    pub policy: String,
    /// What, and what came out.
    pub what: String,
    /// Whether it was met.
    pub met: bool,
}

impl Report {
    /// Whether everything expected came out.
    #[must_use]
    pub fn met(&self) -> bool {
        self.checks.iter().all(|check| check.met)
    }
}

impl PolicyReport {
    /// Tokens of all answers.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.answers.iter().map(|answer| answer.tokens).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scenario, board, model, budget, .. } = self;
        writeln!(
            f,
            "{scenario}: {model} on {}, which leaves {budget} of {} and reads {} GB/s",
            board.name, board.memory, board.bandwidth
        )?;
        for policy in &self.policies {
            let Parts { weights, cache, buffers, not_at_once, total } = policy.parts;
            write!(f, "\n{}", policy.policy)?;
            if policy.planned != policy.policy {
                write!(f, " (as {})", policy.planned)?;
            }
            writeln!(
                f,
                "\n  weights {weights}, cache {cache} of {} whole, buffers {buffers}; {not_at_once} not at once",
                policy.whole
            )?;
            let (fits, off) = if policy.fits {
                ("fits, and leaves", budget.0 - total.0)
            } else {
                ("does not fit, by", total.0 - budget.0)
            };
            write!(f, "  together {total}: {fits} {}", Size(off))?;
            match policy.longest {
                Some(tokens) => writeln!(f, "; the longest context that fits is {tokens}")?,
                None => writeln!(f, "; no context fits")?,
            }
            for Answer { prompt, tokens, asked, at, first, step, restarts } in &policy.answers {
                write!(f, "  at {at}: a prompt of {prompt} tokens, {tokens} of {asked} answered")?;
                if *tokens > 0 {
                    write!(f, "; the first after {first} at least, then one in {step} at least")?;
                }
                if *restarts > 0 {
                    write!(f, "; begun again {restarts} times")?;
                }
                writeln!(f)?;
            }
            if let Some(LinkReport { answered, failed, lost, tokens, wrong, restarts, damaged, resent, over }) =
                policy.link
            {
                write!(
                    f,
                    "  over the link: {answered} answered, {failed} failed, {lost} lost; {tokens} tokens, {wrong} wrong; "
                )?;
                write!(f, "{damaged} frames damaged, {resent} sent again, {restarts} sessions begun anew; ")?;
                match over {
                    Some(over) => writeln!(f, "over after {over}")?,
                    None => writeln!(f, "not over in time")?,
                }
            }
            for Broken { at, needed, budget } in &policy.broken {
                writeln!(f, "  at {at}: a limit is broken: {needed} are needed, and there are {budget}")?;
            }
        }
        for Check { policy, what, met } in &self.checks {
            write!(f, "\n{} {policy}: {what}", if *met { "met    " } else { "NOT MET" })?;
        }
        Ok(())
    }
}
