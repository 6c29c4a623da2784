//! Trellis-coded quantisation: two bits a number that say more than four numbers.
//!
//! What a code stands for depends on the two codes before it, so that a row of numbers has far more rows to be near to than
//! four numbers a place would make, and the nearest of all is found by the Viterbi algorithm (Marcellin and Fischer, "Trellis
//! coded quantization of memoryless and Gauss-Markov sources", 1990; QTIP,
//! [arXiv 2406.11235](https://arxiv.org/abs/2406.11235), stores a model's weights so, with larger trellises). Of Gaussian
//! numbers two bits leave an error of 0.133 of their energy by four numbers evenly apart, where nothing shrinks, and 0.093 so.
//!
//! This trellis has sixteen states and is made for processors that look bytes up sixteen at a time: of its own code, the one
//! before and the one before that, a number is entry (own ⊕ second before)·4 + before of a [table](TABLE) of integers
//! of four bits. So whatever multiplies codes of four bits multiplies these. Rows start with two codes of 0 before them.
//!
//! Tables and ways of mixing the three codes were searched for by their error of rows of 32 Gaussian numbers, each starting
//! from random numbers and followed by steps of one in single entries: the best table of 16 states has 0.093, one that is
//! looked up by all six bits 0.096 (64 entries are harder to search), one of four states, without the second code before,
//! 0.102.

use super::GROUP;
use crate::MAX_HEAD_DIM;

/// The numbers that codes stand for, in steps; [`MIDDLE`] stands for 0. The outer index mixes the own code and the second one
/// before, the inner one is the code before.
pub const TABLE: [[u8; 4]; 4] = [[6, 7, 4, 0], [9, 10, 7, 5], [2, 15, 13, 8], [12, 4, 9, 11]];

/// What stands for 0: a number between two steps.
pub const MIDDLE: f32 = 7.5;

/// The step that suits Gaussian numbers, in parts of their root mean square.
pub const STEP: f32 = 0.267;

/// The number that `own` stands for, after the code `before` and the one `second_before` that.
#[inline(always)]
#[must_use]
pub const fn level(own: u8, before: u8, second_before: u8) -> u8 {
    TABLE[(own ^ second_before) as usize][before as usize]
}

/// The numbers that `codes`, a row from its start, stand for: in steps, about 0.
pub(super) fn levels(codes: &[u8]) -> impl Iterator<Item = f32> {
    let (mut before, mut second_before) = (0, 0);
    codes.iter().map(move |&own| {
        let level = level(own, before, second_before);
        (before, second_before) = (own, before);
        f32::from(level) - MIDDLE
    })
}

/// [`TABLE`] as numbers about 0.
const STEPS: [[f32; 4]; 4] = {
    let mut steps = [[0.0; 4]; 4];
    let mut at = 0;
    while at < 16 {
        steps[at / 4][at % 4] = TABLE[at / 4][at % 4] as f32 - MIDDLE;
        at += 1;
    }
    steps
};

/// What each state costs: `costs[before][second before]`.
type Costs = [[f32; 4]; 4];

/// How far a number, in steps, is off from all that codes can stand for.
#[inline(always)]
fn errors(number: f32) -> Costs {
    let mut errors = STEPS;
    for row in &mut errors {
        for x in row {
            *x = (number - *x) * (number - *x);
        }
    }
    errors
}

/// Writes the codes of `numbers`, at most [`GROUP`] finite ones, `inverse` of a step each, whose numbers are nearest by the sum
/// of squares.
fn encode(numbers: &[f32], inverse: f32, codes: &mut [u8]) {
    // What the best row of codes costs that ends in a state, before each number and after the last.
    let mut costs = [[[f32::MAX; 4]; 4]; GROUP + 1];
    costs[0][0][0] = 0.0;
    for (at, &x) in numbers.iter().enumerate() {
        let (before, errors) = (costs[at], errors(x * inverse));
        // By the second code before, so that what stands side by side differs in the code before.
        let mut columns = before;
        for (second, column) in columns.iter_mut().enumerate() {
            *column = [before[0][second], before[1][second], before[2][second], before[3][second]];
        }
        for (own, next) in costs[at + 1].iter_mut().enumerate() {
            for (second, column) in columns.iter().enumerate() {
                for ((least, cost), error) in next.iter_mut().zip(column).zip(&errors[own ^ second]) {
                    let cost = cost + error;
                    *least = if cost < *least { cost } else { *least };
                }
            }
        }
    }
    // The cheapest end, and back from there.
    let (mut own, mut before) = (0, 0);
    let ends = &costs[numbers.len()];
    for at in 0..16 {
        if ends[at / 4][at % 4] < ends[own][before] {
            (own, before) = (at / 4, at % 4);
        }
    }
    for (at, (&x, code)) in numbers.iter().zip(codes).enumerate().rev() {
        *code = own as u8;
        let errors = errors(x * inverse);
        let cost = |second: usize| costs[at][before][second] + errors[own ^ second][before];
        let second = (1..4).fold(0, |best, second| if cost(second) < cost(best) { second } else { best });
        (own, before) = (before, second);
    }
}

