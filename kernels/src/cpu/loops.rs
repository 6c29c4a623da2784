//! The inner loops of decode attention on vectors: core's [`Loops`], for every [`Level`].
//!
//! Keys are channel-major, so 32 tokens are two vectors and a channel is one multiply-add per query head, with no
//! horizontal sum. Up to four query heads of a group share each loaded key and value: a block is read once.

use super::simd::{Kernel, LANES, Level, Simd};
use half::f16;
use std::ops::Range;
use thinkey_core::{
    BLOCK, Error, Loops,
    attend::{KeyLanes, ValueRows},
    storage::{Element, FloatKind, Form},
};

mod codes;

/// Query heads that are served from one pass over a block; a larger group takes several passes over what is then in
/// the first-level cache.
const HEADS: usize = 4;

/// [`Loops`] with the vectors of a level.
#[derive(Clone, Copy, Debug)]
pub struct SimdLoops(pub Level);

impl Loops for SimdLoops {
    #[inline]
    fn key_scores(
        &self,
        keys: KeyLanes<'_>,
        queries: &[f32],
        group: usize,
        scores: &mut [f32],
        score_stride: usize,
    ) -> Result<(), Error> {
        need("queries", group * keys.channels, queries.len())?;
        need("scores", rows(group, score_stride, BLOCK), scores.len())?;
        match keys.kind.form() {
            Form::Float(kind) => {
                need("keys", rows(keys.channels, keys.stride, BLOCK) * kind.bytes(), keys.bytes.len())?;
                self.0.dispatch(KeyScores { kind, keys, queries, group, scores, score_stride });
            }
            Form::Codes(kind) => {
                let ahead = keys.ahead;
                let keys = kind.parts(keys.bytes, keys.channels)?;
                self.0.dispatch(codes::KeyScores { keys, ahead, queries, group, scores, score_stride });
            }
        }
        Ok(())
    }

    #[inline]
    fn mix_values(
        &self,
        values: ValueRows<'_>,
        lanes: Range<usize>,
        weights: &[f32],
        weight_stride: usize,
        group: usize,
        mixed: &mut [f32],
    ) -> Result<(), Error> {
        if lanes.is_empty() {
            return Ok(());
        }
        need("weights", rows(group, weight_stride, lanes.end), weights.len())?;
        need("mixed values", group * values.head_dim, mixed.len())?;
        match values.kind.form() {
            Form::Float(kind) => {
                need("values", lanes.end * values.head_dim * kind.bytes(), values.bytes.len())?;
                self.0.dispatch(MixValues { kind, values, lanes, weights, weight_stride, group, mixed });
            }
            Form::Codes(kind) => {
                if lanes.end > BLOCK {
                    return Err(Error::Index { what: "lane", index: lanes.end, limit: BLOCK + 1 });
                }
                let (head_dim, ahead) = (values.head_dim, values.ahead);
                let values = kind.parts(values.bytes, BLOCK * head_dim.div_ceil(codes::GROUP))?;
                self.0.dispatch(codes::MixValues {
                    values,
                    ahead,
                    head_dim,
                    lanes,
                    weights,
                    weight_stride,
                    group,
                    mixed,
                });
            }
        }
        Ok(())
    }

    #[inline]
    fn largest(&self, x: &[f32]) -> f32 {
        self.0.dispatch(Largest { x })
    }

    #[inline]
    fn exponentials(&self, x: &mut [f32], shift: f32) -> f32 {
        self.0.dispatch(Exponentials { x, shift })
    }
}

/// Elements from the start of the first to the end of the last of `count` rows.
fn rows(count: usize, stride: usize, len: usize) -> usize {
    if count == 0 { 0 } else { (count - 1).saturating_mul(stride).saturating_add(len) }
}

fn need(what: &'static str, expected: usize, actual: usize) -> Result<(), Error> {
    if actual < expected { Err(Error::Length { what, expected, actual }) } else { Ok(()) }
}

/// Sixteen stored numbers at the start of `bytes`, which has them.
#[inline(always)]
fn load<S: Simd>(simd: S, kind: FloatKind, bytes: &[u8]) -> S::F32 {
    match kind {
        FloatKind::F16 => bytes.first_chunk().map(|bytes| simd.load_f16(bytes)),
        FloatKind::F32 => bytes.first_chunk().map(|bytes| simd.load_f32(bytes)),
    }
    .unwrap_or_else(|| simd.splat(0.0))
}

/// One stored number.
#[inline(always)]
fn load_one(kind: FloatKind, bytes: &[u8], at: usize) -> f32 {
    match kind {
        FloatKind::F16 => f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).load(),
        FloatKind::F32 => f32::from_le_bytes([bytes[4 * at], bytes[4 * at + 1], bytes[4 * at + 2], bytes[4 * at + 3]]),
    }
}

