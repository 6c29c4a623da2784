//! The Llama-family transformer over a thin cache.
//!
//! Prefill runs layer by layer over the whole prompt, so that only one layer's keys are ever whole, and in a layer in runs
//! of some hundred rows: whole is the residual stream, and keys and values of the layer. Prefill attends exactly; the
//! prompt's older tokens are thinned when a layer is through. A prompt of several runs reads each weight once in a while,
//! and the weights of a layer that is through are taken out of the process's memory: those of all layers are there when
//! steps read them, and then what only a prompt needs is not.

use super::{
    config::{ModelConfig, Pairing},
    profile::{Laps, Profile},
};
use crate::engine::{DeviceError, SessionOptions};
use crate::policy::spread::Spread;
use crate::weights::{Checkpoint, LayerRole, Mapped, Maps, Role, WeightsError};
use std::ops::{ControlFlow, Range};
use thinkey_core::{BLOCK, Error, Span, StorageKind};
use thinkey_kernels::{
    cpu::{Cpu, cache::CacheError, linear::LinearError, rows::Pairs},
    format::Matrix,
    ops::{Cache, HeadNorms, Heads, HeldHead, Norm, Rotation, Rows, ThinOps},
};

/// Newest queries of a prompt that score its channels, W.
pub const WINDOW: usize = 32;

/// Newest tokens kept whole where nothing else is asked for, R.
pub const RECENT: usize = 32;

/// Rows of a prompt that go through a layer at once, in whole blocks. Weights are unpacked once a run, which is why it is
/// not smaller.
pub(crate) const RUN: usize = 512;

const _: () = assert!(RUN.is_multiple_of(BLOCK), "what is packed in blocks begins with one in every run");

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
    /// The context is full, or keys and queries are not numbers.
    #[error("{0}{advice}", advice = advice(.0))]
    Core(#[from] Error),
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A session was given to another engine than the one that made it.
    #[error("the session belongs to an engine on another device; make one with this engine")]
    Session,
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
    /// A prompt is to be shared by a sequence that holds tokens already.
    #[error("a prompt is shared only by empty sequences, and one holds {tokens} tokens; clear it first")]
    NotEmpty {
        /// Tokens that it holds.
        tokens: usize,
    },
    /// The caller stopped a prefill; the sequence is forgotten.
    #[error("interrupted")]
    Interrupted,
    /// There is nothing to compute.
    #[error("the prompt is empty; give at least one token")]
    Empty,
}

fn advice(error: &Error) -> &'static str {
    match error {
        Error::Capacity { .. } => "; give a larger --context or a shorter prompt",
        _ => "",
    }
}

struct Layer<O: ThinOps> {
    attention_norm: Norm<O::Backend>,
    /// Queries, keys and values, fused along their outputs.
    qkv: O::Linear,
    head_norms: Option<HeadNorms<O::Backend>>,
    output: O::Linear,
    feed_forward_norm: Norm<O::Backend>,
    /// Gate and up, fused along their outputs.
    gate_up: O::Linear,
    down: O::Linear,
    /// Where the matrices lie in their files.
    mapped: Vec<Mapped>,
}

/// Matrices of a layer.
pub(crate) const MATRICES: [LayerRole; 7] = [
    LayerRole::Query,
    LayerRole::Key,
    LayerRole::Value,
    LayerRole::AttentionOutput,
    LayerRole::Gate,
    LayerRole::Up,
    LayerRole::Down,
];

/// A model's weights and the operations that compute with them.
pub struct Model<O: ThinOps> {
    config: ModelConfig,
    heads: Heads,
    maps: Maps,
    embedding: O::Linear,
    /// Where the embedding lies in its file.
    table: Option<Mapped>,
    layers: Vec<Layer<O>>,
    norm: Norm<O::Backend>,
    output: O::Linear,
    ops: O,
    profile: Profile,
}

/// Told of a layer that is through, with what the prompt holds of it; to answer [`ControlFlow::Break`] is to interrupt.
type Through<'a, O> = dyn FnMut(&O, usize, &<O as ThinOps>::Prompt) -> ControlFlow<()> + 'a;

