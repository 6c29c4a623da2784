//! Q5_K: the header of Q4_K, 32 bytes of high bits (bit g of byte l is that of weight l of group g), 128 bytes of low
//! halves as in Q4_K.

use super::codes::{CodeSink, Codes};
use super::q4_k::{self, Groups};
use super::{Decode, Sink, in_memory, part};
use crate::cpu::simd::{LANES, Simd, bytes::Bytes};

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

impl Codes for Q5K {
    #[inline(always)]
    fn codes<B: Bytes>(bytes: B, row: &[u8], sink: &mut impl CodeSink<B>) {
        for (i, block) in row.as_chunks::<176>().0.iter().enumerate() {
            let high = part(block, 16);
            sink.blocks(i, q4_k::affine(bytes, part(block, 0)), true);
            sink.codes::<0>(bytes.fifth_bits::<0>(bytes.nibbles32(part(block, 48)), high), 0);
            sink.codes::<1>(bytes.fifth_bits::<2>(bytes.nibbles32(part(block, 80)), high), 0);
            sink.codes::<2>(bytes.fifth_bits::<4>(bytes.nibbles32(part(block, 112)), high), 0);
            sink.codes::<3>(bytes.fifth_bits::<6>(bytes.nibbles32(part(block, 144)), high), 0);
        }
    }
}
