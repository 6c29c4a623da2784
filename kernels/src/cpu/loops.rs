//! The inner loops of decode attention on vectors: core's [`Loops`], for every [`Level`].
//!
//! Keys are channel-major, so 32 tokens are two vectors and a channel is one multiply-add per query head, with no
//! horizontal sum. Up to four query heads of a group share each loaded key and value: a block is read once.

use super::{
    ahead::Ahead,
    exponential::exponential,
    simd::{Kernel, LANES, LINE, Level, Simd},
};
use half::{bf16, f16};
use std::ops::Range;
use thinkey_core::{
    BLOCK, Error, Loops,
    attend::{KeyLanes, TILE_BLOCKS, ValueRows},
    quant::{Groups, mixed::KeyGroups},
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
            Form::Codes(_) | Form::Turned(_) | Form::Mixed => {
                self.tile_scores(&[keys], queries, group, scores, score_stride)?;
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
            Form::Codes(_) | Form::Turned(_) | Form::Mixed => {
                self.mix_tile(&[(values, lanes)], weights, weight_stride, group, mixed)?;
            }
        }
        Ok(())
    }

    #[inline]
    fn tile_scores(
        &self,
        keys: &[KeyLanes<'_>],
        queries: &[f32],
        group: usize,
        scores: &mut [f32],
        score_stride: usize,
    ) -> Result<(), Error> {
        let Some(first) = keys.first() else { return Ok(()) };
        let (kind, channels) = (first.kind, first.channels);
        if let Form::Float(_) = kind.form() {
            for (index, keys) in keys.iter().enumerate() {
                need("scores", index * BLOCK, scores.len())?;
                self.key_scores(*keys, queries, group, &mut scores[index * BLOCK..], score_stride)?;
            }
            return Ok(());
        }
        let count = keys.len();
        need("blocks of a tile", count, TILE_BLOCKS)?;
        need("queries", group * channels, queries.len())?;
        need("scores", rows(group, score_stride, count * BLOCK), scores.len())?;
        // Channels of one kind, then those of another, if there are some.
        let KeyGroups { parts, front } = KeyGroups::new(kind.form(), first.bytes, channels)?;
        let mut tiles = parts.map(|part| [part; TILE_BLOCKS]);
        let mut ahead: [[&[u8]; TILE_BLOCKS]; 2] = [[&[]; TILE_BLOCKS]; 2];
        for (index, block) in keys.iter().enumerate() {
            need("channels of keys", channels, block.channels)?;
            let groups = KeyGroups::new(block.kind.form(), block.bytes, channels)?;
            let (first, rest) = block.ahead.split_at(front.min(block.ahead.len()));
            for (part, bytes) in [first, rest].into_iter().enumerate() {
                (tiles[part][index], ahead[part][index]) = (groups.parts[part], bytes);
            }
        }
        let mut before = 0;
        for (tile, ahead) in tiles.iter().zip(&ahead) {
            let own = tile[0].affine.len();
            if own > 0 {
                let (keys, ahead, channels) = (&tile[..count], &ahead[..count], [before, channels]);
                let scores = &mut *scores;
                self.0.dispatch_bytes(codes::KeyScores { keys, ahead, channels, queries, group, scores, score_stride });
            }
            before += own;
        }
        Ok(())
    }

    #[inline]
    fn mix_tile(
        &self,
        values: &[(ValueRows<'_>, Range<usize>)],
        weights: &[f32],
        weight_stride: usize,
        group: usize,
        mixed: &mut [f32],
    ) -> Result<(), Error> {
        let Some((first, _)) = values.first() else { return Ok(()) };
        let (head_dim, count) = (first.head_dim, values.len());
        let Some(groups) = value_groups(first)? else {
            for (index, (values, lanes)) in values.iter().enumerate() {
                need("weights", index * BLOCK, weights.len())?;
                self.mix_values(*values, lanes.clone(), &weights[index * BLOCK..], weight_stride, group, mixed)?;
            }
            return Ok(());
        };
        need("blocks of a tile", count, TILE_BLOCKS)?;
        need("mixed values", group * head_dim, mixed.len())?;
        let mut tile = [groups; TILE_BLOCKS];
        let mut ahead: [&[u8]; TILE_BLOCKS] = [&[]; TILE_BLOCKS];
        let mut tokens: [Range<usize>; TILE_BLOCKS] = std::array::from_fn(|_| 0..0);
        for (index, (values, lanes)) in values.iter().enumerate() {
            if lanes.end > BLOCK {
                return Err(Error::Index { what: "lane", index: lanes.end, limit: BLOCK + 1 });
            }
            need("channels of values", head_dim, values.head_dim)?;
            need("weights", rows(group, weight_stride, index * BLOCK + lanes.end), weights.len())?;
            (tile[index], ahead[index]) = (value_groups(values)?.unwrap_or(groups), values.ahead);
            tokens[index] = lanes.start.min(lanes.end)..lanes.end;
        }
        let (values, ahead, lanes) = (&tile[..count], &ahead[..count], &tokens[..count]);
        self.0.dispatch_bytes(codes::MixValues {
            values,
            ahead,
            lanes,
            head_dim,
            weights,
            weight_stride,
            group,
            mixed,
        });
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

/// The parts of a value block; none where its numbers are floats.
fn value_groups<'a>(values: &ValueRows<'a>) -> Result<Option<Groups<'a>>, Error> {
    match values.kind.form() {
        Form::Codes(kind) => kind.parts(values.bytes, BLOCK * values.head_dim.div_ceil(codes::GROUP)).map(Some),
        Form::Turned(kind) => kind.turned_parts(values.bytes, values.head_dim).map(Some),
        Form::Float(_) => Ok(None),
        Form::Mixed => Err(Error::Inconsistent { what: "how values are stored" }),
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
    // No closures: they are compiled without the level's instructions where they are not inlined early.
    if kind == FloatKind::F32 {
        return if let Some(bytes) = bytes.first_chunk() { simd.load_f32(bytes) } else { simd.splat(0.0) };
    }
    match bytes.first_chunk() {
        Some(bytes) if kind == FloatKind::F16 => simd.load_f16(bytes),
        Some(bytes) => simd.load_bf16(bytes),
        None => simd.splat(0.0),
    }
}

/// One stored number.
#[inline(always)]
fn load_one(kind: FloatKind, bytes: &[u8], at: usize) -> f32 {
    match kind {
        FloatKind::F16 => f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).load(),
        FloatKind::Bf16 => bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).load(),
        FloatKind::F32 => f32::from_le_bytes([bytes[4 * at], bytes[4 * at + 1], bytes[4 * at + 2], bytes[4 * at + 3]]),
    }
}

#[inline(always)]
fn store<S: Simd>(simd: S, vector: S::F32, out: &mut [f32]) {
    if let Some(out) = out.first_chunk_mut() {
        simd.store(vector, out);
    }
}

/// Some columns of rows of values, and the weights of the rows for `N` heads.
struct Columns<'a, const N: usize> {
    kind: FloatKind,
    rows: &'a [u8],
    /// Bytes of a row.
    row: usize,
    /// Bytes of a row before the columns.
    offset: usize,
    weights: [&'a [f32]; N],
    ahead: Ahead<'a>,
}

impl<const N: usize> Columns<'_, N> {
    /// The weighted sum of the rows for each head, `V` vectors. Even and odd rows go apart where registers suffice: two chains
    /// of multiply-adds a sum hide their latency.
    #[inline(always)]
    fn mix<S: Simd, const V: usize>(mut self, simd: S) -> [[S::F32; V]; N] {
        let apart = S::TILE_VECTORS > 1 || V == 1;
        let (mut even, mut odd) = ([[simd.splat(0.0); V]; N], [[simd.splat(0.0); V]; N]);
        let pairs = self.rows.chunks_exact(2 * self.row);
        let rest = pairs.remainder();
        let mut lane = 0;
        for pair in pairs {
            let (first, second) = pair.split_at(self.row);
            self.ahead.fetch(simd);
            even = self.add(simd, first, lane, even);
            self.ahead.fetch(simd);
            if apart {
                odd = self.add(simd, second, lane + 1, odd);
            } else {
                even = self.add(simd, second, lane + 1, even);
            }
            lane += 2;
        }
        if !rest.is_empty() {
            even = self.add(simd, rest, lane, even);
        }
        for n in 0..N {
            for v in 0..V {
                even[n][v] = simd.add(even[n][v], odd[n][v]);
            }
        }
        even
    }

    /// Sums with one row more. By value: sums that someone points to do not stay in registers.
    #[inline(always)]
    fn add<S: Simd, const V: usize>(
        &self,
        simd: S,
        row: &[u8],
        lane: usize,
        sums: [[S::F32; V]; N],
    ) -> [[S::F32; V]; N] {
        let (mut sums, mut values) = (sums, [simd.splat(0.0); V]);
        let row = &row[self.offset..];
        for v in 0..V {
            values[v] = load(simd, self.kind, &row[v * LANES * self.kind.bytes()..]);
        }
        for (weights, sums) in self.weights.iter().zip(&mut sums) {
            let weight = simd.splat(weights[lane]);
            for (sum, &value) in sums.iter_mut().zip(&values) {
                *sum = simd.fma(weight, value, *sum);
            }
        }
        sums
    }
}

