//! Where things lie on the device: core's bytes, seen as 32-bit words.
//!
//! The cache of a layer is one buffer with the bytes of all its heads, each as core's `HeadLayout` says. Kernels
//! find their way by tables of numbers: one entry [a head](head), made when the cache is laid out, since T differs
//! from head to head, one [a row](row) that attends, and one [a step](step) that admits tokens.
//!
//! Numbers of half precision are taken out of words and put into them with integer instructions: the same bits
//! whatever the device does about rounding, and no need for it to know types of 16 bits.

use cubecl::prelude::*;
use thinkey_core::{
    quant::CodeKind,
    storage::{FloatKind, Form, StorageKind},
};

/// Tokens of a block.
pub(crate) const BLOCK: usize = 32;

/// Fields of an entry of the table of heads; places and lengths are in words of the layer's buffer.
pub(crate) mod head {
    /// Channels kept, T.
    pub(crate) const KEPT: usize = 0;
    /// Where key blocks begin.
    pub(crate) const KEYS: usize = 1;
    /// Length of a key block.
    pub(crate) const KEY_BLOCK: usize = 2;
    /// Where value blocks begin.
    pub(crate) const VALUES: usize = 3;
    /// Length of a value block.
    pub(crate) const VALUE_BLOCK: usize = 4;
    /// Where the ring's keys of slot 0 lie.
    pub(crate) const SLOT: usize = 5;
    /// Length of what a slot has beside blocks.
    pub(crate) const SLOT_WORDS: usize = 6;
    /// The ring's values, from the ring's keys on.
    pub(crate) const RING_VALUES: usize = 7;
    /// Query energies, likewise.
    pub(crate) const ENERGY: usize = 8;
    /// Keys of sinks, likewise.
    pub(crate) const SINK_KEYS: usize = 9;
    /// Values of sinks, likewise.
    pub(crate) const SINK_VALUES: usize = 10;
    /// The correction, likewise.
    pub(crate) const CORRECTION: usize = 11;
    /// Fields of an entry.
    pub(crate) const FIELDS: usize = 12;
}

/// Fields of an entry of the table of rows that attend.
pub(crate) mod row {
    /// Slot of its sequence.
    pub(crate) const SLOT: usize = 0;
    /// Whole first tokens.
    pub(crate) const SINKS: usize = 1;
    /// Thin blocks.
    pub(crate) const BLOCKS: usize = 2;
    /// Lanes that the row does not see, counted from the first block.
    pub(crate) const UNSEEN: usize = 3;
    /// Whole recent tokens.
    pub(crate) const RECENT: usize = 4;
    /// The first of these that the row sees.
    pub(crate) const SEEN: usize = 5;
    /// Where its page table begins.
    pub(crate) const PAGES: usize = 6;
    /// Fields of an entry.
    pub(crate) const FIELDS: usize = 7;
}

/// Fields of an entry of the table of steps, see `thinkey_core::Admission`.
pub(crate) mod step {
    /// Slot of the sequence.
    pub(crate) const SLOT: usize = 0;
    /// Row of its first new token.
    pub(crate) const ROW: usize = 1;
    /// New tokens.
    pub(crate) const NEW: usize = 2;
    /// Tokens in the ring before.
    pub(crate) const HELD: usize = 3;
    /// Whole tokens that leave the ring.
    pub(crate) const THINNED: usize = 4;
    /// New tokens that become sinks.
    pub(crate) const SUNK: usize = 5;
    /// Sinks before.
    pub(crate) const SINKS: usize = 6;
    /// Tokens in the ring after.
    pub(crate) const RECENT: usize = 7;
    /// Where the page table after the step begins.
    pub(crate) const PAGES: usize = 8;
    /// The first block that is written, in the page table.
    pub(crate) const FIRST: usize = 9;
    /// Blocks that are written.
    pub(crate) const BLOCKS: usize = 10;
    /// How many of the blocks that the step fills come before these: they are dropped at once.
    pub(crate) const SKIPPED: usize = 11;
    /// Newest rows whose queries count for the score.
    pub(crate) const COUNTED: usize = 12;
    /// Whether query energies of before are forgotten.
    pub(crate) const FORGETS: usize = 13;
    /// Whether channels are chosen.
    pub(crate) const CHOOSES: usize = 14;
    /// Query rows of each query head in the energies, those of the step included.
    pub(crate) const SCORED: usize = 15;
    /// Every so many keys are looked at.
    pub(crate) const EVERY: usize = 16;
    /// The row of queries that is the first of those that count.
    pub(crate) const QUERIES: usize = 17;
    /// Fields of an entry.
    pub(crate) const FIELDS: usize = 18;
}

