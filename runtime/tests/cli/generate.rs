//! `thinkey generate`.

use super::{
    command::{Run, run, thinkey},
    fixture::{self, AROUND, ASK, count},
};
use serde_json::Value;
use std::{fs, path::PathBuf};
use tempfile::TempDir;

/// A folder with a tiny model in it.
struct Tiny {
    folder: TempDir,
    model: PathBuf,
}

fn tiny(context: usize) -> Tiny {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf");
    fs::write(&model, fixture::gguf(&fixture::config(context)).to_bytes()).unwrap();
    Tiny { folder, model }
}

impl Tiny {
    fn generate(&self, arguments: &[&str]) -> Run {
        let mut command = thinkey(self.folder.path());
        run(command.arg("generate").arg("--model").arg(&self.model).args(arguments), "")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.generate(&[arguments, &["--json"]].concat()).ok()).unwrap()
    }
}

#[test]
fn json_says_what_it_took() {
    let tiny = tiny(512);
    let report = tiny.json(&["where is the dog?", "--max-tokens", "100"]);
    let prompt = AROUND + count("user") + count("where is the dog?") + ASK;
    assert_eq!(report["tokens"]["prompt"], prompt);
    assert_eq!(report["tokens"]["new"], 100);
    assert_eq!(report["end"], "max_tokens");
    let answer = report["answer"].as_str().unwrap();
    assert_eq!(answer.len(), 100);
    assert!(answer.bytes().all(|byte| byte == b' ' || byte.is_ascii_lowercase()), "{answer}");
    let cache = &report["cache"];
    assert_eq!(cache["tokens"], prompt + 100);
    assert_eq!(cache["used"], prompt + 99);
    assert_eq!((&cache["lambda"], &cache["recent"], &cache["window"]), (&0.4.into(), &32.into(), &32.into()));
    assert_eq!((&cache["keys"], &cache["values"]), (&"int4".into(), &"trellis2".into()));
    let bytes = |name: &str| report["cache_bytes"][name].as_i64().unwrap();
    // Layers, KV heads, channels, keys and values of two bytes.
    assert_eq!(bytes("whole"), 2 * 2 * 16 * 2 * 2 * (prompt as i64 + 100));
    assert_eq!(bytes("planned"), bytes("measured"));
    assert_eq!(bytes("saved"), bytes("whole") - bytes("measured"));
    for part in ["prefill", "decode"] {
        let rate = report["tokens_per_second"][part].as_f64().unwrap();
        let count = if part == "prefill" { prompt } else { 99 };
        let seconds = report["seconds"][part].as_f64().unwrap();
        assert!((rate * seconds - count as f64).abs() < 1e-6, "{part}: {rate} for {seconds} s");
    }
}

#[test]
fn text_is_the_answer_of_the_json_and_stats_follow_it() {
    let tiny = tiny(512);
    let answer = tiny.json(&["hi", "--max-tokens", "20"])["answer"].as_str().unwrap().to_owned();
    assert_eq!(tiny.generate(&["hi", "--max-tokens", "20"]).ok(), format!("{answer}\n"));
    let text = tiny.generate(&["hi", "--max-tokens", "20", "--stats"]).ok();
    let stats = text.strip_prefix(&format!("{answer}\n\n")).unwrap();
    let prompt = AROUND + count("userhi") + ASK;
    assert!(stats.starts_with(&format!("{prompt} prompt tokens at ")), "{stats}");
    assert!(stats.contains(&format!("cache for {} tokens, {} used: whole ", prompt + 20, prompt + 19)), "{stats}");

    let file = tiny.folder.path().join("prompt.txt");
    fs::write(&file, "a text").unwrap();
    let mut command = thinkey(tiny.folder.path());
    let piped = run(command.args(["generate", "--model"]).arg(&tiny.model).args(["--max-tokens", "20"]), "hi");
    assert_eq!(piped.ok(), format!("{answer}\n"), "standard input is the prompt");
    let both = tiny.json(&["hi", "--file", file.to_str().unwrap(), "--max-tokens", "1"]);
    assert_eq!(both["tokens"]["prompt"], prompt + count("a text\n\n"));
}

#[test]
fn a_folder_gives_the_answer_of_the_gguf_file() {
    let tiny = tiny(512);
    let folder = tempfile::tempdir().unwrap();
    // GGUF has the rotary channels of Llama interleaved, folders have them in halves; the same weights are two models. A
    // context without positions to tell apart shows that all else is equal: one token, and what follows it.
    fixture::folder(&fixture::config(512), folder.path());
    let arguments = ["a", "--raw", "--max-tokens", "1", "--json"];
    let one = tiny.json(&arguments[..4]);
    let mut command = thinkey(folder.path());
    let other = run(command.args(["generate", "--model"]).arg(folder.path()).args(arguments), "").ok();
    let other: Value = serde_json::from_str(&other).unwrap();
    assert_eq!(one["answer"], other["answer"]);
    assert_eq!(one["tokens"]["prompt"], 1);
}

