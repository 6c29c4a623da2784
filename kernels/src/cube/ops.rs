//! The operations on a device: by kernels what a step of decoding does, and by tensor operations what is left of a prompt:
//! products with more than a few rows, whose weights are dequantised in parts, and its attention to itself.
//!
//! Plans with parts that the kernels have not (thin values, keys along their main directions or predicted, tokens evicted
//! one by one, masks that are chosen anew, channels shared out by each prompt) get a [cache of plain tensors](ReferenceCache),
//! which refuses what it has not either.

use super::{
    cache::DeviceCache,
    gemv::Outcome,
    launch::{Layer, Numbers, cubes, launch},
    linear::{DeviceLinear, FEW, NormOf, Span},
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
use half::f16;
use std::{marker::PhantomData, ops::Range};
use thinkey_core::{
    CacheBytes, CachePlan, ChannelMask, Error,
    channel::{
        compensate::{self, Correction},
        residual,
    },
    policy::Score,
    storage::{Element, FloatKind},
};

/// Query rows of a prompt that attend to its own tokens at once: bounds the scores that are held.
const ROWS: usize = 128;

/// [`ThinOps`] for a device whose tensors are CubeCL's.
pub struct Device<B: Backend, R: CubeRuntime> {
    plain: Reference<B>,
    device: B::Device,
    /// Positions of the rows that were rotated last, and the frequencies: all layers turn by the same.
    positions: Option<(Vec<u32>, Numbers)>,
    frequencies: Option<(Vec<f32>, Numbers)>,
    runtime: PhantomData<R>,
}

/// A cache on a device.
pub enum AnyCache<B: Backend, R: CubeRuntime> {
    /// Of blocks, by kernels.
    Blocks(Box<DeviceCache<R>>),
    /// Of plain tensors.
    Plain(Box<ReferenceCache<B>>),
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
        Self { plain, device, positions: None, frequencies: None, runtime: PhantomData }
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
    ///
    /// The covariance is the device's work; what it reads back once a layer, some D² numbers a head, is solved on the host.
    fn learn(
        &self,
        cache: &DeviceCache<R>,
        number: usize,
        layer: &Layer,
        prompt: &ReferencePrompt<B>,
        fused: &Rows<Self>,
    ) -> Result<(), Error> {
        let (plan, heads, slot) = (*cache.plan(), prompt.heads, prompt.slot);
        let (cached, dim, [rows, _]) = (heads.cached(&plan), heads.head_dim, fused.dims());
        let (group, step, window) = (cached.group(), *cache.step(slot), cache.window().min(rows));
        let (sinks, recent) = (step.before.sinks as usize, step.before.recent as usize);
        let (held, first) = (sinks + recent, step.after.sinks as usize);
        let tokens = held + rows;
        let past = (held > 0).then(|| {
            let keys = layer.whole_keys(&cache.client, slot, (sinks, recent));
            self.tensor(&keys, [cached.kv_heads * held, dim])
        });
        // As `mass` in core: tokens after a query, and those before its window that are no sinks, get nothing.
        let near = plan.window.unwrap_or(usize::MAX);
        let sees = |row: usize, token: usize| token <= row && (token < first || token.saturating_add(near) > row);
        let hidden: Vec<f32> = (tokens - window..tokens)
            .flat_map(|row| (0..tokens).map(move |token| if sees(row, token) { 0.0 } else { f32::NEG_INFINITY }))
            .collect();
        let hidden = Tensor::<B, 3>::from_data(TensorData::new(hidden, [1, window, tokens]), &self.device);
        let mut parts = Vec::with_capacity(3 * cached.kv_heads);
        for head in 0..cached.kv_heads {
            let new = fused.clone().narrow(1, heads.keys() + head / plan.copies * dim, dim);
            let keys = match &past {
                Some(past) => Tensor::cat(vec![past.clone().narrow(0, head * held, held), new], 0),
                None => new,
            };
            let queries = fused.clone().narrow(0, rows - window, window).narrow(1, head * group * dim, group * dim);
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
        let numbers: Vec<f32> = Tensor::cat(parts, 0).into_data().iter::<f32>().collect();
        let chosen = match cache.score() {
            Score::Residual => None,
            _ => {
                let chosen = cache.client.read_one_unchecked(layer.channels.handle.clone());
                Some(bytemuck::pod_collect_to_vec::<u8, u32>(&chosen))
            }
        };
        let (mut words, mut places) = (Vec::new(), Vec::new());
        let (mut channels, mut lists) = (Vec::new(), Vec::new());
        for (head, numbers) in numbers.chunks_exact((1 + dim + group * window) * dim).enumerate() {
            let (mean, rest) = numbers.split_at(dim);
            let (covariance, queries) = rest.split_at(dim * dim);
            let mut covariance = covariance.to_vec();
            compensate::complete(&mut covariance, dim);
            let (layout, start) = cache.layout(number, head);
            let (kept, list) = (usize::from(layout.kept), (slot * cached.kv_heads + head) * dim);
            let mask = match &chosen {
                Some(chosen) => {
                    ChannelMask::from_channels(dim, chosen[list..list + kept].iter().map(|&channel| channel as usize))?
                }
                None => {
                    let (mut left, mut moment) = (covariance.clone(), vec![0.0; dim * dim]);
                    residual::moment(queries, group * window, dim, dim, &mut moment)?;
                    let (mut scratch, mut gains) = (vec![0.0; residual::scratch_len(dim)], vec![0.0; dim]);
                    residual::choose(&mut left, &moment, kept, &mut scratch, &mut gains, &mut vec![0; kept])?
                }
            };
            if kept < dim {
                let solved = match layout.correction_kind() {
                    FloatKind::F32 => solve::<f32>(mean, &covariance, &mask)?,
                    _ => solve::<f16>(mean, &covariance, &mask)?,
                };
                let at = (start + layout.correction(slot).start) / 4;
                places.push([words.len() as u32, at as u32, solved.len() as u32]);
                words.extend(solved);
            }
            lists.push([channels.len() as u32, list as u32, dim as u32]);
            let lost = (0..dim).filter(|&channel| !mask.contains(channel));
            channels.extend(mask.channels().chain(lost).map(|channel| channel as u32));
        }
        if !places.is_empty() {
            Layer::place(&cache.client, &words, &places, &layer.arena);
        }
        Layer::place(&cache.client, &channels, &lists, &layer.channels);
        Ok(())
    }

    /// The tensor of numbers that a kernel writes.
    fn tensor(&self, numbers: &Numbers, shape: [usize; 2]) -> Rows<Self> {
        let (client, handle) = (R::client(&self.device), numbers.handle.clone());
        let tensor = CubeTensor::new_contiguous(client, self.device.clone(), Shape::from(shape), handle, DType::F32);
        Tensor::from_primitive(TensorPrimitive::Float(tensor))
    }

    /// What rows of fused numbers get from the cache alone: the output and its ends, `[rows, query heads · 2]`.
    fn attend_cache(
        &self,
        cache: &DeviceCache<R>,
        layer: usize,
        rows: &[(usize, usize)],
        admitted: bool,
        fused: &Rows<Self>,
        heads: Heads,
    ) -> (Rows<Self>, Rows<Self>) {
        let ((entries, count, most), pages) = cache.rows(rows, admitted);
        let out = Numbers::empty(&cache.client, count * heads.keys());
        let fused = self.numbers(fused);
        let ends = cache.layer(layer, heads).attend(&cache.client, (&entries, count, most), &pages, &fused, &out);
        (self.tensor(&out, [count, heads.keys()]), self.tensor(&ends, [count, heads.heads * 2]))
    }
}

/// silu(g) · u of rows [g, u].
fn gated<B: Backend>(wide: Tensor<B, 2>) -> Tensor<B, 2> {
    let inner = wide.dims()[1] / 2;
    silu(wide.clone().narrow(1, 0, inner)) * wide.narrow(1, inner, inner)
}

/// The words of the correction for `mask` that core solves for.
fn solve<E: Element>(mean: &[f32], covariance: &[f32], mask: &ChannelMask) -> Result<Vec<u32>, Error> {
    let (dim, kept) = (mask.head_dim(), mask.kept());
    let mut scratch = vec![0.0; Correction::scratch_len(kept)];
    // In whole words.
    let mut numbers = vec![E::store(0.0); Correction::len(dim, kept).next_multiple_of(2)];
    Correction::solve(mean, covariance, mask, &mut scratch, &mut numbers)?;
    Ok(bytemuck::pod_collect_to_vec(&numbers))
}

impl<B, R> ThinOps for Device<B, R>
where
    R: CubeRuntime,
    B: Backend<Device = R::Device, FloatTensorPrimitive = CubeTensor<R>>,
{
    type Backend = B;
    type Linear = DeviceLinear;
    type Cache = AnyCache<B, R>;
    type Prompt = ReferencePrompt<B>;

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
            AnyCache::Plain(Box::new(self.plain.cache(plan, window, kept)?))
        })
    }

    fn embed(&mut self, table: &Self::Linear, tokens: &[u32], _: Rows<Self>) -> Rows<Self> {
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
        let (batch, own, fused) = (cache.batch(slots), cache.layer(layer, heads), self.numbers(fused));
        cache.choose(layer, &own, &batch, &fused);
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
        Ok(self.attend_cache(cache, layer, &rows, true, fused, heads).0)
    }

    fn prompt(&self, _: &Self::Cache, slot: usize, rows: usize, window: usize, heads: Heads) -> Self::Prompt {
        ReferencePrompt::new(slot, rows, window, heads)
    }

    fn hold(&mut self, _: &Self::Cache, _: usize, prompt: &mut Self::Prompt, fused: &Rows<Self>) -> Result<(), Error> {
        prompt.hold(fused);
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
        let cache = match cache {
            AnyCache::Blocks(cache) => cache,
            AnyCache::Plain(cache) => return self.plain.attend_prompt(cache, layer, prompt, fused, out),
        };
        let heads = prompt.heads;
        let (own, dim, group, kv_heads) = (prompt.so_far(), heads.head_dim, heads.group(), heads.kv_heads);
        let ([rows, _], [tokens, _]) = (fused.dims(), own.dims());
        let (before, past) = (tokens - rows, cache.span(prompt.slot, false));
        let (first, plan) = (cache.position(prompt.slot), *cache.plan());
        let window = plan.window.unwrap_or(usize::MAX);
        let mut outputs = Vec::new();
        for start in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - start);
            let chunk = fused.clone().narrow(0, start, count);
            // Own tokens: those up to the row, within the window or among the sinks.
            let hidden: Vec<f32> = (before + start..before + start + count)
                .flat_map(|row| {
                    (0..tokens).map(move |token| {
                        let near = first + token < plan.sinks || token.saturating_add(window) > row;
                        if token <= row && near { 0.0 } else { f32::NEG_INFINITY }
                    })
                })
                .collect();
            let hidden = Tensor::<B, 3>::from_data(TensorData::new(hidden, [1, count, tokens]), &self.device);
            let (mut tops, mut sums, mut mixes) = (Vec::new(), Vec::new(), Vec::new());
            for head in 0..kv_heads {
                let queries = chunk.clone().narrow(1, head * group * dim, group * dim);
                let queries = queries.reshape([count, group, dim]).swap_dims(0, 1);
                let part = |at: usize| own.clone().narrow(1, at + head * dim, dim).unsqueeze::<3>();
                let scores = queries.matmul(part(heads.keys()).transpose()) / (dim as f32).sqrt() + hidden.clone();
                let top = scores.clone().max_dim(2);
                let weights = (scores - top.clone()).exp();
                sums.push(weights.clone().sum_dim(2));
                tops.push(top);
                mixes.push(weights.matmul(part(heads.values())));
            }
            // [rows, heads, 1 or D].
            let all = |parts: Vec<Tensor<B, 3>>| Tensor::cat(parts, 0).swap_dims(0, 1);
            let (top, sum, mix) = (all(tops), all(sums), all(mixes));
            outputs.push(if past.tokens() == 0 {
                (mix / sum).reshape([count, heads.keys()])
            } else {
                // And what the cache held before, by the log-sum-exp of both.
                let seen = |row: usize| (prompt.slot, window.saturating_sub(before + start + row + 1));
                let rows: Vec<_> = (0..count).map(seen).collect();
                let (out, ends) = self.attend_cache(cache, layer, &rows, false, &chunk, heads);
                let (out, ends) = (out.reshape([count, heads.heads, dim]), ends.reshape([count, heads.heads, 2]));
                let past_top = ends.clone().narrow(2, 0, 1);
                let most = past_top.clone().max_pair(top.clone());
                let past = ends.narrow(2, 1, 1) * (past_top - most.clone()).exp();
                let by = (top - most).exp();
                ((mix * by.clone() + out * past.clone()) / (sum * by + past)).reshape([count, heads.keys()])
            });
        }
        Ok(Tensor::cat(outputs, 0))
    }

    fn admit_prompt(&mut self, cache: &mut Self::Cache, layer: usize, prompt: &Self::Prompt) -> Result<(), Error> {
        let cache = match cache {
            AnyCache::Blocks(cache) => cache,
            AnyCache::Plain(cache) => return self.plain.admit_prompt(cache, layer, prompt),
        };
        let (batch, own, rows) = (cache.batch(&[prompt.slot]), cache.layer(layer, prompt.heads), prompt.fused());
        let fused = self.numbers(&rows);
        cache.choose(layer, &own, &batch, &fused);
        if cache.learns(prompt.slot) {
            self.learn(cache, layer, &own, prompt, &rows)?;
        }
        cache.store(&own, &batch, &fused);
        Ok(())
    }

    fn held(&self, prompt: &Self::Prompt, head: usize, out: &mut HeldHead) {
        self.plain.held(prompt, head, out);
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
}
