//! The pool: one arena for the thin caches of all layers, heads and sequences, allocated once by plan.

use super::learn::Learnt;
use crate::ops::Cache;
use memmap2::MmapMut;
use thinkey_core::{
    Admission, BLOCK, CacheBytes, CachePlan, ChannelMask, Error, HeadLayout, HeadMut, HeadRef, Kept, Moments, Rows,
    Scoring, Span, StorageKind, channel::compensate, policy::Score, token::Eviction,
};

/// Why a cache could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// The plan cannot be.
    #[error("the cache cannot be planned: {0}")]
    Plan(#[from] Error),
    /// The device has no such storage.
    #[error("{} caches are not to be had on this device; store keys and values as f16 or f32", kind.name())]
    Kind {
        /// The kind asked for.
        kind: StorageKind,
    },
    /// The device evicts no tokens.
    #[error("this device evicts no tokens by votes or attention; use tokens=all or tokens=window, or another device")]
    Eviction,
    /// The system refuses the memory.
    #[error("no memory for a cache of {bytes} bytes; lower the context or raise λ")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
    },
}

/// What a sequence holds, and the step under way.
#[derive(Debug)]
struct Slot {
    span: Span,
    step: Option<Admission>,
    /// Page table before the step under way.
    before: Vec<u32>,
    /// Page table after it.
    pages: Vec<u32>,
    /// Query rows of each head that the energies are the sum of.
    scored: usize,
    /// Tokens ever admitted: the position of the next one.
    position: usize,
}

/// The thin caches of all layers and heads, for `plan.slots` sequences.
///
/// A step of a sequence goes through all layers with the same admission: [`begin`](Cache::begin), then for every layer
/// [admissions](Self::steps) and reads, then [`commit`](Cache::commit).
#[derive(Debug)]
pub struct ThinCache {
    plan: CachePlan,
    window: usize,
    score: Score,
    bytes: CacheBytes,
    /// One a layer and head.
    layouts: Vec<HeadLayout>,
    /// Where a head starts in the arena, in bytes; one more than there are heads.
    starts: Vec<usize>,
    arena: MmapMut,
    /// One a slot, layer and head.
    masks: Vec<Option<ChannelMask>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
}

/// `bytes` zeroed bytes that begin on a page, in large pages where the system has them: a step reads all of them, and every
/// page costs a look-up.
fn arena(bytes: usize) -> std::io::Result<MmapMut> {
    let mut arena = MmapMut::map_anon(bytes)?;
    // Only a hint; without it the cache is as it would be.
    #[cfg(target_os = "linux")]
    let _ = arena.advise(memmap2::Advice::HugePage);
    // Taken at once and not page by page as sequences grow: what was planned cannot be missing in the middle of an answer.
    arena.fill(0);
    Ok(arena)
}

fn room<T>(len: usize) -> Result<Vec<T>, CacheError> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).map_err(|_| CacheError::Memory { bytes: len.saturating_mul(size_of::<T>()) })?;
    Ok(vec)
}

impl ThinCache {
    /// An empty cache where head h of layer l keeps `kept(l, h)` channels, scored by the newest `window` queries of a
    /// prompt.
    ///
    /// # Errors
    /// [`CacheError`] where the plan cannot be or the memory cannot be had.
    pub fn new(plan: CachePlan, window: usize, kept: impl Fn(usize, usize) -> usize) -> Result<Self, CacheError> {
        let bytes = plan.bytes(&kept)?;
        let heads = plan.layers * plan.kv_heads;
        let (mut layouts, mut starts) = (room(heads)?, room(heads + 1)?);
        let mut start = 0;
        for layer in 0..plan.layers {
            for head in 0..plan.kv_heads {
                let layout = plan.head(kept(layer, head))?;
                layouts.push(layout);
                starts.push(start);
                start += layout.bytes();
            }
        }
        starts.push(start);
        let arena = arena(start).map_err(|_| CacheError::Memory { bytes: start })?;
        let mut masks = room(heads * plan.slots)?;
        masks.resize(heads * plan.slots, None);
        let per_slot = plan.blocks_per_slot();
        let mut slots = room(plan.slots)?;
        for _ in 0..plan.slots {
            slots.push(Slot {
                span: Span::default(),
                step: None,
                before: room(per_slot)?,
                pages: room(per_slot)?,
                scored: 0,
                position: 0,
            });
        }
        let mut free = room(per_slot * plan.slots)?;
        free.extend((0..(per_slot * plan.slots) as u32).rev());
        Ok(Self { plan, window, score: Score::default(), bytes, layouts, starts, arena, masks, slots, free })
    }

