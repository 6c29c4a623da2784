//! The operations on the processor: burn-ndarray's tensors, our loops on their floats.

use super::{
    admit::admit,
    attention::{self, AttentionScratch, Fused},
    cache::{CacheError, ThinCache},
    evict,
    linear::{Activations, Arithmetic, Linear, LinearError, LinearScratch, Mode},
    pool::Pool,
    prompt::Prompt,
    rows::{self, Rotary},
    simd::Level,
};
use crate::{
    format::Matrix,
    ops::{HeadNorms, Heads, HeldHead, Norm, Rotation, Rows, ThinOps, Vector, best_of_rows},
};
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_ndarray::{NdArray, NdArrayDevice, NdArrayTensor};
use std::ops::Range;
use thinkey_core::{CachePlan, Error};

type Backend = NdArray<f32>;

/// [`ThinOps`] for burn's ndarray backend: SIMD of the machine's best level on the threads of a pool.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    level: Level,
    activations: Activations,
    linear: LinearScratch,
    attention: AttentionScratch,
    normed: Vec<f32>,
    wide: Vec<f32>,
    gated: Vec<f32>,
}

/// What decides how much memory [`Cpu`] computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Threads.
    pub threads: usize,
    /// Channels of the residual stream.
    pub width: usize,
    /// Channels inside a feed-forward part.
    pub inner: usize,
    /// Query heads.
    pub heads: usize,
    /// Most channels that a head of the cache keeps.
    pub kept: usize,
    /// Most tokens of a prompt.
    pub prompt: usize,
    /// Newest queries of a prompt that score its channels, W.
    pub window: usize,
    /// Most rows that an operation computes at once, of a prompt or of a step.
    pub rows: usize,
    /// The cache.
    pub cache: CachePlan,
}

/// Most bytes of the buffers that [`Cpu`] computes in, by what they are for. They grow to what the largest call needs and
/// stay, those of a prompt [until it is through](ThinOps::rest).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScratchBytes {
    /// Intermediate results of a feed-forward part, for a run of a prompt's rows or for those of a step.
    pub chunks: usize,
    /// Dequantised weights, and activations in the form that products read.
    pub panels: usize,
    /// Keys and values of one layer that a prompt attends to, and the queries that score.
    pub packed: usize,
    /// Scores and partial results of attention.
    pub tasks: usize,
}

impl ScratchBytes {
    /// All together.
    #[must_use]
    pub const fn total(&self) -> usize {
        self.prompt() + self.tasks
    }

    /// Those that are [given back](ThinOps::rest) after a long prompt: all but what a step needs of them.
    #[must_use]
    pub const fn prompt(&self) -> usize {
        self.chunks + self.panels + self.packed
    }
}

impl Cpu {
    /// Most bytes that the buffers come to.
    #[must_use]
    pub fn scratch_bytes(demand: &Demand) -> ScratchBytes {
        let Demand { threads, width, inner, heads, kept, prompt, window, rows, cache } = *demand;
        let queries = window.max(cache.eviction.map_or(0, |eviction| eviction.voters()));
        ScratchBytes {
            chunks: rows * (width + 2 * inner + inner) * size_of::<f32>(),
            panels: LinearScratch::bytes(threads, rows, &[width, heads * cache.head_dim, inner]),
            packed: Prompt::bytes(&cache, heads, kept, prompt, queries),
            tasks: AttentionScratch::task_bytes(threads, &cache, heads, prompt, window),
        }
    }

    /// Bytes of a tensor of `len` floats: they, and what burn-ndarray keeps to share them.
    #[must_use]
    pub const fn tensor_bytes(len: usize) -> usize {
        // A vector's pointer, length and capacity behind two counts.
        len * size_of::<f32>() + 5 * size_of::<usize>()
    }

    /// Operations on `threads` threads, with the vectors of `level`; linear layers read their input as `activations`.
    ///
    /// # Errors
    /// Where the system starts no thread.
    pub fn new(threads: usize, level: Level, activations: Activations) -> std::io::Result<Self> {
        Ok(Self {
            pool: Pool::new(threads)?,
            level,
            activations,
            linear: LinearScratch::default(),
            attention: AttentionScratch::default(),
            normed: Vec::new(),
            wide: Vec::new(),
            gated: Vec::new(),
        })
    }

    fn arithmetic(&self) -> Arithmetic {
        Arithmetic { level: self.level, activations: self.activations }
    }
}

/// Runs `body` on the floats of a tensor.
///
/// # Panics
/// Where the tensor is not contiguous `f32`: those that these operations make are.
fn read<const D: usize, R>(tensor: &Tensor<Backend, D>, body: impl FnOnce(&[f32]) -> R) -> R {
    // A clone shares the memory.
    let TensorPrimitive::Float(NdArrayTensor::F32(floats)) = tensor.clone().into_primitive() else {
        panic!("activations are f32");
    };
    let view = floats.view();
    body(view.as_slice().expect("activations are contiguous"))
}

