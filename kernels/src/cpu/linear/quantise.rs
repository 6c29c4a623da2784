//! Activations in eight bits.
//!
//! As ggml's Q8_1: every 32 activations have a scale of their own, the largest magnitude over 127, so that a code is
//! off by at most half a scale. The sum of the block goes with it, for formats that have minima.

use crate::cpu::simd::{
    Kernel, LANES, Level, Simd,
    bytes::{BYTES, Quarter},
};
use crate::format::PAIR;

/// Activations that share a scale: a block of weights.
const BLOCK: usize = PAIR;

/// Blocks of a segment.
pub(crate) const BLOCKS: usize = 8;

/// Activations of a segment: a super-block of weights.
pub(crate) const SEGMENT: usize = BLOCKS * BLOCK;

/// Below this the largest magnitude of a block has no reciprocal; such a block is zero.
const SMALLEST: f32 = 1e-36;

/// 256 activations.
#[derive(Clone, Debug, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Segment {
    pub(crate) quarters: [Quarter; SEGMENT / BYTES],
    /// The scales of the eight blocks, then the sums of their dequantised activations.
    pub(crate) affine: [f32; 2 * BLOCKS],
}

impl Segment {
    const ZERO: Self = Self { quarters: [Quarter::ZERO; SEGMENT / BYTES], affine: [0.0; 2 * BLOCKS] };
}

/// Segments of a row of `cols` activations.
pub(crate) fn segments(cols: usize) -> usize {
    cols.div_ceil(SEGMENT)
}

/// Quantises the rows of x [m, cols] into `out`, each padded with zeros to whole segments; returns those. A block that
/// holds an infinity or a NaN becomes NaN.
pub(super) fn quantise<'a>(level: Level, x: &[f32], cols: usize, out: &'a mut Vec<Segment>) -> &'a [Segment] {
    let len = x.len() / cols * segments(cols);
    if out.len() < len {
        out.resize(len, Segment::ZERO);
    }
    let out = &mut out[..len];
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(segments(cols))) {
        level.dispatch(Quantise { x, out });
    }
    out
}

struct Quantise<'a> {
    x: &'a [f32],
    out: &'a mut [Segment],
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, segment) in self.x.chunks(SEGMENT).zip(self.out) {
            let (blocks, rest) = x.as_chunks();
            for (index, block) in blocks.iter().enumerate() {
                quantise_block(block, segment, index);
            }
            let mut padded = [0.0; BLOCK];
            padded[..rest.len()].copy_from_slice(rest);
            for index in blocks.len()..BLOCKS {
                quantise_block(&padded, segment, index);
                padded = [0.0; BLOCK];
            }
        }
    }
}

