//! The largest logits of a row: what a step of decoding brings to the host, in place of all of them.
//!
//! A cube finds the best of 4,096, one after the other, and what cubes find is looked through again until one cube has seen
//! all. Logits are compared as integers that are in the same order, so that the choice is that of the host
//! ([`keep_best`](crate::ops::keep_best)): of equals the lower token, and what is no number comes last.

use super::{
    best as this,
    launch::{Numbers, cubes, launch},
    layout::no_number,
};
use cubecl::prelude::*;

/// Units of a cube.
pub(crate) const UNITS: usize = 256;
/// Numbers that a cube looks through.
pub(crate) const CHUNK: usize = 4096;
/// Units, and results, that are looked through at a time.
const SIDE: usize = 16;
/// Most that can be asked for: what the cubes of a vocabulary of 262,144 find is one cube's work.
pub(crate) const MOST: usize = 64;

/// An integer for `x`, in the order of f32's `total_cmp`, above 0; NaN as the least number.
#[cube]
fn rank(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let rank = select(bits >> 31 == 1, !bits, bits | 0x8000_0000u32);
    select(no_number(x), 0x007f_ffffu32, rank)
}

/// The number whose [`rank`] is `rank`.
fn number(rank: u32) -> f32 {
    f32::from_bits(if rank >> 31 == 1 { rank & 0x7fff_ffff } else { !rank })
}

/// The `count` best of every chunk of every row, best first: one cube a chunk (x) and row (y).
///
/// `from` has `length` numbers a row in the `first` pass, and `[length][2]` in others: rank, token. So does `out`, as
/// `[row][chunk][count][2]`; where there are no more, ranks are 0.
#[cube(launch_unchecked)]
pub(crate) fn best(from: &Array<u32>, out: &mut Array<u32>, length: u32, count: u32, #[comptime] first: bool) {
    let unit = UNIT_POS as usize;
    let length = length as usize;
    let start = CUBE_POS_X as usize * CHUNK;
    let here = min(length - start, CHUNK);
    let row = CUBE_POS_Y as usize * length + start;
    let mut ranks = SharedMemory::<u32>::new(CHUNK);
    let mut tops = SharedMemory::<u32>::new(UNITS);
    let mut tops_at = SharedMemory::<u32>::new(UNITS);
    let mut bests = SharedMemory::<u32>::new(SIDE);
    let mut bests_at = SharedMemory::<u32>::new(SIDE);
    for index in range_stepped(unit, CHUNK, UNITS) {
        let mut found = 0u32.runtime();
        if index < here {
            if comptime!(first) {
                found = rank(f32::reinterpret(from[row + index]));
            } else {
                found = from[(row + index) * 2];
            }
        }
        ranks[index] = found;
    }
    // A unit looks after the numbers that it has brought.
    let mut top = 0u32.runtime();
    let mut top_at = unit;
    for index in range_stepped(unit, CHUNK, UNITS) {
        if ranks[index] > top {
            top = ranks[index];
            top_at = index;
        }
    }
    let to = (CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * count as usize;
    for round in 0..count as usize {
        tops[unit] = top;
        tops_at[unit] = u32::cast_from(top_at);
        sync_cube();
        if unit < SIDE {
            let mut most = 0u32.runtime();
            let mut most_at = u32::MAX.runtime();
            for other in unit * SIDE..unit * SIDE + SIDE {
                if tops[other] > most || (tops[other] == most && tops_at[other] < most_at) {
                    most = tops[other];
                    most_at = tops_at[other];
                }
            }
            bests[unit] = most;
            bests_at[unit] = most_at;
        }
        sync_cube();
        let mut most = bests[0];
        let mut most_at = bests_at[0];
        for other in 1..SIDE {
            if bests[other] > most || (bests[other] == most && bests_at[other] < most_at) {
                most = bests[other];
                most_at = bests_at[other];
            }
        }
        let place = most_at as usize;
        if unit == 0 {
            out[(to + round) * 2] = most;
            if comptime!(first) {
                out[(to + round) * 2 + 1] = u32::cast_from(start) + most_at;
            } else {
                out[(to + round) * 2 + 1] = from[(row + min(place, here - 1)) * 2 + 1];
            }
        }
        if place % UNITS == unit {
            ranks[place] = 0;
            top = 0;
            top_at = unit;
            for index in range_stepped(unit, CHUNK, UNITS) {
                if ranks[index] > top {
                    top = ranks[index];
                    top_at = index;
                }
            }
        }
    }
}

/// The `count` largest of each of `rows` rows of logits, best first, and their tokens, into `out`. Reads them: 1 launch where
/// there are no more than 4,096, else 2, and the only wait for the device.
///
/// # Panics
/// Where more than [`MOST`] are asked for, or more than there are.
pub(crate) fn read_best<R: Runtime>(
    client: &ComputeClient<R>,
    logits: &Numbers,
    rows: usize,
    count: usize,
    out: &mut Vec<(u32, f32)>,
) {
    let (mut from, mut length, mut first) = (logits.clone(), logits.len / rows, true);
    assert!(count <= MOST.min(length), "{count} of {length} logits");
    loop {
        let chunks = length.div_ceil(CHUNK);
        let found = Numbers::empty(client, rows * chunks * count * 2);
        // SAFETY: a row has `length` numbers, or pairs of them, and `found` room for what every cube finds.
        unsafe {
            launch!(
                client,
                this::best,
                UNITS,
                cubes(chunks, rows, 1),
                [from, found],
                length as u32,
                count as u32,
                first
            );
        }
        (from, length, first) = (found, chunks * count, false);
        if chunks == 1 {
            break;
        }
    }
    let bytes = client.read_one_unchecked(from.handle.clone());
    let words: &[[u8; 4]] = bytes.as_chunks().0;
    out.clear();
    let pairs = words.chunks_exact(2).take(rows * count);
    out.extend(pairs.map(|pair| (u32::from_le_bytes(pair[1]), number(u32::from_le_bytes(pair[0])))));
}
