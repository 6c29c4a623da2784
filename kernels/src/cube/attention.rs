//! Decode attention over the thin cache, split over tokens (flash-decoding), as core's `attend` computes it.
//!
//! A cube takes a share of the blocks of one cached head for one row: sinks, thin prefix and ring are one list of blocks of
//! 32 tokens, of which the cube takes four at a time. All G query heads are served from one pass. For keys a unit is a
//! token: scores of a block need no sum over units. For values a unit is a channel, and where there are more units than
//! channels, the blocks of a tile are shared out among them. What a share of the tokens gives is mergeable,
//! see [`merge`](super::merge).

use super::{
    layout::{BLOCK, Shape, bits, code, codes, head, number, quad_words, ring, row},
    trellis::{nibbles, number_of},
};
use cubecl::prelude::*;
use thinkey_core::{
    quant::trellis::MIDDLE,
    storage::{FloatKind, StorageKind},
};

/// Units of a cube.
pub(crate) const UNITS: usize = 128;
/// Blocks that a cube takes at a time.
pub(crate) const TILE: usize = UNITS / BLOCK;
/// Below every logit: an infinity would make NaN of a difference.
pub(crate) const LOWEST: f32 = -3.0e38;

/// Makes queries ready: scaled by 1/√D, and gathered to the channels of the prefix and corrected for those that it lacks.
///
/// One cube a head (x) and row (y). `queries` is `[row][head][G·(2D+1)]`: whole, thin (with T numbers a query head, D
/// apart), added. `channels` is `[slot][head][D]`, those kept before the others.
#[cube(launch_unchecked)]
pub(crate) fn thin_queries(
    arena: &Array<u32>,
    heads: &Array<u32>,
    rows: &Array<u32>,
    channels: &Array<u32>,
    fused: &Array<f32>,
    queries: &mut Array<f32>,
    scale: f32,
    #[comptime] shape: Shape,
) {
    let dim = comptime!(shape.dim);
    let group = comptime!(shape.group);
    let at = CUBE_POS_X as usize;
    let table = at * head::FIELDS;
    let entry = CUBE_POS_Y as usize * row::FIELDS;
    let kept = heads[table + head::KEPT] as usize;
    let slot = rows[entry + row::SLOT] as usize;
    let own = (slot * CUBE_COUNT_X as usize + at) * dim;
    let columns = ring(heads, table, slot) + heads[table + head::CORRECTION] as usize;
    let source = CUBE_POS_Y as usize * comptime!(shape.width) + at * comptime!(shape.group * shape.dim);
    let to = (CUBE_POS_Y as usize * CUBE_COUNT_X as usize + at) * comptime!(shape.queries());
    for index in range_stepped(UNIT_POS as usize, comptime!(shape.group * shape.dim), UNITS) {
        queries[to + index] = fused[source + index] * scale;
    }
    if rows[entry + row::BLOCKS] > 0 {
        // T numbers of each query head, and what is added to its logits.
        for index in range_stepped(UNIT_POS as usize, group * (kept + 1), UNITS) {
            let member = index / (kept + 1);
            let place = index % (kept + 1);
            let query = source + member * dim;
            let mut sum = f32::new(0.0);
            if place < kept {
                sum = fused[query + channels[own + place] as usize];
            }
            if comptime!(shape.corrected) {
                for lost in 0..dim - kept {
                    let q = fused[query + channels[own + kept + lost] as usize];
                    sum += q * number(arena, columns, lost * (kept + 1) + place, comptime!(shape.correction()));
                }
            }
            let offset = select(place < kept, group * dim + member * dim + place, 2 * group * dim + member);
            queries[to + offset] = sum * scale;
        }
    }
}

/// Adds the products of G queries, D apart from `first` on, with lane `lane` of whole keys to `scores`.
#[cube]
fn whole_scores(
    arena: &Array<u32>,
    keys: usize,
    lane: usize,
    stride: usize,
    queries: &SharedMemory<f32>,
    scores: &mut Array<f32>,
    #[comptime] shape: Shape,
) {
    for channel in 0..comptime!(shape.dim) {
        let x = number(arena, keys, channel * stride + lane, comptime!(shape.keys.ring()));
        #[unroll]
        for member in 0..comptime!(shape.group) {
            scores[member] += queries[comptime!(member * shape.dim) + channel] * x;
        }
    }
}

