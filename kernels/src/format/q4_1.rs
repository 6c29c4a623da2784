//! Q4_1: f16 scale, f16 minimum, 16 bytes: the low halves are weights 0..16, the high ones 16..32.

use super::{Decode, blocks, part};
use crate::cpu::simd::{Affine, Simd};

pub(crate) struct Q4_1;

impl Decode for Q4_1 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], mut sink: impl FnMut(usize, [S::F32; 2])) {
        for (i, block) in blocks::<20>(row) {
            let [scale, min] = [part(block, 0), part(block, 2)].map(|half| simd.scalar_f16(*half));
            let affine = Affine { scale, min };
            sink(i, simd.nibbles::<0>(part(block, 4), affine, affine));
        }
    }
}
