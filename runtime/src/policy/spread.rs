//! Channels shared out between the heads by each prompt: `choice=adaptive` and `choice=threshold`.
//!
//! How many channels a head keeps is known only when the whole prompt has been read, so that a prompt holds the keys and
//! values of all layers until then: the planner counts them. A prompt that is too short for anything to be thinned leaves
//! every head with what was planned.

use super::measure;
use thinkey_core::{
    Error,
    channel::{
        adaptive::{self, Grid},
        norm, random, score,
        threshold::threshold,
    },
    policy::{Choice, Score},
};
use thinkey_kernels::ops::HeldHead;

/// How a session's prompts share channels out.
#[derive(Clone, Debug)]
pub(crate) struct Spread {
    choice: Choice,
    score: Score,
    /// T as planned, one a layer and head.
    planned: Vec<u16>,
}

impl Spread {
    /// That of `choice`, where it is one that each prompt decides; channels are scored by `score`, and T is `planned`
    /// where no prompt has decided.
    pub(crate) fn new(choice: Choice, score: Score, planned: Vec<u16>) -> Option<Self> {
        matches!(choice, Choice::Adaptive { .. } | Choice::Threshold { .. }).then_some(Self { choice, score, planned })
    }

    /// T as planned, one a layer and head.
    pub(crate) fn planned(&self) -> &[u16] {
        &self.planned
    }

    /// T of each head for a prompt of whose heads `each` shows what they hold, in order; the newest `recent` tokens are not
    /// thinned.
    ///
    /// # Errors
    /// Where a score is not a number.
    pub(crate) fn share(&self, recent: usize, mut each: impl FnMut(usize, &mut HeldHead)) -> Result<Vec<u16>, Error> {
        let (mut held, heads) = (HeldHead::default(), self.planned.len());
        match self.choice {
            Choice::Adaptive { lambda, minimum } => {
                let mut scores = Vec::new();
                for head in 0..heads {
                    each(head, &mut held);
                    measure::budget(&held, recent, &mut scores)?;
                }
                let grid = Grid { head_dim: held.head_dim, minimum: minimum.into(), multiple: 1 };
                let mut kept = vec![0; heads];
                adaptive::distribute(&scores, grid, lambda, &mut kept)?;
                Ok(kept)
            }
            Choice::Threshold { energy } => (0..heads)
                .map(|head| {
                    each(head, &mut held);
                    let scores = scores(self.score, head, &held)?;
                    Ok(threshold(&scores, energy, held.head_dim)?.kept() as u16)
                })
                .collect(),
            _ => Ok(self.planned.clone()),
        }
    }
}

/// Most bytes that [`Spread::share`] takes for prompts of up to `prompt` tokens of a model with so many query heads a KV
/// head, of whose newest `window` tokens the queries are held.
pub(crate) fn bytes(head_dim: usize, group: usize, heads: usize, prompt: usize, window: usize) -> usize {
    let held = 2 * prompt * head_dim + group * window.min(prompt) * head_dim;
    let budget = 2 * prompt + 2 * head_dim * head_dim + thinkey_core::channel::compensate::moments_scratch(head_dim);
    // The list of all scores doubles as it grows.
    (held + budget + 4 * head_dim + 3 * heads * head_dim) * size_of::<f32>() + 2 * heads * size_of::<u16>()
}

/// What `score` gives the channels of a head: as the cache will, and by all keys where that only estimates.
fn scores(score: Score, head: usize, held: &HeldHead) -> Result<Vec<f32>, Error> {
    let (d, tokens) = (held.head_dim, held.tokens());
    let mut scores = vec![0.0; d];
    let mut sums = vec![0.0; d];
    match score {
        Score::Query | Score::Residual | Score::Sample { .. } | Score::Sketch { .. } => {
            let (mut energy, queries) = (vec![0.0; d], held.queries.len() / d);
            score::add_energy(&held.queries, queries, d, &mut energy)?;
            score::add_energy(&held.keys, tokens, d, &mut sums)?;
            score::score(&energy, queries, &sums, tokens, &mut scores)?;
        }
        Score::L1 => {
            let rows = held.keys.chunks_exact(d);
            rows.for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.abs()));
            norm::l1(&sums, tokens, &mut scores)?;
        }
        Score::L2 => {
            score::add_energy(&held.keys, tokens, d, &mut sums)?;
            norm::l2(&sums, tokens, &mut scores)?;
        }
        Score::Random { seed } => random::random(seed, head, &mut scores),
    }
    Ok(scores)
}
