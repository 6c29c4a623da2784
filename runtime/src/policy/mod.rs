//! A cache policy made concrete for a model: what each head keeps, before a prompt is seen.
//!
//! Shapes are static: how many channels a head keeps is known when memory is planned, and only *which* is decided by each
//! prompt. [`CacheDesign`] is where a [`Policy`] and a model meet; the planner counts it, and sessions are made of it.
//!
//! ```
//! use thinkey::{model::ModelConfig, policy::CacheDesign};
//! use thinkey_core::Policy;
//!
//! # fn show(config: &ModelConfig) -> Result<(), Box<dyn std::error::Error>> {
//! let policy: Policy = "think,lambda=.6,keys=int4".parse()?;
//! let design = CacheDesign::new(policy, config, None)?;
//! assert_eq!(design.kept(0, 0), 26); // of 64
//! # Ok(())
//! # }
//! ```

mod calibration;
mod measure;
pub(crate) mod spread;

pub use calibration::{Calibration, CalibrationError};

use crate::{
    engine::{Choosing, Device, SessionOptions},
    model::ModelConfig,
};
use std::iter;
use thinkey_core::{
    BLOCK, CachePlan, Error, Lambda, Policy, StorageKind,
    channel::{
        adaptive::{Grid, MIN_KEPT},
        compensate::SINKS,
    },
    policy::{Choice, Fix, Heads, Life, PolicyError, Store, ThinValues, Tokens},
    token::{Eviction, h2o::H2o, snapkv::SnapKv},
};

/// Why a policy cannot be carried out for a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DesignError {
    /// It cannot be for any.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// T per head was to be looked up, and nobody has measured it.
    #[error(
        "this model is not calibrated: measure it once by `thinkey calibrate`, or give every head as many channels by \
         --policy choice=top(λ)"
    )]
    NotCalibrated,
    /// The budget of channels does not go round.
    #[error("λ = {} leaves fewer channels than every head keeps at least; lower it", f64::from(lambda.per_mille()) / 1000.0)]
    Lambda {
        /// The λ.
        lambda: Lambda,
    },
    /// A table has a λ for more or fewer layers than there are.
    #[error(
        "choice=layers has a λ for {given} layers, and the model has {layers}; neighbours of one λ are written as {layers}*.5"
    )]
    Layers {
        /// Layers that the table has a λ for.
        given: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A part that sessions do not have.
    #[error("{part} is not to be had in a session: {why}")]
    Part {
        /// The slot, or the slot and its value.
        part: &'static str,
        /// Why, or what to do instead.
        why: &'static str,
    },
    /// The model's attention forbids it.
    #[error("{part} does not go with the sliding window of this model's attention")]
    SlidingWindow {
        /// The slot and its value.
        part: &'static str,
    },
    /// Tokens cannot be evicted by ranks: too few are kept.
    #[error(
        "{part} keeps {capacity} tokens, and {needed} are the fewest: first ones and newest ones stay whole, {BLOCK} more as \
         they come, and a block of {BLOCK} is thin"
    )]
    Capacity {
        /// The slot and its value.
        part: &'static str,
        /// Tokens that it keeps.
        capacity: usize,
        /// The fewest.
        needed: usize,
    },
    /// The shape of the cache cannot be.
    #[error(transparent)]
    Core(#[from] Error),
}

/// What a policy comes to for a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheDesign {
    policy: Policy,
    /// Of a cache of one sequence of one token.
    plan: CachePlan,
    /// T, [layers][kv_heads].
    kept: Vec<u16>,
}

