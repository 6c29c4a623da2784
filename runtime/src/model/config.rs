//! What a model file says about the shape of its model.

use std::{f32::consts::TAU, fmt, ops::RangeInclusive};
use thinkey_core::{MAX_GROUP, MAX_HEAD_DIM};

/// Most KV heads a layer may have.
const MAX_KV_HEADS: usize = 64;

/// The families of models that run here. They share one block: RMS norm, grouped-query attention with rotary positions,
/// SwiGLU; they differ in biases, query/key norms and windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM, SmolLM2, TinyLlama and whatever else was trained in that shape.
    Llama,
    /// Mistral: Llama with a sliding window. Its GGUF files call themselves `llama`.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: RMS norms on the heads of query and key.
    Qwen3,
}

impl Architecture {
    /// Every family.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The family by the name of its Hugging Face class (`LlamaForCausalLM`).
    ///
    /// # Errors
    /// [`ConfigError::Architecture`] for any other class.
    pub fn from_class(class: &str) -> Result<Self, ConfigError> {
        Self::ALL.into_iter().find(|family| family.class() == class).ok_or_else(|| {
            let supported = Self::ALL.map(Self::class).join(", ");
            ConfigError::Architecture { found: class.to_owned(), supported }
        })
    }

    /// The family by GGUF's `general.architecture`.
    ///
    /// # Errors
    /// [`ConfigError::Architecture`] for any other name.
    pub fn from_gguf(name: &str) -> Result<Self, ConfigError> {
        const NAMES: [Architecture; 3] = [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3];
        NAMES.into_iter().find(|family| family.gguf_name() == name).ok_or_else(|| {
            let supported = NAMES.map(Self::gguf_name).join(", ");
            ConfigError::Architecture { found: name.to_owned(), supported }
        })
    }

    /// Name of the Hugging Face class.
    #[must_use]
    pub const fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// GGUF's `general.architecture`, which is also the prefix of the metadata keys.
    #[must_use]
    pub const fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// How GGUF stores the rotary channels of query and key: its converter reorders those of Llama.
    #[must_use]
    pub const fn gguf_pairing(self) -> Pairing {
        match self {
            Self::Llama | Self::Mistral => Pairing::Interleaved,
            Self::Qwen2 | Self::Qwen3 => Pairing::Halves,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        })
    }
}

/// Which two channels of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairing {
    /// Channels `2i` and `2i + 1`.
    Interleaved,
    /// Channels `i` and `i + head_dim / 2`.
    Halves,
}

/// Rotary position embedding: pair `i` of a head at position `p` turns by `p * inv_freq[i]` radians.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `head_dim / 2` angular frequencies in radians a position, with all scaling applied.
    pub inv_freq: Vec<f32>,
    /// Which channels make a pair.
    pub pairing: Pairing,
}

/// How the frequencies were stretched for contexts longer than those first trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3: long waves divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long waves.
        factor: f32,
        /// Waves longer than `original_context / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Waves shorter than `original_context / high_freq_factor` are short.
        high_freq_factor: f32,
        /// Positions of the context first trained on.
        original_context: f32,
    },
}

impl RopeScaling {
    /// Names of what is supported, as `config.json` spells them.
    pub const SUPPORTED: &str = "default, linear, llama3";
}

