//! Model files that cannot be used: one line each, with the cause, and never a panic.

use super::{
    command::{Run, run, thinkey},
    fixture,
};
use serde_json::json;
use std::{fs, path::Path};
use thinkey::weights::GgufWriter;

/// Asks the model in `path` for one token.
fn generate(path: &Path) -> Run {
    run(thinkey(path).args(["generate", "hi", "--max-tokens", "1", "--threads", "1", "--model"]).arg(path), "")
}

/// Why the file with these bytes cannot be used.
fn error(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.gguf");
    fs::write(&path, bytes).unwrap();
    let error = generate(&path).error();
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn tiny() -> GgufWriter {
    fixture::gguf(&fixture::config(128))
}

/// `file` with `bytes` in place of those that lie `skip` bytes behind the first occurrence of `after`.
fn patched(file: &[u8], after: &str, skip: usize, bytes: &[u8]) -> Vec<u8> {
    let at = file.windows(after.len()).position(|window| window == after.as_bytes()).unwrap() + after.len() + skip;
    [&file[..at], bytes, &file[at + bytes.len()..]].concat()
}

#[test]
fn a_cut_gguf_file() {
    let whole = tiny().to_bytes();
    let cuts = (0..24).step_by(3).chain((24..whole.len()).step_by(whole.len() / 40)).chain([whole.len() - 1]);
    for cut in cuts {
        let error = error(&whole[..cut]);
        assert!(error.contains("bad.gguf: "), "cut to {cut}: {error}");
    }
}

#[test]
fn counts_and_offsets_that_lie() {
    let whole = tiny().to_bytes();
    let most = u64::MAX.to_le_bytes();
    // A tensor's entry: name, number of extents (4 bytes), two extents (8 each), format (4), offset (8).
    let tensor = "token_embd.weight";
    for (what, bytes) in [
        ("magic", [b"GGML", &whole[4..]].concat()),
        ("version", [&whole[..4], &99_u32.to_le_bytes(), &whole[8..]].concat()),
        ("number of tensors", [&whole[..8], &most, &whole[16..]].concat()),
        ("number of metadata entries", [&whole[..16], &most, &whole[24..]].concat()),
        ("length of a key", [&whole[..24], &most, &whole[32..]].concat()),
        ("length of an array", patched(&whole, "tokenizer.ggml.tokens", 8, &most)),
        ("number of extents", patched(&whole, tensor, 0, &77_u32.to_le_bytes())),
        ("an extent", patched(&whole, tensor, 4, &most)),
        ("a format", patched(&whole, tensor, 20, &77_u32.to_le_bytes())),
        ("an offset out of the file", patched(&whole, tensor, 24, &(1_u64 << 40).to_le_bytes())),
        ("an offset that overflows", patched(&whole, tensor, 24, &most)),
        ("an offset that is not aligned", patched(&whole, tensor, 24, &1_u64.to_le_bytes())),
    ] {
        let error = error(&bytes);
        assert!(error.contains("bad.gguf: "), "{what}: {error}");
    }
}

#[test]
fn an_unknown_architecture_is_named_with_those_that_are_supported() {
    let mut file = tiny();
    file.set("general.architecture", "mamba");
    let error = error(&file.to_bytes());
    assert!(["mamba", "llama", "qwen2", "qwen3"].iter().all(|name| error.contains(name)), "{error}");
}

#[test]
fn a_tokenizer_that_lacks_pieces() {
    let config = fixture::config(128);
    let without = |token: &str| {
        let renamed = |it: String| if it == token { "<gone>".to_owned() } else { it };
        fixture::tokens().into_iter().map(renamed).collect::<Vec<_>>()
    };
    let mut no_merge_result = tiny();
    no_merge_result.set("tokenizer.ggml.tokens", without("he"));
    let mut no_byte = tiny();
    no_byte.set("tokenizer.ggml.tokens", without("h"));
    let mut kind = tiny();
    kind.set("tokenizer.ggml.model", "unigram");
    let mut short = tiny();
    short.set("tokenizer.ggml.token_type", vec![1; 5]);
    let mut many = tiny();
    many.set("tokenizer.ggml.tokens", vec!["x".to_owned(); config.vocab + 1]);
    let mut end = tiny();
    end.set("tokenizer.ggml.eos_token_id", 5000_u32);
    let none = fixture::gguf_without_tokenizer(&config);
    for (file, says) in [
        (no_merge_result, "\"he\""),
        (no_byte, "no token for byte 0x68"),
        (kind, "unigram"),
        (short, "list of 5 values; expected one for each"),
        (many, &(config.vocab + 1).to_string()),
        (end, "5000"),
        (none, "tokenizer.ggml"),
    ] {
        let error = error(&file.to_bytes());
        assert!(error.contains(says), "{error}");
    }
}

/// Why the folder cannot be used after `spoil` was at it.
fn folder_error(spoil: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    fixture::folder(&fixture::config(128), folder.path());
    spoil(folder.path());
    generate(folder.path()).error()
}

#[test]
fn a_cut_safetensors_file() {
    let folder = tempfile::tempdir().unwrap();
    fixture::folder(&fixture::config(128), folder.path());
    assert_eq!(generate(folder.path()).code, 0, "it works before it is cut");
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for cut in [0, 1, 7, 8, 9, 100, 1000, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..cut]).unwrap();
        let error = generate(folder.path()).error();
        assert!(error.contains("model.safetensors: "), "cut to {cut}: {error}");
    }
}

