//! GGUF's weight formats as kernels read them: the bytes of the file, seen as 32-bit words.
//!
//! A unit unpacks eight weights at a time, a piece: what one word of codes holds, so that neighbouring units read
//! neighbouring words. They are two runs of four columns, since most formats keep distant weights in the two halves of a
//! byte. Blocks need not begin with a word, but always with half of one.

use super::layout::from_half;
use crate::format::WeightFormat;
use cubecl::prelude::*;

/// Weights of a piece.
pub(crate) const PIECE: usize = 8;
/// Units of a cube that unpacks.
pub(crate) const UNITS: usize = 128;
/// Most cubes that unpack at once; each takes several turns where there is more to do.
pub(crate) const CUBES: usize = 16_384;

/// A matrix in one format, as kernels are compiled for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Packed {
    /// How weights are stored.
    pub(crate) format: WeightFormat,
    /// Columns.
    pub(crate) cols: usize,
}

impl Packed {
    /// Half words of a row: every block is a whole number of them.
    pub(crate) fn row(self) -> usize {
        self.format.row_bytes(self.cols).expect("matrices check their shape") / 2
    }

    /// Pieces of a row; of floats the last one may reach beyond it.
    pub(crate) fn pieces(self) -> usize {
        self.cols.div_ceil(PIECE)
    }

    /// From the first run of a piece to the second, in columns.
    pub(crate) fn gap(self) -> usize {
        match self.format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 | WeightFormat::Q8_0 => 4,
            WeightFormat::Q4_0 | WeightFormat::Q4_1 | WeightFormat::Q5_0 | WeightFormat::Q5_1 => 16,
            WeightFormat::Q4K | WeightFormat::Q5K => 32,
            WeightFormat::Q6K => 64,
        }
    }

    /// Whether a piece may reach beyond the row.
    pub(crate) fn ragged(self) -> bool {
        !self.cols.is_multiple_of(PIECE)
    }

    /// Half words of a block, for formats of 32 weights a block.
    fn block(self) -> usize {
        self.format.block_bytes() / 2
    }

    /// Where in such a block the minimum, the fifth bits and the codes lie, in half words; `None` where it has none.
    fn parts(self) -> (Option<usize>, Option<usize>, usize) {
        match self.format {
            WeightFormat::Q4_1 => (Some(1), None, 2),
            WeightFormat::Q5_0 => (None, Some(1), 3),
            WeightFormat::Q5_1 => (Some(1), Some(2), 4),
            _ => (None, None, 1),
        }
    }

    /// What codes are counted from where there is no minimum.
    fn zero(self) -> f32 {
        match self.format {
            WeightFormat::Q4_0 => 8.0,
            WeightFormat::Q5_0 => 16.0,
            _ => 0.0,
        }
    }
}

/// Half word `at`.
#[cube]
fn half(words: &Array<u32>, at: usize) -> u32 {
    (words[at / 2] >> (u32::cast_from(at % 2) * 16)) & 0xffff
}

/// The word that begins with half word `at`. A word beyond the last one is read, and does not count.
#[cube]
fn word(words: &Array<u32>, at: usize) -> u32 {
    let low = words[at / 2];
    select(at % 2 == 1, (low >> 16) | (words[at / 2 + 1] << 16), low)
}

/// Byte `place` of a word as a signed number.
#[cube]
fn signed(word: u32, place: u32) -> f32 {
    f32::cast_from(((word >> (8 * place)) & 0xff) ^ 0x80) - 128.0
}

/// Column of the first weight of piece `index`; the second run of four is [`Packed::gap`] behind it.
#[cube]
pub(crate) fn column(index: usize, #[comptime] packed: Packed) -> usize {
    let gap = comptime!(packed.gap());
    if comptime!(gap == 4) {
        index * PIECE
    } else if comptime!(gap == 16) {
        index / 4 * 32 + index % 4 * 4
    } else if comptime!(gap == 32) {
        index / 8 * 64 + index % 8 * 4
    } else {
        index / 16 * 128 + index % 16 / 8 * 32 + index % 8 * 4
    }
}