/// Adds a vector to the front of `out`.
#[inline(always)]
fn add_to<S: Simd>(simd: S, vector: S::F32, out: &mut [f32]) {
    if let Some(out) = out.first_chunk_mut() {
        simd.store(simd.add(simd.load(out), vector), out);
    }
}

/// Runs `$body` for all heads of a group, at most [`HEADS`] at a time, or one by one where `$S` is a [`Simd`] that does not
/// [share](Simd::SHARES): from head `$head` on, with the constant `$N`, how many they are.
macro_rules! per_heads {
    ($S:ty, $group:expr, ($N:ident, $head:ident) => $body:expr) => {
        if <$S as Simd>::SHARES {
            let mut $head = 0;
            while $head < $group {
                let count = ($group - $head).min(HEADS);
                match count {
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
                $head += count;
            }
        } else {
            for $head in 0..$group {
                const $N: usize = 1;
                $body
            }
        }
    };
}
use per_heads;

/// Runs `$body` with the constant `$k`, which of `$kinds` `$kind` is; `$other` where it is `$others`.
macro_rules! per_kind {
    ($kind:expr, [$($kinds:path),*], $k:ident => $body:expr $(, $others:path => $other:expr)?) => {
        match $kind {
            $($kinds => {
                let $k = $kinds;
                $body
            })*
            $($others => $other,)?
        }
    };
}
use per_kind;

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
        per_kind!(self.kind, [FloatKind::F16, FloatKind::Bf16, FloatKind::F32], kind => {
            per_heads!(S, self.group, (N, head) => self.heads::<S, N>(simd, kind, head))
        });
    }
}

