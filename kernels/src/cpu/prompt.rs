//! What a prompt attends to in the layer at hand: keys and values of every KV head, packed as tiles read them.
//!
//! A prompt goes through a layer in runs of rows, so that nothing but keys and values is ever there for all of its
//! tokens. Each run [leaves its own](Prompt::hold) here, attends to everything that is here by then, and the last one is
//! followed by [admission](Prompt::admit), which thins from here into the cache, or into several. The newest queries stay
//! beside the keys for it, since they score.

use super::{
    aligned::AlignedVec,
    attention::{AttentionScratch, Fused},
    cache::{HeadStep, ThinCache},
    evict::{self, Sight},
    learn::{self, Lesson},
    pool::Pool,
    simd::{LANES, Level},
};
use crate::ops::{Cache, Heads, HeldHead};
use std::sync::{Mutex, PoisonError};
use thinkey_core::{
    BLOCK, CachePlan, Error, HeadLayout, HeadRef, Kept, KeyOrder, Rows, Span, policy::Score, token::Eviction,
};

/// Keys and values of a layer that a prompt attends to: of what the cache held before the prompt, and of the prompt's
/// own tokens so far.
///
/// First come the new tokens of all KV heads, each with its keys, `[block][D][32]`, and its values, `[token][padded D]`;
/// they are in the same place in every layer. What is held of the past follows, head after head of the cache and as long as
/// the layer's heads are thick.
#[derive(Debug)]
pub struct Prompt {
    slot: usize,
    /// How heads lie in fused rows.
    heads: Heads,
    /// As the cache has them that it attends to.
    cached: Heads,
    /// Tokens of the prompt.
    rows: usize,
    /// Those of the layer at hand that are here.
    held: usize,
    packed: AlignedVec,
    /// Tokens whose queries are kept, the newest.
    window: usize,
    /// [query head][window][D].
    queries: AlignedVec,
    /// Attention that each lane has got from all rows of the layer so far, [query head][lanes]; empty where nobody asks.
    gathered: AlignedVec,
}

/// A run of keys that a KV head's queries see: keys [block][channels][32], values [token][padded D].
pub(super) struct Region<'a> {
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) channels: usize,
    /// Lanes, hidden ones included.
    pub(super) lanes: usize,
    /// Lanes at the front that are no tokens.
    pub(super) hidden: usize,
    /// Position of lane 0; negative where hidden lanes come before the first token of all.
    pub(super) position: isize,
    pub(super) thin: bool,
}

impl Region<'_> {
    /// Lanes, from the first on, that are among the sequence's first `sinks` tokens.
    pub(super) fn open(&self, sinks: usize) -> usize {
        // Hidden lanes of the thin prefix lie where sinks would.
        let open = if self.thin { 0 } else { sinks as isize - self.position };
        open.clamp(0, self.lanes as isize) as usize
    }
}

/// Channels of a packed value, in whole pairs of vectors.
pub(super) const fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(2 * LANES)
}

/// Channels and lanes of what the cache held of a head: the sinks, the thin prefix, then the ring.
const fn past(span: Span, kept: usize, head_dim: usize) -> [(usize, usize); 3] {
    [
        (head_dim, (span.sinks as usize).next_multiple_of(BLOCK)),
        (kept, span.blocks as usize * BLOCK),
        (head_dim, (span.recent as usize).next_multiple_of(BLOCK)),
    ]
}

/// Floats of regions together.
fn packed_len(regions: &[(usize, usize)], head_dim: usize) -> usize {
    regions.iter().map(|&(channels, lanes)| lanes * (channels + padded(head_dim))).sum()
}

