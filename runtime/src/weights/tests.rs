//! Whole models of both kinds, as they should be and spoilt.

use super::{Checkpoint, GgufWriter, Kind, LayerRole, Role, TokenizerSource, WeightsError, fixture};
use crate::model::config::{Architecture, ModelConfig, Pairing};
use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{fs, path::Path};
use thinkey_kernels::format::{Matrix, WeightFormat};

fn open(file: &GgufWriter) -> Result<Checkpoint, WeightsError> {
    Checkpoint::from_gguf(Path::new("m.gguf"), file.to_bytes().into())
}

/// Opens a one-file folder of that model after `spoil`ing its config.
fn open_folder(config: &ModelConfig, spoil: impl FnOnce(&mut Value)) -> Result<Checkpoint, WeightsError> {
    let folder = tempfile::tempdir().unwrap();
    fixture::folder(config, folder.path(), 1);
    let mut json = fixture::json(config);
    spoil(&mut json);
    fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
    Checkpoint::open(folder.path())
}

/// The message after the path.
fn message(result: Result<Checkpoint, WeightsError>) -> String {
    let message = result.unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message.split_once(": ").unwrap().1.to_owned()
}

#[test]
fn both_kinds_of_file_give_the_same_model() {
    for architecture in Architecture::ALL {
        let config = fixture::config(architecture);
        let gguf = open(&fixture::gguf(&config)).unwrap();
        for shards in [1, 3] {
            let folder = tempfile::tempdir().unwrap();
            fixture::folder(&config, folder.path(), shards);
            let model = Checkpoint::open(folder.path()).unwrap();
            assert_eq!(*model.config(), config);
            assert_eq!(model.kind(), Kind::Safetensors { shards });
            for role in Role::needed(&config).chain([Role::Output]) {
                if role.shape(&config).len() == 1 {
                    let vector = model.vector(role).unwrap();
                    assert_eq!((&vector, &gguf.vector(role).unwrap()), (&fixture::values(&config, role), &vector));
                } else {
                    let (matrix, other) = (model.matrix(role).unwrap(), gguf.matrix(role).unwrap());
                    let stored =
                        if config.tied_embeddings && role == Role::Output { Role::TokenEmbedding } else { role };
                    assert_eq!(matrix.bytes(), fixture::bytes(&fixture::values(&config, stored)));
                    assert_eq!((matrix.rows(), matrix.bytes()), (other.rows(), other.bytes()));
                }
            }
            let size: u64 = model.tensors().map(|tensor| tensor.bytes).sum();
            assert_eq!(size, gguf.tensors().map(|tensor| tensor.bytes).sum::<u64>());
            assert!(size < model.size_bytes());
        }

        let mut expected = config.clone();
        expected.rope.pairing = architecture.gguf_pairing();
        if architecture == Architecture::Mistral {
            expected.architecture = Architecture::Llama;
        }
        assert_eq!(*gguf.config(), expected);
        assert_eq!(gguf.kind().to_string(), "GGUF v3");
    }
    assert_eq!(Architecture::Llama.gguf_pairing(), Pairing::Interleaved);
}

#[test]
fn a_tokenizer_comes_out_as_it_went_in() {
    let config = fixture::config(Architecture::Llama);
    let TokenizerSource::Gguf(tokenizer) = open(&fixture::gguf(&config)).unwrap().tokenizer().unwrap() else {
        panic!("a GGUF file has its tokenizer in itself");
    };
    assert_eq!((tokenizer.tokens.len(), tokenizer.tokens[7].as_str()), (40, "<7>"));
    assert_eq!((tokenizer.model.as_str(), tokenizer.pre), ("gpt2", None));
    assert_eq!((tokenizer.eos, tokenizer.bos), (Some(2), None));
    assert_eq!((tokenizer.add_bos, tokenizer.add_eos), (Some(false), None));
    assert_eq!(tokenizer.token_types, Some(vec![1; 40]));
    assert_eq!(tokenizer.merges, Some(vec!["a b".to_owned()]));
}

