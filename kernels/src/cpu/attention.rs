//! Attention of a layer: decode over the thin cache, and exact prefill.

use super::{
    aligned::AlignedVec,
    cache::ThinCache,
    evict,
    gemm::{Shape, Strided, StridedMut, gemm_panel},
    learn,
    loops::SimdLoops,
    pool::Pool,
    prompt::{Prompt, Region, padded, past_len},
    simd::Level,
};
use crate::ops::{Cache, Heads};
use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};
use thinkey_core::{
    BLOCK, CachePlan, Error, HeadRef, Lambda, Loops, Partial,
    attend::{self, Queries, thin_queries},
    policy::Fix,
};

/// Buffers of attention; they grow to what the largest call needs and are never allocated again.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    /// One a task (decode) or thread (prefill). The locks are never contended.
    tasks: Vec<Mutex<AlignedVec>>,
}

impl AttentionScratch {
    /// Memory of at least `floats` floats for each of `count` threads.
    pub(super) fn threads(&mut self, count: usize, floats: usize) -> &[Mutex<AlignedVec>] {
        self.tasks(count, floats);
        &self.tasks
    }

    fn tasks(&mut self, count: usize, floats: usize) {
        self.tasks.reserve_exact(count.saturating_sub(self.tasks.len()));
        self.tasks.resize_with(count.max(self.tasks.len()), Mutex::default);
        for task in &mut self.tasks[..count] {
            task.get_mut().unwrap_or_else(PoisonError::into_inner).grow(floats);
        }
    }

    /// Most bytes of the buffers of tasks: of steps of up to `plan.slots` sequences and of prompts of up to `prompt` tokens,
    /// of which the newest `window` score, on `threads` threads, with `heads` query heads.
    #[must_use]
    pub fn task_bytes(threads: usize, plan: &CachePlan, heads: usize, prompt: usize, window: usize) -> usize {
        let CachePlan { head_dim, slots, .. } = *plan;
        let kv_heads = plan.heads();
        let tasks = (1..=slots).map(|slots| kv_heads * slots * splits(threads, kv_heads * slots)).max().unwrap_or(0);
        let step = AlignedVec::bytes(step_len(plan, heads / kv_heads));
        let whole = prompt + plan.sinks + plan.recent + BLOCK;
        let learns = plan.fix != Fix::None || plan.value_lambda != Lambda::WHOLE;
        let lesson = if learns { learn::len(whole, heads / kv_heads * window.min(prompt), head_dim) } else { 0 };
        let tile =
            AlignedVec::bytes(tile_len(head_dim).max(lesson).max(ranks_len(plan, heads / kv_heads, prompt, lesson)));
        // Prompts use the first buffers of the same list.
        let both = tasks.min(threads);
        both * step.max(tile)
            + (tasks - both) * step
            + (threads - both) * tile
            + tasks.max(threads) * size_of::<Mutex<AlignedVec>>()
    }
}

/// Floats that a task of a step takes: where attention is gathered, also for its weights.
pub(super) fn step_len(plan: &CachePlan, group: usize) -> usize {
    let gathers = plan.eviction.is_some_and(|eviction| eviction.gathers());
    let weights = if gathers { (plan.blocks_per_slot() + 1) * BLOCK + plan.recent } else { 0 };
    attend::attend_len(group, plan.head_dim) + weights
}

/// Most floats that a thread takes to rank the tokens of a prompt and to list those that stay, beside those of a `lesson`.
fn ranks_len(plan: &CachePlan, group: usize, prompt: usize, lesson: usize) -> usize {
    let Some(eviction) = plan.eviction else { return 0 };
    let whole = prompt + plan.sinks + plan.recent + BLOCK;
    // Each of four regions in whole blocks.
    let lanes = whole + (plan.blocks_per_slot() + 4) * BLOCK;
    let vote = evict::vote_len(lanes, group * eviction.voters().min(prompt), plan.head_dim);
    let gather = if eviction.gathers() { evict::gather_len(lanes, plan.head_dim) } else { 0 };
    gather.max(3 * whole + vote.max(lesson))
}

/// Tasks that the tokens of a KV head are split over, at most, where `units` KV heads of all sequences are at work: two
/// a thread together. More would share the work more evenly, but each begins with memory that nobody fetched in advance.
pub(super) const fn splits(threads: usize, units: usize) -> usize {
    (2 * threads).div_ceil(if units == 0 { 1 } else { units })
}

/// Floats that a [`Tile`] computes in.
const fn tile_len(head_dim: usize) -> usize {
    TILE_ROWS * (2 * head_dim + TILE_KEYS + padded(head_dim) + 3)
}

