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

impl<B: Block<BYTES>, const BYTES: usize> Blocks<B, BYTES> {
    /// Halves that a block starts with.
    const HALVES: usize = if B::HAS_MIN { 2 } else { 1 };
    /// Blocks that eight halves are of.
    const EIGHT: usize = 8 / Self::HALVES;

    /// The halves of [`EIGHT`](Self::EIGHT) blocks from `start`.
    #[inline(always)]
    fn widen<S: Simd>(simd: S, blocks: &[[u8; BYTES]], start: usize, out: &mut [f32; 2 * TILE]) {
        let eight = &blocks[start..start + Self::EIGHT];
        let half = |i: usize, at: usize| u32::from(u16::from_le_bytes([eight[i][at], eight[i][at + 1]]));
        let halves = simd.f16x8(std::array::from_fn(|i| match B::HAS_MIN {
            true => half(i, 0) | half(i, 2) << 16,
            false => half(2 * i, 0) | half(2 * i + 1, 0) << 16,
        }));
        out[Self::HALVES * start..][..8].copy_from_slice(&halves);
    }
}

impl<B: Block<BYTES>, const BYTES: usize> Decode for Blocks<B, BYTES> {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, row: &[u8], sink: &mut impl Sink<S>) {
        let mut halves = [0.0; 2 * TILE];
        let mut first = 0;
        for tile in row.as_chunks().0.chunks(TILE) {
            let whole = tile.len() - tile.len() % Self::EIGHT;
            for start in (0..whole).step_by(Self::EIGHT) {
                Self::widen(simd, tile, start, &mut halves);
            }
            if whole == 0 {
                let mut padded = [[0; BYTES]; 8];
                padded[..tile.len()].copy_from_slice(tile);
                Self::widen(simd, &padded, 0, &mut halves);
            } else if whole < tile.len() {
                // Some of the last eight come twice.
                Self::widen(simd, tile, tile.len() - Self::EIGHT, &mut halves);
            }
            for (i, block) in tile.iter().enumerate() {
                let affine = match B::HAS_MIN {
                    true => Affine { scale: halves[2 * i], min: halves[2 * i + 1] },
                    false => Affine::scale(halves[i]),
                };
                sink.pair(first + i, B::pair(simd, block, affine));
            }
            first += tile.len();
        }
    }
}
