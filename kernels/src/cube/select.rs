//! The T best channels of every head, by counting: a channel is kept where fewer than T are better.

use super::{
    layout::{Shape, head, no_number, ring, step},
    score::UNITS,
};
use cubecl::prelude::*;

/// Scores channels by the energies of queries and keys and lists the T best, then the others, ascending: one cube a head
/// (x) and step (y). Of equal scores the lower channel is better. `sums` are of
/// [`energies`](super::score::energies), `chunks` each; `channels` is `[slot][head][D]`.
///
/// A score that is NaN is better than all: the channel stays, and what is no number stays visible.
#[cube(launch_unchecked)]
pub(crate) fn select_channels(
    arena: &Array<u32>,
    heads: &Array<u32>,
    steps: &Array<u32>,
    sums: &Array<f32>,
    channels: &mut Array<u32>,
    chunks: u32,
    #[comptime] shape: Shape,
    #[comptime] by_queries: bool,
) {
    let dim = comptime!(shape.dim);
    let unit = UNIT_POS as usize;
    let table = CUBE_POS_X as usize * head::FIELDS;
    let entry = CUBE_POS_Y as usize * step::FIELDS;
    if steps[entry + step::CHOOSES] > 0 {
        let slot = steps[entry + step::SLOT] as usize;
        let kept = heads[table + head::KEPT] as usize;
        let energies = ring(heads, table, slot) + heads[table + head::ENERGY] as usize;
        let total = (steps[entry + step::HELD] + steps[entry + step::NEW]).div_ceil(steps[entry + step::EVERY]);
        let tokens = f32::cast_from(total);
        let queries = f32::cast_from(steps[entry + step::SCORED] * comptime!(shape.group as u32));
        let from = (CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * chunks as usize * dim;
        let mut scores = SharedMemory::<f32>::new(dim);
        let mut stays = SharedMemory::<u32>::new(dim);
        for channel in range_stepped(unit, dim, UNITS) {
            let mut sum = f32::new(0.0);
            for chunk in 0..chunks as usize {
                sum += sums[from + chunk * dim + channel];
            }
            let mut score = sum / tokens;
            if comptime!(by_queries) {
                score *= f32::reinterpret(arena[energies + channel]) / queries;
            }
            // Energies are not below 0, so this is above all others.
            scores[channel] = select(no_number(score), f32::new(3.4e38), score);
        }
        sync_cube();
        for channel in range_stepped(unit, dim, UNITS) {
            let score = scores[channel];
            let mut better = 0usize.runtime();
            for other in 0..dim {
                if scores[other] > score || (scores[other] == score && other < channel) {
                    better += 1;
                }
            }
            stays[channel] = u32::cast_from(better < kept);
        }
        sync_cube();
        let to = (slot * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * dim;
        list(&stays, channels, to, kept, unit, UNITS, dim);
    }
}

/// Lists the `kept` channels that stay and then the others, ascending, from number `to` of `channels` on.
#[cube]
pub(crate) fn list(
    stays: &SharedMemory<u32>,
    channels: &mut Array<u32>,
    to: usize,
    kept: usize,
    unit: usize,
    #[comptime] units: usize,
    #[comptime] dim: usize,
) {
    for channel in range_stepped(unit, dim, units) {
        let mut lower = 0usize.runtime();
        for other in 0..channel {
            lower += stays[other] as usize;
        }
        let place = select(stays[channel] == 1, lower, kept + channel - lower);
        channels[to + place] = channel as u32;
    }
}