impl KeyScores<'_> {
    #[inline(always)]
    fn heads<S: Simd, const N: usize>(&mut self, simd: S, kind: FloatKind, head: usize) {
        let KeyLanes { channels, stride, bytes, ahead, .. } = self.keys;
        // Fetched once, with the first heads of a larger group.
        let mut ahead = Ahead::new(if head == 0 { ahead } else { &[] }, BLOCK * kind.bytes());
        let queries: [&[f32]; N] = std::array::from_fn(|n| &self.queries[(head + n) * channels..][..channels]);
        let mut sums = [[simd.splat(0.0); 2]; N];
        // Channels may lie nearer to each other than 32 lanes: what follows is read then, and of no meaning.
        for channel in 0..channels {
            ahead.fetch(simd);
            let keys = &bytes[channel * stride * kind.bytes()..][..BLOCK * kind.bytes()];
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
        per_kind!(self.kind, [FloatKind::F16, FloatKind::Bf16, FloatKind::F32], kind => {
            per_heads!(S, self.group, (N, head) => self.heads::<S, N>(simd, kind, head))
        });
    }
}

impl MixValues<'_> {
    #[inline(always)]
    fn heads<S: Simd, const N: usize>(&mut self, simd: S, kind: FloatKind, head: usize) {
        let ValueRows { bytes, head_dim, ahead, .. } = self.values;
        let weights: [&[f32]; N] =
            std::array::from_fn(|n| &self.weights[(head + n) * self.weight_stride..][..self.lanes.end]);
        let size = kind.bytes();
        let rows = &bytes[self.lanes.start * head_dim * size..self.lanes.end * head_dim * size];
        let weights: [&[f32]; N] = weights.map(|weights| &weights[self.lanes.start..]);
        let vectors = head_dim / LANES;
        let mut vector = 0;
        while vector < vectors {
            // Fetched once, with the first heads of a larger group.
            let ahead = Ahead::new(if head + vector == 0 { ahead } else { &[] }, head_dim * size);
            let columns = Columns { kind, rows, row: head_dim * size, offset: vector * LANES * size, weights, ahead };
            // Two vectors of channels at a time where there are: a weight is loaded once for both.
            let width = 2.min(vectors - vector);
            let sums = match width {
                1 => columns.mix::<S, 1>(simd).map(|[sum]| [sum; 2]),
                _ => columns.mix::<S, 2>(simd),
            };
            for (n, sums) in sums.into_iter().enumerate() {
                let mixed = &mut self.mixed[(head + n) * head_dim + vector * LANES..];
                add_to(simd, sums[0], mixed);
                if width == 2 {
                    add_to(simd, sums[1], &mut mixed[LANES..]);
                }
            }
            vector += width;
        }
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
    fn run<S: Simd>(self, simd: S) -> f32 {
        let (mut sum, shift) = (simd.splat(0.0), simd.splat(-self.shift));
        let (vectors, rest) = self.x.as_chunks_mut::<LANES>();
        for x in vectors {
            let e = exponential(simd, simd.add(simd.load(x), shift));
            simd.store(e, x);
            sum = simd.add(sum, e);
        }
        if !rest.is_empty() {
            let e = exponential(simd, simd.add(simd.load_part(rest, f32::NEG_INFINITY), shift));
            simd.store_part(e, rest);
            sum = simd.add(sum, e);
        }
        simd.sum(sum)
    }
}

