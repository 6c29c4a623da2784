//! The Llama-family transformer over a thin cache.
//!
//! Prefill runs layer by layer over the whole prompt, the feed-forward part in chunks of tokens, so that only one
//! layer's keys are ever whole: the peak is weights + thin cache + one layer. Prefill attends exactly; the prompt's
//! older tokens are thinned when a layer is through.

use super::config::{ModelConfig, Pairing};
use crate::weights::{Checkpoint, LayerRole, Role, WeightsError};
use thinkey_core::{CachePlan, Error, Rows};
use thinkey_kernels::{
    cpu::{
        attention::{self, AttentionScratch, Fused},
        cache::{CacheError, ThinCache},
        linear::{Linear, LinearError, LinearScratch, Mode},
        pool::Pool,
        rows::{self, Pairs, Rotary},
        simd::Level,
    },
    format::Matrix,
};

/// Newest queries of a prompt that score its channels, W.
pub const WINDOW: usize = 32;

/// Tokens of a prompt that go through the feed-forward part at once.
const CHUNK: usize = 512;

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The weights cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The weights do not fit together.
    #[error("layer weights do not fit together: {0}")]
    Linear(#[from] LinearError),
    /// The cache cannot be had.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The thin cache refuses.
    #[error("the prompt and its answer do not fit: {0}; give a larger --context or a shorter prompt")]
    Core(#[from] Error),
    /// No thread can be started.
    #[error("cannot start worker threads: {0}")]
    Threads(#[from] std::io::Error),
    /// A token is not in the vocabulary.
    #[error("token {token} is not in the vocabulary of {vocab}; the tokenizer belongs to another model")]
    Token {
        /// The token given.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The caller stopped a prefill; the sequence is forgotten.
    #[error("interrupted")]
    Interrupted,
    /// There is nothing to compute.
    #[error("the prompt is empty; give at least one token")]
    Empty,
}

struct Layer {
    attention_norm: Vec<f32>,
    /// Queries, keys and values, fused along their outputs.
    qkv: Linear,
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    output: Linear,
    feed_forward_norm: Vec<f32>,
    /// Gate and up, fused along their outputs.
    gate_up: Linear,
    down: Linear,
}

/// The weights, as they lie in the checkpoint, and the threads that compute with them.
pub struct Model {
    config: ModelConfig,
    embedding: Linear,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    output: Linear,
    pool: Pool,
    level: Level,
}

/// Cache and scratch memory of sequences under way.
#[derive(Debug)]
pub struct Session {
    cache: ThinCache,
    x: Vec<f32>,
    normed: Vec<f32>,
    fused: Vec<f32>,
    mixed: Vec<f32>,
    wide: Vec<f32>,
    gated: Vec<f32>,
    logits: Vec<f32>,
    linear: LinearScratch,
    attention: AttentionScratch,
}

impl Session {
    /// Sequences over a cache of `plan`, head h of layer l keeping `kept(l, h)` channels.
    ///
    /// # Errors
    /// [`CacheError`] where the plan cannot be or the memory cannot be had.
    pub fn new(plan: CachePlan, kept: impl Fn(usize, usize) -> usize) -> Result<Self, CacheError> {
        Ok(Self {
            cache: ThinCache::new(plan, kept)?,
            x: Vec::new(),
            normed: Vec::new(),
            fused: Vec::new(),
            mixed: Vec::new(),
            wide: Vec::new(),
            gated: Vec::new(),
            logits: Vec::new(),
            linear: LinearScratch::default(),
            attention: AttentionScratch::default(),
        })
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &ThinCache {
        &self.cache
    }

    /// Forgets the sequence of `slot`.
    pub fn clear(&mut self, slot: usize) {
        self.cache.clear(slot);
    }
}

/// `len` floats of `buffer`, which grows but never shrinks; what they hold is old.
fn floats(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl Model {
    /// The model of `checkpoint`, computed on `threads` threads. Weights are not copied.
    ///
    /// # Errors
    /// [`ModelError::Weights`] where a tensor is missing or damaged, [`ModelError::Threads`].
    pub fn load(checkpoint: &Checkpoint, threads: usize) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let matrix = |role| checkpoint.matrix(role);
        let linear = |parts: Vec<Matrix>, bias| Linear::new(parts, bias).map_err(ModelError::from);
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            let role = |role| Role::Layer(index, role);
            let vector = |which| checkpoint.vector(role(which));
            let bias = if config.qkv_bias {
                let parts = [LayerRole::QueryBias, LayerRole::KeyBias, LayerRole::ValueBias].map(vector);
                let mut bias = Vec::with_capacity(config.query_width() + 2 * config.kv_width());
                for part in parts {
                    bias.extend(part?);
                }
                Some(bias)
            } else {
                None
            };
            let head_norms =
                if config.qk_norm { Some((vector(LayerRole::QueryNorm)?, vector(LayerRole::KeyNorm)?)) } else { None };
            layers.push(Layer {
                attention_norm: vector(LayerRole::AttentionNorm)?,
                qkv: linear(
                    vec![
                        matrix(role(LayerRole::Query))?,
                        matrix(role(LayerRole::Key))?,
                        matrix(role(LayerRole::Value))?,
                    ],
                    bias,
                )?,
                head_norms,
                output: linear(vec![matrix(role(LayerRole::AttentionOutput))?], None)?,
                feed_forward_norm: vector(LayerRole::FeedForwardNorm)?,
                gate_up: linear(vec![matrix(role(LayerRole::Gate))?, matrix(role(LayerRole::Up))?], None)?,
                down: linear(vec![matrix(role(LayerRole::Down))?], None)?,
            });
        }
        Ok(Self {
            embedding: linear(vec![matrix(Role::TokenEmbedding)?], None)?,
            norm: checkpoint.vector(Role::OutputNorm)?,
            output: linear(vec![matrix(Role::Output)?], None)?,
            layers,
            pool: Pool::new(threads)?,
            level: Level::best(),
            config,
        })
    }

    /// What the checkpoint says of the model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Feeds `tokens` to the sequence of `slot` and returns the logits after the last one, one for each token of the vocabulary. `progress` is told
    /// how many layers of how many are done.
    ///
    /// # Errors
    /// [`ModelError::Empty`], [`ModelError::Token`], [`ModelError::Core`] where the context is full; the sequence is as
    /// before then.
    pub fn prefill<'s>(
        &self,
        session: &'s mut Session,
        slot: usize,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<&'s [f32], ModelError> {
        let count = tokens.len();
        self.embed(tokens, session)?;
        session.cache.begin(slot, count, true)?;
        for index in 0..self.layers.len() {
            self.attend(session, index, count, Pass::Prompt(slot))?;
            self.feed_forward(session, index, count);
            progress(index + 1, self.layers.len());
        }
        session.cache.commit(slot);
        let last = (count - 1) * self.config.width;
        session.x.copy_within(last..last + self.config.width, 0);
        Ok(self.logits(session, 1))
    }

    /// Feeds one token to each sequence: `tokens[r]` to that of `slots[r]`. Returns their logits, row after row. Each
    /// weight is read once for all of them.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    ///
    /// # Panics
    /// Where `slots` and `tokens` differ in length or a slot is named twice.
    pub fn decode<'s>(
        &self,
        session: &'s mut Session,
        slots: &[usize],
        tokens: &[u32],
    ) -> Result<&'s [f32], ModelError> {
        assert_eq!(slots.len(), tokens.len(), "one token a sequence");
        assert!((1..slots.len()).all(|i| !slots[..i].contains(&slots[i])), "a slot is named twice");
        self.embed(tokens, session)?;
        for &slot in slots {
            session.cache.begin(slot, 1, false)?;
        }
        for index in 0..self.layers.len() {
            self.attend(session, index, slots.len(), Pass::Steps(slots))?;
            self.feed_forward(session, index, slots.len());
        }
        for &slot in slots {
            session.cache.commit(slot);
        }
        Ok(self.logits(session, slots.len()))
    }

    fn embed(&self, tokens: &[u32], session: &mut Session) -> Result<(), ModelError> {
        if tokens.is_empty() {
            return Err(ModelError::Empty);
        }
        let vocab = self.embedding.rows();
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(ModelError::Token { token, vocab });
        }
        let width = self.config.width;
        for (&token, x) in tokens.iter().zip(floats(&mut session.x, tokens.len() * width).chunks_exact_mut(width)) {
            self.embedding.row(token as usize, x);
        }
        Ok(())
    }

    fn attend(&self, session: &mut Session, index: usize, count: usize, which: Pass<'_>) -> Result<(), ModelError> {
        let Self { config, pool, level, .. } = self;
        let layer = &self.layers[index];
        let Session { cache, x, normed, fused, mixed, linear, attention, .. } = session;
        let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
        let (keys, values) = (config.query_width(), config.query_width() + config.kv_width());
        let stride = values + config.kv_width();
        let fused = floats(fused, count * stride);
        // In chunks, so that no normed copy of the whole prompt is held.
        for (x, fused) in x[..count * config.width].chunks(CHUNK * config.width).zip(fused.chunks_mut(CHUNK * stride)) {
            let normed = floats(normed, x.len());
            rows::rms_norm(pool, *level, x, &layer.attention_norm, config.rms_eps, normed);
            layer.qkv.forward(pool, *level, normed, fused, Mode::Store, linear);
        }
        let rotary = Rotary {
            frequencies: &config.rope.inv_freq,
            pairs: match config.rope.pairing {
                Pairing::Interleaved => Pairs::Adjacent,
                Pairing::Halves => Pairs::Halves,
            },
            norms: layer.head_norms.as_ref().map(|(query, key)| (&query[..], &key[..], config.rms_eps)),
        };
        rows::rotate(pool, rotary, fused, stride, (heads, kv_heads), &|row| match which {
            Pass::Prompt(slot) => cache.position(slot) + row,
            Pass::Steps(slots) => cache.position(slots[row]),
        });
        let mixed = floats(mixed, count * config.query_width());
        let view = Fused { data: fused, stride, keys, values, heads, kv_heads, head_dim };
        let group = heads / kv_heads;
        let admit = |cache: &mut ThinCache, slot: usize, row: usize, count: usize| -> Result<(), Error> {
            let data = &view.data[row * stride..];
            for head in 0..kv_heads {
                let rows =
                    Rows { keys: &data[keys + head * head_dim..], values: &data[values + head * head_dim..], stride };
                let first = count.saturating_sub(WINDOW);
                let queries = (0..group).map(|member| {
                    let at = first * stride + (head * group + member) * head_dim;
                    (&data[at..], count - first, stride)
                });
                cache.admit(index, head, slot, queries, rows)?;
            }
            Ok(())
        };
        match which {
            Pass::Prompt(slot) => {
                attention::prefill((pool, *level), cache, index, (slot, count), view, mixed, attention)?;
                admit(cache, slot, 0, count)?;
            }
            Pass::Steps(slots) => {
                for (row, &slot) in slots.iter().enumerate() {
                    admit(cache, slot, row, 1)?;
                }
                attention::decode((pool, *level), cache, index, slots, view, mixed, attention)?;
            }
        }
        let x = &mut x[..count * config.width];
        layer.output.forward(pool, *level, mixed, x, Mode::Add, linear);
        Ok(())
    }

    fn feed_forward(&self, session: &mut Session, index: usize, count: usize) {
        let Self { config, pool, level, .. } = self;
        let layer = &self.layers[index];
        let Session { x, normed, wide, gated, linear, .. } = session;
        for x in x[..count * config.width].chunks_mut(CHUNK * config.width) {
            let rows = x.len() / config.width;
            let normed = floats(normed, x.len());
            rows::rms_norm(pool, *level, x, &layer.feed_forward_norm, config.rms_eps, normed);
            let wide = floats(wide, rows * 2 * config.feed_forward);
            layer.gate_up.forward(pool, *level, normed, wide, Mode::Store, linear);
            let gated = floats(gated, rows * config.feed_forward);
            rows::gated_silu(pool, *level, wide, config.feed_forward, gated);
            layer.down.forward(pool, *level, gated, x, Mode::Add, linear);
        }
    }

    /// Logits of the first `count` rows of x.
    fn logits<'s>(&self, session: &'s mut Session, count: usize) -> &'s [f32] {
        let Self { config, pool, level, .. } = self;
        let Session { x, normed, logits, linear, .. } = session;
        let normed = floats(normed, count * config.width);
        rows::rms_norm(pool, *level, &x[..count * config.width], &self.norm, config.rms_eps, normed);
        let logits = floats(logits, count * self.output.rows());
        self.output.forward(pool, *level, normed, logits, Mode::Store, linear);
        logits
    }
}

/// What the rows of a pass are: a prompt of one sequence, or one token of each of several.
#[derive(Clone, Copy)]
enum Pass<'a> {
    Prompt(usize),
    Steps(&'a [usize]),
}
