//! The range that the codes of a group span.
//!
//! Where codes are few, the whole range is not the best one: two bits say four numbers, and of 32 the outermost lie far from
//! most. So ranges of 2- and 3-bit codes are also tried at 85% and 70% of the width, and the one whose codes correlate best
//! with the numbers is taken; of Gaussian numbers that leaves 0.74 and 0.91 of the whole range's squared error (nine widths
//! leave 0.73 and 0.89). Scale and minimum are then not those of the range, but those that keep the group's mean and do
//! not shrink it: Σ stored·x = Σ x², both less the mean. The scale of least squares shrinks every number a little (by 10%
//! with 2 bits), in the same direction in every token, and attention, which averages what tokens are off by, does not
//! average that away: with values in int2 the divergence from the whole cache was 0.053 by least squares, 0.026 by the
//! whole range and 0.018 so (SmolLM2-135M, news, 2 windows of 2,048 + 256 tokens).

use super::{CodeKind, GROUP};
use crate::storage::Element;
use half::f16;

/// Writes the codes of `numbers` and returns their scale and minimum. A number that is not one makes the minimum one that
/// is not: it stays visible.
pub(super) fn quantise(kind: CodeKind, numbers: &[f32; GROUP], codes: &mut [u8; GROUP]) -> (f16, f16) {
    const LARGEST: f32 = 65504.0;
    const LANES: usize = 8;
    // Lane by lane, so that the loops become vector instructions.
    let (mut least, mut most, mut nan) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES], [0u32; LANES]);
    for numbers in numbers.chunks_exact(LANES) {
        for (((&x, least), most), nan) in numbers.iter().zip(&mut least).zip(&mut most).zip(&mut nan) {
            *least = if x < *least { x } else { *least };
            *most = if x > *most { x } else { *most };
            *nan |= u32::from(x.is_nan());
        }
    }
    if nan.iter().any(|&nan| nan != 0) {
        codes.fill(0);
        return (f16::ZERO, f16::NAN);
    }
    let least = least.iter().copied().fold(f32::INFINITY, f32::min);
    let most = most.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (least, most) = (least.clamp(-LARGEST, LARGEST), most.clamp(-LARGEST, LARGEST));
    let whole = Line::new(kind, least, most);
    if kind.largest() > 7 {
        whole.encode(numbers, codes);
        return (whole.scale, whole.min);
    }
    let (middle, half) = (least / 2.0 + most / 2.0, most / 2.0 - least / 2.0);
    let (mut found, mut best) = (None, 0.0);
    for width in WIDTHS {
        let mut other = [0; GROUP];
        Line::new(kind, middle - width * half, middle + width * half).encode(numbers, &mut other);
        let fit = Fit::new(&other, numbers);
        if fit.quality() > best {
            (found, best, *codes) = (fit.affine(), fit.quality(), other);
        }
    }
    found.unwrap_or_else(|| {
        whole.encode(numbers, codes);
        (whole.scale, whole.min)
    })
}

/// Shares of the whole range that few codes are tried over.
const WIDTHS: [f32; 3] = [1.0, 0.85, 0.7];

/// Codes and the numbers that they stand for, as a regression sees them.
#[derive(Clone, Copy)]
struct Fit {
    /// Mean of the codes and of the numbers.
    means: (f32, f32),
    /// Σ (code − mean)².
    codes: f32,
    /// Σ (number − mean)².
    numbers: f32,
    /// Σ (code − mean)·(number − mean).
    both: f32,
}

impl Fit {
    fn new(codes: &[u8; GROUP], numbers: &[f32; GROUP]) -> Self {
        const LANES: usize = 8;
        let mut sums = [[0.0f32; LANES]; 2];
        for (codes, numbers) in codes.as_chunks::<LANES>().0.iter().zip(numbers.as_chunks::<LANES>().0) {
            for (lane, (&code, &x)) in codes.iter().zip(numbers).enumerate() {
                sums[0][lane] += f32::from(code);
                sums[1][lane] += x;
            }
        }
        let means = sums.map(|sums| sums.iter().sum::<f32>() / GROUP as f32);
        let mut sums = [[0.0f32; LANES]; 3];
        for (codes, numbers) in codes.as_chunks::<LANES>().0.iter().zip(numbers.as_chunks::<LANES>().0) {
            for (lane, (&code, &x)) in codes.iter().zip(numbers).enumerate() {
                let (code, x) = (f32::from(code) - means[0], x - means[1]);
                sums[0][lane] += code * code;
                sums[1][lane] += x * x;
                sums[2][lane] += code * x;
            }
        }
        let [codes, numbers, both] = sums.map(|sums| sums.iter().sum());
        Self { means: (means[0], means[1]), codes, numbers, both }
    }

