//! The operations of a transformer over a thin cache, as a backend of burn offers them.
//!
//! [`ThinOps`] is what a model calls; activations are burn tensors, weights and caches are what the implementation
//! makes of them. Operations are coarse (a feed-forward part is one) so that handing tensors over costs nothing beside
//! them, and they take the tensor that they write by value, so that its memory is used again: a decode step allocates
//! nothing on the processor.
//!
//! | implementation | backend | what |
//! |---|---|---|
//! | [`Cpu`](crate::cpu::Cpu) | burn-ndarray | quantised weights, SIMD, threads, the paged thin cache |
//! | [`Reference`](crate::reference::Reference) | any | plain tensor operations: what the others are tested against, and what serves a backend that has no kernels of its own |

use crate::{
    cpu::{cache::CacheError, linear::LinearError, rows::Pairs},
    format::Matrix,
};
use burn::tensor::{Tensor, backend::Backend};
use std::ops::Range;
use thinkey_core::{
    Admission, CacheBytes, CachePlan, Error,
    policy::{Life, Score, ThinValues},
    snapshot::{Progress, SnapshotError},
};

/// Rows of activations, [rows, width].
pub type Rows<O> = Tensor<<O as ThinOps>::Backend, 2>;

/// A vector of weights.
pub type Vector<O> = Tensor<<O as ThinOps>::Backend, 1>;

/// How the heads of one layer lie in a row of the fused projection: query heads, then keys, then values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// KV heads; each serves `heads / kv_heads` query heads, G.
    pub kv_heads: usize,
    /// Channels of a head, D.
    pub head_dim: usize,
}

impl Heads {
    /// Query heads of a KV head, G.
    #[must_use]
    pub const fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// The heads that a cache of `plan` has: each [copy](CachePlan::copies) of a KV head is one, and serves as many fewer
    /// query heads.
    #[must_use]
    pub const fn cached(self, plan: &CachePlan) -> Self {
        Self { kv_heads: plan.heads(), ..self }
    }

    /// Where the keys begin: the width of all query heads.
    #[must_use]
    pub const fn keys(self) -> usize {
        self.heads * self.head_dim
    }

    /// Where the values begin.
    #[must_use]
    pub const fn values(self) -> usize {
        self.keys() + self.kv_heads * self.head_dim
    }

    /// Width of a row.
    #[must_use]
    pub const fn width(self) -> usize {
        self.values() + self.kv_heads * self.head_dim
    }
}

/// RMS normalisation: x / √(mean x² + eps) · weight.
#[derive(Clone, Debug)]
pub struct Norm<B: Backend> {
    /// One factor a channel.
    pub weight: Tensor<B, 1>,
    /// Added to the mean square.
    pub eps: f32,
}

/// Normalisation of the heads before rotation, each over D channels.
#[derive(Clone, Debug)]
pub struct HeadNorms<B: Backend> {
    /// Of query heads.
    pub query: Norm<B>,
    /// Of key heads.
    pub key: Norm<B>,
}

/// Rotary embedding, and what some models do to query and key heads before it.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a, B: Backend> {
    /// Angular frequencies, [D/2], in radians a position.
    pub frequencies: &'a [f32],
    /// Which channels turn together.
    pub pairs: Pairs,
    /// Normalisation before it.
    pub norms: Option<&'a HeadNorms<B>>,
}

/// The cache of the sequences under way, one a slot.
///
/// A step goes through all layers with the same admission: [`begin`](Self::begin) for each slot, then
/// [`ThinOps::admit`] and [`ThinOps::attend`] for each layer, then [`commit`](Self::commit). A prompt goes through a layer
/// in runs of rows, [`ThinOps::hold`] and [`ThinOps::attend_prompt`] for each and [`ThinOps::admit_prompt`] after them. The
/// same prompt may be admitted to several caches, each thinning it in its own way, if none of them held anything before.
pub trait Cache {
    /// What was planned.
    fn plan(&self) -> &CachePlan;

    /// Bytes by part, as planned.
    fn planned(&self) -> CacheBytes;