impl Prompt {
    /// Memory for a prompt of `rows` tokens to the sequence of `slot` of `cache`, whose step has begun; the queries of the
    /// newest `window` are kept.
    #[must_use]
    pub fn new(cache: &ThinCache, slot: usize, rows: usize, window: usize, heads: Heads) -> Self {
        let (span, cached) = (cache.span(slot), heads.cached(cache.plan()));
        let layers = 0..cache.plan().layers;
        // At once and for the thickest layer: to grow would be to have old and new at a time.
        let past = layers.map(|layer| {
            let kept = |head| cache.packed_channels(layer, head);
            let head = |head| packed_len(&past(span, kept(head), heads.head_dim), heads.head_dim);
            (0..cached.kv_heads).map(head).sum::<usize>()
        });
        let floats = past.max().unwrap_or(0) + heads.kv_heads * Self::own(rows, heads.head_dim);
        let window = window.min(rows);
        let queries = AlignedVec::zeros(heads.heads * window * heads.head_dim);
        Self {
            slot,
            heads,
            cached,
            rows,
            held: 0,
            packed: AlignedVec::zeros(floats),
            window,
            queries,
            gathered: AlignedVec::zeros(0),
        }
    }

    /// Floats of the new tokens of a head.
    fn own(rows: usize, head_dim: usize) -> usize {
        packed_len(&[(head_dim, rows.next_multiple_of(BLOCK))], head_dim)
    }

    /// Most bytes for a prompt of up to `prompt` tokens, of the newest `window` of which the queries of `heads` query heads
    /// are kept; the most channels that a head of the cache keeps are `kept`.
    ///
    /// A token costs least in the prefix, so it is most with as many new ones as there may be. What rounding to blocks
    /// adds is counted in full, which is at most 64 tokens more than any split of them takes.
    #[must_use]
    pub fn bytes(plan: &CachePlan, heads: usize, kept: usize, prompt: usize, window: usize) -> usize {
        let kept = if plan.renews { plan.head_dim } else { kept };
        let (whole, thin) = (plan.head_dim + padded(plan.head_dim), kept + padded(plan.head_dim));
        // Copies of a KV head may hold a token for more than it takes new.
        let past = if plan.copies > 1 { plan.tokens } else { plan.tokens.saturating_sub(prompt) };
        let blocks = HeadLayout::blocks_for(past, plan.recent).min(plan.blocks_per_slot());
        let recent = past.min(plan.recent + BLOCK).next_multiple_of(BLOCK);
        let sinks = past.min(plan.sinks).next_multiple_of(BLOCK);
        let (new, lanes) = (prompt.next_multiple_of(BLOCK), sinks + recent + 2 * BLOCK);
        AlignedVec::bytes(plan.kv_heads * new * whole + plan.heads() * (lanes * whole + blocks * BLOCK * thin))
            + AlignedVec::bytes(heads * window.min(prompt) * plan.head_dim)
            + match plan.eviction {
                Some(eviction) if eviction.gathers() => AlignedVec::bytes(heads * (new + lanes + blocks * BLOCK)),
                _ => AlignedVec::bytes(0),
            }
    }

