//! How queries are corrected for the channels that are not kept: the solution of core's
//! [`Correction`](thinkey_core::channel::compensate::Correction), R = C_SS⁻¹ C_S, by Cholesky's decomposition.
//!
//! Core sums in f64, which devices need not have: here sums are pairs of f32, the second of which is what the first has lost
//! (Ogita, Rump & Oishi, *Accurate sum and dot product*, 2005).

use super::{
    layout::{head, stored},
    residual::{Told, covariance, mean_variance},
};
use cubecl::prelude::*;
use thinkey_core::storage::FloatKind;

/// Units of a cube.
pub(crate) const UNITS: usize = 256;

/// Takes a·b off `sum`, of which `lost` is what is too small for it; returns both.
#[cube]
fn less(sum: f32, lost: f32, a: f32, b: f32) -> (f32, f32) {
    let x = -(a * b);
    let below = -fma(a, b, x);
    let total = sum + x;
    let part = total - sum;
    (total, lost + ((sum - (total - part)) + (x - part)) + below)
}

/// Solves for the corrections of the heads of a layer, in the slot whose channels are listed from number `own` of
/// `channels` on, `[head][D]`: one cube a head. `scratch` is `[head][3][D][D]`.
#[cube(launch_unchecked)]
pub(crate) fn solve(
    numbers: &Array<f32>,
    heads: &Array<u32>,
    channels: &Array<u32>,
    scratch: &mut Array<f32>,
    arena: &mut Array<u32>,
    own: u32,
    slot: u32,
    #[comptime] told: Told,
    #[comptime] kind: FloatKind,
) {
    let dim = comptime!(told.dim);
    let unit = UNIT_POS as usize;
    let table = CUBE_POS_X as usize * head::FIELDS;
    let kept = heads[table + head::KEPT] as usize;
    let at = CUBE_POS_X as usize * comptime!(told.len());
    let list = own as usize + CUBE_POS_X as usize * dim;
    // L of C_SS = L Lᵀ, column after column, then the solutions, side by side.
    let factor = CUBE_POS_X as usize * comptime!(told.scratch());
    let solved = factor + comptime!(told.dim * told.dim);
    let variance = mean_variance(numbers, at, dim);
    // With the ridge in it, no eigenvalue of C is below the ridge: what is, is rounding.
    let floor = variance * 0.5e-5f32;

    for column in 0..kept {
        let other = channels[list + column] as usize;
        for row in range_stepped(column + unit, kept, UNITS) {
            let channel = channels[list + row] as usize;
            let mut sum = covariance(numbers, at, channel, other, variance, dim);
            let mut lost = f32::new(0.0);
            for before in 0..column {
                let line = factor + before * dim;
                let (a, b) = less(sum, lost, scratch[line + row], scratch[line + column]);
                sum = a;
                lost = b;
            }
            scratch[factor + column * dim + row] = sum + lost;
        }
        sync_storage();
        sync_cube();
        let square = scratch[factor + column * comptime!(told.dim + 1)];
        // NaN stays what it is.
        let pivot = select(square < floor, floor, square).sqrt();
        sync_storage();
        sync_cube();
        for row in range_stepped(column + unit, kept, UNITS) {
            let at = factor + column * dim + row;
            scratch[at] = select(row == column, pivot, scratch[at] / pivot);
        }
        sync_storage();
        sync_cube();
    }

    let count = dim - kept;
    for lost_channel in range_stepped(unit, count, UNITS) {
        let channel = channels[list + kept + lost_channel] as usize;
        let own = solved + lost_channel;
        for row in 0..kept {
            let mut sum = covariance(numbers, at, channels[list + row] as usize, channel, variance, dim);
            let mut lost = f32::new(0.0);
            for before in 0..row {
                let (a, b) = less(sum, lost, scratch[factor + before * dim + row], scratch[own + before * count]);
                sum = a;
                lost = b;
            }
            scratch[own + row * count] = (sum + lost) / scratch[factor + row * comptime!(told.dim + 1)];
        }
        let mut bias = numbers[at + channel];
        let mut bias_lost = f32::new(0.0);
        for step in 0..kept {
            let row = kept - 1 - step;
            let mut sum = scratch[own + row * count];
            let mut lost = f32::new(0.0);
            for after in row + 1..kept {
                let (a, b) = less(sum, lost, scratch[factor + row * dim + after], scratch[own + after * count]);
                sum = a;
                lost = b;
            }
            let x = (sum + lost) / scratch[factor + row * comptime!(told.dim + 1)];
            scratch[own + row * count] = x;
            let (a, b) = less(bias, bias_lost, numbers[at + channels[list + row] as usize], x);
            bias = a;
            bias_lost = b;
        }
        scratch[own + kept * count] = bias + bias_lost;
    }
    sync_storage();
    sync_cube();

    let columns = heads[table + head::SLOT] as usize
        + slot as usize * heads[table + head::SLOT_WORDS] as usize
        + heads[table + head::CORRECTION] as usize;
    let a_word = comptime!(4 / kind.bytes());
    for word in range_stepped(unit, (count * (kept + 1)).div_ceil(a_word), UNITS) {
        let mut content = 0u32.runtime();
        #[unroll]
        for part in 0..a_word {
            let index = min(word * a_word + part, count * (kept + 1) - 1);
            let x = scratch[solved + index % (kept + 1) * count + index / (kept + 1)];
            content |= stored(x, kind) << comptime!(16 * part as u32);
        }
        arena[columns + word] = content;
    }
}