    /// Bytes that are allocated for the parts that the plan counts.
    fn allocated(&self) -> usize;

    /// Newest queries of a prompt that score its channels, W.
    fn window(&self) -> usize;

    /// Newest queries of a prompt that are kept for its admission: W, or as many as vote for tokens.
    fn queries(&self) -> usize {
        self.window().max(self.plan().eviction.map_or(0, |eviction| eviction.voters()))
    }

    /// Whether tokens are evicted by the attention that they get: [`ThinOps::gather`] and [`ThinOps::gather_prompt`] are
    /// called then.
    fn gathers(&self) -> bool {
        self.plan().eviction.is_some_and(|eviction| eviction.gathers())
    }

    /// Says how channels are chosen, which is the default otherwise: for sequences to come.
    fn choose_by(&mut self, choosing: Choosing);

    /// Makes head h of layer l keep `kept(l, h)` channels, where nothing is held yet; a step may have begun.
    ///
    /// # Errors
    /// [`Error::Inconsistent`] where something is held; [`Error::Capacity`] with the bytes needed where they do not fit what
    /// is allocated: there is room for others than planned in a [flexible](CachePlan::flexible) plan only.
    fn spread(&mut self, kept: &dyn Fn(usize, usize) -> usize) -> Result<(), Error>;

    /// Position of the next token of `slot`: the tokens admitted so far, a step under way not counted.
    fn position(&self, slot: usize) -> usize;

    /// Whether `slot` can take `new` more tokens.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the tokens needed where the sequence would outgrow the plan.
    fn check(&self, slot: usize, new: usize) -> Result<(), Error> {
        let (needed, capacity) = (self.position(slot) + new, self.plan().tokens);
        if needed > capacity {
            return Err(Error::Capacity { what: "context tokens", needed, capacity });
        }
        Ok(())
    }

    /// Begins a step of `slot` that admits `new` tokens; `prompt` where they come from a prompt, see
    /// [`Span::admit`](thinkey_core::Span::admit).
    ///
    /// # Errors
    /// As [`check`](Self::check); nothing is changed then.
    fn begin(&mut self, slot: usize, new: usize, prompt: bool) -> Result<(), Error>;

    /// Ends the step of `slot`: the tokens are in every layer.
    fn commit(&mut self, slot: usize);

    /// Forgets the sequence of `slot`, a step under way included.
    fn clear(&mut self, slot: usize);

    /// How far the sequence of `slot` is, and the bytes that its heads take in a [snapshot](thinkey_core::snapshot). No step
    /// is under way.
    ///
    /// # Errors
    /// [`SnapshotError::Device`] where the cache takes none, whatever the slot; [`SnapshotError::Empty`].
    fn progress(&self, slot: usize) -> Result<(Progress, usize), SnapshotError> {
        let _ = slot;
        Err(SnapshotError::Device)
    }

    /// Appends T of every head, and then what the heads hold of the sequence of `slot`, as a snapshot has them.
    ///
    /// # Errors
    /// As [`progress`](Self::progress).
    fn save(&self, slot: usize, out: &mut Vec<u8>) -> Result<(), SnapshotError> {
        let _ = (slot, out);
        Err(SnapshotError::Device)
    }

    /// Makes `slot` hold the sequence of a snapshot of this model and policy: which is `progress` far, and whose heads keep
    /// `kept` channels each and hold `heads`. What it held before is forgotten, and nothing is held after an error.
    ///
    /// # Errors
    /// [`SnapshotError`] where that cannot be, or does not fit.
    fn restore(&mut self, slot: usize, progress: &Progress, kept: &[u16], heads: &[u8]) -> Result<(), SnapshotError> {
        let _ = (slot, progress, kept, heads);
        Err(SnapshotError::Device)
    }
}

/// How a cache chooses channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choosing {
    /// What key channels are scored by.
    pub score: Score,
    /// What value channels are scored by, where the plan drops some. First tokens that are thinned by a step and not by a
    /// prompt always go by energy.
    pub values: ThinValues,
    /// How long a mask holds, where the plan [renews](CachePlan::renews) them.
    pub life: Life,
}