    /// The slot of the sequence.
    #[must_use]
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// How the heads lie in a row.
    #[must_use]
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Tokens of the prompt that the layer at hand has so far.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Takes the keys and values of the next rows of the prompt in `layer`, and those of their queries that score channels;
    /// rows after the prompt's last are the first of the next layer. The first rows of a layer also bring what the cache
    /// holds of the past.
    ///
    /// # Errors
    /// Where slices do not fit.
    ///
    /// # Panics
    /// Where the rows are more than the prompt has, follow others that were no whole number of blocks, or are shorter
    /// than their heads.
    pub fn hold(&mut self, pool: &Pool, cache: &ThinCache, layer: usize, fused: Fused<'_>) -> Result<(), Error> {
        /// Blocks of a task.
        const RUN: usize = 4;
        if self.held == self.rows {
            self.held = 0;
        }
        let Self { slot, heads, cached, rows, held, ref mut packed, window, ref mut queries, .. } = *self;
        let (Heads { kv_heads, head_dim, .. }, padded) = (heads, padded(heads.head_dim));
        let count = fused.data.len() / fused.stride;
        assert!(held.is_multiple_of(BLOCK) && held + count <= rows, "{count} rows after {held} of {rows}");
        let unseen = rows - window;
        for (row, data) in (held..).zip(fused.data.chunks_exact(fused.stride)).skip(unseen.saturating_sub(held)) {
            for (head, query) in data[..heads.keys()].chunks_exact(head_dim).enumerate() {
                queries[(head * window + row - unseen) * head_dim..][..head_dim].copy_from_slice(query);
            }
        }
        let (own, past) = packed.split_at_mut(kv_heads * Self::own(rows, head_dim));
        if held == 0 {
            pack_past(pool, cache, layer, slot, cached, past)?;
        }
        let lanes = rows.next_multiple_of(BLOCK);
        let blocks = own.chunks_exact_mut(Self::own(rows, head_dim)).enumerate().flat_map(|(head, own)| {
            let (keys, values) = own.split_at_mut(lanes * head_dim);
            let (keys, values) = (&mut keys[held * head_dim..], &mut values[held * padded..]);
            keys.chunks_mut(RUN * BLOCK * head_dim)
                .zip(values.chunks_mut(RUN * BLOCK * padded))
                .zip(fused.data.chunks(RUN * BLOCK * fused.stride))
                .map(move |blocks| (head, blocks))
        });
        let work = Mutex::new(blocks);
        pool.run(kv_heads * count.div_ceil(RUN * BLOCK), &|_| {
            let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((head, ((keys, values), rows))) = next else { return };
            let at = head * head_dim;
            for ((token, row), value) in rows.chunks(fused.stride).enumerate().zip(values.chunks_exact_mut(padded)) {
                value[..head_dim].copy_from_slice(&row[fused.values + at..][..head_dim]);
                put_key(keys, token, &row[fused.keys + at..][..head_dim]);
            }
        });
        self.held += count;
        Ok(())
    }

    /// Lanes of all regions that the prompt's rows see, the last of which has room for all of them.
    fn lanes(&self, span: Span) -> usize {
        let past: usize = past(span, 0, 0).iter().map(|&(_, lanes)| lanes).sum();
        past + self.rows.next_multiple_of(BLOCK)
    }

    /// Gathers the attention that the newest rows, those of `fused`, pay every token that they see: for caches that evict by
    /// it. It follows [`hold`](Self::hold) of the same rows, `cache` being as there.
    ///
    /// # Errors
    /// Where slices do not fit.
    pub fn gather(
        &mut self,
        (pool, level): (&Pool, Level),
        cache: &ThinCache,
        layer: usize,
        fused: Fused<'_>,
        scratch: &mut AttentionScratch,
    ) -> Result<(), Error> {
        let (Heads { heads, kv_heads, head_dim }, copies) = (self.cached, cache.plan().copies);
        let (span, first) = (cache.span(self.slot), cache.position(self.slot));
        let lanes = self.lanes(span);
        let mut gathered = std::mem::take(&mut self.gathered);
        gathered.grow(heads * lanes);
        let count = fused.data.len() / fused.stride;
        if self.held == count {
            gathered.fill(0.0);
        }
        let (mut seen, mut before) = (Vec::with_capacity(kv_heads), 0);
        for head in 0..kv_heads {
            let past = cache.head(layer, head, self.slot, false)?;
            seen.push((self.regions((head, copies), before, span, cache.packed_channels(layer, head), first), past));
            before += past_len(&past);
        }
        let CachePlan { sinks, window, .. } = *cache.plan();
        let window = window.unwrap_or(usize::MAX);
        let position = first + self.held - count;
        let tasks = scratch.threads(pool.threads(), evict::gather_len(lanes, head_dim));
        let sums = Mutex::new(gathered[..heads * lanes].chunks_exact_mut(lanes).enumerate());
        pool.try_run_on_threads(heads, &|_, thread| {
            let next = sums.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((head, sums)) = next else { return Ok(()) };
            let (regions, past) = &seen[head / (heads / kv_heads)];
            let sight = Sight { level, regions: &regions.each_ref(), sinks, window };
            let mut memory = tasks[thread].lock().unwrap_or_else(PoisonError::into_inner);
            evict::gather_rows(&sight, past, fused, (head, position), &mut memory, sums)
        })?;
        drop(seen);
        self.gathered = gathered;
        Ok(())
    }

