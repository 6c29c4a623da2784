//! Q4_K: f16 scale of scales, f16 scale of minima, 8 × (6-bit scale, 6-bit minimum) in 12 bytes, 128 bytes: of each
//! 32, the low halves are one group of 32 weights and the high ones the next.

use super::{Decode, blocks, part};
use crate::cpu::simd::{Affine, LANES, Simd};

pub(crate) struct Q4K;

impl Decode for Q4K {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], mut sink: impl FnMut(usize, [S::F32; 2])) {
        for (i, block) in blocks::<144>(row) {
            let groups = groups(simd, part(block, 0));
            for pair in 0..4 {
                let at = 16 + 32 * pair;
                let (low, high) = (groups[2 * pair], groups[2 * pair + 1]);
                let [low0, high0] = simd.nibbles::<0>(part(block, at), low, high);
                let [low1, high1] = simd.nibbles::<0>(part(block, at + 16), low, high);
                sink(8 * i + 2 * pair, [low0, low1]);
                sink(8 * i + 2 * pair + 1, [high0, high1]);
            }
        }
    }
}

/// Scales and minima of the eight groups of a super-block, from its first sixteen bytes.
#[inline(always)]
pub(super) fn groups<S: Simd>(simd: S, header: &[u8; 16]) -> [Affine; 8] {
    let [scale, min] = [part(header, 0), part(header, 2)].map(|half| simd.scalar_f16(*half));
    let [a, b, c] = [4, 8, 12].map(|at| u32::from_le_bytes(*part(header, at)));
    // Groups 0..4 have their six bits in a and b; groups 4..8 four bits in c and two in the tops of a and b.
    let words = [
        a & 0x3F3F_3F3F,
        c & 0x0F0F_0F0F | a >> 2 & 0x3030_3030,
        b & 0x3F3F_3F3F,
        c >> 4 & 0x0F0F_0F0F | b >> 2 & 0x3030_3030,
    ];
    let mut codes = [0; LANES];
    for (bytes, word) in codes.as_chunks_mut().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    let factors = std::array::from_fn(|i| if i < 8 { scale } else { -min });
    let mut values = [0.0; LANES];
    simd.store(simd.mul(simd.from_i8(&codes), simd.load(&factors)), &mut values);
    std::array::from_fn(|g| Affine { scale: values[g], min: values[g + 8] })
}
