//! The operations by plain tensor operations: short enough to be checked by eye, on any backend of burn.
//!
//! Weights are dequantised when they are loaded, attention materialises its scores, and caches grow by concatenation.
//! The fast implementations are tested against it, and it serves backends that have no kernels of their own yet.

mod attention;
mod cache;
mod correction;

pub use cache::ReferenceCache;

use crate::{
    cpu::{
        cache::CacheError,
        linear::{Linear, LinearError},
        rows::Pairs,
    },
    format::Matrix,
    ops::{Heads, HeldHead, Norm, Rotation, Rows, ThinOps, Vector},
};
use burn::tensor::{Int, Tensor, TensorData, activation::silu, backend::Backend};
use std::ops::Range;
use thinkey_core::{CachePlan, Error};

/// [`ThinOps`] for any backend.
#[derive(Clone, Debug, Default)]
pub struct Reference<B: Backend> {
    device: B::Device,
}

/// The fused rows of a prompt that the layer at hand has so far.
#[derive(Clone, Debug)]
pub struct ReferencePrompt<B: Backend> {
    pub(crate) slot: usize,
    pub(crate) heads: Heads,
    /// Tokens of the prompt.
    pub(crate) rows: usize,
    /// Those whose queries score.
    pub(crate) window: usize,
    held: Vec<Tensor<B, 2>>,
}

impl<B: Backend> ReferencePrompt<B> {
    /// A prompt of `rows` tokens of which nothing is held.
    pub(crate) fn new(slot: usize, rows: usize, window: usize, heads: Heads) -> Self {
        Self { slot, heads, rows, window: window.min(rows), held: Vec::new() }
    }

    /// Takes the next rows of the layer, or the first of the next.
    pub(crate) fn hold(&mut self, fused: &Tensor<B, 2>) {
        if self.held.iter().map(|rows| rows.dims()[0]).sum::<usize>() == self.rows {
            self.held.clear();
        }
        self.held.push(fused.clone());
    }

    /// The rows of the layer so far.
    pub(crate) fn so_far(&self) -> Tensor<B, 2> {
        Tensor::cat(self.held.clone(), 0)
    }

    /// All rows of the layer.
    pub(crate) fn fused(&self) -> Tensor<B, 2> {
        let all = self.so_far();
        assert_eq!(all.dims()[0], self.rows, "rows of the layer");
        all
    }
}

/// A dequantised linear layer.
#[derive(Clone, Debug)]
pub struct ReferenceLinear<B: Backend> {
    /// [rows, cols].
    weight: Tensor<B, 2>,
    /// [1, rows].
    bias: Option<Tensor<B, 2>>,
}

impl<B: Backend> ReferenceLinear<B> {
    fn apply(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let out = x.matmul(self.weight.clone().transpose());
        match &self.bias {
            Some(bias) => out + bias.clone(),
            None => out,
        }
    }
}

impl<B: Backend> Norm<B> {
    /// The rows of `x`, [rows, width], normalised.
    pub(crate) fn apply(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let mean = x.clone().powf_scalar(2.0).mean_dim(1);
        x / (mean + self.eps).sqrt() * self.weight.clone().unsqueeze()
    }
}

impl<B: Backend> Reference<B> {
    /// The operations on `device`.
    #[must_use]
    pub fn new(device: B::Device) -> Self {
        Self { device }
    }

    fn matrix(&self, values: Vec<f32>, shape: [usize; 2]) -> Tensor<B, 2> {
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }
}

impl<B: Backend> ThinOps for Reference<B> {
    type Backend = B;
    type Linear = ReferenceLinear<B>;
    type Cache = ReferenceCache<B>;
    type Prompt = ReferencePrompt<B>;

