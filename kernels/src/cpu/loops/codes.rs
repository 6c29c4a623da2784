//! The inner loops of decode attention over quantised blocks.
//!
//! A group's scale and minimum are the same for 32 tokens of a key channel, so they go into the query and not into the
//! keys: Σ_c q_c·(code_c·s_c + m_c) = Σ_c (q_c·s_c)·code_c + Σ_c q_c·m_c. In the same way the scale of a token's values
//! goes into its weight. So both loops are the same: up to 32 *factors* a query head (of channels, or of tokens), each
//! multiplied by 32 codes.
//!
//! Where bytes without a sign can be multiplied and summed by one instruction (VNNI), the factors become integers of 16
//! bits, in two bytes: four codes and four factors are one product of words, and nothing is converted but the sums. The
//! factors of a step share a scale, so one is off by at most a part in 65,024 of the largest: far less than half a step of
//! an 8-bit code.

use super::{Ahead, HEADS, LANES, Simd, per_heads, store};
use crate::cpu::simd::bytes::{ByteKernel, Bytes};
use half::f16;
use std::ops::Range;
use thinkey_core::{
    BLOCK,
    quant::{CodeKind, Groups, QUAD},
    storage::Element,
};

pub(super) use thinkey_core::quant::GROUP;

/// Factors of a step: those of a block's tokens, and as many channels.
const STEP: usize = BLOCK;

/// `halves` as floats, then zeros.
#[inline(always)]
fn widen<S: Simd>(simd: S, halves: &[f16]) -> [f32; STEP] {
    let mut out = [0.0; STEP];
    let (vectors, _) = bytemuck::cast_slice::<f16, u8>(halves).as_chunks::<{ 2 * LANES }>();
    let (outs, rest) = out[..halves.len()].as_chunks_mut::<LANES>();
    for (vector, out) in vectors.iter().zip(outs) {
        simd.store(simd.load_f16(vector), out);
    }
    for (half, out) in halves[LANES * vectors.len()..].iter().zip(rest) {
        *out = half.load();
    }
    out
}

/// Factors of a step as they meet the codes, for `N` heads.
struct Factors<const N: usize> {
    /// Where they stay floats.
    floats: [[f32; STEP]; N],
    /// Where they become integers: upper and lower bytes, four factors a word.
    bytes: [[[i8; STEP]; 2]; N],
    /// What an integer is worth.
    unit: f32,
    /// Σ factor · minimum.
    offsets: [f32; N],
}

impl<const N: usize> Factors<N> {
    /// `factors` times `scales`, the offsets by `mins`.
    #[inline(always)]
    fn new<B: Bytes>(bytes: B, factors: [&[f32; STEP]; N], scales: &[f32; STEP], mins: &[f32; STEP]) -> Self {
        let simd = bytes.simd();
        let mut all = Self { floats: [[0.0; STEP]; N], bytes: [[[0; STEP]; 2]; N], unit: 0.0, offsets: [0.0; N] };
        let ((scales, _), (mins, _)) = (scales.as_chunks(), mins.as_chunks());
        let (mut least, mut most) = (simd.splat(0.0), simd.splat(0.0));
        let mut scaled = [[simd.splat(0.0); STEP / LANES]; N];
        for n in 0..N {
            let (factors, _) = factors[n].as_chunks();
            let mut offset = simd.splat(0.0);
            for v in 0..STEP / LANES {
                let factor = simd.load(&factors[v]);
                offset = simd.fma(factor, simd.load(&mins[v]), offset);
                scaled[n][v] = simd.mul(factor, simd.load(&scales[v]));
                (least, most) = (simd.min(scaled[n][v], least), simd.max(scaled[n][v], most));
            }
            all.offsets[n] = simd.sum(offset);
        }
        if B::UNSIGNED_PRODUCTS {
            let largest = simd.largest(simd.max(most, simd.mul(least, simd.splat(-1.0))));
            all.unit = largest / INTEGERS;
            let inverse = simd.splat(if all.unit > 0.0 { INTEGERS / largest } else { 0.0 });
            for ([high, low], scaled) in all.bytes.iter_mut().zip(&scaled) {
                let ((high, _), (low, _)) = (high.as_chunks_mut(), low.as_chunks_mut());
                for ((high, low), &scaled) in high.iter_mut().zip(low).zip(scaled) {
                    bytes.split(simd.mul(scaled, inverse), high, low);
                }
            }
        } else {
            for (floats, scaled) in all.floats.iter_mut().zip(&scaled) {
                let (floats, _) = floats.as_chunks_mut();
                for (floats, &scaled) in floats.iter_mut().zip(scaled) {
                    simd.store(scaled, floats);
                }
            }
        }
        all
    }