/// Cache and activations of sequences under way.
pub struct Session<O: ThinOps> {
    cache: O::Cache,
    /// How its prompts share channels out, where they do.
    spread: Option<Spread>,
    /// Those of a decode step, kept from step to step; a prompt's do not outlive it.
    steps: Option<Activations<O>>,
    host: Vec<f32>,
    best: Vec<(u32, f32)>,
}

impl<O: ThinOps> Session<O> {
    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &O::Cache {
        &self.cache
    }

    /// The cache, for what is restored.
    pub(crate) fn cache_mut(&mut self) -> &mut O::Cache {
        &mut self.cache
    }

    /// Forgets the sequence of `slot`.
    pub fn clear(&mut self, slot: usize) {
        self.cache.clear(slot);
    }
}

/// Activations of a step.
struct Activations<O: ThinOps> {
    /// How many rows. Tensors know it too, but burn allocates to tell.
    rows: usize,
    /// The residual stream, [rows, width].
    x: Rows<O>,
    inner: Inner<O>,
    /// [sequences, vocabulary].
    logits: Rows<O>,
}

/// Activations inside of a layer.
struct Inner<O: ThinOps> {
    /// Queries, keys and values, [rows, their widths].
    fused: Rows<O>,
    /// Attention output, [rows, heads · D].
    mixed: Rows<O>,
}

impl<O: ThinOps> Inner<O> {
    fn new(ops: &O, heads: Heads, rows: usize) -> Self {
        Self { fused: ops.rows(rows, heads.width()), mixed: ops.rows(rows, heads.keys()) }
    }
}

/// Bytes of [`Inner`] on the processor.
fn inner_bytes(config: &ModelConfig, rows: usize) -> usize {
    let fused = config.query_width() + 2 * config.kv_width();
    [fused, config.query_width()].map(|width| Cpu::tensor_bytes(rows * width)).iter().sum()
}

/// Bytes of the activations of a step of `rows` rows on the processor, all but the logits.
pub(crate) fn step_bytes(config: &ModelConfig, rows: usize) -> usize {
    Cpu::tensor_bytes(rows * config.width) + inner_bytes(config, rows)
}

/// Most bytes of the activations of a prompt of up to `rows` rows on the processor, all but the logits: the last run may be
/// one row short of a whole one.
pub(crate) fn prompt_bytes(config: &ModelConfig, rows: usize) -> usize {
    let last = rows.saturating_sub(RUN).min(RUN - 1);
    let inner = inner_bytes(config, rows.min(RUN)) + if last > 0 { inner_bytes(config, last) } else { 0 };
    Cpu::tensor_bytes(rows * config.width) + inner
}

/// Most bytes of what describes a model on the processor and a session of it: all but weights, cache and activations.
pub(crate) fn upkeep_bytes(config: &ModelConfig) -> usize {
    /// Matrices that a layer's list has room for: one that grows begins with four.
    const PARTS: usize = 4;
    /// Lists of them in a layer; embedding and output have one each.
    const LISTS: usize = 4;
    size_of::<Model<Cpu>>()
        + size_of::<Session<Cpu>>()
        + config.name.as_ref().map_or(0, String::len)
        + size_of_val(&config.rope.inv_freq[..])
        + config.layers * (size_of::<Layer<Cpu>>() + MATRICES.len() * size_of::<Mapped>())
        + (config.layers * LISTS + 2) * PARTS * size_of::<Matrix>()
}

