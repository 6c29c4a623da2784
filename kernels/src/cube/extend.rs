//! Attention of a prompt's rows to what the cache held before it: tiled, so that what is stored is read and dequantised once for
//! 64 lines and not for each row.
//!
//! A cube takes 64 lines of one cached head, as in [`prefill`](super::prefill), and a share of the tokens: sinks, thin prefix
//! and ring, in tiles of 64 that belong to one of these. Keys and values go through shared memory in pieces as the numbers that
//! their codes stand for, and meet queries that are whole or, where the tile is of the prefix,
//! [gathered and corrected](super::attention::thin_queries). What a share gives is [merged](super::merge), and `prefill` goes
//! on from there.
//!
//! All rows are of one sequence; of the tokens that are no sinks a later row sees the same or fewer.

use super::{
    attention::LOWEST,
    layout::{BLOCK, Shape, bits, code, codes, head, number, quad_words, ring, row},
    tile::{PER, PIECE, PITCH, SIDE, STAGE, TILE, UNITS, channels, mix, multiply, soften, total, values_at_once},
    trellis::{nibbles, number_of},
};
use cubecl::prelude::*;
use thinkey_core::{
    quant::trellis::MIDDLE,
    storage::{FloatKind, StorageKind},
};

/// Writes 16 channels of the thin keys of a tile to `stage`, from `piece` on, zeros where there are no more than `kept`. The
/// tile begins at block `first` of `blocks`.
#[cube]
fn stage_thin_keys(
    arena: &Array<u32>,
    pages: &Array<u32>,
    keys: usize,
    key_block: usize,
    page_table: usize,
    first: usize,
    blocks: usize,
    piece: usize,
    kept: usize,
    stage: &mut SharedMemory<f32>,
    #[comptime] shape: Shape,
) {
    let unit = UNIT_POS as usize;
    let kind = comptime!(bits(shape.keys));
    let token = unit % TILE;
    let page = pages[page_table + min(first + token / BLOCK, blocks - 1)] as usize;
    let block = keys + page * key_block;
    let lane = token % BLOCK;
    let to = comptime!(PIECE * PITCH) + token;
    if comptime!(kind == 0) {
        for own in range_stepped(unit / TILE, PIECE, comptime!(UNITS / TILE)) {
            let mut x = f32::new(0.0);
            if piece + own < kept {
                x = number(arena, block, (piece + own) * BLOCK + lane, comptime!(shape.keys.ring()));
            }
            stage[to + own * PITCH] = x;
        }
    } else {
        let quads = kept.div_ceil(4);
        let affine = block + quads * comptime!(quad_words(shape.keys));
        for own in range_stepped(unit / TILE, comptime!(PIECE / 4), comptime!(UNITS / TILE)) {
            let quad = piece / 4 + own;
            let mut word = 0u32.runtime();
            if quad < quads {
                word = codes(arena, block + quad * comptime!(quad_words(shape.keys)), lane, kind);
            }
            #[unroll]
            for place in 0..4u32 {
                let channel = quad * 4 + place as usize;
                let mut x = f32::new(0.0);
                if channel < kept {
                    let scale = number(arena, affine, channel, comptime!(FloatKind::F16));
                    let least = number(arena, affine, kept + channel, comptime!(FloatKind::F16));
                    x = code(word, place) * scale + least;
                }
                stage[to + (own * 4 + place as usize) * PITCH] = x;
            }
        }
    }
}

/// Writes the values of some tokens of a tile of the prefix to `stage`, `[token][D]`: turned ones as they are. They are those
/// from `first` on, counted from the first block, of which there are `blocks`.
#[cube]
fn stage_thin_values(
    arena: &Array<u32>,
    pages: &Array<u32>,
    values: usize,
    value_block: usize,
    page_table: usize,
    first: usize,
    blocks: usize,
    stage: &mut SharedMemory<f32>,
    #[comptime] shape: Shape,
) {
    let dim = comptime!(shape.dim);
    let kind = comptime!(bits(shape.values));
    let unit = UNIT_POS as usize;
    if comptime!(kind == 0) {
        for index in range_stepped(unit, comptime!(values_at_once(shape.dim) * shape.dim), UNITS) {
            let token = first + index / dim;
            let page = pages[page_table + min(token / BLOCK, blocks - 1)] as usize;
            let at = token % BLOCK * dim + index % dim;
            stage[index] = number(arena, values + page * value_block, at, comptime!(shape.values.ring()));
        }
    } else {
        let groups = comptime!(BLOCK * shape.dim.div_ceil(BLOCK));
        let coded = comptime!(shape.values == StorageKind::Trellis2);
        let middle = comptime!(if coded { MIDDLE } else { ((1u32 << bits(shape.values)) - 1) as f32 / 2.0 }).runtime();
        // A unit has a channel of four tokens.
        for index in range_stepped(unit, comptime!(values_at_once(shape.dim) / 4 * shape.dim), UNITS) {
            let channel = index % dim;
            let token = first + index / dim * 4;
            let lane = token % BLOCK;
            let page = pages[page_table + min(token / BLOCK, blocks - 1)] as usize;
            let block = values + page * value_block;
            let affine = block + comptime!(BLOCK * shape.dim.div_ceil(BLOCK) / 4 * quad_words(shape.values));
            let quad = channel / BLOCK * comptime!(BLOCK / 4) + lane / 4;
            let quad = block + quad * comptime!(quad_words(shape.values));
            let word = if comptime!(coded) {
                nibbles(arena, quad, channel % BLOCK)
            } else {
                codes(arena, quad, channel % BLOCK, kind)
            };
            #[unroll]
            for place in 0..4u32 {
                let lane = lane + place as usize;
                let x = if comptime!(shape.values.turns()) {
                    let x = if comptime!(coded) { number_of(word, place) } else { code(word, place) };
                    (x - middle) * number(arena, affine, lane, comptime!(FloatKind::F16))
                } else {
                    let group = channel / BLOCK * BLOCK + lane;
                    let scale = number(arena, affine, group, comptime!(FloatKind::F16));
                    code(word, place) * scale + number(arena, affine, groups + group, comptime!(FloatKind::F16))
                };
                stage[(index / dim * 4 + place as usize) * dim + channel] = x;
            }
        }
    }
}

