//! The inner loops of decode attention over quantised blocks.
//!
//! A group's scale and minimum are the same for 32 tokens of a key channel, so they go into the query and not into the
//! keys: Σ_c q_c·(code_c·s_c + m_c) = Σ_c (q_c·s_c)·code_c + Σ_c q_c·m_c. In the same way the scale of a token's values
//! goes into its weight. What is left in the loop is to widen codes and to multiply and add.

use super::{Ahead, HEADS, LANES, Simd, store, with_heads};
use crate::cpu::simd::Kernel;
use half::f16;
use std::ops::Range;
use thinkey_core::{
    BLOCK,
    quant::{CodeKind, Groups},
    storage::Element,
};

pub(super) use thinkey_core::quant::GROUP;

/// The codes of a group as floats.
#[inline(always)]
fn load<S: Simd>(simd: S, kind: CodeKind, codes: &[u8]) -> [S::F32; 2] {
    match kind {
        CodeKind::Int8 => match codes.as_chunks() {
            ([low, high, ..], _) => [simd.load_u8(low), simd.load_u8(high)],
            _ => [simd.splat(0.0); 2],
        },
        CodeKind::Int4 => match codes.first_chunk() {
            Some(codes) => simd.halves(codes),
            None => [simd.splat(0.0); 2],
        },
    }
}

/// `halves` as floats into the front of `out`.
#[inline(always)]
fn widen<S: Simd>(simd: S, halves: &[f16], out: &mut [f32]) {
    let (vectors, _) = bytemuck::cast_slice::<f16, u8>(halves).as_chunks::<{ 2 * LANES }>();
    let (outs, rest) = out[..halves.len()].as_chunks_mut::<LANES>();
    for (vector, out) in vectors.iter().zip(outs) {
        simd.store(simd.load_f16(vector), out);
    }
    for (half, out) in halves[LANES * vectors.len()..].iter().zip(rest) {
        *out = half.load();
    }
}

/// Writes x·scale for each x and returns Σ x·min; the other slices are at least as long.
#[inline(always)]
fn scale_by<S: Simd>(simd: S, x: &[f32], scales: &[f32], mins: &[f32], out: &mut [f32]) -> f32 {
    let (vectors, rest) = x.as_chunks::<LANES>();
    let (scale_vectors, _) = scales.as_chunks::<LANES>();
    let (min_vectors, _) = mins.as_chunks::<LANES>();
    let (out_vectors, _) = out.as_chunks_mut::<LANES>();
    let mut offsets = simd.splat(0.0);
    for (((x, scale), min), out) in vectors.iter().zip(scale_vectors).zip(min_vectors).zip(out_vectors) {
        let x = simd.load(x);
        simd.store(simd.mul(x, simd.load(scale)), out);
        offsets = simd.fma(x, simd.load(min), offsets);
    }
    let mut offset = simd.sum(offsets);
    let done = LANES * vectors.len();
    for (((x, scale), min), out) in rest.iter().zip(&scales[done..]).zip(&mins[done..]).zip(&mut out[done..]) {
        *out = x * scale;
        offset += x * min;
    }
    offset
}

pub(super) struct KeyScores<'a> {
    pub(super) keys: Groups<'a>,
    pub(super) ahead: &'a [u8],
    pub(super) queries: &'a [f32],
    pub(super) group: usize,
    pub(super) scores: &'a mut [f32],
    pub(super) score_stride: usize,
}

/// Channels whose scales are gone through at a time: little enough to stay in the first-level cache beside the keys.
const STEP: usize = 32;

impl Kernel for KeyScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut head = 0;
        while head < self.group {
            let count = (self.group - head).min(HEADS);
            match self.keys.kind {
                CodeKind::Int8 => with_heads!(count, N => self.heads::<S, N>(simd, CodeKind::Int8, head)),
                CodeKind::Int4 => with_heads!(count, N => self.heads::<S, N>(simd, CodeKind::Int4, head)),
            }
            head += count;
        }
    }
}