#[test]
fn a_hostile_safetensors_folder() {
    let weights = |bytes: Vec<u8>| move |path: &Path| fs::write(path.join("model.safetensors"), bytes).unwrap();
    let tensor = |offsets: [u64; 2], shape: &[u64]| {
        let header = json!({ "x": { "dtype": "F32", "shape": shape, "data_offsets": offsets } }).to_string();
        fixture::safetensors(&header, &[0; 16])
    };
    for (what, bytes) in [
        ("a header longer than memory", u64::MAX.to_le_bytes().to_vec()),
        ("a header longer than the file", (1_u64 << 30).to_le_bytes().to_vec()),
        ("a header that is not JSON", fixture::safetensors("{{{{", &[0; 16])),
        ("a header that is a list", fixture::safetensors("[]", &[])),
        ("offsets out of the file", tensor([0, 1 << 40], &[1 << 38])),
        ("offsets that run backwards", tensor([16, 0], &[4])),
        ("a shape that overflows", tensor([0, 16], &[u64::MAX, u64::MAX])),
        ("a shape of another size", tensor([0, 16], &[5])),
        ("tensors of no model", tensor([0, 16], &[4])),
    ] {
        let error = folder_error(weights(bytes));
        assert!(error.contains(": "), "{what}: {error}");
    }
    for (file, text, says) in [
        ("config.json", "{", "config.json"),
        ("config.json", "[1, 2]", "config.json"),
        ("config.json", r#"{"architectures": ["MambaForCausalLM"]}"#, "LlamaForCausalLM"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "\u{0}", "tokenizer.json"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json"),
        ("model.safetensors.index.json", r#"{"weight_map": {"x": "../../../etc/passwd"}}"#, ""),
    ] {
        let error = folder_error(|path| {
            if file.ends_with("index.json") {
                fs::remove_file(path.join("model.safetensors")).unwrap();
            }
            fs::write(path.join(file), text).unwrap();
        });
        assert!(error.contains(says), "{file} of {text}: {error}");
    }
    let error = folder_error(|path| fs::remove_file(path.join("config.json")).unwrap());
    assert!(error.contains("config.json"), "{error}");
}

#[test]
fn what_is_no_model_at_all() {
    let folder = tempfile::tempdir().unwrap();
    assert!(generate(folder.path()).error().contains("holds no model"));
    assert!(generate(Path::new("/dev/null")).error().contains("/dev/null"));
    let error = generate(&folder.path().join("missing.gguf")).error();
    assert!(error.contains("missing.gguf"), "{error}");
    let inspected = run(thinkey(folder.path()).args(["inspect", "/dev/null"]), "").error();
    assert!(inspected.contains("/dev/null"), "{inspected}");
}
