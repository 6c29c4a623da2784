//! Q5_0: f16 scale, 32 high bits, 16 bytes of low halves as in Q4_0; offset 16.

use super::{Decode, blocks, part};
use crate::cpu::simd::{Affine, Simd};

pub(crate) struct Q5_0;

impl Decode for Q5_0 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], mut sink: impl FnMut(usize, [S::F32; 2])) {
        for (i, block) in blocks::<22>(row) {
            let scale = simd.scalar_f16(*part(block, 0));
            let codes = codes(part(block, 2), part(block, 6)).map(|half| half.map(|code| code.wrapping_sub(16)));
            sink(i, codes.map(|half| simd.affine(simd.from_i8(&half), scale, Affine::NO_MIN)));
        }
    }
}

/// The 5-bit codes of weights 0..16 and 16..32, from their high bits and low halves.
#[inline(always)]
pub(super) fn codes(high: &[u8; 4], low: &[u8; 16]) -> [[u8; 16]; 2] {
    let high = high.map(spread);
    let bit = |i: usize| high[i / 8][i % 8];
    [std::array::from_fn(|i| low[i] & 15 | bit(i)), std::array::from_fn(|i| low[i] >> 4 | bit(16 + i))]
}

/// 16 in every byte whose bit of `bits` is set.
#[inline(always)]
fn spread(bits: u8) -> [u8; 8] {
    const ONES: u64 = 0x0101_0101_0101_0101;
    // Bit i alone in byte i, then carried to the top of the byte.
    let alone = u64::from(bits) * ONES & 0x8040_2010_0804_0201;
    ((alone + 0x7F * ONES) >> 3 & 16 * ONES).to_le_bytes()
}
