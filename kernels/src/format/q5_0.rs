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

/// The weights of the 5-bit codes with these high bits and low halves, less `ZERO`, which is 0 or 16.
#[inline(always)]
pub(super) fn pair<S: Simd, const ZERO: u8>(simd: S, high: &[u8; 4], low: &[u8; LANES], affine: Affine) -> [S::F32; 2] {
    let low = [u64::from_le_bytes(*part(low, 0)), u64::from_le_bytes(*part(low, 8))];
    let first = words([codes::<ZERO>(low[0], high[0]), codes::<ZERO>(low[1], high[1])]);
    let second = words([codes::<ZERO>(low[0] >> 4, high[2]), codes::<ZERO>(low[1] >> 4, high[3])]);
    [simd.affine(simd.i8_words(first), affine), simd.affine(simd.i8_words(second), affine)]
}

/// Eight codes, a byte each, from the low four bits of the bytes of `low` and the bits of `high`.
#[inline(always)]
fn codes<const ZERO: u8>(low: u64, high: u8) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const SIXTEENS: u64 = 0x10 * ONES;
    // Bit i alone in byte i, then carried to bit 4 of it.
    let alone = (u64::from(high) * ONES) & 0x8040_2010_0804_0201;
    let sixteens = ((alone + 0x7F * ONES) >> 3) & SIXTEENS;
    let low = low & (0x0F * ONES);
    // A code less 16 is its low bits below a sign that the high bit clears.
    if ZERO == 0 { low | sixteens } else { low | ((sixteens ^ SIXTEENS) * 15) }
}

#[inline(always)]
fn words([a, b]: [u64; 2]) -> [u32; 4] {
    [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]
}
