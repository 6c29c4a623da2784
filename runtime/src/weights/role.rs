//! What a tensor is for, and what each kind of file calls it.

use crate::model::config::ModelConfig;

/// A weight by its place in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// `vocab` × `width`: one row a token.
    TokenEmbedding,
    /// `width`: scale of the last RMS norm.
    OutputNorm,
    /// `vocab` × `width`: logits from the last hidden state. The embedding matrix where embeddings are tied.
    Output,
    /// A weight of the layer of that index.
    Layer(usize, LayerRole),
}

/// A weight by its place in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerRole {
    /// `width`: scale of the RMS norm before attention.
    AttentionNorm,
    /// `heads·head_dim` × `width`.
    Query,
    /// `kv_heads·head_dim` × `width`.
    Key,
    /// `kv_heads·head_dim` × `width`.
    Value,
    /// `heads·head_dim`.
    QueryBias,
    /// `kv_heads·head_dim`.
    KeyBias,
    /// `kv_heads·head_dim`.
    ValueBias,
    /// `head_dim`: scale of the RMS norm over each query head.
    QueryNorm,
    /// `head_dim`: scale of the RMS norm over each key head.
    KeyNorm,
    /// `width` × `heads·head_dim`.
    AttentionOutput,
    /// `width`: scale of the RMS norm before the feed-forward block.
    FeedForwardNorm,
    /// `feed_forward` × `width`: the half that passes SiLU.
    Gate,
    /// `feed_forward` × `width`: the half that is multiplied.
    Up,
    /// `width` × `feed_forward`.
    Down,
}

impl LayerRole {
    const ALWAYS: [Self; 9] = [
        Self::AttentionNorm,
        Self::Query,
        Self::Key,
        Self::Value,
        Self::AttentionOutput,
        Self::FeedForwardNorm,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];
    const BIASES: [Self; 3] = [Self::QueryBias, Self::KeyBias, Self::ValueBias];
    const HEAD_NORMS: [Self; 2] = [Self::QueryNorm, Self::KeyNorm];

    fn gguf_name(self) -> &'static str {
        match self {
            Self::AttentionNorm => "attn_norm.weight",
            Self::Query => "attn_q.weight",
            Self::Key => "attn_k.weight",
            Self::Value => "attn_v.weight",
            Self::QueryBias => "attn_q.bias",
            Self::KeyBias => "attn_k.bias",
            Self::ValueBias => "attn_v.bias",
            Self::QueryNorm => "attn_q_norm.weight",
            Self::KeyNorm => "attn_k_norm.weight",
            Self::AttentionOutput => "attn_output.weight",
            Self::FeedForwardNorm => "ffn_norm.weight",
            Self::Gate => "ffn_gate.weight",
            Self::Up => "ffn_up.weight",
            Self::Down => "ffn_down.weight",
        }
    }

    fn hugging_face_name(self) -> &'static str {
        match self {
            Self::AttentionNorm => "input_layernorm.weight",
            Self::Query => "self_attn.q_proj.weight",
            Self::Key => "self_attn.k_proj.weight",
            Self::Value => "self_attn.v_proj.weight",
            Self::QueryBias => "self_attn.q_proj.bias",
            Self::KeyBias => "self_attn.k_proj.bias",
            Self::ValueBias => "self_attn.v_proj.bias",
            Self::QueryNorm => "self_attn.q_norm.weight",
            Self::KeyNorm => "self_attn.k_norm.weight",
            Self::AttentionOutput => "self_attn.o_proj.weight",
            Self::FeedForwardNorm => "post_attention_layernorm.weight",
            Self::Gate => "mlp.gate_proj.weight",
            Self::Up => "mlp.up_proj.weight",
            Self::Down => "mlp.down_proj.weight",
        }
    }
}

impl Role {
    /// Every weight that a model of this shape has, each once: the output projection only where it is a matrix of its
    /// own.
    pub fn needed(config: &ModelConfig) -> impl Iterator<Item = Self> {
        let output = (!config.tied_embeddings).then_some(Self::Output);
        let biases = if config.qkv_bias { &LayerRole::BIASES[..] } else { &[] };
        let norms = if config.qk_norm { &LayerRole::HEAD_NORMS[..] } else { &[] };
        let layer =
            move |at| LayerRole::ALWAYS.iter().chain(biases).chain(norms).map(move |&role| Self::Layer(at, role));
        [Self::TokenEmbedding, Self::OutputNorm].into_iter().chain(output).chain((0..config.layers).flat_map(layer))
    }

