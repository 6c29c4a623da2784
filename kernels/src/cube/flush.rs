//! What leaves the ring: gathered to the kept channels, quantised as core does it, and packed into blocks.

use super::{
    layout::{
        BLOCK, Shape, bits, from_half, head, new_keys, no_number, quad_words, ring, step, stored, to_half, whole,
    },
    trellis,
    turn::{bounded, fit_turned, turn, turned_code},
};
use cubecl::prelude::*;
use thinkey_core::StorageKind;

/// Units of a cube; each quantises a group at a time.
pub(crate) const UNITS: usize = 64;

/// The bits of the next smaller binary16 number.
#[cube]
fn below(half: u32) -> u32 {
    if half == 0 {
        0x8001u32.runtime()
    } else if half & 0x8000 == 0 {
        half - 1
    } else {
        min(half + 1, 0xfbff)
    }
}

/// Scale and minimum, as bits of binary16, of codes up to `levels` that reach from `least` to `most`.
#[cube]
fn range_of(least: f32, most: f32, levels: f32) -> (u32, u32) {
    let mut minimum = to_half(least);
    if from_half(minimum) > least {
        minimum = below(minimum);
    }
    let offset = from_half(minimum);
    let mut scale = to_half((most - offset) / levels);
    if from_half(scale) * levels < most - offset {
        scale += 1;
    }
    (scale, minimum)
}

/// The code nearest to `x`.
#[cube]
fn nearest(x: f32, offset: f32, inverse: f32, levels: f32) -> u32 {
    let steps = clamp((x - offset) * inverse, f32::new(0.0), levels);
    // Adding 2^23 rounds to an integer, ties to even.
    u32::reinterpret(steps + 8_388_608.0f32) & 0xff
}

/// Writes the codes of a group of 32 numbers to `codes`, from `at` on; returns scale and minimum as bits of binary16.
///
/// As core's `quant`: few codes are tried over three widths of the range, and the one that correlates best is taken.
#[cube]
fn quantise(numbers: &Array<f32>, codes: &mut SharedMemory<u32>, at: usize, #[comptime] kind: u32) -> (u32, u32) {
    let levels = comptime!(((1u32 << kind) - 1) as f32).runtime();
    let mut least = f32::new(65504.0);
    let mut most = f32::new(-65504.0);
    let mut nan = false.runtime();
    for index in 0..BLOCK {
        let x = numbers[index];
        nan = nan || no_number(x);
        least = min(least, x);
        most = max(most, x);
    }
    least = max(least, f32::new(-65504.0));
    most = min(most, f32::new(65504.0));
    let (scale_of, minimum_of) = range_of(least, most, levels);
    let mut scale = scale_of;
    let mut minimum = minimum_of;
    let mut offset = from_half(minimum);
    let mut step = from_half(scale);
    let mut fitted = false.runtime();
    if comptime!(kind < 4) {
        let middle = least / 2.0 + most / 2.0;
        let half = most / 2.0 - least / 2.0;
        let mut best = f32::new(0.0);
        for width in 0..3usize {
            let share = select(width == 0, f32::new(1.0), select(width == 1, f32::new(0.85), f32::new(0.7)));
            let (scale_tried, minimum_tried) = range_of(middle - share * half, middle + share * half, levels);
            let tried = from_half(minimum_tried);
            let step_tried = from_half(scale_tried);
            let inverse = select(step_tried > 0.0, 1.0 / step_tried, f32::new(0.0));
            let mut mean_code = f32::new(0.0);
            let mut mean = f32::new(0.0);
            // In eight lanes that are added up at the end, as core does.
            for lane in 0..8usize {
                let mut lane_code = f32::new(0.0);
                let mut lane_number = f32::new(0.0);
                for row in 0..4usize {
                    let x = numbers[row * 8 + lane];
                    lane_code += f32::cast_from(nearest(x, tried, inverse, levels));
                    lane_number += x;
                }
                mean_code += lane_code;
                mean += lane_number;
            }
            mean_code /= 32.0;
            mean /= 32.0;
            let mut of_codes = f32::new(0.0);
            let mut of_numbers = f32::new(0.0);
            let mut both = f32::new(0.0);
            for lane in 0..8usize {
                let mut lane_codes = f32::new(0.0);
                let mut lane_numbers = f32::new(0.0);
                let mut lane_both = f32::new(0.0);
                for row in 0..4usize {
                    let number = numbers[row * 8 + lane];
                    let code = f32::cast_from(nearest(number, tried, inverse, levels)) - mean_code;
                    let x = number - mean;
                    lane_codes += code * code;
                    lane_numbers += x * x;
                    lane_both += code * x;
                }
                of_codes += lane_codes;
                of_numbers += lane_numbers;
                both += lane_both;
            }
            let quality = both * (both / of_codes);
            if quality > best {
                best = quality;
                offset = tried;
                step = step_tried;
                // The numbers that keep the mean, and what the group has in common with itself.
                let fit = to_half(of_numbers / both);
                let least_fit = to_half(mean - from_half(fit) * mean_code);
                // At least the smallest normal number, and below the largest; what is less wraps.
                fitted = fit - 0x0400 < 0x77ff && least_fit != 0x7bff && least_fit < 0xfbff;
                scale = fit;
                minimum = least_fit;
            }
        }
        if !fitted {
            scale = scale_of;
            minimum = minimum_of;
            offset = from_half(minimum);
            step = from_half(scale);
        }
    }
    let inverse = select(step > 0.0, 1.0 / step, f32::new(0.0));
    for index in 0..BLOCK {
        codes[at + index] = select(nan, 0u32, nearest(numbers[index], offset, inverse, levels));
    }
    // A number that is none makes the minimum one that is none: it stays visible.
    (select(nan, 0u32, scale), select(nan, 0x7e00u32, minimum))
}

