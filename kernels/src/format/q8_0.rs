//! Q8_0: f16 scale, 32 × i8.

use super::{Decode, blocks, part};
use crate::cpu::simd::{Affine, Simd};

pub(crate) struct Q8_0;

impl Decode for Q8_0 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], mut sink: impl FnMut(usize, [S::F32; 2])) {
        for (i, block) in blocks::<34>(row) {
            let scale = simd.scalar_f16(*part(block, 0));
            let codes = [part(block, 2), part(block, 18)].map(|codes| simd.from_i8(codes));
            sink(i, codes.map(|codes| simd.affine(codes, scale, Affine::NO_MIN)));
        }
    }
}
