//! The inner loops of decode attention over quantised blocks.
//!
//! A group's scale and minimum are the same for 32 tokens of a key channel, so they go into the query and not into the
//! keys: Σ_c q_c·(code_c·s_c + m_c) = Σ_c (q_c·s_c)·code_c + Σ_c q_c·m_c. In the same way the scale of a token's values
//! goes into its weight. So both loops are the same: up to 32 *factors* a query head (of channels, or of tokens), each
//! multiplied by 32 codes.
//!
//! Where integers are multiplied faster than floats, the factors become [`integers`]; elsewhere they stay [`floats`].

use super::{HEADS, LANES, LINE, Simd, per_heads, per_kind};
use crate::cpu::simd::bytes::{ByteKernel, Bytes};
use half::f16;
use std::ops::Range;
use thinkey_core::{
    BLOCK,
    attend::TILE_BLOCKS,
    quant::{Affine, CodeKind, Groups, QUAD, small},
    storage::Element,
};

mod floats;
mod integers;

pub(super) use thinkey_core::quant::GROUP;

/// Factors of a step: those of a block's tokens, and as many channels.
const STEP: usize = BLOCK;

/// Vectors of a step.
const VECTORS: usize = STEP / LANES;

/// A step's numbers.
type Step = [f32; STEP];

/// Whether codes meet integer factors of 16 bits: those of 8 bits. Kinds of fewer bits share all code but the loop that
/// unpacks them.
const fn fine(kind: CodeKind) -> bool {
    matches!(kind, CodeKind::Int8)
}

/// `halves` as floats, then zeros.
#[inline(always)]
fn widen<S: Simd>(simd: S, halves: &[f16]) -> [S::F32; VECTORS] {
    if let Some(halves) = halves.first_chunk::<STEP>() {
        let bytes: &[[u8; 2 * LANES]; VECTORS] = bytemuck::cast_ref(halves);
        return [simd.load_f16(&bytes[0]), simd.load_f16(&bytes[1])];
    }
    let mut step = [0.0; STEP];
    step.iter_mut().zip(halves).for_each(|(to, half)| *to = half.load());
    load(simd, &step)
}

/// `numbers` as floats, then zeros.
#[inline(always)]
fn convert<S: Simd, T: Copy>(simd: S, numbers: &[T], float: impl Fn(T) -> f32) -> [S::F32; VECTORS] {
    if let Some(numbers) = numbers.first_chunk::<STEP>() {
        return load(simd, &numbers.map(float));
    }
    let mut step = [0.0; STEP];
    step.iter_mut().zip(numbers).for_each(|(to, &x)| *to = float(x));
    load(simd, &step)
}

/// Vectors of a step's numbers.
#[inline(always)]
fn load<S: Simd>(simd: S, numbers: &Step) -> [S::F32; VECTORS] {
    let (numbers, _) = numbers.as_chunks();
    [simd.load(&numbers[0]), simd.load(&numbers[1])]
}

#[inline(always)]
fn store<S: Simd>(simd: S, vectors: [S::F32; VECTORS], out: &mut Step) {
    let (out, _) = out.as_chunks_mut();
    simd.store(vectors[0], &mut out[0]);
    simd.store(vectors[1], &mut out[1]);
}

/// The codes of a quad: those of its lanes 0..16, and those of 16..32.
#[inline(always)]
fn quad_codes<B: Bytes>(bytes: B, kind: CodeKind, quad: &[u8]) -> [B::Codes; VECTORS] {
    match kind {
        CodeKind::Int8 => {
            if let [low, high] = quad.as_chunks().0 {
                return [bytes.load(low), bytes.load(high)];
            }
        }
        CodeKind::Int4 => {
            if let Some(quad) = quad.first_chunk() {
                return bytes.low_high(quad);
            }
        }
        CodeKind::Int3 => {
            if let Some(quad) = quad.first_chunk() {
                return bytes.three_bits(quad);
            }
        }
        CodeKind::Int2 => {
            if let Some(quad) = quad.first_chunk() {
                return bytes.two_bits(quad);
            }
        }
        CodeKind::Trellis2 => {
            if let Some(quad) = quad.first_chunk() {
                return bytes.trellis(quad);
            }
        }
    }
    unreachable!("a quad of {} bytes", quad.len())
}

/// The first 32 numbers of each slice, or all and zeros, those in `padded`.
#[inline(always)]
fn whole_steps<'a, const N: usize>(numbers: [&'a [f32]; N], padded: &'a mut [Step; N]) -> [&'a Step; N] {
    for (padded, numbers) in padded.iter_mut().zip(numbers) {
        if numbers.len() < STEP {
            padded[..numbers.len()].copy_from_slice(numbers);
            padded[numbers.len()..].fill(0.0);
        }
    }
    let padded = &*padded;
    std::array::from_fn(|n| numbers[n].first_chunk().unwrap_or(&padded[n]))
}

/// Up to [`TILE_BLOCKS`] of something.
pub(super) type Tile<T> = [T; TILE_BLOCKS];