#[test]
fn a_seed_repeats_and_another_does_not() {
    let tiny = tiny(512);
    let draw = |seed| tiny.generate(&["hi", "--max-tokens", "40", "--temperature", "1", "--seed", seed]).ok();
    assert_eq!(draw("1"), draw("1"));
    assert_ne!(draw("1"), draw("2"));
}

#[test]
fn a_small_context_cuts_the_answer_off() {
    let tiny = tiny(512);
    let run = tiny.generate(&["hi", "--context", "40", "--json"]);
    assert!(run.stderr.contains("cut off: the context of 40 tokens is full"), "{run:?}");
    let report: Value = serde_json::from_str(&run.ok()).unwrap();
    assert_eq!(report["end"], "context_full");
    assert_eq!((&report["cache"]["tokens"], &report["cache"]["used"]), (&40.into(), &40.into()));
}

#[test]
fn contexts_that_cannot_be_are_refused_with_the_numbers() {
    let tiny = tiny(128);
    let long = "x".repeat(200);
    let tokens = 200 + AROUND + count("user") + ASK;
    let error = tiny.generate(&[&long, "--max-tokens", "10"]).error();
    assert!(error.contains(&format!("{tokens} prompt tokens and 10 for the answer")), "{error}");
    assert!(error.contains("context of 128") && error.contains("shorten the prompt"), "{error}");
    let error = tiny.generate(&[&long, "--max-tokens", &usize::MAX.to_string()]).error();
    assert!(error.contains("context of 128"), "{error}");
    let error = tiny.generate(&["hi", "--context", "129"]).error();
    assert!(error.contains("--context 129") && error.contains("context of 128"), "{error}");
    let error = tiny.generate(&["hi", "--context", "7"]).error();
    let tokens = AROUND + count("userhi") + ASK;
    assert!(error.contains(&format!("the prompt has {tokens} tokens, more than --context 7")), "{error}");
    let error = tiny.generate(&["", "--raw", "--max-tokens", "10"]).error();
    assert!(error.contains("the prompt is empty"), "{error}");
}

#[test]
fn options_outside_their_range_are_usage_errors() {
    let tiny = tiny(512);
    for (option, value, says) in [
        ("--lambda", "1", "outside 0 ≤ λ < 1"),
        ("--lambda", "1.5", "outside 0 ≤ λ < 1"),
        ("--lambda", "-0.1", "outside 0 ≤ λ < 1"),
        ("--lambda", "half", "λ is a number"),
        ("--window", "0", "--window"),
        ("--threads", "0", "--threads"),
        ("--context", "-3", "--context"),
        ("--device", "tpu", "choose ndarray or cuda"),
        ("--kv-type", "int9", "f16"),
        ("--policy", "tokens=some", "at byte 7 of the policy"),
        ("--policy", "think,fix=lowrank,heads=query", "heads=query does not go with fix"),
    ] {
        let run = tiny.generate(&["hi", &format!("{option}={value}")]);
        assert_eq!(run.code, 2, "{run:?}");
        assert!(run.stderr.contains(says) && run.stdout.is_empty(), "{run:?}");
    }
    let error = tiny.generate(&["hi", "--top-p", "1.5"]).error();
    assert_eq!(error, "top-p of 1.5 is outside 0 to 1");
    let error = tiny.generate(&["hi", "--recent", "5000"]).error();
    assert!(error.contains("recent tokens"), "{error}");
    let error = tiny.generate(&["--file", "/nowhere/text"]).error();
    assert!(error.starts_with("cannot read /nowhere/text: "), "{error}");
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_device_that_is_not_built_in_says_what_to_do() {
    let error = tiny(512).generate(&["hello", "--device", "cuda"]).error();
    assert!(error.contains("--features cuda") && error.contains("--device ndarray"), "{error}");
}

#[test]
fn a_snapshot_is_gone_on_with_by_another_process() {
    let tiny = tiny(512);
    let file = tiny.folder.path().join("snapshot");
    let file = file.to_str().unwrap();
    let text = "the quick brown fox jumps over the lazy dog ".repeat(3);
    let whole = tiny.generate(&["--raw", &text, "--max-tokens", "60", "--context", "400"]).ok();
    let first = tiny.generate(&["--raw", &text, "--max-tokens", "20", "--context", "400", "--save", file]).ok();
    let second = tiny.generate(&["--restore", file, "", "--max-tokens", "40"]).ok();
    assert_eq!([first.trim_end_matches('\n'), &second].concat(), whole);

    let refused = |arguments: &[&str]| tiny.generate(&[&["--restore", file, "and"], arguments].concat()).error();
    assert!(refused(&["--policy", "full"]).contains("of policy "), "{}", refused(&["--policy", "full"]));
    let bytes = fs::read(file).unwrap();
    fs::write(file, &bytes[..bytes.len() - 1]).unwrap();
    assert!(refused(&[]).contains("cut off"), "{}", refused(&[]));
}