    /// Bytes of heap beside those that the plan counts: where each head lies, and the state of each sequence.
    #[must_use]
    pub const fn upkeep_bytes(plan: &CachePlan) -> usize {
        let heads = plan.layers * plan.kv_heads;
        heads * size_of::<HeadLayout>() + (heads + 1) * size_of::<usize>() + plan.slots * size_of::<Slot>()
    }

    /// How many tokens of `slot` are where, the step under way not counted.
    #[must_use]
    pub fn span(&self, slot: usize) -> Span {
        self.slots[slot].span
    }

    /// The step of `slot` under way.
    #[must_use]
    pub fn step(&self, slot: usize) -> Option<Admission> {
        self.slots[slot].step
    }

    /// Channels that a head keeps, T.
    #[must_use]
    pub fn kept(&self, layer: usize, head: usize) -> usize {
        self.layouts[self.index(layer, head)].kept as usize
    }

    fn index(&self, layer: usize, head: usize) -> usize {
        layer * self.plan.kv_heads + head
    }

    fn head_mut(&mut self, index: usize, slot: usize) -> Result<HeadMut<'_>, Error> {
        HeadMut::new(self.layouts[index], &mut self.arena[self.starts[index]..self.starts[index + 1]], slot)
    }

    /// The cache of a head: as it is before the step under way, or as that layer has it once the tokens are
    /// [admitted](HeadStep).
    ///
    /// # Errors
    /// None for a layer that has been through every step.
    pub fn head(&self, layer: usize, head: usize, slot: usize, admitted: bool) -> Result<HeadRef<'_>, Error> {
        let index = self.index(layer, head);
        let state = &self.slots[slot];
        let (span, pages) = match &state.step {
            Some(step) if admitted => (step.after, &state.pages),
            Some(step) => (step.before, &state.before),
            None => (state.span, &state.pages),
        };
        let mask = self.masks[slot * self.layouts.len() + index].as_ref();
        HeadRef::new(
            self.layouts[index],
            &self.arena[self.starts[index]..self.starts[index + 1]],
            slot,
            pages,
            span,
            mask,
        )
    }

    /// The [ranks](HeadMut::ranks_mut) of a head that holds `span`.
    ///
    /// # Errors
    /// Where the cache has none.
    pub(super) fn ranks_mut(
        &mut self,
        layer: usize,
        head: usize,
        slot: usize,
        span: Span,
    ) -> Result<(&mut [f32], &mut [f32]), Error> {
        let index = self.index(layer, head);
        HeadMut::new(self.layouts[index], &mut self.arena[self.starts[index]..self.starts[index + 1]], slot)?
            .into_ranks(span)
    }

    /// The heads of a layer, in their order, each with what the step under way does to it: they can be admitted apart.
    ///
    /// # Panics
    /// Where no step is under way.
    pub fn steps(&mut self, layer: usize, slot: usize) -> impl Iterator<Item = Result<HeadStep<'_>, Error>> {
        let Self { plan, window, score, layouts, starts, arena, masks, slots, .. } = self;
        let score = *score;
        let state = &slots[slot];
        let step = state.step.expect("a step is under way");
        let (scored, position, eviction) = (state.scored + step.new.min(*window), state.position, plan.eviction);
        let (first, at) = (layer * plan.kv_heads, slot * layouts.len());
        let mut rest = &mut arena[starts[first]..];
        masks[at + first..][..plan.kv_heads].iter_mut().zip(first..).map(move |(mask, index)| {
            let (bytes, tail) = std::mem::take(&mut rest).split_at_mut(starts[index + 1] - starts[index]);
            rest = tail;
            let view = HeadMut::new(layouts[index], bytes, slot)?;
            Ok(HeadStep { view, mask, step, pages: &state.pages, scored, score, head: index, eviction, position })
        })
    }
}

