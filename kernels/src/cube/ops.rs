//! The operations on a device: the cache and attention to it by kernels, the others by plain tensor operations.
//!
//! Plans with parts that the kernels have not yet (a correction of queries, thin or turned values, masks that are chosen anew,
//! channels shared out by each prompt) get a [cache of plain tensors](ReferenceCache), as before there were kernels.

use super::{cache::DeviceCache, launch::Numbers};
use crate::{
    cpu::{cache::CacheError, linear::LinearError},
    format::Matrix,
    ops::{Cache, Choosing, Heads, HeldHead, Norm, Rotation, Rows, ThinOps, Vector},
    reference::{Reference, ReferenceCache, ReferenceLinear, ReferencePrompt},
};
use burn::tensor::{DType, Shape, Tensor, TensorData, TensorPrimitive, backend::Backend};
use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use std::{marker::PhantomData, ops::Range};
use thinkey_core::{CacheBytes, CachePlan, Error};

/// Query rows of a prompt that attend to its own tokens at once: bounds the scores that are held.
const ROWS: usize = 128;

/// [`ThinOps`] for a device whose tensors are CubeCL's.
pub struct Device<B: Backend, R: CubeRuntime> {
    plain: Reference<B>,
    device: B::Device,
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
        Self { plain: Reference::new(device.clone()), device, runtime: PhantomData }
    }

    /// The numbers of a tensor, row after row.
    fn numbers(&self, rows: &Rows<Self>) -> Numbers {
        let tensor = into_contiguous(rows.clone().into_primitive().tensor());
        assert_eq!(tensor.dtype, DType::F32, "activations are f32");
        let len = tensor.meta.shape().num_elements();
        Numbers { handle: tensor.handle, len }
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

impl<B, R> ThinOps for Device<B, R>
where
    R: CubeRuntime,
    B: Backend<Device = R::Device, FloatTensorPrimitive = CubeTensor<R>>,
{
    type Backend = B;
    type Linear = ReferenceLinear<B>;
    type Cache = AnyCache<B, R>;
    type Prompt = ReferencePrompt<B>;

    fn linear(&self, parts: Vec<Matrix>, bias: Option<Vec<f32>>) -> Result<Self::Linear, LinearError> {
        self.plain.linear(parts, bias)
    }

    fn vector(&self, values: Vec<f32>) -> Vector<Self> {
        self.plain.vector(values)
    }

    fn rows(&self, rows: usize, width: usize) -> Rows<Self> {
        self.plain.rows(rows, width)
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

    fn embed(&mut self, table: &Self::Linear, tokens: &[u32], out: Rows<Self>) -> Rows<Self> {
        self.plain.embed(table, tokens, out)
    }

    fn norm_linear(
        &mut self,
        x: &Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<B>,
        linear: &Self::Linear,
        out: Rows<Self>,
    ) -> Rows<Self> {
        self.plain.norm_linear(x, rows, norm, linear, out)
    }

    fn rotate(
        &mut self,
        fused: Rows<Self>,
        heads: Heads,
        rotation: Rotation<'_, B>,
        position: &(dyn Fn(usize) -> usize + Sync),
    ) -> Rows<Self> {
        self.plain.rotate(fused, heads, rotation, position)
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
        let batch = cache.batch(slots)?;
        cache.admit(&cache.layer(layer, heads), &batch, &self.numbers(fused));
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
        let batch = cache.batch(&[prompt.slot])?;
        cache.admit(&cache.layer(layer, prompt.heads), &batch, &self.numbers(&prompt.fused()));
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
        self.plain.add_linear(input, linear, x, rows)
    }

    fn feed_forward(
        &mut self,
        x: Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<B>,
        gate_up: &Self::Linear,
        down: &Self::Linear,
    ) -> Rows<Self> {
        self.plain.feed_forward(x, rows, norm, gate_up, down)
    }

    fn read(&self, rows: &Rows<Self>, out: &mut Vec<f32>) {
        self.plain.read(rows, out);
    }
}