/// Where the heads of one layer lie in rows of a fused query/key/value buffer: row t is `data[t * stride ..]`, its query
/// heads from 0 on, its KV heads' keys from `keys` and their values from `values` on.
#[derive(Clone, Copy, Debug)]
pub struct Fused<'a> {
    /// The rows.
    pub data: &'a [f32],
    /// Floats from one row to the next.
    pub stride: usize,
    /// First key's offset in a row.
    pub keys: usize,
    /// First value's offset in a row.
    pub values: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
}

impl<'a> Fused<'a> {
    /// Rows that lie as `heads` says.
    #[must_use]
    pub const fn new(data: &'a [f32], heads: Heads) -> Self {
        let (stride, keys, values) = (heads.width(), heads.keys(), heads.values());
        let Heads { heads, kv_heads, head_dim } = heads;
        Self { data, stride, keys, values, heads, kv_heads, head_dim }
    }
}

/// Fewest blocks that are worth a task of their own.
const TASK_BLOCKS: usize = 8;

/// Tasks that the tokens of a head are split over, `most` at most.
pub(super) fn parts(head: &HeadRef<'_>, most: usize) -> usize {
    (head.span().blocks as usize).div_ceil(TASK_BLOCKS).clamp(1, most)
}

/// One step's attention over the thin cache, the step's own tokens included ([admitted](super::cache::HeadStep) before):
/// row r of `fused` belongs to sequence `slots[r]`; `out` is [rows, heads · D].
///
/// The work is split over KV heads and tokens, so that all threads are busy at any depth.
///
/// # Errors
/// Where slices do not fit.
pub fn decode(
    (pool, level): (&Pool, Level),
    cache: &ThinCache,
    layer: usize,
    slots: &[usize],
    fused: Fused<'_>,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) -> Result<(), Error> {
    let Fused { heads, head_dim, .. } = fused;
    let kv_heads = cache.plan().heads();
    let group = heads / kv_heads;
    let window = cache.plan().window.unwrap_or(usize::MAX);
    let most = splits(pool.threads(), kv_heads * slots.len());
    let memory = step_len(cache.plan(), group);
    scratch.tasks(kv_heads * slots.len() * most, memory);
    let tasks = &scratch.tasks;
    let view = |unit: usize| cache.head(layer, unit % kv_heads, slots[unit / kv_heads], true);
    let queries = |unit: usize| {
        let row = unit / kv_heads * fused.stride + unit % kv_heads * group * head_dim;
        fused.data.get(row..row + group * head_dim).ok_or(Error::Length {
            what: "queries",
            expected: row + group * head_dim,
            actual: fused.data.len(),
        })
    };
    let parts = |head: &HeadRef<'_>| parts(head, most);
    pool.try_run(kv_heads * slots.len() * most, &|task| {
        let (unit, split) = (task / most, task % most);
        let head = view(unit)?;
        let (parts, blocks) = (parts(&head), head.span().blocks as usize);
        if split >= parts {
            return Ok(());
        }
        let mut memory = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
        let (partial, scratch) = memory.split_at_mut(Partial::len(group, head_dim));
        let mut queries = Queries::new(&SimdLoops(level), &head, queries(unit)?, scratch)?;
        let mut partial = Partial::new(partial, group, head_dim)?;
        let part = blocks * split / parts..blocks * (split + 1) / parts;
        attend::attend_prefix(&SimdLoops(level), &head, &mut queries, part, window, &mut partial)?;
        if split + 1 == parts {
            attend::attend_whole(&SimdLoops(level), &head, &mut queries, window, &mut partial)?;
        }
        Ok::<_, Error>(())
    })?;
    for (unit, out) in out.chunks_exact_mut(group * head_dim).enumerate() {
        let parts = parts(&view(unit)?);
        let (first, others) = scratch.tasks[unit * most..][..parts].split_at_mut(1);
        let first = first[0].get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut partial = Partial::resume(first, group, head_dim)?;
        for other in others {
            let other = other.get_mut().unwrap_or_else(PoisonError::into_inner);
            partial.merge(&Partial::resume(other, group, head_dim)?)?;
        }
        partial.finish(out)?;
    }
    Ok(())
}

/// Query rows of a prefill task.
const TILE_ROWS: usize = 48;
/// Keys between two steps of the online softmax.
const TILE_KEYS: usize = 128;

