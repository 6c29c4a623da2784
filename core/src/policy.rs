//! What a cache does, as one value: which tokens and channels are kept, by what score, how queries are corrected, and how
//! keys and values are stored.
//!
//! The slots of a [`Policy`] work in this order, each on what the one before has left: **evict** tokens → **score**
//! channels → **choose** how many and which → **correct** queries for those dropped → **quantise** what is stored. Token
//! eviction comes first, so that what is gone is not scored; correction comes before quantisation, from whole keys, so
//! that it does not learn rounding.
//!
//! A policy is written in one line, or as a table of a TOML or JSON file (λ and other shares in per mille there). The
//! line is a list of `slot=value`, separated by commas; a preset may come first, and every slot that is not named is the
//! preset's, or that of `full`. Spaces around items do not count.
//!
//! ```text
//! tokens      = all | window(sinks,window) | snapkv(capacity,window,kernel,avg|max) | h2o(capacity,recent)
//! score       = query | residual | sample(tokens) | sketch(rows) | l1 | l2 | random(seed)
//! choice      = whole | top(λ) | layers(λ,count*λ,…) | threshold(energy) | adaptive(λ,minimum) | calibrated(λ,multiple)
//!             | dynamic(least,most)
//! fix         = none | compensated | predictive | lowrank
//! thin-values = whole | query(λ) | l2(λ)
//! keys, values = f32 | f16 | bf16 | int8 | int4 | int3 | int2 | of keys: int4/2 | of values: turned4 | turned3 | turned2 | trellis2
//! heads       = kv | query
//! life        = prompt | turn | every(tokens)
//! lambda      = λ of the choice, as it is after the items before
//! ```
//!
//! ```
//! use thinkey_core::policy::{Choice, Policy, Store};
//! let policy: Policy = "balanced,lambda=.6,keys=int8".parse()?;
//! assert!(matches!(policy.choice, Choice::Calibrated { lambda, .. } if lambda.per_mille() == 600));
//! assert_eq!((policy.keys, policy.values), (Store::Int8, Store::Trellis2));
//! let policy: Policy = "tokens=snapkv(1024,32,7,avg), choice=top(.4), keys=int4, values=int2".parse()?;
//! assert_eq!(policy.to_string(), "tokens=snapkv(1024,32,7,avg),choice=top(.4),keys=int4,values=int2");
//! # Ok::<(), thinkey_core::policy::PolicyError>(())
//! ```

use crate::{
    Lambda, StorageKind,
    token::{h2o::H2o, snapkv::Pool, snapkv::SnapKv},
};
use core::fmt;
use serde::{Deserialize, Serialize};

mod layers;
mod text;

pub use layers::{LayerTable, MAX_RUNS, TableFull};

/// Which tokens are kept; see [`token`](crate::token).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Tokens {
    /// All.
    #[default]
    All,
    /// The first and the newest.
    Window {
        /// First tokens kept.
        sinks: u32,
        /// Newest tokens kept.
        window: u32,
    },
    /// Those that the last queries of the prompt vote for; see [`Eviction::SnapKv`](crate::token::Eviction::SnapKv).
    Snapkv {
        /// Most tokens kept of prompt and answer, in every head: first ones and newest ones included.
        capacity: u32,
        /// Newest tokens, whose queries vote. They stay whole.
        window: u32,
        /// Neighbours whose votes are pooled, odd.
        kernel: u32,
        /// How votes are pooled.
        pool: Pool,
    },
    /// Those that all queries so far pay the most attention, and the newest; see
    /// [`Eviction::H2o`](crate::token::Eviction::H2o).
    H2o {
        /// Most tokens kept of prompt and answer, in every head: first ones and newest ones included.
        capacity: u32,
        /// Newest tokens, always kept. They stay whole.
        recent: u32,
    },
}

/// What key channels are scored by; see [`channel`](crate::channel).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Score {
    /// Energy of the window's queries times that of all keys: ThinK.
    #[default]
    Query,
    /// As `query`, from at most so many keys, evenly spread.
    Sample {
        /// Keys that count.
        tokens: u32,
    },
    /// As `query`, from a random sketch of the keys.
    Sketch {
        /// Rows of the sketch, 1 to 64.
        rows: u32,
    },
    /// One channel after the other, by what regression on those before leaves; see [`residual`](crate::channel::residual).
    Residual,
    /// Mean absolute value of the keys.
    L1,
    /// Root mean square of the keys.
    L2,
    /// Random numbers: what any score has to beat.
    Random {
        /// What the numbers are drawn from.
        seed: u64,
    },
}

