//! One engine for every device: what the rest of the program sees of a loaded model.
//!
//! The transformer is generic over the operations of a backend; [`Engine`] and [`Session`] are not, so that programs
//! choose the device when they run and link in seconds.

use crate::{
    model::{Model, ModelConfig, ModelError, Profile, transformer},
    weights::Checkpoint,
};
pub use snapshot::Origin;
use std::{fmt, num::NonZero, ops::ControlFlow, str::FromStr};
use thinkey_core::{
    CacheBytes, CachePlan,
    policy::{Choice, Life, Score, ThinValues},
    snapshot::SnapshotError,
};
pub use thinkey_kernels::cpu::linear::Activations;
pub use thinkey_kernels::ops::{Choosing, HeldHead};
use thinkey_kernels::{
    cpu::{
        Cpu,
        simd::{Level, NoLevel},
    },
    ops::Cache,
};

/// Where a model is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor, by burn's ndarray backend and our operations.
    #[default]
    Ndarray,
    /// An NVIDIA GPU, by burn's CUDA backend.
    Cuda,
}

impl Device {
    /// Every device that there can be.
    pub const ALL: [Self; 2] = [Self::Ndarray, Self::Cuda];

    /// Whether a model can be computed there by this program on this machine.
    ///
    /// # Errors
    /// [`DeviceError`] with what is missing first, and what to do about it.
    pub fn check(self) -> Result<(), DeviceError> {
        match self {
            Self::Ndarray => level().map(|_| ()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(thinkey_kernels::cuda::probe()?),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => Err(DeviceError::NotBuilt),
        }
    }

    /// How a model is computed there, in a line for people.
    #[must_use]
    pub const fn computes(self) -> &'static str {
        match self {
            Self::Ndarray => "quantised weights as they are in their file, the thin cache in every storage",
            Self::Cuda => "quantised weights as they are in their file, the thin cache in every storage but int4/2",
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ndarray => "ndarray",
            Self::Cuda => "cuda",
        })
    }
}

/// No device has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no device {0:?}; choose ndarray or cuda")]
pub struct UnknownDevice(String);

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(name: &str) -> Result<Self, UnknownDevice> {
        match name {
            "ndarray" => Ok(Self::Ndarray),
            "cuda" => Ok(Self::Cuda),
            _ => Err(UnknownDevice(name.to_owned())),
        }
    }
}

/// How a model is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Where.
    pub device: Device,
    /// Threads on the processor.
    pub threads: usize,
    /// In what numbers the processor's linear layers read their input; other devices read it exactly.
    pub activations: Activations,
}

impl Default for EngineOptions {
    /// The processor, all of its cores, the default activations.
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self { device: Device::default(), threads, activations: Activations::default() }
    }
}

/// What a session's cache is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Shapes and capacities.
    pub plan: CachePlan,
    /// Newest queries of a prompt that score its channels, W.
    pub window: usize,
    /// How many channels are kept, where each prompt decides.
    pub choice: Choice,
    /// How they are chosen.
    pub choosing: Choosing,
}

impl SessionOptions {
    /// A cache of `plan` whose channels the newest `window` queries of a prompt score.
    #[must_use]
    pub const fn new(plan: CachePlan, window: usize) -> Self {
        let choosing = Choosing { score: Score::Query, values: ThinValues::Whole, life: Life::Prompt };
        Self { plan, window, choice: Choice::Whole, choosing }
    }
}

