//! Turned values: a Walsh-Hadamard transform of a token's channels, and codes that are symmetric about 0, as core makes them;
//! see [`thinkey_core::value::turn`].

use super::layout::{no_number, to_half};
use cubecl::prelude::*;

/// Turns `numbers`, `dim` of them, a power of two, but for the factor 1/√dim.
#[cube]
pub(crate) fn turn(numbers: &mut Array<f32>, #[comptime] dim: usize) {
    #[unroll]
    for level in 0..comptime!(dim.ilog2() as usize) {
        let half = comptime!(1usize << level);
        for pair in 0..comptime!(dim / 2) {
            let low = pair / half * comptime!(2usize << level) + pair % half;
            let a = numbers[low];
            let b = numbers[low + half];
            numbers[low] = a + b;
            numbers[low + half] = a - b;
        }
    }
}

/// As [`turn`], of what the units of a cube share: for all of them.
#[cube]
pub(crate) fn turn_shared(numbers: &mut SharedMemory<f32>, #[comptime] dim: usize, #[comptime] units: usize) {
    #[unroll]
    for level in 0..comptime!(dim.ilog2() as usize) {
        let half = comptime!(1usize << level);
        for pair in range_stepped(UNIT_POS as usize, comptime!(dim / 2), units) {
            let low = pair / half * comptime!(2usize << level) + pair % half;
            let a = numbers[low];
            let b = numbers[low + half];
            numbers[low] = a + b;
            numbers[low + half] = a - b;
        }
        sync_cube();
    }
}

/// `x` within what half precision has.
#[cube]
pub(crate) fn bounded(x: f32) -> f32 {
    clamp(x, f32::new(-65504.0), f32::new(65504.0))
}

/// The code of `x`, of codes up to `levels`.
#[cube]
pub(crate) fn turned_code(x: f32, inverse: f32, levels: f32) -> u32 {
    let steps = clamp(bounded(x) * inverse + levels / 2.0, f32::new(0.0), levels);
    // Adding 2^23 rounds to an integer, ties to even.
    u32::reinterpret(steps + 8_388_608.0f32) & 0xff
}

/// The scale of a turned value, as bits of binary16, and by what its numbers become codes, see [`turned_code`]: 0 where all
/// codes are the lower one of the middle, below 0 where all are 0.
#[cube]
pub(crate) fn fit_turned(numbers: &Array<f32>, levels: f32, #[comptime] dim: usize) -> (u32, f32) {
    let mut most = f32::new(0.0);
    let mut nan = false.runtime();
    for index in 0..dim {
        let x = numbers[index];
        nan = nan || no_number(x);
        most = max(most, x.abs());
    }
    most = bounded(most);
    let mut scale = 0u32.runtime();
    let mut best = f32::new(0.0);
    let mut chosen = f32::new(0.0);
    for width in 0..4usize {
        let share = select(
            width == 0,
            (levels + 1.0) / levels,
            select(width == 1, f32::new(1.0), select(width == 2, f32::new(0.85), f32::new(0.7))),
        );
        let inverse = (levels + 1.0) / (2.0 * share * most);
        if most > 0.0 && inverse < 3.4e38f32 {
            let mut steps = f32::new(0.0);
            let mut both = f32::new(0.0);
            let mut squares = f32::new(0.0);
            // In eight lanes that are added up at the end, as core does.
            for lane in 0..8usize {
                let mut lane_steps = f32::new(0.0);
                let mut lane_both = f32::new(0.0);
                let mut lane_squares = f32::new(0.0);
                for row in 0..comptime!(dim.div_ceil(8)) {
                    let index = row * 8 + lane;
                    if index < dim {
                        let x = bounded(numbers[index]);
                        let code = f32::cast_from(turned_code(x, inverse, levels)) - levels / 2.0;
                        lane_steps += code * code;
                        lane_both += code * x;
                        lane_squares += x * x;
                    }
                }
                steps += lane_steps;
                both += lane_both;
                squares += lane_squares;
            }
            let tried = to_half(squares / both);
            let quality = both * (both / steps);
            if quality > best && tried < 0x7bff {
                scale = tried;
                best = quality;
                chosen = inverse;
            }
        }
    }
    let scale = select(nan, 0x7e00u32, scale);
    let chosen = select(nan, f32::new(-1.0), chosen);
    (scale, chosen)
}
