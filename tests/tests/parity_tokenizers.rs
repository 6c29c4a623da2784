//! Tokenizers against Hugging Face `tokenizers` and `sentencepiece`: small ones of each kind, made and recorded by
//! `fixtures/tokenizer/make.py`, read from `tokenizer.json` and from GGUF metadata.

use serde::Deserialize;
use std::{collections::BTreeMap, fs, path::PathBuf};
use thinkey::{
    text::Tokenizer,
    weights::{Checkpoint, TokenizerSource},
};

#[derive(Deserialize)]
struct Recording {
    /// Ids of the text "a" with the tokens that belong around a text, by tokenizer.
    a: BTreeMap<String, Vec<u32>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    /// The text spells control tokens.
    #[serde(default)]
    control: bool,
    /// By tokenizer.
    ids: BTreeMap<String, Vec<u32>>,
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/tokenizer").join(name)
}

/// The tokenizer from both kinds of file.
fn tokenizers(name: &str) -> [(&'static str, Tokenizer); 2] {
    let gguf = Checkpoint::open(&fixture(&format!("{name}.gguf"))).unwrap().tokenizer().unwrap();
    assert!(matches!(gguf, TokenizerSource::Gguf(_)));
    let folder = TokenizerSource::Folder(fixture(name));
    [("GGUF", Tokenizer::new(gguf).unwrap()), ("tokenizer.json", Tokenizer::new(folder).unwrap())]
}

#[test]
fn ids_equal_those_of_hugging_face_and_sentencepiece() {
    let recording: Recording = serde_json::from_str(&fs::read_to_string(fixture("cases.json")).unwrap()).unwrap();
    assert!(recording.cases.len() > 80);
    let mut wrong = Vec::new();
    for (name, around) in &recording.a {
        for (kind, tokenizer) in tokenizers(name) {
            assert_eq!(&tokenizer.encode("a", true).unwrap(), around, "{name} {kind}");
            for case in &recording.cases {
                let Some(expected) = case.ids.get(name) else { continue };
                let ids = tokenizer.encode(&case.text, false).unwrap();
                if ids != *expected {
                    wrong.push(format!("{name} {kind} {:?}\n  {ids:?}\n  {expected:?}", case.text));
                }
                if !case.control {
                    assert_eq!(&tokenizer.encode_plain(&case.text, false).unwrap(), &ids, "{name} {:?}", case.text);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} texts have other ids than recorded:\n{}", wrong.len(), wrong.join("\n"));
}
