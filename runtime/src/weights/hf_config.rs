//! `config.json` of a Hugging Face folder.

use super::safetensors::SafetensorsError;
use crate::model::config::{Architecture, ConfigError, ModelConfig, Pairing, Rope, RopeScaling, implied_head_dim};
use serde::Deserialize;
use serde_json::{Map, Value};

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
    rope_scaling: Option<Map<String, Value>>,
    /// From transformers 5 on, with theta inside.
    rope_parameters: Option<Map<String, Value>>,
    original_max_position_embeddings: Option<f32>,
    partial_rotary_factor: Option<f32>,
    /// Not said is not the same as null.
    #[serde(default = "class_window")]
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
}

/// The window of the classes that have one.
const fn class_window() -> Option<usize> {
    Some(4096)
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
    // Where a file says it in both spellings, every version of transformers reads the older; an empty one says nothing.
    let said = [&fields.rope_scaling, &fields.rope_parameters].into_iter().flatten().find(|map| !map.is_empty());
    if said.is_some_and(|map| map.values().any(Value::is_object)) {
        let feature = "a RoPE of its own for each kind of layer".to_owned();
        return Err(ConfigError::Feature { feature }.into());
    }
    let scaling = said.map(|map| Scaling::deserialize(Value::Object(map.clone()))).transpose()?;
    let partial = fields.partial_rotary_factor.or(scaling.as_ref().and_then(|scaling| scaling.partial_rotary_factor));
    if let Some(factor) = partial.filter(|&factor| factor != 1.0) {
        return Err(ConfigError::PartialRotary { found: format!("partial_rotary_factor {factor}"), head_dim }.into());
    }
    let theta = scaling.as_ref().and_then(|scaling| scaling.rope_theta).or(fields.rope_theta).unwrap_or(10_000.0);
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
                original_context: fields
                    .original_max_position_embeddings
                    .or(scaling.original_max_position_embeddings)
                    .unwrap_or(fields.max_position_embeddings as f32),
            },
            Some(found) => return Err(ConfigError::Scaling { found: found.to_owned() }.into()),
            None if scaling.factor.is_none() => RopeScaling::None,
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
        (_, Architecture::Llama) => 0,
        (Some(types), _) => types.iter().filter(|&kind| kind == "sliding_attention").count(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::fixture;
    use serde_json::json;

    fn parsed(
        architecture: Architecture,
        layers: usize,
        changes: &[(&str, Value)],
    ) -> Result<ModelConfig, SafetensorsError> {
        let mut json = fixture::json(&ModelConfig { layers, ..fixture::config(architecture) });
        for (field, value) in changes {
            match value {
                Value::String(word) if word == "absent" => _ = json.as_object_mut().unwrap().remove(*field),
                value => json[*field] = value.clone(),
            }
        }
        parse(json.to_string().as_bytes(), true)
    }

    #[test]
    fn what_is_not_said_is_as_in_the_class() {
        let absent = json!("absent");
        let llama = |changes: &[(&str, Value)]| parsed(Architecture::Llama, 2, changes).unwrap();
        assert_eq!(llama(&[("head_dim", absent.clone())]).head_dim, 16);
        assert_eq!(llama(&[("head_dim", Value::Null)]).head_dim, 16);
        assert_eq!(llama(&[("num_key_value_heads", absent.clone())]).kv_heads, 4);
        assert_eq!(llama(&[("rope_theta", absent.clone())]).rope, fixture::config(Architecture::Llama).rope);
        assert_eq!(parsed(Architecture::Qwen3, 2, &[("head_dim", absent.clone())]).unwrap().head_dim, 128);
        assert!(!llama(&[("tie_word_embeddings", absent.clone())]).tied_embeddings);
        let error = parsed(Architecture::Mistral, 2, &[("num_key_value_heads", absent.clone())]).unwrap_err();
        assert_eq!(error.to_string(), "field \"num_key_value_heads\" is missing");
        let error = parsed(Architecture::Llama, 2, &[("hidden_size", absent)]).unwrap_err();
        assert!(error.to_string().starts_with("not as expected: missing field `hidden_size`"), "{error}");
    }

    /// What files leave out, say twice or say in an old way: recorded from transformers by `make.py` beside the cases.
    #[test]
    fn files_mean_what_transformers_reads_in_them() {
        #[derive(Deserialize)]
        struct Case {
            config: Value,
            window: Option<usize>,
            head_dim: usize,
            inv_freq: Vec<f32>,
        }
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../../tests/fixtures/architectures/configs.json")).unwrap();
        assert!(cases.len() >= 20);
        for case in cases {
            let found =
                parse(case.config.to_string().as_bytes(), true).unwrap_or_else(|e| panic!("{}: {e}", case.config));
            assert_eq!((found.sliding_window, found.head_dim), (case.window, case.head_dim), "{}", case.config);
            assert_eq!(found.rope.inv_freq.len(), case.inv_freq.len());
            for (found, expected) in found.rope.inv_freq.iter().zip(&case.inv_freq) {
                // Two units in the last place, for another library's power function.
                assert!((found / expected - 1.0).abs() < 2.5e-7, "{}: {found} is not {expected}", case.config);
            }
        }
    }

    #[test]
    fn rope_scaling_is_read_from_either_place() {
        let config = |changes: &[(&str, Value)]| parsed(Architecture::Llama, 2, changes);
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 5000.0
        });
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64.0 };
        let expected = Rope::new(5000.0, 16, scaling, Pairing::Halves).unwrap();
        assert_eq!(config(&[("rope_scaling", llama3.clone())]).unwrap().rope, expected);
        assert_eq!(config(&[("rope_parameters", llama3), ("rope_theta", json!(7.0))]).unwrap().rope, expected);
        let linear = config(&[("rope_scaling", json!({"type": "linear", "factor": 2}))]).unwrap().rope;
        let expected = Rope::new(fixture::THETA, 16, RopeScaling::Linear { factor: 2.0 }, Pairing::Halves).unwrap();
        assert_eq!(linear, expected);
        assert_eq!(
            config(&[("rope_parameters", json!({"rope_type": "default", "rope_theta": 10000}))]).unwrap().rope,
            fixture::config(Architecture::Llama).rope
        );

        let error = |changes: &[(&str, Value)]| config(changes).unwrap_err().to_string();
        for name in ["yarn", "dynamic", "longrope"] {
            assert_eq!(
                error(&[("rope_scaling", json!({"rope_type": name, "factor": 4.0}))]),
                format!("RoPE scaling {name:?} is not supported; supported are default, linear, llama3")
            );
        }
        assert_eq!(error(&[("rope_scaling", json!({"type": "linear"}))]), "field \"rope_scaling.factor\" is missing");
        assert_eq!(error(&[("rope_scaling", json!({"factor": 2.0}))]), "field \"rope_scaling.rope_type\" is missing");
        // As newer families have it.
        let per_layer = json!({"full_attention": {"rope_type": "default"}});
        let refused = error(&[("rope_parameters", per_layer)]);
        assert!(refused.starts_with("a RoPE of its own for each kind of layer is not supported"), "{refused}");
        assert_eq!(
            error(&[("partial_rotary_factor", json!(0.5))]),
            "partial rotary embedding (partial_rotary_factor 0.5) is not supported; all 16 channels of a head must be \
             rotated"
        );
        assert_eq!(error(&[("rope_theta", json!(0))]), "rope theta is 0; it must be above zero and finite");
    }

    #[test]
    fn windows_hold_for_all_layers_or_none() {
        use Architecture::{Llama, Mistral, Qwen2, Qwen3};
        let window = |family, changes: &[(&str, Value)]| {
            let changes = [&[("sliding_window", json!(32))], changes].concat();
            parsed(family, 30, &changes).map(|config| config.sliding_window)
        };
        let on = ("use_sliding_window", json!(true));
        let all_full = json!(vec!["full_attention"; 30]);
        assert_eq!(window(Mistral, &[]).unwrap(), Some(32));
        assert_eq!(window(Mistral, &[("sliding_window", json!(128))]).unwrap(), None);
        assert_eq!(window(Llama, &[]).unwrap(), None);
        assert_eq!(window(Qwen2, &[]).unwrap(), None);
        assert_eq!(window(Qwen3, &[("use_sliding_window", json!(false))]).unwrap(), None);
        assert_eq!(window(Qwen2, &[on.clone(), ("max_window_layers", json!(0))]).unwrap(), Some(32));
        assert_eq!(window(Qwen2, &[on.clone(), ("max_window_layers", json!(30))]).unwrap(), None);
        assert_eq!(window(Qwen3, &[on.clone(), ("layer_types", all_full)]).unwrap(), None);
        let error = window(Qwen2, &[on]).unwrap_err();
        assert!(error.to_string().starts_with("a sliding window in 2 of 30 layers is not supported"), "{error}");
        assert!(
            window(Mistral, &[("sliding_window", json!(0))]).unwrap_err().to_string().starts_with("sliding window")
        );
    }

    #[test]
    fn what_would_change_the_result_is_refused() {
        let error = |changes: &[(&str, Value)]| parsed(Architecture::Llama, 2, changes).unwrap_err().to_string();
        assert!(error(&[("hidden_act", json!("gelu"))]).starts_with("hidden_act \"gelu\" is not supported"));
        assert!(
            error(&[("quantization_config", json!({"quant_method": "gptq"}))])
                .starts_with("quantization_config of method \"gptq\" is not supported")
        );
        assert!(
            error(&[("architectures", json!(["GPT2LMHeadModel"]))])
                .starts_with("architecture \"GPT2LMHeadModel\" is not supported; supported are LlamaForCausalLM,")
        );
        assert_eq!(error(&[("architectures", json!([]))]), "field \"architectures\" is missing");
        // A shape that would take all memory is refused before anything is made of it.
        assert!(error(&[("head_dim", json!(u64::MAX))]).starts_with("head_dim is 18446744073709551615; it must be"));
        assert!(error(&[("hidden_size", json!(-1))]).starts_with("not as expected: invalid value: integer `-1`"));
        assert!(parse(b"\xff", false).unwrap_err().to_string().starts_with("not as expected: "));
    }
}
