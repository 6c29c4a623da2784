//! Speed of a model on this machine: prefill by prompt length, decode by depth, beside what the memory allows.
//!
//! Everything is measured in the process that reports it, as medians over repetitions with their spread, and with the parts
//! that the time went to. Ratios to other programs need both measured side by side: `tests/peers` does that with what is
//! here.
//!
//! # What bounds decoding
//!
//! Measured by `--profile` and by `cargo bench --bench attention` on two cores of an AMD EPYC with AVX-512 (32 MiB of L3,
//! memory reads at 44 GB/s), SmolLM2-135M, λ = 0.5. At depth 0 half of a step is the feed-forward part and a fifth the
//! logits, and 70% of the bandwidth is reached. At depth 8,000 attention takes 57% of a step: in f16 it reads 139 MB in
//! 3.2 ms, which is what the memory gives. A whole step reaches 80% of the bandwidth there, with λ = 0 and 0.5 alike, so a
//! thin cache is faster by its share of the bytes and no more: values, the newest tokens and the weights stay as they are.
//! Quantised blocks are multiplied as they are, with integer products, and are bound by instructions. Scaling queries and
//! weights by the scales of the blocks' groups, and making integers of them, took more of a block's time than the products
//! when every block did it by itself; so four are done together. With AVX2 alone (an AMD EPYC without AVX-512), a block of
//! three query heads then takes 0.42 µs in int8, 0.40 in int4 and 0.38 in int2, where f16 takes 0.60.
//!
//! On two cores of an Intel Xeon with AVX-512 and VNNI that reads at 20 to 28 GB/s, shared with other machines (a loop of
//! additions runs at anything from 1.4 to 2.7 GHz there, so that only what runs in turns compares): linear layers were bound by
//! latency. A thread read Q4_1 at 6.4 to 7.5 GB/s by what the processor fetches by itself, at 11 to 13 asked for two pages
//! ahead, and then needs 65 cycles for 576 weights where memory gives them: 1.14 to 2.1 times the speed of a step at depth 0, in
//! four turns. At depth 8,000, λ = 0.5, attention now takes 58% of a step in f16, 54% in int8 and 51% in int4, for 139, 79 and 45
//! MB: 63, 33 to 40 and 25% of the bandwidth. Instructions bound int8 and int4, so that int8 comes to 3.3 and not to 4.0 times
//! llama.cpp's best (17.3 tokens a second in that run), which would leave attention two thirds of the time that it takes.
//!
//! Peak memory: a step reads all weights and the whole thin cache, which are 228 MiB at 8,000 tokens in f16, 0.72 of what
//! llama.cpp takes; so at λ = 0.5 and equal storage the process cannot come to 0.7 of it, and comes to 0.75.

use crate::{
    engine::{Engine, Session},
    model::{ModelError, Profile},
    policy::CacheDesign,
    weights::{Checkpoint, Role},
};
use serde::Serialize;
use std::{ops::ControlFlow, time::Instant};
use thinkey_core::CacheBytes;

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Prompt lengths to prefill, in tokens.
    pub prefill: Vec<usize>,
    /// Tokens in the cache when decoding begins.
    pub depths: Vec<usize>,
    /// Tokens decoded in each repetition.
    pub tokens: usize,
    /// Repetitions of everything.
    pub repetitions: usize,
}

/// Median, least and most of repeated measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; the mean of the middle two where they are even in number.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// The spread of `values`; `None` where there are none.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => (sorted.get(middle.checked_sub(1)?)? + sorted[middle]) / 2.0,
            _ => sorted[middle],
        };
        Some(Self { median, least: *sorted.first()?, most: *sorted.last()? })
    }
}

/// Prefill of one length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PrefillRow {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Tokens a second.
    pub speed: Spread,
    /// Where the time went, over all repetitions.
    pub profile: Profile,
}

/// Decode at one depth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DecodeRow {
    /// Tokens in the cache when decoding began.
    pub depth: usize,
    /// Tokens a second.
    pub speed: Spread,
    /// Bytes of weights and cache that a token reads.
    pub bytes: usize,
    /// Where the time went, over all repetitions.
    pub profile: Profile,
}

/// What can be told while it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchStep {
    /// Measuring prefill of so many tokens.
    Prefill(usize),
    /// Measuring decode at this depth.
    Decode(usize),
}