/// Word `index` of the codes of a quad, whose four groups of codes begin at `at`.
#[cube]
fn packed(codes: &SharedMemory<u32>, at: usize, index: usize, #[comptime] kind: u32) -> u32 {
    let mut word = 0u32.runtime();
    #[unroll]
    for group in 0..4usize {
        let own = at + group * BLOCK;
        let mut byte = 0u32.runtime();
        if comptime!(kind == 8) {
            byte = codes[own + index];
        } else if comptime!(kind == 4) {
            byte = codes[own + index] | (codes[own + index + 16] << 4);
        } else if index < 8 {
            #[unroll]
            for part in 0..4usize {
                byte |= (codes[own + index + part * 8] & 3) << comptime!(2 * part as u32);
            }
        } else {
            #[unroll]
            for part in 0..8usize {
                byte |= (codes[own + index - 8 + part * 4] >> 2) << comptime!(part as u32);
            }
        }
        word |= byte << comptime!(8 * group as u32);
    }
    word
}

/// Fills the blocks of every step: one cube a block (x), head (y) and step (z).
#[cube(launch_unchecked)]
pub(crate) fn flush(
    arena: &mut Array<u32>,
    heads: &Array<u32>,
    steps: &Array<u32>,
    pages: &Array<u32>,
    channels: &Array<u32>,
    fused: &Array<f32>,
    #[comptime] shape: Shape,
) {
    let dim = comptime!(shape.dim);
    let unit = UNIT_POS as usize;
    let table = CUBE_POS_Y as usize * head::FIELDS;
    let entry = CUBE_POS_Z as usize * step::FIELDS;
    if CUBE_POS_X < steps[entry + step::BLOCKS] {
        let slot = steps[entry + step::SLOT] as usize;
        let held = steps[entry + step::HELD] as usize;
        let kept = heads[table + head::KEPT] as usize;
        let own = (slot * CUBE_COUNT_Y as usize + CUBE_POS_Y as usize) * dim;
        let page = pages
            [steps[entry + step::PAGES] as usize + steps[entry + step::FIRST] as usize + CUBE_POS_X as usize]
            as usize;
        let ring = ring(heads, table, slot);
        let ring_values = ring + heads[table + head::RING_VALUES] as usize;
        // Those of the first token that is no sink.
        let new_keys = new_keys(steps, entry, CUBE_POS_Y as usize, shape)
            + steps[entry + step::SUNK] as usize * comptime!(shape.width);
        let new_values = new_keys + comptime!(shape.values_at - shape.keys_at);
        // Of the blocks that the step fills, the first starts with lanes that are no tokens.
        let filled = CUBE_POS_X as usize + steps[entry + step::SKIPPED] as usize;
        let thinned = steps[entry + step::THINNED] as usize;
        let pad = (BLOCK - thinned % BLOCK) % BLOCK;
        let hidden = select(filled == 0, pad, 0);
        // The token of lane 0, plus the padding.
        let first = filled * BLOCK;
        let mut codes = SharedMemory::<u32>::new(comptime!(UNITS * BLOCK));
        let mut numbers = Array::<f32>::new(BLOCK);

        let block = heads[table + head::KEYS] as usize + page * heads[table + head::KEY_BLOCK] as usize;
        let key_bits = comptime!(bits(shape.keys));
        let key_kind = comptime!(shape.keys.ring());
        if comptime!(key_bits == 0) {
            // A unit fills words: two lanes of a channel, or one.
            let lanes = comptime!(4 / key_kind.bytes());
            for index in range_stepped(unit, kept * comptime!(BLOCK * key_kind.bytes() / 4), UNITS) {
                let channel = channels[own + index * lanes / BLOCK] as usize;
                let mut word = 0u32.runtime();
                #[unroll]
                for part in 0..lanes {
                    let lane = index * lanes % BLOCK + part;
                    if lane >= hidden {
                        let x = whole(arena, fused, ring, new_keys, held, first + lane - pad, channel, true, shape);
                        word |= stored(x, key_kind) << comptime!(16 * part as u32);
                    }
                }
                arena[block + index] = word;
            }
        } else {
            let quads = kept.div_ceil(4);
            let affine = block + quads * comptime!(quad_words(shape.keys));
            let rounds = kept.div_ceil(UNITS);
            for round in 0..rounds {
                let group = round * UNITS + unit;
                let mut scale = 0u32.runtime();
                let mut minimum = 0u32.runtime();
                if group < kept {
                    let channel = channels[own + group] as usize;
                    for lane in 0..BLOCK {
                        // Hidden lanes repeat the oldest token: they must not widen the range.
                        let token = first + max(lane, hidden) - pad;
                        numbers[lane] = whole(arena, fused, ring, new_keys, held, token, channel, true, shape);
                    }
                    let (a, b) = quantise(&numbers, &mut codes, unit * BLOCK, key_bits);
                    scale = a;
                    minimum = b;
                } else {
                    for lane in 0..BLOCK {
                        codes[unit * BLOCK + lane] = 0;
                    }
                }
                sync_cube();
                let words = comptime!(quad_words(shape.keys));
                let here = min(quads - round * comptime!(UNITS / 4), comptime!(UNITS / 4)) * words;
                for index in range_stepped(unit, here, UNITS) {
                    let at = index / words * comptime!(4 * BLOCK);
                    arena[block + round * comptime!(UNITS / 4) * words + index] =
                        packed(&codes, at, index % words, key_bits);
                }
                sync_cube();
                codes[unit * 2] = scale;
                codes[unit * 2 + 1] = minimum;
                sync_cube();
                put_affine(arena, &codes, affine, round * UNITS, min(kept - round * UNITS, UNITS), kept, unit);
                sync_cube();
            }
        }

        let block = heads[table + head::VALUES] as usize + page * heads[table + head::VALUE_BLOCK] as usize;
        let value_bits = comptime!(bits(shape.values));
        let value_kind = comptime!(shape.values.ring());
        if comptime!(value_bits == 0) {
            let numbers_a_word = comptime!(4 / value_kind.bytes());
            for index in range_stepped(unit, comptime!(BLOCK * shape.dim * value_kind.bytes() / 4), UNITS) {
                let lane = index * numbers_a_word / dim;
                let mut word = 0u32.runtime();
                if lane >= hidden {
                    #[unroll]
                    for part in 0..numbers_a_word {
                        let channel = index * numbers_a_word % dim + part;
                        let x = whole(
                            arena,
                            fused,
                            ring_values,
                            new_values,
                            held,
                            first + lane - pad,
                            channel,
                            false,
                            shape,
                        );
                        word |= stored(x, value_kind) << comptime!(16 * part as u32);
                    }
                }
                arena[block + index] = word;
            }
        } else if comptime!(shape.values.turns()) {
            // A unit is a token.
            let words = comptime!(quad_words(shape.values));
            let affine = block + comptime!(BLOCK * shape.dim.div_ceil(BLOCK) / 4 * quad_words(shape.values));
            let levels = comptime!(((1u32 << bits(shape.values)) - 1) as f32).runtime();
            let mut row = Array::<f32>::new(dim);
            let mut scale = 0u32.runtime();
            let mut inverse = f32::new(0.0);
            let coded = comptime!(shape.values == StorageKind::Trellis2);
            let mut squares = f32::new(0.0);
            let mut both = f32::new(0.0);
            if unit < BLOCK {
                for channel in 0..dim {
                    let mut x = f32::new(0.0);
                    if unit >= hidden {
                        let token = first + unit - pad;
                        x = whole(arena, fused, ring_values, new_values, held, token, channel, false, shape);
                    }
                    row[channel] = x;
                }
                turn(&mut row, dim);
                let factor = comptime!(1.0 / (shape.dim as f32).sqrt()).runtime();
                for channel in 0..dim {
                    row[channel] *= factor;
                }
                if comptime!(coded) {
                    for channel in 0..dim {
                        row[channel] = bounded(row[channel]);
                    }
                    let (a, b) = trellis::fit(&row, dim);
                    inverse = a;
                    squares = b;
                } else {
                    let (a, b) = fit_turned(&row, levels, dim);
                    scale = a;
                    inverse = b;
                }
            }
            for group in 0..comptime!(shape.dim.div_ceil(BLOCK)) {
                if unit < BLOCK {
                    for index in 0..BLOCK {
                        let channel = group * BLOCK + index;
                        let mut code = 0u32.runtime();
                        if comptime!(!coded) && channel < dim && inverse >= 0.0 {
                            code = comptime!(((1u32 << bits(shape.values)) - 1) / 2).runtime();
                            if inverse > 0.0 {
                                code = turned_code(row[channel], inverse, levels);
                            }
                        }
                        codes[unit * BLOCK + index] = code;
                    }
                    if comptime!(coded) {
                        both += trellis::encode(&row, group * BLOCK, inverse, &mut codes, unit * BLOCK, dim);
                    }
                }
                sync_cube();
                for index in range_stepped(unit, comptime!(BLOCK / 4 * quad_words(shape.values)), UNITS) {
                    let at = index / words * comptime!(4 * BLOCK);
                    arena[block + group * comptime!(BLOCK / 4 * quad_words(shape.values)) + index] =
                        packed(&codes, at, index % words, value_bits);
                }
                sync_cube();
            }
            if comptime!(coded) {
                scale = trellis::scale(inverse, squares, both);
            }
            codes[unit] = scale;
            sync_cube();
            if unit < BLOCK / 2 {
                arena[affine + unit] = codes[unit * 2] | (codes[unit * 2 + 1] << 16);
            }
            sync_cube();
        } else {
            let groups = comptime!(BLOCK * shape.dim.div_ceil(BLOCK));
            let words = comptime!(quad_words(shape.values));
            let affine = block + comptime!(BLOCK * shape.dim.div_ceil(BLOCK) / 4 * quad_words(shape.values));
            for round in 0..comptime!((BLOCK * shape.dim.div_ceil(BLOCK)).div_ceil(UNITS)) {
                let group = round * UNITS + unit;
                let mut scale = 0u32.runtime();
                let mut minimum = 0u32.runtime();
                if group < groups {
                    let lane = group % BLOCK;
                    let first_channel = group / BLOCK * BLOCK;
                    for index in 0..BLOCK {
                        let mut x = f32::new(0.0);
                        if lane >= hidden {
                            // A group that the channels do not fill repeats the last one.
                            let channel = min(first_channel + index, comptime!(shape.dim - 1).runtime());
                            x = whole(
                                arena,
                                fused,
                                ring_values,
                                new_values,
                                held,
                                first + lane - pad,
                                channel,
                                false,
                                shape,
                            );
                        }
                        numbers[index] = x;
                    }
                    let (a, b) = quantise(&numbers, &mut codes, unit * BLOCK, value_bits);
                    scale = a;
                    minimum = b;
                }
                sync_cube();
                let here = min(groups - round * UNITS, UNITS) / 4 * words;
                for index in range_stepped(unit, here, UNITS) {
                    let at = index / words * comptime!(4 * BLOCK);
                    arena[block + round * comptime!(UNITS / 4) * words + index] =
                        packed(&codes, at, index % words, value_bits);
                }
                sync_cube();
                codes[unit * 2] = scale;
                codes[unit * 2 + 1] = minimum;
                sync_cube();
                put_affine(arena, &codes, affine, round * UNITS, min(groups - round * UNITS, UNITS), groups, unit);
                sync_cube();
            }
        }
    }
}

/// Stores the scales and minima of `count` groups from `first` on, which lie in turns in `numbers`: binary16, all scales
/// of the block's `groups` before all minima. Where a word belongs to two rounds, or holds a scale and a minimum, the other
/// half stays.
#[cube]
fn put_affine(
    arena: &mut Array<u32>,
    numbers: &SharedMemory<u32>,
    affine: usize,
    first: usize,
    count: usize,
    groups: usize,
    unit: usize,
) {
    // One half after the other, since groups may be odd in number: units write to different words in each turn.
    #[unroll]
    for part in 0..2usize {
        let base = first + part * groups;
        let words = (base + count).div_ceil(2) - base / 2;
        for index in range_stepped(unit, words, UNITS) {
            let word = base / 2 + index;
            let mut content = arena[affine + word];
            #[unroll]
            for half in 0..2usize {
                let number = word * 2 + half;
                if number >= base && number < base + count {
                    let shift = comptime!(16 * half as u32);
                    let kept = content & comptime!(if half == 0 { 0xffff_0000u32 } else { 0x0000_ffffu32 });
                    content = kept | (numbers[(number - base) * 2 + part] << shift);
                }
            }
            arena[affine + word] = content;
        }
        sync_storage();
        sync_cube();
    }
}
