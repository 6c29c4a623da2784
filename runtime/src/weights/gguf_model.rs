//! What the metadata of a GGUF file says about its model and its tokenizer.

use super::{
    Role,
    gguf::{Gguf, GgufError},
    metadata::{Metadata, MetadataError},
    tokenizer::GgufTokenizer,
};
use crate::model::config::{Architecture, ConfigError, ModelConfig, Rope, RopeScaling, implied_head_dim};

/// Llama 3's table of divisors of the rotary frequencies, one a pair of channels.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

/// Numbers under the architecture's prefix that change the result unless they are zero: variants of the families here
/// that other engines implement under the same architecture name.
const UNSUPPORTED: [&str; 11] = [
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window_pattern",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
];

/// The shape of the model in `gguf`.
pub(super) fn config(gguf: &Gguf) -> Result<ModelConfig, GgufError> {
    let meta = &gguf.metadata;
    let prefix = meta.need("general.architecture", Metadata::text)?;
    let architecture = Architecture::from_gguf(prefix)?;
    if let Some(count) = meta.unsigned("split.count")?.filter(|&count| count > 1) {
        return Err(GgufError::Split { count });
    }
    let key = |name: &str| format!("{prefix}.{name}");
    for name in UNSUPPORTED {
        let key = key(name);
        if meta.has(&key) && meta.f32(&key) != Ok(Some(0.0)) && meta.unsigned(&key) != Ok(Some(0)) {
            return Err(ConfigError::Feature { feature: key }.into());
        }
    }

    let width = meta.need(&key("embedding_length"), Metadata::count)?;
    let heads = meta.need(&key("attention.head_count"), Metadata::count)?;
    let head_dim = match meta.count(&key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None => implied_head_dim(width, heads)?,
    };
    let value_dim = meta.count(&key("attention.value_length"))?.unwrap_or(head_dim);
    if value_dim != head_dim {
        return Err(
            ConfigError::Feature { feature: format!("a value head of {value_dim} beside keys of {head_dim}") }.into()
        );
    }
    let rotated = meta.count(&key("rope.dimension_count"))?.unwrap_or(head_dim);
    if rotated != head_dim {
        return Err(ConfigError::PartialRotary { found: format!("{rotated} channels"), head_dim }.into());
    }
    let context = meta.need(&key("context_length"), Metadata::count)?;
    let embedding = Role::TokenEmbedding.gguf_name();
    let config = ModelConfig {
        architecture,
        name: meta.text("general.name")?.map(str::to_owned),
        layers: meta.need(&key("block_count"), Metadata::count)?,
        width,
        heads,
        kv_heads: meta.count(&key("attention.head_count_kv"))?.unwrap_or(heads),
        head_dim,
        feed_forward: meta.need(&key("feed_forward_length"), Metadata::count)?,
        vocab: match meta.count(&key("vocab_size"))? {
            Some(vocab) => vocab,
            None => gguf.tensors.need(&embedding)?.shape[0],
        },
        context,
        rms_eps: meta.need(&key("attention.layer_norm_rms_epsilon"), Metadata::f32)?,
        rope: rope(gguf, &key, architecture, head_dim)?,
        sliding_window: meta.count(&key("attention.sliding_window"))?.filter(|&window| window > 0 && window < context),
        qkv_bias: gguf.tensors.get("blk.0.attn_q.bias").is_some(),
        qk_norm: architecture == Architecture::Qwen3,
        tied_embeddings: gguf.tensors.get(&Role::Output.gguf_name()).is_none(),
    };
    config.validate()?;
    Ok(config)
}

fn rope(
    gguf: &Gguf,
    key: &dyn Fn(&str) -> String,
    architecture: Architecture,
    head_dim: usize,
) -> Result<Rope, GgufError> {
    let meta = &gguf.metadata;
    let theta = meta.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    // A factor without a type means linear, as llama.cpp reads it; `scale_linear` is its name in old files.
    let factor = match meta.f32(&key("rope.scaling.factor"))? {
        None => meta.f32(&key("rope.scale_linear"))?,
        factor => factor,
    };
    let scaling = match (meta.text(&key("rope.scaling.type"))?, factor) {
        (Some("none"), _) | (None | Some("linear"), None | Some(0.0)) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor },
        (Some(found), _) => return Err(ConfigError::Scaling { found: found.to_owned() }.into()),
    };
    let mut rope = Rope::new(theta, head_dim, scaling, architecture.gguf_pairing())?;
    if let Some(factors) = gguf.tensors.get(ROPE_FREQS) {
        factors.check(&[head_dim / 2])?;
        rope.divide(&factors.vector()?)?;
    }
    Ok(rope)
}

/// The tokenizer of a model with `vocab` tokens, copied out of the file.
pub(super) fn tokenizer(meta: &Metadata, vocab: usize) -> Result<GgufTokenizer, MetadataError> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let tokens = meta.need(TOKENS, Metadata::texts)?;
    let count = tokens.len();
    let value =
        |key: &str, found: String, expected: String| MetadataError::Value { key: key.to_owned(), found, expected };
    if count > vocab {
        let expected = format!("at most the {vocab} that the embedding has rows for");
        return Err(value(TOKENS, format!("a list of {count} tokens"), expected));
    }
    let one_a_token = |key: &str, len: Option<usize>| match len {
        Some(len) if len != count => {
            Err(value(key, format!("a list of {len} values"), format!("one for each of the {count} tokens")))
        }
        _ => Ok(()),
    };
    let scores = meta.f32s("tokenizer.ggml.scores")?;
    one_a_token("tokenizer.ggml.scores", scores.as_ref().map(Vec::len))?;
    let token_types = meta.i32s("tokenizer.ggml.token_type")?;
    one_a_token("tokenizer.ggml.token_type", token_types.as_ref().map(Vec::len))?;
    let id = |name: &str| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match meta.u32(&key)? {
            Some(id) if id as usize >= count => {
                Err(value(&key, id.to_string(), format!("the number of one of the {count} tokens")))
            }
            id => Ok(id),
        }
    };
    Ok(GgufTokenizer {
        model: meta.need("tokenizer.ggml.model", Metadata::text)?.to_owned(),
        pre: meta.text("tokenizer.ggml.pre")?.map(str::to_owned),
        scores,
        token_types,
        merges: meta.texts("tokenizer.ggml.merges")?,
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        unknown: id("unknown")?,
        // Some converters write -1 for "none", and nothing here pads.
        padding: id("padding").unwrap_or(None),
        add_bos: meta.bool("tokenizer.ggml.add_bos_token")?,
        add_eos: meta.bool("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: meta.bool("tokenizer.ggml.add_space_prefix")?,
        chat_template: meta.text("tokenizer.chat_template")?.map(str::to_owned),
        tokens,
    })
}
