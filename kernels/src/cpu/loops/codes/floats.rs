//! Factors that stay floats: codes are converted, and shared by all heads.

use super::{BLOCK, Blocks, LANES, Mixed, STEP, Scores, Step, VECTORS, Weights, load, per_kind, quad_codes, store};
use crate::cpu::{
    loops::HEADS,
    simd::{
        Simd,
        bytes::{BYTES, Bytes},
    },
};
use thinkey_core::quant::{CodeKind, QUAD};

/// The codes of a quad a byte each, where words of them cannot be shifted and masked.
#[inline(always)]
fn spread<B: Bytes>(bytes: B, kind: CodeKind, codes: &[u8]) -> Option<[u8; 2 * BYTES]> {
    if matches!(kind, CodeKind::Int8 | CodeKind::Int4) {
        return None;
    }
    let mut out = [0; 2 * BYTES];
    for (codes, out) in quad_codes(bytes, kind, codes).into_iter().zip(out.as_chunks_mut().0) {
        // As they are: nothing is subtracted.
        bytes.store_weights(codes, 0, out);
    }
    Some(out)
}

/// The scores of every block.
#[inline(always)]
pub(super) fn key_scores<B: Bytes, const N: usize>(
    bytes: B,
    blocks: Blocks<'_>,
    queries: [&Step; N],
    mut scores: Scores<'_>,
) {
    for block in 0..blocks.len() {
        let sums = products::<B, N>(bytes, &blocks, block, queries);
        for (n, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                scores.put(bytes.simd(), n, block * BLOCK + v * LANES, sum);
            }
        }
    }
}

/// The weighted sums of every block.
#[inline(always)]
pub(super) fn mix_values<B: Bytes, const N: usize>(
    bytes: B,
    blocks: Blocks<'_>,
    weights: &Weights<'_, N>,
    mut mixed: Mixed<'_>,
) {
    for (block, &weights) in weights.iter().enumerate().take(blocks.len()) {
        let sums = products::<B, N>(bytes, &blocks, block, weights);
        for (n, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                mixed.put(bytes.simd(), n, v * LANES, sum);
            }
        }
    }
}

/// Σ factor · number over the factors.
#[inline(always)]
fn products<B: Bytes, const N: usize>(
    bytes: B,
    blocks: &Blocks<'_>,
    block: usize,
    factors: [&Step; N],
) -> [[B::F32; VECTORS]; N] {
    let simd = bytes.simd();
    let (scales, mins) = (blocks.scales(simd, block), blocks.mins(simd, block));
    let mut out = [[simd.splat(0.0); VECTORS]; N];
    // Factors are to stay in memory, from where one is spread as it is loaded.
    let mut scaled = [[0.0; STEP]; HEADS];
    for n in 0..N {
        let factors = load(simd, factors[n]);
        let offset = simd.fma(factors[0], mins[0], simd.mul(factors[1], mins[1]));
        out[n] = [simd.splat(simd.sum(offset)); VECTORS];
        store(simd, [simd.mul(factors[0], scales[0]), simd.mul(factors[1], scales[1])], &mut scaled[n]);
    }
    per_kind!(blocks.kind(), [CodeKind::Int8, CodeKind::Int4, CodeKind::Int3, CodeKind::Int2, CodeKind::Trellis2], kind => {
        out = add::<B, N>(bytes, kind, blocks, block, &scaled, out);
    });
    out
}

/// The products of the codes of `kind`, a constant, with factors that are scaled, added to `sums`.
#[inline(always)]
fn add<B: Bytes, const N: usize>(
    bytes: B,
    kind: CodeKind,
    blocks: &Blocks<'_>,
    block: usize,
    scaled: &[Step; HEADS],
    sums: [[B::F32; VECTORS]; N],
) -> [[B::F32; VECTORS]; N] {
    let (simd, mut out) = (bytes.simd(), sums);
    for (quad, codes) in blocks.quads(kind, block).take(STEP / QUAD) {
        blocks.fetch(simd, kind, block, quad);
        let spread = spread(bytes, kind, codes);
        let (words, _) = match &spread {
            Some(codes) => codes.as_chunks::<BYTES>(),
            None => codes.as_chunks::<BYTES>(),
        };
        macro_rules! groups {
            ($($g:literal)*) => {
                $(for v in 0..VECTORS {
                    let number = match (kind, words) {
                        (CodeKind::Int8 | CodeKind::Int3 | CodeKind::Int2 | CodeKind::Trellis2, [low, high]) => {
                            simd.word_codes::<{ 8 * $g }, 255>(if v == 0 { low } else { high })
                        }
                        (CodeKind::Int4, [both]) if v == 0 => simd.word_codes::<{ 8 * $g }, 15>(both),
                        (CodeKind::Int4, [both]) => simd.word_codes::<{ 8 * $g + 4 }, 15>(both),
                        _ => return out,
                    };
                    for n in 0..N {
                        let factor = simd.splat(scaled[n][QUAD * quad + $g]);
                        out[n][v] = simd.fma(factor, number, out[n][v]);
                    }
                })*
            };
        }
        groups!(0 1 2 3);
    }
    out
}