impl Score {
    const fn check(self) -> Result<(), PolicyError> {
        let (slot, good, why) = match self {
            Self::Sample { tokens } => ("score=sample", tokens > 0, "needs a token to score by"),
            Self::Sketch { rows } => ("score=sketch", 0 < rows && rows <= 64, "needs 1 to 64 rows"),
            Self::Query | Self::Residual | Self::L1 | Self::L2 | Self::Random { .. } => return Ok(()),
        };
        if good { Ok(()) } else { Err(PolicyError::Range { slot, why }) }
    }
}

/// How many channels a head keeps, and which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Choice {
    /// All channels.
    #[default]
    Whole,
    /// As many in every head: `D - floor(D·λ)`.
    Top {
        /// Share pruned.
        lambda: Lambda,
    },
    /// The fewest that hold a share of the head's score.
    Threshold {
        /// The share, in per mille, 1 to 1000.
        energy: u16,
    },
    /// One budget over all heads, spread by each prompt.
    Adaptive {
        /// Share pruned, on average.
        lambda: Lambda,
        /// Channels that every head keeps at least.
        minimum: u16,
    },
    /// One budget over all heads, spread once for the model.
    Calibrated {
        /// Share pruned, on average.
        lambda: Lambda,
        /// T is a multiple of it.
        multiple: u16,
    },
    /// As many in every head, by λ from free bytes, tokens and sequences.
    Dynamic {
        /// The least λ.
        least: Lambda,
        /// The most.
        most: Lambda,
    },
    /// As many in every head of a layer, by a table.
    Layers {
        /// λ of each layer.
        table: LayerTable,
    },
}

impl Choice {
    /// The λ, where it has one.
    #[must_use]
    pub const fn lambda(&self) -> Option<Lambda> {
        match *self {
            Self::Top { lambda } | Self::Adaptive { lambda, .. } | Self::Calibrated { lambda, .. } => Some(lambda),
            Self::Whole | Self::Threshold { .. } | Self::Dynamic { .. } | Self::Layers { .. } => None,
        }
    }
}

/// How logits are corrected for what the keys have lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fix {
    /// Not at all.
    #[default]
    None,
    /// Regression on the kept channels; see [`compensate`](crate::channel::compensate).
    Compensated,
    /// Keys are stored along their main directions instead; see [`lowrank`](crate::channel::lowrank).
    Lowrank,
    /// As compensated, and a stored channel also makes up for what rounding has taken from those before it; see
    /// [`predict`](crate::channel::predict).
    Predictive,
}

/// Which value channels are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ThinValues {
    /// All.
    #[default]
    Whole,
    /// Those that carry most of the window's attention output.
    Query {
        /// Share pruned.
        lambda: Lambda,
    },
    /// Those of largest energy.
    L2 {
        /// Share pruned.
        lambda: Lambda,
    },
}

/// How keys or values are to be stored. Every kind is a [`StorageKind`], by its `TryFrom`; the numbers of the two differ, as
/// kinds came to the wire format one after another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case")]
pub enum Store {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    #[default]
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit codes in groups of 32.
    Int8,
    /// 4-bit codes in groups of 32.
    Int4,
    /// 3-bit codes in groups of 32.
    Int3,
    /// 2-bit codes in groups of 32.
    Int2,
    /// Of values only: turned, 4-bit codes with one scale a token.
    Turned4,
    /// Of values only: turned, 3-bit codes with one scale a token.
    Turned3,
    /// Of values only: turned, 2-bit codes with one scale a token.
    Turned2,
    /// Of keys only: a quarter of the channels, those chosen first, in 4-bit codes, the others in 2-bit codes of a trellis.
    #[serde(rename = "int4/2")]
    Int4Int2,
    /// Of values only: turned, 2-bit codes of a trellis with one scale a token.
    Trellis2,
}

impl Store {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Int8,
        Self::Int4,
        Self::Int3,
        Self::Int2,
        Self::Turned4,
        Self::Turned3,
        Self::Turned2,
        Self::Int4Int2,
        Self::Trellis2,
    ];

    /// The name, as [`StorageKind::name`] has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int3 => "int3",
            Self::Int2 => "int2",
            Self::Turned4 => "turned4",
            Self::Turned3 => "turned3",
            Self::Turned2 => "turned2",
            Self::Int4Int2 => "int4/2",
            Self::Trellis2 => "trellis2",
        }
    }

    /// Whether it is for keys alone, and only for those that have an order.
    #[must_use]
    pub const fn mixed(self) -> bool {
        matches!(self, Self::Int4Int2)
    }

    /// Whether it is for values alone.
    #[must_use]
    pub const fn turns(self) -> bool {
        matches!(self, Self::Turned4 | Self::Turned3 | Self::Turned2 | Self::Trellis2)
    }
}

