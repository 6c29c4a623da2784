//! Two-region decode attention: one softmax over the thin prefix and the whole tokens, sinks and recent ones.
//!
//! A query head's logits are q·k/√D for both regions, the prefix with q gathered to its T kept channels, or
//! [corrected](crate::channel::compensate) for the others. The scale is 1/√D for both: 1/√T would be another
//! temperature, and measurably worse. All query heads of a group are served from
//! one pass over their KV head's blocks, with an online softmax (Milakov & Gimelshein, arXiv 1805.02867), so parts of
//! the tokens can be computed apart and [merged](Partial::merge).

use crate::{
    BLOCK, ChannelMask, Error, HeadRef, MAX_GROUP, MAX_HEAD_DIM,
    error::check_len,
    quant::{GROUP, mixed::KeyGroups},
    storage::{Element, Form, MIXED_VALUES, StorageKind, elements, with_element},
    value::turn,
};
use core::ops::Range;

mod gather;
mod queries;

pub use gather::{prefix_weights, ring_weights};
pub use queries::{Queries, thin_queries};

/// Blocks whose scores are computed before one step of the online softmax.
pub const TILE_BLOCKS: usize = 4;
/// Tokens of a tile.
const TILE: usize = TILE_BLOCKS * BLOCK;

/// Key channels of up to 32 tokens: channel `c` of lane `l` is element `c * stride + l`; quantised, it is number l of
/// group c.
#[derive(Clone, Copy, Debug)]
pub struct KeyLanes<'a> {
    /// How the keys are stored.
    pub kind: StorageKind,
    /// The bytes, from the first lane of the first channel on; quantised, the block's.
    pub bytes: &'a [u8],
    /// Channels.
    pub channels: usize,
    /// Elements between two channels; of no meaning where keys are quantised.
    pub stride: usize,
    /// Bytes that will be read soon after: a hint for loops that can fetch them in advance.
    pub ahead: &'a [u8],
}

#[cfg(feature = "defmt")]
impl defmt::Format for KeyLanes<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(
            f,
            "KeyLanes {{ kind: {}, bytes: {=usize}, channels: {=usize}, stride: {=usize} }}",
            self.kind,
            self.bytes.len(),
            self.channels,
            self.stride
        );
    }
}

/// Values of up to 32 tokens: channel `c` of token `t` is element `t * head_dim + c`; quantised, they are a whole block,
/// see [`storage`](crate::storage).
#[derive(Clone, Copy, Debug)]
pub struct ValueRows<'a> {
    /// How the values are stored.
    pub kind: StorageKind,
    /// The bytes, from the first token on.
    pub bytes: &'a [u8],
    /// Channels.
    pub head_dim: usize,
    /// Bytes that will be read soon after: a hint for loops that can fetch them in advance.
    pub ahead: &'a [u8],
}

#[cfg(feature = "defmt")]
impl defmt::Format for ValueRows<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(
            f,
            "ValueRows {{ kind: {}, bytes: {=usize}, head_dim: {=usize} }}",
            self.kind,
            self.bytes.len(),
            self.head_dim
        );
    }
}

/// The inner loops of attention. [`Plain`] is the contract; a backend brings faster ones that equal it within rounding.
pub trait Loops {
    /// Dot products of `group` queries (`[group][channels]`) with 32 lanes of keys:
    /// `scores[g * score_stride ..][..32]`, overwritten. Lanes that are no tokens give numbers of no meaning.
    ///
    /// # Errors
    /// [`Error::Length`] where a slice is too short.
    fn key_scores(
        &self,
        keys: KeyLanes<'_>,
        queries: &[f32],
        group: usize,
        scores: &mut [f32],
        score_stride: usize,
    ) -> Result<(), Error>;

    /// Adds the tokens `lanes`, weighted, to each query head's mix:
    /// `mixed[g][c] += Σ_t weights[g * weight_stride + t] · value[t][c]`, `mixed` being `[group][D]`. Other tokens are not
    /// read.
    ///
    /// # Errors
    /// [`Error::Length`] where a slice is too short.
    fn mix_values(
        &self,
        values: ValueRows<'_>,
        lanes: Range<usize>,
        weights: &[f32],
        weight_stride: usize,
        group: usize,
        mixed: &mut [f32],
    ) -> Result<(), Error>;