/// What is the same for all heads of a cache, known when a kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Channels of a head, D; even.
    pub(crate) dim: usize,
    /// Query heads of a cached head, G.
    pub(crate) group: usize,
    /// How keys are stored.
    pub(crate) keys: StorageKind,
    /// How values are stored.
    pub(crate) values: StorageKind,
    /// Most sinks.
    pub(crate) sinks: usize,
    /// Lanes of a channel of the ring.
    pub(crate) stride: usize,
    /// Whether queries are corrected.
    pub(crate) corrected: bool,
    /// Caches of a KV head.
    pub(crate) copies: usize,
    /// Width of a row of queries: those of head 0 come first.
    pub(crate) queries_width: usize,
    /// Width of a row of keys and values, which may be the same rows.
    pub(crate) width: usize,
    /// Where its keys begin.
    pub(crate) keys_at: usize,
    /// Where its values begin.
    pub(crate) values_at: usize,
}

impl Shape {
    /// In what numbers corrections are stored.
    pub(crate) fn correction(&self) -> FloatKind {
        match self.keys.ring() {
            FloatKind::F32 => FloatKind::F32,
            _ => FloatKind::F16,
        }
    }

    /// Numbers that a share of tokens gives for a query head, see [`attend`](super::attention::attend): the mix of turned
    /// values comes apart.
    pub(crate) fn partial(&self) -> usize {
        2 + if self.values.turns() { 2 * self.dim } else { self.dim }
    }

    /// Floats of the queries of a row and head: whole, as the prefix takes them, and what is added.
    pub(crate) fn queries(&self) -> usize {
        self.group * (2 * self.dim + 1)
    }
}

/// Bits of a code; 0 where numbers are stored by themselves.
pub(crate) fn bits(kind: StorageKind) -> u32 {
    match kind.form() {
        Form::Float(_) | Form::Mixed => 0,
        Form::Codes(kind) | Form::Turned(kind) => CodeKind::bits(kind) as u32,
    }
}

/// Words of the codes of four groups.
pub(crate) fn quad_words(kind: StorageKind) -> usize {
    match kind.form() {
        Form::Float(_) | Form::Mixed => 0,
        Form::Codes(kind) | Form::Turned(kind) => CodeKind::quad_bytes(kind) / 4,
    }
}

/// Whether `x` is NaN, by its bits: comparisons may be compiled as if there were none.
#[cube]
pub(crate) fn no_number(x: f32) -> bool {
    (u32::reinterpret(x) & 0x7fff_ffff) > 0x7f80_0000
}

/// The binary16 number whose bits are the low 16 of `bits`; what core stores is finite.
#[cube]
pub(crate) fn from_half(bits: u32) -> f32 {
    let magnitude = bits & 0x7fff;
    let normal = f32::reinterpret((magnitude << 13) + 0x3800_0000);
    // 2^-24: a subnormal of half precision need not be one that a device flushes to zero.
    let small = f32::cast_from(magnitude) * 5.960_464_5e-8f32;
    let x = select(magnitude < 0x400, small, normal);
    f32::reinterpret(u32::reinterpret(x) | ((bits & 0x8000) << 16))
}

/// The bits of the nearest binary16 number, ties to even; beyond the range the largest, and NaN stays NaN. As core's.
#[cube]
pub(crate) fn to_half(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let clamped = min(magnitude, 0x477f_e000);
    let small = u32::reinterpret(f32::reinterpret(clamped) + 0.5f32) - 0x3f00_0000;
    // Of small numbers this wraps, and is not taken.
    let normal = (clamped + 0xfff + ((clamped >> 13) & 1) - 0x3800_0000) >> 13;
    let half = min(select(clamped < 0x3880_0000, small, normal), 0x7bff);
    select(magnitude > 0x7f80_0000, 0x7e00u32, half | sign)
}

/// The bits of the nearest bfloat16 number, as [`to_half`].
#[cube]
pub(crate) fn to_brain(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let magnitude = bits & 0x7fff_ffff;
    let rounded = min((magnitude + 0x7fff + ((bits >> 16) & 1)) >> 16, 0x7f7f);
    select(magnitude > 0x7f80_0000, 0x7fc0u32, rounded | ((bits >> 16) & 0x8000))
}

