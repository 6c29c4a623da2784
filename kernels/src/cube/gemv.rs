//! Linear layers for a few rows: weights are read once, as they are stored, and multiplied in registers.
//!
//! A team of units makes two outputs for up to eight rows of the input: every unit takes a piece of eight weights of both
//! at a time, so that what it reads of the input serves twice. What comes before and after is in the same launch:
//! normalisation, whose factor of a row is a factor of its outputs; bias; the sum with what is there; and the product of up
//! and silu(gate), which are the two outputs of a team then.

use super::weights::{Packed, UNITS, column, unpack};
use cubecl::prelude::*;

/// Most rows of the input that a cube takes.
pub(crate) const ROWS: usize = 8;
/// Outputs of a team.
const OUTPUTS: usize = 2;

/// What becomes of the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    /// They are the output.
    Stored,
    /// They are added to it.
    Added,
    /// The first half of them is g, the second u; silu(g) · u is the output.
    Gated,
}

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    /// The matrix.
    pub(crate) packed: Packed,
    /// Rows of the input that a cube takes, 1 to [`ROWS`].
    pub(crate) rows: usize,
    /// Whether rows are normalised first.
    pub(crate) normed: bool,
    /// Whether there is a bias.
    pub(crate) biased: bool,
    /// What becomes of the products.
    pub(crate) outcome: Outcome,
    /// Width of planes, or 1 where that is not known.
    pub(crate) plane: usize,
}

impl Product {
    /// Units of a team.
    pub(crate) fn lanes(self) -> usize {
        if self.plane > 1 { self.plane } else { 32 }
    }

    /// Outputs that the teams of a cube write; gated ones are half as many.
    pub(crate) fn outputs(self) -> usize {
        let teams = UNITS / self.lanes();
        if self.outcome == Outcome::Gated { teams } else { teams * OUTPUTS }
    }
}

/// The sum of `x` over the units of a team, for each of them.
#[cube]
fn team_sum(x: f32, memory: &mut SharedMemory<f32>, #[comptime] product: Product) -> f32 {
    if comptime!(product.plane > 1) {
        plane_sum(x)
    } else {
        let unit = UNIT_POS as usize;
        let lanes = comptime!(product.lanes());
        memory[unit] = x;
        sync_cube();
        let first = unit / lanes * lanes;
        let mut sum = f32::new(0.0);
        for lane in 0..lanes {
            sum += memory[first + lane];
        }
        sync_cube();
        sum
    }
}

/// Products of rows of `x` with the `outputs` rows of a matrix: one cube some outputs (x) and some rows (y).
///
/// `x` has rows of as many numbers as the matrix has columns; `count` of them are taken, from `first` on. Row r gives row
/// `to + r` of `out`, whose rows are `width` apart, from column `at` on. `bias` is counted like these columns.
#[cube(launch_unchecked)]
pub(crate) fn gemv(
    words: &Array<u32>,
    x: &Array<f32>,
    norm: &Array<f32>,
    bias: &Array<f32>,
    out: &mut Array<f32>,
    first: u32,
    count: u32,
    outputs: u32,
    to: u32,
    width: u32,
    at: u32,
    eps: f32,
    #[comptime] product: Product,
) {
    let cols = comptime!(product.packed.cols);
    let rows = comptime!(product.rows);
    let lanes = comptime!(product.lanes());
    let unit = UNIT_POS as usize;
    let lane = unit % lanes;
    let team = CUBE_POS_X as usize * comptime!(UNITS / product.lanes()) + unit / lanes;
    let start = CUBE_POS_Y as usize * rows;
    let mut memory = SharedMemory::<f32>::new(comptime!(if product.plane > 1 { 1 } else { UNITS }));

    // Where the rows at hand begin; those that are none repeat the last one.
    let mut from = Array::<u32>::new(rows);
    #[unroll]
    for row in 0..rows {
        from[row] = u32::cast_from((first as usize + min(start + row, count as usize - 1)) * cols);
    }

    let mut factors = Array::<f32>::new(rows);
    if comptime!(product.normed) {
        let mut squares = SharedMemory::<f32>::new(comptime!(product.rows * UNITS));
        #[unroll]
        for row in 0..rows {
            let mut sum = f32::new(0.0);
            for column in range_stepped(unit, cols, UNITS) {
                let v = x[from[row] as usize + column];
                sum += v * v;
            }
            squares[comptime!(row * UNITS) + unit] = sum;
        }
        sync_cube();
        #[unroll]
        for row in 0..rows {
            let mut sum = f32::new(0.0);
            for other in range_stepped(lane, UNITS, lanes) {
                sum += squares[comptime!(row * UNITS) + other];
            }
            let sum = team_sum(sum, &mut memory, product);
            factors[row] = 1.0 / (sum / comptime!(product.packed.cols as f32).runtime() + eps).sqrt();
        }
    }

    // The two outputs of the team; one that is none repeats the last one.
    let outputs = outputs as usize;
    let mut ours = team * OUTPUTS;
    let mut other = ours + 1;
    if comptime!(product.outcome == Outcome::Gated) {
        ours = team;
        other = team + outputs / 2;
    }
    let row = comptime!(product.packed.row());
    let ours_at = min(ours, outputs - 1) * row;
    let other_at = min(other, outputs - 1) * row;

    let mut sums = Array::<f32>::new(comptime!(2 * product.rows));
    #[unroll]
    for index in 0..comptime!(2 * product.rows) {
        sums[index] = f32::new(0.0);
    }
    let mut weights = Array::<f32>::new(16usize);
    for piece in range_stepped(lane, comptime!(product.packed.pieces()), lanes) {
        unpack(words, ours_at, piece, &mut weights, 0usize, product.packed);
        unpack(words, other_at, piece, &mut weights, 8usize, product.packed);
        let begin = column(piece, product.packed);
        #[unroll]
        for k in 0..8usize {
            let mut column = begin + comptime!(if k < 4 { k } else { product.packed.gap() + k - 4 });
            if comptime!(product.packed.ragged()) {
                column = min(column, comptime!(product.packed.cols - 1).runtime());
            }
            let mut a = weights[k];
            let mut b = weights[comptime!(k + 8)];
            if comptime!(product.normed) {
                let factor = norm[column];
                a *= factor;
                b *= factor;
            }
            #[unroll]
            for row in 0..rows {
                let v = x[from[row] as usize + column];
                sums[row] += a * v;
                sums[comptime!(product.rows + row)] += b * v;
            }
        }
    }

    let at = at as usize;
    #[unroll]
    for row in 0..rows {
        let mut a = team_sum(sums[row], &mut memory, product);
        let mut b = team_sum(sums[comptime!(product.rows + row)], &mut memory, product);
        if comptime!(product.normed) {
            a *= factors[row];
            b *= factors[row];
        }
        if lane == comptime!(row % product.lanes()) && start + row < count as usize {
            let line = (to as usize + start + row) * width as usize + at;
            if comptime!(product.outcome == Outcome::Gated) {
                if ours < outputs / 2 {
                    out[line + ours] = a / (1.0 + (-a).exp()) * b;
                }
            } else {
                if ours < outputs {
                    if comptime!(product.biased) {
                        a += bias[at + ours];
                    }
                    if comptime!(product.outcome == Outcome::Added) {
                        a += out[line + ours];
                    }
                    out[line + ours] = a;
                }
                if other < outputs {
                    if comptime!(product.biased) {
                        b += bias[at + other];
                    }
                    if comptime!(product.outcome == Outcome::Added) {
                        b += out[line + other];
                    }
                    out[line + other] = b;
                }
            }
        }
    }
}
