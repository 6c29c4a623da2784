//! Factors as integers: four codes and four factors are one product of words, and nothing is converted but the sums.
//!
//! Codes of 8 bits meet *fine* factors of 16 bits: one is off by at most a part in 65,024 of the largest of its head and
//! tile, far less than half a step of a code. Codes of 4 bits and fewer meet *coarse* factors of 8 bits, off by up to a part
//! in 254: what that adds to the error of such codes is a few parts in a hundred of it. What rounding took from a coarse
//! factor is given back as if its codes were all in the middle of their range, so that only their distance from there
//! counts.
//!
//! Blocks are computed a tile at a time: a head has one unit for all blocks of a tile, and a value's sums stay integers
//! through all of them. What a block costs besides its products is what bounds short blocks: a reduction (of the largest
//! factor, of the offsets) is ten instructions that wait for each other, half of what a quad takes for three heads.
//!
//! Counted for three heads on AVX-512 with VNNI: a quad of 8-bit codes takes two loads, six words spread as they are loaded
//! and twelve products, so a block of 32 key channels and 64 value channels, which is 24 quads, takes 480 vector instructions
//! for its products. Making its factors takes about 170 more, 20 a head and step with 10 of them for the packing, and its
//! offsets 50, where a unit and sums for every block took about 450. Codes of 4 bits and fewer take half of the products
//! and 5 of the packing.

use super::{BLOCK, Blocks, LANES, Mixed, STEP, Scores, Step, VECTORS, Weights, load, per_kind, quad_codes, store};
use crate::cpu::simd::{
    Simd,
    bytes::{Bytes, COARSE, COARSE_LIMIT, FINE_LIMIT},
};
use thinkey_core::{
    attend::TILE_BLOCKS,
    quant::{CodeKind, QUAD},
};

/// The largest integer factor.
const fn limit<const FINE: bool>() -> f32 {
    if FINE { FINE_LIMIT } else { COARSE_LIMIT }
}

/// Factors of a block for a head, as their words: sixteen fine ones, or eight coarse ones.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Words([i32; 16]);

/// What integers are worth.
#[derive(Clone, Copy)]
struct Unit {
    unit: f32,
    inverse: f32,
}

impl Unit {
    /// So that `largest` is the largest integer.
    #[inline(always)]
    fn new<const FINE: bool>(largest: f32) -> Self {
        let inverse = if largest > 0.0 { limit::<FINE>() / largest } else { 0.0 };
        Self { unit: largest / limit::<FINE>(), inverse }
    }
}

/// Makes words of a step's factors, given in units; gives what is to be added to their offsets, in units.
#[inline(always)]
fn words<B: Bytes, const FINE: bool>(
    bytes: B,
    kind: CodeKind,
    factors: [B::F32; VECTORS],
    words: &mut Words,
) -> B::F32 {
    let simd = bytes.simd();
    if FINE {
        bytes.fine_factors(factors, &mut words.0);
        return simd.splat(0.0);
    }
    if let Some(words) = words.0.first_chunk_mut() {
        bytes.coarse_factors(factors, words);
    }
    // Adding 1.5 · 2^23 rounds to an integer.
    let (shift, back) = (simd.splat(12_582_912.0), simd.splat(-12_582_912.0));
    let rounded = simd.add(simd.add(simd.add(factors[0], shift), back), simd.add(simd.add(factors[1], shift), back));
    let lost = simd.fma(rounded, simd.splat(-1.0), simd.add(factors[0], factors[1]));
    simd.mul(lost, simd.splat(f32::from(kind.largest()) / 2.0))
}

