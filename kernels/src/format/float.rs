//! The float formats: weights that are numbers already.

use super::{Decode, Sink};
use crate::cpu::simd::{LANES, Simd};

/// IEEE binary16 as `f32`, exactly; a signalling NaN becomes quiet.
///
/// Branch-free, so loops over it vectorise: exponent and fraction move into place, and a multiplication by 2^112
/// corrects the bias, which normalises subnormals on the way (Giesen, "half to float done quick").
#[inline(always)]
#[must_use]
pub fn f16_to_f32(half: u16) -> f32 {
    const INFINITY: u32 = 0x7C00 << 13;
    let half = u32::from(half);
    let magnitude = (half & 0x7FFF) << 13;
    let value = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let infinite = if magnitude >= INFINITY { 0x7F80_0000 } else { 0 };
    let quiet = if magnitude > INFINITY { 0x0040_0000 } else { 0 };
    f32::from_bits(value.to_bits() | infinite | quiet | (half & 0x8000) << 16)
}

/// bfloat16 as `f32`: the upper half of its bits.
#[inline(always)]
#[must_use]
pub fn bf16_to_f32(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// A format whose vectors of sixteen weights are `N` bytes.
trait Float<const N: usize> {
    fn vector<S: Simd>(simd: S, bytes: &[u8; N]) -> S::F32;
}

#[inline(always)]
fn decode<F: Float<N>, S: Simd, const N: usize>(simd: S, row: &[u8], sink: &mut impl Sink<S>) {
    let (vectors, rest) = row.as_chunks();
    let (pairs, single) = vectors.as_chunks();
    for (i, [first, second]) in pairs.iter().enumerate() {
        sink.pair(i, [F::vector(simd, first), F::vector(simd, second)]);
    }
    if !(single.is_empty() && rest.is_empty()) {
        let mut padded = [[0; N]; 2];
        padded[..single.len()].copy_from_slice(single);
        padded[single.len()][..rest.len()].copy_from_slice(rest);
        sink.pair(pairs.len(), [F::vector(simd, &padded[0]), F::vector(simd, &padded[1])]);
    }
}

macro_rules! float {
    ($name:ident, $format:literal, $bytes:expr, |$simd:ident, $vector:ident| $load:expr) => {
        #[doc = concat!("[`WeightFormat::", $format, "`](super::WeightFormat::", $format, ").")]
        pub(crate) struct $name;

        impl Float<{ $bytes }> for $name {
            #[inline(always)]
            fn vector<S: Simd>($simd: S, $vector: &[u8; $bytes]) -> S::F32 {
                $load
            }
        }

        impl Decode for $name {
            #[inline(always)]
            fn decode<S: Simd>(simd: S, row: &[u8], sink: &mut impl Sink<S>) {
                decode::<Self, S, _>(simd, row, sink);
            }
        }
    };
}

float!(F32, "F32", 4 * LANES, |simd, bytes| simd.load_f32(bytes));
float!(F16, "F16", 2 * LANES, |simd, bytes| simd.load_f16(bytes));
float!(Bf16, "Bf16", 2 * LANES, |simd, bytes| simd.load_bf16(bytes));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Kernel, Level};

    #[test]
    fn every_half_is_what_the_half_crate_says() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}");
            let (ours, theirs) = (bf16_to_f32(bits), half::bf16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}");
        }
    }

    struct Widen<'a>(&'a [u8; 32]);

    impl Kernel for Widen<'_> {
        type Output = ([f32; LANES], f32);

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let mut out = [0.0; LANES];
            simd.store(simd.load_f16(self.0), &mut out);
            let mut first = [0.0; LANES];
            simd.store(simd.splat_f16(self.0.first_chunk().unwrap()), &mut first);
            assert!(first.iter().all(|v| v.to_bits() == first[0].to_bits()));
            (out, first[0])
        }
    }

    #[test]
    fn every_level_widens_every_half_alike() {
        for level in Level::available() {
            for first in (0..=u16::MAX).step_by(LANES) {
                let mut bytes = [0; 32];
                for (i, two) in bytes.as_chunks_mut().0.iter_mut().enumerate() {
                    *two = (first + i as u16).to_le_bytes();
                }
                let (vector, scalar) = level.dispatch(Widen(&bytes));
                for (i, ours) in vector.into_iter().chain([scalar]).enumerate() {
                    let theirs = f16_to_f32(first + (i % LANES) as u16);
                    assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{first} + {i}");
                }
            }
        }
    }
}
