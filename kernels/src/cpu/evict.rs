//! What tokens are evicted by: the votes of a prompt's newest queries, or the attention gathered from all of them.
//!
//! The same as [`thinkey_core::mass`] and [`thinkey_core::token`] say, on tiles of packed keys as attention has them. All of a
//! softmax is there at once, a few rows at a time, so that weights are known token by token.

use super::{
    attention::{AttentionScratch, Fused, parts, splits, step_len},
    cache::{HeadStep, ThinCache},
    gemm::{Shape, Strided, StridedMut, gemm_panel},
    loops::SimdLoops,
    pool::Pool,
    prompt::Region,
    simd::Level,
};
use crate::ops::Cache;
use std::sync::PoisonError;
use thinkey_core::{
    BLOCK, Error, HeadRef, Loops, Partial,
    attend::{self, Queries, thin_queries},
    token::snapkv::SnapKv,
};

/// Query rows whose scores are held at a time.
pub(super) const ROWS: usize = 8;

/// Floats of scratch that [`thin_queries`] takes for each of them.
const THIN: usize = 128;

/// What query rows see: tokens in regions, oldest first.
pub(super) struct Sight<'a> {
    pub(super) level: Level,
    pub(super) regions: &'a [&'a Region<'a>],
    /// First tokens that are seen whatever the window.
    pub(super) sinks: usize,
    /// Newest tokens that a query sees.
    pub(super) window: usize,
}

/// Query rows, scaled by 1/√D: as whole keys take them, [rows][D], and as thin ones do, [rows][T], with what is added to
/// these logits. The latter are empty where nothing is thin.
#[derive(Clone, Copy)]
pub(super) struct Scaled<'a> {
    pub(super) head_dim: usize,
    pub(super) whole: &'a [f32],
    pub(super) thin: &'a [f32],
    pub(super) added: &'a [f32],
}

impl Sight<'_> {
    /// Lanes of all regions, each in whole blocks.
    pub(super) fn lanes(&self) -> usize {
        self.regions.iter().map(|region| region.lanes.next_multiple_of(BLOCK)).sum()
    }

    /// Adds `share` of the attention that each row pays every lane to `mass`, lanes as [`lanes`](Self::lanes) counts them; row r
    /// is the token at `position(r)`. There are as many floats of `scores` for each row as of `mass`: they become what is added.
    pub(super) fn add(
        &self,
        queries: Scaled<'_>,
        position: impl Fn(usize) -> isize,
        share: f32,
        scores: &mut [f32],
        mass: &mut [f32],
    ) {
        let Scaled { head_dim, whole, thin, added } = queries;
        let (rows, lanes, loops) = (whole.len() / head_dim, mass.len(), SimdLoops(self.level));
        let newest = (0..rows).map(&position).max().unwrap_or(0);
        let mut start = 0;
        for region in self.regions {
            let end = (newest + 1).saturating_sub(region.position).clamp(0, region.lanes as isize) as usize;
            for first in (0..end).step_by(BLOCK) {
                let shape = Shape { m: rows, k: region.channels, n: BLOCK };
                let a = Strided { data: if region.thin { thin } else { whole }, stride: region.channels };
                let b = Strided { data: &region.keys[first * region.channels..], stride: BLOCK };
                let c = StridedMut { data: &mut scores[start + first..], stride: lanes };
                gemm_panel(self.level, shape, a, b, c, false);
            }
            if region.thin {
                for (scores, &added) in scores.chunks_exact_mut(lanes).zip(added) {
                    scores[start..start + end].iter_mut().for_each(|score| *score += added);
                }
            }
            start += region.lanes.next_multiple_of(BLOCK);
        }
        for (row, scores) in scores.chunks_exact_mut(lanes).enumerate().take(rows) {
            let (position, mut start, mut reach) = (position(row), 0, 0);
            for region in self.regions {
                let lane =
                    |position: isize| position.saturating_sub(region.position).clamp(0, region.lanes as isize) as usize;
                let (open, end) = (region.open(self.sinks), lane(position + 1));
                let first = lane(position.saturating_add(1).saturating_sub_unsigned(self.window));
                let first = first.max(open).max(region.hidden);
                let scores = &mut scores[start..start + region.lanes.next_multiple_of(BLOCK)];
                scores[open.min(end)..first.min(end)].fill(f32::NEG_INFINITY);
                scores[end..].fill(f32::NEG_INFINITY);
                if end > 0 {
                    reach = start + end.next_multiple_of(BLOCK);
                }
                start += scores.len();
            }
            let (scores, unseen) = scores.split_at_mut(reach);
            unseen.fill(0.0);
            let largest = loops.largest(scores);
            let share = share / loops.exponentials(scores, largest);
            for (mass, score) in mass.iter_mut().zip(scores) {
                *score *= share;
                *mass += *score;
            }
        }
    }
}

