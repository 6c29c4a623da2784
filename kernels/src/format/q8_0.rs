//! Q8_0: f16 scale, 32 × i8.

use super::blocks::Block;
use super::part;
use crate::cpu::simd::{Affine, Simd};

pub(crate) struct Q8_0;

impl Block<34> for Q8_0 {
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn pair<S: Simd>(simd: S, block: &[u8; 34], affine: Affine) -> [S::F32; 2] {
        let (first, second) = (simd.load_i8(part(block, 2)), simd.load_i8(part(block, 18)));
        [simd.affine(first, affine), simd.affine(second, affine)]
    }
}