/// Groups of a tile's blocks: at most 32 channels of keys, or 32 channels of all tokens' values.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    blocks: &'a [Groups<'a>],
    /// First group.
    start: usize,
    /// Behind the last one.
    end: usize,
    /// Of values, the tokens that count.
    lanes: Option<&'a [Range<usize>]>,
    /// What to ask for meanwhile, a slice a block, or none.
    ahead: &'a [&'a [u8]],
}

impl<'a> Blocks<'a> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.blocks.len()
    }

    /// What all of them are.
    #[inline(always)]
    fn kind(&self) -> CodeKind {
        self.blocks[0].kind
    }

    /// Scales of a block.
    #[inline(always)]
    fn scales<S: Simd>(&self, simd: S, block: usize) -> [S::F32; VECTORS] {
        let scales = match self.blocks[block].affine {
            Affine::Halves { scales, .. } => widen(simd, &scales[self.start..self.end]),
            // A turned value has one for all of its groups.
            Affine::Turned { scales } => widen(simd, scales),
            Affine::Small { scales, .. } | Affine::Middle { scales } => {
                convert(simd, &scales[self.start..self.end], small::scale)
            }
        };
        self.seen(simd, block, scales)
    }

    /// Minima of a block; those of codes about 0 follow from their scales.
    #[inline(always)]
    fn mins<S: Simd>(&self, simd: S, block: usize) -> [S::F32; VECTORS] {
        let groups = &self.blocks[block];
        let steps = match groups.affine {
            Affine::Halves { mins, .. } => return self.seen(simd, block, widen(simd, &mins[self.start..self.end])),
            Affine::Turned { .. } | Affine::Middle { .. } => [simd.splat(-groups.middle()); VECTORS],
            Affine::Small { zeros, .. } => convert(simd, &zeros[self.start..self.end], f32::from),
        };
        let scales = self.scales(simd, block);
        std::array::from_fn(|v| simd.mul(scales[v], steps[v]))
    }

    /// Zeros where a token does not count: what it has may be anything.
    #[inline(always)]
    fn seen<S: Simd>(&self, simd: S, block: usize, numbers: [S::F32; VECTORS]) -> [S::F32; VECTORS] {
        match self.lanes.map(|lanes| &lanes[block]) {
            None | Some(Range { start: 0, end: BLOCK }) => numbers,
            Some(lanes) => {
                let mut step = [0.0; STEP];
                store(simd, numbers, &mut step);
                step[..lanes.start].fill(0.0);
                step[lanes.end..].fill(0.0);
                load(simd, &step)
            }
        }
    }

    /// The quads of a block, whose kind is `kind`: as a constant.
    #[inline(always)]
    fn quads(&self, kind: CodeKind, block: usize) -> impl Iterator<Item = (usize, &'a [u8])> + use<'a> {
        let codes = &self.blocks[block].codes[kind.code_bytes(self.start)..kind.code_bytes(self.end)];
        codes.chunks_exact(kind.quad_bytes()).enumerate()
    }

    /// Asks for what lies as far in the bytes ahead as `quad` in the block.
    #[inline(always)]
    fn fetch<S: Simd>(&self, simd: S, kind: CodeKind, block: usize, quad: usize) {
        let count = (kind.quad_bytes() + QUAD * 2 * size_of::<f16>()).div_ceil(LINE);
        if let Some(ahead) = self.ahead.get(block) {
            for line in ahead.as_chunks::<LINE>().0.iter().skip((self.start / QUAD + quad) * count).take(count) {
                simd.prefetch(line);
            }
        }
    }
}

pub(super) struct KeyScores<'a> {
    /// Blocks with the same channels, and what to ask for beside each.
    pub(super) keys: &'a [Groups<'a>],
    pub(super) ahead: &'a [&'a [u8]],
    /// Channels of a query that come before those of the blocks, whose scores are added to what is there; and all that it has.
    pub(super) channels: [usize; 2],
    pub(super) queries: &'a [f32],
    pub(super) group: usize,
    pub(super) scores: &'a mut [f32],
    pub(super) score_stride: usize,
}

impl ByteKernel for KeyScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<B: Bytes>(mut self, bytes: B) {
        if fine(self.keys[0].kind) {
            per_heads!(B::Simd, self.group, (N, head) => self.heads::<B, N, true>(bytes, head));
        } else {
            per_heads!(B::Simd, self.group, (N, head) => self.heads::<B, N, false>(bytes, head));
        }
    }
}

/// Where the scores of some heads go.
struct Scores<'a> {
    scores: &'a mut [f32],
    stride: usize,
    /// Whether they are the first channels'.
    first: bool,
}

impl Scores<'_> {
    #[inline(always)]
    fn put<S: Simd>(&mut self, simd: S, n: usize, lane: usize, sum: S::F32) {
        let out = &mut self.scores[n * self.stride + lane..];
        if self.first { super::store(simd, sum, out) } else { super::add_to(simd, sum, out) }
    }
}