#[inline(always)]
fn store<S: Simd>(simd: S, vector: S::F32, out: &mut [f32]) {
    if let Some(out) = out.first_chunk_mut() {
        simd.store(vector, out);
    }
}

/// Chains of multiply-adds that each sum is split into, even and odd tokens apart, so that they hide their latency: two where
/// registers suffice or there are few sums.
#[inline(always)]
const fn chains<S: Simd>(heads: usize) -> usize {
    if S::TILE_VECTORS > 1 || heads == 1 { 2 } else { 1 }
}

/// Adds a vector to the front of `out`.
#[inline(always)]
fn add_to<S: Simd>(simd: S, vector: S::F32, out: &mut [f32]) {
    if let Some(out) = out.first_chunk_mut() {
        simd.store(simd.add(simd.load(out), vector), out);
    }
}

/// Runs `$body` with the constant `$N` = the heads at hand, at most [`HEADS`].
macro_rules! with_heads {
    ($count:expr, $N:ident => $body:expr) => {
        match $count {
            1 => {
                const $N: usize = 1;
                $body
            }
            2 => {
                const $N: usize = 2;
                $body
            }
            3 => {
                const $N: usize = 3;
                $body
            }
            _ => {
                const $N: usize = HEADS;
                $body
            }
        }
    };
}
use with_heads;

struct KeyScores<'a> {
    kind: FloatKind,
    keys: KeyLanes<'a>,
    queries: &'a [f32],
    group: usize,
    scores: &'a mut [f32],
    score_stride: usize,
}

impl Kernel for KeyScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut head = 0;
        while head < self.group {
            let count = (self.group - head).min(HEADS);
            match self.kind {
                FloatKind::F16 => with_heads!(count, N => self.heads::<S, N>(simd, FloatKind::F16, head)),
                FloatKind::F32 => with_heads!(count, N => self.heads::<S, N>(simd, FloatKind::F32, head)),
            }
            head += count;
        }
    }
}

impl KeyScores<'_> {
    #[inline(always)]
    fn heads<S: Simd, const N: usize>(&mut self, simd: S, kind: FloatKind, head: usize) {
        let KeyLanes { channels, stride, bytes, ahead, .. } = self.keys;
        // Fetched once, with the first heads of a larger group.
        let mut ahead = if head == 0 { ahead } else { &[] }.chunks(BLOCK * kind.bytes());
        let queries: [&[f32]; N] = std::array::from_fn(|n| &self.queries[(head + n) * channels..][..channels]);
        let mut sums = [[simd.splat(0.0); 2]; N];
        for (channel, keys) in bytes.chunks(stride * kind.bytes()).enumerate().take(channels) {
            if let Some(ahead) = ahead.next() {
                simd.prefetch(ahead);
            }
            let keys = [load(simd, kind, keys), load(simd, kind, &keys[LANES * kind.bytes()..])];
            for (query, sums) in queries.iter().zip(&mut sums) {
                let q = simd.splat(query[channel]);
                sums[0] = simd.fma(q, keys[0], sums[0]);
                sums[1] = simd.fma(q, keys[1], sums[1]);
            }
        }
        for (n, [low, high]) in sums.into_iter().enumerate() {
            let out = &mut self.scores[(head + n) * self.score_stride..];
            store(simd, low, out);
            store(simd, high, &mut out[LANES..]);
        }
    }
}

struct MixValues<'a> {
    kind: FloatKind,
    values: ValueRows<'a>,
    lanes: Range<usize>,
    weights: &'a [f32],
    weight_stride: usize,
    group: usize,
    mixed: &'a mut [f32],
}

impl Kernel for MixValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut head = 0;
        while head < self.group {
            let count = (self.group - head).min(HEADS);
            match self.kind {
                FloatKind::F16 => with_heads!(count, N => self.heads::<S, N>(simd, FloatKind::F16, head)),
                FloatKind::F32 => with_heads!(count, N => self.heads::<S, N>(simd, FloatKind::F32, head)),
            }
            head += count;
        }
    }
}

