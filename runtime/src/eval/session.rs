//! From a policy to a cache.

use super::EvalError;
use crate::{
    engine::{Engine, Session},
    model::{
        ModelConfig,
        transformer::{RECENT, WINDOW},
    },
    policy::{CacheDesign, Calibration},
};
use serde::Serialize;
use std::ops::ControlFlow;
use thinkey_core::Policy;

/// An empty sequence of at most `tokens` tokens whose cache does as `policy` says.
///
/// # Errors
/// [`EvalError::Design`] where the policy cannot be, [`EvalError::Model`] where the memory cannot be had.
pub fn session_for(
    engine: &Engine,
    calibration: Option<&Calibration>,
    policy: &Policy,
    tokens: usize,
) -> Result<Session, EvalError> {
    let design = design(engine.config(), calibration, policy)?;
    Ok(engine.session(design.options(1, tokens, RECENT, WINDOW), |layer, head| design.kept(layer, head))?)
}

/// Feeds `prompt` to the empty sequences of `sessions`, in one pass for all that look back on as many tokens, and tells
/// `each` the logits after it by the session's index.
///
/// # Errors
/// [`EvalError::Model`] as [`Engine::prefill_shared`].
pub fn prefill(
    engine: &mut Engine,
    sessions: &mut [&mut Session],
    prompt: &[u32],
    mut each: impl FnMut(usize, &[f32]),
) -> Result<(), EvalError> {
    let mut left: Vec<_> = sessions.iter_mut().enumerate().collect();
    while let Some((_, first)) = left.first() {
        let window = first.plan().window;
        let (alike, others): (Vec<_>, Vec<_>) = left.into_iter().partition(|(_, other)| other.plan().window == window);
        left = others;
        let (indices, mut alike): (Vec<_>, Vec<&mut Session>) =
            alike.into_iter().map(|(index, session)| (index, &mut **session)).unzip();
        let logits = engine.prefill_shared(&mut alike, 0, prompt, &mut |_, _| ControlFlow::Continue(()))?;
        indices.into_iter().for_each(|index| each(index, logits));
    }
    Ok(())
}

/// What a policy comes to for a model.
fn design(config: &ModelConfig, calibration: Option<&Calibration>, policy: &Policy) -> Result<CacheDesign, EvalError> {
    let refused = |cause| EvalError::Design { policy: policy.to_string(), cause };
    CacheDesign::new(*policy, config, calibration).map_err(refused)
}

/// What a cache takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Footprint {
    /// Tokens that it holds.
    pub tokens: usize,
    /// Bytes, with masks and tables.
    pub bytes: usize,
    /// Bytes a token.
    pub per_token: f64,
    /// Share of what the same tokens take whole, in f16.
    pub share: f64,
}

impl Footprint {
    /// Of a cache of `bytes` for `tokens` tokens.
    #[must_use]
    pub fn new(config: &ModelConfig, tokens: usize, bytes: usize) -> Self {
        let whole = config.cache_plan(1, tokens, RECENT, thinkey_core::StorageKind::F16).whole_bytes();
        Self { tokens, bytes, per_token: bytes as f64 / tokens as f64, share: bytes as f64 / whole as f64 }
    }

    /// As planned for `policy`, at `tokens` tokens.
    ///
    /// # Errors
    /// [`EvalError::Design`] where the policy cannot be, [`EvalError::Core`] where the sum cannot be counted.
    pub fn planned(
        config: &ModelConfig,
        calibration: Option<&Calibration>,
        policy: &Policy,
        tokens: usize,
    ) -> Result<Self, EvalError> {
        let design = design(config, calibration, policy)?;
        let bytes = design.plan(1, tokens, RECENT).bytes(|layer, head| design.kept(layer, head))?;
        Ok(Self::new(config, tokens, bytes.total()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Architecture, weights::fixture};

    fn bytes(line: &str) -> Result<usize, EvalError> {
        let config = ModelConfig { head_dim: 64, ..fixture::config(Architecture::Llama) };
        Footprint::planned(&config, None, &line.parse().unwrap(), 1000).map(|footprint| footprint.bytes)
    }

    #[test]
    fn what_caches_do_is_planned() {
        let [full, think, small] = ["full", "think", "think,keys=int4,values=int8"].map(|line| bytes(line).unwrap());
        assert!(small < think * 2 / 3 && think < full * 9 / 10);
        // Values take as much as keys; a prompt may keep every channel to hold its share; masks per query head are copies.
        let [values, threshold, renewed] =
            ["thin-values=l2(.5)", "choice=threshold(.9)", "think,life=turn"].map(|line| bytes(line).unwrap());
        assert!(values.abs_diff(think) < think / 50, "{values} and {think}");
        assert!(threshold >= full && renewed > think && renewed < think * 21 / 20);
        let config = fixture::config(Architecture::Llama);
        let copies = config.heads / config.kv_heads;
        assert!(copies > 1 && bytes("think,heads=query").unwrap() > (copies - 1) * think);
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (line, says) in [
            ("balanced", "this model is not calibrated: "),
            ("tokens=h2o(70,10)", "tokens=h2o keeps 70 tokens, and 74 are the fewest"),
            ("choice=dynamic(.1,.5)", "choice=dynamic is not to be had"),
            ("choice=adaptive(.9,8)", "λ = 0.9 leaves fewer channels"),
        ] {
            let error = bytes(line).unwrap_err().to_string();
            assert!(error.starts_with("policy ") && error.contains(says), "{error}");
        }
    }
}
