//! Where every byte of one head's cache lies.

use crate::{
    BLOCK, Error, HeadShape, MAX_HEAD_DIM, Retention,
    channel::{compensate::Correction, lowrank::Projection, predict::Prediction},
    policy::Fix,
    quant::{QUAD, mixed},
    storage::{ALIGN, FloatKind, Form, MIXED_VALUES, StorageKind, TURNED_KEYS, align},
};
use core::ops::Range;
use serde::{Deserialize, Serialize};

/// The bytes of one KV head of one layer, for all sequences that share the pool:
///
/// ```text
/// pages × key block   [T][32]        the thin prefix, channel-major; where masks change, its own behind it
/// pages × value block [32][T′]       token-major
/// slots × ring        keys [D][ring] channel-major, values [ring][D], query energy [D] f32
///         sinks       keys [D][sinks] channel-major, values [sinks][D]
///         correction  [D-T][T+1], see `Correction`; of low-rank keys [D][T+1], see `Projection`; of
///                     predicted ones T more, see `Prediction`
///         ranks       [lanes] and [R + 32] f32, where tokens are evicted by them
/// ```
///
/// A *page* is the room for one block; a *slot* belongs to one sequence. Every part starts at a multiple of
/// [`ALIGN`] bytes from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct HeadLayout {
    /// Channels of a head, D.
    pub head_dim: u16,
    /// Channels kept in the prefix, T.
    pub kept: u16,
    /// First tokens stored whole for good.
    pub sinks: u16,
    /// Newest tokens always stored whole, R.
    pub recent: u16,
    /// How queries make up for what the keys of the prefix lack: [corrected](Correction) for channels, or
    /// [projected](Projection) as the keys are, or by what these are [predicted](Prediction) by.
    pub fix: Fix,
    /// Value channels kept in the prefix, T′.
    pub kept_values: u16,
    /// Whether masks are chosen anew in the course of a sequence, so that every key block carries its own, as D bits. Not
    /// together with a fix.
    pub renews: bool,
    /// Sequences.
    pub slots: u16,
    /// Blocks that fit, over all sequences.
    pub pages: u32,
    /// How keys are stored.
    pub keys: StorageKind,
    /// How values are stored.
    pub values: StorageKind,
    /// Lanes of a slot's thin blocks, whose tokens are ranked; 0 where none is evicted by its rank.
    pub ranked: u32,
}

impl HeadLayout {
    /// The layout for a shape fixed at compile time, without sinks and corrections, with whole values.
    #[must_use]
    pub const fn of<S: HeadShape>(recent: u16, pages: u32, keys: StorageKind, values: StorageKind) -> Self {
        let (head_dim, kept) = (S::HEAD_DIM as u16, S::KEPT as u16);
        let (fix, kept_values) = (Fix::None, head_dim);
        Self {
            head_dim,
            kept,
            sinks: 0,
            recent,
            fix,
            kept_values,
            renews: false,
            slots: 1,
            pages,
            keys,
            values,
            ranked: 0,
        }
    }

