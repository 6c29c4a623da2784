//! What the formats of 32-weight blocks share: each block starts with an f16 scale, and maybe an f16 minimum.
//!
//! Widening a half and spreading it over a register costs as much as unpacking half of the block's weights, so it is
//! done for eight halves at a time; they go through memory, from where a load spreads a float for nothing.

use super::{Decode, Sink};
use crate::cpu::simd::{Affine, Simd};
use std::marker::PhantomData;

/// A format of 32-weight blocks of `BYTES` bytes.
pub(crate) trait Block<const BYTES: usize> {
    /// A minimum follows the scale.
    const HAS_MIN: bool;

    /// The weights of a block whose scale and minimum are `affine`.
    fn pair<S: Simd>(simd: S, block: &[u8; BYTES], affine: Affine) -> [S::F32; 2];
}

/// The decoder of such a format.
pub(crate) struct Blocks<B, const BYTES: usize>(PhantomData<B>);

/// Blocks whose scales are widened before their weights are unpacked.
const TILE: usize = 32;

impl<B: Block<BYTES>, const BYTES: usize> Decode for Blocks<B, BYTES> {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], sink: &mut impl Sink<S>) {
        let (blocks, _) = row.as_chunks::<BYTES>();
        let mut index = 0;
        for tile in blocks.chunks(TILE) {
            let mut halves = [0.0; 2 * TILE];
            let (eights, _) = halves.as_chunks_mut::<8>();
            let each = if B::HAS_MIN { 4 } else { 8 };
            for (eight, blocks) in eights.iter_mut().zip(tile.chunks(each)) {
                // Past the last block its own halves come again.
                let last = blocks.len() - 1;
                let half = |i: usize, at: usize| {
                    let block = &blocks[i.min(last)];
                    u32::from(u16::from_le_bytes([block[at], block[at + 1]]))
                };
                *eight = simd.f16x8(std::array::from_fn(|i| match B::HAS_MIN {
                    true => half(i, 0) | half(i, 2) << 16,
                    false => half(2 * i, 0) | half(2 * i + 1, 0) << 16,
                }));
            }
            for (i, block) in tile.iter().enumerate() {
                let affine = match B::HAS_MIN {
                    true => Affine { scale: halves[2 * i], min: halves[2 * i + 1] },
                    false => Affine::scale(halves[i]),
                };
                sink.pair(index, B::pair(simd, block, affine));
                index += 1;
            }
        }
    }
}
