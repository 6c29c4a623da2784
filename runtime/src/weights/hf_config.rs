//! `config.json` of a Hugging Face folder.

use super::safetensors::SafetensorsError;
use crate::model::config::{Architecture, ConfigError, ModelConfig, Pairing, Rope, RopeScaling, implied_head_dim};
use serde::Deserialize;
use serde_json::Value;

/// What decides whether the rest can be understood.
#[derive(Deserialize)]
struct Family {
    #[serde(default)]
    architectures: Vec<String>,
}

/// The fields that shape a model of our families. What is optional here has the same default in all of their classes,
/// or one that [`parse`] knows; the rest has always been written.
#[derive(Deserialize)]
struct Fields {
    #[serde(rename = "_name_or_path")]
    name: Option<String>,
    num_hidden_layers: usize,
    hidden_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f32>,
    /// Up to transformers 4.
    rope_scaling: Option<Scaling>,
    /// From transformers 5 on, with theta inside.
    rope_parameters: Option<Scaling>,
    partial_rotary_factor: Option<f32>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct Scaling {
    rope_type: Option<String>,
    /// What `rope_type` was called first.
    r#type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
    partial_rotary_factor: Option<f32>,
}

/// The shape that `json` describes. `has_output` says whether the weights have an output projection of their own, which
/// decides about tied embeddings where the file does not.
pub(super) fn parse(json: &[u8], has_output: bool) -> Result<ModelConfig, SafetensorsError> {
    // Twice, because another family may well lack fields that ours need, and its name is the better message.
    let family: Family = serde_json::from_slice(json)?;
    let class = family.architectures.first().ok_or(SafetensorsError::NoField { field: "architectures" })?;
    let architecture = Architecture::from_class(class)?;
    let fields: Fields = serde_json::from_slice(json)?;
    let feature = |feature: String| Err(SafetensorsError::Config(ConfigError::Feature { feature }));
    if let Some(quantised) = &fields.quantization_config {
        let method = quantised.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return feature(format!("quantization_config of method {method:?}"));
    }
    if let Some(activation) = fields.hidden_act.as_deref().filter(|&name| name != "silu" && name != "swish") {
        return feature(format!("hidden_act {activation:?}"));
    }

    let heads = fields.num_attention_heads;
    let head_dim = match (fields.head_dim, architecture) {
        (Some(head_dim), _) => head_dim,
        (None, Architecture::Qwen3) => 128,
        (None, _) => implied_head_dim(fields.hidden_size, heads)?,
    };
    let kv_heads = match (fields.num_key_value_heads, architecture) {
        (Some(kv_heads), _) => kv_heads,
        // Llama 1 had none to give.
        (None, Architecture::Llama) => heads,
        (None, _) => return Err(SafetensorsError::NoField { field: "num_key_value_heads" }),
    };
    let config = ModelConfig {
        architecture,
        rope: rope(&fields, head_dim)?,
        sliding_window: sliding_window(&fields, architecture)?,
        name: fields.name.filter(|name| !name.is_empty()),
        layers: fields.num_hidden_layers,
        width: fields.hidden_size,
        heads,
        kv_heads,
        head_dim,
        feed_forward: fields.intermediate_size,
        vocab: fields.vocab_size,
        context: fields.max_position_embeddings,
        rms_eps: fields.rms_norm_eps,
        qkv_bias: architecture == Architecture::Qwen2 || fields.attention_bias.unwrap_or(false),
        qk_norm: architecture == Architecture::Qwen3,
        tied_embeddings: fields.tie_word_embeddings.unwrap_or(!has_output),
    };
    config.validate()?;
    Ok(config)
}

fn rope(fields: &Fields, head_dim: usize) -> Result<Rope, SafetensorsError> {
    let scaling = fields.rope_parameters.as_ref().or(fields.rope_scaling.as_ref());
    let partial = fields.partial_rotary_factor.or(scaling.and_then(|scaling| scaling.partial_rotary_factor));
    if let Some(factor) = partial.filter(|&factor| factor != 1.0) {
        return Err(ConfigError::PartialRotary { found: format!("partial_rotary_factor {factor}"), head_dim }.into());
    }
    let theta = scaling.and_then(|scaling| scaling.rope_theta).or(fields.rope_theta).unwrap_or(10_000.0);
    let need = |value: Option<f32>, field| value.ok_or(SafetensorsError::NoField { field });
    let scaling = match scaling {
        None => RopeScaling::None,
        Some(scaling) => match scaling.rope_type.as_deref().or(scaling.r#type.as_deref()) {
            Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: need(scaling.factor, "rope_scaling.factor")? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: need(scaling.factor, "rope_scaling.factor")?,
                low_freq_factor: need(scaling.low_freq_factor, "rope_scaling.low_freq_factor")?,
                high_freq_factor: need(scaling.high_freq_factor, "rope_scaling.high_freq_factor")?,
                original_context: need(
                    scaling.original_max_position_embeddings,
                    "rope_scaling.original_max_position_embeddings",
                )?,
            },
            Some(found) => return Err(ConfigError::Scaling { found: found.to_owned() }.into()),
            None => return Err(SafetensorsError::NoField { field: "rope_scaling.rope_type" }),
        },
    };
    Ok(Rope::new(theta, head_dim, scaling, Pairing::Halves)?)
}

/// The window of all layers; windows of only some layers are refused, unless they are no narrower than the context.
fn sliding_window(fields: &Fields, architecture: Architecture) -> Result<Option<usize>, SafetensorsError> {
    let Some(window) = fields.sliding_window.filter(|&window| window < fields.max_position_embeddings) else {
        return Ok(None);
    };
    let layers = fields.num_hidden_layers;
    // As in the classes' `layer_types`, where the file does not list them.
    let sliding = match (&fields.layer_types, architecture) {
        (Some(types), _) => types.iter().filter(|&kind| kind == "sliding_attention").count(),
        (None, Architecture::Llama) => 0,
        (None, Architecture::Mistral) => layers,
        (None, Architecture::Qwen2 | Architecture::Qwen3) if !fields.use_sliding_window.unwrap_or(false) => 0,
        (None, Architecture::Qwen2 | Architecture::Qwen3) => {
            layers.saturating_sub(fields.max_window_layers.unwrap_or(28))
        }
    };
    match sliding {
        0 => Ok(None),
        all if all >= layers => Ok(Some(window)),
        some => {
            let feature = format!("a sliding window in {some} of {layers} layers");
            Err(ConfigError::Feature { feature }.into())
        }
    }
}
