//! Attention of a prompt's rows to the prompt itself: exact, fused, with no matrix of scores in memory.
//!
//! Flash attention (Dao et al., [arXiv 2205.14135](https://arxiv.org/abs/2205.14135)): a cube takes a [tile](super::tile) of
//! lines of one KV head, so that all G query heads share what is read of the keys; tiles of tokens follow each other with an
//! online softmax. Tiles that no line sees, after the rows or between the sinks and the window, are not read.
//!
//! What the cache held before the prompt comes first, if there is any: [`extend`](super::extend) leaves its mix in the
//! output and its log-sum-exp beside it, and the online softmax goes on from there.
//!
//! burn 0.21 has a flash attention of its own (`cubek-attention`). It does not serve here: it wants as many KV heads as query
//! heads, its causal mask begins at the first token, so that no run of rows but the first could use it, it knows no window,
//! and it keeps its log-sum-exp to itself, without which nothing can be merged.

use super::{
    attention::LOWEST,
    tile::{PER, PIECE, PITCH, SIDE, STAGE, TILE, UNITS, channels, mix, multiply, soften, total, values_at_once},
};
use cubecl::prelude::*;

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PromptShape {
    /// Channels of a head, D.
    pub(crate) dim: usize,
    /// KV heads.
    pub(crate) heads: usize,
    /// Query heads of a KV head, G.
    pub(crate) group: usize,
    /// Whether the cache held something before.
    pub(crate) continued: bool,
}

impl PromptShape {
    /// Width of a fused row.
    fn width(self) -> usize {
        self.heads * (self.group + 2) * self.dim
    }

    /// Width of a held row: keys and values.
    fn held(self) -> usize {
        2 * self.heads * self.dim
    }
}

/// Whether a row at place `row` of the prompt sees token `token`: no later one, of the window or of the first `sinks`.
#[cube]
fn sees(row: u32, token: u32, window: u32, sinks: u32) -> bool {
    token <= row && (token < sinks || token + window > row)
}

/// The attention output of `rows` rows of `fused`, which come after `before` tokens of the prompt: one cube 64 lines (x) and
/// a KV head (y).
///
/// `held` has the keys and values of the prompt so far, the rows included. `out` is `[row][query head][D]` and, where the
/// prompt is continued, has the output of the cache alone, of which `ends` are the ends, see [`merge`](super::merge::merge).
#[cube(launch_unchecked)]
pub(crate) fn prefill(
    fused: &Array<f32>,
    held: &Array<f32>,
    ends: &Array<f32>,
    out: &mut Array<f32>,
    rows: u32,
    before: u32,
    window: u32,
    sinks: u32,
    scale: f32,
    #[comptime] shape: PromptShape,
) {
    let dim = comptime!(shape.dim);
    let group = comptime!(shape.group);
    let channels = comptime!(channels(shape.dim));
    let unit = UNIT_POS as usize;
    let own_key = unit % SIDE;
    let own_line = unit / SIDE * PER;
    let last_line = rows as usize * group - 1;
    // The last lines see most: they begin first.
    let first_line = (last_line / TILE - CUBE_POS_X as usize) * TILE;
    let head = CUBE_POS_Y as usize;
    let keys_at = head * dim;
    let values_at = comptime!(shape.heads * shape.dim) + head * dim;
    let lowest = before + u32::cast_from(first_line / group);
    let tokens = before as usize + min(first_line + TILE - 1, last_line) / group + 1;

    let mut stage = SharedMemory::<f32>::new(STAGE);
    let mut weights = SharedMemory::<f32>::new(comptime!(TILE * PITCH));
    let mut rows_at = Array::<u32>::new(PER);
    let mut places = Array::<u32>::new(PER);
    let mut top = Array::<f32>::new(PER);
    let mut sum = Array::<f32>::new(PER);
    let mut scores = Array::<f32>::new(comptime!(PER * PER));
    let mut mixed = Array::<f32>::new(comptime!(PER * shape.dim.div_ceil(SIDE)));
    #[unroll]
    for i in 0..PER {
        // Lines that are none repeat the last one.
        let line = min(first_line + own_line + i, last_line);
        let row = line / group;
        rows_at[i] = before + u32::cast_from(row);
        // Of the line's query head among those of all rows.
        let place = row * comptime!(shape.heads * shape.group) + head * group + line % group;
        places[i] = u32::cast_from(place);
        if comptime!(shape.continued) {
            let past = ends[place * 2 + 1];
            top[i] = ends[place * 2];
            sum[i] = select(own_key == 0, past, f32::new(0.0));
            #[unroll]
            for c in 0..channels {
                let channel = own_key + comptime!(c * SIDE);
                let mut x = f32::new(0.0);
                if channel < dim {
                    x = out[place * dim + channel] * past;
                }
                mixed[comptime!(i * channels + c)] = x;
            }
        } else {
            top[i] = f32::new(LOWEST);
            sum[i] = f32::new(0.0);
            #[unroll]
            for c in 0..channels {
                mixed[comptime!(i * channels + c)] = f32::new(0.0);
            }
        }
    }

    for tile in 0..tokens.div_ceil(TILE) {
        let start = tile * TILE;
        let near = u32::cast_from(start + TILE - 1) + window > lowest;
        if near || u32::cast_from(start) < sinks {
            #[unroll]
            for index in 0..comptime!(PER * PER) {
                scores[index] = f32::new(0.0);
            }
            for piece in range_stepped(0, dim, PIECE) {
                for index in range_stepped(unit, comptime!(TILE * PIECE), UNITS) {
                    let place = index / PIECE;
                    let channel = piece + index % PIECE;
                    let to = index % PIECE * PITCH + place;
                    let mut q = f32::new(0.0);
                    let mut k = f32::new(0.0);
                    if channel < dim {
                        let line = min(first_line + place, last_line);
                        let query = head * group + line % group;
                        q = fused[line / group * comptime!(shape.width()) + query * dim + channel] * scale;
                        k = held[min(start + place, tokens - 1) * comptime!(shape.held()) + keys_at + channel];
                    }
                    stage[to] = q;
                    stage[comptime!(PIECE * PITCH) + to] = k;
                }
                sync_cube();
                multiply(&stage, &mut scores, own_line, own_key);
                sync_cube();
            }

            #[unroll]
            for i in 0..PER {
                #[unroll]
                for j in 0..PER {
                    let token = u32::cast_from(start + own_key + comptime!(j * SIDE));
                    let score = scores[comptime!(i * PER + j)];
                    scores[comptime!(i * PER + j)] =
                        select(sees(rows_at[i], token, window, sinks), score, f32::new(LOWEST));
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
                1usize,
                comptime!(shape.dim.div_ceil(SIDE)),
            );

            let most = comptime!(values_at_once(shape.dim));
            for first in range_stepped(0, TILE, most) {
                for index in range_stepped(unit, comptime!(values_at_once(shape.dim) * shape.dim), UNITS) {
                    let token = min(start + first + index / dim, tokens - 1);
                    stage[index] = held[token * comptime!(shape.held()) + values_at + index % dim];
                }
                sync_cube();
                mix(&stage, &weights, &mut mixed, first, own_line, own_key, 0usize, dim);
                sync_cube();
            }
        }
    }

    total(&mut stage, &mut sum, own_line, own_key);
    #[unroll]
    for i in 0..PER {
        if first_line + own_line + i <= last_line {
            #[unroll]
            for c in 0..channels {
                let channel = own_key + comptime!(c * SIDE);
                if channel < dim {
                    out[places[i] as usize * dim + channel] = mixed[comptime!(i * channels + c)] / sum[i];
                }
            }
        }
    }
}
