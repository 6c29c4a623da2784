//! Q4_K: f16 scale of scales, f16 scale of minima, 8 × (6-bit scale, 6-bit minimum) in 12 bytes, 128 bytes: of each
//! 32, the low halves are one group of 32 weights and the high ones the next.

use super::codes::{CodeSink, Codes};
use super::{Decode, Sink, in_memory, part};
use crate::cpu::simd::{Affine, LANES, Simd, bytes::Bytes};

pub(crate) struct Q4K;

impl Decode for Q4K {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], sink: &mut impl Sink<S>) {
        for (i, block) in row.as_chunks::<144>().0.iter().enumerate() {
            let groups = Groups::new(simd, part(block, 0));
            let groups = in_memory(&groups);
            for pair in 0..4 {
                let (low, high) = (groups.get(2 * pair), groups.get(2 * pair + 1));
                let [low0, high0] = simd.nibbles::<0>(part(block, 16 + 32 * pair), low, high);
                let [low1, high1] = simd.nibbles::<0>(part(block, 32 + 32 * pair), low, high);
                sink.pair(8 * i + 2 * pair, [low0, low1]);
                sink.pair(8 * i + 2 * pair + 1, [high0, high1]);
            }
        }
    }
}

/// The codes of the eight scales, then of the eight minima, a byte each.
#[inline(always)]
fn codes(header: &[u8; 16]) -> [u32; 4] {
    let word = |at: usize| u32::from_le_bytes(*part(header, at));
    let (a, b, c) = (word(4), word(8), word(12));
    // Groups 0..4 have their six bits in a and b; groups 4..8 four bits in c and two in the tops of a and b.
    [
        a & 0x3F3F_3F3F,
        c & 0x0F0F_0F0F | a >> 2 & 0x3030_3030,
        b & 0x3F3F_3F3F,
        c >> 4 & 0x0F0F_0F0F | b >> 2 & 0x3030_3030,
    ]
}

/// Scales and minima of the eight groups of a super-block.
pub(super) struct Groups {
    /// The scale times all sixteen codes; the first eight are those of the scales.
    scales: [f32; LANES],
    /// The minimum times all sixteen codes, negated; the last eight are those of the minima.
    mins: [f32; LANES],
}

impl Groups {
    /// Unpacks the first sixteen bytes of a super-block.
    #[inline(always)]
    pub(super) fn new<S: Simd>(simd: S, header: &[u8; 16]) -> Self {
        let codes = simd.i8_words(codes(header));
        let mut groups = Self { scales: [0.0; LANES], mins: [0.0; LANES] };
        simd.store(simd.mul(codes, simd.splat_f16(part(header, 0))), &mut groups.scales);
        let min = simd.mul(simd.splat_f16(part(header, 2)), simd.splat(-1.0));
        simd.store(simd.mul(codes, min), &mut groups.mins);
        groups
    }

    #[inline(always)]
    pub(super) fn get(&self, group: usize) -> Affine {
        Affine { scale: self.scales[group], min: self.mins[group + 8] }
    }
}

impl Codes for Q4K {
    #[inline(always)]
    fn codes<B: Bytes>(bytes: B, row: &[u8], sink: &mut impl CodeSink<B>) {
        for (i, block) in row.as_chunks::<144>().0.iter().enumerate() {
            sink.blocks(i, affine(bytes, part(block, 0)), true);
            sink.codes::<0>(bytes.nibbles32(part(block, 16)), 0);
            sink.codes::<1>(bytes.nibbles32(part(block, 48)), 0);
            sink.codes::<2>(bytes.nibbles32(part(block, 80)), 0);
            sink.codes::<3>(bytes.nibbles32(part(block, 112)), 0);
        }
    }
}

/// Scales, then minima of the eight groups, from the first sixteen bytes of a super-block.
#[inline(always)]
pub(super) fn affine<B: Bytes>(bytes: B, header: &[u8; 16]) -> B::F32 {
    let simd = bytes.simd();
    let signs = simd.load(&[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]);
    let scales = bytes.halves([u32::from_le_bytes(*part(header, 0)); 8]);
    simd.mul(simd.i8_words(codes(header)), simd.mul(scales, signs))
}