/// Measures prefill: for each length, every repetition on an empty sequence.
///
/// # Errors
/// [`ModelError`] where a length does not fit the plan.
pub fn prefill(
    engine: &mut Engine,
    session: &mut Session,
    options: &BenchOptions,
    progress: &mut dyn FnMut(BenchStep),
) -> Result<Vec<PrefillRow>, ModelError> {
    let vocab = engine.config().vocab;
    let mut rows = Vec::with_capacity(options.prefill.len());
    for &tokens in &options.prefill {
        let prompt: Vec<u32> = (0..tokens).map(|at| token(at, vocab)).collect();
        let mut speeds = Vec::with_capacity(options.repetitions);
        engine.take_profile();
        for _ in 0..options.repetitions {
            progress(BenchStep::Prefill(tokens));
            session.clear(0);
            let start = Instant::now();
            engine.prefill(session, 0, &prompt, &mut |_, _| ControlFlow::Continue(()))?;
            speeds.push(tokens as f64 / start.elapsed().as_secs_f64());
        }
        let profile = engine.take_profile();
        rows.extend(Spread::of(&speeds).map(|speed| PrefillRow { tokens, speed, profile }));
    }
    session.clear(0);
    Ok(rows)
}

/// Measures decode at each depth, deepest last: the sequence grows from one to the next.
///
/// # Errors
/// [`ModelError`] where a depth does not fit the plan.
pub fn decode(
    engine: &mut Engine,
    session: &mut Session,
    checkpoint: &Checkpoint,
    design: &CacheDesign,
    options: &BenchOptions,
    progress: &mut dyn FnMut(BenchStep),
) -> Result<Vec<DecodeRow>, ModelError> {
    let vocab = engine.config().vocab;
    let weights = weight_bytes(checkpoint)?;
    let mut depths = options.depths.clone();
    depths.sort_unstable();
    depths.dedup();
    session.clear(0);
    let mut rows = Vec::with_capacity(depths.len());
    for depth in depths {
        // Where the repetitions at the last depth went past this one, it begins anew.
        if session.position(0) > depth {
            session.clear(0);
        }
        let held = session.position(0);
        if depth > held {
            progress(BenchStep::Prefill(depth - held));
            let filling: Vec<u32> = (held..depth).map(|at| token(at, vocab)).collect();
            engine.prefill(session, 0, &filling, &mut |_, _| ControlFlow::Continue(()))?;
        }
        let mut speeds = Vec::with_capacity(options.repetitions);
        engine.take_profile();
        for _ in 0..options.repetitions {
            progress(BenchStep::Decode(depth));
            let start = Instant::now();
            for at in 0..options.tokens {
                // As a greedy reply does.
                engine.decode_best(session, &[0], &[token(at, vocab)], 1)?;
            }
            speeds.push(options.tokens as f64 / start.elapsed().as_secs_f64());
        }
        let profile = engine.take_profile();
        let bytes = weights + cache_bytes(session, design, depth)?;
        rows.extend(Spread::of(&speeds).map(|speed| DecodeRow { depth, speed, bytes, profile }));
    }
    session.clear(0);
    Ok(rows)
}

/// Tokens that the cache of a session for [`prefill`] and [`decode`] must hold.
#[must_use]
pub fn tokens_needed(options: &BenchOptions) -> usize {
    let deepest = options.depths.iter().max().map_or(0, |depth| depth + options.tokens * options.repetitions);
    options.prefill.iter().copied().max().unwrap_or(0).max(deepest).max(1)
}

/// A token of no meaning: every one of the vocabulary comes up.
fn token(at: usize, vocab: usize) -> u32 {
    (at.wrapping_mul(7919).wrapping_add(13) % vocab) as u32
}

/// Bytes of weights that a decode step reads: all, but of an embedding table that is not the output head too only a row.
fn weight_bytes(checkpoint: &Checkpoint) -> Result<usize, ModelError> {
    let all: u64 = checkpoint.tensors().map(|tensor| tensor.bytes).sum();
    let all = usize::try_from(all).unwrap_or(usize::MAX);
    if checkpoint.config().tied_embeddings {
        return Ok(all);
    }
    Ok(all.saturating_sub(checkpoint.matrix(Role::TokenEmbedding)?.bytes().len()))
}

/// Bytes of keys and values that a step at `depth` reads.
fn cache_bytes(session: &Session, design: &CacheDesign, depth: usize) -> Result<usize, ModelError> {
    let mut plan = *session.plan();
    plan.slots = 1;
    plan.tokens = depth.max(1);
    let CacheBytes { prefix_keys, prefix_values, recent, sinks, corrections, .. } =
        plan.bytes(|layer, head| design.kept(layer, head))?;
    let whole = plan.whole_bytes();
    Ok((prefix_keys + prefix_values + recent + sinks + corrections).min(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).map(|spread| spread.median), Some(2.5));
        assert_eq!(Spread::of(&[]), None);
    }
}
