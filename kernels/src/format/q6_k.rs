//! Q6_K: 128 bytes of low halves, 64 bytes of high pairs of bits, 16 × i8 scales, f16 scale of scales; offset 32.

use super::codes::{CodeSink, Codes};
use super::{Decode, Sink, in_memory, part};
use crate::cpu::simd::{Affine, LANES, Simd, bytes::Bytes};

pub(crate) struct Q6K;

impl Decode for Q6K {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], sink: &mut impl Sink<S>) {
        for (i, block) in row.as_chunks::<210>().0.iter().enumerate() {
            let mut scales = [0.0; LANES];
            simd.store(simd.mul(simd.load_i8(part(block, 192)), simd.splat_f16(part(block, 208))), &mut scales);
            let scales = in_memory(&scales);
            for half in 0..2 {
                let codes = codes(part(block, 64 * half), part(block, 128 + 32 * half));
                let codes = in_memory(&codes);
                for pair in 0..4 {
                    let first = Affine::scale(scales[8 * half + 2 * pair]);
                    let second = Affine::scale(scales[8 * half + 2 * pair + 1]);
                    let first = simd.affine(simd.load_i8(part(codes, 32 * pair)), first);
                    let second = simd.affine(simd.load_i8(part(codes, 32 * pair + LANES)), second);
                    sink.pair(8 * i + 4 * half + pair, [first, second]);
                }
            }
        }
    }
}

/// The signed codes of half a super-block. Low halves come in the order of the weights, first all low ones of the
/// 64 bytes, then all high ones; pair p of byte l of the high bits belongs to weight 32p + l.
#[inline(always)]
fn codes(low: &[u8; 64], high: &[u8; 32]) -> [u8; 128] {
    let mut codes = [0; 128];
    for l in 0..32 {
        codes[l] = (low[l] & 15 | (high[l] & 3) << 4).wrapping_sub(32);
        codes[l + 32] = (low[l + 32] & 15 | (high[l] >> 2 & 3) << 4).wrapping_sub(32);
        codes[l + 64] = (low[l] >> 4 | (high[l] >> 4 & 3) << 4).wrapping_sub(32);
        codes[l + 96] = (low[l + 32] >> 4 | (high[l] >> 6) << 4).wrapping_sub(32);
    }
    codes
}

impl Codes for Q6K {
    #[inline(always)]
    fn codes<B: Bytes>(bytes: B, row: &[u8], sink: &mut impl CodeSink<B>) {
        let simd = bytes.simd();
        for (i, block) in row.as_chunks::<210>().0.iter().enumerate() {
            sink.half_blocks(i, simd.mul(simd.load_i8(part(block, 192)), simd.splat_f16(part(block, 208))));
            let [first, second] = bytes.six_bits(part(block, 0), part(block, 128));
            sink.half_block_codes::<0>(first, 32);
            sink.half_block_codes::<1>(second, 32);
            let [third, fourth] = bytes.six_bits(part(block, 64), part(block, 160));
            sink.half_block_codes::<2>(third, 32);
            sink.half_block_codes::<3>(fourth, 32);
        }
    }
}