/// Why a device cannot be used. Shown with what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}; {}", self.reason(), self.remedy())]
#[non_exhaustive]
pub enum DeviceError {
    /// The program was built without it.
    NotBuilt,
    /// The processor has not the instructions that it was told to compute with.
    Isa(#[from] NoLevel),
    /// CUDA is not to be had.
    #[cfg(feature = "cuda")]
    Cuda(#[from] thinkey_kernels::cuda::CudaError),
}

impl DeviceError {
    /// What is wrong.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::NotBuilt => "this program is built without CUDA".to_owned(),
            Self::Isa(error) => error.to_string(),
            #[cfg(feature = "cuda")]
            Self::Cuda(error) => error.reason(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::NotBuilt => "build it with `--features cuda`, or use --device ndarray".to_owned(),
            Self::Isa(_) => format!("set {ISA} to one of them, or not at all"),
            #[cfg(feature = "cuda")]
            Self::Cuda(error) => error.remedy().to_owned(),
        }
    }
}

/// Names the instruction set that the processor computes with, in place of its best: `portable`, `avx2`, `avx2-vnni`, `avx512`,
/// `avx512-vnni`, `neon` or `neon-dotprod`.
pub const ISA: &str = "THINKEY_ISA";

/// The instruction set that the processor computes with: its best, or the one that the environment variable [`ISA`] names.
///
/// # Errors
/// [`DeviceError::Isa`] where the machine has it not.
pub fn level() -> Result<Level, DeviceError> {
    match std::env::var_os(ISA) {
        Some(name) => Ok(Level::named(&name.to_string_lossy())?),
        None => Ok(Level::best()),
    }
}

/// A model on a device.
pub struct Engine(Backend);

enum Backend {
    Ndarray(Box<Model<Cpu>>),
    #[cfg(feature = "cuda")]
    Cuda(Box<Model<Cuda>>),
}

/// Cache and activations of the sequences under way, one a slot.
pub struct Session(State);

enum State {
    Ndarray(Box<transformer::Session<Cpu>>),
    #[cfg(feature = "cuda")]
    Cuda(Box<transformer::Session<Cuda>>),
}

#[cfg(feature = "cuda")]
type Cuda = thinkey_kernels::cuda::Ops;

/// Runs `$body` with the model and the session of the device at hand.
macro_rules! both {
    ($engine:expr, $session:expr, |$model:ident, $state:ident| $body:expr) => {
        match ($engine, $session) {
            (Backend::Ndarray($model), State::Ndarray($state)) => $body,
            #[cfg(feature = "cuda")]
            (Backend::Cuda($model), State::Cuda($state)) => $body,
            #[cfg(feature = "cuda")]
            _ => Err(ModelError::Session),
        }
    };
}

/// Runs `$body` with what is in `$value`, an enum `$kind`.
macro_rules! any {
    ($kind:ident, $value:expr, |$inner:ident| $body:expr) => {
        match $value {
            $kind::Ndarray($inner) => $body,
            #[cfg(feature = "cuda")]
            $kind::Cuda($inner) => $body,
        }
    };
}

impl Engine {
    /// Loads the model of `checkpoint` onto a device; on the processor its weights stay in the checkpoint's memory map.
    /// `progress` is told how many layers of how many are loaded.
    ///
    /// # Errors
    /// [`ModelError`] where a tensor is missing or damaged; [`ModelError::Device`] where the device cannot be used.
    pub fn load(
        checkpoint: &Checkpoint,
        options: EngineOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        match options.device {
            Device::Ndarray => {
                let ops = Cpu::new(options.threads, level()?, options.activations)?;
                Ok(Self(Backend::Ndarray(Box::new(Model::load(checkpoint, ops, progress)?))))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda => {
                Device::Cuda.check()?;
                // Before a device is opened. Where it cannot be done, cubecl's own choice serves.
                let _ = thinkey_kernels::cuda::allocate_synchronously();
                let ops = Cuda::new(thinkey_kernels::cuda::Device::default());
                Ok(Self(Backend::Cuda(Box::new(Model::load(checkpoint, ops, progress)?))))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => Err(DeviceError::NotBuilt.into()),
        }
    }

    /// What the checkpoint says of the model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        any!(Backend, &self.0, |model| model.config())
    }

    /// Where the time of prefill and decode went since this was last asked.
    pub fn take_profile(&mut self) -> Profile {
        any!(Backend, &mut self.0, |model| model.take_profile())
    }

    /// Empty sequences, `options.plan.slots` of them; head h of layer l of the cache keeps `kept(l, h)` channels, or, where
    /// each prompt decides, as many on average.
    ///
    /// # Errors
    /// [`ModelError::Cache`] where the plan cannot be or the memory cannot be had.
    pub fn session(
        &self,
        options: SessionOptions,
        kept: impl Fn(usize, usize) -> usize,
    ) -> Result<Session, ModelError> {
        Ok(Session(match &self.0 {
            Backend::Ndarray(model) => State::Ndarray(Box::new(model.session(options, &kept)?)),
            #[cfg(feature = "cuda")]
            Backend::Cuda(model) => State::Cuda(Box::new(model.session(options, &kept)?)),
        }))
    }

    /// Feeds `tokens` to the sequence of `slot` and returns the logits after the last one, one for each token of the
    /// vocabulary. `progress` is told how many layers of how many are done.
    ///
    /// # Errors
    /// [`ModelError::Empty`], [`ModelError::Token`], [`ModelError::Core`] where the context is full: the sequence is as
    /// before then. It is forgotten where `progress` breaks, which is [`ModelError::Interrupted`], and where a score is
    /// not a number.
    pub fn prefill<'s>(
        &mut self,
        session: &'s mut Session,
        slot: usize,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<&'s [f32], ModelError> {
        both!(&mut self.0, &mut session.0, |model, state| model.prefill(state, slot, tokens, progress))
    }

