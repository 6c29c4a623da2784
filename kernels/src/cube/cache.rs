//! The pool on the device: a buffer a layer for the thin caches of all heads and sequences, allocated once by plan.
//!
//! Page tables and spans stay on the host, which is the only one to need them whole; what kernels go by is sent along once
//! a step, for all layers. Masks, energies and corrections are the device's.

use super::{
    launch::{Doing, Given, Layer, Numbers, Steps, allocate_exactly, blocks, clear, head_entry, row_entry},
    layout::Shape,
    score, snapshot,
};
use crate::{
    cpu::cache::CacheError,
    ops::{Cache, Choosing, Heads, Renewal},
};
use burn_cubecl::CubeRuntime;
use cubecl::client::ComputeClient;
use std::sync::{Mutex, PoisonError};
use thinkey_core::{
    Admission, CacheBytes, CachePlan, Error, HeadLayout, Lambda, Span, StorageKind,
    channel::{compensate, random},
    policy::{Fix, Life, Score},
    snapshot::{Progress, SnapshotError},
};

#[derive(Clone, Debug, Default)]
pub(super) struct Slot {
    pub(super) span: Span,
    pub(super) step: Option<Admission>,
    /// Page table before the step under way.
    before: Vec<u32>,
    /// Page table after it.
    pub(super) pages: Vec<u32>,
    pub(super) renewal: Renewal,
    /// Whether the energies are those of the sequence at hand.
    pub(super) counted: bool,
    pub(super) position: usize,
}

/// The thin caches of all layers and heads, for `plan.slots` sequences, on a device.
pub struct DeviceCache<R: CubeRuntime> {
    pub(super) client: ComputeClient<R>,
    pub(super) plan: CachePlan,
    planned: CacheBytes,
    allocated: usize,
    window: usize,
    choosing: Choosing,
    pub(super) layers: Vec<Layer>,
    /// Of every head, layer after layer, and at which byte of its layer it begins.
    pub(super) layouts: Vec<(HeadLayout, usize)>,
    pub(super) slots: Vec<Slot>,
    pub(super) free: Vec<u32>,
    /// What was uploaded for the step under way: all layers go by it.
    tables: Mutex<Tables>,
}

/// Tables of a step, with what they were asked for.
#[derive(Default)]
struct Tables {
    batch: Option<(Vec<usize>, usize, Batch)>,
    rows: Option<(SeenRows, RowTables)>,
}

/// The slot of each row and the newest tokens that it sees, and whether after the steps under way.
type SeenRows = (Vec<(usize, usize)>, bool);

/// What rows see of the cache: the entries, how many, and the most blocks that one sees; and page tables.
pub(super) type RowTables = ((Numbers, usize, usize), Numbers);

/// What kernels go by in a step of some sequences.
#[derive(Clone)]
pub(super) struct Batch {
    steps: Steps,
    pages: Numbers,
    by: (bool, bool),
}

impl<R: CubeRuntime> DeviceCache<R> {
    /// Whether the kernels have all parts of a plan.
    pub(super) fn knows(plan: &CachePlan) -> bool {
        matches!(plan.fix, Fix::None | Fix::Compensated)
            && plan.value_lambda == Lambda::WHOLE
            && plan.eviction.is_none()
            && !plan.keys.turns()
            && Self::stores(plan.keys)
            && Self::stores(plan.values)
            && plan.head_dim.is_multiple_of(2)
            && !plan.renews
            && !plan.flexible
    }

    /// Whether the kernels know how `kind` is stored: by name, so that a new kind is refused until they do.
    pub(super) const fn stores(kind: StorageKind) -> bool {
        use StorageKind::{Bf16, F16, F32, Int2, Int3, Int4, Int8, Trellis2, Turned2, Turned3, Turned4};
        matches!(kind, F32 | F16 | Bf16 | Int8 | Int4 | Int3 | Int2 | Turned4 | Turned3 | Turned2 | Trellis2)
    }