    /// Extents of the weight, outermost first: `[rows, cols]` of a matrix, `[len]` of a vector.
    #[must_use]
    pub fn shape(self, config: &ModelConfig) -> Vec<usize> {
        use LayerRole as L;
        let (width, query, kv) = (config.width, config.query_width(), config.kv_width());
        match self {
            Self::TokenEmbedding | Self::Output => vec![config.vocab, width],
            Self::OutputNorm | Self::Layer(_, L::AttentionNorm | L::FeedForwardNorm) => vec![width],
            Self::Layer(_, L::Query) => vec![query, width],
            Self::Layer(_, L::Key | L::Value) => vec![kv, width],
            Self::Layer(_, L::QueryBias) => vec![query],
            Self::Layer(_, L::KeyBias | L::ValueBias) => vec![kv],
            Self::Layer(_, L::QueryNorm | L::KeyNorm) => vec![config.head_dim],
            Self::Layer(_, L::AttentionOutput) => vec![width, query],
            Self::Layer(_, L::Gate | L::Up) => vec![config.feed_forward, width],
            Self::Layer(_, L::Down) => vec![width, config.feed_forward],
        }
    }

    /// What a GGUF file calls the weight.
    #[must_use]
    pub fn gguf_name(self) -> String {
        match self {
            Self::TokenEmbedding => "token_embd.weight".into(),
            Self::OutputNorm => "output_norm.weight".into(),
            Self::Output => "output.weight".into(),
            Self::Layer(layer, role) => format!("blk.{layer}.{}", role.gguf_name()),
        }
    }

    /// What a Hugging Face folder calls the weight.
    #[must_use]
    pub fn hugging_face_name(self) -> String {
        match self {
            Self::TokenEmbedding => "model.embed_tokens.weight".into(),
            Self::OutputNorm => "model.norm.weight".into(),
            Self::Output => "lm_head.weight".into(),
            Self::Layer(layer, role) => format!("model.layers.{layer}.{}", role.hugging_face_name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::config::Architecture, weights::fixture};
    use std::collections::BTreeSet;

    /// Names as they stand in published files of layer 1, biases of Qwen2 and head norms of Qwen3 last.
    const NAMES: [(&str, &str); 14] = [
        ("blk.1.attn_norm.weight", "model.layers.1.input_layernorm.weight"),
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight"),
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("blk.1.attn_output.weight", "model.layers.1.self_attn.o_proj.weight"),
        ("blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("blk.1.ffn_gate.weight", "model.layers.1.mlp.gate_proj.weight"),
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("blk.1.attn_q.bias", "model.layers.1.self_attn.q_proj.bias"),
        ("blk.1.attn_k.bias", "model.layers.1.self_attn.k_proj.bias"),
        ("blk.1.attn_v.bias", "model.layers.1.self_attn.v_proj.bias"),
        ("blk.1.attn_q_norm.weight", "model.layers.1.self_attn.q_norm.weight"),
        ("blk.1.attn_k_norm.weight", "model.layers.1.self_attn.k_norm.weight"),
    ];

    #[test]
    fn weights_are_called_as_in_published_files() {
        let outer = [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
        ];
        // Of the fixtures only Qwen3 ties its output.
        for (architecture, outer, parts) in [
            (Architecture::Llama, &outer[..], &[&NAMES[..9]][..]),
            (Architecture::Qwen2, &outer[..], &[&NAMES[..12]]),
            (Architecture::Qwen3, &outer[..2], &[&NAMES[..9], &NAMES[12..]]),
        ] {
            let expected: BTreeSet<_> = parts.iter().copied().flatten().chain(outer).copied().collect();
            let names: Vec<_> = Role::needed(&fixture::config(architecture))
                .filter(|role| !matches!(role, Role::Layer(0, _)))
                .map(|role| (role.gguf_name(), role.hugging_face_name()))
                .collect();
            assert_eq!(names.len(), expected.len());
            assert_eq!(
                names.iter().map(|(gguf, folder)| (gguf.as_str(), folder.as_str())).collect::<BTreeSet<_>>(),
                expected
            );
        }
    }
}
