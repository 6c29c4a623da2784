//! Q4_0: f16 scale, 16 bytes: the low halves are weights 0..16, the high ones 16..32, both offset by 8.

use super::blocks::Block;
use super::codes::BlockCodes;
use super::part;
use crate::cpu::simd::{Affine, Simd, bytes::Bytes};

pub(crate) struct Q4_0;

impl Block<18> for Q4_0 {
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn pair<S: Simd>(simd: S, block: &[u8; 18], affine: Affine) -> [S::F32; 2] {
        simd.nibbles::<8>(part(block, 2), affine, affine)
    }
}

impl BlockCodes<18> for Q4_0 {
    const OFFSET: u8 = 8;

    #[inline(always)]
    fn codes<B: Bytes>(bytes: B, first: &[u8; 18], second: &[u8; 18]) -> B::Codes {
        bytes.nibbles16(part(first, 2), part(second, 2))
    }
}
