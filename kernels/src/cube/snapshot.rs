//! What the device holds of one sequence, as [snapshots](thinkey_core::snapshot) have it, layer by layer: a kernel brings it
//! into the form of core's layout for one sequence, whose blocks follow each other, and what that is as bytes core says.

use super::{
    cache::DeviceCache,
    launch::{Numbers, copy_runs},
};
use crate::ops::Renewal;
use burn_cubecl::CubeRuntime;
use thinkey_core::{
    ChannelMask, HeadLayout, HeadMut, HeadRef, Masks, Span,
    snapshot::{Progress, SnapshotError},
};

/// How far a sequence is, and the bytes of its heads.
pub(super) fn progress<R: CubeRuntime>(
    cache: &DeviceCache<R>,
    slot: usize,
) -> Result<(Progress, usize), SnapshotError> {
    let state = &cache.slots[slot];
    if state.position == 0 || state.step.is_some() {
        return Err(SnapshotError::Empty);
    }
    let (chosen, since, scored) = state.renewal.parts();
    let (position, since, scored) = (state.position as u32, since as u32, scored as u32);
    let bytes = cache.layouts.iter().map(|(layout, _)| layout.snapshot_bytes(state.span, chosen)).sum();
    Ok((Progress { span: state.span, position, chosen, since, scored }, bytes))
}

/// T of every head, and what the heads hold.
pub(super) fn save<R: CubeRuntime>(
    cache: &DeviceCache<R>,
    slot: usize,
    out: &mut Vec<u8>,
) -> Result<(), SnapshotError> {
    let (Progress { span, chosen, .. }, _) = progress(cache, slot)?;
    let (heads, dim, pages) = (cache.plan.heads(), cache.plan.head_dim, in_a_row(span));
    out.extend(cache.layouts.iter().flat_map(|(layout, _)| layout.kept.to_le_bytes()));
    for (number, layer) in cache.layers.iter().enumerate() {
        let (own, runs, words) = together(cache, number, slot, span);
        let gathered = Numbers::empty(&cache.client, words);
        // SAFETY: runs are of the pages and the slot of this sequence, and of what `own` says of `gathered`.
        unsafe { copy_runs(&cache.client, (&layer.arena, &gathered), &runs) };
        let bytes = cache.client.read_one_unchecked(gathered.handle);
        let listed = chosen.then(|| cache.client.read_one_unchecked(layer.channels.handle.clone()));
        for (head, (layout, start)) in own.iter().enumerate() {
            let masks = match &listed {
                Some(listed) => {
                    let at = (slot * heads + head) * dim * 4;
                    let channels = listed[at..at + usize::from(layout.kept) * 4].chunks_exact(4);
                    let channels = channels.map(|channel| bytemuck::pod_read_unaligned::<u32>(channel) as usize);
                    Some(Masks::of_keys(ChannelMask::from_channels(dim, channels)?))
                }
                None => None,
            };
            let bytes = &bytes[*start..start + layout.bytes()];
            HeadRef::new(*layout, bytes, 0, &pages, span, masks.as_ref())?.save(|part| out.extend_from_slice(part))?;
        }
    }
    // What was gathered is of sizes that need not come again.
    cache.client.memory_cleanup();
    Ok(())
}

