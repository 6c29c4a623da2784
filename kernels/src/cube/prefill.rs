//! Attention of a prompt's rows to the prompt itself: exact, fused, with no matrix of scores in memory.
//!
//! Flash attention (Dao et al., [arXiv 2205.14135](https://arxiv.org/abs/2205.14135)): a cube takes 64 lines of one KV head, a
//! line being a query head of a row, so that all G query heads share what is read of the keys; tiles of 64 tokens follow each
//! other with an online softmax. A unit makes four lines by four tokens of the scores, and of the output four lines by every
//! sixteenth channel, in registers; queries, keys and values go through shared memory in pieces, below 32 KiB whatever D is.
//! Tiles that no line sees, after the rows or between the sinks and the window, are not read.
//!
//! What the cache held before the prompt comes first, if there is any: [`attend`](super::attention::attend) leaves its mix in
//! the output and its log-sum-exp beside it, and the online softmax goes on from there.
//!
//! burn 0.21 has a flash attention of its own (`cubek-attention`). It does not serve here: it wants as many KV heads as query
//! heads, its causal mask begins at the first token, so that no run of rows but the first could use it, it knows no window,
//! and it keeps its log-sum-exp to itself, without which nothing can be merged.

use super::attention::LOWEST;
use cubecl::prelude::*;

/// Units of a cube: [`SIDE`] by [`SIDE`].
pub(crate) const UNITS: usize = SIDE * SIDE;
/// Units side by side.
const SIDE: usize = 16;
/// Lines, and tokens, of a unit.
const PER: usize = 4;
/// Lines, and tokens, of a tile.
pub(crate) const TILE: usize = SIDE * PER;
/// Channels of queries and keys that are there at a time.
const PIECE: usize = 16;
/// From a channel of a piece, or a token's weights, to the next: not a multiple of the banks of shared memory.
const PITCH: usize = TILE + 4;
/// Numbers that queries and keys, or values, go through.
const STAGE: usize = 2 * PIECE * PITCH;

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

    /// Tokens whose values are there at a time.
    fn values(self) -> usize {
        // A power of two, so that a tile is whole pieces.
        1 << (STAGE / self.dim).clamp(1, TILE).ilog2()
    }

    /// Channels of a unit.
    fn channels(self) -> usize {
        self.dim.div_ceil(SIDE)
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
    let channels = comptime!(shape.channels());
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
    let total = before as usize + min(first_line + TILE - 1, last_line) / group + 1;

    let mut stage = SharedMemory::<f32>::new(STAGE);
    let mut weights = SharedMemory::<f32>::new(comptime!(TILE * PITCH));
    let mut rows_at = Array::<u32>::new(PER);
    let mut places = Array::<u32>::new(PER);
    let mut top = Array::<f32>::new(PER);
    let mut sum = Array::<f32>::new(PER);
    let mut scores = Array::<f32>::new(comptime!(PER * PER));
    let mut mixed = Array::<f32>::new(comptime!(PER * shape.channels()));
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

    for tile in 0..total.div_ceil(TILE) {
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
                        k = held[min(start + place, total - 1) * comptime!(shape.held()) + keys_at + channel];
                    }
                    stage[to] = q;
                    stage[comptime!(PIECE * PITCH) + to] = k;
                }
                sync_cube();
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
                sync_cube();
            }

            // One step of the online softmax.
            #[unroll]
            for i in 0..PER {
                let mut most = f32::new(LOWEST);
                #[unroll]
                for j in 0..PER {
                    let token = u32::cast_from(start + own_key + comptime!(j * SIDE));
                    let score = select(
                        sees(rows_at[i], token, window, sinks),
                        scores[comptime!(i * PER + j)],
                        f32::new(LOWEST),
                    );
                    scores[comptime!(i * PER + j)] = score;
                    most = max(most, score);
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
                for c in 0..channels {
                    mixed[comptime!(i * channels + c)] *= shrink;
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

            let most = comptime!(shape.values());
            for first in range_stepped(0, TILE, most) {
                for index in range_stepped(unit, comptime!(shape.values() * shape.dim), UNITS) {
                    let token = min(start + first + index / dim, total - 1);
                    stage[index] = held[token * comptime!(shape.held()) + values_at + index % dim];
                }
                sync_cube();
                for key in 0..most {
                    let at = (first + key) * PITCH + own_line;
                    let mut by = Array::<f32>::new(PER);
                    #[unroll]
                    for i in 0..PER {
                        by[i] = weights[at + i];
                    }
                    #[unroll]
                    for c in 0..channels {
                        let mut channel = own_key + comptime!(c * SIDE);
                        if comptime!(!shape.dim.is_multiple_of(SIDE)) {
                            channel = min(channel, comptime!(shape.dim - 1).runtime());
                        }
                        let v = stage[key * dim + channel];
                        #[unroll]
                        for i in 0..PER {
                            mixed[comptime!(i * channels + c)] += by[i] * v;
                        }
                    }
                }
                sync_cube();
            }
        }
    }

    #[unroll]
    for i in 0..PER {
        stage[(own_line + i) * SIDE + own_key] = sum[i];
    }
    sync_cube();
    #[unroll]
    for i in 0..PER {
        if first_line + own_line + i <= last_line {
            let mut all = f32::new(0.0);
            for other in 0..SIDE {
                all += stage[(own_line + i) * SIDE + other];
            }
            #[unroll]
            for c in 0..channels {
                let channel = own_key + comptime!(c * SIDE);
                if channel < dim {
                    out[places[i] as usize * dim + channel] = mixed[comptime!(i * channels + c)] / all;
                }
            }
        }
    }
}
