//! Merging what shares of the tokens give, by their log-sum-exp.

use super::{
    attention::{LOWEST, UNITS},
    turn::turn_shared,
};
use cubecl::prelude::*;

/// The attention output of a query head (x) of a row (y): `partials` as [`attend`](super::attention::attend) has written
/// them, `shares` of each; `out` is `[row][query head][D]`, zeros where nothing was seen. `ends` is `[row][query head][2]`:
/// the largest logit and Σ e^(logit − largest), for those who merge further.
#[cube(launch_unchecked)]
pub(crate) fn merge(
    partials: &Array<f32>,
    out: &mut Array<f32>,
    ends: &mut Array<f32>,
    shares: u32,
    #[comptime] dim: usize,
    #[comptime] group: usize,
    #[comptime] turned: bool,
) {
    let query_head = CUBE_POS_X as usize;
    let row_head = CUBE_POS_Y as usize * CUBE_COUNT_X as usize + query_head;
    let width = comptime!(2 + if turned { 2 * dim } else { dim });
    let step = comptime!(group * (2 + if turned { 2 * dim } else { dim }));
    // Heads of the cache lie in the order of their query heads.
    let first = row_head / group * shares as usize * step + row_head % group * width;
    let mut top = f32::new(LOWEST);
    for share in 0..shares as usize {
        top = max(top, partials[first + share * step]);
    }
    let mut sum = f32::new(0.0);
    for share in 0..shares as usize {
        let at = first + share * step;
        sum += partials[at + 1] * (partials[at] - top).exp();
    }
    let scale = select(sum > 0.0, 1.0 / sum, f32::new(0.0));
    // The mix of turned values is the turned mix: it is turned back once.
    let mut back = SharedMemory::<f32>::new(comptime!(if turned { dim } else { 1 }));
    if comptime!(turned) {
        for channel in range_stepped(UNIT_POS as usize, dim, UNITS) {
            let mut mixed = f32::new(0.0);
            for share in 0..shares as usize {
                let at = first + share * step;
                mixed += partials[at + 2 + dim + channel] * (partials[at] - top).exp();
            }
            back[channel] = mixed;
        }
        sync_cube();
        turn_shared(&mut back, dim, UNITS);
    }
    for channel in range_stepped(UNIT_POS as usize, dim, UNITS) {
        let mut mixed = f32::new(0.0);
        for share in 0..shares as usize {
            let at = first + share * step;
            mixed += partials[at + 2 + channel] * (partials[at] - top).exp();
        }
        if comptime!(turned) {
            mixed += back[channel] * comptime!(1.0 / (dim as f32).sqrt()).runtime();
        }
        out[row_head * dim + channel] = mixed * scale;
    }
    if UNIT_POS == 0 {
        ends[row_head * 2] = top;
        ends[row_head * 2 + 1] = sum;
    }
}
