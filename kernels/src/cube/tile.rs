//! What attention of many lines has in common: a cube takes 64 lines of one head, a line being a query head of a row, and goes
//! through tiles of 64 tokens.
//!
//! A unit makes four lines by four tokens of the scores, and of the output four lines by every sixteenth channel, in registers;
//! queries, keys and values go through shared memory in pieces, below 32 KiB whatever D is.

use super::attention::LOWEST;
use cubecl::prelude::*;

/// Units of a cube: [`SIDE`] by [`SIDE`].
pub(crate) const UNITS: usize = SIDE * SIDE;
/// Units side by side.
pub(crate) const SIDE: usize = 16;
/// Lines, and tokens, of a unit.
pub(crate) const PER: usize = 4;
/// Lines, and tokens, of a tile.
pub(crate) const TILE: usize = SIDE * PER;
/// Channels of queries and keys that are there at a time: queries, and behind them keys, `[channel][PITCH]` each.
pub(crate) const PIECE: usize = 16;
/// From a channel of a piece, or a token's weights, to the next: not a multiple of the banks of shared memory.
pub(crate) const PITCH: usize = TILE + 4;
/// Numbers that queries and keys, or values, go through.
pub(crate) const STAGE: usize = 2 * PIECE * PITCH;

/// Tokens whose values are there at a time, `[token][D]`: a power of two, so that a tile is whole pieces.
pub(crate) fn values_at_once(dim: usize) -> usize {
    1 << (STAGE / dim).clamp(1, TILE).ilog2()
}

/// Channels of a unit.
pub(crate) fn channels(dim: usize) -> usize {
    dim.div_ceil(SIDE)
}

/// Adds the products of a piece of queries and keys, which `stage` has, to a unit's `scores`, `[line][token]`.
#[cube]
pub(crate) fn multiply(stage: &SharedMemory<f32>, scores: &mut Array<f32>, own_line: usize, own_key: usize) {
    for channel in 0..PIECE {
        let at = channel * PITCH;
        let mut k = Array::<f32>::new(PER);
        #[unroll]
        for j in 0..PER {
            k[j] = stage[comptime!(PIECE * PITCH + j * SIDE) + at + own_key];
        }
        #[unroll]
        for i in 0..PER {
            let q = stage[at + own_line + i];
            #[unroll]
            for j in 0..PER {
                scores[comptime!(i * PER + j)] += q * k[j];
            }
        }
    }
}

/// One step of the online softmax: makes the weights of a tile of `scores`, of which those that are not seen are
/// [`LOWEST`], `[token][PITCH]`. `mixed` has `numbers` for each part and line, in parts one behind the other.
///
/// All units are to be done with `stage`, and may use it and read `weights` after it.
#[cube]
pub(crate) fn soften(
    scores: &Array<f32>,
    stage: &mut SharedMemory<f32>,
    weights: &mut SharedMemory<f32>,
    top: &mut Array<f32>,
    sum: &mut Array<f32>,
    mixed: &mut Array<f32>,
    own_line: usize,
    own_key: usize,
    #[comptime] parts: usize,
    #[comptime] numbers: usize,
) {
    #[unroll]
    for i in 0..PER {
        let mut most = f32::new(LOWEST);
        #[unroll]
        for j in 0..PER {
            most = max(most, scores[comptime!(i * PER + j)]);
        }
        stage[(own_line + i) * SIDE + own_key] = most;
    }
    sync_cube();
    #[unroll]
    for i in 0..PER {
        let mut most = top[i];
        for other in 0..SIDE {
            most = max(most, stage[(own_line + i) * SIDE + other]);
        }
        let shrink = (top[i] - most).exp();
        top[i] = most;
        sum[i] *= shrink;
        #[unroll]
        for part in 0..parts {
            #[unroll]
            for c in 0..numbers {
                mixed[comptime!((part * PER + i) * numbers + c)] *= shrink;
            }
        }
        #[unroll]
        for j in 0..PER {
            let score = scores[comptime!(i * PER + j)];
            let weight = select(score <= LOWEST, f32::new(0.0), (score - most).exp());
            sum[i] += weight;
            weights[(own_key + comptime!(j * SIDE)) * PITCH + own_line + i] = weight;
        }
    }
    sync_cube();
}

/// Adds a piece of values, which `stage` has, of the tokens of the tile from `first` on, weighted, to part `part` of a unit's
/// `mixed`.
#[cube]
pub(crate) fn mix(
    stage: &SharedMemory<f32>,
    weights: &SharedMemory<f32>,
    mixed: &mut Array<f32>,
    first: usize,
    own_line: usize,
    own_key: usize,
    #[comptime] part: usize,
    #[comptime] dim: usize,
) {
    for key in 0..comptime!(values_at_once(dim)) {
        let at = (first + key) * PITCH + own_line;
        let mut by = Array::<f32>::new(PER);
        #[unroll]
        for i in 0..PER {
            by[i] = weights[at + i];
        }
        #[unroll]
        for c in 0..comptime!(channels(dim)) {
            let mut channel = own_key + comptime!(c * SIDE);
            if comptime!(!dim.is_multiple_of(SIDE)) {
                channel = min(channel, comptime!(dim - 1).runtime());
            }
            let v = stage[key * dim + channel];
            #[unroll]
            for i in 0..PER {
                mixed[comptime!((part * PER + i) * channels(dim) + c)] += by[i] * v;
            }
        }
    }
}

/// Makes `sum` the sums of whole lines, of those of the units that share them. Uses `stage`, with which all units are to be done.
#[cube]
pub(crate) fn total(stage: &mut SharedMemory<f32>, sum: &mut Array<f32>, own_line: usize, own_key: usize) {
    #[unroll]
    for i in 0..PER {
        stage[(own_line + i) * SIDE + own_key] = sum[i];
    }
    sync_cube();
    #[unroll]
    for i in 0..PER {
        let mut all = f32::new(0.0);
        for other in 0..SIDE {
            all += stage[(own_line + i) * SIDE + other];
        }
        sum[i] = all;
    }
}
