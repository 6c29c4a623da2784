//! Q5_1: f16 scale, f16 minimum, 32 high bits, 16 bytes of low halves as in Q4_1.

use super::blocks::Block;
use super::{part, q5_0};
use crate::cpu::simd::{Affine, Simd};

pub(crate) struct Q5_1;

impl Block<24> for Q5_1 {
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn pair<S: Simd>(simd: S, block: &[u8; 24], affine: Affine) -> [S::F32; 2] {
        q5_0::pair::<_, 0>(simd, part(block, 4), part(block, 8), affine)
    }
}