/// Floats of memory that [`vote`] takes, for regions of `lanes` lanes and `queries` query rows of heads of `head_dim` channels.
pub(super) const fn vote_len(lanes: usize, queries: usize, head_dim: usize) -> usize {
    queries * head_dim + ROWS * (head_dim + 1 + THIN) + (ROWS + 3) * lanes
}

/// Floats of memory that [`gather_rows`] takes.
pub(super) const fn gather_len(lanes: usize, head_dim: usize) -> usize {
    ROWS * (2 * head_dim + 1 + THIN + lanes)
}

/// Parts of a memory, one after the other.
struct Memory<'m>(&'m mut [f32]);

impl<'m> Memory<'m> {
    fn part(&mut self, floats: usize) -> Result<&'m mut [f32], Error> {
        let capacity = self.0.len();
        self.0.split_off_mut(..floats).ok_or(Error::Capacity { what: "memory of ranks", needed: floats, capacity })
    }
}

/// Ranks the tokens of a head by the pooled votes of `queries`, those of the prompt's newest tokens of each of the group's
/// heads, [W][D], unscaled. The ranks of what is stored and of the ring go to the head, those of the prompt's tokens that
/// are no sinks to `new`. Tokens that stay whole are not ranked.
///
/// Neighbours are those in the order of the cache: stored tokens, whose gaps are passed over, and apart from them those that
/// leave the ring.
///
/// # Errors
/// Where slices do not fit, or `memory` has fewer floats than [`vote_len`] says.
pub(super) fn vote<'q>(
    snapkv: &SnapKv,
    step: &mut HeadStep<'_>,
    sight: &Sight<'_>,
    queries: impl Iterator<Item = &'q [f32]> + Clone,
    memory: &mut [f32],
    new: &mut [f32],
) -> Result<(), Error> {
    let [sinks, thin, ring, own] = sight.regions else {
        return Err(Error::Length { what: "regions", expected: 4, actual: sight.regions.len() });
    };
    let (head_dim, lanes) = (own.channels, sight.lanes());
    let floats: usize = queries.clone().map(<[f32]>::len).sum();
    let (count, window) = (floats / head_dim, queries.clone().next().map_or(0, <[f32]>::len) / head_dim);
    let mut memory = Memory(memory);
    let (whole, thin_rows) = (memory.part(floats)?, memory.part(ROWS * head_dim)?);
    let (added, scratch) = (memory.part(ROWS)?, memory.part(ROWS * THIN)?);
    let (scores, mass) = (memory.part(ROWS * lanes)?, memory.part(lanes)?);
    let (line, pooled) = (memory.part(lanes)?, memory.part(lanes)?);
    let scale = 1.0 / (head_dim as f32).sqrt();
    whole.iter_mut().zip(queries.flatten()).for_each(|(scaled, &q)| *scaled = q * scale);
    mass.fill(0.0);
    let oldest = own.position + own.lanes as isize - window as isize;
    for (index, whole) in whole.chunks(ROWS * head_dim).enumerate() {
        let (rows, first) = (whole.len() / head_dim, index * ROWS);
        let thin = scaled_thin(sight.level, thin.lanes, || step.past(), whole, thin_rows, &mut added[..rows], scratch)?;
        let queries = Scaled { head_dim, whole, thin, added: &added[..rows] };
        sight.add(queries, |row| oldest + ((first + row) % window) as isize, 1.0 / count as f32, scores, mass);
    }
    let starts = [sinks, thin, ring].map(|region| region.lanes.next_multiple_of(BLOCK));
    let (thin_at, ring_at) = (starts[0], starts[0] + starts[1]);
    let own_at = ring_at + starts[2];
    let held = ring.lanes.min(step.step().thinned);
    let (sunk, leaving) = (step.step().sunk, step.step().thinned);
    let past = step.step().before;
    let (stored, waiting) = step.ranks_mut(past)?;
    let stored = &mut stored[thin.hidden..];
    snapkv.pool(&mass[thin_at + thin.hidden..][..stored.len()], stored);
    let (line, pooled) = (&mut line[..leaving], &mut pooled[..leaving]);
    line[..held].copy_from_slice(&mass[ring_at..][..held]);
    line[held..].copy_from_slice(&mass[own_at + sunk..][..leaving - held]);
    snapkv.pool(line, pooled);
    waiting[..held].copy_from_slice(&pooled[..held]);
    new.fill(0.0);
    new[..leaving - held].copy_from_slice(&pooled[held..]);
    Ok(())
}

