//! The pool: one arena for the thin caches of all layers, heads and sequences, allocated once by plan.

use super::learn::Learnt;
use crate::ops::{Cache, Choosing, Renewal};
use memmap2::MmapMut;
use thinkey_core::{
    Admission, BLOCK, CacheBytes, CachePlan, Error, HeadLayout, HeadMut, HeadRef, Kept, Masks, Moments, Rows, Scoring,
    Span, StorageKind,
    channel::compensate,
    policy::{Life, Score, ThinValues},
    snapshot::{Progress, SnapshotError},
    token::Eviction,
};

mod snapshot;

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
    /// The device has no such part of a policy.
    #[error("{part} is not to be had on this device; use fix=compensated or fix=none, or another device")]
    Part {
        /// The slot and its value.
        part: &'static str,
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
    renewal: Renewal,
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
    choosing: Choosing,
    bytes: CacheBytes,
    /// One a layer and head.
    layouts: Vec<HeadLayout>,
    /// Where a head starts in the arena, in bytes; one more than there are heads.
    starts: Vec<usize>,
    arena: MmapMut,
    /// One a slot, layer and head.
    masks: Vec<Option<Masks>>,
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

/// Lists the layouts of all heads and where each starts, one after the other; the last start is the end.
fn lay_out(
    plan: &CachePlan,
    kept: &dyn Fn(usize, usize) -> usize,
    layouts: &mut Vec<HeadLayout>,
    starts: &mut Vec<usize>,
) -> Result<(), Error> {
    layouts.clear();
    starts.clear();
    starts.push(0);
    let mut end = 0;
    for layer in 0..plan.layers {
        for head in 0..plan.heads() {
            let layout = plan.head(kept(layer, head))?;
            end += layout.bytes();
            layouts.push(layout);
            starts.push(end);
        }
    }
    Ok(())
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
        if plan.flexible && plan.slots > 1 {
            return Err(CacheError::Part {
                part: "channels shared out by each prompt, for several sequences at a time,",
            });
        }
        let bytes = plan.bytes(&kept)?;
        let heads = plan.layers * plan.heads();
        let (mut layouts, mut starts) = (room(heads)?, room(heads + 1)?);
        lay_out(&plan, &kept, &mut layouts, &mut starts)?;
        let arena = arena(bytes.arena()).map_err(|_| CacheError::Memory { bytes: bytes.arena() })?;
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
                renewal: Renewal::default(),
                position: 0,
            });
        }
        let mut free = room(per_slot * plan.slots)?;
        free.extend((0..(per_slot * plan.slots) as u32).rev());
        let choosing = Choosing::default();
        Ok(Self { plan, window, choosing, bytes, layouts, starts, arena, masks, slots, free })
    }

    /// Bytes of heap beside those that the plan counts: where each head lies, and the state of each sequence.
    #[must_use]
    pub const fn upkeep_bytes(plan: &CachePlan) -> usize {
        let heads = plan.layers * plan.heads();
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

    /// Channels of the keys of the prefix as [prompts](super::prompt::Prompt) pack them: all, where blocks differ in theirs.
    pub(super) fn packed_channels(&self, layer: usize, head: usize) -> usize {
        if self.plan.renews { self.plan.head_dim } else { self.kept(layer, head) }
    }

    fn index(&self, layer: usize, head: usize) -> usize {
        layer * self.plan.heads() + head
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
        let masks = self.masks[slot * self.layouts.len() + index].as_ref();
        HeadRef::new(
            self.layouts[index],
            &self.arena[self.starts[index]..self.starts[index + 1]],
            slot,
            pages,
            span,
            masks,
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
        let Self { plan, window, choosing, layouts, starts, arena, masks, slots, .. } = self;
        let choosing = *choosing;
        let state = &slots[slot];
        let step = state.step.expect("a step is under way");
        let renewal = state.renewal;
        let scored = renewal.rows(choosing.life, &step, *window);
        let (position, eviction) = (state.position, plan.eviction);
        let (first, at) = (layer * plan.heads(), slot * layouts.len());
        let mut rest = &mut arena[starts[first]..];
        masks[at + first..][..plan.heads()].iter_mut().zip(first..).map(move |(masks, index)| {
            let (bytes, tail) = std::mem::take(&mut rest).split_at_mut(starts[index + 1] - starts[index]);
            rest = tail;
            let view = HeadMut::new(layouts[index], bytes, slot)?;
            let pages = &state.pages;
            Ok(HeadStep { view, masks, step, pages, scored, choosing, renewal, head: index, eviction, position })
        })
    }
}

/// One head and the step under way.
#[derive(Debug)]
pub struct HeadStep<'a> {
    view: HeadMut<'a>,
    masks: &'a mut Option<Masks>,
    step: Admission,
    /// Page table after the step.
    pages: &'a [u32],
    /// Query rows of each query head in the energies, those of the step included.
    scored: usize,
    choosing: Choosing,
    renewal: Renewal,
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
        let Self { view, choosing, renewal, .. } = self;
        if renewal.starts_over(choosing.life) {
            view.clear_energy();
        }
        if renewal.counts(choosing.life) {
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
        self.choosing.score
    }

    /// Whether the step chooses channels.
    fn chooses(&self) -> bool {
        self.renewal.chooses(self.choosing.life, &self.step)
    }

    /// Whether, where the step is a prompt, it is to bring what corrects queries or says where keys are projected to.
    #[must_use]
    pub(super) fn asks_moments(&self) -> bool {
        let layout = self.view.layout();
        self.chooses()
            && layout.correction_bytes() > 0
            && compensate::tells(self.step.thinned - self.step.evicted, layout.head_dim as usize)
    }

    /// What the head holds before the step.
    pub(super) fn past(&self) -> Result<HeadRef<'_>, Error> {
        self.view.view(self.pages, self.step.before, self.masks.as_ref())
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

    /// Whether, where the step is a prompt, it is to bring which value channels its queries go by.
    #[must_use]
    pub(super) fn asks_values(&self) -> bool {
        self.chooses()
            && self.view.layout().thins_values()
            && self.masks.is_none()
            && matches!(self.choosing.values, ThinValues::Query { .. })
    }

    /// The head's layout.
    pub(super) fn layout(&self) -> &HeadLayout {
        self.view.layout()
    }

    /// Admits the step's tokens: chooses the head's channels if none are chosen and tokens are to be thinned, thins what
    /// leaves the ring, stores the rest whole. The queries of the `group` query heads are [counted](Self::add_queries)
    /// before. Queries are corrected by what was `learnt`, or else by the means of the keys; value channels go by what was, or
    /// else by their energy. Where tokens are evicted, only those `kept` stay, and the ranks of new tokens that are no sinks
    /// come with them.
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
        let Self { view, masks, step, pages, scored, choosing, head, eviction, .. } = self;
        let mut view = view.keeping(kept);
        if chooses {
            let scoring = Scoring { score: choosing.score, head: *head, queries: *scored * group };
            let learnt = learnt.unwrap_or_default();
            let keys = match learnt.mask {
                Some(mask) => mask,
                None => view.choose(&scoring, step, rows)?,
            };
            // Values have one mask for good.
            let values = match (&masks, learnt.values) {
                (Some(masks), _) => masks.values,
                (None, Some(mask)) => mask,
                (None, None) => view.choose_values(step, rows)?,
            };
            view.correct(&keys, learnt.moments.unwrap_or(Moments::Tokens { admission: step, rows }))?;
            **masks = Some(Masks { keys, values });
            if choosing.life != Life::Prompt {
                view.clear_energy();
            }
        }
        view.admit(step, pages, masks.as_ref(), rows)?;
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
            + self.masks.capacity() * size_of::<Option<Masks>>()
            + (tables + self.free.capacity()) * size_of::<u32>()
    }

    fn window(&self) -> usize {
        self.window
    }

    fn choose_by(&mut self, choosing: Choosing) {
        self.choosing = choosing;
    }

    fn spread(&mut self, kept: &dyn Fn(usize, usize) -> usize) -> Result<(), Error> {
        if self.slots.iter().any(|slot| slot.span != Span::default()) {
            return Err(Error::Inconsistent { what: "cache that is to be laid out anew" });
        }
        let (needed, capacity) = (CachePlan { flexible: false, ..self.plan }.bytes(kept)?.arena(), self.arena.len());
        if needed > capacity {
            return Err(Error::Capacity { what: "cache bytes", needed, capacity });
        }
        lay_out(&self.plan, kept, &mut self.layouts, &mut self.starts)?;
        for slot in 0..self.slots.len() {
            for index in 0..self.layouts.len() {
                self.head_mut(index, slot)?.clear_energy();
            }
        }
        Ok(())
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
        (state.span, state.step, state.position) = (Span::default(), None, 0);
        state.renewal = Renewal::default();
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
        state.renewal.begin(prompt);
        Ok(())
    }

    fn commit(&mut self, slot: usize) {
        let state = &mut self.slots[slot];
        if let Some(step) = state.step.take() {
            state.span = step.after;
            state.position += step.new;
            state.renewal.end(self.choosing.life, &step, self.window);
        }
    }

    fn progress(&self, slot: usize) -> Result<(Progress, usize), SnapshotError> {
        snapshot::progress(self, slot)
    }

    fn save(&self, slot: usize, out: &mut Vec<u8>) -> Result<(), SnapshotError> {
        snapshot::save(self, slot, out)
    }

    fn restore(&mut self, slot: usize, progress: &Progress, kept: &[u16], heads: &[u8]) -> Result<(), SnapshotError> {
        self.clear(slot);
        let restored = snapshot::restore(self, slot, progress, kept, heads);
        if restored.is_err() {
            self.clear(slot);
        }
        restored
    }
}
