//! The exponential function on vectors.

use super::simd::Simd;

/// Where e^x leaves the normal numbers on both sides.
const LIMIT: f32 = 88.0;

/// e^x, within 2 units in the last place for -87 ≤ x ≤ 88; 0 below -88, and no more than e^88 above.
///
/// e^x = 2^n · e^r with n = round(x / ln 2) and |r| ≤ ln 2 / 2; e^r by its Taylor polynomial of degree 7. Every operation is
/// one of the level's own: a compiler makes no vectors of a loop with a branch in it, and sees one in every limit.
#[inline(always)]
pub(super) fn exponential<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    // 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with few enough bits that n · HIGH is exact (Cody & Waite).
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    let x = simd.max(simd.splat(-LIMIT), simd.min(simd.splat(LIMIT), x));
    let shifted = simd.fma(x, simd.splat(std::f32::consts::LOG2_E), simd.splat(ROUND));
    let n = simd.add(shifted, simd.splat(-ROUND));
    let r = simd.fma(n, simd.splat(-LOW), simd.fma(n, simd.splat(-HIGH), x));
    let mut p = simd.splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = simd.fma(p, r, simd.splat(coefficient));
    }
    simd.mul(p, simd.power_of_two(shifted))
}
