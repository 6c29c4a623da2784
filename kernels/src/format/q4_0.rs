//! Q4_0: f16 scale, 16 bytes: the low halves are weights 0..16, the high ones 16..32, both offset by 8.

use super::{Decode, blocks, part};
use crate::cpu::simd::{Affine, Simd};

pub(crate) struct Q4_0;

impl Decode for Q4_0 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], mut sink: impl FnMut(usize, [S::F32; 2])) {
        for (i, block) in blocks::<18>(row) {
            let affine = Affine::scale(simd.scalar_f16(*part(block, 0)));
            sink(i, simd.nibbles::<8>(part(block, 2), affine, affine));
        }
    }
}