/// Writes the codes of `numbers`, which are some, by the trellis, and returns the scale that does not shrink them; 0
/// where there is none.
pub(super) fn quantise(numbers: &[f32], codes: &mut [u8]) -> f32 {
    let mut bounded = [0.0; MAX_HEAD_DIM];
    let bounded = &mut bounded[..numbers.len()];
    bounded.iter_mut().zip(numbers).for_each(|(to, x)| *to = x.clamp(-65504.0, 65504.0));
    let (squares, most) =
        bounded.iter().fold((0.0, 0.0), |(sum, most): (f32, f32), x| (sum + x * x, most.max(x.abs())));
    // Where one number stands far out, it is met halfway.
    let step = (STEP * libm::sqrtf(squares / numbers.len() as f32)).max(most / (1.5 * MIDDLE));
    let inverse = 1.0 / step;
    codes.fill(0);
    if !inverse.is_finite() {
        return 0.0;
    }
    let mut both = 0.0;
    for (numbers, codes) in bounded.chunks(GROUP).zip(codes.chunks_mut(GROUP)) {
        encode(numbers, inverse, codes);
        both += levels(codes).zip(numbers).map(|(level, x)| level * x).sum::<f32>();
    }
    if both > 0.0 { squares / both } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    fn stored(codes: &[u8]) -> Vec<f32> {
        let code = |at: usize, back: usize| at.checked_sub(back).map_or(0, |at| codes[at]);
        let stored: Vec<f32> =
            (0..codes.len()).map(|at| f32::from(level(codes[at], code(at, 1), code(at, 2))) - MIDDLE).collect();
        assert!(levels(codes).eq(stored.iter().copied()));
        stored
    }

    fn error(codes: &[u8], numbers: &[f32]) -> f32 {
        stored(codes).iter().zip(numbers).map(|(a, b)| (a - b) * (a - b)).sum()
    }

    proptest! {
        /// Against every row of codes.
        #[test]
        fn no_other_row_is_nearer(numbers in prop::collection::vec(-12.0f32..12.0, 0..=7), step in 0.1f32..10.0) {
            let scaled: Vec<f32> = numbers.iter().map(|x| x * step).collect();
            let mut codes = vec![0; numbers.len()];
            encode(&scaled, 1.0 / step, &mut codes);
            let least = (0..1_u32 << (2 * numbers.len()))
                .map(|row| (0..numbers.len()).map(|at| (row >> (2 * at) & 3) as u8).collect::<Vec<_>>())
                .map(|codes| error(&codes, &numbers))
                .fold(f32::MAX, f32::min);
            prop_assert!(error(&codes, &numbers) <= least * 1.0001 + 1e-4);
        }
    }

    /// What the module says of Gaussian numbers.
    #[test]
    fn the_error_of_gaussian_numbers_is_as_said() {
        let mut seed = 1u64;
        let mut uniform = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 24) as f32
        };
        let mut gaussian = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
        let (mut off, mut sum, rows) = (0.0, 0.0, 2000);
        for _ in 0..rows {
            let numbers: [f32; GROUP] = core::array::from_fn(|_| gaussian());
            let mut codes = [0; GROUP];
            encode(&numbers, 1.0 / STEP, &mut codes);
            let stored = stored(&codes);
            let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            let both = dot(&stored, &numbers);
            off += dot(&stored, &stored) * dot(&numbers, &numbers) / (both * both) - 1.0;
            sum += stored.iter().map(|x| x * STEP).sum::<f32>() - numbers.iter().sum::<f32>();
        }
        assert!((0.088..0.096).contains(&(off / rows as f32)), "{}", off / rows as f32);
        // And they are not moved: attention would not average that away.
        assert!((sum / (rows * GROUP) as f32).abs() < 0.006, "{}", sum / (rows * GROUP) as f32);
    }
}