    /// An empty cache, as [`ThinOps::cache`](crate::ops::ThinOps::cache), of a plan that the kernels [know](Self::knows).
    ///
    /// # Errors
    /// [`CacheError`] where the plan cannot be.
    pub(super) fn new(
        client: ComputeClient<R>,
        plan: CachePlan,
        window: usize,
        kept: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self, CacheError> {
        let planned = plan.bytes(kept)?;
        allocate_exactly(&client);
        let (mut layers, mut allocated) = (Vec::with_capacity(plan.layers), 0);
        let mut layouts = Vec::with_capacity(plan.layers * plan.heads());
        for layer in 0..plan.layers {
            let (mut table, mut bytes, mut stride) = (Vec::new(), 0, 0);
            for head in 0..plan.heads() {
                let layout = plan.head(kept(layer, head))?;
                table.extend(head_entry(&layout, bytes));
                layouts.push((layout, bytes));
                bytes += layout.bytes();
                stride = layout.ring_stride();
            }
            let shape = Shape {
                dim: plan.head_dim,
                // Of the rows, which are not known yet.
                group: 0,
                queries_width: 0,
                width: 0,
                keys_at: 0,
                values_at: 0,
                keys: plan.keys,
                values: plan.values,
                sinks: plan.sinks,
                stride,
                corrected: plan.fix == Fix::Compensated,
                copies: plan.copies,
            };
            let channels = plan.slots * plan.heads() * plan.head_dim;
            allocated += bytes + channels * 4;
            let (arena, heads) = (Numbers::empty(&client, bytes / 4), Numbers::of(&client, &table));
            let channels = Numbers::of(&client, &vec![0; channels]);
            // What lies between numbers is saved with them.
            clear(&client, &arena);
            layers.push(Layer { arena, heads, channels, count: plan.heads(), shape });
        }
        let pages = plan.blocks_per_slot() * plan.slots;
        Ok(Self {
            client,
            plan,
            planned,
            allocated,
            window,
            choosing: Choosing::default(),
            layers,
            layouts,
            tables: Mutex::default(),
            slots: vec![Slot::default(); plan.slots],
            free: (0..pages as u32).rev().collect(),
        })
    }

    /// A layer, for fused rows of `heads`.
    pub(super) fn layer(&self, layer: usize, heads: Heads) -> Layer {
        let width = heads.width();
        self.shaped(layer, heads, [width, width, heads.keys(), heads.values()])
    }

    /// A layer, for what a prompt [holds](super::held::Held) of `heads`: queries apart from keys and values.
    pub(super) fn layer_of_held(&self, layer: usize, heads: Heads) -> Layer {
        let keys = heads.values() - heads.keys();
        self.shaped(layer, heads, [heads.keys(), 2 * keys, 0, keys])
    }

    fn shaped(&self, layer: usize, heads: Heads, rows: [usize; 4]) -> Layer {
        let group = heads.cached(&self.plan).group();
        let layer = self.layers[layer].clone();
        let [queries_width, width, keys_at, values_at] = rows;
        Layer { shape: Shape { group, queries_width, width, keys_at, values_at, ..layer.shape }, ..layer }
    }

    /// How many tokens of `slot` are where: after the step under way where it is `admitted`, else before.
    pub(super) fn span(&self, slot: usize, admitted: bool) -> Span {
        let state = &self.slots[slot];
        match &state.step {
            Some(step) if admitted => step.after,
            Some(step) => step.before,
            None => state.span,
        }
    }

    /// The step of `slot` under way.
    ///
    /// # Panics
    /// Where there is none.
    pub(super) fn step(&self, slot: usize) -> &Admission {
        self.slots[slot].step.as_ref().expect("a step is under way")
    }

    /// What channels are scored by.
    pub(super) fn score(&self) -> Score {
        self.choosing.score
    }

    /// Whether the step of `slot`, a prompt's, is to learn how queries are corrected.
    pub(super) fn learns(&self, slot: usize) -> bool {
        let step = self.step(slot);
        self.plan.fix == Fix::Compensated
            && self.slots[slot].renewal.chooses(Life::Prompt, step)
            && compensate::tells(step.thinned, self.plan.head_dim)
    }

    fn tables(&mut self) -> &mut Tables {
        self.tables.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the steps of `slots`, whose new rows follow each other, do in every layer: uploaded for the first one. The first
    /// `unheld` rows have no queries.
    ///
    /// # Panics
    /// Where no step is under way.
    pub(super) fn batch(&self, slots: &[usize], unheld: usize) -> Batch {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        match &tables.batch {
            Some((of, before, batch)) if of == slots && *before == unheld => batch.clone(),
            _ => {
                let batch = self.new_batch(slots, unheld);
                tables.batch = Some((slots.to_vec(), unheld, batch.clone()));
                batch
            }
        }
    }

    fn new_batch(&self, slots: &[usize], unheld: usize) -> Batch {
        let (mut steps, mut pages, mut row) = (Vec::with_capacity(slots.len()), Vec::new(), 0);
        for &slot in slots {
            let Slot { step, renewal, counted: own_energies, pages: own, .. } = &self.slots[slot];
            let step = step.expect("a step is under way");
            let tokens = step.before.recent as usize + step.new;
            let every = match self.choosing.score {
                Score::Sample { tokens: most } => tokens.div_ceil((most as usize).max(1)),
                // As if there were one token, so that scores stay what they are.
                Score::Random { .. } => tokens,
                _ => 1,
            };
            let life = Life::Prompt;
            let counted = if renewal.counts(life) { step.new.min(self.window) } else { 0 };
            let doing = Doing {
                slot,
                row,
                pages: pages.len(),
                counted,
                forgets: !own_energies,
                chooses: renewal.chooses(life, &step),
                scored: renewal.rows(life, &step, self.window),
                every,
                queries: row + step.new - counted - unheld,
            };
            steps.push((step, doing));
            pages.extend_from_slice(own);
            row += step.new;
        }
        let by = score::by(self.choosing.score);
        Batch { steps: Steps::new(&self.client, &steps), pages: Numbers::of(&self.client, &pages), by }
    }

    /// Counts queries, and chooses the channels of `layer`, `number` of all, by rows of queries and of keys.
    pub(super) fn choose(&self, number: usize, layer: &Layer, batch: &Batch, rows: (&Numbers, &Numbers)) {
        layer.choose(&self.client, &batch.steps, rows, batch.by, &self.given(number, &batch.steps));
    }

    /// What heads of layer `number` are scored by beside energies.
    fn given(&self, number: usize, steps: &Steps) -> Given {
        if steps.chunks == 0 {
            return Given::Nothing;
        }
        let heads = number * self.plan.heads()..(number + 1) * self.plan.heads();
        match self.choosing.score {
            Score::Random { seed } => {
                let mut scores = vec![0.0f32; steps.count * self.plan.heads() * self.plan.head_dim];
                let every = (0..steps.count).flat_map(|_| heads.clone());
                every.zip(scores.chunks_exact_mut(self.plan.head_dim)).for_each(|(head, scores)| {
                    random::random(seed, head, scores);
                });
                Given::Scores(Numbers::of(&self.client, bytemuck::cast_slice(&scores)))
            }
            Score::Sketch { rows } => {
                let tokens = steps.whole.iter().copied().max().unwrap_or(0);
                let bits = |head: usize| (0..tokens as u64).map(move |token| random::bits(head as u64, token));
                let all = (0..steps.count).flat_map(|_| heads.clone().flat_map(bits));
                let signs: Vec<u32> = all.flat_map(|bits| [bits as u32, (bits >> 32) as u32]).collect();
                Given::Signs { signs: Numbers::of(&self.client, &signs), tokens, rows: rows as usize }
            }
            _ => Given::Nothing,
        }
    }

    /// Stores rows in a layer.
    pub(super) fn store(&self, layer: &Layer, batch: &Batch, fused: &Numbers) {
        layer.store(&self.client, &batch.steps, &batch.pages, fused);
    }

    /// What rows see of the cache: their slots, and of how many of the newest tokens; after the steps under way where they
    /// are `admitted`. Uploaded for the first layer.
    pub(super) fn rows(&self, rows: &[(usize, usize)], admitted: bool) -> RowTables {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        match &tables.rows {
            Some(((of, after), found)) if of == rows && *after == admitted => found.clone(),
            _ => {
                let new = self.new_rows(rows, admitted);
                tables.rows = Some(((rows.to_vec(), admitted), new.clone()));
                new
            }
        }
    }

    fn new_rows(&self, rows: &[(usize, usize)], admitted: bool) -> RowTables {
        let (mut entries, mut pages, mut most) = (Vec::new(), Vec::new(), 0);
        let mut last = None;
        for &(slot, window) in rows {
            // Rows of a prompt share a table.
            let start = match last {
                Some((before, start)) if before == slot => start,
                _ => {
                    let state = &self.slots[slot];
                    let own = if admitted || state.step.is_none() { &state.pages } else { &state.before };
                    let start = pages.len();
                    pages.extend_from_slice(own);
                    start
                }
            };
            last = Some((slot, start));
            let span = self.span(slot, admitted);
            entries.extend(row_entry(slot, span, window, start));
            most = most.max(blocks(&span));
        }
        ((Numbers::of(&self.client, &entries), rows.len(), most), Numbers::of(&self.client, &pages))
    }
}

impl<R: CubeRuntime> Cache for DeviceCache<R> {
    fn plan(&self) -> &CachePlan {
        &self.plan
    }

    fn planned(&self) -> CacheBytes {
        self.planned
    }

    fn allocated(&self) -> usize {
        self.allocated
    }

    fn window(&self) -> usize {
        self.window
    }

    fn choose_by(&mut self, choosing: Choosing) {
        *self.tables() = Tables::default();
        self.choosing = choosing;
    }

    fn spread(&mut self, _: &dyn Fn(usize, usize) -> usize) -> Result<(), Error> {
        Err(Error::Inconsistent { what: "channels shared out by each prompt on this device" })
    }

    fn position(&self, slot: usize) -> usize {
        self.slots[slot].position
    }

    fn begin(&mut self, slot: usize, new: usize, prompt: bool) -> Result<(), Error> {
        self.check(slot, new)?;
        *self.tables() = Tables::default();
        let state = &mut self.slots[slot];
        let admission = state.span.admit(new, self.plan.retention(), prompt);
        state.before.clone_from(&state.pages);
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
        *self.tables() = Tables::default();
        let state = &mut self.slots[slot];
        if let Some(step) = state.step.take() {
            state.counted |= state.renewal.counts(Life::Prompt) && self.window > 0;
            state.span = step.after;
            state.position += step.new;
            state.renewal.end(Life::Prompt, &step, self.window);
        }
    }

    fn clear(&mut self, slot: usize) {
        *self.tables() = Tables::default();
        let state = &mut self.slots[slot];
        self.free.append(&mut state.pages);
        *state = Slot::default();
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