impl Rope {
    /// Frequencies `theta^(-2i / head_dim)`, scaled.
    ///
    /// Every step is rounded to f32 in the order in which Hugging Face's `modeling_rope_utils` does it, because an
    /// error of one unit in the last place is a quarter of a milliradian after 4,096 positions of the fastest pairs,
    /// and the weights were trained with theirs. Only the power itself goes through f64, which gives the correctly
    /// rounded f32 on every platform.
    ///
    /// # Errors
    /// [`ConfigError`] where `head_dim` is odd or out of range, or `theta` or a factor is not positive.
    pub fn new(theta: f32, head_dim: usize, scaling: RopeScaling, pairing: Pairing) -> Result<Self, ConfigError> {
        check_head_dim(head_dim)?;
        positive("rope theta", theta)?;
        let base = (0..head_dim / 2).map(|pair| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            1.0 / f64::from(theta).powf(f64::from(exponent)) as f32
        });
        let inv_freq = match scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => {
                positive("rope scaling factor", factor)?;
                base.map(|freq| freq / factor).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("rope scaling factor", factor)?;
                positive("rope low_freq_factor", low_freq_factor)?;
                positive("rope high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor)?;
                positive("rope original_max_position_embeddings", original_context)?;
                let (long, short) = (original_context / low_freq_factor, original_context / high_freq_factor);
                base.map(|freq| {
                    let wave = freq.recip() * TAU;
                    if wave > long {
                        freq / factor
                    } else if wave < short {
                        freq
                    } else {
                        let ramp =
                            (wave.recip() * original_context - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - ramp) * freq / factor + ramp * freq
                    }
                })
                .collect()
            }
        };
        Ok(Self { inv_freq, pairing })
    }

    /// Divides each frequency by its factor: GGUF's `rope_freqs.weight`, which holds Llama 3's scaling as a table.
    ///
    /// # Errors
    /// [`ConfigError::NotPositive`] for a factor that is none.
    ///
    /// # Panics
    /// Where `factors` has another length than `inv_freq`.
    pub fn divide(&mut self, factors: &[f32]) -> Result<(), ConfigError> {
        assert_eq!(factors.len(), self.inv_freq.len(), "one factor a frequency");
        for (freq, &factor) in self.inv_freq.iter_mut().zip(factors) {
            positive("rope_freqs.weight", factor)?;
            *freq /= factor;
        }
        Ok(())
    }
}

/// The shape of a model: everything but its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// What the file calls the model.
    pub name: Option<String>,
    /// Transformer blocks.
    pub layers: usize,
    /// Channels of the residual stream (hidden size).
    pub width: usize,
    /// Query heads a layer.
    pub heads: usize,
    /// Key and value heads a layer.
    pub kv_heads: usize,
    /// Channels a head.
    pub head_dim: usize,
    /// Channels inside the feed-forward block.
    pub feed_forward: usize,
    /// Rows of the embedding: tokens that exist.
    pub vocab: usize,
    /// Positions the model was trained for.
    pub context: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Newest positions that a query sees, its own included; `None` where it sees them all, which is also what a
    /// window of at least [`context`](Self::context) means.
    pub sliding_window: Option<usize>,
    /// Query, key and value projections add a bias.
    pub qkv_bias: bool,
    /// Heads of query and key pass an RMS norm before they are rotated.
    pub qk_norm: bool,
    /// The output projection is the embedding matrix.
    pub tied_embeddings: bool,
}

impl ModelConfig {
    /// Query heads that share a KV head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Channels of all query heads: rows of the query projection.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of all KV heads: rows of the key and of the value projection.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Whether the numbers are those of a model that can run.
    ///
    /// The upper limits lie well above any model of these families; they keep products far from overflow.
    ///
    /// # Errors
    /// [`ConfigError`] for the first number that is not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_head_dim(self.head_dim)?;
        for (field, value, limits) in [
            ("number of layers", self.layers, 1..=1024),
            ("width", self.width, 1..=1 << 16),
            ("number of KV heads", self.kv_heads, 1..=MAX_KV_HEADS),
            ("number of heads", self.heads, 1..=MAX_KV_HEADS * MAX_GROUP),
            ("feed-forward width", self.feed_forward, 1..=1 << 20),
            ("vocabulary", self.vocab, 1..=1 << 20),
            ("context", self.context, 1..=1 << 24),
            ("sliding window", self.sliding_window.unwrap_or(1), 1..=1 << 24),
        ] {
            within(field, value, limits)?;
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ConfigError::Grouping { heads: self.heads, kv_heads: self.kv_heads });
        }
        within("number of query heads for each KV head", self.group(), 1..=MAX_GROUP)?;
        positive("RMS epsilon", self.rms_eps)?;
        within("number of rotary frequencies", self.rope.inv_freq.len(), self.head_dim / 2..=self.head_dim / 2)?;
        self.rope.inv_freq.iter().try_for_each(|&freq| positive("rotary frequency", freq))
    }
}

