//! What one head holds of one sequence, as bytes and back: see [`snapshot`](crate::snapshot).

use super::{HeadMut, HeadRef, Masks, check};
use crate::{BLOCK, ChannelMask, Error, HeadLayout, Span, error::check_len};
use core::ops::Range;

impl HeadLayout {
    /// What lies in a slot beside its ranks: from the keys of the ring to the correction.
    const fn slot_parts(&self, slot: usize) -> Range<usize> {
        self.ring_keys(slot).start..self.correction(slot).end
    }

    /// Bytes of a mask as bits.
    const fn mask_bytes(&self) -> usize {
        (self.head_dim as usize).div_ceil(8)
    }

    /// Bytes that a head holding `span` takes in a [snapshot](crate::snapshot), with or without masks.
    #[must_use]
    pub const fn snapshot_bytes(&self, span: Span, masks: bool) -> usize {
        let (slot, blocks) = (self.slot_parts(0), span.blocks as usize);
        let masks = if masks { 2 * self.mask_bytes() } else { 0 };
        let ranks = if self.ranked == 0 { 0 } else { blocks * BLOCK + span.recent as usize };
        let blocks = blocks * (self.key_block_bytes() + self.value_block_bytes());
        1 + masks + blocks + (slot.end - slot.start) + ranks * size_of::<f32>()
    }
}

impl HeadRef<'_> {
    /// Shows `out` what the head holds, part after part as in a [snapshot](crate::snapshot):
    /// [`snapshot_bytes`](HeadLayout::snapshot_bytes) together.
    ///
    /// # Errors
    /// Where the ranks are not in the layout.
    pub fn save(&self, mut out: impl FnMut(&[u8])) -> Result<(), Error> {
        let Self { layout, bytes, slot, span, masks, .. } = self;
        out(&[u8::from(masks.is_some())]);
        if let Some(Masks { keys, values }) = masks {
            for mask in [keys, values] {
                let mut bits = [0; crate::MAX_HEAD_DIM / 8];
                mask.to_bits(&mut bits);
                out(&bits[..layout.mask_bytes()]);
            }
        }
        let blocks = span.blocks as usize;
        (0..blocks).for_each(|block| out(self.key_block(block)));
        (0..blocks).for_each(|block| out(self.value_block(block)));
        out(&bytes[layout.slot_parts(*slot)]);
        if layout.ranked > 0 {
            let (lanes, ring) = self.ranks()?;
            lanes.iter().chain(ring).for_each(|rank| out(&rank.to_le_bytes()));
        }
        Ok(())
    }
}

impl HeadMut<'_> {
    /// Makes the head hold what `bytes` of a [snapshot](crate::snapshot) say of `span`, its blocks in the pages `pages`;
    /// returns its masks.
    ///
    /// # Errors
    /// [`Error::Length`] for other bytes than the span takes; as [`HeadRef::new`] and [`HeadRef::block_mask`] where they
    /// cannot be what a head holds. Nothing is written then, unless it is the mask of a block.
    pub fn restore(&mut self, pages: &[u32], span: Span, bytes: &[u8]) -> Result<Option<Masks>, Error> {
        let (layout, slot) = (self.layout, self.slot);
        check(&layout, self.bytes.len(), slot, pages, span)?;
        let flag = bytes.first().copied().unwrap_or_default();
        if flag > 1 {
            return Err(Error::Index { what: "masks of a head", index: flag.into(), limit: 2 });
        }
        check_len("snapshot of a head", layout.snapshot_bytes(span, flag == 1), bytes.len())?;
        let mut rest = &bytes[1..];
        let mut next = |len: usize| rest.split_off(..len).unwrap_or_default();
        let masks = if flag == 1 {
            let mut mask = || ChannelMask::from_bits(layout.head_dim.into(), next(layout.mask_bytes()));
            Some(Masks { keys: mask()?, values: mask()? })
        } else {
            None
        };
        masks.map_or(Ok(()), |masks| masks.check(&layout))?;
        let pages = &pages[..span.blocks as usize];
        for &page in pages {
            self.bytes[layout.key_block(page as usize)].copy_from_slice(next(layout.key_block_bytes()));
        }
        for &page in pages {
            self.bytes[layout.value_block(page as usize)].copy_from_slice(next(layout.value_block_bytes()));
        }
        let parts = layout.slot_parts(slot);
        self.bytes[parts.clone()].copy_from_slice(next(parts.len()));
        if layout.ranked > 0 {
            let (lanes, ring) = self.ranks_mut(span)?;
            for rank in lanes.iter_mut().chain(ring) {
                let bytes = next(size_of::<f32>());
                *rank = bytes.try_into().map(f32::from_le_bytes).unwrap_or_default();
            }
        }
        let head = self.view(pages, span, masks.as_ref())?;
        (0..pages.len()).try_for_each(|block| head.block_mask(block).map(|_| ()))?;
        Ok(masks)
    }
}