    /// Checks the numbers against each other.
    ///
    /// # Errors
    /// [`Error::HeadDim`], [`Error::Kept`], [`Error::Inconsistent`] for parts that do not go together, or
    /// [`Error::Capacity`] where the bytes cannot be counted in a `usize`.
    pub const fn check(&self) -> Result<(), Error> {
        let (head_dim, kept) = (self.head_dim as usize, self.kept as usize);
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { head_dim });
        }
        if kept == 0 || kept > head_dim {
            return Err(Error::Kept { kept, head_dim });
        }
        let kept_values = self.kept_values as usize;
        if kept_values == 0 || kept_values > head_dim {
            return Err(Error::Kept { kept: kept_values, head_dim });
        }
        if self.keys.turns() {
            return Err(TURNED_KEYS);
        }
        if self.values.mixed() {
            return Err(MIXED_VALUES);
        }
        if self.predicts() && matches!(self.keys.form(), Form::Float(_)) || self.keys.mixed() && !self.predicts() {
            return Err(Error::Inconsistent { what: "layout" });
        }
        if self.values.turns() && (!head_dim.is_power_of_two() || kept_values < head_dim) {
            return Err(Error::Turned { channels: kept_values, head_dim });
        }
        if self.renews && !matches!(self.fix, Fix::None) {
            return Err(Error::Inconsistent { what: "layout" });
        }
        let page = (self.key_block_bytes() + self.value_block_bytes()) as u128;
        let total = page * self.pages as u128 + self.slot_bytes() as u128 * self.slots as u128;
        if total > isize::MAX as u128 {
            return Err(Error::Capacity { what: "address space", needed: usize::MAX, capacity: isize::MAX as usize });
        }
        Ok(())
    }

    /// Which tokens stay whole; none goes.
    #[must_use]
    pub const fn retention(&self) -> Retention {
        Retention { sinks: self.sinks as usize, recent: self.recent as usize, window: None, capacity: None }
    }

    /// Tokens that the ring holds, R + 32.
    #[must_use]
    pub const fn ring_capacity(&self) -> usize {
        self.recent as usize + BLOCK
    }

    /// Lanes of a channel of the ring: its capacity in whole blocks.
    #[must_use]
    pub const fn ring_stride(&self) -> usize {
        self.ring_capacity().next_multiple_of(BLOCK)
    }

    /// Bytes of a thin key block, with its mask if it has one.
    #[must_use]
    pub const fn key_block_bytes(&self) -> usize {
        self.mask_at() + if self.renews { align((self.head_dim as usize).div_ceil(8)) } else { 0 }
    }

    /// Where the mask of a key block begins: behind its keys.
    pub(crate) const fn mask_at(&self) -> usize {
        self.keys.key_block_bytes(self.kept as usize)
    }

    /// Bytes of a value block.
    #[must_use]
    pub const fn value_block_bytes(&self) -> usize {
        self.values.value_block_bytes(self.kept_values as usize)
    }

    /// Bytes of the ring's keys of one slot.
    #[must_use]
    pub const fn ring_key_bytes(&self) -> usize {
        align(self.head_dim as usize * self.ring_stride() * self.keys.ring().bytes())
    }

    /// Bytes of the ring's values of one slot.
    #[must_use]
    pub const fn ring_value_bytes(&self) -> usize {
        align(self.ring_capacity() * self.head_dim as usize * self.values.ring().bytes())
    }

    /// Bytes of the query energies of one slot.
    #[must_use]
    pub const fn energy_bytes(&self) -> usize {
        align(self.head_dim as usize * size_of::<f32>())
    }

    /// Bytes of the keys of the sinks of one slot.
    #[must_use]
    pub const fn sink_key_bytes(&self) -> usize {
        let (sinks, head_dim) = (self.sinks as usize, self.head_dim as usize);
        // Blocks of 32 lanes are read from every channel, as if they lay further apart.
        if sinks == 0 {
            0
        } else {
            align(((head_dim - 1) * sinks + sinks.next_multiple_of(BLOCK)) * self.keys.ring().bytes())
        }
    }

    /// Bytes of the values of the sinks of one slot.
    #[must_use]
    pub const fn sink_value_bytes(&self) -> usize {
        align(self.sinks as usize * self.head_dim as usize * self.values.ring().bytes())
    }

    /// In what numbers corrections are stored: half precision, if keys have no more.
    #[must_use]
    pub const fn correction_kind(&self) -> FloatKind {
        match self.keys.ring() {
            FloatKind::F32 => FloatKind::F32,
            _ => FloatKind::F16,
        }
    }

    /// Bytes of the correction of one slot.
    #[must_use]
    pub const fn correction_bytes(&self) -> usize {
        let (head_dim, kept) = (self.head_dim as usize, self.kept as usize);
        // As for the keys of sinks.
        let numbers = match self.fix {
            Fix::Predictive => Prediction::len(head_dim, kept),
            _ if kept == head_dim => return 0,
            Fix::None => return 0,
            Fix::Compensated => Correction::len(head_dim, kept),
            Fix::Lowrank => Projection::columns_len(head_dim, kept),
        };
        align((numbers + BLOCK) * self.correction_kind().bytes())
    }

    /// Floats of scratch memory that [`correct`](crate::HeadMut::correct) takes where moments are known.
    #[must_use]
    pub const fn scratch_len(&self) -> usize {
        let (head_dim, kept) = (self.head_dim as usize, self.kept as usize);
        match self.fix {
            Fix::None => 0,
            Fix::Compensated => Correction::scratch_len(kept),
            Fix::Lowrank => Projection::scratch_len(head_dim) + Projection::len(head_dim, kept),
            Fix::Predictive => Prediction::scratch_len(head_dim, kept),
        }
    }

    /// By how much more than their share of what as many channels take on average key blocks of fewer or more channels can
    /// take: codes come in quads, and blocks in whole lines.
    #[must_use]
    pub(crate) const fn key_block_slack(&self) -> usize {
        let kept = self.kept as usize;
        match self.keys.form() {
            Form::Float(_) => 0,
            Form::Codes(kind) | Form::Turned(kind) => {
                let most = kept * kind.bytes(QUAD) / QUAD + kind.bytes(QUAD) + ALIGN;
                most - self.mask_at()
            }
            Form::Mixed => mixed::most_bytes(kept) - self.mask_at(),
        }
    }

    /// The most bytes that the correction takes at any T.
    #[must_use]
    pub(crate) const fn most_correction_bytes(&self) -> usize {
        let (mut kept, mut most) = (1, 0);
        while kept <= self.head_dim {
            let bytes = Self { kept, ..*self }.correction_bytes();
            most = if bytes > most { bytes } else { most };
            kept += 1;
        }
        most
    }

    /// Whether the prefix lacks value channels.
    #[must_use]
    pub const fn thins_values(&self) -> bool {
        self.kept_values < self.head_dim
    }

    /// Whether the prefix holds coordinates of keys, or what their channels do not tell of each other, and not channels:
    /// queries then meet it through the columns of the correction, all of them.
    #[must_use]
    pub const fn projects(&self) -> bool {
        matches!(self.fix, Fix::Lowrank) && self.kept < self.head_dim || self.predicts()
    }

    /// Whether the prefix holds what channels of keys do not tell of each other, see [`Prediction`].
    #[must_use]
    pub const fn predicts(&self) -> bool {
        matches!(self.fix, Fix::Predictive)
    }

    const fn slot_bytes(&self) -> usize {
        self.ring_key_bytes()
            + self.ring_value_bytes()
            + self.energy_bytes()
            + self.sink_key_bytes()
            + self.sink_value_bytes()
            + self.correction_bytes()
            + self.rank_bytes()
    }

    /// Bytes of the ranks of one slot: of its thin lanes, and of the tokens of its ring.
    #[must_use]
    pub const fn rank_bytes(&self) -> usize {
        if self.ranked == 0 { 0 } else { align((self.ranked as usize + self.ring_capacity()) * size_of::<f32>()) }
    }

    /// All bytes of the head.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.slot_start(self.slots as usize)
    }

    /// Where the key block of `page` lies.
    #[must_use]
    pub const fn key_block(&self, page: usize) -> Range<usize> {
        let len = self.key_block_bytes();
        page * len..(page + 1) * len
    }

    /// Where the value block of `page` lies.
    #[must_use]
    pub const fn value_block(&self, page: usize) -> Range<usize> {
        let len = self.value_block_bytes();
        let start = self.key_block(self.pages as usize).start;
        start + page * len..start + (page + 1) * len
    }

    const fn slot_start(&self, slot: usize) -> usize {
        self.value_block(self.pages as usize).start + slot * self.slot_bytes()
    }

    /// Where the ring's keys of `slot` lie.
    #[must_use]
    pub const fn ring_keys(&self, slot: usize) -> Range<usize> {
        let start = self.slot_start(slot);
        start..start + self.ring_key_bytes()
    }

    /// Where the ring's values of `slot` lie.
    #[must_use]
    pub const fn ring_values(&self, slot: usize) -> Range<usize> {
        let start = self.ring_keys(slot).end;
        start..start + self.ring_value_bytes()
    }

    /// Where the query energies of `slot` lie.
    #[must_use]
    pub const fn energy(&self, slot: usize) -> Range<usize> {
        let start = self.ring_values(slot).end;
        start..start + self.energy_bytes()
    }

    /// Where the keys of the sinks of `slot` lie.
    #[must_use]
    pub const fn sink_keys(&self, slot: usize) -> Range<usize> {
        let start = self.energy(slot).end;
        start..start + self.sink_key_bytes()
    }

    /// Where the values of the sinks of `slot` lie.
    #[must_use]
    pub const fn sink_values(&self, slot: usize) -> Range<usize> {
        let start = self.sink_keys(slot).end;
        start..start + self.sink_value_bytes()
    }

    /// Where the correction of `slot` lies.
    #[must_use]
    pub const fn correction(&self, slot: usize) -> Range<usize> {
        let start = self.sink_values(slot).end;
        start..start + self.correction_bytes()
    }

    /// Where the ranks of `slot` lie.
    #[must_use]
    pub const fn ranks(&self, slot: usize) -> Range<usize> {
        let start = self.correction(slot).end;
        start..start + self.rank_bytes()
    }

    /// Blocks that one sequence of `tokens` tokens can take, however they came: all but the newest R, in whole blocks.
    #[must_use]
    pub const fn blocks_for(tokens: usize, recent: usize) -> usize {
        tokens.saturating_sub(recent).div_ceil(BLOCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Head;
    use std::vec::Vec;

    const LAYOUT: HeadLayout = HeadLayout::of::<Head<64, 500>>(32, 10, StorageKind::F16, StorageKind::F32);

    #[test]
    fn bytes_of_a_known_shape() {
        // 10 × 32·32·2 keys, 10 × 32·64·4 values, ring 64·64·2 + 64·64·4, energy 64·4.
        const BYTES: usize = LAYOUT.bytes();
        assert_eq!(BYTES, 20480 + 81920 + 8192 + 16384 + 256);
    }

    #[test]
    fn parts_tile_the_region() {
        let layout = HeadLayout { kept: 13, recent: 20, slots: 3, head_dim: 72, sinks: 5, ..LAYOUT };
        let layout = HeadLayout { fix: Fix::Compensated, kept_values: 40, ranked: 70, ..layout };
        let mut parts: Vec<Range<usize>> = Vec::new();
        parts.extend((0..10).map(|page| layout.key_block(page)));
        parts.extend((0..10).map(|page| layout.value_block(page)));
        for slot in 0..3 {
            parts.extend([layout.ring_keys(slot), layout.ring_values(slot), layout.energy(slot)]);
            parts.extend([
                layout.sink_keys(slot),
                layout.sink_values(slot),
                layout.correction(slot),
                layout.ranks(slot),
            ]);
        }
        let mut end = 0;
        for part in parts {
            assert_eq!(part.start, end);
            assert_eq!(part.start % crate::storage::ALIGN, 0);
            end = part.end;
        }
        assert_eq!(end, layout.bytes());
    }

    #[test]
    fn absurd_layouts_are_refused() {
        assert!(HeadLayout { kept: 65, ..LAYOUT }.check().is_err());
        assert!(HeadLayout { kept: 0, ..LAYOUT }.check().is_err());
        assert!(HeadLayout { kept_values: 0, ..LAYOUT }.check().is_err());
        assert!(HeadLayout { head_dim: 257, ..LAYOUT }.check().is_err());
        assert!(HeadLayout { slots: u16::MAX, pages: u32::MAX, ..LAYOUT }.check().is_ok());
    }
}
