//! Q5_K: the header of Q4_K, 32 bytes of high bits (bit g of byte l is that of weight l of group g), 128 bytes of low
//! halves as in Q4_K.

use super::{Decode, blocks, part, q4_k::groups};
use crate::cpu::simd::{LANES, Simd};

pub(crate) struct Q5K;

impl Decode for Q5K {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], mut sink: impl FnMut(usize, [S::F32; 2])) {
        for (i, block) in blocks::<176>(row) {
            let groups = groups(simd, part(block, 0));
            for (g, group) in groups.into_iter().enumerate() {
                let vector = |half: usize| {
                    let high: &[u8; LANES] = part(block, 16 + LANES * half);
                    let low: &[u8; LANES] = part(block, 48 + 32 * (g / 2) + LANES * half);
                    let codes = std::array::from_fn(|l| low[l] >> (4 * (g % 2)) & 15 | (high[l] >> g & 1) << 4);
                    simd.affine(simd.from_i8(&codes), group.scale, group.min)
                };
                sink(8 * i + g, [vector(0), vector(1)]);
            }
        }
    }
}