impl KeyScores<'_> {
    #[inline(always)]
    fn heads<S: Simd, const N: usize>(&mut self, simd: S, kind: CodeKind, head: usize) {
        let channels = self.keys.scales.len();
        let mut sums = [[simd.splat(0.0); 2]; N];
        // Fetched once, with the first heads of a larger group.
        let mut ahead = Ahead::new(if head == 0 { self.ahead } else { &[] }, kind.group_bytes() + 4);
        let steps = self.keys.scales.chunks(STEP).zip(self.keys.mins.chunks(STEP));
        for (step, (scales, mins)) in steps.enumerate() {
            let (mut wide_scales, mut wide_mins) = ([0.0; STEP], [0.0; STEP]);
            widen(simd, scales, &mut wide_scales);
            widen(simd, mins, &mut wide_mins);
            let mut scaled = [[0.0f32; STEP]; N];
            for (n, (scaled, sums)) in scaled.iter_mut().zip(&mut sums).enumerate() {
                let query = &self.queries[(head + n) * channels + step * STEP..][..scales.len()];
                let offset = simd.splat(scale_by(simd, query, &wide_scales, &wide_mins, scaled));
                *sums = [simd.add(sums[0], offset), simd.add(sums[1], offset)];
            }
            let codes = &self.keys.codes[step * STEP * kind.group_bytes()..];
            for (channel, codes) in codes.chunks_exact(kind.group_bytes()).take(scales.len()).enumerate() {
                ahead.fetch(simd);
                let [low, high] = load(simd, kind, codes);
                for (scaled, sums) in scaled.iter().zip(&mut sums) {
                    let q = simd.splat(scaled[channel % STEP]);
                    sums[0] = simd.fma(q, low, sums[0]);
                    sums[1] = simd.fma(q, high, sums[1]);
                }
            }
        }
        for (n, [low, high]) in sums.into_iter().enumerate() {
            let out = &mut self.scores[(head + n) * self.score_stride..];
            store(simd, low, out);
            store(simd, high, &mut out[LANES..]);
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

impl Kernel for MixValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut head = 0;
        while head < self.group {
            let count = (self.group - head).min(HEADS);
            match self.values.kind {
                CodeKind::Int8 => with_heads!(count, N => self.heads::<S, N>(simd, CodeKind::Int8, head)),
                CodeKind::Int4 => with_heads!(count, N => self.heads::<S, N>(simd, CodeKind::Int4, head)),
            }
            head += count;
        }
    }
}

impl MixValues<'_> {
    #[inline(always)]
    fn heads<S: Simd, const N: usize>(&mut self, simd: S, kind: CodeKind, head: usize) {
        let row = self.head_dim.div_ceil(GROUP);
        // Weights of tokens that are not to be read are zero.
        let mut weights = [[0.0f32; BLOCK]; N];
        for (n, weights) in weights.iter_mut().enumerate() {
            let from = &self.weights[(head + n) * self.weight_stride..][self.lanes.clone()];
            weights[self.lanes.clone()].copy_from_slice(from);
        }
        // Fetched once, with the first heads of a larger group.
        let mut ahead = Ahead::new(if head == 0 { self.ahead } else { &[] }, kind.group_bytes() + 4);
        for group in 0..row {
            let (mut scales, mut mins) = ([0.0; BLOCK], [0.0; BLOCK]);
            let affine = group * BLOCK..(group + 1) * BLOCK;
            widen(simd, &self.values.scales[affine.clone()], &mut scales);
            widen(simd, &self.values.mins[affine], &mut mins);
            let mut scaled = [[0.0f32; BLOCK]; N];
            let mut sums = [[simd.splat(0.0); 2]; N];
            // A token that is not to be read may hold anything.
            scales[..self.lanes.start].fill(0.0);
            scales[self.lanes.end..].fill(0.0);
            mins[..self.lanes.start].fill(0.0);
            mins[self.lanes.end..].fill(0.0);
            for ((scaled, weights), sums) in scaled.iter_mut().zip(&weights).zip(&mut sums) {
                *sums = [simd.splat(scale_by(simd, weights, &scales, &mins, scaled)); 2];
            }
            let rows = self.values.codes.chunks_exact(row * kind.group_bytes()).enumerate();
            for (lane, codes) in rows.take(self.lanes.end).skip(self.lanes.start) {
                ahead.fetch(simd);
                let [low, high] = load(simd, kind, &codes[group * kind.group_bytes()..]);
                for (scaled, sums) in scaled.iter().zip(&mut sums) {
                    let weight = simd.splat(scaled[lane % BLOCK]);
                    sums[0] = simd.fma(weight, low, sums[0]);
                    sums[1] = simd.fma(weight, high, sums[1]);
                }
            }
            for (n, [low, high]) in sums.into_iter().enumerate() {
                let channels = group * GROUP..self.head_dim.min((group + 1) * GROUP);
                let mut sum = [0.0f32; GROUP];
                store(simd, low, &mut sum);
                store(simd, high, &mut sum[LANES..]);
                let mixed = &mut self.mixed[(head + n) * self.head_dim..][channels];
                for (mix, sum) in mixed.iter_mut().zip(sum) {
                    *mix += sum;
                }
            }
        }
    }
}