/// The scores of every block.
#[inline(always)]
pub(super) fn key_scores<B: Bytes, const N: usize, const FINE: bool>(
    bytes: B,
    blocks: Blocks<'_>,
    queries: [&Step; N],
    mut scores: Scores<'_>,
) {
    let (simd, kind) = (bytes.simd(), blocks.kind());
    // The largest scales of all blocks bound the factors.
    let mut largest = [simd.splat(0.0); VECTORS];
    for block in 0..blocks.len() {
        let scales = blocks.scales(simd, block);
        for v in 0..VECTORS {
            largest[v] = simd.max_abs(largest[v], scales[v]);
        }
    }
    let mut units = [Unit { unit: 0.0, inverse: 0.0 }; N];
    let mut in_units = [[0.0; STEP]; N];
    for n in 0..N {
        let query = load(simd, queries[n]);
        let bound = simd.max_abs(simd.mul(query[0], largest[0]), simd.mul(query[1], largest[1]));
        units[n] = Unit::new::<FINE>(simd.largest(bound));
        let inverse = simd.splat(units[n].inverse);
        store(simd, [simd.mul(query[0], inverse), simd.mul(query[1], inverse)], &mut in_units[n]);
    }
    let mut tile = [[Words([0; 16]); N]; TILE_BLOCKS];
    let mut offsets = [[0.0; N]; TILE_BLOCKS];
    for block in 0..blocks.len() {
        let (scales, mins) = (blocks.scales(simd, block), blocks.mins(simd, block));
        for n in 0..N {
            let (query, in_units) = (load(simd, queries[n]), load(simd, &in_units[n]));
            let scaled = [simd.mul(in_units[0], scales[0]), simd.mul(in_units[1], scales[1])];
            let lost = words::<B, FINE>(bytes, kind, scaled, &mut tile[block][n]);
            let offset = simd.fma(query[0], mins[0], simd.mul(query[1], mins[1]));
            let offset = if FINE { offset } else { simd.fma(lost, simd.splat(units[n].unit), offset) };
            offsets[block][n] = simd.sum(offset);
        }
    }
    macro_rules! lanes {
        ($V:literal, $first:literal) => {
            for block in 0..blocks.len() {
                let sums = Sums::<B, N, $V, FINE>::new(bytes).add::<$first>(bytes, &blocks, block, &tile[block]);
                let sums = sums.floats(bytes);
                for n in 0..N {
                    let (unit, offset) = (simd.splat(units[n].unit), simd.splat(offsets[block][n]));
                    for v in 0..$V {
                        let lane = block * BLOCK + ($first + v) * LANES;
                        scores.put(simd, n, lane, simd.fma(sums[n][v], unit, offset));
                    }
                }
            }
        };
    }
    if B::TILE_VECTORS > 1 {
        lanes!(2, 0);
    } else {
        // The sums of all heads fill the registers.
        lanes!(1, 0);
        lanes!(1, 1);
    }
}

/// The weighted sums of all blocks together.
#[inline(always)]
pub(super) fn mix_values<B: Bytes, const N: usize, const FINE: bool>(
    bytes: B,
    blocks: Blocks<'_>,
    weights: &Weights<'_, N>,
    mut mixed: Mixed<'_>,
) {
    let (simd, kind) = (bytes.simd(), blocks.kind());
    let mut largest = [simd.splat(0.0); N];
    for block in 0..blocks.len() {
        let scales = blocks.scales(simd, block);
        for n in 0..N {
            let weights = load(simd, weights[block][n]);
            let factors = [simd.mul(weights[0], scales[0]), simd.mul(weights[1], scales[1])];
            largest[n] = simd.max_abs(factors[0], simd.max_abs(factors[1], largest[n]));
        }
    }
    let mut units = [Unit { unit: 0.0, inverse: 0.0 }; N];
    for n in 0..N {
        units[n] = Unit::new::<FINE>(simd.largest(largest[n]));
    }
    let mut tile = [[Words([0; 16]); N]; TILE_BLOCKS];
    let mut offsets = [simd.splat(0.0); N];
    for block in 0..blocks.len() {
        let (scales, mins) = (blocks.scales(simd, block), blocks.mins(simd, block));
        for n in 0..N {
            let (weights, inverse) = (load(simd, weights[block][n]), simd.splat(units[n].inverse));
            offsets[n] = simd.fma(weights[0], mins[0], simd.fma(weights[1], mins[1], offsets[n]));
            let scaled = [simd.mul(weights[0], scales[0]), simd.mul(weights[1], scales[1])];
            let scaled = [simd.mul(scaled[0], inverse), simd.mul(scaled[1], inverse)];
            let lost = words::<B, FINE>(bytes, kind, scaled, &mut tile[block][n]);
            if !FINE {
                offsets[n] = simd.fma(lost, simd.splat(units[n].unit), offsets[n]);
            }
        }
    }
    let mut offset = [0.0; N];
    for n in 0..N {
        offset[n] = simd.sum(offsets[n]);
    }
    macro_rules! lanes {
        ($V:literal, $first:literal) => {
            let mut sums = Sums::<B, N, $V, FINE>::new(bytes);
            for block in 0..blocks.len() {
                sums = sums.add::<$first>(bytes, &blocks, block, &tile[block]);
            }
            let sums = sums.floats(bytes);
            for n in 0..N {
                let (unit, offset) = (simd.splat(units[n].unit), simd.splat(offset[n]));
                for v in 0..$V {
                    mixed.put(simd, n, ($first + v) * LANES, simd.fma(sums[n][v], unit, offset));
                }
            }
        };
    }
    if B::TILE_VECTORS > 1 {
        lanes!(2, 0);
    } else {
        lanes!(1, 0);
        lanes!(1, 1);
    }
}