/// Writes the weights of piece `index` of the row that begins with half word `row` to `weights[at..at + 8]`; those beyond
/// the row are zeros.
#[cube]
pub(crate) fn unpack(
    words: &Array<u32>,
    row: usize,
    index: usize,
    weights: &mut Array<f32>,
    #[comptime] at: usize,
    #[comptime] packed: Packed,
) {
    let format = comptime!(packed.format);
    if comptime!(matches!(format, WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16)) {
        #[unroll]
        for k in 0..8usize {
            let mut column = index * PIECE + k;
            let inside = column < comptime!(packed.cols);
            if comptime!(packed.ragged()) {
                column = select(inside, column, 0);
            }
            let x = if comptime!(format == WeightFormat::F32) {
                f32::reinterpret(words[row / 2 + column])
            } else if comptime!(format == WeightFormat::F16) {
                from_half(half(words, row + column))
            } else {
                f32::reinterpret(half(words, row + column) << 16)
            };
            if comptime!(packed.ragged()) {
                weights[comptime!(at + k)] = select(inside, x, f32::new(0.0));
            } else {
                weights[comptime!(at + k)] = x;
            }
        }
    } else if comptime!(format == WeightFormat::Q8_0) {
        let block = row + index / 4 * comptime!(packed.block());
        let scale = from_half(half(words, block));
        let first = word(words, block + 1 + index % 4 * 4);
        let second = word(words, block + 3 + index % 4 * 4);
        #[unroll]
        for k in 0..4u32 {
            weights[comptime!(at + k as usize)] = signed(first, k) * scale;
            weights[comptime!(at + 4 + k as usize)] = signed(second, k) * scale;
        }
    } else if comptime!(matches!(format, WeightFormat::Q4K | WeightFormat::Q5K)) {
        unpack_groups(words, row, index, weights, at, packed);
    } else if comptime!(format == WeightFormat::Q6K) {
        let block = row + index / 32 * comptime!(packed.block());
        let piece = index % 32;
        let low = word(words, block + piece * 2);
        let high = word(words, block + 64 + piece / 16 * 16 + piece % 8 * 2);
        // High bits of the four quarters of half a block lie in one byte.
        let quarter = u32::cast_from(piece % 16 / 8);
        let sixteenth = piece / 16 * 8 + piece % 16 / 8 * 2 + piece % 8 / 4;
        let scale = from_half(half(words, block + 104));
        let scales = half(words, block + 96 + sixteenth / 2);
        let shift = u32::cast_from(sixteenth % 2);
        let first_scale = scale * signed(scales, shift);
        // The second run is four sixteenths on.
        let scales = half(words, block + 98 + sixteenth / 2);
        let second_scale = scale * signed(scales, shift);
        #[unroll]
        for k in 0..4u32 {
            let a = (low >> comptime!(8 * k)) & 15;
            let b = (low >> comptime!(8 * k + 4)) & 15;
            let a = a | (((high >> (comptime!(8 * k).runtime() + 2 * quarter)) & 3) << 4);
            let b = b | (((high >> (comptime!(8 * k + 4).runtime() + 2 * quarter)) & 3) << 4);
            weights[comptime!(at + k as usize)] = (f32::cast_from(a) - 32.0) * first_scale;
            weights[comptime!(at + 4 + k as usize)] = (f32::cast_from(b) - 32.0) * second_scale;
        }
    } else {
        let parts = comptime!(packed.parts());
        let block = row + index / 4 * comptime!(packed.block());
        let place = index % 4;
        let scale = from_half(half(words, block));
        let codes = word(words, block + comptime!(parts.2) + place * 2);
        let mut minimum = comptime!(-packed.zero()).runtime() * scale;
        if comptime!(parts.0.is_some()) {
            minimum = from_half(half(words, block + comptime!(parts.0.unwrap_or(0))));
        }
        let mut fifth = 0u32.runtime();
        if comptime!(parts.1.is_some()) {
            fifth = word(words, block + comptime!(parts.1.unwrap_or(0))) >> u32::cast_from(place * 4);
        }
        #[unroll]
        for k in 0..4u32 {
            let mut a = (codes >> comptime!(8 * k)) & 15;
            let mut b = (codes >> comptime!(8 * k + 4)) & 15;
            if comptime!(parts.1.is_some()) {
                a |= ((fifth >> comptime!(k)) & 1) << 4;
                b |= ((fifth >> comptime!(k + 16)) & 1) << 4;
            }
            weights[comptime!(at + k as usize)] = f32::cast_from(a) * scale + minimum;
            weights[comptime!(at + 4 + k as usize)] = f32::cast_from(b) * scale + minimum;
        }
    }
}

