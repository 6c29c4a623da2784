//! Models of which there is no file, only a shape: enough to plan them.

use super::WeightBytes;
use crate::{
    model::{
        Architecture, ModelConfig,
        config::{ConfigError, Rope, RopeScaling},
        transformer::MATRICES,
    },
    weights::Role,
};
use serde::{Deserialize, Serialize};
use thinkey_kernels::{cpu::Cpu, format::WeightFormat};

/// The shape of a model and the format of its weights, as a file of a few lines tells them.
///
/// ```
/// use thinkey::plan::ModelShape;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let shape: ModelShape = serde_json::from_str(
///     r#"{"name": "Llama-3.1-8B", "family": "llama", "layers": 32, "width": 4096, "heads": 32, "kv_heads": 8,
///         "head_dim": 128, "feed_forward": 14336, "vocab": 128256, "context": 131072, "weights": "Q4_0"}"#,
/// )?;
/// let (config, weights) = shape.planned()?;
/// assert_eq!(config.group(), 4);
/// assert_eq!(weights.mapped, 4_517_937_152); // 8.03 billion weights of 4.5 bits
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// What the model is called.
    pub name: String,
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
    pub family: String,
    /// Transformer blocks.
    pub layers: usize,
    /// Channels of the residual stream.
    pub width: usize,
    /// Query heads a layer.
    pub heads: usize,
    /// Key and value heads a layer.
    pub kv_heads: usize,
    /// Channels a head.
    pub head_dim: usize,
    /// Channels inside the feed-forward block.
    pub feed_forward: usize,
    /// Tokens that exist.
    pub vocab: usize,
    /// Positions the model was trained for.
    pub context: usize,
    /// Newest positions that a query sees, where it does not see all.
    #[serde(default)]
    pub sliding_window: Option<usize>,
    /// Whether the output projection is the embedding matrix.
    #[serde(default)]
    pub tied_embeddings: bool,
    /// Format of the matrices, as `Q4_0`.
    pub weights: String,
}

/// Why there can be no such model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// Its numbers, or its family.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No weights are stored so.
    #[error("there is no weight format {found:?}; there are {}", WeightFormat::ALL.map(WeightFormat::name).join(", "))]
    Format {
        /// As the shape names it.
        found: String,
    },
    /// Rows are no whole number of blocks.
    #[error("rows of {cols} weights cannot be stored as {format}: its blocks are of {block}")]
    Rows {
        /// The format.
        format: &'static str,
        /// Weights of a row.
        cols: usize,
        /// Weights of a block.
        block: usize,
    },
}

impl ModelShape {
    /// What a checkpoint would say of the model, and the bytes of its weights.
    ///
    /// Positions and norms, which planning does not ask for, are those of the family's first models.
    ///
    /// # Errors
    /// [`ShapeError`] for the first thing that cannot be.
    pub fn planned(&self) -> Result<(ModelConfig, WeightBytes), ShapeError> {
        let architecture =
            Architecture::ALL.into_iter().find(|family| family.to_string() == self.family).ok_or_else(|| {
                let supported = Architecture::ALL.map(|family| family.to_string()).join(", ");
                ConfigError::Architecture { found: self.family.clone(), supported }
            })?;
        let config = ModelConfig {
            architecture,
            name: Some(self.name.clone()),
            layers: self.layers,
            width: self.width,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            feed_forward: self.feed_forward,
            vocab: self.vocab,
            context: self.context,
            rms_eps: 1e-5,
            rope: Rope::new(1e4, self.head_dim, RopeScaling::None, architecture.gguf_pairing())?,
            sliding_window: self.sliding_window,
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            tied_embeddings: self.tied_embeddings,
        };
        config.validate()?;
        let weights = self.bytes(&config)?;
        Ok((config, weights))
    }

    fn bytes(&self, config: &ModelConfig) -> Result<WeightBytes, ShapeError> {
        let format = WeightFormat::ALL
            .into_iter()
            .find(|format| format.name().eq_ignore_ascii_case(&self.weights))
            .ok_or_else(|| ShapeError::Format { found: self.weights.clone() })?;
        let matrix = |role: Role| match role.shape(config)[..] {
            [rows, cols] => match format.row_bytes(cols) {
                Some(row) => Ok(rows.saturating_mul(row)),
                None => Err(ShapeError::Rows { format: format.name(), cols, block: format.block_len() }),
            },
            _ => Ok(0),
        };
        let layer = MATRICES.iter().map(|&part| matrix(Role::Layer(0, part))).sum::<Result<usize, _>>()?;
        let table = matrix(Role::TokenEmbedding)?;
        let tables = if config.tied_embeddings { 1 } else { 2 };
        let vectors = Role::needed(config).filter_map(|role| match role.shape(config)[..] {
            [len] => Some((len * size_of::<f32>(), Cpu::tensor_bytes(len))),
            _ => None,
        });
        let (stored, converted) = vectors.fold((0, 0), |(all, own), (stored, bytes)| (all + stored, own + bytes));
        let mapped = layer.saturating_mul(config.layers).saturating_add(tables * table).saturating_add(stored);
        Ok(WeightBytes { mapped, converted, layer, table })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> ModelShape {
        ModelShape {
            name: "tiny".into(),
            family: "llama".into(),
            layers: 2,
            width: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            feed_forward: 96,
            vocab: 100,
            context: 256,
            sliding_window: None,
            tied_embeddings: false,
            weights: "Q8_0".into(),
        }
    }

    #[test]
    fn weights_are_counted_matrix_by_matrix() {
        let (config, bytes) = shape().planned().unwrap();
        let row = |cols: usize| cols / 32 * 34;
        let attention = (64 + 32 + 32) * row(64) + 64 * row(64);
        let layer = attention + 2 * 96 * row(64) + 64 * row(96);
        assert_eq!((bytes.layer, bytes.table), (layer, 100 * row(64)));
        assert_eq!(bytes.mapped, 2 * layer + 2 * bytes.table + 5 * 64 * 4);
        let tied = ModelShape { tied_embeddings: true, ..shape() }.planned().unwrap().1;
        assert_eq!(tied.mapped, bytes.mapped - bytes.table);
        assert_eq!(config.context, 256);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let refused = |shape: ModelShape| shape.planned().unwrap_err().to_string();
        assert!(refused(ModelShape { family: "gpt".into(), ..shape() }).contains("llama, mistral, qwen2, qwen3"));
        assert!(refused(ModelShape { weights: "Q9".into(), ..shape() }).contains("Q4_0"));
        assert!(refused(ModelShape { width: 65, ..shape() }).contains("65"));
        assert!(refused(ModelShape { kv_heads: 3, ..shape() }).contains("do not divide"));
        assert!(ModelShape { head_dim: 1 << 40, layers: usize::MAX, ..shape() }.planned().is_err());
    }
}
