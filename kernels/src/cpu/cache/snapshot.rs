//! What the pool holds of one sequence, as [snapshots](thinkey_core::snapshot) have it.

use super::ThinCache;
use crate::ops::{Cache, Renewal};
use thinkey_core::snapshot::{Progress, SnapshotError};

fn slot_masks(cache: &ThinCache, slot: usize) -> std::ops::Range<usize> {
    let heads = cache.layouts.len();
    slot * heads..(slot + 1) * heads
}

/// How far a sequence is, and the bytes of its heads.
pub(super) fn progress(cache: &ThinCache, slot: usize) -> Result<(Progress, usize), SnapshotError> {
    let state = &cache.slots[slot];
    if state.position == 0 || state.step.is_some() {
        return Err(SnapshotError::Empty);
    }
    let (chosen, since, scored) = state.renewal.parts();
    let (position, since, scored) = (state.position as u32, since as u32, scored as u32);
    let masks = &cache.masks[slot_masks(cache, slot)];
    let bytes =
        cache.layouts.iter().zip(masks).map(|(layout, masks)| layout.snapshot_bytes(state.span, masks.is_some()));
    Ok((Progress { span: state.span, position, chosen, since, scored }, bytes.sum()))
}

/// T of every head, and what the heads hold.
pub(super) fn save(cache: &ThinCache, slot: usize, out: &mut Vec<u8>) -> Result<(), SnapshotError> {
    out.extend(cache.layouts.iter().flat_map(|layout| layout.kept.to_le_bytes()));
    for layer in 0..cache.plan.layers {
        for head in 0..cache.plan.heads() {
            cache.head(layer, head, slot, true)?.save(|bytes| out.extend_from_slice(bytes))?;
        }
    }
    Ok(())
}

/// Into an empty slot, which is to be cleared after an error.
pub(super) fn restore(
    cache: &mut ThinCache,
    slot: usize,
    progress: &Progress,
    kept: &[u16],
    heads: &[u8],
) -> Result<(), SnapshotError> {
    let plan = cache.plan;
    progress.check(plan.sinks, plan.recent, plan.window.is_some() || plan.eviction.is_some())?;
    if progress.position as usize > plan.tokens {
        return Err(SnapshotError::Context { tokens: progress.position, context: plan.tokens as u32 });
    }
    if progress.span.blocks as usize > plan.blocks_per_slot() {
        return Err(SnapshotError::Impossible { what: "blocks" });
    }
    if kept.len() != cache.layouts.len() {
        return Err(SnapshotError::Shape { what: "heads" });
    }
    if cache.layouts.iter().zip(kept).any(|(layout, &kept)| layout.kept != kept) {
        if !plan.flexible {
            return Err(SnapshotError::Shape { what: "channels per head" });
        }
        cache.spread(&|layer, head| kept[layer * plan.heads() + head].into())?;
    }
    for _ in 0..progress.span.blocks {
        let page = cache.free.pop().ok_or(SnapshotError::Impossible { what: "blocks" })?;
        cache.slots[slot].pages.push(page);
    }
    let mut rest = heads;
    for index in 0..kept.len() {
        let layout = cache.layouts[index];
        let len = layout.snapshot_bytes(progress.span, rest.first() == Some(&1));
        let bytes = rest.split_off(..len).ok_or(SnapshotError::Impossible { what: "heads" })?;
        // As in `head_mut`, whose borrow would be of the pages too.
        let ThinCache { arena, starts, slots, masks, .. } = &mut *cache;
        let mut view = thinkey_core::HeadMut::new(layout, &mut arena[starts[index]..starts[index + 1]], slot)?;
        masks[slot * kept.len() + index] = view.restore(&slots[slot].pages, progress.span, bytes)?;
    }
    if !rest.is_empty() {
        return Err(SnapshotError::Impossible { what: "heads" });
    }
    let state = &mut cache.slots[slot];
    state.span = progress.span;
    state.position = progress.position as usize;
    state.renewal = Renewal::of(progress.chosen, progress.since as usize, progress.scored as usize);
    Ok(())
}
