//! Q8_0: f16 scale, 32 × i8.

use super::blocks::Block;
use super::codes::BlockCodes;
use super::part;
use crate::cpu::simd::{
    Affine, Simd,
    bytes::{Bytes, SIGNED},
};

pub(crate) struct Q8_0;

impl Block<34> for Q8_0 {
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn pair<S: Simd>(simd: S, block: &[u8; 34], affine: Affine) -> [S::F32; 2] {
        let (first, second) = (simd.load_i8(part(block, 2)), simd.load_i8(part(block, 18)));
        [simd.affine(first, affine), simd.affine(second, affine)]
    }
}

impl BlockCodes<34> for Q8_0 {
    const OFFSET: u8 = SIGNED;

    #[inline(always)]
    fn codes<B: Bytes>(bytes: B, first: &[u8; 34], second: &[u8; 34]) -> B::Codes {
        bytes.join(part(first, 2), part(second, 2))
    }
}
