//! Codes of a trellis, made and read as core does it; see [`thinkey_core::quant::trellis`].

use super::layout::{BLOCK, codes, no_number, to_half};
use cubecl::prelude::*;
use thinkey_core::quant::trellis::{MIDDLE, STEP, TABLE};

/// The numbers of half of the table, four bits each, the first lowest.
const fn packed(half: usize) -> u32 {
    let (mut word, mut at) = (0, 0);
    while at < 8 {
        word |= (TABLE[2 * half + at / 4][at % 4] as u32) << (4 * at);
        at += 1;
    }
    word
}

/// The number at `index` of the table: the own code and the second one before, mixed, above the code before.
#[cube]
fn level(index: u32) -> f32 {
    let word = select(index < 8, comptime!(packed(0)).runtime(), comptime!(packed(1)).runtime());
    f32::cast_from((word >> ((index & 7) * 4)) & 15)
}

/// By what the numbers of place `index` of the four groups of the quad at word `quad` are looked up, one a byte.
#[cube]
pub(crate) fn nibbles(words: &Array<u32>, quad: usize, index: usize) -> u32 {
    let mut before = 0u32.runtime();
    let mut second = 0u32.runtime();
    if index > 0 {
        before = codes(words, quad, index - 1, 2u32);
    }
    if index > 1 {
        second = codes(words, quad, index - 2, 2u32);
    }
    ((codes(words, quad, index, 2u32) ^ second) << 2) | before
}

/// The number of the nibble in byte `place` of four.
#[cube]
pub(crate) fn number_of(nibbles: u32, #[comptime] place: u32) -> f32 {
    level((nibbles >> comptime!(8 * place)) & 15)
}

/// By what a value's numbers become steps: 0 where all are 0, and below 0 where one is none; and Σ x².
#[cube]
pub(crate) fn fit(row: &Array<f32>, #[comptime] dim: usize) -> (f32, f32) {
    let mut squares = f32::new(0.0);
    let mut most = f32::new(0.0);
    let mut nan = false.runtime();
    for index in 0..dim {
        let x = row[index];
        nan = nan || no_number(x);
        squares += x * x;
        most = max(most, x.abs());
    }
    let gaussian = comptime!(STEP).runtime() * (squares / comptime!(dim as f32).runtime()).sqrt();
    let inverse = 1.0 / max(gaussian, most / comptime!(1.5 * MIDDLE).runtime());
    let inverse = select(most > 0.0 && inverse < 3.4e38f32, inverse, f32::new(0.0));
    (select(nan, f32::new(-1.0), inverse), squares)
}

/// The scale of a value, as bits of binary16, of what [`fit`] and all [`encode`]s gave.
#[cube]
pub(crate) fn scale(inverse: f32, squares: f32, both: f32) -> u32 {
    let scale = to_half(squares / both);
    let scale = select(inverse > 0.0 && both > 0.0 && scale < 0x7bff, scale, 0u32.runtime());
    select(inverse < 0.0, 0x7e00u32, scale)
}

/// Codes of the numbers of `row` from `first` on, at most 32, into `codes` from `at` on; gives Σ number·x, of numbers in steps.
/// A unit has a row; where `inverse` is not above 0, its codes stay.
#[cube]
pub(crate) fn encode(
    row: &Array<f32>,
    first: usize,
    inverse: f32,
    codes: &mut SharedMemory<u32>,
    at: usize,
    #[comptime] dim: usize,
) -> f32 {
    let mut both = f32::new(0.0);
    if inverse > 0.0 {
        let count = comptime!(dim.min(BLOCK));
        // What each state costs, the code before above the second one before; and from which second one the best row came, two
        // bits a state, of every number.
        let mut costs = Array::<f32>::new(16usize);
        let mut next = Array::<f32>::new(16usize);
        let mut from = Array::<u32>::new(comptime!(dim.min(BLOCK)));
        for state in 0..16usize {
            costs[state] = f32::new(3.4e38);
        }
        costs[0] = f32::new(0.0);
        for index in 0..count {
            let x = row[first + index] * inverse;
            let mut back = 0u32.runtime();
            for state in 0..16u32 {
                let own = state / 4;
                let before = state % 4;
                let mut least = f32::new(3.4e38);
                let mut best = 0u32.runtime();
                for second in 0..4u32 {
                    let off = x - (level(((own ^ second) << 2) | before) - comptime!(MIDDLE).runtime());
                    let cost = costs[(before * 4 + second) as usize] + off * off;
                    if cost < least {
                        least = cost;
                        best = second;
                    }
                }
                next[state as usize] = least;
                back |= best << (state * 2);
            }
            from[index] = back;
            for state in 0..16usize {
                costs[state] = next[state];
            }
        }
        let mut state = 0u32.runtime();
        for end in 0..16u32 {
            if costs[end as usize] < costs[state as usize] {
                state = end;
            }
        }
        for step in 0..count {
            let index = count - 1 - step;
            let own = state / 4;
            let before = state % 4;
            let second = (from[index] >> (state * 2)) & 3;
            codes[at + index] = own;
            both += (level(((own ^ second) << 2) | before) - comptime!(MIDDLE).runtime()) * row[first + index];
            state = before * 4 + second;
        }
    }
    both
}
