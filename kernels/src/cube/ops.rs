//! The operations on a device: by kernels what a step of decoding does and how a prompt attends, and by tensor operations what
//! is left of a prompt: products with more than a few rows, whose weights are dequantised in parts.
//!
//! Plans with parts that the kernels have not (thin values, keys along their main directions or predicted, tokens evicted
//! one by one, masks that are chosen anew, channels shared out by each prompt) get a [cache of plain tensors](ReferenceCache),
//! which refuses what it has not either.

use super::{
    best,
    cache::DeviceCache,
    gemv::Outcome,
    held::Held,
    launch::{Layer, Numbers, allocate_exactly, allocate_in_pages, cubes, launch},
    linear::{DeviceLinear, FEW, NormOf, Span},
    residual::Told,
    rotate::{self, Turn},
};
use crate::{
    cpu::{cache::CacheError, linear::LinearError, rows::Pairs},
    format::Matrix,
    ops::{Cache, Choosing, HeadNorms, Heads, HeldHead, Norm, Rotation, Rows, ThinOps, Vector},
    reference::{Reference, ReferenceCache, ReferencePrompt, add},
};
use burn::tensor::{
    DType, Shape, Tensor, TensorData, TensorPrimitive,
    activation::{silu, softmax},
    backend::Backend,
};
use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use std::{
    marker::PhantomData,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};
use thinkey_core::{
    CacheBytes, CachePlan, Error,
    policy::Score,
    snapshot::{Progress, SnapshotError},
};

/// [`ThinOps`] for a device whose tensors are CubeCL's.
pub struct Device<B: Backend, R: CubeRuntime> {
    plain: Reference<B>,
    device: B::Device,
    /// Positions of the rows that were rotated last, and the frequencies: all layers turn by the same.
    positions: Option<(Vec<u32>, Numbers)>,
    frequencies: Option<(Vec<f32>, Numbers)>,
    /// What is hidden from the newest queries of a prompt that learns, and of which.
    hidden: Option<([usize; 4], Tensor<B, 3>)>,
    /// Whether a cache of plain tensors was asked for, whose tensors grow with every step.
    grows: AtomicBool,
    runtime: PhantomData<R>,
}

/// A cache on a device.
pub enum AnyCache<B: Backend, R: CubeRuntime> {
    /// Of blocks, by kernels.
    Blocks(Box<DeviceCache<R>>),
    /// Of plain tensors.
    Plain(Box<ReferenceCache<B>>),
}

/// What a prompt holds on a device, for the cache that it attends to.
pub enum AnyPrompt<B: Backend> {
    /// By kernels.
    Held(Held),
    /// By plain tensors.
    Plain(ReferencePrompt<B>),
}

/// Runs `$body` with the cache at hand.
macro_rules! any {
    ($cache:expr, |$inner:ident| $body:expr) => {
        match $cache {
            AnyCache::Blocks($inner) => $body,
            AnyCache::Plain($inner) => $body,
        }
    };
}

impl<B: Backend, R: CubeRuntime> Cache for AnyCache<B, R> {
    fn plan(&self) -> &CachePlan {
        any!(self, |cache| cache.plan())
    }

    fn planned(&self) -> CacheBytes {
        any!(self, |cache| cache.planned())
    }

    fn allocated(&self) -> usize {
        any!(self, |cache| cache.allocated())
    }

    fn window(&self) -> usize {
        any!(self, |cache| cache.window())
    }

    fn choose_by(&mut self, choosing: Choosing) {
        any!(self, |cache| cache.choose_by(choosing));
    }

    fn spread(&mut self, kept: &dyn Fn(usize, usize) -> usize) -> Result<(), Error> {
        any!(self, |cache| cache.spread(kept))
    }

    fn position(&self, slot: usize) -> usize {
        any!(self, |cache| cache.position(slot))
    }

    fn begin(&mut self, slot: usize, new: usize, prompt: bool) -> Result<(), Error> {
        any!(self, |cache| cache.begin(slot, new, prompt))
    }

    fn commit(&mut self, slot: usize) {
        any!(self, |cache| cache.commit(slot));
    }

    fn clear(&mut self, slot: usize) {
        any!(self, |cache| cache.clear(slot));
    }

    fn progress(&self, slot: usize) -> Result<(Progress, usize), SnapshotError> {
        any!(self, |cache| cache.progress(slot))
    }

    fn save(&self, slot: usize, out: &mut Vec<u8>) -> Result<(), SnapshotError> {
        any!(self, |cache| cache.save(slot, out))
    }

