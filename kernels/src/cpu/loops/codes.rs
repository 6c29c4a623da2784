//! The inner loops of decode attention over quantised blocks.
//!
//! A group's scale and minimum are the same for 32 tokens of a key channel, so they go into the query and not into the
//! keys: Σ_c q_c·(code_c·s_c + m_c) = Σ_c (q_c·s_c)·code_c + Σ_c q_c·m_c. In the same way the scale of a token's values
//! goes into its weight. So both loops are the same: up to 32 *factors* a query head (of channels, or of tokens), each
//! multiplied by 32 codes.
//!
//! Where bytes can be multiplied and summed by one instruction, the factors become integers of 15 bits, in two bytes:
//! four codes and four factors are one product of words, and nothing is converted but the sums. The factors of a step
//! share a scale, so one is off by at most a part in 32,512 of the largest: far less than half a step of an 8-bit code.

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
    /// Times the scales of the codes; times 1 / `units` where they are integers.
    floats: [[f32; STEP]; N],
    /// Four a word, the upper eight of fifteen bits.
    high: [[[i8; QUAD]; STEP / QUAD]; N],
    /// The lower seven, -64 to 63.
    low: [[[i8; QUAD]; STEP / QUAD]; N],
    /// What an integer is worth.
    units: [f32; N],
    /// Σ factor · minimum.
    offsets: [f32; N],
}

impl<const N: usize> Factors<N> {
    /// `factors` times `scales`, the offsets by `mins`; factors that are not there are zeros.
    #[inline(always)]
    fn new<B: Bytes>(bytes: B, factors: [&[f32]; N], scales: &[f32; STEP], mins: &[f32; STEP]) -> Self {
        let simd = bytes.simd();
        let mut all = Self {
            floats: [[0.0; STEP]; N],
            high: [[[0; QUAD]; STEP / QUAD]; N],
            low: [[[0; QUAD]; STEP / QUAD]; N],
            units: [0.0; N],
            offsets: [0.0; N],
        };
        let (scales, _) = scales.as_chunks();
        let (mins, _) = mins.as_chunks();
        for n in 0..N {
            let mut padded = [0.0; STEP];
            let factors = match factors[n].first_chunk() {
                Some(factors) => factors,
                None => {
                    padded[..factors[n].len()].copy_from_slice(factors[n]);
                    &padded
                }
            };
            let (factors, _) = factors.as_chunks::<LANES>();
            let mut offset = simd.splat(0.0);
            let mut largest = simd.splat(0.0);
            let mut scaled = [simd.splat(0.0); STEP / LANES];
            for v in 0..STEP / LANES {
                let factor = simd.load(&factors[v]);
                offset = simd.fma(factor, simd.load(&mins[v]), offset);
                scaled[v] = simd.mul(factor, simd.load(&scales[v]));
                largest = simd.max(largest, simd.max(scaled[v], simd.mul(scaled[v], simd.splat(-1.0))));
            }
            all.offsets[n] = simd.sum(offset);
            if B::BYTE_PRODUCTS {
                all.units[n] = simd.largest(largest) / INTEGERS;
                let inverse = simd.splat(if all.units[n] > 0.0 { 1.0 / all.units[n] } else { 0.0 });
                for v in 0..STEP / LANES {
                    scaled[v] = simd.mul(scaled[v], inverse);
                }
            }
            let (floats, _) = all.floats[n].as_chunks_mut::<LANES>();
            for v in 0..STEP / LANES {
                simd.store(scaled[v], &mut floats[v]);
            }
            if B::BYTE_PRODUCTS {
                let (high, low) = (all.high[n].as_flattened_mut(), all.low[n].as_flattened_mut());
                for ((&x, high), low) in all.floats[n].iter().zip(high).zip(low) {
                    let integer = (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
                    let upper = (integer + 64) >> 7;
                    *high = upper as i8;
                    *low = (integer - (upper << 7)) as i8;
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
        if B::BYTE_PRODUCTS {
            let (mut high, mut low) = ([[bytes.zero(); V]; N], [[bytes.zero(); V]; N]);
            for (quad, codes) in codes.chunks_exact(kind.quad_bytes()).take(STEP / QUAD).enumerate() {
                ahead.fetch(simd);
                let (codes, _) = codes.as_chunks();
                let both = match (kind, codes) {
                    (CodeKind::Int8, [low, high]) => [bytes.load(low), bytes.load(high)],
                    (_, [both, ..]) => bytes.low_high(both),
                    _ => return out,
                };
                for n in 0..N {
                    for v in 0..V {
                        high[n][v] = bytes.add_products(high[n][v], both[first + v], self.high[n][quad]);
                        low[n][v] = bytes.add_products(low[n][v], both[first + v], self.low[n][quad]);
                    }
                }
            }
            for n in 0..N {
                let (unit, offset) = (simd.splat(self.units[n]), simd.splat(self.offsets[n]));
                for v in 0..V {
                    let sum = simd.fma(bytes.floats(high[n][v]), simd.splat(128.0), bytes.floats(low[n][v]));
                    out[n][v] = simd.fma(sum, unit, offset);
                }
            }
        } else {
            for n in 0..N {
                out[n] = [simd.splat(self.offsets[n]); V];
            }
            for (quad, codes) in codes.chunks_exact(kind.quad_bytes()).take(STEP / QUAD).enumerate() {
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
        if B::TILE_VECTORS > 1 || !B::BYTE_PRODUCTS {
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
const INTEGERS: f32 = 127.0 * 128.0;

/// Adding 1.5 · 2^23 rounds to an integer, in the low bits.
const ROUND: f32 = 12_582_912.0;

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
        // Weights of tokens that are not to be read are zero.
        let mut weights = [[0.0f32; BLOCK]; N];
        for (n, weights) in weights.iter_mut().enumerate() {
            let from = &self.weights[(head + n) * self.weight_stride..][self.lanes.clone()];
            weights[self.lanes.clone()].copy_from_slice(from);
        }
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
            let factors = Factors::new(bytes, weights.each_ref().map(|weights| &weights[..]), &scales, &mins);
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