/// Why a model cannot run here, by what its file says about its shape.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A family that is not ours.
    #[error("architecture {found:?} is not supported; supported are {supported}")]
    Architecture {
        /// As the file names it.
        found: String,
        /// Names of those supported, in the vocabulary of the same kind of file.
        supported: String,
    },
    /// A RoPE scaling that is not ours.
    #[error("RoPE scaling {found:?} is not supported; supported are {}", RopeScaling::SUPPORTED)]
    Scaling {
        /// As the file names it.
        found: String,
    },
    /// Only some channels of a head are rotated.
    #[error("partial rotary embedding ({found}) is not supported; all {head_dim} channels of a head must be rotated")]
    PartialRotary {
        /// What the file says of it.
        found: String,
        /// Channels a head.
        head_dim: usize,
    },
    /// Something else that changes the result and is not implemented.
    #[error("{feature} is not supported; it would change what the model computes")]
    Feature {
        /// The setting and its value, as the file has them.
        feature: String,
    },
    /// A number out of its limits.
    #[error("{field} is {value}; it must be from {} to {}", limits.start(), limits.end())]
    Range {
        /// What the number is.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What is allowed.
        limits: RangeInclusive<usize>,
    },
    /// A number that must be finite and above zero.
    #[error("{field} is {value}; it must be above zero and finite")]
    NotPositive {
        /// What the number is.
        field: &'static str,
        /// Its value.
        value: f32,
    },
    /// An odd number of channels cannot be rotated in pairs.
    #[error("head_dim is {head_dim}; it must be even")]
    OddHead {
        /// Channels a head.
        head_dim: usize,
    },
    /// Query heads do not divide among KV heads.
    #[error("{heads} query heads do not divide among {kv_heads} KV heads")]
    Grouping {
        /// Query heads.
        heads: usize,
        /// KV heads.
        kv_heads: usize,
    },
    /// The head size is not given and does not follow.
    #[error("the file gives no head_dim, and a width of {width} does not divide into {heads} heads")]
    HeadDim {
        /// Channels of the residual stream.
        width: usize,
        /// Query heads.
        heads: usize,
    },
}

/// Channels a head of a file that does not give them.
pub(crate) fn implied_head_dim(width: usize, heads: usize) -> Result<usize, ConfigError> {
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(ConfigError::HeadDim { width, heads });
    }
    Ok(width / heads)
}

fn check_head_dim(head_dim: usize) -> Result<(), ConfigError> {
    within("head_dim", head_dim, 2..=MAX_HEAD_DIM)?;
    if head_dim.is_multiple_of(2) { Ok(()) } else { Err(ConfigError::OddHead { head_dim }) }
}

fn within(field: &'static str, value: usize, limits: RangeInclusive<usize>) -> Result<(), ConfigError> {
    if limits.contains(&value) { Ok(()) } else { Err(ConfigError::Range { field, value, limits }) }
}

