//! Bytes by part on a device with memory of its own, or where all of it is pinned.
//!
//! Everything is allocated to the byte (to 512 of them), and what is freed serves what is of the same size until it is given
//! back, which happens when shapes change: after a prompt, and before steps of another number of rows. So what comes and goes
//! takes the sum of its sizes, each as often as it is there at once, as counted here; tests compare that with what is taken.
//!
//! Where a cache is computed by plain tensors (thin values, renewed masks, channels that each prompt shares out) these come from
//! pools that cubecl grows in pages: the plan counts the largest of them and half as much again, which is an estimate.

use super::{MemoryPlan, Workload};
use crate::model::{ModelConfig, transformer::RUN};
use thinkey_core::{CacheBytes, CachePlan, Lambda, policy::Fix};
use thinkey_kernels::{cpu::ScratchBytes, format::PART};

/// Most rows that are multiplied with weights as they are stored.
const FEW: usize = 32;

/// Lines, a query head of a row each, that attend together to what a cache held before a prompt, and how many cubes do so if there
/// are not more tiles of lines.
const LINES: usize = 64;
const CUBES: usize = 256;

/// Bytes of small tables and vectors, of which each takes 512 at least.
const TABLES: usize = 256 << 10;

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
    // The last run of a prompt may be shorter, by a row, and its buffers are others.
    let last = prompt.saturating_sub(RUN).min(RUN - 1);
    let activations = |rows: usize| {
        // Normalised rows on their way, and what is added to the residual stream; projections in parts and joined; attention's
        // output; gate and up in parts and joined, and what they give.
        rows * (4 * config.width + 2 * fused + config.query_width() + 6 * config.feed_forward) * FLOAT
    };
    // Parts of weights, of which those of a matrix are alike but for the last; each twice, since products may want them turned.
    let parts = |(rows, cols): (usize, usize)| {
        let most = (PART / FLOAT / cols).max(1);
        let last = if rows > most { rows % most } else { 0 };
        2 * (rows.min(most) + last) * cols * FLOAT
    };
    let matrices = [
        (fused, config.width),
        (config.width, config.query_width()),
        (2 * config.feed_forward, config.width),
        (config.width, config.feed_forward),
    ];
    // Keys and values of a layer, and the newest queries.
    let held = (prompt * 2 * config.kv_width() + workload.window * config.query_width()) * FLOAT;
    // What a prompt that learns makes of a head, one head after the other: logits and weights of the newest queries, what
    // hides them, and keys; and what it leaves of all heads, twice, with the matrices that they are solved in.
    let (dim, group) = (config.head_dim, config.heads / config.kv_heads / plan.copies.max(1));
    let learnt = if plan.fix == Fix::Compensated {
        let logits = (4 * group + 1) * workload.window * prompt + 5 * prompt * dim;
        let left = 2 * (1 + dim + group * workload.window) * dim + 3 * dim * dim;
        (logits + plan.heads() * left) * FLOAT
    } else {
        0
    };
    // Queries made ready of rows that attend to the cache, and what shares of its tokens give. The mix of turned values comes
    // apart. In a step there are some 512 shares, or one for each row and head.
    let partial = 2 + if plan.values.turns() { 2 * dim } else { dim };
    let queries = |rows: usize| rows * config.heads * (2 * dim + 1) * FLOAT;
    let steps = (512 + slots * plan.heads()) * group * partial * FLOAT + queries(slots);
    // Of a prompt that goes on there are some 256 for each line of a tile, or one for each line.
    let shares = |rows: usize| match rows {
        0 => 0,
        _ => (LINES * (CUBES + plan.heads()) + rows * plan.heads() * group) * partial * FLOAT,
    };
    let prompts = shares(run) + queries(run) + shares(last) + queries(last);
    let plain = if plan.value_lambda != Lambda::WHOLE || plan.renews || plan.flexible {
        // Rows as they come and joined, of all layers where these are shared out together; keys and values of a head, and its
        // scores in four forms.
        let layers = if plan.flexible { plan.layers } else { 1 };
        let head = 4 * run.max(slots) * plan.tokens + 4 * plan.tokens * dim;
        (2 * layers * prompt * fused + head) * FLOAT * 3 / 2
    } else {
        0
    };
    let scratch = ScratchBytes {
        chunks: activations(run) + activations(last),
        panels: if prompt > FEW { matrices.into_iter().map(parts).sum() } else { 0 },
        packed: held + learnt + plain,
        tasks: steps.max(prompts),
    };
    let logits = |rows: usize| rows * config.vocab * FLOAT;
    MemoryPlan {
        // Nothing of them is ever given back.
        weights: super::WeightBytes { layer: weights.mapped, table: weights.mapped, ..weights },
        cache,
        scratch,
        prompt: 2 * prompt * config.width * FLOAT,
        run: 2 * run * config.width * FLOAT + scratch.prompt(),
        step: activations(slots),
        logits: logits(1) + 2 * logits(slots),
        // Which channels heads keep, and where they lie; tables of positions, rows and pages.
        upkeep: plan.layers * plan.heads() * (slots * plan.head_dim + 12) * FLOAT
            + (4 * prompt.max(slots) * 8 + slots * plan.blocks_per_slot()) * FLOAT
            + TABLES,
    }
}