/// As [`unpack`], of super-blocks with eight groups of 32, whose scales and minima have six bits.
#[cube]
fn unpack_groups(
    words: &Array<u32>,
    row: usize,
    index: usize,
    weights: &mut Array<f32>,
    #[comptime] at: usize,
    #[comptime] packed: Packed,
) {
    let five = comptime!(packed.format == WeightFormat::Q5K);
    // These begin with whole words.
    let block = (row + index / 32 * comptime!(packed.block())) / 2;
    let piece = index % 32;
    let pair = piece / 8;
    let factors = words[block];
    let scale = from_half(factors & 0xffff);
    let minimum = from_half(factors >> 16);
    let a = words[block + 1];
    let b = words[block + 2];
    let c = words[block + 3];
    // Groups 0..4 have their six bits in a and b; groups 4..8 four bits in c and two in the tops of a and b.
    let shift = u32::cast_from(pair % 2) * 16;
    let early = pair < 2;
    let scales = select(early, a & 0x3f3f_3f3f, (c & 0x0f0f_0f0f) | ((a >> 2) & 0x3030_3030)) >> shift;
    let minima = select(early, b & 0x3f3f_3f3f, ((c >> 4) & 0x0f0f_0f0f) | ((b >> 2) & 0x3030_3030)) >> shift;
    let first_scale = scale * f32::cast_from(scales & 0xff);
    let second_scale = scale * f32::cast_from((scales >> 8) & 0xff);
    let first_minimum = minimum * f32::cast_from(minima & 0xff);
    let second_minimum = minimum * f32::cast_from((minima >> 8) & 0xff);
    let codes = words[block + comptime!(if five { 12 } else { 4 }) + piece];
    let mut fifth = 0u32.runtime();
    if comptime!(five) {
        fifth = words[block + 4 + piece % 8] >> (2 * u32::cast_from(pair));
    }
    #[unroll]
    for k in 0..4u32 {
        let mut low = (codes >> comptime!(8 * k)) & 15;
        let mut high = (codes >> comptime!(8 * k + 4)) & 15;
        if comptime!(five) {
            low |= ((fifth >> comptime!(8 * k)) & 1) << 4;
            high |= ((fifth >> comptime!(8 * k + 1)) & 1) << 4;
        }
        weights[comptime!(at + k as usize)] = f32::cast_from(low) * first_scale - first_minimum;
        weights[comptime!(at + 4 + k as usize)] = f32::cast_from(high) * second_scale - second_minimum;
    }
}

/// Writes rows of a matrix as f32, `[count][cols]`: those that `list` names where they are `listed`, else those from
/// `first` on.
#[cube(launch_unchecked)]
pub(crate) fn dequantise(
    words: &Array<u32>,
    list: &Array<u32>,
    out: &mut Array<f32>,
    first: u32,
    count: u32,
    #[comptime] packed: Packed,
    #[comptime] listed: bool,
) {
    let pieces = comptime!(packed.pieces());
    let cols = comptime!(packed.cols);
    let mut weights = Array::<f32>::new(PIECE);
    let step = CUBE_COUNT_X as usize * UNITS;
    for index in range_stepped(CUBE_POS_X as usize * UNITS + UNIT_POS as usize, count as usize * pieces, step) {
        let to = index / pieces;
        let piece = index % pieces;
        let mut row = first as usize + to;
        if comptime!(listed) {
            row = list[to] as usize;
        }
        unpack(words, row * comptime!(packed.row()), piece, &mut weights, 0usize, packed);
        let start = column(piece, packed);
        #[unroll]
        for k in 0..8usize {
            let column = start + comptime!(if k < 4 { k } else { packed.gap() + k - 4 });
            if comptime!(packed.ragged()) {
                if column < cols {
                    out[to * cols + column] = weights[k];
                }
            } else {
                out[to * cols + column] = weights[k];
            }
        }
    }
}