/// Adds the products of G thin queries with lane `lane` of the key block at word `block` to `scores`.
#[cube]
fn thin_scores(
    arena: &Array<u32>,
    block: usize,
    kept: usize,
    lane: usize,
    queries: &SharedMemory<f32>,
    scores: &mut Array<f32>,
    #[comptime] shape: Shape,
) {
    let first = comptime!(shape.group * shape.dim);
    let kind = comptime!(bits(shape.keys));
    if comptime!(kind == 0) {
        for channel in 0..kept {
            let x = number(arena, block, channel * BLOCK + lane, comptime!(shape.keys.ring()));
            #[unroll]
            for member in 0..comptime!(shape.group) {
                scores[member] += queries[comptime!(first + member * shape.dim) + channel] * x;
            }
        }
    } else {
        let quads = kept.div_ceil(4);
        let affine = block + quads * comptime!(quad_words(shape.keys));
        for quad in 0..quads {
            let word = codes(arena, block + quad * comptime!(quad_words(shape.keys)), lane, kind);
            #[unroll]
            for place in 0..4u32 {
                let channel = quad * 4 + place as usize;
                if channel < kept {
                    let scale = number(arena, affine, channel, comptime!(FloatKind::F16));
                    let least = number(arena, affine, kept + channel, comptime!(FloatKind::F16));
                    let x = code(word, place) * scale + least;
                    #[unroll]
                    for member in 0..comptime!(shape.group) {
                        scores[member] += queries[comptime!(first + member * shape.dim) + channel] * x;
                    }
                }
            }
        }
    }
}

/// Adds channel `channel` of the whole values of lanes `from..to`, weighted, to `mixed`.
#[cube]
fn mix_whole(
    arena: &Array<u32>,
    values: usize,
    from: usize,
    to: usize,
    channel: usize,
    weights: &SharedMemory<f32>,
    place: usize,
    mixed: &mut Array<f32>,
    #[comptime] at: usize,
    #[comptime] shape: Shape,
) {
    for lane in from..to {
        let x = number(arena, values, lane * comptime!(shape.dim) + channel, comptime!(shape.values.ring()));
        #[unroll]
        for member in 0..comptime!(shape.group) {
            mixed[comptime!(at + member)] += weights[comptime!(member * UNITS) + place + lane] * x;
        }
    }
}

/// The affine numbers of group `group` of a value block's `groups`, which begin at word `affine`: scale and minimum.
#[cube]
fn value_affine(arena: &Array<u32>, affine: usize, group: usize, groups: usize) -> (f32, f32) {
    let scale = number(arena, affine, group, comptime!(FloatKind::F16));
    let least = number(arena, affine, groups + group, comptime!(FloatKind::F16));
    (scale, least)
}

/// Adds channel `channel` of the value block at word `block`, weighted, to `mixed`.
///
/// The form of stored values is known here and in `flush` alone.
#[cube]
fn mix_thin(
    arena: &Array<u32>,
    block: usize,
    channel: usize,
    weights: &SharedMemory<f32>,
    place: usize,
    mixed: &mut Array<f32>,
    #[comptime] at: usize,
    #[comptime] shape: Shape,
) {
    let kind = comptime!(bits(shape.values));
    if comptime!(kind == 0) {
        mix_whole(arena, block, 0, BLOCK, channel, weights, place, mixed, at, shape);
    } else {
        // A quad is four tokens here, and a group 32 channels of one.
        let groups = comptime!(BLOCK * shape.dim.div_ceil(BLOCK));
        let affine = block + comptime!(groups / 4 * quad_words(shape.values));
        let coded = comptime!(shape.values == StorageKind::Trellis2);
        let middle = comptime!(if coded { MIDDLE } else { ((1u32 << bits(shape.values)) - 1) as f32 / 2.0 }).runtime();
        for four in 0..comptime!(BLOCK / 4) {
            let quad = channel / BLOCK * comptime!(BLOCK / 4) + four;
            let quad = block + quad * comptime!(quad_words(shape.values));
            let word = if comptime!(coded) {
                nibbles(arena, quad, channel % BLOCK)
            } else {
                codes(arena, quad, channel % BLOCK, kind)
            };
            #[unroll]
            for token in 0..4u32 {
                let lane = four * 4 + token as usize;
                let x = if comptime!(shape.values.turns()) {
                    // One scale a token.
                    let x = if comptime!(coded) { number_of(word, token) } else { code(word, token) };
                    (x - middle) * number(arena, affine, lane, comptime!(FloatKind::F16))
                } else {
                    let (scale, least) = value_affine(arena, affine, channel / BLOCK * BLOCK + lane, groups);
                    code(word, token) * scale + least
                };
                #[unroll]
                for member in 0..comptime!(shape.group) {
                    mixed[comptime!(at + member)] += weights[comptime!(member * UNITS) + place + lane] * x;
                }
            }
        }
    }
}