    /// The square of the correlation, times what is the same for all codes of a group.
    fn quality(&self) -> f32 {
        self.both * (self.both / self.codes)
    }

    /// The scale and minimum that keep the mean, and what the numbers have in common with themselves: Σ stored·x = Σ x·x,
    /// both less the mean. `None` where half precision has no such numbers.
    fn affine(&self) -> Option<(f16, f16)> {
        let scale = <f16 as Element>::store(self.numbers / self.both);
        let min = <f16 as Element>::store(self.means.1 - scale.load() * self.means.0);
        (scale >= f16::MIN_POSITIVE && scale < f16::MAX && min > f16::MIN && min < f16::MAX).then_some((scale, min))
    }
}

/// What codes mean: a line.
#[derive(Clone, Copy)]
pub(super) struct Line {
    pub(super) scale: f16,
    pub(super) min: f16,
    /// The largest code.
    pub(super) levels: f32,
}

impl Line {
    /// Codes that reach from `least` to `most`, both finite binary16 or between such.
    fn new(kind: CodeKind, least: f32, most: f32) -> Self {
        let mut min = <f16 as Element>::store(least);
        if min.load() > least {
            min = below(min);
        }
        let (offset, levels) = (min.load(), f32::from(kind.largest()));
        let mut scale = <f16 as Element>::store((most - offset) / levels);
        if scale.load() * levels < most - offset {
            scale = f16::from_bits(scale.to_bits() + 1);
        }
        Self { scale, min, levels }
    }

    /// The codes nearest to `numbers`.
    pub(super) fn encode(self, numbers: &[f32; GROUP], codes: &mut [u8; GROUP]) {
        let (offset, step, levels) = (self.min.load(), self.scale.load(), self.levels);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        for (to, &x) in codes.iter_mut().zip(numbers) {
            // Adding 2^23 to a number below it rounds to an integer, in the low bits: a conversion that is one
            // instruction on every vector unit, where a saturating cast is a branch a number.
            let steps = (x - offset) * inverse;
            let steps = if steps > 0.0 { steps } else { 0.0 };
            let steps = if steps < levels { steps } else { levels };
            *to = (steps + 8_388_608.0).to_bits() as u8;
        }
    }
}