/// `whole` query rows as the thin prefix of a head takes them, and what is added to their logits; nothing where it has none.
fn scaled_thin<'t, 'h>(
    level: Level,
    lanes: usize,
    past: impl FnOnce() -> Result<HeadRef<'h>, Error>,
    whole: &[f32],
    thin: &'t mut [f32],
    added: &mut [f32],
    scratch: &mut [f32],
) -> Result<&'t [f32], Error> {
    if lanes == 0 {
        return Ok(&[]);
    }
    let past = past()?;
    thin_queries(&SimdLoops(level), &past, whole, &mut thin[..whole.len()], added, scratch)?;
    Ok(&thin[..added.len() * past.layout().kept as usize])
}

/// Adds the attention that query head `head` of the rows of `fused`, the first of which is at `position`, pays every lane to
/// `sums`. `past` is what the cache held of the KV head before the prompt.
///
/// # Errors
/// Where slices do not fit, or `memory` has fewer floats than [`gather_len`] says.
pub(super) fn gather_rows(
    sight: &Sight<'_>,
    past: &HeadRef<'_>,
    fused: Fused<'_>,
    (head, position): (usize, usize),
    memory: &mut [f32],
    sums: &mut [f32],
) -> Result<(), Error> {
    let head_dim = fused.head_dim;
    let mut memory = Memory(memory);
    let (whole, thin) = (memory.part(ROWS * head_dim)?, memory.part(ROWS * head_dim)?);
    let (added, scratch) = (memory.part(ROWS)?, memory.part(ROWS * THIN)?);
    let scores = memory.part(ROWS * sums.len())?;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let lanes = past.span().blocks as usize;
    for (index, rows) in fused.data.chunks(ROWS * fused.stride).enumerate() {
        let (count, first) = (rows.len() / fused.stride, position + index * ROWS);
        for (row, query) in rows.chunks_exact(fused.stride).zip(whole.chunks_exact_mut(head_dim)) {
            let from = &row[head * head_dim..][..head_dim];
            query.iter_mut().zip(from).for_each(|(to, &q)| *to = q * scale);
        }
        let (whole, added) = (&whole[..count * head_dim], &mut added[..count]);
        let thin = scaled_thin(sight.level, lanes, || Ok(*past), whole, thin, added, scratch)?;
        let queries = Scaled { head_dim, whole, thin, added };
        sight.add(queries, |row| (first + row) as isize, 1.0, scores, sums);
    }
    Ok(())
}

