//! From a policy to a cache.

use super::EvalError;
use crate::{
    engine::{Engine, Session, SessionOptions},
    model::{ModelConfig, transformer::WINDOW},
};
use serde::Serialize;
use std::fmt::Display;
use thinkey_core::{
    CacheBytes, CachePlan, Lambda,
    policy::{Choice, Fix, Heads, Life, Policy, PolicyError, Score, Store, ThinValues, Tokens},
};

/// Newest tokens kept whole, R.
const RECENT: usize = 32;

/// An empty sequence of at most `tokens` tokens whose cache does as `policy` says.
///
/// # Errors
/// [`EvalError::Unsupported`] with the part that caches do not do yet, [`EvalError::Policy`] where the policy cannot be,
/// [`EvalError::Model`] where the memory cannot be had.
pub fn session_for(engine: &Engine, policy: &Policy, tokens: usize) -> Result<Session, EvalError> {
    let (plan, kept) = layout(engine.config(), policy, tokens)?;
    Ok(engine.session(SessionOptions { plan, window: WINDOW }, |_, _| kept)?)
}

/// Bytes by part of the cache that [`session_for`] makes.
///
/// # Errors
/// As there; [`EvalError::Core`] where the sum cannot be counted.
pub fn cache_bytes(config: &ModelConfig, policy: &Policy, tokens: usize) -> Result<CacheBytes, EvalError> {
    let (plan, kept) = layout(config, policy, tokens)?;
    Ok(plan.bytes(|_, _| kept)?)
}

/// The plan of a cache, and the channels that its heads keep.
fn layout(config: &ModelConfig, policy: &Policy, tokens: usize) -> Result<(CachePlan, usize), EvalError> {
    let refused = |cause| EvalError::Policy { policy: policy.to_string(), cause };
    policy.check().map_err(refused)?;
    let Policy { tokens: eviction, score, choice, fix, thin_values, keys, values, heads, life } = *policy;
    let slots: [(bool, &'static str, &dyn Display); 7] = [
        (eviction == Tokens::All, "tokens", &eviction),
        (score == Score::Query || choice == Choice::Whole, "score", &score),
        (matches!(choice, Choice::Whole | Choice::Top { .. }), "choice", &choice),
        (fix == Fix::None, "fix", &fix),
        (thin_values == ThinValues::Whole, "thin-values", &thin_values),
        (heads == Heads::Kv || choice == Choice::Whole, "heads", &heads),
        (life == Life::Prompt, "life", &life),
    ];
    if let Some((_, slot, value)) = slots.into_iter().find(|(supported, ..)| !supported) {
        return Err(EvalError::Unsupported { policy: policy.to_string(), slot, value: value.to_string() });
    }
    let kind = |store: Store| store.try_into().map_err(|cause: PolicyError| refused(cause));
    let plan = CachePlan { values: kind(values)?, ..config.cache_plan(1, tokens, RECENT, kind(keys)?) };
    Ok((plan, choice.lambda().unwrap_or(Lambda::WHOLE).kept(config.head_dim)))
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
    /// As [`cache_bytes`].
    pub fn planned(config: &ModelConfig, policy: &Policy, tokens: usize) -> Result<Self, EvalError> {
        Ok(Self::new(config, tokens, cache_bytes(config, policy, tokens)?.total()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Architecture, weights::fixture};

    fn bytes(line: &str) -> Result<CacheBytes, EvalError> {
        let config = ModelConfig { head_dim: 64, ..fixture::config(Architecture::Llama) };
        cache_bytes(&config, &line.parse().unwrap(), 1000)
    }

    #[test]
    fn what_caches_do_is_planned() {
        let [full, think, small] =
            ["full", "choice=top(.5)", "choice=top(.5),keys=int4,values=int8"].map(|line| bytes(line).unwrap());
        assert_eq!(think.prefix_keys, full.prefix_keys / 2);
        assert_eq!(think.prefix_values, full.prefix_values);
        assert!(small.prefix_keys < think.prefix_keys / 2 && small.prefix_values < think.prefix_values);
    }

    #[test]
    fn what_they_do_not_yet_is_named() {
        for (line, says) in [
            ("balanced", "caches cannot do choice=calibrated(.5,8) yet"),
            ("tokens=h2o(100,10)", "caches cannot do tokens=h2o(100,10) yet"),
            ("choice=top(.5),fix=compensated", "caches cannot do fix=compensated yet"),
            ("choice=top(.5),score=l2", "caches cannot do score=l2 yet"),
            ("thin-values=query(.3)", "caches cannot do thin-values=query(.3) yet"),
            ("choice=top(.5),life=turn", "caches cannot do life=turn yet"),
            ("think-official", "caches cannot do heads=query yet"),
            ("keys=bf16", "this build does not store bf16"),
        ] {
            let error = bytes(line).unwrap_err().to_string();
            assert!(error.starts_with("policy ") && error.ends_with(says), "{error}");
        }
    }
}
