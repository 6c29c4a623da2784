//! `thinkey inspect`.

use super::{
    command::{Run, run, thinkey},
    fixture,
};
use serde_json::Value;
use std::fs;
use thinkey::weights::GgufWriter;

fn inspect(spoil: impl FnOnce(&mut GgufWriter), arguments: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let mut file = fixture::gguf(&fixture::config(512));
    spoil(&mut file);
    fs::write(&path, file.to_bytes()).unwrap();
    run(thinkey(folder.path()).arg("inspect").arg(&path).args(arguments), "")
}

#[test]
fn the_chat_template_is_told_and_shown() {
    let text = inspect(|_| {}, &[]).ok();
    let length = fixture::TEMPLATE.chars().count();
    assert!(text.contains(&format!("  chat template tokenizer.chat_template, {length} characters\n")), "{text}");
    assert!(!text.contains(fixture::TEMPLATE));
    assert!(inspect(|_| {}, &["--template"]).ok().ends_with(&format!("\n\n{}\n", fixture::TEMPLATE)));
    let json: Value = serde_json::from_str(&inspect(|_| {}, &["--json"]).ok()).unwrap();
    assert_eq!(json["chat_template"]["text"], fixture::TEMPLATE);
    assert_eq!(json["chat_template"]["from"], "tokenizer.chat_template");
    assert_eq!((&json["layers"], &json["context"]), (&2.into(), &512.into()));

    let folder = tempfile::tempdir().unwrap();
    fixture::folder(&fixture::config(512), folder.path());
    let text = run(thinkey(folder.path()).arg("inspect").arg(folder.path()), "").ok();
    assert!(text.contains("chat template tokenizer_config.json"), "{text}");
}

#[test]
fn a_tokenizer_that_cannot_be_read_does_not_hide_the_rest() {
    let spoil = |file: &mut GgufWriter| {
        file.set("tokenizer.ggml.eos_token_id", 5000_u32);
    };
    let text = inspect(spoil, &[]).ok();
    assert!(text.contains("chat template cannot be read: ") && text.contains("5000"), "{text}");
    assert!(text.contains("2 layers of 64 channels"), "{text}");
}