impl KeyScores<'_> {
    #[inline(always)]
    fn heads<B: Bytes, const N: usize, const FINE: bool>(&mut self, bytes: B, head: usize) {
        let ([before, all], channels) = (self.channels, self.keys[0].affine.len());
        for start in (0..channels).step_by(STEP) {
            let end = channels.min(start + STEP);
            let queries: [&[f32]; N] = std::array::from_fn(|n| &self.queries[(head + n) * all + before..][start..end]);
            let mut padded = [[0.0; STEP]; N];
            let queries = whole_steps(queries, &mut padded);
            // Fetched once, with the first heads of a larger group.
            let ahead = if head == 0 { self.ahead } else { &[] };
            let blocks = Blocks { blocks: self.keys, start, end, lanes: None, ahead };
            let scores = &mut self.scores[head * self.score_stride..];
            let scores = Scores { scores, stride: self.score_stride, first: before + start == 0 };
            if B::INTEGER_FACTORS {
                integers::key_scores::<B, N, FINE>(bytes, blocks, queries, scores);
            } else {
                floats::key_scores(bytes, blocks, queries, scores);
            }
        }
    }
}

pub(super) struct MixValues<'a> {
    /// Blocks with the same channels, and what to ask for beside each.
    pub(super) values: &'a [Groups<'a>],
    pub(super) ahead: &'a [&'a [u8]],
    /// Which tokens of a block count.
    pub(super) lanes: &'a [Range<usize>],
    pub(super) head_dim: usize,
    pub(super) weights: &'a [f32],
    pub(super) weight_stride: usize,
    pub(super) group: usize,
    pub(super) mixed: &'a mut [f32],
}

impl ByteKernel for MixValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<B: Bytes>(mut self, bytes: B) {
        if fine(self.values[0].kind) {
            per_heads!(B::Simd, self.group, (N, head) => self.heads::<B, N, true>(bytes, head));
        } else {
            per_heads!(B::Simd, self.group, (N, head) => self.heads::<B, N, false>(bytes, head));
        }
    }
}

/// Weights of a tile for some heads.
type Weights<'a, const N: usize> = Tile<[&'a Step; N]>;

/// Where the mixed values of some heads go, from a channel on.
struct Mixed<'a> {
    mixed: &'a mut [f32],
    head_dim: usize,
    channel: usize,
}

impl Mixed<'_> {
    #[inline(always)]
    fn put<S: Simd>(&mut self, simd: S, n: usize, lane: usize, sum: S::F32) {
        let mixed = &mut self.mixed[n * self.head_dim..][..self.head_dim];
        let channel = self.channel + lane;
        match mixed.len() - channel.min(mixed.len()) {
            0 => {}
            rest @ 1..LANES => {
                let mut part = [0.0; LANES];
                simd.store(sum, &mut part);
                mixed[channel..].iter_mut().zip(&part[..rest]).for_each(|(mix, sum)| *mix += sum);
            }
            _ => super::add_to(simd, sum, &mut mixed[channel..]),
        }
    }
}

impl MixValues<'_> {
    #[inline(always)]
    fn heads<B: Bytes, const N: usize, const FINE: bool>(&mut self, bytes: B, head: usize) {
        const NONE: Step = [0.0; STEP];
        let mut weights: Weights<'_, N> = [[&NONE; N]; TILE_BLOCKS];
        let mut padded: Tile<[Step; N]>;
        let whole = self.lanes.iter().all(|lanes| *lanes == (0..BLOCK));
        if whole {
            for (block, weights) in weights.iter_mut().enumerate().take(self.values.len()) {
                for (n, weights) in weights.iter_mut().enumerate() {
                    let row = &self.weights[(head + n) * self.weight_stride + block * BLOCK..];
                    *weights = row.first_chunk().unwrap_or(&NONE);
                }
            }
        } else {
            // Weights of tokens that are not to be read are zero.
            padded = [[NONE; N]; TILE_BLOCKS];
            for (block, (lanes, padded)) in self.lanes.iter().zip(&mut padded).enumerate() {
                for (n, padded) in padded.iter_mut().enumerate() {
                    let row = &self.weights[(head + n) * self.weight_stride + block * BLOCK..];
                    padded[lanes.clone()].copy_from_slice(&row[lanes.clone()]);
                }
            }
            for (weights, padded) in weights.iter_mut().zip(&padded) {
                *weights = padded.each_ref();
            }
        }
        for channel in (0..self.head_dim).step_by(GROUP) {
            // Fetched once, with the first heads of a larger group.
            let ahead = if head == 0 { self.ahead } else { &[] };
            let lanes = (!whole).then_some(self.lanes);
            let blocks = Blocks { blocks: self.values, start: channel, end: channel + BLOCK, lanes, ahead };
            let mixed = &mut self.mixed[head * self.head_dim..];
            let mixed = Mixed { mixed, head_dim: self.head_dim, channel };
            if B::INTEGER_FACTORS {
                integers::mix_values::<B, N, FINE>(bytes, blocks, &weights, mixed);
            } else {
                floats::mix_values(bytes, blocks, &weights, mixed);
            }
        }
    }
}