    fn restore(&mut self, slot: usize, progress: &Progress, kept: &[u16], heads: &[u8]) -> Result<(), SnapshotError> {
        any!(self, |cache| cache.restore(slot, progress, kept, heads))
    }
}

impl<B, R> Device<B, R>
where
    R: CubeRuntime,
    B: Backend<Device = R::Device, FloatTensorPrimitive = CubeTensor<R>>,
{
    /// The operations on `device`.
    #[must_use]
    pub fn new(device: B::Device) -> Self {
        let plain = Reference::new(device.clone());
        allocate_exactly(&R::client(&device));
        Self {
            plain,
            device,
            positions: None,
            frequencies: None,
            hidden: None,
            grows: AtomicBool::new(false),
            runtime: PhantomData,
        }
    }

    /// Bytes of the device's memory that are taken by what was allocated on this thread, used or not.
    ///
    /// # Panics
    /// Where the device fails.
    #[must_use]
    pub fn reserved(&self) -> usize {
        R::client(&self.device).memory_usage().expect("a device that works").bytes_reserved as usize
    }

    /// The numbers of a tensor, row after row.
    fn numbers<const D: usize>(&self, rows: &Tensor<B, D>) -> Numbers {
        let tensor = into_contiguous(rows.clone().into_primitive().tensor());
        assert_eq!(tensor.dtype, DType::F32, "activations are f32");
        let len = tensor.meta.shape().num_elements();
        Numbers { handle: tensor.handle, len }
    }

    /// The numbers of a tensor that nobody else has, row after row: to be written to.
    fn own(&self, rows: Rows<Self>) -> Numbers {
        let tensor = rows.into_primitive().tensor();
        let tensor = if tensor.is_contiguous() && !tensor.can_mut() { tensor.copy() } else { tensor };
        // Rows that lie apart are brought together in memory of their own.
        let tensor = into_contiguous(tensor);
        assert_eq!(tensor.dtype, DType::F32, "activations are f32");
        Numbers { len: tensor.meta.shape().num_elements(), handle: tensor.handle }
    }

    /// x·Wᵀ + bias by dequantised parts of the weights.
    fn large_product(&self, x: &Rows<Self>, linear: &DeviceLinear) -> Rows<Self> {
        let client = R::client(&self.device);
        let product = |(weights, rows): (Numbers, usize)| {
            x.clone().matmul(self.tensor(&weights, [rows, linear.cols()]).transpose())
        };
        let mut parts: Vec<_> = linear.parts(&client).map(product).collect();
        let out = if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(parts, 1) };
        match linear.bias() {
            Some(bias) => out + self.tensor(bias, [1, linear.rows()]),
            None => out,
        }
    }

    /// norm(x)·Wᵀ + bias of a few rows, in one launch a format.
    fn small_product(
        &self,
        (x, rows): (&Numbers, Range<usize>),
        norm: NormOf<'_>,
        linear: &DeviceLinear,
        outcome: Outcome,
    ) -> (Numbers, [usize; 2]) {
        let client = R::client(&self.device);
        let width = if outcome == Outcome::Gated { linear.rows() / 2 } else { linear.rows() };
        let out = Numbers::empty(&client, rows.len() * width);
        let from = Span { numbers: x, first: rows.start, width: linear.cols() };
        linear.multiply(&client, (from, Span { numbers: &out, first: 0, width }, rows.len()), norm, outcome);
        (out, [rows.len(), width])
    }

    /// Adds input·Wᵀ + bias of a few rows to the rows of `x` from `first` on.
    fn add_small_product(
        &self,
        input: &Numbers,
        linear: &DeviceLinear,
        x: Rows<Self>,
        rows: Range<usize>,
    ) -> Rows<Self> {
        let shape = x.dims();
        let out = self.own(x);
        let from = Span { numbers: input, first: 0, width: linear.cols() };
        let to = Span { numbers: &out, first: rows.start, width: shape[1] };
        linear.multiply(&R::client(&self.device), (from, to, rows.len()), None, Outcome::Added);
        self.tensor(&out, shape)
    }

    /// Learns how the queries of a layer are corrected from a prompt whose channels have just been chosen.
    fn learn(&mut self, cache: &DeviceCache<R>, layer: &Layer, prompt: &Held) {
        let Held { slot, heads, rows, .. } = *prompt;
        let plan = *cache.plan();
        let (cached, dim) = (heads.cached(&plan), heads.head_dim);
        let (group, step, window) = (cached.group(), *cache.step(slot), cache.window().min(rows));
        let (sinks, recent) = (step.before.sinks as usize, step.before.recent as usize);
        let (held, first) = (sinks + recent, step.after.sinks as usize);
        let tokens = held + rows;
        let own = self.tensor(&prompt.tokens, [rows, Held::width(heads)]);
        // The newest of those that are there.
        let newest = self.tensor(&prompt.queries, [prompt.window, heads.keys()]);
        let newest = newest.narrow(0, prompt.window - window, window);
        let past = (held > 0).then(|| {
            let keys = layer.whole_keys(&cache.client, slot, (sinks, recent));
            self.tensor(&keys, [cached.kv_heads * held, dim])
        });
        let hidden = self.hidden([window, tokens, first, plan.window.unwrap_or(usize::MAX)]);
        let mut parts = Vec::with_capacity(3 * cached.kv_heads);
        for head in 0..cached.kv_heads {
            let new = own.clone().narrow(1, head / plan.copies * dim, dim);
            let keys = match &past {
                Some(past) => Tensor::cat(vec![past.clone().narrow(0, head * held, held), new], 0),
                None => new,
            };
            let queries = newest.clone().narrow(1, head * group * dim, group * dim);
            let queries = queries.reshape([window, group, dim]).swap_dims(0, 1);
            let logits = queries.clone().matmul(keys.clone().transpose().unsqueeze::<3>()) / (dim as f32).sqrt();
            let mass = softmax(logits + hidden.clone(), 2).sum_dim(0).sum_dim(1).reshape([tokens, 1]);
            let mass = mass.narrow(0, first, step.thinned);
            // Half by attention, half alike; where all attention goes to sinks, alike.
            let by_mass = mass.clone() / (mass.sum_dim(0) + f32::MIN_POSITIVE) + 1.0 / step.thinned as f32;
            let weights = by_mass.clone() / by_mass.sum_dim(0);
            let keys = keys.narrow(0, first, step.thinned);
            let mean = (keys.clone() * weights.clone()).sum_dim(0);
            let centred = keys - mean.clone();
            let covariance = (centred.clone() * weights).transpose().matmul(centred);
            parts.extend([mean, covariance, queries.reshape([group * window, dim])]);
        }
        let told = Told { dim, rows: group * window };
        let numbers = self.numbers(&Tensor::cat(parts, 0));
        layer.learn(&cache.client, slot, (&numbers, told), cache.score() == Score::Residual);
    }

    /// What hides tokens from the newest queries, `[1, window, tokens]`, as `mass` in core: those after a query, and those
    /// before its window of `near` tokens, if they are no sinks, of which there are `sinks`. The same for all layers.
    fn hidden(&mut self, of: [usize; 4]) -> Tensor<B, 3> {
        let [window, tokens, sinks, near] = of;
        if let Some((_, hidden)) = self.hidden.as_ref().filter(|(known, _)| *known == of) {
            return hidden.clone();
        }
        let sees = |row: usize, token: usize| token <= row && (token < sinks || token.saturating_add(near) > row);
        let hidden: Vec<f32> = (tokens - window..tokens)
            .flat_map(|row| (0..tokens).map(move |token| if sees(row, token) { 0.0 } else { f32::NEG_INFINITY }))
            .collect();
        let hidden = Tensor::from_data(TensorData::new(hidden, [1, window, tokens]), &self.device);
        self.hidden.insert((of, hidden)).1.clone()
    }

    /// The tensor of numbers that a kernel writes.
    fn tensor(&self, numbers: &Numbers, shape: [usize; 2]) -> Rows<Self> {
        let (client, handle) = (R::client(&self.device), numbers.handle.clone());
        let tensor = CubeTensor::new_contiguous(client, self.device.clone(), Shape::from(shape), handle, DType::F32);
        Tensor::from_primitive(TensorPrimitive::Float(tensor))
    }

    /// What rows of fused numbers get from the cache alone: the output and its ends, `[rows, query heads · 2]`. They are those
    /// of a step, after it, or the rows of a prompt, before it.
    fn attend_cache(
        &self,
        cache: &DeviceCache<R>,
        layer: usize,
        rows: &[(usize, usize)],
        step: bool,
        fused: &Numbers,
        heads: Heads,
    ) -> (Numbers, Numbers) {
        let ((entries, count, most), pages) = cache.rows(rows, step);
        let out = Numbers::empty(&cache.client, count * heads.keys());
        let ends = Numbers::empty(&cache.client, count * heads.heads * 2);
        let (layer, seen) = (cache.layer(layer, heads), (&entries, count, most));
        if step {
            layer.attend(&cache.client, seen, &pages, fused, (&out, &ends));
        } else {
            layer.extend(&cache.client, seen, &pages, fused, (&out, &ends));
        }
        (out, ends)
    }

    /// What `prompt` holds, as plain tensors: the queries of older rows are zeros.
    fn plain_prompt(&self, prompt: &Held) -> ReferencePrompt<B> {
        let Held { slot, heads, rows, window, .. } = *prompt;
        let none = Tensor::zeros([prompt.unheld(), heads.keys()], &self.device);
        let queries = Tensor::cat(vec![none, self.tensor(&prompt.queries, [window, heads.keys()])], 0);
        let tokens = self.tensor(&prompt.tokens, [rows, Held::width(heads)]);
        let mut plain = ReferencePrompt::new(slot, rows, window, heads);
        plain.hold(&Tensor::cat(vec![queries, tokens], 1));
        plain
    }
}