/// When a sequence chooses key channels anew, and by how many queries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Renewal {
    /// Whether channels have been chosen.
    chosen: bool,
    /// Tokens thinned since.
    since: usize,
    /// Query rows of each query head in the energies, those of the step under way not counted.
    scored: usize,
    /// Whether the step under way comes from a prompt.
    prompt: bool,
}

impl Renewal {
    /// A step begins.
    pub(crate) fn begin(&mut self, prompt: bool) {
        self.prompt = prompt;
    }

    /// Whether queries count from this step on anew: what was thinned before does not concern them.
    pub(crate) fn starts_over(self, life: Life) -> bool {
        self.chosen && self.prompt && life == Life::Turn
    }

    /// Query rows of each query head that the step chooses by: those before, and its newest `window`.
    pub(crate) fn rows(self, life: Life, step: &Admission, window: usize) -> usize {
        let before = if self.starts_over(life) { 0 } else { self.scored };
        before + step.new.min(window)
    }

    /// Whether queries of the step count.
    pub(crate) fn counts(self, life: Life) -> bool {
        match life {
            _ if !self.chosen => true,
            Life::Prompt => false,
            Life::Turn => self.prompt,
            Life::Every { .. } => true,
        }
    }

    /// Whether the step chooses, if it is `step`.
    pub(crate) fn chooses(self, life: Life, step: &Admission) -> bool {
        !step.new_blocks().is_empty()
            && match life {
                _ if !self.chosen => true,
                Life::Prompt => false,
                Life::Turn => self.prompt,
                Life::Every { tokens } => self.since >= tokens as usize,
            }
    }

    /// Whether channels have been chosen, tokens thinned since, and query rows in the energies.
    pub(crate) const fn parts(self) -> (bool, usize, usize) {
        (self.chosen, self.since, self.scored)
    }

    /// That of these [parts](Self::parts), between two steps.
    pub(crate) const fn of(chosen: bool, since: usize, scored: usize) -> Self {
        Self { chosen, since, scored, prompt: false }
    }

    /// The step is in every layer.
    pub(crate) fn end(&mut self, life: Life, step: &Admission, window: usize) {
        if self.counts(life) {
            self.scored = self.rows(life, step, window);
        }
        if self.chooses(life, step) {
            (self.chosen, self.since, self.scored) = (true, 0, 0);
        }
        self.since += step.thinned;
    }
}

/// What a prompt [holds](ThinOps::hold) of one KV head in the layer at hand, on the host: after RoPE, row after row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeldHead {
    /// Channels of a row, D.
    pub head_dim: usize,
    /// Whole keys, `[tokens][D]`.
    pub keys: Vec<f32>,
    /// Values, `[tokens][D]`.
    pub values: Vec<f32>,
    /// Queries of the prompt's newest tokens, unscaled, `[G][window][D]`.
    pub queries: Vec<f32>,
    /// Tokens whose queries these are: W, or all of a shorter prompt.
    pub window: usize,
}

impl HeldHead {
    /// Tokens of the prompt, S.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.keys.len() / self.head_dim.max(1)
    }
}

/// The operations. `out` is memory for the result, whose contents are old; it has the result's shape.
///
/// # Panics
/// Every operation panics where shapes do not fit each other: models check theirs when they are loaded.
pub trait ThinOps {
    /// The backend whose tensors the activations are.
    type Backend: Backend;
    /// One or more weight matrices of as many columns, stacked along their rows.
    type Linear;
    /// The thin cache.
    type Cache: Cache + Sync;
    /// What a prompt attends to in the layer at hand: keys and values, its own and those of the past.
    type Prompt;

    /// A linear layer of `parts` stacked in their order, with a bias of as many values as they have rows together.
    ///
    /// # Errors
    /// [`LinearError`] where the parts do not fit together, the bias does not fit them, or there is nothing.
    fn linear(&self, parts: Vec<Matrix>, bias: Option<Vec<f32>>) -> Result<Self::Linear, LinearError>;

    /// A vector of weights.
    fn vector(&self, values: Vec<f32>) -> Vector<Self>;