    fn linear(&self, parts: Vec<Matrix>, bias: Option<Vec<f32>>) -> Result<Self::Linear, LinearError> {
        let layer = Linear::new(parts, bias)?;
        let (rows, cols) = (layer.rows(), layer.cols());
        let mut weight = vec![0.0; rows * cols];
        weight.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| layer.row(row, out));
        let bias = layer.bias().map(|bias| self.matrix(bias.to_vec(), [1, rows]));
        Ok(ReferenceLinear { weight: self.matrix(weight, [rows, cols]), bias })
    }

    fn vector(&self, values: Vec<f32>) -> Vector<Self> {
        let len = values.len();
        Tensor::from_data(TensorData::new(values, [len]), &self.device)
    }

    fn rows(&self, rows: usize, width: usize) -> Rows<Self> {
        Tensor::empty([rows, width], &self.device)
    }

    fn cache(
        &self,
        plan: CachePlan,
        window: usize,
        kept: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self::Cache, CacheError> {
        ReferenceCache::new(&self.device, plan, window, kept)
    }

    fn embed(&mut self, table: &Self::Linear, tokens: &[u32], _: Rows<Self>) -> Rows<Self> {
        let tokens: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let count = tokens.len();
        let rows = Tensor::<B, 1, Int>::from_data(TensorData::new(tokens, [count]), &self.device);
        table.weight.clone().select(0, rows)
    }

    fn norm_linear(
        &mut self,
        x: &Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<B>,
        linear: &Self::Linear,
        _: Rows<Self>,
    ) -> Rows<Self> {
        linear.apply(norm.apply(x.clone().narrow(0, rows.start, rows.len())))
    }

    fn rotate(
        &mut self,
        fused: Rows<Self>,
        heads: Heads,
        rotation: Rotation<'_, B>,
        position: &(dyn Fn(usize) -> usize + Sync),
    ) -> Rows<Self> {
        let (count, dim, half) = (fused.dims()[0], heads.head_dim, heads.head_dim / 2);
        let angles: Vec<f32> = (0..count)
            .flat_map(|row| rotation.frequencies.iter().map(move |frequency| position(row) as f32 * frequency))
            .collect();
        let angles = self.matrix(angles, [count, half]).reshape([count, 1, half]);
        let (cos, sin) = (angles.clone().cos(), angles.sin());
        let turn = |part: Tensor<B, 2>, heads: usize, norm: Option<&Norm<B>>| {
            let part = part.reshape([count * heads, dim]);
            let part = norm.map_or(part.clone(), |norm| norm.apply(part));
            // The partner of a channel is in the other place of axis `pair`.
            let (shape, pair) = match rotation.pairs {
                Pairs::Adjacent => ([count, heads, half, 2], 3),
                Pairs::Halves => ([count, heads, 2, half], 2),
            };
            let part = part.reshape(shape);
            let side = |index| part.clone().narrow(pair, index, 1).reshape([count, heads, half]);
            let (a, b) = (side(0), side(1));
            let turned = [a.clone() * cos.clone() - b.clone() * sin.clone(), a * sin.clone() + b * cos.clone()];
            Tensor::stack::<4>(turned.to_vec(), pair).reshape([count, heads * dim])
        };
        let (keys, values, width) = (heads.keys(), heads.values(), heads.width());
        let (query, key) = rotation.norms.map_or((None, None), |norms| (Some(&norms.query), Some(&norms.key)));
        let column = |range: Range<usize>| fused.clone().slice([0..count, range]);
        Tensor::cat(
            vec![
                turn(column(0..keys), heads.heads, query),
                turn(column(keys..values), heads.kv_heads, key),
                column(values..width),
            ],
            1,
        )
    }

    fn admit(
        &mut self,
        cache: &mut Self::Cache,
        layer: usize,
        slots: &[usize],
        fused: &Rows<Self>,
        heads: Heads,
    ) -> Result<(), Error> {
        let mut rows = slots.iter().enumerate();
        rows.try_for_each(|(row, &slot)| cache.admit(layer, slot, fused.clone().narrow(0, row, 1), heads, false))
    }

    fn attend(
        &mut self,
        cache: &Self::Cache,
        layer: usize,
        slots: &[usize],
        fused: &Rows<Self>,
        heads: Heads,
        _: Rows<Self>,
    ) -> Result<Rows<Self>, Error> {
        let row = |(row, &slot): (usize, &usize)| {
            attention::attend(cache, layer, slot, fused.clone().narrow(0, row, 1), None, heads)
        };
        Ok(Tensor::cat(slots.iter().enumerate().map(row).collect(), 0))
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
        _: Rows<Self>,
    ) -> Result<Rows<Self>, Error> {
        let own = prompt.so_far();
        Ok(attention::attend(cache, layer, prompt.slot, fused.clone(), Some(own), prompt.heads))
    }

    fn admit_prompt(&mut self, cache: &mut Self::Cache, layer: usize, prompt: &Self::Prompt) -> Result<(), Error> {
        cache.admit(layer, prompt.slot, prompt.fused(), prompt.heads, true)
    }

    fn held(&self, prompt: &Self::Prompt, head: usize, out: &mut HeldHead) {
        let ReferencePrompt { heads, rows, window, .. } = *prompt;
        let (dim, fused) = (heads.head_dim, prompt.fused());
        let column = |at: usize, first: usize, out: &mut Vec<f32>| {
            let part = fused.clone().narrow(0, first, rows - first).narrow(1, at, dim);
            out.extend(part.into_data().iter::<f32>());
        };
        (out.head_dim, out.window) = (dim, window);
        [&mut out.keys, &mut out.values, &mut out.queries].into_iter().for_each(Vec::clear);
        column(heads.keys() + head * dim, 0, &mut out.keys);
        column(heads.values() + head * dim, 0, &mut out.values);
        for member in 0..heads.group() {
            column((head * heads.group() + member) * dim, rows - window, &mut out.queries);
        }
    }

    fn add_linear(
        &mut self,
        input: &Rows<Self>,
        linear: &Self::Linear,
        x: Rows<Self>,
        rows: Range<usize>,
    ) -> Rows<Self> {
        add(x, rows, linear.apply(input.clone()))
    }

    fn feed_forward(
        &mut self,
        x: Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<B>,
        gate_up: &Self::Linear,
        down: &Self::Linear,
    ) -> Rows<Self> {
        let wide = gate_up.apply(norm.apply(x.clone().narrow(0, rows.start, rows.len())));
        let [_, both] = wide.dims();
        let (gate, up) = (wide.clone().narrow(1, 0, both / 2), wide.narrow(1, both / 2, both / 2));
        add(x, rows, down.apply(silu(gate) * up))
    }

    fn read(&self, rows: &Rows<Self>, out: &mut Vec<f32>) {
        out.clear();
        out.extend(rows.to_data().iter::<f32>());
    }
}

/// x, to whose rows `rows` others are added.
pub(crate) fn add<B: Backend>(x: Tensor<B, 2>, rows: Range<usize>, other: Tensor<B, 2>) -> Tensor<B, 2> {
    let columns = 0..x.dims()[1];
    let sum = x.clone().slice([rows.clone(), columns.clone()]) + other;
    x.slice_assign([rows, columns], sum)
}