impl TryFrom<Store> for StorageKind {
    type Error = PolicyError;

    fn try_from(store: Store) -> Result<Self, PolicyError> {
        // By name, so that a kind that is added there is found here.
        let found = Self::ALL.into_iter().find(|kind| kind.name() == store.name());
        found.ok_or(PolicyError::Store { store })
    }
}

/// Whose masks: how many lists of channels (and of tokens) share a KV head's cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case")]
pub enum Heads {
    /// One for the KV head.
    #[default]
    Kv,
    /// One for each query head, as in the authors' code: up to G times the memory.
    Query,
}

/// How long a mask holds for tokens that are thinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Life {
    /// Chosen at the end of the first prompt, for good.
    #[default]
    Prompt,
    /// Chosen anew for each prompt that is appended.
    Turn,
    /// Chosen anew for every so many tokens.
    Every {
        /// Tokens between two choices.
        tokens: u32,
    },
}

/// What a cache does; the default is `full`, a whole cache in f16.
///
/// All combinations can be written down; [`check`](Self::check) says which make sense. Reading the one-line form checks,
/// reading a file does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Policy {
    /// Which tokens are kept.
    pub tokens: Tokens,
    /// What key channels are scored by.
    pub score: Score,
    /// How many key channels are kept.
    pub choice: Choice,
    /// How logits are corrected.
    pub fix: Fix,
    /// Which value channels are kept.
    pub thin_values: ThinValues,
    /// How keys are stored.
    pub keys: Store,
    /// How values are stored.
    pub values: Store,
    /// Whose masks.
    pub heads: Heads,
    /// How long a mask holds.
    pub life: Life,
}

const fn per_mille(x: u16) -> Lambda {
    match Lambda::from_per_mille(x) {
        Ok(lambda) => lambda,
        Err(_) => Lambda::WHOLE,
    }
}

impl Policy {
    /// The whole cache in f16.
    pub const FULL: Self = Self {
        tokens: Tokens::All,
        score: Score::Query,
        choice: Choice::Whole,
        fix: Fix::None,
        thin_values: ThinValues::Whole,
        keys: Store::F16,
        values: Store::F16,
        heads: Heads::Kv,
        life: Life::Prompt,
    };

    /// The default: six of ten channels, well chosen and corrected for, in four bits; values turned, in two by a
    /// trellis.
    pub const BALANCED: Self = Self {
        score: Score::Residual,
        choice: Choice::Calibrated { lambda: per_mille(400), multiple: 8 },
        fix: Fix::Compensated,
        keys: Store::Int4,
        values: Store::Trellis2,
        ..Self::FULL
    };

    const SMALL: Self = Self { choice: Choice::Calibrated { lambda: per_mille(600), multiple: 8 }, ..Self::BALANCED };

    /// The smallest, on the processor only: channels are told one after the other, three quarters of them in two bits.
    const TINY: Self = Self {
        choice: Choice::Calibrated { lambda: per_mille(620), multiple: 8 },
        fix: Fix::Predictive,
        keys: Store::Int4Int2,
        ..Self::BALANCED
    };