    /// Σ factor · number over the factors, for lanes `16 * first`.. of the quads `codes`, `V` vectors.
    #[inline(always)]
    fn products<B: Bytes, const V: usize>(
        &self,
        bytes: B,
        kind: CodeKind,
        codes: &[u8],
        first: usize,
        ahead: &mut Ahead<'_>,
    ) -> [[B::F32; V]; N] {
        let simd = bytes.simd();
        let mut out = [[simd.splat(0.0); V]; N];
        // The loop is not to be unrolled: factors are to stay in memory, from where a word is broadcast as it is loaded.
        let quads = (codes.len() / kind.quad_bytes()).min(STEP / QUAD);
        if B::UNSIGNED_PRODUCTS {
            let words = self.bytes.each_ref().map(|bytes| bytes.each_ref().map(|bytes| bytes.as_chunks::<QUAD>().0));
            let mut sums = [[[bytes.zero(); V]; 2]; N];
            for (quad, codes) in codes.chunks_exact(kind.quad_bytes()).enumerate().take(quads) {
                ahead.fetch(simd);
                let (codes, _) = codes.as_chunks();
                let both = match (kind, codes) {
                    (CodeKind::Int8, [low, high]) => [bytes.load(low), bytes.load(high)],
                    (_, [both, ..]) => bytes.low_high(both),
                    _ => return out,
                };
                for n in 0..N {
                    for half in 0..2 {
                        let word = words[n][half][quad];
                        for v in 0..V {
                            sums[n][half][v] = bytes.add_products(sums[n][half][v], both[first + v], word);
                        }
                    }
                }
            }
            let unit = simd.splat(self.unit);
            for n in 0..N {
                let [high, low] = sums[n];
                for v in 0..V {
                    let sum = simd.fma(bytes.floats(high[v]), simd.splat(256.0), bytes.floats(low[v]));
                    out[n][v] = simd.fma(sum, unit, simd.splat(self.offsets[n]));
                }
            }
        } else {
            for (out, &offset) in out.iter_mut().zip(&self.offsets) {
                *out = [simd.splat(offset); V];
            }
            for (quad, codes) in codes.chunks_exact(kind.quad_bytes()).enumerate().take(quads) {
                ahead.fetch(simd);
                let (words, _) = codes.as_chunks();
                macro_rules! groups {
                    ($($g:literal)*) => {
                        $(for v in 0..V {
                            let number = match (kind, words) {
                                (CodeKind::Int8, [low, high]) => {
                                    simd.word_codes::<{ 8 * $g }, 255>(if first + v == 0 { low } else { high })
                                }
                                (_, [both, ..]) if first + v == 0 => simd.word_codes::<{ 8 * $g }, 15>(both),
                                (_, [both, ..]) => simd.word_codes::<{ 8 * $g + 4 }, 15>(both),
                                _ => return out,
                            };
                            for n in 0..N {
                                let factor = simd.splat(self.floats[n][QUAD * quad + $g]);
                                out[n][v] = simd.fma(factor, number, out[n][v]);
                            }
                        })*
                    };
                }
                groups!(0 1 2 3);
            }
        }
        out
    }

    /// [`products`](Self::products) of all 32 lanes, handed to `take` sixteen at a time: head, first lane, sums.
    #[inline(always)]
    fn all_products<B: Bytes>(
        &self,
        bytes: B,
        kind: CodeKind,
        codes: &[u8],
        ahead: &mut Ahead<'_>,
        mut take: impl FnMut(usize, usize, B::F32),
    ) {
        if B::TILE_VECTORS > 1 || !B::UNSIGNED_PRODUCTS {
            for (n, sums) in self.products::<B, 2>(bytes, kind, codes, 0, ahead).into_iter().enumerate() {
                take(n, 0, sums[0]);
                take(n, LANES, sums[1]);
            }
        } else {
            // The sums of both bytes of all heads fill the registers.
            for (n, [sum]) in self.products::<B, 1>(bytes, kind, codes, 0, ahead).into_iter().enumerate() {
                take(n, 0, sum);
            }
            for (n, [sum]) in self.products::<B, 1>(bytes, kind, codes, 1, ahead).into_iter().enumerate() {
                take(n, LANES, sum);
            }
        }
    }
}

/// The largest integer of a factor: 127 in its upper byte, nothing in the lower one.
const INTEGERS: f32 = 127.0 * 256.0;

/// The first 32 numbers of each slice, or all and zeros, those in `padded`.
#[inline(always)]
fn whole_steps<'a, const N: usize>(numbers: [&'a [f32]; N], padded: &'a mut [[f32; STEP]; N]) -> [&'a [f32; STEP]; N] {
    for (padded, numbers) in padded.iter_mut().zip(numbers) {
        if numbers.len() < STEP {
            padded[..numbers.len()].copy_from_slice(numbers);
            padded[numbers.len()..].fill(0.0);
        }
    }
    let padded = &*padded;
    std::array::from_fn(|n| numbers[n].first_chunk().unwrap_or(&padded[n]))
}