    /// [`key_scores`](Self::key_scores) of up to [`TILE_BLOCKS`] blocks of one head, of the same kind and channels: those of
    /// block b are `scores[g * score_stride + 32 * b ..][..32]`. Loops that prepare something for a block do so for all here.
    ///
    /// # Errors
    /// As [`key_scores`](Self::key_scores).
    fn tile_scores(
        &self,
        keys: &[KeyLanes<'_>],
        queries: &[f32],
        group: usize,
        scores: &mut [f32],
        score_stride: usize,
    ) -> Result<(), Error> {
        for (index, &keys) in keys.iter().enumerate() {
            let scores = scores.get_mut(index * BLOCK..).ok_or(TOO_FEW_SCORES)?;
            self.key_scores(keys, queries, group, scores, score_stride)?;
        }
        Ok(())
    }

    /// [`mix_values`](Self::mix_values) of up to [`TILE_BLOCKS`] blocks of one head, of the same kind, each with the lanes
    /// that are its tokens: the weight of token t of block b is `weights[g * weight_stride + 32 * b + t]`.
    ///
    /// # Errors
    /// As [`mix_values`](Self::mix_values).
    fn mix_tile(
        &self,
        values: &[(ValueRows<'_>, Range<usize>)],
        weights: &[f32],
        weight_stride: usize,
        group: usize,
        mixed: &mut [f32],
    ) -> Result<(), Error> {
        for (index, (values, lanes)) in values.iter().enumerate() {
            let weights = weights.get(index * BLOCK..).ok_or(TOO_FEW_SCORES)?;
            self.mix_values(*values, lanes.clone(), weights, weight_stride, group, mixed)?;
        }
        Ok(())
    }

    /// The largest of `x`, which are numbers or -∞; -∞ where there is none.
    fn largest(&self, x: &[f32]) -> f32;

    /// Replaces every x by e^(x - `shift`) and returns their sum. All x are at most `shift`; -∞ gives 0.
    fn exponentials(&self, x: &mut [f32], shift: f32) -> f32;
}

/// The loops as plain Rust: what every other implementation is tested against.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Plain;

impl Loops for Plain {
    fn key_scores(
        &self,
        keys: KeyLanes<'_>,
        queries: &[f32],
        group: usize,
        scores: &mut [f32],
        score_stride: usize,
    ) -> Result<(), Error> {
        check_len("queries", group * keys.channels, queries.len())?;
        let queries = queries.chunks_exact(keys.channels);
        for (query, scores) in queries.zip(scores.chunks_mut(score_stride)) {
            let scores = scores.get_mut(..BLOCK).ok_or(TOO_FEW_SCORES)?;
            scores.fill(0.0);
            match keys.kind.form() {
                Form::Float(kind) => with_element!(kind, E => {
                    for (&q, lanes) in query.iter().zip(elements::<E>(keys.bytes)?.chunks(keys.stride)) {
                        for (score, key) in scores.iter_mut().zip(lanes) {
                            *score += q * key.load();
                        }
                    }
                }),
                form => {
                    let groups = KeyGroups::new(form, keys.bytes, keys.channels)?;
                    for (channel, &q) in query.iter().enumerate() {
                        for (lane, score) in scores.iter_mut().enumerate() {
                            *score += q * groups.get(channel, lane);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn mix_values(
        &self,
        values: ValueRows<'_>,
        lanes: Range<usize>,
        weights: &[f32],
        weight_stride: usize,
        group: usize,
        mixed: &mut [f32],
    ) -> Result<(), Error> {
        check_len("mixed values", group * values.head_dim, mixed.len())?;
        for (mixed, weights) in mixed.chunks_exact_mut(values.head_dim).zip(weights.chunks(weight_stride)) {
            for lane in lanes.clone() {
                let weight = *weights.get(lane).ok_or(TOO_FEW_SCORES)?;
                match values.kind.form() {
                    Form::Float(kind) => with_element!(kind, E => {
                        let stored = elements::<E>(values.bytes)?;
                        for (mix, value) in mixed.iter_mut().zip(&stored[lane * values.head_dim..]) {
                            *mix += weight * value.load();
                        }
                    }),
                    Form::Mixed => return Err(MIXED_VALUES),
                    form @ (Form::Codes(kind) | Form::Turned(kind)) => {
                        let groups = match form {
                            Form::Turned(_) => kind.turned_parts(values.bytes, values.head_dim)?,
                            _ => kind.parts(values.bytes, BLOCK * values.head_dim.div_ceil(GROUP))?,
                        };
                        for (channel, mix) in mixed.iter_mut().enumerate() {
                            *mix += weight * groups.value(lane, channel);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn largest(&self, x: &[f32]) -> f32 {
        x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    fn exponentials(&self, x: &mut [f32], shift: f32) -> f32 {
        let mut sum = 0.0;
        for x in x {
            *x = libm::expf(*x - shift);
            sum += *x;
        }
        sum
    }
}

const TOO_FEW_SCORES: Error = Error::Length { what: "scores", expected: BLOCK, actual: 0 };

/// The softmax-weighted mix of a part of the tokens, for the query heads of one group: mergeable.
#[derive(Debug)]
pub struct Partial<'a> {
    /// Largest logit so far, one a query head.
    max: &'a mut [f32],
    /// Σ e^(logit - max), one a query head.
    sum: &'a mut [f32],
    /// Σ e^(logit - max) · value, `[group][D]`.
    mixed: &'a mut [f32],
}

#[cfg(feature = "defmt")]
impl defmt::Format for Partial<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(
            f,
            "Partial {{ group: {=usize}, head_dim: {=usize} }}",
            self.max.len(),
            self.mixed.len() / self.max.len()
        );
    }
}

impl<'a> Partial<'a> {
    /// Floats that a partial result of `group` heads of `head_dim` channels takes.
    #[must_use]
    pub const fn len(group: usize, head_dim: usize) -> usize {
        group * (head_dim + 2)
    }

    /// An empty result in the first [`len`](Self::len) floats of `memory`.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the floats needed, [`Error::Group`].
    pub fn new(memory: &'a mut [f32], group: usize, head_dim: usize) -> Result<Self, Error> {
        let partial = Self::resume(memory, group, head_dim)?;
        partial.max.fill(f32::NEG_INFINITY);
        partial.sum.fill(0.0);
        partial.mixed.fill(0.0);
        Ok(partial)
    }

    /// The result that an earlier [`new`](Self::new) over the same memory has gathered.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn resume(memory: &'a mut [f32], group: usize, head_dim: usize) -> Result<Self, Error> {
        if group == 0 || group > MAX_GROUP {
            return Err(Error::Group { group });
        }
        let (needed, capacity) = (Self::len(group, head_dim), memory.len());
        if capacity < needed {
            return Err(Error::Capacity { what: "partial attention", needed, capacity });
        }
        let (max, rest) = memory[..needed].split_at_mut(group);
        let (sum, mixed) = rest.split_at_mut(group);
        Ok(Self { max, sum, mixed })
    }

    /// The first `kept` of as many channels as there are, for values that lack the others, or are turned. Nothing has been
    /// seen yet.
    ///
    /// # Errors
    /// [`Error::Inconsistent`] where something has.
    fn narrow(&mut self, kept: usize) -> Result<Partial<'_>, Error> {
        if self.max.iter().any(|&max| max != f32::NEG_INFINITY) {
            return Err(Error::Inconsistent { what: "partial attention" });
        }
        let len = self.max.len() * kept;
        Ok(Partial { max: self.max, sum: self.sum, mixed: &mut self.mixed[..len] })
    }

    /// Moves what a [narrow](Self::narrow) result has gathered to the channels of `mask`; the others are 0.
    fn widen(&mut self, mask: &ChannelMask) {
        let (head_dim, kept) = (mask.head_dim(), mask.kept());
        let mut narrow = [0.0f32; MAX_HEAD_DIM];
        for head in (0..self.max.len()).rev() {
            narrow[..kept].copy_from_slice(&self.mixed[head * kept..][..kept]);
            let wide = &mut self.mixed[head * head_dim..][..head_dim];
            wide.fill(0.0);
            for (channel, &x) in mask.channels().zip(&narrow) {
                wide[channel] = x;
            }
        }
    }

    /// Turns back what was gathered of [turned](turn) values: the mix of turned values is the turned mix.
    fn turn_back(&mut self) {
        let head_dim = self.mixed.len() / self.max.len();
        self.mixed.chunks_exact_mut(head_dim).for_each(turn);
    }

    /// Raises the logits that were seen so far: those of query head h by `by[h] * times`.
    fn raise(&mut self, by: &[f32], times: f32) {
        for (max, &by) in self.max.iter_mut().zip(by) {
            *max += by * times;
        }
    }

    /// Adds another part of the tokens.
    ///
    /// # Errors
    /// [`Error::Length`] where the other has another shape.
    pub fn merge(&mut self, other: &Partial<'_>) -> Result<(), Error> {
        check_len("partial attention", self.mixed.len(), other.mixed.len())?;
        check_len("query heads", self.max.len(), other.max.len())?;
        let head_dim = self.mixed.len() / self.max.len();
        for head in 0..self.max.len() {
            let max = self.max[head].max(other.max[head]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let ours = libm::expf(self.max[head] - max);
            let theirs = libm::expf(other.max[head] - max);
            self.max[head] = max;
            self.sum[head] = self.sum[head] * ours + other.sum[head] * theirs;
            let range = head * head_dim..(head + 1) * head_dim;
            for (mix, &more) in self.mixed[range.clone()].iter_mut().zip(&other.mixed[range]) {
                *mix = *mix * ours + more * theirs;
            }
        }
        Ok(())
    }

    /// Writes the attention output, `[group][D]`; zeros where no token was seen.
    ///
    /// # Errors
    /// [`Error::Length`] where `out` has another length.
    pub fn finish(&self, out: &mut [f32]) -> Result<(), Error> {
        check_len("attention output", self.mixed.len(), out.len())?;
        let head_dim = self.mixed.len() / self.max.len();
        for ((out, mixed), &sum) in
            out.chunks_exact_mut(head_dim).zip(self.mixed.chunks_exact(head_dim)).zip(&*self.sum)
        {
            let scale = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            for (out, &mix) in out.iter_mut().zip(mixed) {
                *out = mix * scale;
            }
        }
        Ok(())
    }
}

/// One block's part in a tile: which lanes are tokens.
struct TileBlock<'a> {
    keys: KeyLanes<'a>,
    values: ValueRows<'a>,
    lanes: Range<usize>,
}

/// Attends to the thin blocks `blocks` of `head`; of the tokens that are no sinks, those older than the newest `window` are
/// not seen. Where the prefix lacks value channels, these get nothing from it.
///
/// # Errors
/// [`Error::Index`] for blocks that are not there; [`Error::Length`] where parts do not fit; [`Error::Inconsistent`] where
/// the prefix lacks value channels or has turned values, and `partial` has seen tokens before.
pub fn attend_prefix<L: Loops>(
    loops: &L,
    head: &HeadRef<'_>,
    queries: &mut Queries<'_>,
    blocks: Range<usize>,
    window: usize,
    partial: &mut Partial<'_>,
) -> Result<(), Error> {
    let span = head.span();
    if blocks.end > span.blocks as usize {
        return Err(Error::Index { what: "block", index: blocks.end, limit: span.blocks as usize + 1 });
    }
    match head.value_mask() {
        Some(mask) if head.layout().thins_values() && !blocks.is_empty() => {
            attend_blocks(loops, head, queries, blocks, window, &mut partial.narrow(mask.kept())?)?;
            partial.widen(mask);
            Ok(())
        }
        _ if head.layout().values.turns() && !blocks.is_empty() => {
            let mut turned = partial.narrow(head.layout().head_dim as usize)?;
            attend_blocks(loops, head, queries, blocks, window, &mut turned)?;
            turned.turn_back();
            Ok(())
        }
        _ => attend_blocks(loops, head, queries, blocks, window, partial),
    }
}

/// [`attend_prefix`], mixing the channels that values have.
fn attend_blocks<L: Loops>(
    loops: &L,
    head: &HeadRef<'_>,
    queries: &mut Queries<'_>,
    blocks: Range<usize>,
    window: usize,
    partial: &mut Partial<'_>,
) -> Result<(), Error> {
    let (layout, span) = (head.layout(), head.span());
    // Lanes before the first visible one, counted from the first block.
    let unseen = span.hidden as usize + span.run().saturating_sub(window).min(span.prefix());
    let first = blocks.start.max(unseen / BLOCK);
    if layout.renews {
        // Blocks of one mask together.
        let mut start = first;
        while start < blocks.end {
            let same = |block: &usize| head.mask_bits(*block) == head.mask_bits(start);
            let end = start + (start..blocks.end).take_while(same).count();
            queries.gather(&head.block_mask(start)?);
            attend_run(loops, head, queries, start..end, unseen, partial)?;
            start = end;
        }
        return Ok(());
    }
    attend_run(loops, head, queries, first..blocks.end, unseen, partial)
}

/// [`attend_blocks`] of blocks that all take the same thin queries. Lanes before `unseen`, counted from the first block of
/// the prefix, are not seen.
fn attend_run<L: Loops>(
    loops: &L,
    head: &HeadRef<'_>,
    queries: &mut Queries<'_>,
    blocks: Range<usize>,
    unseen: usize,
    partial: &mut Partial<'_>,
) -> Result<(), Error> {
    let (layout, kept) = (head.layout(), head.layout().kept as usize);
    // What is added to all logits of a query head is not added to each: the largest so far is as much lower instead.
    partial.raise(queries.added, -1.0);
    for start in blocks.clone().step_by(TILE_BLOCKS) {
        let tile = |index: usize| {
            let block = start + index;
            // The same block of the next tile: its bytes come while this tile is computed.
            let next = block + TILE_BLOCKS;
            let ahead: [&[u8]; 2] =
                if next < blocks.end { [head.key_block(next), head.value_block(next)] } else { [&[], &[]] };
            TileBlock {
                keys: KeyLanes {
                    kind: layout.keys,
                    bytes: head.key_block(block),
                    channels: layout.kept as usize,
                    stride: BLOCK,
                    ahead: ahead[0],
                },
                values: ValueRows {
                    kind: layout.values,
                    bytes: head.value_block(block),
                    head_dim: layout.kept_values as usize,
                    ahead: ahead[1],
                },
                lanes: unseen.saturating_sub(block * BLOCK).min(BLOCK)..BLOCK,
            }
        };
        attend_tile(
            loops,
            (blocks.end - start, tile),
            &queries.thin[..queries.group * kept],
            queries.group,
            queries.scores,
            partial,
        )?;
    }
    partial.raise(queries.added, 1.0);
    Ok(())
}

/// Attends to the whole tokens of `head`: its sinks, and of the recent ones the newest `window`.
///
/// # Errors
/// [`Error::Length`] where parts do not fit.
pub fn attend_whole<L: Loops>(
    loops: &L,
    head: &HeadRef<'_>,
    queries: &mut Queries<'_>,
    window: usize,
    partial: &mut Partial<'_>,
) -> Result<(), Error> {
    let (layout, span) = (head.layout(), head.span());
    let (recent, sinks) = (span.recent as usize, span.sinks as usize);
    let unseen = recent.saturating_sub(window);
    let head_dim = layout.head_dim as usize;
    let (keys, values) = (layout.keys.ring(), layout.values.ring());
    let whole = |keys_at, stride, values_at, lanes| TileBlock {
        keys: KeyLanes { kind: keys.into(), bytes: keys_at, channels: head_dim, stride, ahead: &[] },
        values: ValueRows { kind: values.into(), bytes: values_at, head_dim, ahead: &[] },
        lanes,
    };
    // Blocks of sinks come before those of the ring.
    let (before, skipped) = (sinks.div_ceil(BLOCK), unseen / BLOCK);
    let block = |index: usize| {
        let (first, keys_of, stride, values_of, lanes) = if index < before {
            let first = index * BLOCK;
            (first, head.sink_keys(), layout.sinks as usize, head.sink_values(), 0..BLOCK.min(sinks - first))
        } else {
            let first = (index - before + skipped) * BLOCK;
            let lanes = unseen.saturating_sub(first)..BLOCK.min(recent - first);
            (first, head.ring_keys(), layout.ring_stride(), head.ring_values(), lanes)
        };
        whole(&keys_of[first * keys.bytes()..], stride, &values_of[first * head_dim * values.bytes()..], lanes)
    };
    let blocks = before + recent.div_ceil(BLOCK).saturating_sub(skipped);
    for start in (0..blocks).step_by(TILE_BLOCKS) {
        let tile = |index: usize| block(start + index);
        attend_tile(loops, (blocks - start, tile), queries.whole, queries.group, queries.scores, partial)?;
    }
    Ok(())
}

/// One step of the online softmax over as many blocks as there are, at most [`TILE_BLOCKS`]; `block` gives them by their
/// index.
fn attend_tile<'a, L: Loops>(
    loops: &L,
    (blocks, block): (usize, impl Fn(usize) -> TileBlock<'a>),
    queries: &[f32],
    group: usize,
    scores: &mut [f32],
    partial: &mut Partial<'_>,
) -> Result<(), Error> {
    let blocks = blocks.min(TILE_BLOCKS);
    // Those beyond the last repeat it, and are not looked at.
    let tile: [TileBlock<'_>; TILE_BLOCKS] = core::array::from_fn(|index| block(index.min(blocks - 1)));
    let keys = tile.each_ref().map(|block| block.keys);
    loops.tile_scores(&keys[..blocks], queries, group, scores, TILE)?;
    for (index, block) in tile[..blocks].iter().enumerate().filter(|(_, block)| block.lanes != (0..BLOCK)) {
        for scores in scores.chunks_exact_mut(TILE) {
            let scores = &mut scores[index * BLOCK..][..BLOCK];
            scores[..block.lanes.start].fill(f32::NEG_INFINITY);
            scores[block.lanes.end..].fill(f32::NEG_INFINITY);
        }
    }
    let tokens = blocks * BLOCK;
    let head_dim = partial.mixed.len() / group;
    for head in 0..group {
        let scores = &mut scores[head * TILE..][..tokens];
        let max = loops.largest(scores).max(partial.max[head]);
        if max == f32::NEG_INFINITY {
            scores.fill(0.0);
            continue;
        }
        if max != partial.max[head] {
            let shrink = libm::expf(partial.max[head] - max);
            partial.sum[head] *= shrink;
            partial.mixed[head * head_dim..][..head_dim].iter_mut().for_each(|mix| *mix *= shrink);
            partial.max[head] = max;
        }
        partial.sum[head] += loops.exponentials(scores, max);
    }
    let values = tile.map(|block| (block.values, block.lanes));
    loops.mix_tile(&values[..blocks], scores, TILE, group, partial.mixed)
}

/// Attends to all tokens of `head` with the query heads of its group: `queries` and `out` are `[group][D]`.
///
/// `memory` is scratch of at least [`attend_len`] floats.
///
/// # Errors
/// [`Error::Capacity`] with the floats needed; [`Error::Length`] and [`Error::Group`] where shapes do not fit.
///
/// See `thinkey_core::fixed` for an example.
pub fn attend<L: Loops>(
    loops: &L,
    head: &HeadRef<'_>,
    queries: &[f32],
    window: usize,
    memory: &mut [f32],
    out: &mut [f32],
) -> Result<(), Error> {
    let head_dim = head.layout().head_dim as usize;
    let group = queries.len() / head_dim;
    let (needed, capacity) = (attend_len(group, head_dim), memory.len());
    if capacity < needed {
        return Err(Error::Capacity { what: "attention scratch", needed, capacity });
    }
    let (scratch, memory) = memory.split_at_mut(Queries::scratch_len(group, head_dim));
    let mut queries = Queries::new(loops, head, queries, scratch)?;
    let mut partial = Partial::new(memory, group, head_dim)?;
    attend_prefix(loops, head, &mut queries, 0..head.span().blocks as usize, window, &mut partial)?;
    attend_whole(loops, head, &mut queries, window, &mut partial)?;
    partial.finish(out)
}

/// Floats of scratch memory that [`attend`] needs.
#[must_use]
pub const fn attend_len(group: usize, head_dim: usize) -> usize {
    Queries::scratch_len(group, head_dim) + Partial::len(group, head_dim)
}