/// Runs `body` on the floats of a tensor, in place (where the memory is shared, on a copy).
///
/// # Panics
/// As [`read`].
fn write<R>(tensor: Rows<Cpu>, body: impl FnOnce(&mut [f32]) -> R) -> (Rows<Cpu>, R) {
    let TensorPrimitive::Float(NdArrayTensor::F32(mut floats)) = tensor.into_primitive() else {
        panic!("activations are f32");
    };
    let result = body(floats.ensure_owned().as_slice_mut().expect("activations are contiguous"));
    (Tensor::from_primitive(TensorPrimitive::Float(NdArrayTensor::F32(floats))), result)
}

/// `len` floats of `buffer`, which grows to exactly what is asked for but never shrinks; what they hold is old.
fn floats(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        // Given back before, not copied.
        *buffer = Vec::new();
        *buffer = vec![0.0; len];
    }
    &mut buffer[..len]
}

impl ThinOps for Cpu {
    type Backend = Backend;
    type Linear = Linear;
    type Cache = ThinCache;
    type Prompt = Prompt;

    fn linear(&self, parts: Vec<Matrix>, bias: Option<Vec<f32>>) -> Result<Linear, LinearError> {
        Linear::new(parts, bias)
    }

    fn vector(&self, values: Vec<f32>) -> Vector<Self> {
        let len = values.len();
        Tensor::from_data(TensorData::new(values, [len]), &NdArrayDevice::Cpu)
    }

    fn rows(&self, rows: usize, width: usize) -> Rows<Self> {
        Tensor::zeros([rows, width], &NdArrayDevice::Cpu)
    }

    fn cache(
        &self,
        plan: CachePlan,
        window: usize,
        kept: &dyn Fn(usize, usize) -> usize,
    ) -> Result<ThinCache, CacheError> {
        ThinCache::new(plan, window, kept)
    }