impl<O: ThinOps> Model<O> {
    /// The model of `checkpoint`, computed by `ops`. `progress` is told how many layers of how many are loaded.
    ///
    /// # Errors
    /// [`ModelError::Weights`] where a tensor is missing or damaged, [`ModelError::Linear`] where they do not fit.
    pub fn load(checkpoint: &Checkpoint, ops: O, progress: &mut dyn FnMut(usize, usize)) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let eps = config.rms_eps;
        let norm = |role| Ok::<_, WeightsError>(Norm { weight: ops.vector(checkpoint.vector(role)?), eps });
        let stacked = |roles: &[Role], bias| {
            let parts = roles.iter().map(|&role| checkpoint.matrix(role)).collect::<Result<_, _>>()?;
            ops.linear(parts, bias).map_err(ModelError::from)
        };
        let maps = checkpoint.maps().clone();
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            let role = |role| Role::Layer(index, role);
            let bias = if config.qkv_bias {
                let parts = [LayerRole::QueryBias, LayerRole::KeyBias, LayerRole::ValueBias];
                let mut bias = Vec::with_capacity(config.query_width() + 2 * config.kv_width());
                for part in parts {
                    bias.extend(checkpoint.vector(role(part))?);
                }
                Some(bias)
            } else {
                None
            };
            let mut mapped = Vec::with_capacity(MATRICES.len());
            for part in MATRICES {
                mapped.extend(maps.find(checkpoint.matrix(role(part))?.bytes()));
            }
            layers.push(Layer {
                attention_norm: norm(role(LayerRole::AttentionNorm))?,
                qkv: stacked(&[LayerRole::Query, LayerRole::Key, LayerRole::Value].map(role), bias)?,
                head_norms: if config.qk_norm {
                    Some(HeadNorms { query: norm(role(LayerRole::QueryNorm))?, key: norm(role(LayerRole::KeyNorm))? })
                } else {
                    None
                },
                output: stacked(&[role(LayerRole::AttentionOutput)], None)?,
                feed_forward_norm: norm(role(LayerRole::FeedForwardNorm))?,
                gate_up: stacked(&[LayerRole::Gate, LayerRole::Up].map(role), None)?,
                down: stacked(&[role(LayerRole::Down)], None)?,
                mapped,
            });
            progress(index + 1, config.layers);
        }
        // Headers, vocabularies and whatever else was looked at.
        maps.release_all();
        Ok(Self {
            table: maps.find(checkpoint.matrix(Role::TokenEmbedding)?.bytes()),
            maps,
            heads: Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim },
            embedding: stacked(&[Role::TokenEmbedding], None)?,
            norm: norm(Role::OutputNorm)?,
            output: stacked(&[Role::Output], None)?,
            layers,
            config,
            ops,
            profile: Profile::default(),
        })
    }

    /// Where the time went since this was last asked.
    pub fn take_profile(&mut self) -> Profile {
        std::mem::take(&mut self.profile)
    }

    /// What the checkpoint says of the model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Empty sequences; head h of layer l keeps `kept(l, h)` channels.
    ///
    /// # Errors
    /// [`CacheError`] where the plan cannot be or the memory cannot be had.
    pub fn session(
        &self,
        options: SessionOptions,
        kept: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Session<O>, CacheError> {
        let SessionOptions { plan, window, choice, choosing } = options;
        let mut cache = self.ops.cache(plan, window, kept)?;
        cache.choose_by(choosing);
        let heads = (0..plan.layers).flat_map(|layer| (0..plan.heads()).map(move |head| (layer, head)));
        let planned = || heads.map(|(layer, head)| kept(layer, head) as u16).collect();
        let spread = if plan.flexible { Spread::new(choice, choosing.score, planned()) } else { None };
        Ok(Session { cache, spread, steps: None, host: Vec::new(), best: Vec::new() })
    }

    /// Feeds `tokens` to the sequence of `slot`; see [`Engine::prefill`](crate::engine::Engine::prefill).
    ///
    /// # Errors
    /// As there.
    pub fn prefill<'s>(
        &mut self,
        session: &'s mut Session<O>,
        slot: usize,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<&'s [f32], ModelError> {
        let layers = self.config.layers;
        self.feed(vec![session], slot, tokens, &mut |_, layer, _| progress(layer + 1, layers))
    }

    /// Feeds `tokens` to the sequence of `slot` of several sessions, in one pass; see
    /// [`Engine::prefill_shared`](crate::engine::Engine::prefill_shared).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn prefill_shared<'s>(
        &mut self,
        sessions: Vec<&'s mut Session<O>>,
        slot: usize,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<&'s [f32], ModelError> {
        if let Some(session) = sessions.iter().find(|session| session.cache.position(slot) > 0) {
            return Err(ModelError::NotEmpty { tokens: session.cache.position(slot) });
        }
        let mut windows = sessions.iter().map(|session| session.cache.plan().window);
        let first = windows.next().expect("a session to feed");
        assert!(windows.all(|window| window == first), "sessions look back on different numbers of tokens");
        let layers = self.config.layers;
        self.feed(sessions, slot, tokens, &mut |_, layer, _| progress(layer + 1, layers))
    }

    /// Shows keys, values and queries of a prompt; see [`Engine::examine`](crate::engine::Engine::examine).
    ///
    /// # Errors
    /// As there.
    pub fn examine(
        &mut self,
        tokens: &[u32],
        window: usize,
        on_head: &mut dyn FnMut(usize, usize, &HeldHead) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        self.check(tokens)?;
        // A prompt attends to a cache and is admitted to it: the least that there is.
        let plan = self.config.cache_plan(1, tokens.len(), 0, StorageKind::F16);
        let mut session = self.session(SessionOptions::new(plan, window), &|_, _| 1)?;
        let (kv_heads, mut held) = (self.config.kv_heads, HeldHead::default());
        self.feed(vec![&mut session], 0, tokens, &mut |ops, layer, prompt| {
            (0..kv_heads).try_for_each(|head| {
                ops.held(prompt, head, &mut held);
                on_head(layer, head, &held)
            })
        })?;
        Ok(())
    }

    /// A prompt into the sequence of `slot` of each session, and the logits of its last row. `through` is told of every
    /// layer that is through, counted from 0, while the prompt still holds it.
    fn feed<'s>(
        &mut self,
        mut sessions: Vec<&'s mut Session<O>>,
        slot: usize,
        tokens: &[u32],
        through: &mut Through<'_, O>,
    ) -> Result<&'s [f32], ModelError> {
        self.check(tokens)?;
        sessions.iter().try_for_each(|session| session.cache.check(slot, tokens.len()))?;
        sessions.iter_mut().try_for_each(|session| session.cache.begin(slot, tokens.len(), true))?;
        let mut caches: Vec<_> =
            sessions.iter_mut().map(|session| (&mut session.cache, session.spread.as_ref())).collect();
        let result = self.read(&mut caches, slot, tokens, through);
        // Buffers of a single run stay: to have them anew for every short prompt takes longer.
        if tokens.len() > RUN {
            self.ops.rest();
        }
        match result {
            Ok(logits) => {
                caches.iter_mut().for_each(|(cache, _)| cache.commit(slot));
                let Session { host, .. } = sessions.swap_remove(0);
                self.ops.read(&logits, host);
                drop(logits);
                self.ops.trim();
                Ok(host)
            }
            Err(error) => {
                caches.iter_mut().for_each(|(cache, _)| cache.clear(slot));
                Err(error)
            }
        }
    }

    /// Feeds one token to each sequence; see [`Engine::decode`](crate::engine::Engine::decode).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn decode<'s>(
        &mut self,
        session: &'s mut Session<O>,
        slots: &[usize],
        tokens: &[u32],
    ) -> Result<&'s [f32], ModelError> {
        let activations = self.advance(session, slots, tokens)?;
        self.ops.read(&activations.logits, &mut session.host);
        session.steps = Some(activations);
        Ok(&session.host)
    }

    /// Feeds one token to each sequence; see [`Engine::decode_best`](crate::engine::Engine::decode_best).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn decode_best<'s>(
        &mut self,
        session: &'s mut Session<O>,
        slots: &[usize],
        tokens: &[u32],
        count: usize,
    ) -> Result<&'s [(u32, f32)], ModelError> {
        let activations = self.advance(session, slots, tokens)?;
        self.ops.best(&activations.logits, count, &mut session.best);
        session.steps = Some(activations);
        Ok(&session.best)
    }

    /// A step of decoding; the session gets its activations back from the caller.
    fn advance(
        &mut self,
        session: &mut Session<O>,
        slots: &[usize],
        tokens: &[u32],
    ) -> Result<Activations<O>, ModelError> {
        assert_eq!(slots.len(), tokens.len(), "one token a sequence");
        assert!((1..slots.len()).all(|i| !slots[..i].contains(&slots[i])), "a slot is named twice");
        self.check(tokens)?;
        let Session { cache, steps, .. } = session;
        slots.iter().try_for_each(|&slot| cache.check(slot, 1))?;
        slots.iter().try_for_each(|&slot| cache.begin(slot, 1, false))?;
        let result = self.step(cache, slots, tokens, steps.take());
        match result {
            Ok(_) => slots.iter().for_each(|&slot| cache.commit(slot)),
            Err(_) => slots.iter().for_each(|&slot| cache.clear(slot)),
        }
        result
    }

    fn check(&self, tokens: &[u32]) -> Result<(), ModelError> {
        if tokens.is_empty() {
            return Err(ModelError::Empty);
        }
        let vocab = self.config.vocab;
        match tokens.iter().find(|&&token| token as usize >= vocab) {
            Some(&token) => Err(ModelError::Token { token, vocab }),
            None => Ok(()),
        }
    }

    /// A prompt through all layers and into every cache; the logits of its last row. What came before it is in the only
    /// cache, or there is nothing. Caches whose channels the prompt shares out take it when all layers are through.
    fn read(
        &mut self,
        caches: &mut [(&mut O::Cache, Option<&Spread>)],
        slot: usize,
        tokens: &[u32],
        through: &mut Through<'_, O>,
    ) -> Result<Rows<O>, ModelError> {
        let Self { config, heads, maps, embedding, table, layers, norm, output, ops, profile } = self;
        let (heads, mut laps) = (*heads, Laps::start());
        profile.passes += 1;
        let rows = tokens.len();
        let (run, long) = (rows.min(RUN), rows > RUN);
        let mut x = ops.embed(embedding, tokens, ops.rows(rows, config.width));
        if long {
            maps.release(&*table);
        }
        let window = caches.iter().map(|(cache, _)| cache.queries()).max().unwrap_or(0);
        let gathers = caches.iter().any(|(cache, _)| cache.gathers());
        let mut later = Vec::with_capacity(caches.len());
        for (cache, spread) in caches.iter_mut() {
            let first = cache.position(slot) == 0;
            let thins = Span::default().admit(rows, cache.plan().retention(), true).thinned > 0;
            let spread = *spread;
            if let (Some(spread), true, false) = (spread, first, thins) {
                spread_by(*cache, spread.planned())?;
            }
            later.push(spread.filter(|_| first && thins));
        }
        let hold_all = later.iter().any(Option::is_some);
        let mut through_layers = Vec::new();
        let mut prompt = ops.prompt(caches[0].0, slot, rows, window, heads);
        // Of whole runs, and of the last one where it is shorter.
        let mut memory = [None, None];
        profile.embed += laps.lap();
        for (index, layer) in layers.iter().enumerate() {
            for first in (0..rows).step_by(run) {
                let range = first..rows.min(first + run);
                let own = &mut memory[usize::from(range.len() < run)];
                let Inner { mut fused, mut mixed } = own.take().unwrap_or_else(|| Inner::new(ops, heads, range.len()));
                fused = ops.norm_linear(&x, range.clone(), &layer.attention_norm, &layer.qkv, fused);
                profile.qkv += laps.lap();
                let position = caches[0].0.position(slot) + first;
                fused = ops.rotate(fused, heads, rotation(config, layer), &|row| position + row);
                profile.rotate += laps.lap();
                ops.hold(caches[0].0, index, &mut prompt, &fused)?;
                if gathers {
                    ops.gather_prompt(caches[0].0, index, &mut prompt, &fused)?;
                }
                profile.attend += laps.lap();
                // Of the last layer nothing but the last row is asked for.
                if index + 1 < layers.len() || range.end == rows {
                    mixed = ops.attend_prompt(caches[0].0, index, &prompt, &fused, mixed)?;
                    profile.attend += laps.lap();
                    x = finish(ops, layer, &mixed, x, range, profile, &mut laps);
                }
                *own = Some(Inner { fused, mixed });
            }
            let mut now = caches.iter_mut().zip(&later).filter(|(_, later)| later.is_none());
            now.try_for_each(|((cache, _), _)| ops.admit_prompt(cache, index, &prompt))?;
            if long {
                maps.release(&layer.mapped);
            }
            profile.admit += laps.lap();
            if through(ops, index, &prompt).is_break() {
                return Err(ModelError::Interrupted);
            }
            if hold_all && index + 1 < layers.len() {
                let next = ops.prompt(caches[0].0, slot, rows, window, heads);
                through_layers.push(std::mem::replace(&mut prompt, next));
            }
        }
        drop(memory);
        through_layers.push(prompt);
        for ((cache, _), spread) in caches.iter_mut().zip(&later) {
            let Some(spread) = spread else { continue };
            let recent = cache.plan().recent;
            let kept = spread.share(recent, |head, held| {
                ops.held(&through_layers[head / heads.kv_heads], head % heads.kv_heads, held);
            })?;
            spread_by(*cache, &kept)?;
            through_layers.iter().enumerate().try_for_each(|(layer, prompt)| ops.admit_prompt(cache, layer, prompt))?;
        }
        drop(through_layers);
        profile.admit += laps.lap();
        if long {
            ops.rest();
        }
        let logits = ops.norm_linear(&x, rows - 1..rows, norm, output, ops.rows(1, config.vocab));
        profile.head += laps.lap();
        Ok(logits)
    }

    /// A token of each of `slots` through all layers, and the logits.
    fn step(
        &mut self,
        cache: &mut O::Cache,
        slots: &[usize],
        tokens: &[u32],
        memory: Option<Activations<O>>,
    ) -> Result<Activations<O>, ModelError> {
        let Self { config, heads, embedding, layers, norm, output, ops, profile, .. } = self;
        let (heads, mut laps) = (*heads, Laps::start());
        profile.passes += 1;
        let rows = tokens.len();
        let Activations { mut x, inner, mut logits, .. } =
            memory.filter(|memory| memory.rows == rows).unwrap_or_else(|| {
                ops.trim();
                Activations {
                    rows,
                    x: ops.rows(rows, config.width),
                    inner: Inner::new(ops, heads, rows),
                    logits: ops.rows(rows, config.vocab),
                }
            });
        let Inner { mut fused, mut mixed } = inner;
        x = ops.embed(embedding, tokens, x);
        profile.embed += laps.lap();
        for (index, layer) in layers.iter().enumerate() {
            fused = ops.norm_linear(&x, 0..rows, &layer.attention_norm, &layer.qkv, fused);
            profile.qkv += laps.lap();
            fused = ops.rotate(fused, heads, rotation(config, layer), &|row| cache.position(slots[row]));
            profile.rotate += laps.lap();
            ops.admit(cache, index, slots, &fused, heads)?;
            profile.admit += laps.lap();
            mixed = ops.attend(cache, index, slots, &fused, heads, mixed)?;
            if cache.gathers() {
                ops.gather(cache, index, slots, &fused, heads)?;
            }
            profile.attend += laps.lap();
            x = finish(ops, layer, &mixed, x, 0..rows, profile, &mut laps);
        }
        logits = ops.norm_linear(&x, 0..rows, norm, output, logits);
        profile.head += laps.lap();
        Ok(Activations { rows, x, inner: Inner { fused, mixed }, logits })
    }
}