/// One head and the step under way.
#[derive(Debug)]
pub struct HeadStep<'a> {
    view: HeadMut<'a>,
    mask: &'a mut Option<ChannelMask>,
    step: Admission,
    /// Page table after the step.
    pages: &'a [u32],
    /// Query rows of each query head in the energies, those of the step included.
    scored: usize,
    score: Score,
    /// The head's number among all of the model.
    head: usize,
    eviction: Option<Eviction>,
    /// Position of the step's first token.
    position: usize,
}

impl HeadStep<'_> {
    /// Counts the squares of query rows for the score, if channels are still to be chosen: the newest W of the step.
    /// `queries` yields rows of each query head of the group, as (data, rows, stride).
    ///
    /// # Errors
    /// Where slices do not fit.
    pub fn add_queries<'q>(&mut self, queries: impl Iterator<Item = (&'q [f32], usize, usize)>) -> Result<(), Error> {
        let Self { view, mask, .. } = self;
        if mask.is_none() {
            for (data, count, stride) in queries {
                view.add_query_energy(data, count, stride)?;
            }
        }
        Ok(())
    }

    /// The step.
    #[must_use]
    pub fn step(&self) -> &Admission {
        &self.step
    }

    /// What channels are scored by.
    pub(super) fn score(&self) -> Score {
        self.score
    }

    /// Whether the step chooses channels.
    fn chooses(&self) -> bool {
        self.mask.is_none() && !self.step.new_blocks().is_empty()
    }

    /// Whether, where the step is a prompt, it is to bring what corrects queries.
    #[must_use]
    pub fn learns(&self) -> bool {
        let layout = self.view.layout();
        self.chooses()
            && layout.correction_bytes() > 0
            && compensate::tells(self.step.thinned - self.step.evicted, layout.head_dim as usize)
    }

    /// What the head holds before the step.
    pub(super) fn past(&self) -> Result<HeadRef<'_>, Error> {
        self.view.view(self.pages, self.step.before, self.mask.as_ref())
    }

    /// The [ranks](HeadMut::ranks_mut) of what is stored of `span`.
    pub(super) fn ranks_mut(&mut self, span: Span) -> Result<(&mut [f32], &mut [f32]), Error> {
        self.view.ranks_mut(span)
    }

    /// Lists which tokens stay, by [ranks](HeadMut::keep) that are `new` and those that the head has.
    pub(super) fn keep<'k>(&self, new: &[f32], tokens: &'k mut [u32], lanes: &'k mut [u32]) -> Result<Kept<'k>, Error> {
        self.view.keep(&self.step, new, tokens, lanes)
    }

    /// Admits the step's one token, which no prompt brings: as [`admit`](Self::admit), by the ranks that there are. Of those
    /// that SnapKV's voters did not see, the younger rank higher, and all above the others.
    ///
    /// # Errors
    /// As there.
    pub(super) fn admit_one(&mut self, group: usize, rows: Rows<'_>) -> Result<(), Error> {
        let Self { view, step, eviction, position, .. } = self;
        let Some(eviction) = eviction else { return self.admit(group, rows, None, (Kept::ALL, &[])) };
        if !eviction.gathers() && step.thinned > 0 {
            let (_, ring) = view.ranks_mut(step.before)?;
            // A vote is at most 1.
            let first = 1 + *position - ring.len();
            ring.iter_mut().enumerate().for_each(|(token, rank)| *rank = (first + token) as f32);
        }
        let new = &[0.0][step.sunk.min(1)..];
        // A step thins a block at most.
        let (mut tokens, mut lanes) = ([0; BLOCK], [0; BLOCK]);
        let kept = self.view.keep(&self.step, new, &mut tokens, &mut lanes)?;
        self.admit(group, rows, None, (kept, new))
    }

    /// Admits the step's tokens: chooses the head's channels if none are chosen and tokens are to be thinned, thins what
    /// leaves the ring, stores the rest whole. The queries of the `group` query heads are [counted](Self::add_queries)
    /// before. Queries are corrected by what was `learnt`, or else by the means of the keys. Where tokens are evicted, only
    /// those `kept` stay, and the ranks of new tokens that are no sinks come with them.
    ///
    /// # Errors
    /// Where slices do not fit, or a score is NaN.
    pub(super) fn admit(
        &mut self,
        group: usize,
        rows: Rows<'_>,
        learnt: Option<Learnt<'_>>,
        (kept, new): (Kept<'_>, &[f32]),
    ) -> Result<(), Error> {
        let chooses = self.chooses();
        let Self { view, mask, step, pages, scored, score, head, eviction, .. } = self;
        let mut view = view.keeping(kept);
        if chooses {
            let scoring = Scoring { score: *score, head: *head, queries: *scored * group };
            let chosen = match &learnt {
                Some(Learnt { mask: Some(mask), .. }) => *mask,
                _ => view.choose(&scoring, step, rows)?,
            };
            let moments = match learnt {
                Some(Learnt { mean, covariance, scratch, .. }) => Moments::Known { mean, covariance, scratch },
                None => Moments::Tokens { admission: step, rows },
            };
            view.correct(&chosen, moments)?;
            **mask = Some(chosen);
        }
        view.admit(step, pages, mask.as_ref(), rows)?;
        if eviction.is_some() {
            view.move_ranks(step, new)?;
        }
        Ok(())
    }
}