    fn embed(&mut self, table: &Linear, tokens: &[u32], out: Rows<Self>) -> Rows<Self> {
        let body = |out: &mut [f32]| {
            for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(table.cols())) {
                table.row(token as usize, out);
            }
        };
        write(out, body).0
    }

    fn norm_linear(
        &mut self,
        x: &Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<Backend>,
        linear: &Linear,
        out: Rows<Self>,
    ) -> Rows<Self> {
        let arithmetic = self.arithmetic();
        let Self { pool, level, linear: scratch, normed, .. } = self;
        let width = linear.cols();
        let mut body = |x: &[f32], weight: &[f32], out: &mut [f32]| {
            let x = &x[rows.start * width..rows.end * width];
            let normed = floats(normed, x.len());
            rows::rms_norm(pool, *level, x, weight, norm.eps, normed);
            linear.forward(pool, arithmetic, normed, out, Mode::Store, scratch);
        };
        read(x, |x| read(&norm.weight, |weight| write(out, |out| body(x, weight, out)))).0
    }

    fn rotate(
        &mut self,
        fused: Rows<Self>,
        heads: Heads,
        rotation: Rotation<'_, Backend>,
        position: &(dyn Fn(usize) -> usize + Sync),
    ) -> Rows<Self> {
        let turn = |norms: Option<(&[f32], &[f32], f32)>| {
            let rotary = Rotary { frequencies: rotation.frequencies, pairs: rotation.pairs, norms };
            let counts = (heads.heads, heads.kv_heads);
            write(fused, |fused| rows::rotate(&self.pool, rotary, fused, heads.width(), counts, position)).0
        };
        match rotation.norms {
            None => turn(None),
            Some(HeadNorms { query, key }) => {
                read(&query.weight, |q| read(&key.weight, |k| turn(Some((q, k, query.eps)))))
            }
        }
    }

    fn admit(
        &mut self,
        cache: &mut ThinCache,
        layer: usize,
        slots: &[usize],
        rows: &Rows<Self>,
        heads: Heads,
    ) -> Result<(), Error> {
        read(rows, |data| {
            let rows = slots.iter().zip(data.chunks_exact(heads.width()));
            rows.into_iter().try_for_each(|(&slot, row)| admit(cache, layer, slot, Fused::new(row, heads)))
        })
    }

    fn attend(
        &mut self,
        cache: &ThinCache,
        layer: usize,
        slots: &[usize],
        rows: &Rows<Self>,
        heads: Heads,
        out: Rows<Self>,
    ) -> Result<Rows<Self>, Error> {
        let Self { pool, level, attention: scratch, .. } = self;
        let mut body = |data: &[f32], out: &mut [f32]| {
            attention::decode((&*pool, *level), cache, layer, slots, Fused::new(data, heads), out, scratch)
        };
        let (out, result) = read(rows, |data| write(out, |out| body(data, out)));
        result.map(|()| out)
    }

    fn gather(
        &mut self,
        cache: &mut ThinCache,
        layer: usize,
        slots: &[usize],
        rows: &Rows<Self>,
        heads: Heads,
    ) -> Result<(), Error> {
        let Self { pool, level, attention: scratch, .. } = self;
        read(rows, |data| evict::gather((&*pool, *level), cache, layer, slots, Fused::new(data, heads), scratch))
    }

    fn gather_prompt(
        &mut self,
        cache: &ThinCache,
        layer: usize,
        prompt: &mut Prompt,
        rows: &Rows<Self>,
    ) -> Result<(), Error> {
        let Self { pool, level, attention: scratch, .. } = self;
        let heads = prompt.heads();
        read(rows, |data| prompt.gather((&*pool, *level), cache, layer, Fused::new(data, heads), scratch))
    }

    fn prompt(&self, cache: &ThinCache, slot: usize, rows: usize, window: usize, heads: Heads) -> Prompt {
        Prompt::new(cache, slot, rows, window, heads)
    }

    fn hold(&mut self, cache: &ThinCache, layer: usize, prompt: &mut Prompt, rows: &Rows<Self>) -> Result<(), Error> {
        read(rows, |data| prompt.hold(&self.pool, cache, layer, Fused::new(data, prompt.heads())))
    }

    fn attend_prompt(
        &mut self,
        cache: &ThinCache,
        layer: usize,
        prompt: &Prompt,
        rows: &Rows<Self>,
        out: Rows<Self>,
    ) -> Result<Rows<Self>, Error> {
        let Self { pool, level, attention: scratch, .. } = self;
        let mut body = |data: &[f32], out: &mut [f32]| {
            let fused = Fused::new(data, prompt.heads());
            attention::prefill((&*pool, *level), cache, layer, prompt, fused, out, scratch)
        };
        let (out, result) = read(rows, |data| write(out, |out| body(data, out)));
        result.map(|()| out)
    }

    fn admit_prompt(&mut self, cache: &mut ThinCache, layer: usize, prompt: &Prompt) -> Result<(), Error> {
        let Self { pool, level, attention: scratch, .. } = self;
        prompt.admit((&*pool, *level), cache, layer, scratch)
    }

    fn held(&self, prompt: &Prompt, head: usize, out: &mut HeldHead) {
        prompt.read(head, out);
    }

    fn add_linear(&mut self, input: &Rows<Self>, linear: &Linear, x: Rows<Self>, rows: Range<usize>) -> Rows<Self> {
        let arithmetic = self.arithmetic();
        let Self { pool, linear: scratch, .. } = self;
        let rows = rows.start * linear.rows()..rows.end * linear.rows();
        let mut body = |input: &[f32], x: &mut [f32]| {
            linear.forward(pool, arithmetic, input, &mut x[rows.clone()], Mode::Add, scratch);
        };
        read(input, |input| write(x, |x| body(input, x))).0
    }

    fn feed_forward(
        &mut self,
        x: Rows<Self>,
        rows: Range<usize>,
        norm: &Norm<Backend>,
        gate_up: &Linear,
        down: &Linear,
    ) -> Rows<Self> {
        let arithmetic = self.arithmetic();
        let Self { pool, level, linear: scratch, normed, wide, gated, .. } = self;
        let (width, inner) = (gate_up.cols(), down.cols());
        let mut body = |weight: &[f32], x: &mut [f32]| {
            let x = &mut x[rows.start * width..rows.end * width];
            let normed = floats(normed, x.len());
            rows::rms_norm(pool, *level, x, weight, norm.eps, normed);
            let wide = floats(wide, rows.len() * 2 * inner);
            gate_up.forward(pool, arithmetic, normed, wide, Mode::Store, scratch);
            let gated = floats(gated, rows.len() * inner);
            rows::gated_silu(pool, *level, wide, inner, gated);
            down.forward(pool, arithmetic, gated, x, Mode::Add, scratch);
        };
        read(&norm.weight, |weight| write(x, |x| body(weight, x))).0
    }

    fn rest(&mut self) {
        let Self { linear, normed, wide, gated, .. } = self;
        linear.rest();
        [normed, wide, gated].into_iter().for_each(|buffer| *buffer = Vec::new());
    }

    fn read(&self, rows: &Rows<Self>, out: &mut Vec<f32>) {
        read(rows, |rows| {
            if out.capacity() < rows.len() {
                *out = Vec::new();
                out.reserve_exact(rows.len());
            }
            out.clear();
            out.extend_from_slice(rows);
        });
    }

    fn best(&mut self, logits: &Rows<Self>, count: usize, out: &mut Vec<(u32, f32)>) {
        let [rows, vocab] = logits.dims();
        read(logits, |logits| best_of_rows(logits, rows, vocab, count, out));
    }
}