/// Exact attention of the newest rows of `prompt`, those of `fused`, to the cache as it was before the step, to the rows
/// before them, and causally to each other; `out` is [rows, heads · D].
///
/// # Errors
/// Where slices do not fit.
///
/// # Panics
/// Where the prompt [holds](Prompt::hold) fewer rows.
pub fn prefill(
    (pool, level): (&Pool, Level),
    cache: &ThinCache,
    layer: usize,
    prompt: &Prompt,
    fused: Fused<'_>,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) -> Result<(), Error> {
    let Fused { heads, head_dim, stride, .. } = fused;
    let (kv_heads, copies) = (cache.plan().heads(), cache.plan().copies);
    let (group, padded, rows) = (heads / kv_heads, padded(head_dim), fused.data.len() / stride);
    let expected = rows * heads * head_dim;
    if out.len() != expected {
        return Err(Error::Length { what: "attention output", expected, actual: out.len() });
    }
    assert!(rows <= prompt.held(), "{rows} rows of {} that are held", prompt.held());
    scratch.tasks(pool.threads(), tile_len(head_dim));
    let tasks = &scratch.tasks;
    let first = cache.position(prompt.slot());
    let position = first + prompt.held() - rows;
    let CachePlan { sinks, window, .. } = *cache.plan();
    let window = window.unwrap_or(usize::MAX);
    let (mut seen, mut before) = (Vec::with_capacity(kv_heads), 0);
    for head in 0..kv_heads {
        let past = cache.head(layer, head, prompt.slot(), false)?;
        let kept = cache.packed_channels(layer, head);
        seen.push((prompt.regions((head, copies), before, past.span(), kept, first), past));
        before += past_len(&past);
    }
    let tiles = rows.div_ceil(TILE_ROWS);
    let shared = Shared { data: out.as_mut_ptr(), stride: heads * head_dim };
    pool.try_run_on_threads(kv_heads * tiles * group, &|task, thread| {
        // Head after head, whose keys stay near. The last rows see most keys: they first, so that no thread is left with
        // a long tile at the end.
        let (kv_head, task) = (task / (tiles * group), task % (tiles * group));
        let (tile, member) = (tiles - 1 - task / group, task % group);
        let first = tile * TILE_ROWS;
        let range = first..rows.min(first + TILE_ROWS);
        let head = kv_head * group + member;
        let (regions, past) = &seen[kv_head];
        let mut memory = tasks[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let tile = Tile { level, fused, head, rows: range, position, sinks, window, padded };
        let result = tile.run(regions, past, &mut memory)?;
        for (row, mix) in tile.rows.clone().zip(result.chunks_exact(padded)) {
            // SAFETY: `out` has `rows` rows of `heads` heads (checked above); this task alone writes this head's part
            // of its rows, and `out` is borrowed mutably until the run has ended.
            unsafe { shared.write(row, head * head_dim, &mix[..head_dim]) };
        }
        Ok(())
    })
}

/// The output, shared by tasks that own disjoint parts.
struct Shared {
    data: *mut f32,
    stride: usize,
}

// SAFETY: tasks write disjoint parts, see `write`.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// `row` and the columns are inside the output, and no other thread touches them.
    unsafe fn write(&self, row: usize, column: usize, values: &[f32]) {
        // SAFETY: the caller vouches for the range.
        unsafe {
            let to = self.data.add(row * self.stride + column);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
    }
}

/// The rows of one query head that a task computes.
struct Tile<'a> {
    level: Level,
    fused: Fused<'a>,
    head: usize,
    rows: Range<usize>,
    position: usize,
    /// First tokens that all rows see, beside the newest `window`.
    sinks: usize,
    window: usize,
    padded: usize,
}

