//! Q5_0: f16 scale, 32 high bits, 16 bytes of low halves as in Q4_0; offset 16.

use super::blocks::Block;
use super::part;
use crate::cpu::simd::{Affine, LANES, Simd};

pub(crate) struct Q5_0;

impl Block<22> for Q5_0 {
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn pair<S: Simd>(simd: S, block: &[u8; 22], affine: Affine) -> [S::F32; 2] {
        pair::<_, 16>(simd, part(block, 2), part(block, 6), affine)
    }
}

/// The weights of the 5-bit codes with these high bits and low halves, less `ZERO`.
#[inline(always)]
pub(super) fn pair<S: Simd, const ZERO: u8>(simd: S, high: &[u8; 4], low: &[u8; LANES], affine: Affine) -> [S::F32; 2] {
    let mut codes = [[0; LANES]; 2];
    let (first, second) = (spread([high[0], high[1]]), spread([high[2], high[3]]));
    for l in 0..LANES {
        codes[0][l] = (low[l] & 15 | first[l]).wrapping_sub(ZERO);
        codes[1][l] = (low[l] >> 4 | second[l]).wrapping_sub(ZERO);
    }
    [simd.affine(simd.from_i8(&codes[0]), affine), simd.affine(simd.from_i8(&codes[1]), affine)]
}

/// 16 in every byte whose bit of `bits` is set.
#[inline(always)]
fn spread(bits: [u8; 2]) -> [u8; LANES] {
    let mut spread = [0; LANES];
    for l in 0..LANES {
        spread[l] = if bits[l / 8] & (1 << (l % 8)) == 0 { 0 } else { 16 };
    }
    spread
}
