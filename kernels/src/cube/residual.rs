//! Channels chosen for what regression on them leaves, as core's [`residual`](thinkey_core::channel::residual).

use super::{
    layout::{head, no_number},
    select::list,
};
use cubecl::prelude::*;

/// Units of a cube.
pub(crate) const UNITS: usize = 256;
/// Parts of the channels that are looked through side by side.
const PARTS: usize = 16;
/// What the moment of two different channels of the queries counts for, as in core.
const BETWEEN: f32 = 0.5;

/// What a prompt tells of the keys and queries of a head: `[1 + D + rows][D]`: the weighted mean of the keys, their weighted
/// products Σ w (k−m)(k−m)ᵀ, and queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Told {
    /// Channels of a head, D.
    pub(crate) dim: usize,
    /// Query rows.
    pub(crate) rows: usize,
}

impl Told {
    /// Numbers of a head.
    pub(crate) fn len(self) -> usize {
        (1 + self.dim + self.rows) * self.dim
    }

    /// Numbers of scratch memory of a head: three matrices.
    pub(crate) fn scratch(self) -> usize {
        3 * self.dim * self.dim
    }
}

/// The mean variance of the channels of the head whose numbers begin at `told`.
#[cube]
pub(crate) fn mean_variance(numbers: &Array<f32>, told: usize, #[comptime] dim: usize) -> f32 {
    let mut trace = f32::new(0.0);
    for channel in 0..dim {
        trace += numbers[told + dim + channel * comptime!(dim + 1)];
    }
    trace / comptime!(dim as f32).runtime()
}

/// C of the head whose numbers begin at `told`, its upper triangle and a ridge of 1e-5 of the mean variance.
#[cube]
pub(crate) fn covariance(
    numbers: &Array<f32>,
    told: usize,
    a: usize,
    b: usize,
    variance: f32,
    #[comptime] dim: usize,
) -> f32 {
    let x = numbers[told + dim + min(a, b) * dim + max(a, b)];
    let ridge = max(variance * 1e-5f32, f32::new(f32::MIN_POSITIVE));
    x + select(a == b, ridge, f32::new(0.0))
}

/// Lists the T channels of every head that leave least when the others are guessed from them, then the others: one cube a
/// head. `channels` is that of a slot, `[head][D]`, from number `own` on; `scratch` is `[head][3][D][D]`.
#[cube(launch_unchecked)]
pub(crate) fn choose(
    numbers: &Array<f32>,
    heads: &Array<u32>,
    scratch: &mut Array<f32>,
    channels: &mut Array<u32>,
    own: u32,
    #[comptime] told: Told,
) {
    let dim = comptime!(told.dim);
    let square = comptime!(told.dim * told.dim);
    let unit = UNIT_POS as usize;
    let kept = heads[CUBE_POS_X as usize * head::FIELDS + head::KEPT] as usize;
    let at = CUBE_POS_X as usize * comptime!(told.len());
    let queries = at + comptime!((1 + told.dim) * told.dim);
    // C′; C′Q, turned over, so that units read side by side; Q.
    let left = CUBE_POS_X as usize * comptime!(told.scratch());
    let product = left + square;
    let moment = product + square;
    let variance = mean_variance(numbers, at, dim);
    for index in range_stepped(unit, square, UNITS) {
        let a = index / dim;
        let b = index % dim;
        let mut sum = f32::new(0.0);
        for row in 0..comptime!(told.rows) {
            sum += numbers[queries + row * dim + a] * numbers[queries + row * dim + b];
        }
        scratch[moment + index] = select(a == b, sum, sum * BETWEEN);
        scratch[left + index] = covariance(numbers, at, a, b, variance, dim);
    }
    sync_storage();
    sync_cube();
    for index in range_stepped(unit, square, UNITS) {
        let column = index / dim;
        let line = index % dim;
        let mut sum = f32::new(0.0);
        for other in 0..dim {
            sum += scratch[left + other * dim + line] * scratch[moment + other * dim + column];
        }
        scratch[product + index] = sum;
    }
    let mut stays = SharedMemory::<u32>::new(dim);
    let mut floors = SharedMemory::<f32>::new(dim);
    let mut gains = SharedMemory::<f32>::new(dim);
    let mut line = SharedMemory::<f32>::new(dim);
    let mut other = SharedMemory::<f32>::new(dim);
    let mut bests = SharedMemory::<u32>::new(PARTS);
    for channel in range_stepped(unit, dim, UNITS) {
        stays[channel] = 0;
        // What is left of a channel's variance below this is rounding.
        floors[channel] = scratch[left + channel * comptime!(told.dim + 1)] * 1e-6f32;
    }
    sync_storage();
    sync_cube();

    for _ in 0..kept {
        for channel in range_stepped(unit, dim, UNITS) {
            let variance = scratch[left + channel * comptime!(told.dim + 1)];
            let mut sum = f32::new(0.0);
            for other in 0..dim {
                sum += scratch[left + other * dim + channel] * scratch[product + other * dim + channel];
            }
            let takes = select(variance > floors[channel], sum / variance, f32::new(0.0));
            // What is no number is chosen first: it stays visible.
            gains[channel] = select(no_number(sum) || no_number(variance), f32::new(3.4e38), takes);
        }
        sync_cube();
        let part = comptime!(told.dim.div_ceil(PARTS));
        if unit < PARTS {
            let mut best = comptime!(told.dim as u32).runtime();
            let mut most = f32::new(0.0);
            for channel in unit * part..min(unit * part + part, dim) {
                if stays[channel] == 0 && (best == comptime!(told.dim as u32) || gains[channel] > most) {
                    best = u32::cast_from(channel);
                    most = gains[channel];
                }
            }
            bests[unit] = best;
        }
        sync_cube();
        let mut best = comptime!(told.dim as u32).runtime();
        for part in 0..PARTS {
            let found = bests[part];
            // Both sides of a condition are looked at.
            let last = comptime!(told.dim as u32 - 1);
            let more = gains[min(found, last) as usize] > gains[min(best, last) as usize];
            if found <= last && (best > last || more) {
                best = found;
            }
        }
        // There is one: no more are kept than there are.
        let best = best as usize;
        for channel in range_stepped(unit, dim, UNITS) {
            line[channel] = scratch[left + best * dim + channel];
            other[channel] = scratch[product + channel * dim + best];
        }
        if unit == 0 {
            stays[best] = 1;
        }
        sync_cube();
        let variance = line[best];
        if variance > floors[best] {
            for index in range_stepped(unit, square, UNITS) {
                let a = index / dim;
                let b = index % dim;
                scratch[left + index] -= line[a] / variance * line[b];
                scratch[product + index] -= line[b] / variance * other[a];
            }
        }
        sync_storage();
        sync_cube();
    }
    list(&stays, channels, own as usize + CUBE_POS_X as usize * dim, kept, unit, UNITS, dim);
}