/// silu(g) · u of rows [g, u].
fn gated<B: Backend>(wide: Tensor<B, 2>) -> Tensor<B, 2> {
    let inner = wide.dims()[1] / 2;
    silu(wide.clone().narrow(1, 0, inner)) * wide.narrow(1, inner, inner)
}

impl<B, R> ThinOps for Device<B, R>
where
    R: CubeRuntime,
    B: Backend<Device = R::Device, FloatTensorPrimitive = CubeTensor<R>>,
{
    type Backend = B;
    type Linear = DeviceLinear;
    type Cache = AnyCache<B, R>;
    type Prompt = AnyPrompt<B>;

    fn linear(&self, parts: Vec<Matrix>, bias: Option<Vec<f32>>) -> Result<Self::Linear, LinearError> {
        DeviceLinear::new(&R::client(&self.device), parts, bias)
    }

    fn vector(&self, values: Vec<f32>) -> Vector<Self> {
        self.plain.vector(values)
    }

    fn rows(&self, rows: usize, width: usize) -> Rows<Self> {
        self.tensor(&Numbers::empty(&R::client(&self.device), rows * width), [rows, width])
    }

    fn cache(
        &self,
        plan: CachePlan,
        window: usize,
        kept: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self::Cache, CacheError> {
        Ok(if DeviceCache::<R>::knows(&plan) {
            AnyCache::Blocks(Box::new(DeviceCache::new(R::client(&self.device), plan, window, kept)?))
        } else {
            let cache = self.plain.cache(plan, window, kept)?;
            self.grows.store(true, Relaxed);
            AnyCache::Plain(Box::new(cache))
        })
    }

    fn embed(&mut self, table: &Self::Linear, tokens: &[u32], _: Rows<Self>) -> Rows<Self> {
        // What begins here may run on another thread than what came before.
        let client = R::client(&self.device);
        if self.grows.load(Relaxed) {
            allocate_in_pages(&client);
        } else {
            allocate_exactly(&client);
        }
        self.tensor(&table.listed(&R::client(&self.device), tokens), [tokens.len(), table.cols()])
    }

    fn norm_linear(
        &mut self,
        x: &Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<B>,
        linear: &Self::Linear,
        _: Rows<Self>,
    ) -> Rows<Self> {
        if rows.len() > FEW {
            return self.large_product(&norm.apply(x.clone().narrow(0, rows.start, rows.len())), linear);
        }
        let (x, weight) = (self.numbers(x), self.numbers(&norm.weight));
        let (out, shape) = self.small_product((&x, rows), Some((&weight, norm.eps)), linear, Outcome::Stored);
        self.tensor(&out, shape)
    }

    fn rotate(
        &mut self,
        fused: Rows<Self>,
        heads: Heads,
        rotation: Rotation<'_, B>,
        position: &(dyn Fn(usize) -> usize + Sync),
    ) -> Rows<Self> {
        let ([rows, width], client) = (fused.dims(), R::client(&self.device));
        let positions: Vec<u32> = (0..rows).map(|row| position(row) as u32).collect();
        let positions = match &self.positions {
            Some((of, numbers)) if *of == positions => numbers.clone(),
            _ => {
                let numbers = Numbers::of(&client, &positions);
                self.positions.insert((positions, numbers)).1.clone()
            }
        };
        let frequencies = match &self.frequencies {
            Some((of, numbers)) if of == rotation.frequencies => numbers.clone(),
            _ => {
                let numbers = Numbers::of(&client, bytemuck::cast_slice(rotation.frequencies));
                self.frequencies.insert((rotation.frequencies.to_vec(), numbers)).1.clone()
            }
        };
        let turn = Turn {
            heads: heads.heads,
            dim: heads.head_dim,
            width,
            adjacent: rotation.pairs == Pairs::Adjacent,
            normed: rotation.norms.is_some(),
        };
        let (queries, keys, eps) = match rotation.norms {
            Some(HeadNorms { query, key }) => (self.numbers(&query.weight), self.numbers(&key.weight), query.eps),
            None => (frequencies.clone(), frequencies.clone(), 0.0),
        };
        let fused = self.own(fused);
        let cubes = cubes(heads.heads + heads.kv_heads, rows, 1);
        // SAFETY: there is a position a row, and a cube writes to the channels of its own head.
        unsafe {
            launch!(
                &client,
                rotate::rotate,
                rotate::UNITS,
                cubes,
                [fused, positions, frequencies, queries, keys],
                eps,
                turn
            );
        }
        self.tensor(&fused, [rows, width])
    }

    fn admit(
        &mut self,
        cache: &mut Self::Cache,
        layer: usize,
        slots: &[usize],
        fused: &Rows<Self>,
        heads: Heads,
    ) -> Result<(), Error> {
        let cache = match cache {
            AnyCache::Blocks(cache) => cache,
            AnyCache::Plain(cache) => return self.plain.admit(cache, layer, slots, fused, heads),
        };
        let (batch, own, fused) = (cache.batch(slots, 0), cache.layer(layer, heads), self.numbers(fused));
        cache.choose(layer, &own, &batch, (&fused, &fused));
        cache.store(&own, &batch, &fused);
        Ok(())
    }

    fn attend(
        &mut self,
        cache: &Self::Cache,
        layer: usize,
        slots: &[usize],
        fused: &Rows<Self>,
        heads: Heads,
        out: Rows<Self>,
    ) -> Result<Rows<Self>, Error> {
        let cache = match cache {
            AnyCache::Blocks(cache) => cache,
            AnyCache::Plain(cache) => return self.plain.attend(cache, layer, slots, fused, heads, out),
        };
        let window = cache.plan().window.unwrap_or(usize::MAX);
        let rows: Vec<_> = slots.iter().map(|&slot| (slot, window)).collect();
        let (out, _) = self.attend_cache(cache, layer, &rows, true, &self.numbers(fused), heads);
        Ok(self.tensor(&out, [slots.len(), heads.keys()]))
    }

    fn prompt(&self, cache: &Self::Cache, slot: usize, rows: usize, window: usize, heads: Heads) -> Self::Prompt {
        match cache {
            AnyCache::Blocks(cache) => AnyPrompt::Held(Held::new(&cache.client, slot, rows, window, heads)),
            AnyCache::Plain(_) => AnyPrompt::Plain(ReferencePrompt::new(slot, rows, window, heads)),
        }
    }

    fn hold(&mut self, _: &Self::Cache, _: usize, prompt: &mut Self::Prompt, fused: &Rows<Self>) -> Result<(), Error> {
        match prompt {
            AnyPrompt::Held(held) => {
                let [rows, _] = fused.dims();
                held.take(&R::client(&self.device), &self.numbers(fused), rows);
            }
            AnyPrompt::Plain(prompt) => prompt.hold(fused),
        }
        Ok(())
    }

    fn attend_prompt(
        &mut self,
        cache: &Self::Cache,
        layer: usize,
        prompt: &Self::Prompt,
        fused: &Rows<Self>,
        out: Rows<Self>,
    ) -> Result<Rows<Self>, Error> {
        let (cache, prompt) = match (cache, prompt) {
            (AnyCache::Blocks(cache), AnyPrompt::Held(prompt)) => (cache, prompt),
            (AnyCache::Plain(cache), AnyPrompt::Plain(prompt)) => {
                return self.plain.attend_prompt(cache, layer, prompt, fused, out);
            }
            _ => panic!("a prompt attends to the cache that it was made for"),
        };
        let (heads, [rows, _], fused) = (prompt.heads, fused.dims(), self.numbers(fused));
        let (before, plan) = (prompt.count - rows, *cache.plan());
        let window = plan.window.unwrap_or(usize::MAX);
        let past = (cache.span(prompt.slot, false).tokens() > 0).then(|| {
            // What the cache held, of the tokens within the window of a row.
            let seen: Vec<_> = (0..rows).map(|row| (prompt.slot, window.saturating_sub(before + row + 1))).collect();
            self.attend_cache(cache, layer, &seen, false, &fused, heads)
        });
        let (out, ends) = match past {
            Some((out, ends)) => (out, Some(ends)),
            None => (Numbers::empty(&cache.client, rows * heads.keys()), None),
        };
        // Of the prompt's own tokens.
        let sinks = plan.sinks.saturating_sub(cache.position(prompt.slot));
        prompt.attend(&cache.client, (&fused, rows), (window, sinks), ends.as_ref(), &out);
        Ok(self.tensor(&out, [rows, heads.keys()]))
    }

    fn admit_prompt(&mut self, cache: &mut Self::Cache, layer: usize, prompt: &Self::Prompt) -> Result<(), Error> {
        let cache = match (cache, prompt) {
            (AnyCache::Blocks(cache), _) => cache,
            (AnyCache::Plain(cache), AnyPrompt::Plain(prompt)) => return self.plain.admit_prompt(cache, layer, prompt),
            (AnyCache::Plain(cache), AnyPrompt::Held(prompt)) => {
                return self.plain.admit_prompt(cache, layer, &self.plain_prompt(prompt));
            }
        };
        let held;
        let prompt = match prompt {
            AnyPrompt::Held(prompt) => prompt,
            AnyPrompt::Plain(plain) => {
                let mut own = Held::new(&cache.client, plain.slot, plain.rows, plain.window, plain.heads);
                own.take(&cache.client, &self.numbers(&plain.fused()), plain.rows);
                held = own;
                &held
            }
        };
        assert_eq!(prompt.count, prompt.rows, "rows of the layer");
        let (batch, own) = (cache.batch(&[prompt.slot], prompt.unheld()), cache.layer_of_held(layer, prompt.heads));
        cache.choose(layer, &own, &batch, (&prompt.queries, &prompt.tokens));
        if cache.learns(prompt.slot) {
            self.learn(cache, &own, prompt);
        }
        cache.store(&own, &batch, &prompt.tokens);
        Ok(())
    }

    fn rest(&mut self) {
        self.trim();
    }

    fn trim(&mut self) {
        self.hidden = None;
        R::client(&self.device).memory_cleanup();
    }

    fn held(&self, prompt: &Self::Prompt, head: usize, out: &mut HeldHead) {
        match prompt {
            AnyPrompt::Held(held) => self.plain.held(&self.plain_prompt(held), head, out),
            AnyPrompt::Plain(prompt) => self.plain.held(prompt, head, out),
        }
    }

    fn add_linear(
        &mut self,
        input: &Rows<Self>,
        linear: &Self::Linear,
        x: Rows<Self>,
        rows: Range<usize>,
    ) -> Rows<Self> {
        if rows.len() > FEW {
            return add(x, rows, self.large_product(input, linear));
        }
        self.add_small_product(&self.numbers(input), linear, x, rows)
    }

    fn feed_forward(
        &mut self,
        x: Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<B>,
        gate_up: &Self::Linear,
        down: &Self::Linear,
    ) -> Rows<Self> {
        if rows.len() > FEW {
            let wide = self.large_product(&norm.apply(x.clone().narrow(0, rows.start, rows.len())), gate_up);
            return add(x, rows, self.large_product(&gated(wide), down));
        }
        let (input, weight) = (self.numbers(&x), self.numbers(&norm.weight));
        let norm = Some((&weight, norm.eps));
        let inner = if gate_up.gates() {
            self.small_product((&input, rows.clone()), norm, gate_up, Outcome::Gated).0
        } else {
            let (wide, shape) = self.small_product((&input, rows.clone()), norm, gate_up, Outcome::Stored);
            self.numbers(&gated(self.tensor(&wide, shape)))
        };
        // Or the sum would be in memory of its own.
        drop(input);
        self.add_small_product(&inner, down, x, rows)
    }

    fn read(&self, rows: &Rows<Self>, out: &mut Vec<f32>) {
        self.plain.read(rows, out);
    }

    fn best(&mut self, logits: &Rows<Self>, count: usize, out: &mut Vec<(u32, f32)>) {
        let [rows, vocab] = logits.dims();
        if count.min(vocab) > best::MOST {
            return self.plain.best(logits, count, out);
        }
        best::read_best(&R::client(&self.device), &self.numbers(logits), rows, count.min(vocab), out);
    }
}
