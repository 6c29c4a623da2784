//! Q5_1: f16 scale, f16 minimum, 32 high bits, 16 bytes of low halves as in Q4_1.

use super::{Decode, blocks, part, q5_0::codes};
use crate::cpu::simd::Simd;

pub(crate) struct Q5_1;

impl Decode for Q5_1 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], mut sink: impl FnMut(usize, [S::F32; 2])) {
        for (i, block) in blocks::<24>(row) {
            let [scale, min] = [part(block, 0), part(block, 2)].map(|half| simd.scalar_f16(*half));
            let codes = codes(part(block, 4), part(block, 8));
            sink(i, codes.map(|half| simd.affine(simd.from_i8(&half), scale, min)));
        }
    }
}