impl MixValues<'_> {
    #[inline(always)]
    fn heads<S: Simd, const N: usize>(&mut self, simd: S, kind: FloatKind, head: usize) {
        let ValueRows { bytes, head_dim, ahead, .. } = self.values;
        let weights: [&[f32]; N] =
            std::array::from_fn(|n| &self.weights[(head + n) * self.weight_stride..][..self.lanes.end]);
        let (size, count) = (kind.bytes(), self.lanes.len());
        let rows = &bytes[self.lanes.start * head_dim * size..self.lanes.end * head_dim * size];
        let weights: [&[f32]; N] = std::array::from_fn(|n| &weights[n][self.lanes.start..][..count]);
        let mut vector = 0;
        while vector < head_dim / LANES {
            let column = vector * LANES;
            // Two vectors of channels at a time: a weight is loaded once for both.
            let pair = vector + 1 < head_dim / LANES;
            let mut ahead = if head + vector == 0 { ahead } else { &[] }.chunks(head_dim * kind.bytes());
            let mut sums = [[[simd.splat(0.0); 2]; 2]; N];
            for (lane, row) in rows.chunks_exact(head_dim * size).enumerate() {
                if let Some(ahead) = ahead.next() {
                    simd.prefetch(ahead);
                }
                let row = &row[column * size..];
                let low = load(simd, kind, row);
                let high = if pair { load(simd, kind, &row[LANES * size..]) } else { low };
                for (weights, sums) in weights.iter().zip(&mut sums) {
                    let (weight, sums) = (simd.splat(weights[lane]), &mut sums[lane % chains::<S>(N)]);
                    sums[0] = simd.fma(weight, low, sums[0]);
                    if pair {
                        sums[1] = simd.fma(weight, high, sums[1]);
                    }
                }
            }
            for (n, [even, odd]) in sums.into_iter().enumerate() {
                let mixed = &mut self.mixed[(head + n) * head_dim + column..];
                add_to(simd, simd.add(even[0], odd[0]), mixed);
                if pair {
                    add_to(simd, simd.add(even[1], odd[1]), &mut mixed[LANES..]);
                }
            }
            vector += 2;
        }
        let vectors = head_dim / LANES;
        for column in vectors * LANES..head_dim {
            for (n, weights) in weights.iter().enumerate() {
                for (lane, weight) in weights.iter().enumerate() {
                    let value = load_one(kind, rows, lane * head_dim + column);
                    self.mixed[(head + n) * head_dim + column] += weight * value;
                }
            }
        }
    }
}

struct Exponentials<'a> {
    x: &'a mut [f32],
    shift: f32,
}

impl Kernel for Exponentials<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        let mut sums = [0.0f32; LANES];
        let (vectors, rest) = self.x.as_chunks_mut::<LANES>();
        for vector in vectors {
            for (x, sum) in vector.iter_mut().zip(&mut sums) {
                *x = exponential(*x - self.shift);
                *sum += *x;
            }
        }
        for (x, sum) in rest.iter_mut().zip(&mut sums) {
            *x = exponential(*x - self.shift);
            *sum += *x;
        }
        sums.iter().sum()
    }
}