#[test]
fn a_tokenizer_that_contradicts_its_model_is_refused() {
    type Spoil = fn(&mut GgufWriter);
    let cases: [(Spoil, &str); 5] = [
        (
            |file| _ = file.set("tokenizer.ggml.eos_token_id", 40_u32),
            "metadata key \"tokenizer.ggml.eos_token_id\" is 40; expected the number of one of the 40 tokens",
        ),
        (
            |file| _ = file.set("tokenizer.ggml.scores", vec![0.5_f32; 39]),
            "metadata key \"tokenizer.ggml.scores\" is a list of 39 values; expected one for each of the 40 tokens",
        ),
        (
            |file| _ = file.set("tokenizer.ggml.tokens", vec![String::new(); 41]),
            "metadata key \"tokenizer.ggml.tokens\" is a list of 41 tokens; expected at most the 40 that the \
             embedding has rows for",
        ),
        (
            |file| _ = file.set("tokenizer.ggml.tokens", "<0>"),
            "metadata key \"tokenizer.ggml.tokens\" is a string; expected an array of strings",
        ),
        (
            |file| _ = file.set("tokenizer.ggml.model", 1_u32),
            "metadata key \"tokenizer.ggml.model\" is the u32 1; expected a string",
        ),
    ];
    for (spoil, expected) in cases {
        let mut file = fixture::gguf(&fixture::config(Architecture::Llama));
        spoil(&mut file);
        let error = open(&file).unwrap().tokenizer().unwrap_err();
        assert_eq!(error.to_string(), format!("m.gguf: {expected}"));
    }
}

#[test]
fn a_gguf_model_that_cannot_run_says_why() {
    type Spoil = fn(&mut GgufWriter);
    let matrix = |format: WeightFormat, rows, cols| {
        let bytes = vec![0; format.row_bytes(cols).unwrap() * rows];
        Matrix::new(format, rows, cols, bytes.into()).unwrap()
    };
    let cases: [(Spoil, &str); 14] = [
        (
            |file| _ = file.set("general.architecture", "mamba"),
            "architecture \"mamba\" is not supported; supported are llama, qwen2, qwen3",
        ),
        (|file| _ = file.set("split.count", 3_u32), "one of 3 files of a split model; join them with"),
        (|file| _ = file.set("llama.expert_count", 8_u32), "llama.expert_count is not supported"),
        (|file| _ = file.set("llama.logit_scale", 0.5_f32), "llama.logit_scale is not supported"),
        (
            |file| _ = file.set("llama.rope.scaling.type", "yarn"),
            "RoPE scaling \"yarn\" is not supported; supported are default, linear, llama3",
        ),
        (
            |file| _ = file.set("llama.rope.dimension_count", 8_u32),
            "partial rotary embedding (8 channels) is not supported",
        ),
        (|file| _ = file.set("llama.attention.value_length", 8_u32), "a value head of 8 beside keys of 16"),
        (
            |file| _ = file.set("llama.block_count", vec![1, 2]),
            "metadata key \"llama.block_count\" is an array of i32; expected an unsigned integer",
        ),
        (
            |file| _ = file.set("llama.block_count", 3_u32),
            "tensor \"blk.2.attn_norm.weight\" is missing; the file is incomplete",
        ),
        (
            |file| _ = file.set("llama.block_count", 1_u32),
            "tensor \"blk.1.attn_norm.weight\" has no place in a llama model of 1 layers",
        ),
        (|file| _ = file.set("llama.vocab_size", u32::MAX), "vocabulary is 4294967295; it must be from 1 to"),
        (|file| _ = file.set("llama.attention.key_length", u32::MAX), "a value head of 16 beside keys of 4294967295"),
        (
            |file| _ = file.vector("output_norm.weight", &[1.0; 63]),
            "tensor \"output_norm.weight\" is 63, but the model's configuration asks for 64",
        ),
        (
            |file| _ = file.vector("blk.1.attn_output.bias", &[0.5; 64]),
            "tensor \"blk.1.attn_output.bias\" has no place in a llama model of 2 layers",
        ),
    ];
    let model = fixture::gguf(&fixture::config(Architecture::Llama));
    for (spoil, expected) in cases {
        let mut file = model.clone();
        spoil(&mut file);
        let found = message(open(&file));
        assert!(found.starts_with(expected), "{found}\n{expected}");
    }
    for missing in ["block_count", "attention.layer_norm_rms_epsilon"] {
        let mut bytes = model.to_bytes();
        let key = format!("llama.{missing}");
        let at = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
        bytes[at] = b'x';
        let found = message(Checkpoint::from_gguf(Path::new("m.gguf"), bytes.into()));
        assert_eq!(found, format!("metadata key \"{key}\" is missing"));
    }

    let mut file = model.clone();
    file.matrix("blk.0.ffn_up.weight", &matrix(WeightFormat::Q8_0, 95, 64));
    assert_eq!(
        message(open(&file)),
        "tensor \"blk.0.ffn_up.weight\" is 95×64, but the model's configuration asks for 96×64"
    );
    file.matrix("blk.0.ffn_up.weight", &matrix(WeightFormat::Q8_0, 96, 64));
    assert_eq!(open(&file).unwrap().matrix(Role::Layer(0, LayerRole::Up)).unwrap().format(), WeightFormat::Q8_0);
}