/// Adds the attention that a step's queries have paid to the ranks of the tokens that a layer holds, those of the step
/// included. It follows [`decode`](super::attention::decode) of the same rows, whose results are still in `scratch`.
///
/// # Errors
/// Where slices do not fit.
pub fn gather(
    (pool, level): (&Pool, Level),
    cache: &mut ThinCache,
    layer: usize,
    slots: &[usize],
    fused: Fused<'_>,
    scratch: &mut AttentionScratch,
) -> Result<(), Error> {
    let Fused { heads, head_dim, .. } = fused;
    let kv_heads = cache.plan().heads();
    let group = heads / kv_heads;
    let most = splits(pool.threads(), kv_heads * slots.len());
    let (partial, len) = (Partial::len(group, head_dim), attend::attend_len(group, head_dim));
    let memory = step_len(cache.plan(), group);
    let tasks = scratch.threads(kv_heads * slots.len() * most, memory);
    let lock = |task: usize| tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
    for unit in 0..kv_heads * slots.len() {
        let head = cache.head(layer, unit % kv_heads, slots[unit / kv_heads], true)?;
        for part in 1..parts(&head, most) {
            let (first, mut other) = (lock(unit * most), lock(unit * most + part));
            other[..partial].copy_from_slice(&first[..partial]);
        }
    }
    let blocks = |head: &HeadRef<'_>, split: usize| {
        let (parts, blocks) = (parts(head, most), head.span().blocks as usize);
        (blocks * split / parts..blocks * (split + 1) / parts, parts)
    };
    pool.try_run(kv_heads * slots.len() * most, &|task| {
        let (unit, split) = (task / most, task % most);
        let head = cache.head(layer, unit % kv_heads, slots[unit / kv_heads], true)?;
        let (blocks, parts) = blocks(&head, split);
        if split >= parts {
            return Ok(());
        }
        let row = unit / kv_heads * fused.stride + unit % kv_heads * group * head_dim;
        let (expected, actual) = (row + group * head_dim, fused.data.len());
        let query = fused.data.get(row..expected).ok_or(Error::Length { what: "queries", expected, actual })?;
        let mut memory = lock(task);
        let (attended, weights) = memory.split_at_mut(len);
        let (total, scratch) = attended.split_at_mut(partial);
        let total = Partial::resume(total, group, head_dim)?;
        let loops = SimdLoops(level);
        let mut queries = Queries::new(&loops, &head, query, scratch)?;
        let (thin, ring) = weights.split_at_mut(blocks.len() * BLOCK);
        attend::prefix_weights(&loops, &head, &mut queries, blocks, &total, thin)?;
        if split + 1 == parts {
            let ring = &mut ring[..head.span().recent as usize];
            attend::ring_weights(&loops, &head, &mut queries, &total, ring)?;
        }
        Ok::<_, Error>(())
    })?;
    for unit in 0..kv_heads * slots.len() {
        let (head, slot) = (unit % kv_heads, slots[unit / kv_heads]);
        let view = cache.head(layer, head, slot, true)?;
        let (span, (_, parts)) = (view.span(), blocks(&view, 0));
        for split in 0..parts {
            let own = blocks(&cache.head(layer, head, slot, true)?, split).0;
            let memory = lock(unit * most + split);
            let weights = &memory[len..];
            let (stored, ring) = cache.ranks_mut(layer, head, slot, span)?;
            let stored = &mut stored[own.start * BLOCK..own.end * BLOCK];
            let (thin, rest) = weights.split_at(stored.len());
            stored.iter_mut().zip(thin).for_each(|(sum, weight)| *sum += weight);
            if split + 1 == parts {
                ring.iter_mut().zip(rest).for_each(|(sum, weight)| *sum += weight);
            }
        }
    }
    Ok(())
}
