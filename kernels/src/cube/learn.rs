//! How queries are corrected for the channels that are not kept, see [`thinkey_core::channel::compensate`].
//!
//! By [`means`], where too few tokens are there to tell more. Else [`solve`](super::solve::solve), after
//! [`residual`](super::residual::choose) where that chooses: [`whole_keys`] brings what the cache holds into the form that
//! matrix products take, whose results these read.

use super::{
    layout::{Shape, head, new_keys, number, ring, step, stored, whole},
    score::UNITS,
};
use cubecl::prelude::*;

/// Has every channel that is not kept be guessed at the mean of the step's whole keys that are no sinks: one cube a head (x)
/// and step (y). After [`select`](super::select::select_channels).
#[cube(launch_unchecked)]
pub(crate) fn means(
    arena: &mut Array<u32>,
    heads: &Array<u32>,
    steps: &Array<u32>,
    channels: &Array<u32>,
    fused: &Array<f32>,
    #[comptime] shape: Shape,
) {
    let dim = comptime!(shape.dim);
    let unit = UNIT_POS as usize;
    let table = CUBE_POS_X as usize * head::FIELDS;
    let entry = CUBE_POS_Y as usize * step::FIELDS;
    if steps[entry + step::CHOOSES] > 0 {
        let slot = steps[entry + step::SLOT] as usize;
        let kept = heads[table + head::KEPT] as usize;
        let held = steps[entry + step::HELD] as usize;
        let sunk = steps[entry + step::SUNK] as usize;
        let new = steps[entry + step::NEW] as usize;
        let ring = ring(heads, table, slot);
        let columns = ring + heads[table + head::CORRECTION] as usize;
        let own = (slot * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * dim + kept;
        // Those of the first token that is no sink.
        let new_keys = new_keys(steps, entry, CUBE_POS_X as usize, shape) + sunk * comptime!(shape.width);
        let tokens = held + new - sunk;
        let count = f32::cast_from(u32::cast_from(max(tokens, 1)));
        let mut mean = SharedMemory::<f32>::new(dim);
        for lost in range_stepped(unit, dim - kept, UNITS) {
            let channel = channels[own + lost] as usize;
            let mut sum = f32::new(0.0);
            for token in 0..tokens {
                sum += whole(arena, fused, ring, new_keys, held, token, channel, true, shape);
            }
            mean[lost] = sum / count;
        }
        sync_cube();
        let kind = comptime!(shape.correction());
        let numbers = comptime!(4 / shape.correction().bytes());
        for word in range_stepped(unit, ((dim - kept) * (kept + 1)).div_ceil(numbers), UNITS) {
            let mut content = 0u32.runtime();
            #[unroll]
            for part in 0..numbers {
                let index = word * numbers + part;
                let lost = min(index / (kept + 1), dim - kept - 1);
                let x = select(index % (kept + 1) == kept, mean[lost], f32::new(0.0));
                content |= stored(x, kind) << comptime!(16 * part as u32);
            }
            arena[columns + word] = content;
        }
    }
}

/// Whole keys of a slot, `sinks` and then `recent` of the ring, `[head][tokens][D]`: one cube a head.
#[cube(launch_unchecked)]
pub(crate) fn whole_keys(
    arena: &Array<u32>,
    heads: &Array<u32>,
    out: &mut Array<f32>,
    slot: u32,
    sinks: u32,
    recent: u32,
    #[comptime] shape: Shape,
) {
    let dim = comptime!(shape.dim);
    let table = CUBE_POS_X as usize * head::FIELDS;
    let kind = comptime!(shape.keys.ring());
    let ring = ring(heads, table, slot as usize);
    let sink_keys = ring + heads[table + head::SINK_KEYS] as usize;
    let sinks = sinks as usize;
    let tokens = sinks + recent as usize;
    let to = CUBE_POS_X as usize * tokens * dim;
    for index in range_stepped(UNIT_POS as usize, tokens * dim, UNITS) {
        let token = index / dim;
        let channel = index % dim;
        out[to + index] = if token < sinks {
            number(arena, sink_keys, channel * comptime!(shape.sinks) + token, kind)
        } else {
            number(arena, ring, channel * comptime!(shape.stride) + token - sinks, kind)
        };
    }
}