/// Into an empty slot, which is to be cleared after an error.
pub(super) fn restore<R: CubeRuntime>(
    cache: &mut DeviceCache<R>,
    slot: usize,
    progress: &Progress,
    kept: &[u16],
    heads: &[u8],
) -> Result<(), SnapshotError> {
    let (plan, span) = (cache.plan, progress.span);
    progress.check(plan.sinks, plan.recent, plan.window.is_some())?;
    if progress.position as usize > plan.tokens {
        return Err(SnapshotError::Context { tokens: progress.position, context: plan.tokens as u32 });
    }
    if span.blocks as usize > plan.blocks_per_slot() {
        return Err(SnapshotError::Impossible { what: "blocks" });
    }
    if kept.len() != cache.layouts.len() {
        return Err(SnapshotError::Shape { what: "heads" });
    }
    if cache.layouts.iter().zip(kept).any(|((layout, _), &kept)| layout.kept != kept) {
        return Err(SnapshotError::Shape { what: "channels per head" });
    }
    for _ in 0..span.blocks {
        let page = cache.free.pop().ok_or(SnapshotError::Impossible { what: "blocks" })?;
        cache.slots[slot].pages.push(page);
    }
    let (pages, mut rest) = (in_a_row(span), heads);
    for (number, layer) in cache.layers.iter().enumerate() {
        let (own, mut runs, words) = together(cache, number, slot, span);
        let (mut memory, mut listed) = (vec![0u32; words], Vec::with_capacity(own.len() * plan.head_dim));
        for (layout, start) in &own {
            let len = layout.snapshot_bytes(span, rest.first() == Some(&1));
            let bytes = rest.split_off(..len).ok_or(SnapshotError::Impossible { what: "heads" })?;
            let memory = &mut bytemuck::cast_slice_mut::<u32, u8>(&mut memory)[*start..start + layout.bytes()];
            let masks = HeadMut::new(*layout, memory, 0)?.restore(&pages, span, bytes)?;
            if masks.is_some() != progress.chosen {
                return Err(SnapshotError::Impossible { what: "channels" });
            }
            if let Some(Masks { keys, .. }) = masks {
                let lost = (0..plan.head_dim).filter(|&channel| !keys.contains(channel));
                listed.extend(keys.channels().chain(lost).map(|channel| channel as u32));
            }
        }
        runs.iter_mut().for_each(|[place, together, _]| std::mem::swap(place, together));
        let at = (slot * own.len() * plan.head_dim) as u32;
        let (from, channels) = (Numbers::of(&cache.client, &memory), Numbers::of(&cache.client, &listed));
        // SAFETY: as in `save`, the other way; a slot's list of channels begins where those of the slots before end.
        unsafe {
            copy_runs(&cache.client, (&from, &layer.arena), &runs);
            copy_runs(&cache.client, (&channels, &layer.channels), &[[0, at, listed.len() as u32]]);
        }
    }
    if !rest.is_empty() {
        return Err(SnapshotError::Impossible { what: "heads" });
    }
    cache.client.memory_cleanup();
    let state = &mut cache.slots[slot];
    state.span = span;
    state.position = progress.position as usize;
    state.renewal = Renewal::of(progress.chosen, progress.since as usize, progress.scored as usize);
    state.counted = true;
    Ok(())
}

/// The page table of a sequence by itself.
fn in_a_row(span: Span) -> Vec<u32> {
    (0..span.blocks).collect()
}

/// Layouts of the heads of a layer for one sequence that holds `span`, with where each begins (in bytes); where the parts of the
/// sequence of `slot` lie in the layer's buffer and there, and their length; and the length of all. In words.
#[allow(clippy::type_complexity)]
fn together<R: CubeRuntime>(
    cache: &DeviceCache<R>,
    layer: usize,
    slot: usize,
    span: Span,
) -> (Vec<(HeadLayout, usize)>, Vec<[u32; 3]>, usize) {
    let heads = cache.plan.heads();
    let (mut own, mut runs, mut end) = (Vec::with_capacity(heads), Vec::new(), 0);
    for &(layout, start) in &cache.layouts[layer * heads..][..heads] {
        let one = HeadLayout { slots: 1, pages: span.blocks, ..layout };
        let mut run = |from: std::ops::Range<usize>, to: usize| {
            // Below 16 GiB, as was seen when the cache was made.
            runs.push([(start + from.start) / 4, (end + to) / 4, from.len() / 4].map(|words| words as u32));
        };
        for (block, &page) in cache.slots[slot].pages.iter().enumerate() {
            run(layout.key_block(page as usize), one.key_block(block).start);
        }
        for (block, &page) in cache.slots[slot].pages.iter().enumerate() {
            run(layout.value_block(page as usize), one.value_block(block).start);
        }
        run(layout.ring_keys(slot).start..layout.ranks(slot).end, one.ring_keys(0).start);
        own.push((one, end));
        end += one.bytes();
    }
    (own, runs, end / 4)
}