    /// The presets by name. Those from `quality` on are points on the frontier of quality against bytes, as measured on
    /// SmolLM2-135M: 32%, 17.6%, 14.5% and 11.9% of a whole f16 cache of 8,000 tokens, at divergences of 0.005, 0.018, 0.035 and
    /// 0.06 nats; `small` is the smallest that found every passkey that the whole cache finds. The last three turn values, which
    /// takes a head dimension that is a power of two.
    pub const PRESETS: [(&'static str, Self); 7] = [
        ("full", Self::FULL),
        ("think", Self { choice: Choice::Top { lambda: per_mille(500) }, ..Self::FULL }),
        ("think-official", Self { choice: Choice::Top { lambda: per_mille(400) }, heads: Heads::Query, ..Self::FULL }),
        ("quality", Self { keys: Store::Int4, values: Store::Int4, ..Self::FULL }),
        ("balanced", Self::BALANCED),
        ("small", Self::SMALL),
        ("tiny", Self::TINY),
    ];

    /// The preset of that name.
    #[must_use]
    pub fn preset(name: &str) -> Option<Self> {
        Self::PRESETS.iter().find(|(own, _)| *own == name).map(|&(_, policy)| policy)
    }

    /// λ, the share of key channels that is pruned: that of the choice, 0 where all are kept, `None` where each prompt
    /// decides or each layer has its own.
    #[must_use]
    pub const fn lambda(&self) -> Option<Lambda> {
        match self.choice {
            Choice::Whole => Some(Lambda::WHOLE),
            choice => choice.lambda(),
        }
    }

    /// The same policy at another λ: where that is 0, all channels are kept, once a KV head, and nothing is corrected; where
    /// all were kept, every head now keeps as many. Keys in `int4/2`, whose channels then have no order, become `int4`.
    ///
    /// # Errors
    /// [`PolicyError::Conflict`] where the choice has no λ.
    pub const fn with_lambda(mut self, lambda: Lambda) -> Result<Self, PolicyError> {
        if lambda.per_mille() == 0 {
            self.choice = Choice::Whole;
            self.score = Score::Query;
            self.fix = Fix::None;
            self.heads = Heads::Kv;
            self.life = Life::Prompt;
            if self.keys.mixed() {
                self.keys = Store::Int4;
            }
            return Ok(self);
        }
        self.choice = match self.choice {
            Choice::Whole | Choice::Top { .. } => Choice::Top { lambda },
            Choice::Adaptive { minimum, .. } => Choice::Adaptive { lambda, minimum },
            Choice::Calibrated { multiple, .. } => Choice::Calibrated { lambda, multiple },
            Choice::Threshold { .. } | Choice::Dynamic { .. } => {
                let why = "each prompt decides how much is pruned";
                return Err(PolicyError::Conflict { first: "lambda", second: "choice", why });
            }
            Choice::Layers { .. } => {
                let why = "each layer has its own";
                return Err(PolicyError::Conflict { first: "lambda", second: "choice=layers", why });
            }
        };
        Ok(self)
    }

    /// The first slot in which another policy is not the same.
    ///
    /// ```
    /// use thinkey_core::Policy;
    /// let other: Policy = "balanced,lambda=.5,keys=int8".parse()?;
    /// assert_eq!((Policy::BALANCED.difference(&other), other.difference(&other)), (Some("choice"), None));
    /// # Ok::<(), thinkey_core::policy::PolicyError>(())
    /// ```
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        // Taken apart, so that a slot that is added is not forgotten.
        let Self { tokens, score, choice, fix, thin_values, keys, values, heads, life } = other;
        let same = [
            ("tokens", self.tokens == *tokens),
            ("score", self.score == *score),
            ("choice", self.choice == *choice),
            ("fix", self.fix == *fix),
            ("thin-values", self.thin_values == *thin_values),
            ("keys", self.keys == *keys),
            ("values", self.values == *values),
            ("heads", self.heads == *heads),
            ("life", self.life == *life),
        ];
        same.into_iter().find(|(_, same)| !same).map(|(slot, _)| slot)
    }