#[test]
fn formats_that_cannot_be_computed_with_are_named() {
    let bytes = fixture::gguf(&fixture::config(Architecture::Llama)).to_bytes();
    let spoilt = |name: &str, axes: usize, kind: u32| {
        let bytes = fixture::patched(&bytes, name, 4 + 8 * axes, &kind.to_le_bytes());
        message(Checkpoint::from_gguf(Path::new("m.gguf"), bytes.into()))
    };
    assert_eq!(
        spoilt("blk.1.ffn_gate.weight", 2, 23),
        "tensor \"blk.1.ffn_gate.weight\" is stored as IQ4_XS, which is not supported; supported are F32, F16, BF16, \
         Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K"
    );
    assert!(spoilt("token_embd.weight", 2, 999).starts_with("tensor \"token_embd.weight\" is stored as type 999,"));
    assert_eq!(
        spoilt("output_norm.weight", 1, 8),
        "tensor \"output_norm.weight\" is a vector stored as Q8_0; vectors must be F32, F16 or BF16"
    );
}

#[test]
fn what_changes_nothing_may_be_there() {
    let config = fixture::config(Architecture::Llama);
    let mut file = fixture::gguf(&config);
    file.vector("blk.1.attn_output.bias", &[0.0; 64]).vector("rope_freqs.weight", &[2.0; 8]);
    let checkpoint = open(&file).unwrap();
    let halved: Vec<f32> = config.rope.inv_freq.iter().map(|freq| freq / 2.0).collect();
    assert_eq!(checkpoint.config().rope.inv_freq, halved);
    file.vector("rope_freqs.weight", &[2.0; 7]);
    assert!(message(open(&file)).starts_with("tensor \"rope_freqs.weight\" is 7, but"));

    // The output of a tied model may be saved as well, if it is the embedding.
    let tied = |json: &mut Value| json["tie_word_embeddings"] = json!(true);
    let found = message(open_folder(&config, tied));
    assert_eq!(
        found,
        "the configuration ties the output projection to \"model.embed_tokens.weight\", but \"lm_head.weight\" is \
         another matrix"
    );
}

#[test]
fn an_output_is_tied_where_nothing_says_otherwise() {
    let tied = fixture::config(Architecture::Qwen3);
    let unsaid = |json: &mut Value| _ = json.as_object_mut().unwrap().remove("tie_word_embeddings");
    assert_eq!(*open_folder(&tied, unsaid).unwrap().config(), tied);
    let untied = fixture::config(Architecture::Llama);
    assert_eq!(*open_folder(&untied, unsaid).unwrap().config(), untied);
    let lost = open_folder(&tied, |json| json["tie_word_embeddings"] = json!(false));
    assert!(message(lost).starts_with("tensor \"lm_head.weight\" is missing"));
}

#[test]
fn llama_biases_are_honoured_and_superfluous_ones_refused() {
    let mut config = fixture::config(Architecture::Llama);
    config.qkv_bias = true;
    let model = open_folder(&config, |json| json["attention_bias"] = json!(true)).unwrap();
    let role = Role::Layer(1, LayerRole::KeyBias);
    assert_eq!(model.vector(role).unwrap(), fixture::values(&config, role));
    assert!(open(&fixture::gguf(&config)).unwrap().config().qkv_bias);
    let refused = open_folder(&config, |_| {});
    assert!(message(refused).starts_with("tensor \"model.layers.0.self_attn.k_proj.bias\" has no place"));
}