/// Sums of integer products for `N` heads, `V` vectors each.
struct Sums<B: Bytes, const N: usize, const V: usize, const FINE: bool> {
    fine: [[B::Fine; V]; N],
    coarse: [[B::I32; V]; N],
}

impl<B: Bytes, const N: usize, const V: usize, const FINE: bool> Sums<B, N, V, FINE> {
    #[inline(always)]
    fn new(bytes: B) -> Self {
        Self { fine: [[bytes.fine_zero(); V]; N], coarse: [[bytes.zero(); V]; N] }
    }

    /// With the products of a step, vectors `FIRST`.. of its lanes. By value: sums that someone points to do not stay in
    /// registers.
    #[inline(always)]
    fn add<const FIRST: usize>(self, bytes: B, blocks: &Blocks<'_>, block: usize, words: &[Words; N]) -> Self {
        const { assert!(FIRST + V <= VECTORS && COARSE * QUAD == STEP) };
        let (simd, Self { mut fine, mut coarse }) = (bytes.simd(), self);
        if FINE {
            for (quad, codes) in blocks.quads(CodeKind::Int8, block).take(COARSE) {
                // In the first pass, not in each.
                if FIRST == 0 {
                    blocks.fetch(simd, CodeKind::Int8, block, quad);
                }
                let codes = quad_codes(bytes, CodeKind::Int8, codes);
                for v in 0..V {
                    let codes = bytes.fine_codes(codes[FIRST + v]);
                    for n in 0..N {
                        let words = [words[n].0[quad], words[n].0[8 + quad]];
                        fine[n][v] = bytes.add_fine(fine[n][v], codes, words);
                    }
                }
            }
        } else {
            let mut sums = [[bytes.coarse_begin(bytes.zero()); V]; N];
            for n in 0..N {
                for v in 0..V {
                    sums[n][v] = bytes.coarse_begin(coarse[n][v]);
                }
            }
            per_kind!(blocks.kind(), [CodeKind::Int4, CodeKind::Int3, CodeKind::Int2, CodeKind::Trellis2], kind => {
                for (quad, codes) in blocks.quads(kind, block).take(COARSE) {
                    // In the first pass, not in each.
                    if FIRST == 0 {
                        blocks.fetch(simd, kind, block, quad);
                    }
                    let codes = quad_codes(bytes, kind, codes);
                    for n in 0..N {
                        for v in 0..V {
                            sums[n][v].1 = bytes.add_coarse(sums[n][v].1, codes[FIRST + v], words[n].0[quad]);
                        }
                    }
                }
            }, CodeKind::Int8 => unreachable!("codes of 8 bits meet fine factors"));
            for n in 0..N {
                for v in 0..V {
                    coarse[n][v] = bytes.coarse_end(sums[n][v].0, sums[n][v].1);
                }
            }
        }
        Self { fine, coarse }
    }

    #[inline(always)]
    fn floats(self, bytes: B) -> [[B::F32; V]; N] {
        let mut out = [[bytes.simd().splat(0.0); V]; N];
        for (n, out) in out.iter_mut().enumerate() {
            for (v, out) in out.iter_mut().enumerate() {
                *out = if FINE { bytes.fine_sums(self.fine[n][v]) } else { bytes.floats(self.coarse[n][v]) };
            }
        }
        out
    }
}