struct Largest<'a> {
    x: &'a [f32],
}

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (vectors, rest) = self.x.as_chunks::<LANES>();
        for vector in vectors {
            for (lane, x) in lanes.iter_mut().zip(vector) {
                // A comparison and not `max`: that is one instruction for vectors too.
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// e^x for x ≤ 0, within 2 units in the last place; 0 below -87. Branch-free, so that loops over it vectorise.
///
/// e^x = 2^n · e^r with n = round(x / ln 2) and |r| ≤ ln 2 / 2; e^r by its Taylor polynomial of degree 7.
#[inline(always)]
pub(super) fn exponential(x: f32) -> f32 {
    // 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with few enough bits that n · HIGH is exact (Cody & Waite).
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * HIGH) - n * LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    // The integer n sits in the low bits of `shifted`; 127 biases the exponent.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * scale }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use thinkey_core::{Plain, StorageKind, quant::CodeKind};

    /// Numbers on cache lines, as the cache has them, and how many bytes they are: any codes for as many groups of 32,
    /// scales and minima between -1 and 1, where `kind` is quantised.
    fn stored(kind: StorageKind, seed: &mut u64, len: usize) -> (Vec<[u64; 8]>, usize) {
        let size = match kind.form() {
            Form::Float(kind) => len * kind.bytes(),
            Form::Codes(kind) => kind.bytes(len.div_ceil(codes::GROUP)),
        };
        let mut lines = vec![[0u64; 8]; size.div_ceil(64)];
        let bytes: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut lines)[..size];
        let floats = |bytes: &mut [u8], seed: &mut u64| {
            bytes.chunks_exact_mut(2).for_each(|to| to.copy_from_slice(&f16::from_f32(number(seed)).to_le_bytes()));
        };
        match kind.form() {
            Form::Float(FloatKind::F16) => floats(bytes, seed),
            Form::Float(FloatKind::F32) => {
                bytes.chunks_exact_mut(4).for_each(|to| to.copy_from_slice(&number(seed).to_le_bytes()));
            }
            Form::Codes(kind) => {
                let (codes, affine) = bytes.split_at_mut(len.div_ceil(codes::GROUP) * kind.group_bytes());
                codes.iter_mut().for_each(|code| *code = (number(seed) * 128.0 + 128.0) as u8);
                floats(affine, seed);
            }
        }
        (lines, size)
    }

    /// How far a level may be off: rounding of sums of numbers up to 1, or of codes up to the largest.
    fn tolerance(kind: StorageKind) -> f32 {
        match kind.form() {
            Form::Float(_) => 1e-4,
            Form::Codes(kind) => 2e-4 * f32::from(CodeKind::largest(kind)),
        }
    }

    fn number(seed: &mut u64) -> f32 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn numbers(seed: &mut u64, len: usize) -> Vec<f32> {
        std::iter::repeat_with(|| number(seed)).take(len).collect()
    }

    proptest! {
        #[test]
        fn every_level_equals_the_plain_loops(
            channels in 1usize..=130,
            extra in 0usize..3,
            group in 1usize..=9,
            kind in prop::sample::select(&StorageKind::ALL[..]),
            lanes in (0usize..=32, 0usize..=32),
            mut seed in any::<u64>(),
        ) {
            let stride = if matches!(kind.form(), Form::Float(_)) { BLOCK * (1 + extra) } else { BLOCK };
            let (lines, size) = stored(kind, &mut seed, (channels - 1) * stride + BLOCK);
            let keys = KeyLanes { kind, bytes: &bytemuck::cast_slice(&lines)[..size], channels, stride, ahead: &[] };
            let queries = numbers(&mut seed, group * channels);
            let mut expected = vec![0.0; group * 40];
            Plain.key_scores(keys, &queries, group, &mut expected, 40).unwrap();

            let row = if matches!(kind.form(), Form::Float(_)) { channels } else { channels.next_multiple_of(codes::GROUP) };
            let (lines, size) = stored(kind, &mut seed, BLOCK * row);
            let values = ValueRows { kind, bytes: &bytemuck::cast_slice(&lines)[..size], head_dim: channels, ahead: &[] };
            let weights = numbers(&mut seed, group * 40);
            let before = numbers(&mut seed, group * channels);
            let lanes = lanes.0.min(lanes.1)..lanes.0.max(lanes.1);
            let mut expected_mix = before.clone();
            Plain.mix_values(values, lanes.clone(), &weights, 40, group, &mut expected_mix).unwrap();

            for level in Level::available() {
                let loops = SimdLoops(level);
                let mut scores = vec![0.0; group * 40];
                loops.key_scores(keys, &queries, group, &mut scores, 40).unwrap();
                let mut mix = before.clone();
                loops.mix_values(values, lanes.clone(), &weights, 40, group, &mut mix).unwrap();
                for (a, b) in scores.iter().chain(&mix).zip(expected.iter().chain(&expected_mix)) {
                    prop_assert!((a - b).abs() < tolerance(kind), "{}: {a} instead of {b}", level.name());
                }
            }
        }

        #[test]
        fn exponentials_equal_the_standard_library(
            x in prop::collection::vec(-120.0f32..=0.0, 0..100),
            shift in -50.0f32..50.0,
        ) {
            for level in Level::available() {
                let mut ours: Vec<f32> = x.iter().map(|x| x + shift).collect();
                let theirs: Vec<f32> = ours.iter().map(|x| (x - shift).exp()).collect();
                let largest = SimdLoops(level).largest(&ours);
                prop_assert_eq!(largest, ours.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                let sum = SimdLoops(level).exponentials(&mut ours, shift);
                for (a, b) in ours.iter().zip(&theirs) {
                    prop_assert!((a - b).abs() <= 4e-7 * b + 1e-37, "{a} instead of {b}");
                }
                let expected: f32 = theirs.iter().sum();
                prop_assert!((sum - expected).abs() <= 1e-5 * expected.max(1e-30));
            }
        }
    }

    #[test]
    fn infinity_weighs_nothing_and_the_largest_weighs_one() {
        for level in Level::available() {
            let mut x = [f32::NEG_INFINITY, 3.0, 2.0];
            let sum = SimdLoops(level).exponentials(&mut x, 3.0);
            assert_eq!((x[0], x[1]), (0.0, 1.0));
            assert!((sum - 1.367_879_4).abs() < 1e-6);
        }
    }

    #[test]
    fn short_slices_are_errors() {
        let loops = SimdLoops(Level::best());
        let keys = KeyLanes { kind: StorageKind::F32, bytes: &[0; 127], channels: 1, stride: 32, ahead: &[] };
        assert!(loops.key_scores(keys, &[0.0], 1, &mut [0.0; 32], 32).is_err());
        let values = ValueRows { kind: StorageKind::F32, bytes: &[0; 64], head_dim: 16, ahead: &[] };
        assert!(loops.mix_values(values, 0..2, &[0.0; 32], 32, 1, &mut [0.0; 16]).is_err());
        assert!(loops.mix_values(values, 0..1, &[0.0; 32], 32, 1, &mut [0.0; 15]).is_err());
    }
}
