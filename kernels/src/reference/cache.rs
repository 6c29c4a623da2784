//! A thin cache of plain tensors.

use super::correction::{self, Correction, probabilities, weights};
use crate::{
    cpu::cache::CacheError,
    ops::{Cache, Choosing, Heads, Renewal},
};
use burn::tensor::{DType, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData, backend::Backend};
use half::{bf16, f16};
use thinkey_core::{
    Admission, CacheBytes, CachePlan, Error, Lambda, Span, StorageKind,
    channel::{compensate, random, sketch},
    policy::{Fix, Score, ThinValues},
    storage::Form,
};

/// Keys and values of consecutive tokens of one head, stored as the plan says.
#[derive(Clone, Debug)]
pub(super) struct Tokens<B: Backend> {
    keys: Tensor<B, 2>,
    values: Tensor<B, 2>,
}

impl<B: Backend> Tokens<B> {
    /// [tokens, channels], in `f32`.
    pub(super) fn keys(&self) -> Tensor<B, 2> {
        self.keys.clone().cast(FloatDType::F32)
    }

    /// [tokens, D], in `f32`.
    pub(super) fn values(&self) -> Tensor<B, 2> {
        self.values.clone().cast(FloatDType::F32)
    }

    fn join(before: Option<Self>, new: Self) -> Self {
        match before {
            Some(before) => Self {
                keys: Tensor::cat(vec![before.keys, new.keys], 0),
                values: Tensor::cat(vec![before.values, new.values], 0),
            },
            None => new,
        }
    }

    /// The `count` tokens from `first` on; `None` where they are none.
    fn part(&self, first: usize, count: usize) -> Option<Self> {
        let part = |rows: &Tensor<B, 2>| rows.clone().narrow(0, first, count);
        (count > 0).then(|| Self { keys: part(&self.keys), values: part(&self.values) })
    }

    fn bytes(&self) -> usize {
        let bytes = |rows: &Tensor<B, 2>| rows.shape().num_elements() * rows.dtype().size();
        bytes(&self.keys) + bytes(&self.values)
    }
}

/// What one head holds of one sequence.
#[derive(Clone, Debug)]
pub(super) struct Head<B: Backend> {
    /// First tokens, whole.
    pub(super) sinks: Option<Tokens<B>>,
    /// Thin tokens.
    pub(super) prefix: Option<Tokens<B>>,
    /// Whole tokens.
    pub(super) recent: Option<Tokens<B>>,
    /// Channels kept, ascending.
    pub(super) mask: Option<Tensor<B, 1, Int>>,
    /// 1 for value channels kept, 0 for others, [1, D], where some are not: the prefix has zeros in these.
    values: Option<Tensor<B, 2>>,
    /// How queries are corrected for the channels that are not kept.
    pub(super) correction: Option<Correction<B>>,
    /// Sum of the squares of the queries so far, [D].
    energy: Option<Tensor<B, 1>>,
}

impl<B: Backend> Default for Head<B> {
    fn default() -> Self {
        Self { sinks: None, prefix: None, recent: None, mask: None, values: None, correction: None, energy: None }
    }
}

#[derive(Clone, Debug, Default)]
struct Slot {
    span: Span,
    step: Option<Admission>,
    renewal: Renewal,
    position: usize,
}

/// A thin cache of plain tensors; it grows with the sequences.
#[derive(Clone, Debug)]
pub struct ReferenceCache<B: Backend> {
    device: B::Device,
    plan: CachePlan,
    planned: CacheBytes,
    window: usize,
    choosing: Choosing,
    /// Channels kept, one a layer and head.
    kept: Vec<usize>,
    slots: Vec<Slot>,
    /// One a slot, layer and head.
    heads: Vec<Head<B>>,
}

