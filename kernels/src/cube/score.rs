//! The energies that score channels, by one streaming reduction over the whole tokens of a step.

use super::layout::{Shape, head, new_keys, ring, step, whole};
use cubecl::prelude::*;
use thinkey_core::policy::Score;

/// Units of a cube: one a channel, or every so many.
pub(crate) const UNITS: usize = 128;

/// Tokens whose squares are summed before those of others are added.
pub(crate) const CHUNK: usize = 256;

/// The energies of a step: one cube a chunk of its tokens and one more, the last (x), a head (y) and a step (z).
///
/// Cubes of chunks sum what keys are scored by over whole tokens, those of the ring and then the new ones, where channels are
/// chosen: `sums` is `[step][head][chunk][D]`. The last cube adds the squares of the step's newest queries, where they count,
/// to the energies of its slot. `queries` has rows of [`Shape::queries_width`].
#[cube(launch_unchecked)]
pub(crate) fn energies(
    arena: &mut Array<u32>,
    heads: &Array<u32>,
    steps: &Array<u32>,
    queries: &Array<f32>,
    fused: &Array<f32>,
    sums: &mut Array<f32>,
    #[comptime] shape: Shape,
    #[comptime] l1: bool,
) {
    let dim = comptime!(shape.dim);
    let chunks = CUBE_COUNT_X as usize - 1;
    let table = CUBE_POS_Y as usize * head::FIELDS;
    let entry = CUBE_POS_Z as usize * step::FIELDS;
    let ring = ring(heads, table, steps[entry + step::SLOT] as usize);
    if CUBE_POS_X as usize == chunks {
        let counted = steps[entry + step::COUNTED] as usize;
        if counted > 0 {
            let energies = ring + heads[table + head::ENERGY] as usize;
            let first = steps[entry + step::QUERIES] as usize;
            for channel in range_stepped(UNIT_POS as usize, dim, UNITS) {
                let mut sum = f32::new(0.0);
                for row in first..first + counted {
                    let own = CUBE_POS_Y as usize * comptime!(shape.group * shape.dim) + channel;
                    let from = row * comptime!(shape.queries_width) + own;
                    for member in 0..comptime!(shape.group) {
                        let q = queries[from + member * dim];
                        sum += q * q;
                    }
                }
                if steps[entry + step::FORGETS] == 0 {
                    sum += f32::reinterpret(arena[energies + channel]);
                }
                arena[energies + channel] = u32::reinterpret(sum);
            }
        }
    } else if steps[entry + step::CHOOSES] > 0 {
        let held = steps[entry + step::HELD] as usize;
        let every = steps[entry + step::EVERY] as usize;
        let total = (held + steps[entry + step::NEW] as usize).div_ceil(every);
        let new = new_keys(steps, entry, CUBE_POS_Y as usize, shape);
        let first = CUBE_POS_X as usize * CHUNK;
        let end = min(first + CHUNK, total);
        let pair = CUBE_POS_Z as usize * CUBE_COUNT_Y as usize + CUBE_POS_Y as usize;
        let to = (pair * chunks + CUBE_POS_X as usize) * dim;
        for channel in range_stepped(UNIT_POS as usize, dim, UNITS) {
            let mut sum = f32::new(0.0);
            for index in first..end {
                let x = whole(arena, fused, ring, new, held, index * every, channel, true, shape);
                if comptime!(l1) {
                    sum += x.abs();
                } else {
                    sum += x * x;
                }
            }
            sums[to + channel] = sum;
        }
    }
}

/// Writes what a sketch of the whole tokens of a step, those of the ring and then the new ones, says of their energies, a
/// share a row: one cube a row (x), head (y) and step (z). `sums` is `[step][head][row][D]`. Bit r of two words of `signs`,
/// `[step][head][most]`, is the sign of a token in row r; see [`sketch`](thinkey_core::channel::sketch).
#[cube(launch_unchecked)]
pub(crate) fn sketch_energies(
    arena: &Array<u32>,
    heads: &Array<u32>,
    steps: &Array<u32>,
    fused: &Array<f32>,
    signs: &Array<u32>,
    sums: &mut Array<f32>,
    most: u32,
    #[comptime] shape: Shape,
) {
    let dim = comptime!(shape.dim);
    let table = CUBE_POS_Y as usize * head::FIELDS;
    let entry = CUBE_POS_Z as usize * step::FIELDS;
    if steps[entry + step::CHOOSES] > 0 {
        let slot = steps[entry + step::SLOT] as usize;
        let held = steps[entry + step::HELD] as usize;
        let total = held + steps[entry + step::NEW] as usize;
        let ring = ring(heads, table, slot);
        let new = new_keys(steps, entry, CUBE_POS_Y as usize, shape);
        let pair = CUBE_POS_Z as usize * CUBE_COUNT_Y as usize + CUBE_POS_Y as usize;
        let own = pair * most as usize * 2 + CUBE_POS_X as usize / 32;
        let bit = CUBE_POS_X % 32;
        let to = (pair * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * dim;
        for channel in range_stepped(UNIT_POS as usize, dim, UNITS) {
            let mut line = f32::new(0.0);
            for token in 0..total {
                let x = whole(arena, fused, ring, new, held, token, channel, true, shape);
                line += select((signs[own + token * 2] >> bit) & 1 == 0, x, -x);
            }
            sums[to + channel] = line * line / f32::cast_from(CUBE_COUNT_X);
        }
    }
}

/// Whether a score goes by sums of absolute keys, and whether by queries.
pub(crate) fn by(score: Score) -> (bool, bool) {
    match score {
        Score::L1 => (true, false),
        Score::L2 | Score::Random { .. } => (false, false),
        // Residuals are there once a prompt is there to leave some.
        Score::Query | Score::Sample { .. } | Score::Sketch { .. } | Score::Residual => (false, true),
    }
}