#[test]
fn a_weight_in_the_wrong_way_is_an_error() {
    let model = open(&fixture::gguf(&fixture::config(Architecture::Llama))).unwrap();
    let cases = [
        (model.matrix(Role::OutputNorm).err(), "tensor \"output_norm.weight\" is 64; it was asked for with 2 axes"),
        (model.vector(Role::Output).err(), "tensor \"output.weight\" is 40×64; it was asked for with 1 axes"),
        (model.matrix(Role::Layer(2, LayerRole::Key)).err(), "tensor \"blk.2.attn_k.weight\" is missing"),
        (model.vector(Role::Layer(0, LayerRole::KeyBias)).err(), "tensor \"blk.0.attn_k.bias\" is missing"),
    ];
    for (error, expected) in cases {
        let found = error.unwrap().to_string();
        assert!(found.starts_with(&format!("m.gguf: {expected}")), "{found}");
    }
}

#[test]
fn paths_lead_to_a_model_or_say_why_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let error = || Checkpoint::open(path).unwrap_err();
    assert!(matches!(error(), WeightsError::NoModel { .. }));
    let config = fixture::config(Architecture::Qwen2);
    fs::write(path.join("a.gguf"), fixture::gguf(&config).to_bytes()).unwrap();
    fs::write(path.join("config.json"), "{}").unwrap();
    let model = Checkpoint::open(path).unwrap();
    assert_eq!((model.kind(), model.path()), (Kind::Gguf { version: 3 }, path.join("a.gguf").as_path()));
    fs::write(path.join("b.gguf"), "").unwrap();
    assert!(matches!(error(), WeightsError::Ambiguous { files, .. } if files == ["a.gguf", "b.gguf"]));
    fixture::folder(&config, path, 1);
    assert_eq!(Checkpoint::open(path).unwrap().kind(), Kind::Safetensors { shards: 1 });

    let error = |name: &str| Checkpoint::open(&path.join(name)).unwrap_err();
    assert!(error("b.gguf").to_string().ends_with("not a GGUF file: it starts with \"\" instead of \"GGUF\""));
    assert!(matches!(error("model.safetensors"), WeightsError::BareSafetensors { .. }));
    assert!(matches!(error("none"), WeightsError::Io { cause, .. } if cause.kind() == std::io::ErrorKind::NotFound));
    #[cfg(unix)]
    assert!(matches!(Checkpoint::open(Path::new("/dev/null")).unwrap_err(), WeightsError::NotAFile { .. }));
}

/// Uses all of a model that could be opened.
fn use_all(model: &Checkpoint) {
    for role in Role::needed(model.config()) {
        match role.shape(model.config()).len() {
            1 => _ = model.vector(role).unwrap(),
            _ => _ = model.matrix(role).unwrap(),
        }
    }
    let _ = model.tokenizer();
    assert!(model.tensors().all(|tensor| tensor.bytes <= model.size_bytes()));
}

/// Bytes that matter where counts, types and lengths are.
const BYTES: &[u8] = &[0, 1, 2, 8, 9, 0x7f, 0x80, 0xff];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Nothing that happens to a file makes it panic: it opens and can be used, or it does not open.
    #[test]
    fn damaged_files_open_whole_or_not_at_all(
        changes in prop::collection::vec((0_usize..4600, prop::sample::select(BYTES)), 1..4),
        keep in prop::option::of(0.0..1.0),
    ) {
        let mut bytes = fixture::gguf(&fixture::config(Architecture::Qwen2)).to_bytes();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Some(keep) = keep {
            bytes.truncate((bytes.len() as f64 * keep) as usize);
        }
        if let Ok(model) = Checkpoint::from_gguf(Path::new("m.gguf"), bytes.into()) {
            use_all(&model);
        }
    }
}

#[test]
fn every_truncation_is_noticed() {
    let bytes = Bytes::from(fixture::gguf(&fixture::config(Architecture::Qwen3)).to_bytes());
    for len in (0..5000).chain([bytes.len() - 1]) {
        Checkpoint::from_gguf(Path::new("m.gguf"), bytes.slice(..len)).unwrap_err();
    }
}
