//! Tiny models for the tests of this module: the same weights as a GGUF file and as a Hugging Face folder.

use super::{GgufWriter, Role};
use crate::model::config::{Architecture, ModelConfig, Pairing, Rope, RopeScaling};
use ::safetensors::{Dtype, tensor::TensorView};
use bytes::Bytes;
use serde_json::{Value, json};
use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
};
use thinkey_kernels::format::{Matrix, WeightFormat};

/// Base of the rotary frequencies of every fixture.
pub const THETA: f32 = 10_000.0;

/// Shape of a tiny model as a Hugging Face folder has it.
pub fn config(architecture: Architecture) -> ModelConfig {
    ModelConfig {
        architecture,
        name: None,
        layers: 2,
        width: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        feed_forward: 96,
        vocab: 40,
        context: 128,
        rms_eps: 1e-5,
        rope: Rope::new(THETA, 16, RopeScaling::None, Pairing::Halves).unwrap(),
        sliding_window: (architecture == Architecture::Mistral).then_some(48),
        qkv_bias: architecture == Architecture::Qwen2,
        qk_norm: architecture == Architecture::Qwen3,
        tied_embeddings: architecture == Architecture::Qwen3,
    }
}

/// The values of a weight, different for every role.
pub fn values(config: &ModelConfig, role: Role) -> Vec<f32> {
    let value = |at: usize| {
        let mut hasher = DefaultHasher::new();
        (role, at).hash(&mut hasher);
        (hasher.finish() % 2048) as f32 / 1024.0 - 1.0
    };
    (0..role.shape(config).iter().product()).map(value).collect()
}

/// Little-endian bytes.
pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The model as a GGUF file in F32, with a tokenizer.
pub fn gguf(config: &ModelConfig) -> GgufWriter {
    let mut file = GgufWriter::for_model(config, THETA);
    for role in Role::needed(config) {
        let values = values(config, role);
        match role.shape(config)[..] {
            [rows, cols] => {
                let matrix = Matrix::new(WeightFormat::F32, rows, cols, Bytes::from(bytes(&values))).unwrap();
                file.matrix(role.gguf_name(), &matrix)
            }
            _ => file.vector(role.gguf_name(), &values),
        };
    }
    let tokens: Vec<String> = (0..config.vocab).map(|id| format!("<{id}>")).collect();
    file.set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", vec![1; config.vocab])
        .set("tokenizer.ggml.merges", vec!["a b".to_owned()])
        .set("tokenizer.ggml.eos_token_id", 2_u32)
        .set("tokenizer.ggml.add_bos_token", false);
    file
}

/// The model's `config.json`.
pub fn json(config: &ModelConfig) -> Value {
    json!({
        "architectures": [config.architecture.class()],
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": THETA,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tied_embeddings,
    })
}

/// The tensors of `roles` as a safetensors file in F32.
pub fn safetensors(config: &ModelConfig, roles: &[Role]) -> Vec<u8> {
    let data: Vec<_> = roles.iter().map(|&role| bytes(&values(config, role))).collect();
    let tensor = |(role, data)| {
        let role: &Role = role;
        (role.hugging_face_name(), TensorView::new(Dtype::F32, role.shape(config), data).unwrap())
    };
    ::safetensors::serialize(roles.iter().zip(&data).map(|(role, data): (_, &Vec<u8>)| tensor((role, data))), None)
        .unwrap()
}

/// Name of a shard.
pub fn shard(at: usize) -> String {
    format!("model-{at}.safetensors")
}

/// Writes the model to `folder`; with more than one shard, tensors are dealt out in turn and indexed.
pub fn folder(config: &ModelConfig, folder: &Path, shards: usize) {
    fs::write(folder.join("config.json"), json(config).to_string()).unwrap();
    let roles: Vec<Role> = Role::needed(config).collect();
    if shards == 1 {
        return fs::write(folder.join("model.safetensors"), safetensors(config, &roles)).unwrap();
    }
    let mut map = serde_json::Map::new();
    for at in 0..shards {
        let roles: Vec<Role> = roles.iter().copied().skip(at).step_by(shards).collect();
        map.extend(roles.iter().map(|role| (role.hugging_face_name(), shard(at).into())));
        fs::write(folder.join(shard(at)), safetensors(config, &roles)).unwrap();
    }
    fs::write(folder.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
}

/// `file` with `bytes` in place of those that lie `skip` bytes behind the first occurrence of `after`.
pub fn patched(file: &[u8], after: &str, skip: usize, bytes: &[u8]) -> Vec<u8> {
    let at = file.windows(after.len()).position(|window| window == after.as_bytes()).unwrap() + after.len() + skip;
    [&file[..at], bytes, &file[at + bytes.len()..]].concat()
}