/// What a share of the tokens that a row sees gives: one cube a share (x), head (y) and row (z) of 128 units.
///
/// `partials` is `[row][head][share][G][D+2]`: the largest logit, Σ e^(logit − largest), and the mix of the values by it;
/// where values are turned, D more: the mix of those.
/// `plane` is the width of planes, or 1 where that is not known.
#[cube(launch_unchecked)]
pub(crate) fn attend(
    arena: &Array<u32>,
    heads: &Array<u32>,
    rows: &Array<u32>,
    pages: &Array<u32>,
    queries: &Array<f32>,
    partials: &mut Array<f32>,
    #[comptime] shape: Shape,
    #[comptime] plane: usize,
) {
    let dim = comptime!(shape.dim);
    let group = comptime!(shape.group);
    let unit = UNIT_POS as usize;
    let planes = comptime!(UNITS / plane);
    // Channels of a unit, and units of a channel.
    let per = comptime!(shape.dim.div_ceil(UNITS));
    let sharing = comptime!((UNITS / shape.dim).clamp(1, TILE));

    let table = CUBE_POS_Y as usize * head::FIELDS;
    let entry = CUBE_POS_Z as usize * row::FIELDS;
    let kept = heads[table + head::KEPT] as usize;
    let slot = rows[entry + row::SLOT] as usize;
    let sinks = rows[entry + row::SINKS] as usize;
    let recent = rows[entry + row::RECENT] as usize;
    let unseen = rows[entry + row::UNSEEN] as usize;
    let seen = rows[entry + row::SEEN] as usize;
    let table_of_pages = rows[entry + row::PAGES] as usize;
    let whole = ring(heads, table, slot);

    let mut shared_queries = SharedMemory::<f32>::new(comptime!(shape.queries()));
    let mut weights = SharedMemory::<f32>::new(comptime!(shape.group * UNITS));
    let mut tops = SharedMemory::<f32>::new(comptime!(shape.group * (UNITS / plane)));
    let source = (CUBE_POS_Z as usize * CUBE_COUNT_Y as usize + CUBE_POS_Y as usize) * comptime!(shape.queries());
    for index in range_stepped(unit, comptime!(shape.queries()), UNITS) {
        shared_queries[index] = queries[source + index];
    }

    // The list of blocks: those of sinks, of the prefix and of the ring, from the first that is seen on.
    let before = sinks.div_ceil(BLOCK);
    let skipped = unseen / BLOCK;
    let thin = rows[entry + row::BLOCKS] as usize - skipped;
    let first_recent = seen / BLOCK;
    let total = before + thin + recent.div_ceil(BLOCK) - first_recent;
    let share = total.div_ceil(CUBE_COUNT_X as usize);
    let start = min(CUBE_POS_X as usize * share, total);
    let end = min(start + share, total);

    let mut top = Array::<f32>::new(comptime!(shape.group));
    let mut sum = Array::<f32>::new(comptime!(shape.group));
    let mut scores = Array::<f32>::new(comptime!(shape.group));
    // Of turned values another one follows.
    let parts = comptime!(if shape.values.turns() { 2 * per } else { per });
    let mut mixed = Array::<f32>::new(comptime!(shape.group * parts));
    #[unroll]
    for member in 0..group {
        top[member] = f32::new(LOWEST);
        sum[member] = f32::new(0.0);
    }
    #[unroll]
    for index in 0..comptime!(shape.group * parts) {
        mixed[index] = f32::new(0.0);
    }
    sync_cube();

    for tile in range_stepped(start, end, TILE) {
        // Keys: a unit is a token.
        let index = tile + unit / BLOCK;
        let lane = unit % BLOCK;
        let mut visible = false.runtime();
        #[unroll]
        for member in 0..group {
            scores[member] = f32::new(0.0);
        }
        if index < end {
            if index < before {
                let token = index * BLOCK + lane;
                visible = token < sinks;
                if visible {
                    let keys = whole + heads[table + head::SINK_KEYS] as usize;
                    whole_scores(
                        arena,
                        keys,
                        token,
                        comptime!(shape.sinks).runtime(),
                        &shared_queries,
                        &mut scores,
                        shape,
                    );
                }
            } else if index < before + thin {
                let block = index - before + skipped;
                visible = block * BLOCK + lane >= unseen;
                let page = pages[table_of_pages + block] as usize;
                let keys = heads[table + head::KEYS] as usize + page * heads[table + head::KEY_BLOCK] as usize;
                #[unroll]
                for member in 0..group {
                    scores[member] = shared_queries[comptime!(2 * shape.group * shape.dim + member)];
                }
                thin_scores(arena, keys, kept, lane, &shared_queries, &mut scores, shape);
            } else {
                let token = (index - before - thin + first_recent) * BLOCK + lane;
                visible = token < recent && token >= seen;
                if visible {
                    whole_scores(
                        arena,
                        whole,
                        token,
                        comptime!(shape.stride).runtime(),
                        &shared_queries,
                        &mut scores,
                        shape,
                    );
                }
            }
        }

        // One step of the online softmax.
        #[unroll]
        for member in 0..group {
            scores[member] = select(visible, scores[member], f32::new(LOWEST));
            if comptime!(plane > 1) {
                let most = plane_max(scores[member]);
                if UNIT_POS_PLANE == 0 {
                    tops[comptime!(member * planes) + unit / plane] = most;
                }
            } else {
                tops[comptime!(member * planes) + unit] = scores[member];
            }
        }
        sync_cube();
        #[unroll]
        for member in 0..group {
            let mut most = top[member];
            for other in 0..planes {
                most = max(most, tops[comptime!(member * planes) + other]);
            }
            let shrink = (top[member] - most).exp();
            top[member] = most;
            let weight = select(visible, (scores[member] - most).exp(), f32::new(0.0));
            sum[member] = sum[member] * shrink + weight;
            weights[comptime!(member * UNITS) + unit] = weight;
            #[unroll]
            for channel in 0..parts {
                mixed[comptime!(channel * shape.group + member)] *= shrink;
            }
        }
        sync_cube();

        // Values: a unit is a channel.
        let own = unit / dim;
        if own < sharing {
            for place in range_stepped(own, TILE, sharing) {
                let index = tile + place;
                if index < end {
                    #[unroll]
                    for step in 0..per {
                        let channel = unit % dim + comptime!(step * UNITS);
                        if channel < dim {
                            if index < before {
                                let values = whole + heads[table + head::SINK_VALUES] as usize;
                                let first = index * BLOCK;
                                let values = values + first * comptime!(shape.dim * shape.values.ring().bytes() / 4);
                                let count = min(sinks - first, BLOCK);
                                mix_whole(
                                    arena,
                                    values,
                                    0,
                                    count,
                                    channel,
                                    &weights,
                                    place * BLOCK,
                                    &mut mixed,
                                    comptime!(step * shape.group),
                                    shape,
                                );
                            } else if index < before + thin {
                                let page = pages[table_of_pages + index - before + skipped] as usize;
                                let values = heads[table + head::VALUES] as usize
                                    + page * heads[table + head::VALUE_BLOCK] as usize;
                                mix_thin(
                                    arena,
                                    values,
                                    channel,
                                    &weights,
                                    place * BLOCK,
                                    &mut mixed,
                                    comptime!((step + parts - per) * shape.group),
                                    shape,
                                );
                            } else {
                                let first = (index - before - thin + first_recent) * BLOCK;
                                let values = whole + heads[table + head::RING_VALUES] as usize;
                                let values = values + first * comptime!(shape.dim * shape.values.ring().bytes() / 4);
                                let count = min(recent - first, BLOCK);
                                mix_whole(
                                    arena,
                                    values,
                                    0,
                                    count,
                                    channel,
                                    &weights,
                                    place * BLOCK,
                                    &mut mixed,
                                    comptime!(step * shape.group),
                                    shape,
                                );
                            }
                        }
                    }
                }
            }
        }
        sync_cube();
    }

    // What units have summed up apart; the memory of weights is free now.
    let place = (CUBE_POS_Z as usize * CUBE_COUNT_Y as usize + CUBE_POS_Y as usize) * CUBE_COUNT_X as usize
        + CUBE_POS_X as usize;
    let out = place * comptime!(shape.group * shape.partial());
    #[unroll]
    for member in 0..group {
        weights[comptime!(member * UNITS) + unit] = sum[member];
    }
    sync_cube();
    if unit < group {
        let mut all = f32::new(0.0);
        for other in 0..UNITS {
            all += weights[unit * UNITS + other];
        }
        partials[out + unit * comptime!(shape.partial()) + 1] = all;
    }
    if unit == 0 {
        #[unroll]
        for member in 0..group {
            partials[out + comptime!(member * shape.partial())] = top[member];
        }
    }
    sync_cube();
    if comptime!(sharing > 1) {
        // A unit has one channel.
        #[unroll]
        for part in 0..parts {
            #[unroll]
            for member in 0..group {
                weights[comptime!(member * UNITS) + unit] = mixed[comptime!(part * shape.group + member)];
            }
            sync_cube();
            if unit < dim {
                #[unroll]
                for member in 0..group {
                    let mut all = f32::new(0.0);
                    #[unroll]
                    for other in 0..sharing {
                        all += weights[comptime!(member * UNITS + other * shape.dim) + unit];
                    }
                    partials[out + comptime!(member * shape.partial() + 2 + part * shape.dim) + unit] = all;
                }
            }
            sync_cube();
        }
    } else {
        #[unroll]
        for step in 0..parts {
            let channel = unit + comptime!(step % per * UNITS);
            if channel < dim {
                #[unroll]
                for member in 0..group {
                    partials[out + comptime!(member * shape.partial() + 2 + step / per * shape.dim) + channel] =
                        mixed[comptime!(step * shape.group + member)];
                }
            }
        }
    }
}