fn positive(field: &'static str, value: f32) -> Result<(), ConfigError> {
    if value > 0.0 && value.is_finite() { Ok(()) } else { Err(ConfigError::NotPositive { field, value }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            name: None,
            layers: 30,
            width: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            feed_forward: 1536,
            vocab: 49152,
            context: 8192,
            rms_eps: 1e-5,
            rope: Rope::new(1e5, 64, RopeScaling::None, Pairing::Halves).unwrap(),
            sliding_window: None,
            qkv_bias: false,
            qk_norm: false,
            tied_embeddings: true,
        }
    }

    /// `expected` holds (pair, frequency) from the formula of `modeling_rope_utils._compute_llama3_parameters`,
    /// evaluated in double precision by Python.
    fn assert_frequencies(rope: &Rope, expected: &[(usize, f64)]) {
        for &(pair, freq) in expected {
            let found = f64::from(rope.inv_freq[pair]);
            assert!((found / freq - 1.0).abs() < 5e-7, "pair {pair}: {found:e} is not {freq:e}");
        }
    }

    #[test]
    fn plain_frequencies_are_powers_of_theta() {
        let rope = config().rope;
        assert_eq!((rope.inv_freq.len(), rope.inv_freq[0]), (32, 1.0));
        // 1e5^(-1/2) and 1e5^(-31/32)
        assert_frequencies(&rope, &[(16, 3.162_277_660e-3), (31, 1.433_012_570e-5)]);
        let linear = Rope::new(1e5, 64, RopeScaling::Linear { factor: 4.0 }, Pairing::Halves).unwrap();
        assert!(rope.inv_freq.iter().zip(&linear.inv_freq).all(|(plain, scaled)| plain / 4.0 == *scaled));
    }

    #[test]
    fn llama3_scaling_agrees_with_the_published_formula() {
        let llama3 = |factor| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        // Llama-3.2-1B: short waves up to pair 14, the ramp in 15 to 17, long waves from 18.
        let rope = Rope::new(5e5, 64, llama3(32.0), Pairing::Halves).unwrap();
        assert_frequencies(
            &rope,
            &[
                (0, 1.0),
                (1, 6.636_012_377e-1),
                (13, 4.839_421_346e-3),
                (14, 3.211_445_995e-3),
                (15, 1.290_547_928e-3),
                (16, 4.295_567_966e-4),
                (17, 9.708_287_803e-5),
                (18, 1.946_163_818e-5),
                (31, 9.418_306_725e-8),
            ],
        );
        // Llama-3.1-8B.
        let rope = Rope::new(5e5, 128, llama3(8.0), Pairing::Halves).unwrap();
        assert_frequencies(
            &rope,
            &[
                (28, 3.211_445_995e-3),
                (29, 2.166_570_764e-3),
                (31, 8.567_514_129e-4),
                (34, 1.785_078_128e-4),
                (35, 9.556_212_354e-5),
                (63, 3.068_925_989e-7),
            ],
        );
    }

    #[test]
    fn a_table_of_divisors_equals_the_scaling_it_was_made_from() {
        let scaling =
            RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        let scaled = Rope::new(5e5, 64, scaling, Pairing::Interleaved).unwrap();
        let mut divided = Rope::new(5e5, 64, RopeScaling::None, Pairing::Interleaved).unwrap();
        let factors: Vec<f32> = divided.inv_freq.iter().zip(&scaled.inv_freq).map(|(a, b)| a / b).collect();
        divided.divide(&factors).unwrap();
        let expected: Vec<_> = scaled.inv_freq.iter().map(|&freq| f64::from(freq)).enumerate().collect();
        assert_frequencies(&divided, &expected);
        assert!(matches!(divided.divide(&[0.0; 32]), Err(ConfigError::NotPositive { value: 0.0, .. })));
    }

    #[test]
    fn validation_names_what_is_wrong() {
        assert_eq!(config().validate(), Ok(()));
        type Spoil = fn(&mut ModelConfig);
        let cases: [(Spoil, &str); 10] = [
            (|c| c.layers = 0, "number of layers is 0; it must be from 1 to 1024"),
            (|c| c.head_dim = 63, "head_dim is 63; it must be even"),
            (|c| c.head_dim = 512, "head_dim is 512; it must be from 2 to 256"),
            (|c| c.kv_heads = 2, "9 query heads do not divide among 2 KV heads"),
            (|c| c.kv_heads = 65, "number of KV heads is 65; it must be from 1 to 64"),
            (
                |c| (c.heads, c.kv_heads) = (33, 1),
                "number of query heads for each KV head is 33; it must be from 1 to 32",
            ),
            (|c| c.vocab = usize::MAX, &format!("vocabulary is {}; it must be from 1 to 1048576", usize::MAX)),
            (|c| c.rms_eps = f32::NAN, "RMS epsilon is NaN; it must be above zero and finite"),
            (|c| c.sliding_window = Some(0), "sliding window is 0; it must be from 1 to 16777216"),
            (|c| c.head_dim = 32, "number of rotary frequencies is 32; it must be from 16 to 16"),
        ];
        for (spoil, message) in cases {
            let mut config = config();
            spoil(&mut config);
            assert_eq!(config.validate().unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn names_lead_back_to_their_family() {
        for family in Architecture::ALL {
            assert_eq!(Architecture::from_class(family.class()), Ok(family));
        }
        assert_eq!(Architecture::from_gguf("qwen3"), Ok(Architecture::Qwen3));
        assert_eq!(
            Architecture::from_gguf("gemma3").unwrap_err().to_string(),
            "architecture \"gemma3\" is not supported; supported are llama, qwen2, qwen3"
        );
        assert!(Architecture::from_class("GPT2LMHeadModel").unwrap_err().to_string().contains("Qwen3ForCausalLM"));
    }
}