/// What a share of the tokens that the rows of a prompt see of the cache gives: one cube a share (x), head (y) and 64 lines (z).
///
/// `rows` has an entry for each of `count` rows, `queries` and `partials` are as in [`attend`](super::attention::attend).
#[cube(launch_unchecked)]
pub(crate) fn extend(
    arena: &Array<u32>,
    heads: &Array<u32>,
    rows: &Array<u32>,
    pages: &Array<u32>,
    queries: &Array<f32>,
    partials: &mut Array<f32>,
    count: u32,
    #[comptime] shape: Shape,
) {
    let dim = comptime!(shape.dim);
    let group = comptime!(shape.group);
    let own_channels = comptime!(channels(shape.dim));
    let parts = comptime!(if shape.values.turns() { 2usize } else { 1usize });
    let unit = UNIT_POS as usize;
    let own_key = unit % SIDE;
    let own_line = unit / SIDE * PER;
    let last_line = count as usize * group - 1;
    let first_line = CUBE_POS_Z as usize * TILE;
    let at = CUBE_POS_Y as usize;
    let cached_heads = CUBE_COUNT_Y as usize;

    let table = at * head::FIELDS;
    let kept = heads[table + head::KEPT] as usize;
    let keys = heads[table + head::KEYS] as usize;
    let key_block = heads[table + head::KEY_BLOCK] as usize;
    let values = heads[table + head::VALUES] as usize;
    let value_block = heads[table + head::VALUE_BLOCK] as usize;
    // The first of the rows sees most: what it does not see, none does.
    let entry = first_line / group * row::FIELDS;
    let sinks = rows[entry + row::SINKS] as usize;
    let blocks = rows[entry + row::BLOCKS] as usize;
    let recent = rows[entry + row::RECENT] as usize;
    let page_table = rows[entry + row::PAGES] as usize;
    let whole = ring(heads, table, rows[entry + row::SLOT] as usize);

    // The list of tiles: those of sinks, of the prefix and of the ring, from the first that is seen on.
    let before = sinks.div_ceil(TILE);
    let skipped = rows[entry + row::UNSEEN] as usize / TILE;
    let thin = (blocks * BLOCK).div_ceil(TILE) - skipped;
    let first_recent = rows[entry + row::SEEN] as usize / TILE;
    let tiles = before + thin + recent.div_ceil(TILE) - first_recent;
    let share = tiles.div_ceil(CUBE_COUNT_X as usize);
    let start = min(CUBE_POS_X as usize * share, tiles);
    let end = min(start + share, tiles);

    let mut stage = SharedMemory::<f32>::new(STAGE);
    let mut weights = SharedMemory::<f32>::new(comptime!(TILE * PITCH));
    // Of the lines of a unit: lanes of the prefix and tokens of the ring that they do not see, what is added to their logits.
    let mut unseen = Array::<u32>::new(PER);
    let mut seen = Array::<u32>::new(PER);
    let mut added = Array::<f32>::new(PER);
    let mut top = Array::<f32>::new(PER);
    let mut sum = Array::<f32>::new(PER);
    let mut scores = Array::<f32>::new(comptime!(PER * PER));
    // Of turned values another one follows.
    let mut mixed = Array::<f32>::new(comptime!(parts * PER * channels(shape.dim)));
    #[unroll]
    for i in 0..PER {
        // Lines that are none repeat the last one.
        let line = min(first_line + own_line + i, last_line);
        let own = line / group * row::FIELDS;
        unseen[i] = rows[own + row::UNSEEN];
        seen[i] = rows[own + row::SEEN];
        let query = (line / group * cached_heads + at) * comptime!(shape.queries());
        added[i] = queries[query + comptime!(2 * shape.group * shape.dim) + line % group];
        top[i] = f32::new(LOWEST);
        sum[i] = f32::new(0.0);
    }
    #[unroll]
    for index in 0..comptime!(parts * PER * channels(shape.dim)) {
        mixed[index] = f32::new(0.0);
    }

    for tile in start..end {
        let of_sinks = tile < before;
        let of_prefix = tile >= before && tile < before + thin;
        // The first token, and how many there are: of those that are stored in the same way.
        let own_tile =
            select(of_sinks, tile, select(of_prefix, tile + skipped - before, tile + first_recent - before - thin));
        let first = own_tile * TILE;
        let tokens = select(of_sinks, sinks, select(of_prefix, blocks * BLOCK, recent));
        let key_channels = select(of_prefix, kept, comptime!(shape.dim).runtime());
        let queries_at = select(of_prefix, comptime!(shape.group * shape.dim).runtime(), 0usize.runtime());
        #[unroll]
        for i in 0..PER {
            #[unroll]
            for j in 0..PER {
                scores[comptime!(i * PER + j)] = select(of_prefix, added[i], f32::new(0.0));
            }
        }
        for piece in range_stepped(0, key_channels, PIECE) {
            for index in range_stepped(unit, comptime!(TILE * PIECE), UNITS) {
                let channel = piece + index % PIECE;
                let line = min(first_line + index / PIECE, last_line);
                let query = (line / group * cached_heads + at) * comptime!(shape.queries());
                let mut q = f32::new(0.0);
                if channel < key_channels {
                    q = queries[query + queries_at + line % group * dim + channel];
                }
                stage[index % PIECE * PITCH + index / PIECE] = q;
            }
            if of_prefix {
                stage_thin_keys(
                    arena,
                    pages,
                    keys,
                    key_block,
                    page_table,
                    first / BLOCK,
                    blocks,
                    piece,
                    kept,
                    &mut stage,
                    shape,
                );
            } else {
                let base = select(of_sinks, whole + heads[table + head::SINK_KEYS] as usize, whole);
                let stride = select(of_sinks, comptime!(shape.sinks).runtime(), comptime!(shape.stride).runtime());
                let token = min(first + unit % TILE, tokens - 1);
                for own in range_stepped(unit / TILE, PIECE, comptime!(UNITS / TILE)) {
                    let mut x = f32::new(0.0);
                    if piece + own < dim {
                        x = number(arena, base, (piece + own) * stride + token, comptime!(shape.keys.ring()));
                    }
                    stage[comptime!(PIECE * PITCH) + own * PITCH + unit % TILE] = x;
                }
            }
            sync_cube();
            multiply(&stage, &mut scores, own_line, own_key);
            sync_cube();
        }

        #[unroll]
        for i in 0..PER {
            let hidden = select(of_sinks, 0u32.runtime(), select(of_prefix, unseen[i], seen[i])) as usize;
            #[unroll]
            for j in 0..PER {
                let token = first + own_key + comptime!(j * SIDE);
                let score = scores[comptime!(i * PER + j)];
                scores[comptime!(i * PER + j)] = select(token < tokens && token >= hidden, score, f32::new(LOWEST));
            }
        }
        soften(
            &scores,
            &mut stage,
            &mut weights,
            &mut top,
            &mut sum,
            &mut mixed,
            own_line,
            own_key,
            parts,
            own_channels,
        );

        let most = comptime!(values_at_once(shape.dim));
        for piece in range_stepped(0, TILE, most) {
            if of_prefix {
                stage_thin_values(
                    arena,
                    pages,
                    values,
                    value_block,
                    page_table,
                    first + piece,
                    blocks,
                    &mut stage,
                    shape,
                );
                sync_cube();
                mix(&stage, &weights, &mut mixed, piece, own_line, own_key, comptime!(parts - 1), dim);
            } else {
                let sink_values = heads[table + head::SINK_VALUES];
                let base = whole + select(of_sinks, sink_values, heads[table + head::RING_VALUES]) as usize;
                for index in range_stepped(unit, comptime!(values_at_once(shape.dim) * shape.dim), UNITS) {
                    let token = min(first + piece + index / dim, tokens - 1);
                    stage[index] = number(arena, base, token * dim + index % dim, comptime!(shape.values.ring()));
                }
                sync_cube();
                mix(&stage, &weights, &mut mixed, piece, own_line, own_key, 0usize, dim);
            }
            sync_cube();
        }
    }

    total(&mut stage, &mut sum, own_line, own_key);
    #[unroll]
    for i in 0..PER {
        let line = first_line + own_line + i;
        if line <= last_line {
            let place = (line / group * cached_heads + at) * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
            let out = (place * group + line % group) * comptime!(shape.partial());
            if own_key == 0 {
                partials[out] = top[i];
                partials[out + 1] = sum[i];
            }
            #[unroll]
            for part in 0..parts {
                #[unroll]
                for c in 0..own_channels {
                    let channel = own_key + comptime!(c * SIDE);
                    if channel < dim {
                        partials[out + comptime!(2 + part * shape.dim) + channel] =
                            mixed[comptime!((part * PER + i) * own_channels + c)];
                    }
                }
            }
        }
    }
}
