//! One engine for every device: what the rest of the program sees of a loaded model.
//!
//! The transformer is generic over the operations of a backend; [`Engine`] and [`Session`] are not, so that programs
//! choose the device when they run and link in seconds.

use crate::{
    model::{Model, ModelConfig, ModelError, transformer},
    weights::Checkpoint,
};
use std::{fmt, ops::ControlFlow, str::FromStr};
use thinkey_core::{CacheBytes, CachePlan};

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

/// What a session's cache is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Shapes and capacities.
    pub plan: CachePlan,
    /// Newest queries of a prompt that score its channels, W.
    pub window: usize,
}

/// A model on a device.
pub struct Engine {
    model: Model,
}

/// Cache and scratch memory of the sequences under way, one a slot.
pub struct Session {
    inner: transformer::Session,
}

impl Engine {
    /// Loads the model of `checkpoint` onto `device`; on the processor, `threads` threads compute it and its weights
    /// stay in the checkpoint's memory map. `progress` is told how many layers of how many are loaded.
    ///
    /// # Errors
    /// [`ModelError`] where a tensor is missing or damaged or the device cannot be used.
    pub fn load(
        checkpoint: &Checkpoint,
        device: Device,
        threads: usize,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        let _ = (device, progress);
        Ok(Self { model: Model::load(checkpoint, threads)? })
    }

    /// What the checkpoint says of the model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Empty sequences, `options.plan.slots` of them; head h of layer l keeps `kept(l, h)` channels.
    ///
    /// # Errors
    /// [`ModelError::Cache`] where the plan cannot be or the memory cannot be had.
    pub fn session(
        &self,
        options: SessionOptions,
        kept: impl Fn(usize, usize) -> usize,
    ) -> Result<Session, ModelError> {
        Ok(Session { inner: transformer::Session::new(options.plan, kept)? })
    }

    /// Feeds `tokens` to the sequence of `slot` and returns the logits after the last one, one for each token of the
    /// vocabulary. `progress` is told how many layers of how many are done; where it breaks, the sequence is forgotten
    /// and the result is [`ModelError::Interrupted`].
    ///
    /// # Errors
    /// [`ModelError::Empty`], [`ModelError::Token`], [`ModelError::Core`] where the context is full: the sequence is as
    /// before then.
    pub fn prefill<'s>(
        &mut self,
        session: &'s mut Session,
        slot: usize,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<&'s [f32], ModelError> {
        self.model.prefill(&mut session.inner, slot, tokens, &mut |done, of| {
            let _ = progress(done, of);
        })
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
        self.model.decode(&mut session.inner, slots, tokens)
    }
}

impl Session {
    /// What was planned.
    #[must_use]
    pub fn plan(&self) -> &CachePlan {
        self.inner.cache().plan()
    }

    /// Bytes of the cache by part, as planned.
    #[must_use]
    pub fn planned(&self) -> CacheBytes {
        self.inner.cache().planned()
    }

    /// Bytes that were allocated for the parts that the plan counts.
    #[must_use]
    pub fn allocated(&self) -> usize {
        self.inner.cache().allocated()
    }

    /// Position of the next token of `slot`: the tokens fed to it so far.
    #[must_use]
    pub fn position(&self, slot: usize) -> usize {
        self.inner.cache().position(slot)
    }

    /// Forgets the sequence of `slot`.
    pub fn clear(&mut self, slot: usize) {
        self.inner.clear(slot);
    }
}
