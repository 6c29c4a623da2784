//! A tiny model with random weights that writes lower-case letters and spaces.

use bytes::Bytes;
use serde_json::json;
use std::{fs, path::Path};
use thinkey::{
    model::{
        Architecture, ModelConfig,
        config::{Pairing, Rope, RopeScaling},
    },
    weights::{GgufWriter, Role},
};
use thinkey_kernels::format::{Matrix, WeightFormat};

pub const THETA: f32 = 10_000.0;

/// ChatML: one token for a mark, one for each other byte (but `he`).
pub const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                            {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The tokens: three marks, the bytes as GPT-2 spells them, one merge.
pub fn tokens() -> Vec<String> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = (256..).filter_map(char::from_u32);
    let spelled = (0..=255).map(|byte| if printable(byte) { char::from(byte) } else { others.next().unwrap() });
    let marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from);
    marks.into_iter().chain(spelled.map(String::from)).chain(["he".to_owned()]).collect()
}

/// Shape of the model, for a context of `context` tokens.
pub fn config(context: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        name: Some("tiny".to_owned()),
        layers: 2,
        width: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        feed_forward: 96,
        vocab: tokens().len(),
        context,
        rms_eps: 1e-5,
        rope: Rope::new(THETA, 16, RopeScaling::None, Pairing::Interleaved).unwrap(),
        sliding_window: None,
        qkv_bias: false,
        qk_norm: false,
        tied_embeddings: false,
    }
}

/// Weights from -1 to 1; the rows of the output are zero but for the tokens that the model writes.
pub fn weights(config: &ModelConfig, role: Role) -> Vec<f32> {
    let shape = role.shape(config);
    let mut state = role.gguf_name().bytes().fold(7_u64, |state, byte| state.wrapping_mul(131) + u64::from(byte));
    let mut values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    if role == Role::Output {
        let written = |token: &str| token == "Ġ" || matches!(token.as_bytes(), [b'a'..=b'z']);
        for (token, row) in tokens().iter().zip(values.chunks_exact_mut(config.width)) {
            if !written(token) {
                row.fill(0.0);
            }
        }
    }
    values
}

/// The model as a GGUF file.
pub fn gguf(config: &ModelConfig) -> GgufWriter {
    let mut file = gguf_without_tokenizer(config);
    set_tokenizer(&mut file);
    file.set("tokenizer.chat_template", TEMPLATE);
    file
}

/// Shape and weights alone.
pub fn gguf_without_tokenizer(config: &ModelConfig) -> GgufWriter {
    let mut file = GgufWriter::for_model(config, THETA);
    for role in Role::needed(config) {
        let values = weights(config, role);
        match role.shape(config)[..] {
            [rows, cols] => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let matrix = Matrix::new(WeightFormat::F32, rows, cols, Bytes::from(bytes)).unwrap();
                file.matrix(role.gguf_name(), &matrix)
            }
            _ => file.vector(role.gguf_name(), &values),
        };
    }
    file
}

/// Adds the tokenizer, without a template.
pub fn set_tokenizer(file: &mut GgufWriter) {
    let tokens = tokens();
    let mut types = vec![1; tokens.len()];
    types[..3].fill(3);
    file.set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "smollm")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.merges", vec!["h e".to_owned()])
        .set("tokenizer.ggml.eos_token_id", 2_u32)
        .set("tokenizer.ggml.add_bos_token", false);
}

/// Tokens of a text, as this vocabulary has them: one a byte, `he` being one.
pub fn count(text: &str) -> usize {
    text.len() - text.matches("he").count()
}

/// Tokens that the template puts around a message, besides its role and content: two marks and two line ends.
pub const AROUND: usize = 4;

/// Tokens that ask for a reply: a mark, `assistant` and a line end.
pub const ASK: usize = 11;

/// Writes the model as a Hugging Face folder.
pub fn folder(config: &ModelConfig, path: &Path) {
    let roles: Vec<Role> = Role::needed(config).collect();
    let mut tensors = serde_json::Map::new();
    let mut data = Vec::new();
    for &role in &roles {
        let start = data.len();
        data.extend(weights(config, role).iter().flat_map(|value| value.to_le_bytes()));
        let entry = json!({ "dtype": "F32", "shape": role.shape(config), "data_offsets": [start, data.len()] });
        tensors.insert(role.hugging_face_name(), entry);
    }
    fs::write(path.join("model.safetensors"), safetensors(&json!(tensors).to_string(), &data)).unwrap();
    let shape = json!({
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": config.layers, "hidden_size": config.width,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward, "vocab_size": config.vocab, "rope_theta": THETA,
        "max_position_embeddings": config.context, "rms_norm_eps": config.rms_eps, "tie_word_embeddings": false,
    });
    fs::write(path.join("config.json"), shape.to_string()).unwrap();
    let vocab: serde_json::Map<_, _> = tokens().into_iter().zip((0..).map(serde_json::Value::from)).collect();
    let added: Vec<_> = (0..3)
        .map(|id| {
            json!({ "id": id, "content": tokens()[id], "special": true, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false })
        })
        .collect();
    let tokenizer = json!({
        "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "vocab": vocab, "merges": ["h e"] },
    });
    fs::write(path.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let settings = json!({ "eos_token": "<|im_end|>", "chat_template": TEMPLATE });
    fs::write(path.join("tokenizer_config.json"), settings.to_string()).unwrap();
}

/// A safetensors file of this header and these bytes.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}