    /// Feeds `tokens` to the empty sequence of `slot` of several sessions in one pass, so that caches of different kinds are
    /// filled for the price of one prompt; each holds and says after it what it would after a [prompt of its
    /// own](Self::prefill). Returns the logits after the last token, which are the same for all.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), for all sessions alike; [`ModelError::NotEmpty`] where a sequence holds tokens.
    ///
    /// # Panics
    /// Where there is no session, or their plans have different sliding windows.
    pub fn prefill_shared<'s>(
        &mut self,
        sessions: &'s mut [&mut Session],
        slot: usize,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<&'s [f32], ModelError> {
        match &mut self.0 {
            Backend::Ndarray(model) => {
                let states = sessions.iter_mut().map(|session| match &mut session.0 {
                    State::Ndarray(state) => Ok(&mut **state),
                    #[cfg(feature = "cuda")]
                    State::Cuda(_) => Err(ModelError::Session),
                });
                model.prefill_shared(states.collect::<Result<_, ModelError>>()?, slot, tokens, progress)
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(model) => {
                let states = sessions.iter_mut().map(|session| match &mut session.0 {
                    State::Cuda(state) => Ok(&mut **state),
                    State::Ndarray(_) => Err(ModelError::Session),
                });
                model.prefill_shared(states.collect::<Result<_, ModelError>>()?, slot, tokens, progress)
            }
        }
    }

    /// Reads `tokens` as a prompt and shows `on_head(layer, head, …)` what each KV head of each layer makes of it, in
    /// order: whole keys and values, and the queries of the newest `window` tokens. Nothing is kept.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill); [`ModelError::Interrupted`] where `on_head` breaks.
    pub fn examine(
        &mut self,
        tokens: &[u32],
        window: usize,
        on_head: &mut dyn FnMut(usize, usize, &HeldHead) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        any!(Backend, &mut self.0, |model| model.examine(tokens, window, on_head))
    }

    /// As [`examine`](Self::examine) for an `on_head` that may fail, which ends the reading.
    ///
    /// # Errors
    /// As there, and what `on_head` returned.
    pub fn try_examine<E: From<ModelError>>(
        &mut self,
        tokens: &[u32],
        window: usize,
        mut on_head: impl FnMut(usize, usize, &HeldHead) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut failed = None;
        let read = self.examine(tokens, window, &mut |layer, head, held| match on_head(layer, head, held) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(read?),
        }
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
        &mut self,
        session: &'s mut Session,
        slots: &[usize],
        tokens: &[u32],
    ) -> Result<&'s [f32], ModelError> {
        both!(&mut self.0, &mut session.0, |model, state| model.decode(state, slots, tokens))
    }

    /// As [`decode`](Self::decode), of which only the `count` largest logits of each sequence are returned, with their tokens:
    /// best first, of equals the lower token, and what is no number counts as −∞. There are fewer where the vocabulary is
    /// smaller. On a device nothing but these is brought to the host, where they are at most 64.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    ///
    /// # Panics
    /// As there.
    pub fn decode_best<'s>(
        &mut self,
        session: &'s mut Session,
        slots: &[usize],
        tokens: &[u32],
        count: usize,
    ) -> Result<&'s [(u32, f32)], ModelError> {
        both!(&mut self.0, &mut session.0, |model, state| model.decode_best(state, slots, tokens, count))
    }
}

impl Session {
    /// What was planned.
    #[must_use]
    pub fn plan(&self) -> &CachePlan {
        any!(State, &self.0, |state| state.cache().plan())
    }

    /// Bytes of the cache by part, as planned.
    #[must_use]
    pub fn planned(&self) -> CacheBytes {
        any!(State, &self.0, |state| state.cache().planned())
    }

    /// Bytes that are allocated for the parts that the plan counts.
    #[must_use]
    pub fn allocated(&self) -> usize {
        any!(State, &self.0, |state| state.cache().allocated())
    }

    /// Position of the next token of `slot`: the tokens fed to it so far.
    #[must_use]
    pub fn position(&self, slot: usize) -> usize {
        any!(State, &self.0, |state| state.cache().position(slot))
    }

    /// Whether the cache can be [saved](Self::save) and [restored](Self::restore): caches of plain tensors cannot.
    #[must_use]
    pub fn takes_snapshots(&self) -> bool {
        any!(State, &self.0, |state| !matches!(state.cache().progress(0), Err(SnapshotError::Device)))
    }

    /// Forgets the sequence of `slot`.
    pub fn clear(&mut self, slot: usize) {
        any!(State, &mut self.0, |state| state.clear(slot));
    }
}

mod snapshot;

#[cfg(test)]
mod tests;