/// Makes the heads of `cache` keep as many channels as `kept` lists, layer after layer.
fn spread_by(cache: &mut impl Cache, kept: &[u16]) -> Result<(), Error> {
    let heads = cache.plan().heads();
    cache.spread(&|layer, head| kept[layer * heads + head].into())
}

/// How heads are rotated in a layer.
fn rotation<'a, O: ThinOps>(config: &'a ModelConfig, layer: &'a Layer<O>) -> Rotation<'a, O::Backend> {
    Rotation {
        frequencies: &config.rope.inv_freq,
        pairs: match config.rope.pairing {
            Pairing::Interleaved => Pairs::Adjacent,
            Pairing::Halves => Pairs::Halves,
        },
        norms: layer.head_norms.as_ref(),
    }
}

/// What comes after attention in a layer, for the rows `rows` of x: the projection of its output `mixed`, and the
/// feed-forward part.
fn finish<O: ThinOps>(
    ops: &mut O,
    layer: &Layer<O>,
    mixed: &Rows<O>,
    mut x: Rows<O>,
    rows: Range<usize>,
    profile: &mut Profile,
    laps: &mut Laps,
) -> Rows<O> {
    x = ops.add_linear(mixed, &layer.output, x, rows.clone());
    profile.output += laps.lap();
    x = ops.feed_forward(x, rows, &layer.feed_forward_norm, &layer.gate_up, &layer.down);
    profile.feed_forward += laps.lap();
    x
}