/// Block `index` of a segment.
#[inline(always)]
fn quantise_block(x: &[f32; BLOCK], segment: &mut Segment, index: usize) {
    // As integers, magnitudes order as they do as floats, and infinities and NaN are the largest.
    let mut bits = [0_u32; LANES];
    for i in 0..BLOCK {
        let magnitude = x[i].to_bits() & 0x7FFF_FFFF;
        bits[i % LANES] = bits[i % LANES].max(magnitude);
    }
    let largest = f32::from_bits(bits.into_iter().fold(0, u32::max));
    let finite = largest.is_finite();
    let inverse = if finite && largest > SMALLEST { 127.0 / largest } else { 0.0 };
    let scale = if !finite {
        f32::NAN
    } else if largest > SMALLEST {
        largest / 127.0
    } else {
        0.0
    };

    let Quarter { codes, sums } = &mut segment.quarters[index / 2];
    let codes: &mut [i8; BLOCK] = (&mut codes[BLOCK * (index % 2)..][..BLOCK]).try_into().expect("half a quarter");
    let mut wide = [0_i32; BLOCK];
    for i in 0..BLOCK {
        // Rounds to the nearest even integer, which is then in the lowest bits of the mantissa.
        const ROUND: f32 = 12_582_912.0;
        let code = (x[i] * inverse + ROUND).to_bits().cast_signed().wrapping_sub(ROUND.to_bits().cast_signed());
        wide[i] = if finite { code } else { 0 };
    }
    for i in 0..BLOCK {
        codes[i] = wide[i] as i8;
    }
    let mut total = 0;
    for (sum, four) in sums[BLOCK / 4 * (index % 2)..][..BLOCK / 4].iter_mut().zip(wide.as_chunks::<4>().0) {
        let four = four.iter().sum::<i32>();
        *sum = -128 * four;
        total += four;
    }
    segment.affine[index] = scale;
    segment.affine[BLOCKS + index] = scale * total as f32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The activations that segments stand for.
    fn dequantised(segments: &[Segment]) -> Vec<f32> {
        let block = |segment: &Segment, block: usize| {
            let codes = &segment.quarters[block / 2].codes[BLOCK * (block % 2)..][..BLOCK];
            codes.iter().map(|&code| f32::from(code) * segment.affine[block]).collect::<Vec<_>>()
        };
        segments.iter().flat_map(|segment| (0..BLOCKS).flat_map(|i| block(segment, i))).collect()
    }

    proptest! {
        #[test]
        fn codes_are_off_by_half_a_scale(
            x in prop::collection::vec(prop_oneof![-1.0f32..1.0, -1e30f32..1e30, Just(0.0)], 1..600), rows in 1usize..4,
        ) {
            let cols = x.len() / rows;
            prop_assume!(cols > 0);
            let x = &x[..rows * cols];
            for level in Level::available() {
                let mut buffer = vec![Segment { affine: [f32::NAN; 16], ..Segment::ZERO }; 2];
                let out = quantise(level, x, cols, &mut buffer);
                prop_assert_eq!(out.len(), rows * cols.div_ceil(SEGMENT));
                for (x, row) in x.chunks_exact(cols).zip(out.chunks_exact(cols.div_ceil(SEGMENT))) {
                    let values = dequantised(row);
                    for (block, (x, y)) in x.chunks(BLOCK).zip(values.chunks(BLOCK)).enumerate() {
                        let segment = &row[block / BLOCKS];
                        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                        let scale = segment.affine[block % BLOCKS];
                        prop_assert!((scale - largest / 127.0).abs() <= 1e-6 * scale);
                        for (x, y) in x.iter().zip(y) {
                            prop_assert!((x - y).abs() <= 0.50001 * scale, "{x} became {y} at a scale of {scale}");
                        }
                        let sum = y.iter().map(|&y| f64::from(y)).sum::<f64>();
                        let error = f64::from(segment.affine[BLOCKS + block % BLOCKS]) - sum;
                        prop_assert!(error.abs() <= 1e-5 * f64::from(largest));
                    }
                    prop_assert!(values[cols..].iter().all(|&y| y == 0.0), "padding");
                    for quarter in row.iter().flat_map(|segment| &segment.quarters) {
                        prop_assert!(quarter.codes.iter().all(|&code| code >= -127));
                        for (sum, codes) in quarter.sums.iter().zip(quarter.codes.chunks(4)) {
                            prop_assert_eq!(*sum, -128 * codes.iter().map(|&code| i32::from(code)).sum::<i32>());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_spoils_its_block_alone() {
        for level in Level::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = [1.0; 2 * BLOCK];
                x[BLOCK + 5] = bad;
                let mut buffer = Vec::new();
                let segment = &quantise(level, &x, x.len(), &mut buffer)[0];
                assert_eq!((segment.affine[0], segment.affine[BLOCKS]), (1.0 / 127.0, 32.0));
                assert!(segment.affine[1].is_nan() && segment.affine[BLOCKS + 1].is_nan());
                assert_eq!(segment.quarters[0].codes[BLOCK..], [0; BLOCK]);
            }
            // Too small for a scale, and the largest there is.
            for (x, scale) in [(1e-38, 0.0), (f32::MAX, f32::MAX / 127.0)] {
                let mut buffer = Vec::new();
                let segment = &quantise(level, &[x; BLOCK], BLOCK, &mut buffer)[0];
                assert_eq!(segment.affine[0], scale);
                assert_eq!(segment.quarters[0].codes[0], if scale > 0.0 { 127 } else { 0 });
            }
        }
    }
}