    /// Memory for `rows` rows of activations of `width`.
    fn rows(&self, rows: usize, width: usize) -> Rows<Self>;

    /// An empty cache of `plan` where head h of layer l keeps `kept(l, h)` channels. The newest `window` queries of a
    /// prompt score its channels.
    ///
    /// # Errors
    /// [`CacheError`] where the plan cannot be or the memory cannot be had.
    fn cache(
        &self,
        plan: CachePlan,
        window: usize,
        kept: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self::Cache, CacheError>;

    /// Row `tokens[r]` of `table`, without its bias, as row r.
    fn embed(&mut self, table: &Self::Linear, tokens: &[u32], out: Rows<Self>) -> Rows<Self>;

    /// norm(x)·Wᵀ + bias for the rows `rows` of x.
    fn norm_linear(
        &mut self,
        x: &Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<Self::Backend>,
        linear: &Self::Linear,
        out: Rows<Self>,
    ) -> Rows<Self>;

    /// Normalises (where the model does) and rotates query and key heads of the fused rows; row r is at `position(r)`.
    fn rotate(
        &mut self,
        fused: Rows<Self>,
        heads: Heads,
        rotation: Rotation<'_, Self::Backend>,
        position: &(dyn Fn(usize) -> usize + Sync),
    ) -> Rows<Self>;

    /// Admits the keys and values of a step to a layer of the cache; fused row r is one token of the sequence of
    /// `slots[r]`. A sequence's first tokens to be thinned score its channels ([`thinkey_core::channel::score`]) and the
    /// best are chosen; then what leaves the recent ring is thinned, and the rest stored whole.
    ///
    /// # Errors
    /// Where a score is NaN; the sequences of the step can only be cleared then.
    fn admit(
        &mut self,
        cache: &mut Self::Cache,
        layer: usize,
        slots: &[usize],
        fused: &Rows<Self>,
        heads: Heads,
    ) -> Result<(), Error>;

    /// The attention output of a step, [rows, heads · D]: one softmax over everything that a row sees, scaled by 1/√D. Rows
    /// find themselves in the cache: they are [admitted](Self::admit) before.
    ///
    /// # Errors
    /// Where the cache is damaged.
    fn attend(
        &mut self,
        cache: &Self::Cache,
        layer: usize,
        slots: &[usize],
        fused: &Rows<Self>,
        heads: Heads,
        out: Rows<Self>,
    ) -> Result<Rows<Self>, Error>;

    /// Adds the attention that a step has paid to what its tokens are evicted by, in a cache that
    /// [gathers](Cache::gathers): right after [`attend`](Self::attend) of the same rows.
    ///
    /// # Errors
    /// Where the cache is damaged.
    fn gather(
        &mut self,
        cache: &mut Self::Cache,
        layer: usize,
        slots: &[usize],
        fused: &Rows<Self>,
        heads: Heads,
    ) -> Result<(), Error> {
        let _ = (cache, layer, slots, fused, heads);
        Ok(())
    }

    /// As [`gather`](Self::gather) for the rows of a prompt that were [held](Self::hold) last, where one of the caches that
    /// admit it gathers; `cache` is that which they attend to.
    ///
    /// # Errors
    /// As there.
    fn gather_prompt(
        &mut self,
        cache: &Self::Cache,
        layer: usize,
        prompt: &mut Self::Prompt,
        fused: &Rows<Self>,
    ) -> Result<(), Error> {
        let _ = (cache, layer, prompt, fused);
        Ok(())
    }

    /// Memory for what a prompt of `rows` tokens to the sequence of `slot`, whose step has begun, attends to in a layer,
    /// and for the queries of its newest `window` tokens: the largest [number](Cache::queries) of the caches that admit it.
    fn prompt(&self, cache: &Self::Cache, slot: usize, rows: usize, window: usize, heads: Heads) -> Self::Prompt;

    /// Takes keys and values of fused rows, the next of the prompt in `layer`; those after its last row are of the next
    /// layer. All runs of rows but the last are whole blocks of 32.
    ///
    /// # Errors
    /// Where the cache is damaged.
    fn hold(
        &mut self,
        cache: &Self::Cache,
        layer: usize,
        prompt: &mut Self::Prompt,
        fused: &Rows<Self>,
    ) -> Result<(), Error>;

    /// As [`attend`](Self::attend) for the rows of a prompt that were [held](Self::hold) last: they attend to the cache as
    /// it was before the prompt, and exactly to the prompt's rows.
    ///
    /// # Errors
    /// Where the cache is damaged.
    fn attend_prompt(
        &mut self,
        cache: &Self::Cache,
        layer: usize,
        prompt: &Self::Prompt,
        fused: &Rows<Self>,
        out: Rows<Self>,
    ) -> Result<Rows<Self>, Error>;

    /// As [`admit`](Self::admit) for a prompt whose rows are all [held](Self::hold); its newest W queries score. `cache` is
    /// that which the prompt attended to or, where that held nothing before, another whose step of `slot` has begun alike.
    ///
    /// # Errors
    /// As there.
    fn admit_prompt(&mut self, cache: &mut Self::Cache, layer: usize, prompt: &Self::Prompt) -> Result<(), Error>;

    /// Copies what `prompt`, whose rows of the layer are all [held](Self::hold), has of KV head `head` to the host.
    fn held(&self, prompt: &Self::Prompt, head: usize, out: &mut HeldHead);

    /// x, to whose rows `rows` input·Wᵀ + bias is added.
    fn add_linear(
        &mut self,
        input: &Rows<Self>,
        linear: &Self::Linear,
        x: Rows<Self>,
        rows: Range<usize>,
    ) -> Rows<Self>;

    /// x, to whose rows `rows` (silu(g) · u)·Wᵀ is added where [g, u] = norm(x)·W′ᵀ: `gate_up` is W′, gate stacked on up,
    /// and `down` is W.
    fn feed_forward(
        &mut self,
        x: Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<Self::Backend>,
        gate_up: &Self::Linear,
        down: &Self::Linear,
    ) -> Rows<Self>;

    /// Gives back memory that only prompts need: a long one is through.
    fn rest(&mut self) {}

    /// Gives back memory whose shapes are not those of what comes next: a prompt is through, or steps are of another number of
    /// rows than those before.
    fn trim(&mut self) {}

    /// Copies a tensor to the host, row after row.
    fn read(&self, rows: &Rows<Self>, out: &mut Vec<f32>);

    /// The `count` largest logits of each row and their tokens, row after row, each as [`keep_best`] has them; all where there
    /// are fewer. On devices nothing else is brought to the host, up to 64.
    fn best(&mut self, logits: &Rows<Self>, count: usize, out: &mut Vec<(u32, f32)>) {
        let (mut all, [rows, vocab]) = (Vec::new(), logits.dims());
        self.read(logits, &mut all);
        best_of_rows(&all, rows, vocab, count, out);
    }
}

/// [`keep_best`] of each of `rows` rows.
pub(crate) fn best_of_rows(logits: &[f32], rows: usize, vocab: usize, count: usize, out: &mut Vec<(u32, f32)>) {
    out.clear();
    out.reserve(rows * count.min(vocab));
    logits.chunks_exact(vocab).for_each(|row| keep_best(row, count, out));
}

/// Adds the `count` largest of `logits`, with their tokens, to `out`: best first, of equals the lower token; what is no number
/// counts as −∞.
pub fn keep_best(logits: &[f32], count: usize, out: &mut Vec<(u32, f32)>) {
    let first = out.len();
    for (token, &logit) in (0u32..).zip(logits) {
        let logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit };
        let full = out.len() - first == count;
        // Nearly all are less, which a comparison tells; it does not tell one 0 from the other.
        if full && out[first..].last().is_none_or(|last| logit < last.1 || logit.total_cmp(&last.1).is_le()) {
            continue;
        }
        if full {
            out.pop();
        }
        let place = out[first..].partition_point(|(_, other)| logit.total_cmp(other).is_le());
        out.insert(first + place, (token, logit));
    }
}