impl Tile<'_> {
    /// The attention output of the rows, [rows][padded D], in `memory`.
    ///
    /// # Errors
    /// Where slices do not fit.
    fn run<'m>(&self, regions: &[Region<'_>], past: &HeadRef<'_>, memory: &'m mut [f32]) -> Result<&'m [f32], Error> {
        let (count, head_dim, padded) = (self.rows.len(), self.fused.head_dim, self.padded);
        let (whole, rest) = memory.split_at_mut(TILE_ROWS * head_dim);
        let (thin, rest) = rest.split_at_mut(TILE_ROWS * head_dim);
        let (scores, rest) = rest.split_at_mut(TILE_ROWS * TILE_KEYS);
        let (mix, rest) = rest.split_at_mut(TILE_ROWS * padded);
        let (max, rest) = rest.split_at_mut(TILE_ROWS);
        let (sum, added) = rest[..2 * TILE_ROWS].split_at_mut(TILE_ROWS);
        mix.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (row, query) in self.rows.clone().zip(whole.chunks_exact_mut(head_dim)) {
            let from = &self.fused.data[row * self.fused.stride + self.head * head_dim..][..head_dim];
            for (to, &q) in query.iter_mut().zip(from) {
                *to = q * scale;
            }
        }
        let renews = past.layout().renews;
        if past.span().blocks > 0 && !renews {
            let (whole, thin) = (&whole[..count * head_dim], &mut thin[..count * head_dim]);
            thin_queries(&SimdLoops(self.level), past, whole, thin, &mut added[..count], scores)?;
        }
        let newest = (self.position + self.rows.end) as isize - 1;
        let oldest = self.first_seen(self.rows.start);
        for region in regions {
            // Lanes that some row sees.
            let end = (newest + 1 - region.position).clamp(0, region.lanes as isize) as usize;
            let start = (oldest - region.position).clamp(0, end as isize) as usize / BLOCK * BLOCK;
            let start = if region.open(self.sinks) > 0 { 0 } else { start };
            for first in (start..end).step_by(TILE_KEYS) {
                let keys = first..end.min(first + TILE_KEYS);
                let queries = if region.thin && !renews { &*thin } else { &*whole };
                self.scores(region, queries, keys.clone(), scores);
                if region.thin && !renews {
                    for (scores, &added) in scores.chunks_exact_mut(TILE_KEYS).zip(&*added).take(count) {
                        scores[..keys.len()].iter_mut().for_each(|score| *score += added);
                    }
                }
                self.softmax(region, keys.clone(), scores, mix, max, sum);
                for column in (0..padded).step_by(BLOCK) {
                    let shape = Shape { m: count, k: keys.len(), n: BLOCK };
                    let a = Strided { data: scores, stride: TILE_KEYS };
                    let b = Strided { data: &region.values[first * padded + column..], stride: padded };
                    let c = StridedMut { data: &mut mix[column..], stride: padded };
                    gemm_panel(self.level, shape, a, b, c, true);
                }
            }
        }
        for (mix, &sum) in mix.chunks_exact_mut(padded).zip(&*sum).take(count) {
            let scale = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            mix.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(&mix[..count * padded])
    }

    /// Position of the oldest token that row `row` sees.
    fn first_seen(&self, row: usize) -> isize {
        ((self.position + row + 1).saturating_sub(self.window)) as isize
    }

    fn scores(&self, region: &Region<'_>, queries: &[f32], keys: Range<usize>, scores: &mut [f32]) {
        let start = keys.start;
        for first in keys.step_by(BLOCK) {
            let shape = Shape { m: self.rows.len(), k: region.channels, n: BLOCK };
            let a = Strided { data: queries, stride: region.channels };
            let b = Strided { data: &region.keys[first * region.channels..], stride: BLOCK };
            let c = StridedMut { data: &mut scores[first - start..], stride: TILE_KEYS };
            gemm_panel(self.level, shape, a, b, c, false);
        }
    }

    /// Turns scores into weights, one step of the online softmax.
    fn softmax(
        &self,
        region: &Region<'_>,
        keys: Range<usize>,
        scores: &mut [f32],
        mix: &mut [f32],
        max: &mut [f32],
        sum: &mut [f32],
    ) {
        for (index, row) in self.rows.clone().enumerate() {
            let scores = &mut scores[index * TILE_KEYS..][..keys.len()];
            let lane = |position: isize| {
                (position - region.position - keys.start as isize).clamp(0, keys.len() as isize) as usize
            };
            // Hidden lanes lie before the region's first token; later tokens than the row's own are not seen.
            let first = lane(self.first_seen(row).max(region.position + region.hidden as isize));
            let end = lane((self.position + row + 1) as isize).max(first);
            // Of a prompt that is still to become sinks, no row sees what comes after it.
            let open = region.open(self.sinks).clamp(keys.start, keys.end) - keys.start;
            let open = open.min(end).min(first);
            scores[end..].fill(0.0);
            let seen = if open > 0 {
                scores[open..first].fill(f32::NEG_INFINITY);
                &mut scores[..end]
            } else {
                scores[..first].fill(0.0);
                &mut scores[first..end]
            };
            let largest = SimdLoops(self.level).largest(seen).max(max[index]);
            if largest == f32::NEG_INFINITY {
                seen.fill(0.0);
                continue;
            }
            let shrink = (max[index] - largest).exp();
            if shrink != 1.0 {
                mix[index * self.padded..][..self.padded].iter_mut().for_each(|x| *x *= shrink);
            }
            sum[index] = sum[index] * shrink + SimdLoops(self.level).exponentials(seen, largest);
            max[index] = largest;
        }
    }
}