/// The next smaller binary16 of a finite one.
fn below(x: f16) -> f16 {
    match x.to_bits() {
        0 => f16::from_bits(0x8001),
        bits if bits & 0x8000 == 0 => f16::from_bits(bits - 1),
        // The most negative number stays: numbers were brought into range before.
        bits => f16::from_bits((bits + 1).min(0xfbff)),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::affine, *};
    use proptest::prelude::*;
    use std::vec;

    proptest! {
        #[test]
        fn numbers_are_off_by_half_a_step_or_not_shrunk(
            numbers in prop::array::uniform32(prop_oneof![-70000.0f32..70000.0, -1.0f32..1.0, -1e-6f32..1e-6, Just(0.0)]),
            shift in prop_oneof![Just(0.0f32), -100.0f32..100.0],
            flat in any::<bool>(),
        ) {
            let numbers = numbers.map(|x| if flat { shift } else { (x + shift).clamp(-65504.0, 65504.0) });
            for kind in [CodeKind::Int8, CodeKind::Int4, CodeKind::Int3, CodeKind::Int2] {
                let mut memory = vec![0u16; kind.bytes(6) / 2];
                let bytes = bytemuck::cast_slice_mut(&mut memory);
                kind.parts_mut(bytes, 6).unwrap().put(1, &[[0.0; 32], numbers, [1.0; 32], [2.0; 32]]);
                let groups = kind.parts(bytes, 6).unwrap();
                let (least, most) = numbers.iter().fold((f32::MAX, f32::MIN), |(l, m), &x| (l.min(x), m.max(x)));
                // Scale and minimum are rounded outwards, by a part in 2048 or the least binary16.
                let span = f64::from(most) - f64::from(least) + f64::from(least.abs()) / 1024.0 + 6e-8;
                let step = span * (1.0 + 1.0 / 1024.0) / f64::from(kind.largest()) + 6e-8;
                let stored: [f64; GROUP] = core::array::from_fn(|index| f64::from(groups.get(5, index)));
                // Half precision ends the range of what it cannot say.
                let largest = least.abs().max(most.abs());
                let fits = largest < 20_000.0 && affine(&groups, 5).0.load() > 1e-3 * largest;
                if kind.largest() <= 7 && fits && affine(&groups, 5).0 > f16::MIN_POSITIVE {
                    check_fit(kind, &numbers.map(f64::from), &stored, f64::from(affine(&groups, 5).1.load()))?;
                    continue;
                }
                let few = kind.largest() <= 7;
                for (&stored, &x) in stored.iter().zip(numbers.iter().filter(|_| !few)) {
                    let off = (stored - f64::from(x)).abs();
                    let slack = 4e-7 * f64::from(x.abs() + least.abs());
                    prop_assert!(off <= step / 2.0 + slack, "{x} is off by {off}, step {step}");
                }
            }
        }
    }

    /// That few codes keep the mean and do not shrink, and correlate no worse than those of the whole range.
    fn check_fit(kind: CodeKind, numbers: &[f64; GROUP], stored: &[f64; GROUP], min: f64) -> Result<(), TestCaseError> {
        let mean = |x: &[f64; GROUP]| x.iter().sum::<f64>() / GROUP as f64;
        let both = |x: &[f64; GROUP], y: &[f64; GROUP]| -> f64 {
            x.iter().zip(y).map(|(a, b)| (a - mean(x)) * (b - mean(y))).sum()
        };
        let (spread, shared) = (both(numbers, numbers), both(numbers, stored));
        // Scale and minimum are rounded to half precision; a group may be far from zero, and its numbers nearly the same.
        let largest = numbers.iter().fold(min.abs(), |most, x| most.max(x.abs()));
        let lost = (mean(numbers) - mean(stored)).abs();
        prop_assert!(lost <= largest * 1e-3, "{kind:?}: the mean moved by {lost}, with numbers up to {largest}");
        if spread < 1e-4 * largest * largest {
            return Ok(());
        }
        prop_assert!((shared / spread - 1.0).abs() < 2e-3, "{kind:?}: {shared} of {spread}");
        let (least, most) = numbers.iter().fold((f64::MAX, f64::MIN), |(l, m), &x| (l.min(x), m.max(x)));
        let levels = f64::from(kind.largest());
        let whole = numbers.map(|x| ((x - least) / (most - least) * levels).round());
        let quality = |codes: &[f64; GROUP]| both(codes, numbers).powi(2) / both(codes, codes) / spread;
        // Half precision moves the ends of the range and with them numbers on a border.
        let (own, whole) = (quality(stored), quality(&whole));
        prop_assert!(own > whole - 0.02, "{kind:?}: {own} instead of {whole}");
        Ok(())
    }

    /// What the module says of ranges narrower than the whole one.
    #[test]
    fn narrower_ranges_of_few_codes_have_less_error() {
        let mut seed = 1u64;
        let mut uniform = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 24) as f32
        };
        let mut gaussian = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
        let (mut narrow, mut whole, mut shared, mut energy) = ([0.0; 2], [0.0; 2], [0.0; 2], 0.0);
        for _ in 0..500 {
            let numbers: [f32; GROUP] = core::array::from_fn(|_| gaussian());
            let (least, most) = numbers.iter().fold((f32::MAX, f32::MIN), |(l, m), &x| (l.min(x), m.max(x)));
            energy += numbers.iter().map(|x| x * x).sum::<f32>();
            for (at, kind) in [CodeKind::Int2, CodeKind::Int3].into_iter().enumerate() {
                let mut codes = [0; GROUP];
                let error = |codes: &[u8; GROUP], scale: f16, min: f16| -> f32 {
                    let off = |(&code, x): (&u8, &f32)| (f32::from(code) * scale.load() + min.load() - x).powi(2);
                    codes.iter().zip(&numbers).map(off).sum()
                };
                let range = Line::new(kind, least, most);
                range.encode(&numbers, &mut codes);
                whole[at] += error(&codes, range.scale, range.min);
                let (scale, min) = quantise(kind, &numbers, &mut codes);
                narrow[at] += error(&codes, scale, min);
                let stored = |code: u8| f32::from(code) * scale.load() + min.load();
                shared[at] += codes.iter().zip(&numbers).map(|(&code, x)| stored(code) * x).sum::<f32>();
            }
        }
        assert!(narrow[0] < 0.77 * whole[0] && narrow[1] < 0.94 * whole[1], "{narrow:?} of {whole:?}");
        // Nothing shrinks.
        assert!(shared.iter().all(|shared| (shared / energy - 1.0).abs() < 1e-3), "{shared:?} of {energy}");
    }
}
