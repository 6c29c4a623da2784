//! Scales in eight bits: four of the exponent, four of the fraction.
//!
//! A group of few bits a number can do with a scale that is a 32nd off: the step is then that much larger than it had to be, which
//! is a part in 16 of its error, where the eight bits saved are a quarter of a bit a number. They tell steps from 2⁻¹⁰ to 58; what
//! is finer or coarser takes the least or the largest.

/// Scale of what is no number.
const NAN: u8 = u8::MAX;

/// The largest byte that is a scale.
const LARGEST: u8 = NAN - 1;

/// Bits of the fraction of an `f32` that a byte lacks.
const SHIFT: u32 = f32::MANTISSA_DIGITS - 1 - 4;

/// What a byte's exponent lacks of that of an `f32`.
const LEAST: u32 = (127 - 10) << (f32::MANTISSA_DIGITS - 1);

/// The scale that a byte says.
#[inline(always)]
#[must_use]
pub const fn scale(byte: u8) -> f32 {
    let scale = f32::from_bits(((byte as u32) << SHIFT) + LEAST);
    if byte == NAN { f32::NAN } else { scale }
}

/// The byte of the scale nearest to `x`.
pub(super) fn nearest(x: f32) -> u8 {
    of_bits(x, 1 << (SHIFT - 1))
}

/// The byte of the least scale that is `x` or more; of the largest where there is none.
pub(super) fn at_least(x: f32) -> u8 {
    of_bits(x, (1 << SHIFT) - 1)
}

/// The byte whose bits are those of `x` and `more`, cut off.
fn of_bits(x: f32, more: u32) -> u8 {
    if x.is_nan() {
        return NAN;
    }
    let bits = (x.max(0.0).to_bits() + more).saturating_sub(LEAST) >> SHIFT;
    bits.min(LARGEST.into()) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_grow_by_at_most_a_sixteenth() {
        assert_eq!((scale(0), scale(LARGEST)), (1.0 / 1024.0, 60.0));
        assert!(scale(NAN).is_nan());
        for byte in 0..LARGEST {
            let (own, next) = (scale(byte), scale(byte + 1));
            assert!(own < next && next <= own * 1.0625, "{byte}");
            assert_eq!([nearest(own), at_least(own), at_least(own * 1.0001)], [byte, byte, byte + 1]);
            let middle = (own + next) / 2.0;
            assert_eq!([nearest(middle * 0.9999), nearest(middle * 1.0001)], [byte, byte + 1]);
        }
        for (x, byte) in [(0.0, 0), (-1.0, 0), (1e-30, 0), (1e30, LARGEST), (f32::INFINITY, LARGEST), (f32::NAN, NAN)] {
            assert_eq!([nearest(x), at_least(x)], [byte; 2], "{x}");
        }
    }
}