/// Number `index` of those of `kind` that begin at word `base`.
#[cube]
pub(crate) fn number(words: &Array<u32>, base: usize, index: usize, #[comptime] kind: FloatKind) -> f32 {
    if comptime!(kind == FloatKind::F32) {
        f32::reinterpret(words[base + index])
    } else {
        let half = words[base + index / 2] >> (u32::cast_from(index % 2) * 16);
        if comptime!(kind == FloatKind::F16) { from_half(half & 0xffff) } else { f32::reinterpret(half << 16) }
    }
}

/// The bits of `x` as a number of `kind`.
#[cube]
pub(crate) fn stored(x: f32, #[comptime] kind: FloatKind) -> u32 {
    if comptime!(kind == FloatKind::F32) {
        u32::reinterpret(x)
    } else if comptime!(kind == FloatKind::F16) {
        to_half(x)
    } else {
        to_brain(x)
    }
}

/// Where the ring's keys of `slot` begin, and with them what a slot has beside blocks: places there are counted from here on.
/// `table` is where the entry of the head begins.
#[cube]
pub(crate) fn ring(heads: &Array<u32>, table: usize, slot: usize) -> usize {
    heads[table + head::SLOT] as usize + slot * heads[table + head::SLOT_WORDS] as usize
}

/// Where the key of cached head `at` lies in the row of the first new token of a step, whose entry begins at `entry`.
#[cube]
pub(crate) fn new_keys(steps: &Array<u32>, entry: usize, at: usize, #[comptime] shape: Shape) -> usize {
    steps[entry + step::ROW] as usize * comptime!(shape.width)
        + comptime!(shape.keys_at)
        + at / comptime!(shape.copies) * comptime!(shape.dim)
}

/// Channel `channel` of the key, or value, of whole token `token`: of the ring, whose keys (channel after channel) or values
/// (token after token) begin at word `ring`, where it is one of `held`, else of the rows of `fused`, in which that of token
/// `held` begins at `new`.
#[cube]
pub(crate) fn whole(
    arena: &Array<u32>,
    fused: &Array<f32>,
    ring: usize,
    new: usize,
    held: usize,
    token: usize,
    channel: usize,
    #[comptime] keys: bool,
    #[comptime] shape: Shape,
) -> f32 {
    if token >= held {
        fused[new + (token - held) * comptime!(shape.width) + channel]
    } else if comptime!(keys) {
        number(arena, ring, channel * comptime!(shape.stride) + token, comptime!(shape.keys.ring()))
    } else {
        number(arena, ring, token * comptime!(shape.dim) + channel, comptime!(shape.values.ring()))
    }
}

/// The word of a quad that holds the codes of place `index` of its four groups, one a byte (below
/// [`shift`](code_shift) bits).
#[cube]
pub(crate) fn code_word(index: usize, #[comptime] bits: u32) -> usize {
    if comptime!(bits == 8) {
        index
    } else if comptime!(bits == 4) {
        index % 16
    } else {
        index % 8
    }
}

/// How far the code of place `index` lies from the bottom of its byte.
#[cube]
pub(crate) fn code_shift(index: usize, #[comptime] bits: u32) -> u32 {
    if comptime!(bits == 8) {
        0u32.runtime()
    } else if comptime!(bits == 4) {
        u32::cast_from(index / 16) * 4
    } else {
        u32::cast_from(index / 8) * 2
    }
}

/// The codes of place `index` of the four groups of the quad at word `quad`, one a byte.
#[cube]
pub(crate) fn codes(words: &Array<u32>, quad: usize, index: usize, #[comptime] bits: u32) -> u32 {
    let low = words[quad + code_word(index, bits)] >> code_shift(index, bits);
    if comptime!(bits == 8) {
        low
    } else if comptime!(bits == 4) {
        low & 0x0f0f_0f0f
    } else if comptime!(bits == 2) {
        low & 0x0303_0303
    } else {
        let high = words[quad + 8 + index % 4] >> u32::cast_from(index / 4);
        (low & 0x0303_0303) | ((high & 0x0101_0101) << 2)
    }
}

/// The code in byte `place` of four.
#[cube]
pub(crate) fn code(codes: u32, #[comptime] place: u32) -> f32 {
    f32::cast_from((codes >> comptime!(8 * place)) & 0xff)
}
