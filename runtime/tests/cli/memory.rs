//! What a long prompt takes, on the default model; it is fetched if it is not in the store.

use super::command::{Run, run};
use serde_json::Value;
use std::process::Command;

/// The chapter that ships with the command.
const TEXT: &str = include_str!("../../assets/pig-and-pepper.txt");

#[test]
fn a_prompt_of_4096_tokens_stays_within_plan_and_300_megabytes() {
    let text = TEXT.repeat(2);
    let text: String = text.chars().take(16_200).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_thinkey"));
    command.args(["generate", "--raw", "--max-tokens", "8", "--lambda", "0.5", "--kv-type", "f16", "--json"]);
    let run: Run = run(&mut command, &text);
    let report: Value = serde_json::from_str(&run.ok()).unwrap();
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{report}"));
    let prompt = number("/tokens/prompt");
    assert!((4096..4400).contains(&prompt), "{prompt} tokens");
    let (whole, measured) = (number("/cache_bytes/whole"), number("/cache_bytes/measured"));
    assert_eq!(measured, number("/cache_bytes/planned"));
    assert!(measured as f64 <= 0.78 * whole as f64, "{measured} of {whole}");
    let (peak, planned) = (number("/peak_bytes"), number("/memory_bytes/planned"));
    // The program and its tokenizer come on top.
    assert!(peak <= planned + 40_000_000, "{peak} bytes, {planned} planned");
    assert!(peak <= 300_000_000, "{peak} bytes");
}
