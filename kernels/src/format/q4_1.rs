//! Q4_1: f16 scale, f16 minimum, 16 bytes: the low halves are weights 0..16, the high ones 16..32.

use super::blocks::Block;
use super::codes::BlockCodes;
use super::part;
use crate::cpu::simd::{Affine, Simd, bytes::Bytes};

pub(crate) struct Q4_1;

impl Block<20> for Q4_1 {
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn pair<S: Simd>(simd: S, block: &[u8; 20], affine: Affine) -> [S::F32; 2] {
        simd.nibbles::<0>(part(block, 4), affine, affine)
    }
}

impl BlockCodes<20> for Q4_1 {
    const OFFSET: u8 = 0;

    #[inline(always)]
    fn codes<B: Bytes>(bytes: B, first: &[u8; 20], second: &[u8; 20]) -> B::Codes {
        bytes.nibbles16(part(first, 4), part(second, 4))
    }
}