pub(super) struct KeyScores<'a> {
    pub(super) keys: Groups<'a>,
    pub(super) ahead: &'a [u8],
    pub(super) queries: &'a [f32],
    pub(super) group: usize,
    pub(super) scores: &'a mut [f32],
    pub(super) score_stride: usize,
}

impl ByteKernel for KeyScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<B: Bytes>(mut self, bytes: B) {
        per_heads!(self.group, self.keys.kind, [CodeKind::Int8, CodeKind::Int4],
            (N, kind, head) => self.heads::<B, N>(bytes, kind, head));
    }
}

impl KeyScores<'_> {
    #[inline(always)]
    fn heads<B: Bytes, const N: usize>(&mut self, bytes: B, kind: CodeKind, head: usize) {
        let simd = bytes.simd();
        let channels = self.keys.scales.len();
        let mut ahead = fetch_once(head, self.ahead, kind);
        let steps = self.keys.scales.chunks(STEP).zip(self.keys.mins.chunks(STEP));
        for (step, (scales, mins)) in steps.enumerate() {
            let queries: [&[f32]; N] =
                std::array::from_fn(|n| &self.queries[(head + n) * channels + step * STEP..][..scales.len()]);
            let mut padded = [[0.0; STEP]; N];
            let queries = whole_steps(queries, &mut padded);
            let factors = Factors::new(bytes, queries, &widen(simd, scales), &widen(simd, mins));
            let codes = &self.keys.codes[kind.code_bytes(step * STEP)..];
            factors.all_products(bytes, kind, codes, &mut ahead, |n, lane, sum| {
                let out = &mut self.scores[(head + n) * self.score_stride + lane..];
                if step == 0 {
                    store(simd, sum, out);
                } else {
                    super::add_to(simd, sum, out);
                }
            });
        }
    }
}

pub(super) struct MixValues<'a> {
    pub(super) values: Groups<'a>,
    pub(super) ahead: &'a [u8],
    pub(super) head_dim: usize,
    pub(super) lanes: Range<usize>,
    pub(super) weights: &'a [f32],
    pub(super) weight_stride: usize,
    pub(super) group: usize,
    pub(super) mixed: &'a mut [f32],
}

impl ByteKernel for MixValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<B: Bytes>(mut self, bytes: B) {
        per_heads!(self.group, self.values.kind, [CodeKind::Int8, CodeKind::Int4],
            (N, kind, head) => self.heads::<B, N>(bytes, kind, head));
    }
}

impl MixValues<'_> {
    #[inline(always)]
    fn heads<B: Bytes, const N: usize>(&mut self, bytes: B, kind: CodeKind, head: usize) {
        let simd = bytes.simd();
        let all = self.lanes == (0..BLOCK);
        let rows: [&[f32]; N] = std::array::from_fn(|n| &self.weights[(head + n) * self.weight_stride..]);
        let mut padded = [[0.0; STEP]; N];
        let weights = if all {
            whole_steps(rows, &mut padded)
        } else {
            // Weights of tokens that are not to be read are zero.
            for (padded, row) in padded.iter_mut().zip(rows) {
                padded[self.lanes.clone()].copy_from_slice(&row[self.lanes.clone()]);
            }
            padded.each_ref()
        };
        let mut ahead = fetch_once(head, self.ahead, kind);
        for group in 0..self.head_dim.div_ceil(GROUP) {
            let affine = group * BLOCK..(group + 1) * BLOCK;
            let (mut scales, mut mins) =
                (widen(simd, &self.values.scales[affine.clone()]), widen(simd, &self.values.mins[affine.clone()]));
            if !all {
                // A token that is not to be read may hold anything.
                for affine in [&mut scales, &mut mins] {
                    affine[..self.lanes.start].fill(0.0);
                    affine[self.lanes.end..].fill(0.0);
                }
            }
            let factors = Factors::new(bytes, weights, &scales, &mins);
            let codes = &self.values.codes[kind.code_bytes(affine.start)..];
            factors.all_products(bytes, kind, codes, &mut ahead, |n, lane, sum| {
                let channel = group * GROUP + lane;
                let mixed = &mut self.mixed[(head + n) * self.head_dim..][..self.head_dim];
                match mixed.len() - channel.min(mixed.len()) {
                    0 => {}
                    rest @ 1..LANES => {
                        let mut part = [0.0; LANES];
                        simd.store(sum, &mut part);
                        mixed[channel..].iter_mut().zip(&part[..rest]).for_each(|(mix, sum)| *mix += sum);
                    }
                    _ => super::add_to(simd, sum, &mut mixed[channel..]),
                }
            });
        }
    }
}

/// What to ask for beside the quads of the heads from `head` on: once, with the first heads of a larger group.
#[inline(always)]
fn fetch_once(head: usize, ahead: &[u8], kind: CodeKind) -> Ahead<'_> {
    Ahead::new(if head == 0 { ahead } else { &[] }, kind.quad_bytes() + QUAD * 2 * size_of::<f16>())
}
