//! Words from one buffer to another: what a sequence has in the pages and the slot of a layer, together and back.

use cubecl::prelude::*;

/// Units of a cube.
pub(crate) const UNITS: usize = 128;
/// Words that a cube clears.
pub(crate) const CLEARED: usize = 32 * UNITS;
/// Numbers of a run: where it begins in the one buffer and in the other, and its words.
pub(crate) const RUN: usize = 3;

/// Copies `count` runs of words of `from` to `to`: one cube a run, in rows of cubes.
#[cube(launch_unchecked)]
pub(crate) fn copy(from: &Array<u32>, to: &mut Array<u32>, runs: &Array<u32>, count: u32) {
    let run = CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
    if run < count {
        let run = run as usize * RUN;
        let source = runs[run] as usize;
        let target = runs[run + 1] as usize;
        for index in range_stepped(UNIT_POS as usize, runs[run + 2] as usize, UNITS) {
            to[target + index] = from[source + index];
        }
    }
}

/// Makes the `count` words of `to` zeros: one cube [`CLEARED`] of them, in rows of cubes.
#[cube(launch_unchecked)]
pub(crate) fn clear(to: &mut Array<u32>, count: u32) {
    let first = (CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * CLEARED;
    let end = min(first + CLEARED, count as usize);
    for index in range_stepped(first + UNIT_POS as usize, end, UNITS) {
        to[index] = 0u32;
    }
}