impl CacheDesign {
    /// The design of `policy` for a model of shape `config`, whose `calibration` is looked up where the policy asks for it.
    ///
    /// # Errors
    /// [`DesignError`] where the policy cannot be, alone or for this model.
    pub fn new(policy: Policy, config: &ModelConfig, calibration: Option<&Calibration>) -> Result<Self, DesignError> {
        policy.check()?;
        if matches!(policy.choice, Choice::Dynamic { .. }) {
            let why = "its λ is settled before, by what is free: plan, generate and chat do";
            return Err(DesignError::Part { part: "choice=dynamic", why });
        }
        let mut sinks = if policy.fix == Fix::None { 0 } else { SINKS };
        let mut window = config.sliding_window;
        let eviction = eviction(policy.tokens);
        match (policy.tokens, window) {
            (Tokens::Window { .. }, Some(_)) => return Err(DesignError::SlidingWindow { part: "tokens=window" }),
            (Tokens::Snapkv { .. }, Some(_)) => return Err(DesignError::SlidingWindow { part: "tokens=snapkv" }),
            (Tokens::H2o { .. }, Some(_)) => return Err(DesignError::SlidingWindow { part: "tokens=h2o" }),
            (Tokens::Window { sinks: first, window: newest }, None) => {
                sinks = sinks.max(first as usize);
                window = Some(newest as usize);
            }
            // The model itself leaves its first tokens behind.
            (_, Some(_)) => sinks = 0,
            _ => {}
        }
        let plan = CachePlan {
            sinks,
            copies: match policy.heads {
                Heads::Kv => 1,
                Heads::Query => config.heads / config.kv_heads,
            },
            flexible: matches!(policy.choice, Choice::Adaptive { .. } | Choice::Threshold { .. }),
            renews: policy.life != Life::Prompt,
            fix: policy.fix,
            value_lambda: match policy.thin_values {
                ThinValues::Whole => Lambda::WHOLE,
                ThinValues::Query { lambda } | ThinValues::L2 { lambda } => lambda,
            },
            window,
            eviction,
            values: StorageKind::try_from(policy.values)?,
            ..config.cache_plan(1, 1, 0, StorageKind::try_from(policy.keys)?)
        };
        if let Some(eviction) = eviction {
            let (needed, capacity) = (sinks + eviction.recent() + 2 * BLOCK, eviction.capacity());
            if needed > capacity {
                let part = if eviction.gathers() { "tokens=h2o" } else { "tokens=snapkv" };
                return Err(DesignError::Capacity { part, capacity, needed });
            }
        }
        let heads = plan.layers * plan.heads();
        let kept = match policy.choice {
            Choice::Top { lambda } => vec![lambda.kept(config.head_dim) as u16; heads],
            Choice::Layers { table } => {
                let (given, layers) = (table.layers(), plan.layers);
                if given != layers {
                    return Err(DesignError::Layers { given, layers });
                }
                let layer = |lambda: Lambda| iter::repeat_n(lambda.kept(config.head_dim) as u16, plan.heads());
                table.lambdas().flat_map(layer).collect()
            }
            Choice::Adaptive { lambda, minimum } if usize::from(minimum) > lambda.kept(config.head_dim) => {
                return Err(DesignError::Lambda { lambda });
            }
            Choice::Adaptive { lambda, .. } => vec![lambda.kept(config.head_dim) as u16; heads],
            Choice::Calibrated { lambda, multiple } => {
                let grid = Grid {
                    head_dim: config.head_dim,
                    minimum: MIN_KEPT.min(config.head_dim),
                    multiple: multiple.into(),
                };
                let scores = calibration.ok_or(DesignError::NotCalibrated)?.scores(config)?;
                let mut kept = vec![0; heads];
                calibration::distribute(scores, grid, lambda, &mut kept)?;
                kept
            }
            _ => vec![config.head_dim as u16; heads],
        };
        Ok(Self { policy, plan, kept })
    }

    /// The policy.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Channels that head `head` of layer `layer` of the cache keeps, T; on average and at most, where each prompt decides.
    ///
    /// # Panics
    /// Where the model has no such head.
    #[must_use]
    pub fn kept(&self, layer: usize, head: usize) -> usize {
        usize::from(self.kept[layer * self.plan.heads() + head])
    }

    /// The most channels that a head keeps.
    #[must_use]
    pub fn most_kept(&self) -> usize {
        self.kept.iter().copied().max().map_or(0, usize::from)
    }

    /// What a session of `slots` sequences of at most `tokens` tokens, the newest `recent` of them whole, is to be; the newest
    /// `window` queries of a prompt score its channels.
    #[must_use]
    pub fn options(&self, slots: usize, tokens: usize, recent: usize, window: usize) -> SessionOptions {
        let Policy { score, choice, thin_values: values, life, .. } = self.policy;
        SessionOptions {
            plan: self.plan(slots, tokens, recent),
            window,
            choice,
            choosing: Choosing { score, values, life },
        }
    }