    /// Checks every number, and the slots against each other.
    ///
    /// # Errors
    /// [`PolicyError::Range`] with the slot and why, [`PolicyError::Conflict`] with both slots and why.
    pub fn check(&self) -> Result<(), PolicyError> {
        self.check_numbers()?;
        let conflict = |first, second, why| Err(PolicyError::Conflict { first, second, why });
        let fixed = self.fix != Fix::None;
        if fixed && self.choice == Choice::Whole {
            return conflict("choice=whole", "fix", "every channel is kept, so there is nothing to correct");
        }
        let (residual, predictive) = (self.score == Score::Residual, self.fix == Fix::Predictive);
        if residual && !matches!(self.fix, Fix::Compensated | Fix::Predictive) {
            return conflict(
                "score=residual",
                "fix",
                "it counts on the correction; give fix=compensated or predictive",
            );
        }
        if predictive && !residual {
            return conflict(
                "fix=predictive",
                "score",
                "channels are told by those chosen before; give score=residual",
            );
        }
        if predictive && matches!(self.keys, Store::F32 | Store::F16 | Store::Bf16) {
            return conflict("fix=predictive", "keys", "it makes up for rounding to codes; give fix=compensated");
        }
        if self.keys.mixed() && !predictive {
            return conflict(
                "keys=int4/2",
                "fix",
                "only fix=predictive stores the channels in the order of their choice",
            );
        }
        if self.values.mixed() {
            return conflict("values", "int4/2", "a value has no order of channels; it is for keys");
        }
        if self.keys.turns() {
            return conflict(
                "keys",
                "turned codes",
                "keys are chosen and stored by channel; turned codes are for values",
            );
        }
        if self.values.turns() && self.thin_values != ThinValues::Whole {
            return conflict("values", "thin-values", "turned values have no channels to leave out");
        }
        if fixed && self.heads == Heads::Query {
            return conflict("heads=query", "fix", "mean and covariance belong to a KV head, whose mask must be one");
        }
        let spread =
            matches!(self.choice, Choice::Adaptive { .. } | Choice::Calibrated { .. } | Choice::Threshold { .. });
        if self.heads == Heads::Query && spread {
            return conflict("heads=query", "choice", "channels are shared out between KV heads");
        }
        if self.fix == Fix::Lowrank && matches!(self.choice, Choice::Threshold { .. }) {
            return conflict(
                "choice=threshold",
                "fix=lowrank",
                "it counts channels, and low-rank keys have directions",
            );
        }
        if matches!(self.tokens, Tokens::Snapkv { .. } | Tokens::H2o { .. }) {
            if self.life != Life::Prompt {
                return conflict("tokens", "life", "tokens that take the places of others are of the masks of these");
            }
            if predictive {
                return conflict(
                    "tokens",
                    "fix=predictive",
                    "tokens are evicted one by one, and thinned keys are predicted in blocks",
                );
            }
            if self.fix == Fix::Lowrank {
                return conflict(
                    "tokens",
                    "fix=lowrank",
                    "tokens are evicted one by one, and thinned keys are projected in blocks",
                );
            }
            if matches!(self.score, Score::Sketch { .. }) {
                return conflict("tokens", "score=sketch", "a sketch leaves no token out");
            }
        }
        if self.life != Life::Prompt && self.choice == Choice::Whole {
            return conflict("choice=whole", "life", "without a choice of channels there is no mask to renew");
        }
        if self.life != Life::Prompt && fixed {
            return conflict("life", "fix", "a correction is learnt from whole keys, which are gone after the prompt");
        }
        if self.life != Life::Prompt && matches!(self.choice, Choice::Adaptive { .. } | Choice::Threshold { .. }) {
            return conflict("life", "choice", "how many channels a stored block has cannot change with the mask");
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), PolicyError> {
        let range = |slot, good: bool, why| if good { Ok(()) } else { Err(PolicyError::Range { slot, why }) };
        match self.tokens {
            Tokens::All => {}
            Tokens::Window { sinks, window } => {
                range("tokens=window", window > 0 || sinks > 0, "keeps no token")?;
                range("tokens=window", window > 0, "the newest token cannot be evicted before it is read")?;
            }
            Tokens::Snapkv { capacity, window, kernel, pool } => {
                let (capacity, window, kernel) = (capacity as usize, window as usize, kernel as usize);
                let good = SnapKv { capacity, window, kernel, pool }.check().is_ok();
                range("tokens=snapkv", good, "needs a window from 1 to the capacity, and an odd kernel")?;
            }
            Tokens::H2o { capacity, recent } => {
                let good = H2o { capacity: capacity as usize, recent: recent as usize }.check().is_ok();
                range("tokens=h2o", good, "needs a capacity above 0, and no more recent tokens than that")?;
            }
        }
        self.score.check()?;
        match self.choice {
            Choice::Threshold { energy } => {
                range("choice=threshold", (1..=1000).contains(&energy), "needs an energy above 0 and at most 1")?;
            }
            Choice::Adaptive { minimum, .. } => {
                range("choice=adaptive", minimum > 0, "every head keeps a channel at least")?;
            }
            Choice::Calibrated { multiple, .. } => {
                range("choice=calibrated", multiple > 0, "T cannot be a multiple of 0")?;
            }
            Choice::Dynamic { least, most } => {
                range("choice=dynamic", least <= most, "the least λ is above the most")?;
            }
            Choice::Layers { table } => range("choice=layers", table.layers() > 0, "has a λ for no layer")?,
            Choice::Whole | Choice::Top { .. } => {}
        }
        let every = !matches!(self.life, Life::Every { tokens: 0 });
        range("life=every", every, "needs a token between two choices")
    }
}

/// Why a policy cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum PolicyError {
    /// The one-line form cannot be read.
    Syntax {
        /// The byte from which on it cannot.
        at: usize,
        /// What could stand there.
        expected: &'static str,
    },
    /// A number of a slot is out of range.
    Range {
        /// The slot and its value.
        slot: &'static str,
        /// What is asked of it.
        why: &'static str,
    },
    /// Two slots contradict each other.
    Conflict {
        /// One.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// Why.
        why: &'static str,
    },
    /// This build does not store that kind.
    Store {
        /// The kind.
        store: Store,
    },
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Syntax { at, expected } => write!(f, "at byte {at} of the policy: expected {expected}"),
            Self::Range { slot, why } => write!(f, "{slot}: {why}"),
            Self::Conflict { first, second, why } => write!(f, "{first} does not go with {second}: {why}"),
            Self::Store { store } => write!(f, "this build does not store {}", store.name()),
        }
    }
}

impl core::error::Error for PolicyError {}
