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
pub(super) fn codes(high: [u8; 4], low: [u8; 16]) -> [[u8; 16]; 2] {
    // Byte i of these spreads has bit i of the 16 high bits alone: a comparison makes it a flag.
    let spread =
        |pair: [u8; 2]| -> [u8; 16] { std::array::from_fn(|i| if pair[i / 8] & (1 << (i % 8)) == 0 { 0 } else { 16 }) };
    let (first, second) = (spread([high[0], high[1]]), spread([high[2], high[3]]));
    [std::array::from_fn(|i| low[i] & 15 | first[i]), std::array::from_fn(|i| low[i] >> 4 | second[i])]
}