impl<B: Backend> ReferenceCache<B> {
    /// An empty cache; as [`ThinOps::cache`](crate::ops::ThinOps::cache), but not of quantised kinds, and not of those that
    /// evict tokens by their ranks.
    pub(super) fn new(
        device: &B::Device,
        plan: CachePlan,
        window: usize,
        kept: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self, CacheError> {
        if let Some(kind) = [plan.keys, plan.values].into_iter().find(|kind| !matches!(kind.form(), Form::Float(_))) {
            return Err(CacheError::Kind { kind });
        }
        match plan.fix {
            Fix::None | Fix::Compensated => {}
            Fix::Lowrank => return Err(CacheError::Part { part: "fix=lowrank" }),
            Fix::Predictive => return Err(CacheError::Part { part: "fix=predictive" }),
        }
        if plan.eviction.is_some() {
            return Err(CacheError::Eviction);
        }
        let heads = plan.layers * plan.heads();
        Ok(Self {
            device: device.clone(),
            plan,
            planned: plan.bytes(kept)?,
            window,
            choosing: Choosing::default(),
            kept: (0..heads).map(|head| kept(head / plan.heads(), head % plan.heads())).collect(),
            slots: vec![Slot::default(); plan.slots],
            heads: vec![Head::default(); heads * plan.slots],
        })
    }

    fn index(&self, layer: usize, head: usize, slot: usize) -> usize {
        slot * self.kept.len() + layer * self.plan.heads() + head
    }

    /// What a head holds of a sequence.
    pub(super) fn head(&self, layer: usize, head: usize, slot: usize) -> &Head<B> {
        &self.heads[self.index(layer, head, slot)]
    }

    /// `rows` as the plan stores them. Where the backend has no half precision, they are rounded to it and kept in
    /// `f32`.
    fn stored(&self, rows: Tensor<B, 2>, kind: StorageKind) -> Tensor<B, 2> {
        if kind == StorageKind::F32 {
            return rows;
        }
        let bf16 = kind == StorageKind::Bf16;
        let (dtype, float) = if bf16 { (DType::BF16, FloatDType::BF16) } else { (DType::F16, FloatDType::F16) };
        if B::supports_dtype(&self.device, dtype) {
            return rows.cast(float);
        }
        let shape = rows.dims();
        let round = |x| if bf16 { bf16::from_f32(x).to_f32() } else { f16::from_f32(x).to_f32() };
        let rounded: Vec<f32> = rows.into_data().iter::<f32>().map(round).collect();
        Tensor::from_data(TensorData::new(rounded, shape), &self.device)
    }

    /// Admits the fused rows of new tokens of `slot` to a layer; `prompt` where they come from a prompt.
    pub(super) fn admit(
        &mut self,
        layer: usize,
        slot: usize,
        fused: Tensor<B, 2>,
        heads: Heads,
        prompt: bool,
    ) -> Result<(), Error> {
        let step = self.slots[slot].step.expect("a step is under way");
        let (rows, dim) = (fused.dims()[0], heads.head_dim);
        let scoring = rows.min(self.window);
        let copies = self.plan.copies;
        let renewal = self.slots[slot].renewal;
        let cached = heads.cached(&self.plan);
        for cached_head in 0..cached.kv_heads {
            let column = |at: usize, width: usize| fused.clone().narrow(1, at, width);
            let keys = column(heads.keys() + cached_head / copies * dim, dim);
            let values = column(heads.values() + cached_head / copies * dim, dim);
            let index = self.index(layer, cached_head, slot);
            let mut head = std::mem::take(&mut self.heads[index]);
            let life = self.choosing.life;
            if renewal.starts_over(life) {
                head.energy = None;
            }
            if renewal.counts(life) {
                let width = cached.group() * dim;
                let queries = column(cached_head * width, width).narrow(0, rows - scoring, scoring);
                let energy = squares(queries.clone().reshape([scoring * cached.group(), dim]));
                let energy = match head.energy.take() {
                    Some(before) => before + energy,
                    None => energy,
                };
                if !renewal.chooses(life, &step) {
                    head.energy = Some(energy);
                } else {
                    let scored = renewal.rows(life, &step, self.window) * cached.group();
                    let all = match &head.recent {
                        Some(recent) => Tensor::cat(vec![recent.keys(), keys.clone()], 0),
                        None => keys.clone(),
                    };
                    let tokens = all.dims()[0];
                    let at = index % self.kept.len();
                    let score = match self.choosing.score {
                        Score::Query | Score::Residual => energy / scored as f32 * squares(all.clone()) / tokens as f32,
                        Score::Sample { tokens: most } => {
                            let every = tokens.div_ceil(most.max(1) as usize) as i32;
                            let rows = Tensor::arange_step(0..tokens as i64, every as usize, &self.device);
                            let count = rows.dims()[0];
                            energy / scored as f32 * squares(all.clone().select(0, rows)) / count as f32
                        }
                        Score::L1 => all.clone().abs().mean_dim(0).reshape([dim]),
                        Score::L2 => (squares(all.clone()) / tokens as f32).sqrt(),
                        Score::Random { seed } => {
                            let mut scores = vec![0.0; dim];
                            random::random(seed, at, &mut scores);
                            Tensor::from_data(TensorData::new(scores, [dim]), &self.device)
                        }
                        Score::Sketch { rows } => {
                            let keys: Vec<f32> = all.clone().into_data().iter::<f32>().collect();
                            let (mut lines, mut sketched) = (vec![0.0; rows as usize * dim], vec![0.0; dim]);
                            sketch::add(&keys, tokens, dim, dim, [at as u64, 0], &mut lines)?;
                            sketch::energy(&lines, &mut sketched)?;
                            let sketched = Tensor::from_data(TensorData::new(sketched, [dim]), &self.device);
                            energy / scored as f32 * sketched / tokens as f32
                        }
                    };
                    let mask = self.best(score, self.kept[at])?;
                    // Sinks come before all others.
                    let seen = |all: Tensor<B, 2>, sinks: fn(&Tokens<B>) -> Tensor<B, 2>| match &head.sinks {
                        Some(before) => Tensor::cat(vec![sinks(before), all], 0),
                        None => all,
                    };
                    let first = step.after.sinks as usize;
                    let window = self.plan.window.unwrap_or(usize::MAX);
                    let attention = || probabilities(queries.clone(), seen(all.clone(), Tokens::keys), window, first);
                    if self.plan.value_lambda != Lambda::WHOLE && head.values.is_none() {
                        let new = values.clone();
                        let all = match &head.recent {
                            Some(recent) => Tensor::cat(vec![recent.values(), new], 0),
                            None => new,
                        };
                        let score = match self.choosing.values {
                            ThinValues::Query { .. } if prompt => {
                                squares(attention().matmul(seen(all, Tokens::values)))
                            }
                            _ => squares(all),
                        };
                        let kept = self.best(score, self.plan.value_lambda.kept(dim))?;
                        head.values = Some(self.ones(&kept, dim));
                    }
                    if self.plan.fix == Fix::Compensated {
                        let (held, thinned) = (step.before.recent as usize, step.thinned);
                        let correction = if prompt && compensate::tells(thinned, dim) {
                            let weights = weights(attention(), first..first + thinned);
                            let seen = seen(all, Tokens::keys);
                            correction::learn(seen.narrow(0, first, thinned), weights, &mask)
                        } else {
                            // Where some sinks are among the new tokens, nothing is held.
                            correction::means(all.narrow(0, step.sunk, held + rows - step.sunk), &mask)
                        };
                        head.correction = Some(correction);
                    }
                    head.mask = Some(mask);
                }
            }
            let new = Tokens { keys: self.stored(keys, self.plan.keys), values: self.stored(values, self.plan.values) };
            if let Some(sunk) = new.part(0, step.sunk) {
                head.sinks = Some(Tokens::join(head.sinks.take(), sunk));
            }
            let Some(new) = new.part(step.sunk, rows - step.sunk) else {
                self.heads[index] = head;
                continue;
            };
            let whole = Tokens::join(head.recent.take(), new);
            if let (Some(mask), Some(thinned)) = (&head.mask, whole.part(0, step.thinned)) {
                // Where masks change, every token stays as long as it was, with zeros.
                let keys = if self.plan.renews {
                    thinned.keys.clone() * self.ones(mask, dim).cast(thinned.keys.dtype())
                } else {
                    thinned.keys.select(1, mask.clone())
                };
                let thinned = Tokens {
                    keys,
                    values: match &head.values {
                        Some(mask) => thinned.values.clone() * mask.clone().cast(thinned.values.dtype()),
                        None => thinned.values,
                    },
                };
                let prefix = Tokens::join(head.prefix.take(), thinned);
                head.prefix = Some(prefix);
            }
            // What a sliding window has left behind goes.
            let seen = step.after.prefix();
            head.prefix = head.prefix.and_then(|prefix| prefix.part(prefix.keys.dims()[0] - seen, seen));
            head.recent = whole.part(step.thinned, step.after.recent as usize);
            self.heads[index] = head;
        }
        Ok(())
    }

    /// 1 for the channels of `mask` and 0 for the others of `dim`, [1, D].
    fn ones(&self, mask: &Tensor<B, 1, Int>, dim: usize) -> Tensor<B, 2> {
        let ones = Tensor::ones([mask.dims()[0]], &self.device);
        let zeros = Tensor::<B, 1>::zeros([dim], &self.device);
        zeros.scatter(0, mask.clone(), ones, IndexingUpdateOp::Add).reshape([1, dim])
    }

    /// The `count` channels of the highest score, ascending; of equal scores the lower channel.
    fn best(&self, score: Tensor<B, 1>, count: usize) -> Result<Tensor<B, 1, Int>, Error> {
        let score: Vec<f32> = score.into_data().iter::<f32>().collect();
        if let Some(channel) = score.iter().position(|score| score.is_nan()) {
            return Err(Error::NotANumber { channel });
        }
        let mut channels: Vec<i64> = (0..score.len() as i64).collect();
        channels.sort_by(|&a, &b| score[b as usize].total_cmp(&score[a as usize]));
        channels.truncate(count);
        channels.sort_unstable();
        Ok(Tensor::from_data(TensorData::new(channels, [count]), &self.device))
    }
}

/// Sum of the squares of each column.
fn squares<B: Backend>(rows: Tensor<B, 2>) -> Tensor<B, 1> {
    let width = rows.dims()[1];
    rows.powf_scalar(2.0).sum_dim(0).reshape([width])
}

impl<B: Backend> Cache for ReferenceCache<B> {
    fn plan(&self) -> &CachePlan {
        &self.plan
    }

    fn planned(&self) -> CacheBytes {
        self.planned
    }

    fn allocated(&self) -> usize {
        self.heads.iter().flat_map(|head| [&head.sinks, &head.prefix, &head.recent]).flatten().map(Tokens::bytes).sum()
    }

    fn window(&self) -> usize {
        self.window
    }

    fn choose_by(&mut self, choosing: Choosing) {
        self.choosing = choosing;
    }

    fn spread(&mut self, kept: &dyn Fn(usize, usize) -> usize) -> Result<(), Error> {
        let heads = self.plan.heads();
        (0..self.kept.len()).for_each(|head| self.kept[head] = kept(head / heads, head % heads));
        Ok(())
    }

    fn position(&self, slot: usize) -> usize {
        self.slots[slot].position
    }

    fn begin(&mut self, slot: usize, new: usize, prompt: bool) -> Result<(), Error> {
        self.check(slot, new)?;
        let state = &mut self.slots[slot];
        state.step = Some(state.span.admit(new, self.plan.retention(), prompt));
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

    fn clear(&mut self, slot: usize) {
        let heads = self.kept.len();
        self.heads[slot * heads..(slot + 1) * heads].fill(Head::default());
        self.slots[slot] = Slot::default();
    }
}
