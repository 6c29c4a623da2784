//! Bytes by part on a device with memory of its own, or where all of it is pinned.
//!
//! Weights and caches take what they are asked for, to the byte. What comes and goes (activations, parts of weights that are
//! dequantised for long prompts) comes from pools that cubecl grows in pages; it cannot be told how large these are to be on
//! CUDA, so that the plan counts what is asked for and a share for what pages hold more.

use super::{MemoryPlan, Workload};
use crate::model::{ModelConfig, transformer::RUN};
use thinkey_core::{CacheBytes, CachePlan};
use thinkey_kernels::{cpu::ScratchBytes, format::PART};

/// Query rows of a prompt that attend to its tokens at once.
const ROWS: usize = 128;

/// What pools hold more than they are asked for, as a share of it: one half.
const fn pooled(bytes: usize) -> usize {
    bytes + bytes / 2
}

/// The plan of `workload` with a cache of `plan`, of which `cache` are the bytes; `prompt` tokens are fed at once.
pub(super) fn plan(
    config: &ModelConfig,
    (weights, cache): (super::WeightBytes, CacheBytes),
    plan: &CachePlan,
    workload: &Workload,
    prompt: usize,
) -> MemoryPlan {
    const FLOAT: usize = size_of::<f32>();
    let (slots, run) = (plan.slots, prompt.min(RUN));
    let fused = config.query_width() + 2 * config.kv_width();
    let activations = |rows: usize| {
        // Normalised rows, projections, attention's output, gate and up and what they give.
        rows * (2 * config.width + 2 * fused + config.query_width() + 3 * config.feed_forward) * FLOAT
    };
    // The rows of a layer: as they come, and joined.
    let held = 2 * prompt * fused * FLOAT;
    let group = config.heads / config.kv_heads;
    // Logits, weights and what hides them, of a tile of rows and of the newest queries.
    let scores = 3 * (ROWS * group).max(workload.window * group) * prompt * FLOAT;
    // Queries made ready and shares of tokens: up to 512 of them.
    let shares = 512usize.max(slots * config.heads) * group * (config.head_dim + 2) * FLOAT;
    let queries = slots.max(ROWS) * config.heads * (2 * config.head_dim + 1) * FLOAT;
    let scratch = ScratchBytes {
        chunks: pooled(activations(run)),
        // One part is multiplied while the next is made.
        panels: pooled(if prompt > 32 { 2 * PART } else { 0 }),
        packed: pooled(held + scores),
        tasks: pooled(shares + queries),
    };
    let logits = |rows: usize| rows * config.vocab * FLOAT;
    MemoryPlan {
        // Nothing of them is ever given back.
        weights: super::WeightBytes { layer: weights.mapped, table: weights.mapped, ..weights },
        cache,
        scratch,
        prompt: pooled(2 * prompt * config.width * FLOAT),
        run: pooled(2 * run * config.width * FLOAT) + scratch.prompt(),
        step: pooled(activations(slots)),
        logits: pooled(logits(1) + logits(slots)) + logits(slots),
        // Which channels heads keep, and where they lie.
        upkeep: plan.layers * plan.heads() * (slots * plan.head_dim + 12) * FLOAT,
    }
}
