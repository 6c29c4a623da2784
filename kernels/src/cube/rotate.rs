//! Rotary embedding of fused rows in place, and what some models do to query and key heads before it.

use cubecl::prelude::*;

/// Units of a cube.
pub(crate) const UNITS: usize = 32;

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Turn {
    /// Query heads; key heads follow them.
    pub(crate) heads: usize,
    /// Channels of a head, D.
    pub(crate) dim: usize,
    /// Width of a row.
    pub(crate) width: usize,
    /// Whether channels 2i and 2i + 1 turn together, not i and i + D/2.
    pub(crate) adjacent: bool,
    /// Whether heads are normalised first.
    pub(crate) normed: bool,
}

/// Normalises and rotates query and key heads: one cube a head (x) and row (y). Row r is at `positions[r]`; `queries` and
/// `keys` are the factors of normalisation, one a channel.
#[cube(launch_unchecked)]
pub(crate) fn rotate(
    fused: &mut Array<f32>,
    positions: &Array<u32>,
    frequencies: &Array<f32>,
    queries: &Array<f32>,
    keys: &Array<f32>,
    eps: f32,
    #[comptime] turn: Turn,
) {
    let dim = comptime!(turn.dim);
    let unit = UNIT_POS as usize;
    let head = CUBE_POS_X as usize;
    let start = CUBE_POS_Y as usize * comptime!(turn.width) + head * dim;
    let position = f32::cast_from(positions[CUBE_POS_Y as usize]);
    let mut factor = f32::new(1.0);
    if comptime!(turn.normed) {
        let mut squares = SharedMemory::<f32>::new(UNITS);
        let mut sum = f32::new(0.0);
        for channel in range_stepped(unit, dim, UNITS) {
            let v = fused[start + channel];
            sum += v * v;
        }
        squares[unit] = sum;
        sync_cube();
        let mut sum = f32::new(0.0);
        for other in 0..UNITS {
            sum += squares[other];
        }
        factor = 1.0 / (sum / comptime!(turn.dim as f32).runtime() + eps).sqrt();
    }
    for pair in range_stepped(unit, comptime!(turn.dim / 2), UNITS) {
        let mut first = pair;
        let mut second = pair + comptime!(turn.dim / 2);
        if comptime!(turn.adjacent) {
            first = pair * 2;
            second = pair * 2 + 1;
        }
        let mut a = fused[start + first];
        let mut b = fused[start + second];
        if comptime!(turn.normed) {
            let query = head < comptime!(turn.heads);
            a *= factor * select(query, queries[first], keys[first]);
            b *= factor * select(query, queries[second], keys[second]);
        }
        let angle = position * frequencies[pair];
        let cos = angle.cos();
        let sin = angle.sin();
        fused[start + first] = a * cos - b * sin;
        fused[start + second] = a * sin + b * cos;
    }
}