    /// The plan of a cache for `slots` sequences of at most `tokens` tokens, the newest `recent` of them whole; more, where
    /// the policy never evicts as many.
    #[must_use]
    pub fn plan(&self, slots: usize, tokens: usize, recent: usize) -> CachePlan {
        let recent = recent.max(self.plan.eviction.map_or(0, |eviction| eviction.recent()));
        CachePlan { slots, tokens, recent, ..self.plan }
    }
}

/// What a cache of heads of `head_dim` channels does where nobody says: the preset `balanced`, with as many channels in every
/// head where the model is not `calibrated`, with values in int4 where they cannot be turned, and with keys and values in f16
/// on devices where heads have an odd number of channels, for which there are no kernels.
#[must_use]
pub fn default(head_dim: usize, calibrated: bool, device: Device) -> Policy {
    let mut policy = Policy::BALANCED;
    if !head_dim.is_power_of_two() {
        policy.values = Store::Int4;
    }
    if !calibrated {
        policy.choice = Choice::Top { lambda: policy.lambda().unwrap_or(Lambda::WHOLE) };
    }
    if device != Device::Ndarray && !head_dim.is_multiple_of(2) {
        (policy.keys, policy.values) = (Store::F16, Store::F16);
    }
    policy
}

/// By what tokens are evicted one by one.
fn eviction(tokens: Tokens) -> Option<Eviction> {
    match tokens {
        Tokens::All | Tokens::Window { .. } => None,
        Tokens::Snapkv { capacity, window, kernel, pool } => {
            let (capacity, window, kernel) = (capacity as usize, window as usize, kernel as usize);
            Some(Eviction::SnapKv(SnapKv { capacity, window, kernel, pool }))
        }
        Tokens::H2o { capacity, recent } => {
            Some(Eviction::H2o(H2o { capacity: capacity as usize, recent: recent as usize }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Architecture, weights::fixture};
    use thinkey_core::{Head, HeadLayout, StorageKind};

    #[test]
    fn layers_keep_what_the_table_says() {
        let config = fixture::config(Architecture::Llama);
        let design = |line: &str| CacheDesign::new(line.parse().unwrap(), &config, None);
        let kept = |line| {
            let design = design(line).unwrap();
            (0..4).map(|at| design.kept(at / 2, at % 2)).collect::<Vec<_>>()
        };
        assert_eq!(kept("choice=layers(.25,.5)"), [12, 12, 8, 8]);
        assert_eq!(kept("choice=layers(2*.5)"), kept("choice=top(.5)"));
        // Two copies of each KV head.
        let copies = design("choice=layers(.25,.5),heads=query").unwrap();
        assert!((0..8).map(|at| copies.kept(at / 4, at % 4)).eq([12, 12, 12, 12, 8, 8, 8, 8]));
        for (line, given) in [("choice=layers(.5)", 1), ("choice=layers(3*.5)", 3)] {
            assert_eq!(design(line), Err(DesignError::Layers { given, layers: 2 }));
        }
        let error = design("choice=layers(.5)").unwrap_err().to_string();
        assert_eq!(
            error,
            "choice=layers has a λ for 1 layers, and the model has 2; neighbours of one λ are written as 2*.5"
        );
    }

    #[test]
    fn the_default_is_stored_with_heads_of_any_number_of_channels() {
        for head_dim in [48_u16, 64, 80, 96, 128] {
            let policy = default(head_dim.into(), true, Device::Ndarray);
            assert_eq!(policy.check(), Ok(()));
            let [keys, values] = [policy.keys, policy.values].map(|store| StorageKind::try_from(store).unwrap());
            let layout = HeadLayout {
                head_dim,
                kept_values: head_dim,
                keys,
                values,
                ..HeadLayout::of::<Head<48, 500>>(32, 1, keys, keys)
            };
            assert_eq!(layout.check(), Ok(()), "{head_dim}");
            // Values turn wherever they can.
            assert_eq!(values.turns(), matches!(head_dim, 64 | 128), "{head_dim}");
        }
    }
}