impl Cache for ThinCache {
    fn plan(&self) -> &CachePlan {
        &self.plan
    }

    fn planned(&self) -> CacheBytes {
        self.bytes
    }

    fn allocated(&self) -> usize {
        let tables = self.slots.iter().map(|slot| slot.before.capacity() + slot.pages.capacity()).sum::<usize>();
        self.arena.len()
            + self.masks.capacity() * size_of::<Option<ChannelMask>>()
            + (tables + self.free.capacity()) * size_of::<u32>()
    }

    fn window(&self) -> usize {
        self.window
    }

    fn score_by(&mut self, score: Score) {
        self.score = score;
    }

    fn position(&self, slot: usize) -> usize {
        self.slots[slot].position
    }

    fn clear(&mut self, slot: usize) {
        let heads = self.layouts.len();
        self.masks[slot * heads..(slot + 1) * heads].fill(None);
        let state = &mut self.slots[slot];
        self.free.append(&mut state.pages);
        state.before.clear();
        (state.span, state.step, state.scored, state.position) = (Span::default(), None, 0, 0);
        for index in 0..heads {
            // The layouts were checked when the cache was made.
            if let Ok(mut head) = self.head_mut(index, slot) {
                head.clear_energy();
            }
        }
    }

    fn begin(&mut self, slot: usize, new: usize, prompt: bool) -> Result<(), Error> {
        self.check(slot, new)?;
        let state = &mut self.slots[slot];
        let admission = state.span.admit(new, self.plan.retention(), prompt);
        state.before.clear();
        state.before.extend_from_slice(&state.pages);
        let gone = admission.dropped.min(state.pages.len());
        self.free.extend(state.pages.drain(..gone));
        while state.pages.len() < admission.after.blocks as usize {
            let capacity = self.plan.blocks_per_slot() * self.plan.slots;
            let page = self.free.pop().ok_or(Error::Capacity { what: "pages", needed: capacity + 1, capacity })?;
            state.pages.push(page);
        }
        state.step = Some(admission);
        Ok(())
    }

    fn commit(&mut self, slot: usize) {
        let state = &mut self.slots[slot];
        if let Some(step) = state.step.take() {
            state.span = step.after;
            state.position += step.new;
            state.scored += step.new.min(self.window);
        }
    }
}
