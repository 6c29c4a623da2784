//! What later rows of a prompt, and its admission, want of the rows at hand: keys and values, and the newest queries.

use cubecl::prelude::*;

/// Units of a cube.
pub(crate) const UNITS: usize = 128;

/// Copies the keys and values of every row of `fused` to row `first + r` of `held`, and the queries of those rows that are
/// among the newest, from row `scoring` of the prompt on, to `queries`: one cube a row.
///
/// A fused row has `keys_at` numbers of queries, and then keys and values, up to `width`.
#[cube(launch_unchecked)]
pub(crate) fn hold(
    fused: &Array<f32>,
    held: &mut Array<f32>,
    queries: &mut Array<f32>,
    first: u32,
    scoring: u32,
    #[comptime] keys_at: usize,
    #[comptime] width: usize,
) {
    let from = CUBE_POS_X as usize * width;
    let row = first + CUBE_POS_X;
    let to = row as usize * comptime!(width - keys_at);
    for index in range_stepped(UNIT_POS as usize, comptime!(width - keys_at), UNITS) {
        held[to + index] = fused[from + keys_at + index];
    }
    if row >= scoring {
        let to = (row - scoring) as usize * keys_at;
        for index in range_stepped(UNIT_POS as usize, keys_at, UNITS) {
            queries[to + index] = fused[from + index];
        }
    }
}