struct Largest<'a> {
    x: &'a [f32],
}

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let (vectors, rest) = self.x.as_chunks::<LANES>();
        let mut largest = simd.load_part(rest, f32::NEG_INFINITY);
        for x in vectors {
            largest = simd.max(largest, simd.load(x));
        }
        let mut lanes = [0.0; LANES];
        simd.store(largest, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use thinkey_core::{
        Plain, StorageKind,
        quant::{CodeKind, mixed},
    };

    /// Numbers on cache lines, as the cache has them, and how many bytes they are: any codes for as many groups of 32,
    /// scales and minima between -1 and 1, where `kind` is quantised.
    fn stored(kind: StorageKind, seed: &mut u64, len: usize) -> (Vec<[u64; 8]>, usize) {
        let size = match kind.form() {
            Form::Float(kind) => len * kind.bytes(),
            Form::Codes(kind) => kind.bytes(len.div_ceil(codes::GROUP)),
            Form::Turned(kind) => kind.turned_bytes(len / BLOCK),
            Form::Mixed => mixed::bytes(len.div_ceil(codes::GROUP)),
        };
        let mut lines = vec![[0u64; 8]; size.div_ceil(64)];
        let bytes: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut lines)[..size];
        let floats = |bytes: &mut [u8], seed: &mut u64| {
            bytes.chunks_exact_mut(2).for_each(|to| to.copy_from_slice(&f16::from_f32(number(seed)).to_le_bytes()));
        };
        match kind.form() {
            Form::Float(FloatKind::F16) => floats(bytes, seed),
            Form::Float(FloatKind::Bf16) => {
                let number = |to: &mut [u8]| to.copy_from_slice(&bf16::from_f32(number(seed)).to_le_bytes());
                bytes.chunks_exact_mut(2).for_each(number);
            }
            Form::Float(FloatKind::F32) => {
                bytes.chunks_exact_mut(4).for_each(|to| to.copy_from_slice(&number(seed).to_le_bytes()));
            }
            Form::Codes(kind) | Form::Turned(kind) => {
                let (codes, affine) = bytes.split_at_mut(kind.code_bytes(len.div_ceil(codes::GROUP)));
                codes.iter_mut().for_each(|code| *code = (number(seed) * 128.0 + 128.0) as u8);
                floats(affine, seed);
            }
            Form::Mixed => {
                let channels = len.div_ceil(codes::GROUP);
                let fine = mixed::fine(channels);
                bytes.iter_mut().for_each(|byte| *byte = (number(seed) * 128.0 + 128.0) as u8);
                // Scales up to 1, and zero points within the codes.
                let (fine_codes, codes) =
                    (CodeKind::Int4.code_bytes(fine), CodeKind::Trellis2.code_bytes(channels - fine));
                let (affine, rest) = bytes[fine_codes..].split_at_mut(2 * fine);
                let (scales, zeros) = affine.split_at_mut(fine);
                zeros.iter_mut().for_each(|zero| *zero = (*zero % 16).wrapping_neg());
                scales.iter_mut().chain(&mut rest[codes..]).for_each(|scale| *scale %= 161);
            }
        }
        (lines, size)
    }

    /// How far a level may be off in a sum of `count` products: rounding of sums of numbers up to 1, or of codes up to the
    /// largest, whose factors may be integers of 16 bits, or, for few codes, of 8: those are off by up to half of a part in
    /// 127, and what is lost is given back for the middle of the codes.
    fn tolerance(kind: StorageKind, count: usize) -> f32 {
        match kind.form() {
            Form::Float(_) => 1e-4,
            Form::Codes(CodeKind::Int8) => (2e-4 + count as f32 / 65_024.0) * 255.0,
            Form::Codes(kind) | Form::Turned(kind) => {
                (2e-4 + count as f32 / 254.0 / 2.0) * f32::from(CodeKind::largest(kind))
            }
            Form::Mixed => tolerance(StorageKind::Int4, count),
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
            // Keys are not turned, and values are of one kind: others are tried beside them.
            let keys_kind = if kind.turns() { StorageKind::Int4 } else { kind };
            let kind = if kind.mixed() { StorageKind::Int3 } else { kind };
            let stride = if matches!(kind.form(), Form::Float(_)) { BLOCK * (1 + extra) } else { BLOCK };
            let (lines, size) = stored(keys_kind, &mut seed, (channels - 1) * stride + BLOCK);
            let keys = KeyLanes { kind: keys_kind, bytes: &bytemuck::cast_slice(&lines)[..size], channels, stride, ahead: &[] };
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
                let count = channels.max(BLOCK);
                for (a, b) in scores.iter().chain(&mix).zip(expected.iter().chain(&expected_mix)) {
                    prop_assert!((a - b).abs() < tolerance(kind, count).max(tolerance(keys_kind, count)), "{}, {}: {a} instead of {b}", level.name(), kind.name());
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
