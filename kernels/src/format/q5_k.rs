//! Q5_K: the header of Q4_K, 32 bytes of high bits (bit g of byte l is that of weight l of group g), 128 bytes of low
//! halves as in Q4_K.

use super::q4_k::Groups;
use super::{Decode, Sink, in_memory, part};
use crate::cpu::simd::{LANES, Simd};

pub(crate) struct Q5K;

impl Decode for Q5K {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], sink: &mut impl Sink<S>) {
        for (i, block) in row.as_chunks::<176>().0.iter().enumerate() {
            let groups = Groups::new(simd, part(block, 0));
            let codes = codes(part(block, 48), part(block, 16));
            let groups = in_memory(&groups);
            for (g, codes) in in_memory(&codes).iter().enumerate() {
                let group = groups.get(g);
                let (first, second) = (simd.load_i8(part(codes, 0)), simd.load_i8(part(codes, LANES)));
                sink.pair(8 * i + g, [simd.affine(first, group), simd.affine(second, group)]);
            }
        }
    }
}

/// The codes of the eight groups, from their low halves and high bits.
#[inline(always)]
fn codes(low: &[u8; 128], high: &[u8; 32]) -> [[u8; 32]; 8] {
    let mut codes = [[0; 32]; 8];
    for (g, codes) in codes.iter_mut().enumerate() {
        let low: &[u8; 32] = part(low, 32 * (g / 2));
        for l in 0..32 {
            codes[l] = low[l] >> (4 * (g % 2)) & 15 | (high[l] >> g & 1) << 4;
        }
    }
    codes
}