    /// Ranks the tokens of head `head` of `heads` that compete for a place, those of `regions`, for `step`: the prompt's that are no
    /// sinks in `new`, the others in the head.
    fn rank(
        &self,
        level: Level,
        (heads, head, eviction): (Heads, usize, Eviction),
        step: &mut HeadStep<'_>,
        regions: &[Region<'_>; 4],
        memory: &mut [f32],
        new: &mut [f32],
    ) -> Result<(), Error> {
        let (span, sunk) = (step.step().before, step.step().sunk);
        match eviction {
            Eviction::SnapKv(_) if step.step().thinned == 0 => {
                new.fill(0.0);
                Ok(())
            }
            Eviction::SnapKv(snapkv) => {
                let sinks = span.sinks as usize + sunk;
                let sight = Sight { level, regions: &regions.each_ref(), sinks, window: usize::MAX };
                let voters = self.queries(heads, head, snapkv.window.min(self.rows));
                evict::vote(&snapkv, step, &sight, voters, memory, new)
            }
            Eviction::H2o(_) => {
                let (group, lanes) = (heads.group(), self.lanes(span));
                let [(_, sinks), (_, thin), (_, ring)] = past(span, 0, 0);
                let sums = self.gathered.get(head * group * lanes..(head + 1) * group * lanes);
                let what = "attention gathered";
                let (expected, actual) = ((head + 1) * group * lanes, self.gathered.len());
                let sums = sums.ok_or(Error::Length { what, expected, actual })?;
                let (stored, waiting) = step.ranks_mut(span)?;
                new.fill(0.0);
                for sums in sums.chunks_exact(lanes) {
                    let sums = &sums[sinks..];
                    stored.iter_mut().zip(sums).for_each(|(rank, sum)| *rank += sum);
                    waiting.iter_mut().zip(&sums[thin..]).for_each(|(rank, sum)| *rank += sum);
                    new.iter_mut().zip(&sums[thin + ring + sunk..]).for_each(|(rank, sum)| *rank += sum);
                }
                Ok(())
            }
        }
    }

    /// The queries of the newest `count` tokens, of those that are kept, of each query head of head `head` of `heads`.
    fn queries(&self, heads: Heads, head: usize, count: usize) -> impl Iterator<Item = &[f32]> + Clone {
        let (window, head_dim, group) = (self.window, heads.head_dim, heads.group());
        let members = self.queries[head * group * window * head_dim..].chunks_exact((window * head_dim).max(1));
        members.take(group).map(move |member| &member[(window - count) * head_dim..])
    }

    /// Admits the prompt to `layer` of a cache, all of whose rows are here. `scratch` has memory for each thread.
    ///
    /// # Errors
    /// Where slices do not fit, or a score is NaN.
    ///
    /// # Panics
    /// Where rows are missing, or fewer queries were kept than the cache scores by.
    pub fn admit(
        &self,
        (pool, level): (&Pool, Level),
        cache: &mut ThinCache,
        layer: usize,
        scratch: &mut AttentionScratch,
    ) -> Result<(), Error> {
        let Self { slot, rows, held, ref packed, .. } = *self;
        // Not those of the prompt: a cache that shares it may have others.
        let heads = self.heads.cached(cache.plan());
        let (head_dim, group, copies) = (heads.head_dim, heads.group(), cache.plan().copies);
        assert_eq!(held, rows, "rows of the layer");
        let scoring = cache.window().min(rows);
        let counting = cache.queries().min(rows);
        assert!(counting <= self.window, "{counting} queries score or vote, and {} are kept", self.window);
        let CachePlan { sinks, window, eviction, .. } = *cache.plan();
        let (span, position) = (cache.span(slot), cache.position(slot));
        let thinned = cache.step(slot).map_or(0, |step| step.thinned);
        let kept: Vec<usize> = (0..heads.kv_heads).map(|head| cache.packed_channels(layer, head)).collect();
        let steps = cache.steps(layer, slot).map(|step| step.map(Mutex::new)).collect::<Result<Vec<_>, _>>()?;
        let lock = |head: usize| steps[head].lock().unwrap_or_else(PoisonError::into_inner);
        let lesson = learn::len(span.sinks as usize + span.recent as usize + rows, group * scoring, head_dim);
        let asks = |step: &HeadStep<'_>| step.asks_moments() || step.asks_values();
        let learns = (0..steps.len()).any(|head| asks(&lock(head)));
        let lesson = if learns { lesson } else { 0 };
        let floats = match eviction {
            Some(eviction) => {
                let voters = group * eviction.voters().min(rows);
                // Ranks of new tokens, then two lists.
                rows + 2 * thinned + lesson.max(evict::vote_len(self.lanes(span), voters, head_dim))
            }
            None => lesson,
        };
        let memory = scratch.threads(pool.threads(), floats);
        pool.try_run_on_threads(steps.len(), &|head, thread| {
            let (keys, values) = own(packed, rows, head_dim, head / copies);
            let kv = Rows { keys, order: KeyOrder::Blocks, values, stride: padded(head_dim) };
            let queries = || self.queries(heads, head, scoring);
            // The locks are never contended: they are what makes the access safe.
            let mut step = lock(head);
            step.add_queries(queries().map(|queries| (queries, scoring, head_dim)))?;
            let before = kept[..head].iter().map(|&kept| packed_len(&past(span, kept, head_dim), head_dim)).sum();
            let regions = self.regions((head, copies), before, span, kept[head], position);
            let mut memory = memory[thread].lock().unwrap_or_else(PoisonError::into_inner);
            let mut memory = &mut memory[..];
            let mut stay = (Kept::ALL, &[][..]);
            if let Some(eviction) = eviction {
                let (new, rest) = memory.split_at_mut(rows - step.step().sunk);
                let (lists, rest) = rest.split_at_mut(2 * step.step().thinned);
                self.rank(level, (heads, head, eviction), &mut step, &regions, rest, new)?;
                let (tokens, lanes) = bytemuck::cast_slice_mut(lists).split_at_mut(step.step().thinned);
                stay = (step.keep(new, tokens, lanes)?, new);
                memory = rest;
            }
            if !asks(&step) {
                return step.admit(group, kv, None, stay);
            }
            let [first, _, ring, own] = regions;
            let lesson = Lesson {
                level,
                queries: queries(),
                regions: [&first, &ring, &own],
                sinks,
                thinned: step.step().thinned,
                window: window.unwrap_or(usize::MAX),
                kept: (step.step().evicted > 0).then_some(stay.0.tokens),
                moments: step.asks_moments(),
                choose: (step.score() == Score::Residual).then_some(step.layout().kept.into()),
                values: step.asks_values().then_some(step.layout().kept_values as usize),
            };
            step.admit(group, kv, Some(lesson.run(head_dim, memory)?), stay)
        })
    }

    /// Copies what is here of KV head `head`, in rows.
    ///
    /// # Panics
    /// Where rows are missing.
    pub fn read(&self, head: usize, out: &mut HeldHead) {
        let Self { heads: Heads { head_dim, .. }, rows, held, window, ref packed, .. } = *self;
        assert_eq!(held, rows, "rows of the layer");
        let (keys, values) = own(packed, rows, head_dim, head);
        (out.head_dim, out.window) = (head_dim, window);
        out.keys.resize(rows * head_dim, 0.0);
        for (token, key) in out.keys.chunks_exact_mut(head_dim).enumerate() {
            let block = &keys[token / BLOCK * BLOCK * head_dim..];
            key.iter_mut().enumerate().for_each(|(channel, x)| *x = block[channel * BLOCK + token % BLOCK]);
        }
        out.values.clear();
        values.chunks_exact(padded(head_dim)).take(rows).for_each(|value| out.values.extend(&value[..head_dim]));
        out.queries.clear();
        self.queries(self.heads, head, window).for_each(|queries| out.queries.extend(queries));
    }

    /// What the queries of head `head` of the cache, which has so many copies of a KV head, see, whose cache before the prompt has `span`: sinks, thin prefix with `kept`
    /// channels, ring, and the new tokens so far. `before` are the floats that the heads before it take of the past.
    pub(super) fn regions(
        &self,
        (head, copies): (usize, usize),
        before: usize,
        span: Span,
        kept: usize,
        position: usize,
    ) -> [Region<'_>; 4] {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        let padded = padded(head_dim);
        let rest = &self.packed[kv_heads * Self::own(self.rows, head_dim) + before..];
        let past = past(span, kept, head_dim);
        let mut rest = rest;
        let [sinks, thin, ring] = past.map(|(channels, lanes)| {
            let (part, tail) = rest.split_at(lanes * (channels + padded));
            rest = tail;
            part.split_at(lanes * channels)
        });
        let hidden = span.hidden as usize;
        let (keys, values) = own(&self.packed, self.rows, head_dim, head / copies);
        let position = position as isize;
        let whole = |(keys, values), lanes, position| Region {
            keys,
            values,
            channels: head_dim,
            lanes,
            hidden: 0,
            position,
            thin: false,
        };
        [
            whole(sinks, span.sinks as usize, 0),
            Region {
                channels: kept,
                hidden,
                thin: true,
                ..whole(thin, hidden + span.prefix(), position - (span.run() + hidden) as isize)
            },
            whole(ring, span.recent as usize, position - span.recent as isize),
            whole((keys, values), self.held, position),
        ]
    }
}

/// Keys and values of the new tokens of KV head `head`.
fn own(packed: &[f32], rows: usize, head_dim: usize, head: usize) -> (&[f32], &[f32]) {
    let len = Prompt::own(rows, head_dim);
    packed[head * len..(head + 1) * len].split_at(rows.next_multiple_of(BLOCK) * head_dim)
}

/// Floats that the past of a head takes.
pub(super) fn past_len(head: &HeadRef<'_>) -> usize {
    let head_dim = head.layout().head_dim as usize;
    packed_len(&past(head.span(), prefix_channels(head), head_dim), head_dim)
}

/// Channels of the keys of the prefix as they are packed, see [`ThinCache::packed_channels`].
fn prefix_channels(head: &HeadRef<'_>) -> usize {
    let layout = head.layout();
    usize::from(if layout.renews { layout.head_dim } else { layout.kept })
}

/// Packs what the cache holds of a sequence in a layer, head after head.
fn pack_past(
    pool: &Pool,
    cache: &ThinCache,
    layer: usize,
    slot: usize,
    heads: Heads,
    mut packed: &mut [f32],
) -> Result<(), Error> {
    if cache.span(slot) == Span::default() {
        return Ok(());
    }
    let mut parts = Vec::with_capacity(heads.kv_heads);
    for head in 0..heads.kv_heads {
        let head = cache.head(layer, head, slot, false)?;
        let (part, rest) = packed.split_at_mut(past_len(&head));
        packed = rest;
        parts.push(Mutex::new((head, part)));
    }
    pool.try_run(parts.len(), &|head| {
        let mut part = parts[head].lock().unwrap_or_else(PoisonError::into_inner);
        let (head, part) = &mut *part;
        pack_head(head, part)
    })
}

fn pack_head(head: &HeadRef<'_>, packed: &mut [f32]) -> Result<(), Error> {
    let (span, head_dim) = (head.span(), head.layout().head_dim as usize);
    let padded = padded(head_dim);
    // Padding that something else was in before.
    packed.fill(0.0);
    let (mut rest, past) = (packed, past(span, prefix_channels(head), head_dim));
    let [sinks, thin, ring] = past.map(|(channels, lanes)| {
        let part = rest.split_off_mut(..lanes * (channels + padded)).unwrap_or_default();
        part.split_at_mut(lanes * channels)
    });
    let ((keys, values), kept) = (thin, past[1].0);
    for block in 0..span.blocks as usize {
        let keys = &mut keys[block * BLOCK * kept..][..BLOCK * kept];
        if head.layout().renews {
            // Keys are zero where the block has none.
            let rows = head.layout().kept as usize * BLOCK;
            head.read_key_block(block, &mut keys[..rows])?;
            for (row, channel) in head.block_mask(block)?.channels().enumerate().collect::<Vec<_>>().into_iter().rev() {
                keys.copy_within(row * BLOCK..(row + 1) * BLOCK, channel * BLOCK);
                if channel != row {
                    keys[row * BLOCK..(row + 1) * BLOCK].fill(0.0);
                }
            }
        } else {
            head.read_key_block(block, keys)?;
        }
        head.read_value_block(block, &mut values[block * BLOCK * padded..][..BLOCK * padded], padded)?;
    }
    let mut key = [0.0; thinkey_core::MAX_HEAD_DIM];
    let key = &mut key[..head_dim];
    let (keys, values) = sinks;
    for token in 0..span.sinks as usize {
        head.read_sink(token, key, &mut values[token * padded..][..head_dim])?;
        put_key(keys, token, key);
    }
    let (keys, values) = ring;
    for token in 0..span.recent as usize {
        head.read_recent(token, key, &mut values[token * padded..][..head_dim])?;
        put_key(keys, token, key);
    }
    Ok(())
}

/// Writes the key of `token` into keys packed as `[block][channels][32]`.
fn put_key(keys: &mut [f32], token: usize, key: &[f32]) {
    let block = &mut keys[token / BLOCK * BLOCK * key.len()..];
    for (channel, &x) in key.iter().enumerate() {
        block[channel * BLOCK + token % BLOCK] = x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use thinkey_core::{Lambda, StorageKind, policy::Fix};

    proptest! {
        /// However a sequence comes to its tokens: by prompts and steps of any lengths.
        #[test]
        fn packed_regions_stay_within_what_is_told(
            head_dim in 8usize..80,
            thinned in 0usize..8,
            sinks in prop_oneof![Just(0usize), 1usize..40],
            recent in 0usize..100,
            window in prop::option::of(1usize..400),
            tokens in 1usize..700,
            prompt in 1usize..700,
            scoring in 1usize..50,
            feeds in prop::collection::vec((any::<bool>(), 1usize..300), 1..12),
        ) {
            let (kind, kept, kv_heads, copies) = (StorageKind::F32, head_dim - thinned, 2, 1 + thinned % 2);
            let plan = CachePlan {
                layers: 2, kv_heads, head_dim, sinks, recent, copies, flexible: false, renews: thinned % 3 == 0, fix: Fix::None,
                value_lambda: Lambda::WHOLE, slots: 1, tokens, window, keys: kind,
                values: kind, eviction: None,
            };
            let heads = Heads { heads: 4, kv_heads, head_dim };
            let most = Prompt::bytes(&plan, heads.heads, kept, prompt, scoring);
            // One layer is thinner than the other, or as thick.
            let mut cache = ThinCache::new(plan, scoring, |layer, head| if layer == head { kept } else { kept.div_ceil(2) }).unwrap();
            let (pool, mut scratch) = (Pool::new(1).unwrap(), AttentionScratch::default());
            for (is_prompt, new) in feeds {
                let new = new.min(prompt).min(tokens - cache.position(0));
                if new == 0 {
                    break;
                }
                for new in if is_prompt { vec![new] } else { vec![1; new] } {
                    cache.begin(0, new, is_prompt).unwrap();
                    let mut held = Prompt::new(&cache, 0, new, scoring, heads);
                    let bytes = AlignedVec::bytes(held.packed.len()) + AlignedVec::bytes(held.queries.len());
                    prop_assert!(bytes <= most, "{new} tokens: {} and {} floats", held.packed.len(), held.queries.len());
                    let data = vec![1.0; new * heads.width()];
                    let fused = Fused::new(&data, heads);
                    for layer in 0..2 {
                        held.hold(&pool, &cache, layer, fused).unwrap();
                        held.admit((&pool, Level::best()), &mut cache, layer, &mut scratch).unwrap();
                    }
                    cache.commit(0);
                }
            }
        }
    }
}
