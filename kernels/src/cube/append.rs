//! What stays whole: new sinks, and the ring, whose oldest tokens have left it.

use super::layout::{Shape, head, new_keys, ring, step, stored, whole};
use cubecl::prelude::*;
use thinkey_core::storage::FloatKind;

/// Units of a cube.
pub(crate) const UNITS: usize = 128;

/// Stores the new tokens of every step whole and moves those of the ring that stay to its front: one cube a head (x) and
/// step (y). After [`flush`](super::flush::flush), which reads the ring as it was.
#[cube(launch_unchecked)]
pub(crate) fn append(
    arena: &mut Array<u32>,
    heads: &Array<u32>,
    steps: &Array<u32>,
    fused: &Array<f32>,
    #[comptime] shape: Shape,
) {
    let dim = comptime!(shape.dim);
    let unit = UNIT_POS as usize;
    let table = CUBE_POS_X as usize * head::FIELDS;
    let entry = CUBE_POS_Y as usize * step::FIELDS;
    let slot = steps[entry + step::SLOT] as usize;
    let held = steps[entry + step::HELD] as usize;
    let thinned = steps[entry + step::THINNED] as usize;
    let sunk = steps[entry + step::SUNK] as usize;
    let sinks = steps[entry + step::SINKS] as usize;
    let after = steps[entry + step::RECENT] as usize;
    let ring = ring(heads, table, slot);
    let new_keys = new_keys(steps, entry, CUBE_POS_X as usize, shape);
    let new_values = new_keys + comptime!(shape.values_at - shape.keys_at);
    // Those that are no sinks.
    let rest = sunk * comptime!(shape.width);
    let key_kind = comptime!(shape.keys.ring());
    let value_kind = comptime!(shape.values.ring());

    if sunk > 0 {
        put_sinks(
            arena,
            fused,
            ring + heads[table + head::SINK_KEYS] as usize,
            new_keys,
            sinks,
            sunk,
            unit,
            shape,
            key_kind,
            true,
        );
        put_sinks(
            arena,
            fused,
            ring + heads[table + head::SINK_VALUES] as usize,
            new_values,
            sinks,
            sunk,
            unit,
            shape,
            value_kind,
            false,
        );
    }

    // Lanes before that stay as they are. A unit moves all lanes of a channel, from the front on, so it overwrites what it
    // has read.
    let first = select(thinned > 0, 0, held);
    let lanes = comptime!(4 / key_kind.bytes());
    for channel in range_stepped(unit, dim, UNITS) {
        for word in first / lanes..after.div_ceil(lanes) {
            let at = ring + channel * comptime!(shape.stride * key_kind.bytes() / 4) + word;
            let mut content = 0u32.runtime();
            #[unroll]
            for part in 0..lanes {
                let token = thinned + word * lanes + part;
                let mut x = f32::new(0.0);
                if token < thinned + after {
                    x = whole(arena, fused, ring, new_keys + rest, held, token, channel, true, shape);
                }
                content |= stored(x, key_kind) << comptime!(16 * part as u32);
            }
            arena[at] = content;
        }
    }
    let values = ring + heads[table + head::RING_VALUES] as usize;
    let channels = comptime!(4 / value_kind.bytes());
    for pair in range_stepped(unit, comptime!(shape.dim * value_kind.bytes() / 4), UNITS) {
        for lane in first..after {
            let token = thinned + lane;
            let mut content = 0u32.runtime();
            #[unroll]
            for part in 0..channels {
                let channel = pair * channels + part;
                let x = whole(arena, fused, values, new_values + rest, held, token, channel, false, shape);
                content |= stored(x, value_kind) << comptime!(16 * part as u32);
            }
            arena[values + lane * comptime!(shape.dim * value_kind.bytes() / 4) + pair] = content;
        }
    }
}

/// Stores sinks `sinks..sinks + sunk`, keys (channel-major) or values: a unit is a word, which may belong to two channels.
#[cube]
fn put_sinks(
    arena: &mut Array<u32>,
    fused: &Array<f32>,
    to: usize,
    new: usize,
    sinks: usize,
    sunk: usize,
    unit: usize,
    #[comptime] shape: Shape,
    #[comptime] kind: FloatKind,
    #[comptime] keys: bool,
) {
    let most = comptime!(shape.sinks);
    let dim = comptime!(shape.dim);
    let a_word = comptime!(4 / kind.bytes());
    for word in range_stepped(unit, comptime!((shape.sinks * shape.dim).div_ceil(4 / kind.bytes())), UNITS) {
        let mut content = arena[to + word];
        #[unroll]
        for part in 0..a_word {
            let index = word * a_word + part;
            let mut token = index / dim;
            let mut channel = index % dim;
            if comptime!(keys) {
                token = index % most;
                channel = index / most;
            }
            if channel < dim && token >= sinks && token < sinks + sunk {
                let x = stored(fused[new + (token - sinks) * comptime!(shape.width) + channel], kind);
                if comptime!(a_word == 1) {
                    content = x;
                } else {
                    content = (content & comptime!(if part == 0 { 0xffff_0000u32 } else { 0x0000_ffffu32 }))
                        | (x << comptime!(16 * part as u32));
                }
            }
        }
        arena[to + word] = content;
    }
}
