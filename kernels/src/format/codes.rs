//! Rows as integer codes: what products with quantised activations read.
//!
//! A row goes by in segments of 256 weights, eight blocks of 32: first their scales, then their codes, 64 at a time.
//! Unlike [`Decode`](super::Decode), nothing is multiplied here: that is done once for 32 products instead of for each.

use super::blocks::{Block, Blocks};
use super::{WeightFormat, part, q4_0, q4_1, q4_k, q5_k, q6_k, q8_0};
use crate::cpu::simd::bytes::Bytes;

/// What becomes of codes.
pub(crate) trait CodeSink<B: Bytes> {
    /// Segment `index` follows: the scales of its eight blocks in lanes 0..8 of `affine`, their minima in lanes 8..16,
    /// zeros where the format has none (`has_min`).
    fn blocks(&mut self, index: usize, affine: B::F32, has_min: bool);

    /// Segment `index` follows, in sixteen blocks of 16 weights with these scales.
    fn half_blocks(&mut self, index: usize, scales: B::F32);

    /// Quarter `QUARTER` of a segment of [`blocks`](Self::blocks): weight = (code − `offset`) · scale + minimum; see
    /// [`Bytes::dot`].
    fn codes<const QUARTER: usize>(&mut self, codes: B::Codes, offset: u8);

    /// Quarter `quarter` of segment `index`, which is not whole: the scales of its two blocks in lanes 0 and 1 of `affine`,
    /// their minima in lanes 8 and 9, zeros in all others.
    fn pair(&mut self, index: usize, quarter: usize, affine: B::F32, has_min: bool, codes: B::Codes, offset: u8);

    /// [`codes`](Self::codes) of a segment of [`half_blocks`](Self::half_blocks).
    fn half_block_codes<const QUARTER: usize>(&mut self, codes: B::Codes, offset: u8);
}

/// Hands the codes of rows of one format to a sink.
pub(crate) trait Codes {
    /// Hands the segments of `row` to `sink`, ascending from 0. Where its weights are no multiple of 64, the last codes
    /// are followed by some with a scale of zero.
    fn codes<B: Bytes>(bytes: B, row: &[u8], sink: &mut impl CodeSink<B>);
}

/// Code that is generic over the codes of a format, see [`WeightFormat::visit_codes`].
pub(crate) trait CodeVisitor {
    /// What it computes.
    type Output;

    /// The computation for one format; `#[inline(always)]`.
    fn visit<C: Codes>(self) -> Self::Output;
}

impl WeightFormat {
    /// Whether products with quantised activations take the codes of this format. They are those that are read 1.4
    /// to 5 times as fast so, on every level with vectors of its own; portable code gains up to 1.6 and loses a fifth
    /// with Q5_K.
    #[must_use]
    pub const fn has_codes(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q4K | Self::Q5K | Self::Q6K)
    }

    /// Calls `visitor` with the codes of the format.
    ///
    /// # Panics
    /// Where [`has_codes`](Self::has_codes) is false.
    #[inline(always)]
    pub(crate) fn visit_codes<V: CodeVisitor>(self, visitor: V) -> V::Output {
        match self {
            Self::Q8_0 => visitor.visit::<Blocks<q8_0::Q8_0, 34>>(),
            Self::Q4_0 => visitor.visit::<Blocks<q4_0::Q4_0, 18>>(),
            Self::Q4_1 => visitor.visit::<Blocks<q4_1::Q4_1, 20>>(),
            Self::Q4K => visitor.visit::<q4_k::Q4K>(),
            Self::Q5K => visitor.visit::<q5_k::Q5K>(),
            Self::Q6K => visitor.visit::<q6_k::Q6K>(),
            _ => panic!("{} has no codes", self.name()),
        }
    }
}

/// Codes of a format of 32-weight blocks.
pub(crate) trait BlockCodes<const BYTES: usize>: Block<BYTES> {
    /// What is subtracted from them, see [`Bytes::dot`].
    const OFFSET: u8;

    /// The codes of two blocks.
    fn codes<B: Bytes>(bytes: B, first: &[u8; BYTES], second: &[u8; BYTES]) -> B::Codes;
}

impl<F: BlockCodes<BYTES>, const BYTES: usize> Codes for Blocks<F, BYTES> {
    #[inline(always)]
    fn codes<B: Bytes>(bytes: B, row: &[u8], sink: &mut impl CodeSink<B>) {
        // Scale and minimum.
        let halves = |block: &[u8; BYTES]| match F::HAS_MIN {
            true => u32::from_le_bytes(*part(block, 0)),
            false => u32::from(u16::from_le_bytes(*part(block, 0))),
        };
        let (segments, rest) = row.as_chunks::<BYTES>().0.as_chunks::<8>();
        for (index, blocks) in segments.iter().enumerate() {
            sink.blocks(index, bytes.halves(std::array::from_fn(|b| halves(&blocks[b]))), F::HAS_MIN);
            sink.codes::<0>(F::codes(bytes, &blocks[0], &blocks[1]), F::OFFSET);
            sink.codes::<1>(F::codes(bytes, &blocks[2], &blocks[3]), F::OFFSET);
            sink.codes::<2>(F::codes(bytes, &blocks[4], &blocks[5]), F::OFFSET);
            sink.codes::<3>(F::codes(bytes, &blocks[6], &blocks[7]), F::OFFSET);
        }
        // By pairs: a segment that is filled up with nothing would take as long as a whole one, and rows of models are short.
        for (quarter, pair) in rest.chunks(2).enumerate() {
            let (first, second) = (&pair[0], pair.get(1).unwrap_or(&[0; BYTES]));
            let affine = bytes.halves([halves(first), halves(second), 0, 0, 0, 0, 0, 0]);
            sink.pair(segments.len(), quarter, affine, F::HAS_MIN, F::codes(bytes, first, second), F::OFFSET);
        }
    }
}
