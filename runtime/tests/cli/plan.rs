//! `thinkey plan`, `--max-memory` and `--lambda auto`.

use super::{
    command::{Run, run, thinkey},
    fixture,
};
use serde_json::Value;
use std::{fs, path::PathBuf};
use tempfile::TempDir;

/// A folder with a tiny model of 512 tokens of context in it.
struct Tiny {
    folder: TempDir,
    model: PathBuf,
}

fn tiny() -> Tiny {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf");
    fs::write(&model, fixture::gguf(&fixture::config(512)).to_bytes()).unwrap();
    Tiny { folder, model }
}

/// All with a policy whose bytes fall with every channel: corrections, the default, are more than the keys of a tiny context.
impl Tiny {
    fn plan(&self, arguments: &[&str]) -> Run {
        let mut command = thinkey(self.folder.path());
        run(command.arg("plan").arg(&self.model).args(["--threads", "2", "--policy", "think"]).args(arguments), "")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.plan(&[arguments, &["--json"]].concat()).ok()).unwrap()
    }

    fn command(&self, command: &str, arguments: &[&str], input: &str) -> Run {
        let mut thinkey = thinkey(self.folder.path());
        let model = thinkey.arg(command).arg("--model").arg(&self.model);
        run(model.args(["--threads", "2", "--max-tokens", "4", "--policy", "think"]).args(arguments), input)
    }

    /// Bytes planned for a context and a λ.
    fn total(&self, context: usize, lambda: f64) -> usize {
        let (context, lambda) = (context.to_string(), lambda.to_string());
        number(&self.json(&["--context", &context, "--lambda", &lambda]), "/bytes/total")
    }
}

fn number(report: &Value, pointer: &str) -> usize {
    report.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer} of {report}")) as usize
}

#[test]
fn parts_sum_up_and_are_what_is_allocated() {
    let tiny = tiny();
    let report = tiny.json(&["--lambda", "0.6", "--context", "500"]);
    for plan in ["bytes", "lambda_0_bytes"] {
        let mut total = 0;
        for (group, parts) in report[plan].as_object().unwrap().iter().filter(|(_, parts)| parts.is_object()) {
            let parts = parts.as_object().unwrap();
            let sum: u64 =
                parts.iter().filter(|(name, _)| *name != "total").map(|(_, bytes)| bytes.as_u64().unwrap()).sum();
            assert_eq!(parts["total"], sum, "{group}");
            total += sum;
        }
        assert_eq!(report[plan]["total"], total);
        let mapped = fs::metadata(&tiny.model).unwrap().len();
        assert_eq!(report[plan]["weights"]["mapped"], mapped);
        assert_eq!(report[plan]["heap"], total - mapped);
    }
    // Layers, KV heads, channels, keys and values of two bytes.
    assert_eq!(report["whole_cache_bytes"], 2 * 2 * 16 * 2 * 2 * 500);

    let answer = tiny.command("generate", &["hi", "--lambda", "0.6", "--context", "500", "--json"], "").ok();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["cache_bytes"]["measured"], report["bytes"]["cache"]["total"]);
    // The prompt of the plan is the whole context.
    assert!(number(&answer, "/memory_bytes/planned") < number(&report, "/bytes/total"));
    assert_eq!((&answer["memory_bytes"]["allowed"], &answer["cache"]["lambda_auto"]), (&Value::Null, &false.into()));
}

#[test]
fn the_table_shows_what_the_json_tells() {
    let tiny = tiny();
    let arguments = ["--context", "500", "--batch", "3", "--kv-type", "f32", "--memory", "1MB"];
    let text = tiny.plan(&arguments).ok();
    let report = tiny.json(&arguments);
    let rows = |name: &str| -> Vec<Vec<String>> {
        let rows = text.lines().filter(|line| line.trim_start().starts_with(name));
        rows.map(|line| line[26..].split("  ").map(str::trim).filter(|it| !it.is_empty()).map(String::from).collect())
            .collect()
    };
    assert_eq!(text.lines().next().unwrap().split("  ").next(), Some("tiny"));
    for name in ["mapped", "prefix keys", "recent tokens", "masks", "packed keys", "logits", "total"] {
        assert_eq!(rows(name)[0].len(), 2, "{name} in {text}");
    }
    let fits = &report["fits"];
    assert_eq!(fits["memory"], 1_000_000);
    for (row, name) in [("longest context", "longest_context"), ("largest batch", "largest_batch")] {
        let told =
            [&fits[name], &fits["lambda_0"][name]].map(|most| most.as_u64().map_or("none".into(), |n| n.to_string()));
        assert_eq!(rows(row)[0], told, "{text}");
    }
    let policy = report["policy"].as_str().unwrap();
    assert!(policy.ends_with("keys=f32,values=f32"), "{policy}");
    assert!(text.contains(&format!("\n3 × 500 tokens, the newest 32 whole, {policy}, 2 threads; ")), "{text}");
    assert_eq!(report["batch"], 3);
    assert!(!tiny.plan(&[]).ok().contains("longest context"), "without --memory nothing is searched");
}

#[test]
fn what_is_said_to_fit_fits_and_no_more_does() {
    let tiny = tiny();
    let budget = (tiny.total(400, 0.9) + tiny.total(400, 0.0)) / 2;
    let memory = budget.to_string();
    let report = tiny.json(&["--memory", &memory, "--context", "400", "--lambda", "0.2"]);
    let context = number(&report, "/fits/longest_context");
    assert!(tiny.total(context, 0.2) <= budget && tiny.total(context + 1, 0.2) > budget, "{report}");
    let lambda = report["fits"]["smallest_lambda"].as_f64().unwrap();
    assert!(tiny.total(400, lambda) <= budget && tiny.total(400, lambda - 0.001) > budget, "{report}");
    let whole = number(&report, "/fits/lambda_0/longest_context");
    assert!(whole < context && tiny.total(whole, 0.0) <= budget && tiny.total(whole + 1, 0.0) > budget, "{report}");
}

#[test]
fn too_much_is_refused_before_loading_with_the_ways_out() {
    let tiny = tiny();
    // A chat plans for its context, read at once.
    let (needed, allowed) = (tiny.total(400, 0.0), tiny.total(400, 0.5));
    let memory = ["--max-memory", &allowed.to_string()];
    let chat = |arguments: &[&str]| tiny.command("chat", &[&memory, arguments].concat(), "hi\n");
    let error = chat(&["--context", "400", "--lambda", "0"]).error();
    assert!(error.starts_with(&format!("400 tokens need {needed} bytes (")), "{error}");
    assert!(error.contains(&format!("more than the {allowed} (")) && error.contains("a smaller model"), "{error}");
    let after = |option: &str| error.split_once(option).unwrap().1.split([' ', ',']).next().unwrap();
    let (context, lambda) = (after("--context "), after("--lambda "));
    chat(&["--lambda", "0", "--context", context]).ok();
    chat(&["--context", "400", "--lambda", lambda]).ok();
    let longer = (context.parse::<usize>().unwrap() + 1).to_string();
    chat(&["--lambda", "0", "--context", &longer]).error();
    let less = (lambda.parse::<f64>().unwrap() - 0.001).to_string();
    chat(&["--context", "400", "--lambda", &less]).error();

    let error = tiny.command("generate", &["hi", "--max-memory", "1KiB"], "").error();
    assert!(error.contains("no --context is short enough and no --lambda is enough: give a smaller model"), "{error}");
}

#[test]
fn lambda_auto_is_the_smallest_that_fits() {
    let tiny = tiny();
    let memory = ((tiny.total(400, 0.9) + tiny.total(400, 0.0)) / 2).to_string();
    let smallest = tiny.json(&["--memory", &memory, "--context", "400"])["fits"]["smallest_lambda"].as_f64().unwrap();
    assert!(smallest > 0.0 && smallest < 0.9);
    let auto = ["--lambda", "auto", "--max-memory", &memory, "--context", "400"];
    let chat = tiny.command("chat", &[&auto[..], &["--stats"]].concat(), "hi\n");
    assert!(chat.stderr.starts_with(&format!("thinkey: λ = {smallest} is the smallest that fits ")), "{chat:?}");
    assert!(chat.clone().ok().contains(&format!(" allowed, λ = {smallest} chosen\n")), "{chat:?}");

    let generate = tiny.command("generate", &[&["hi", "--json"], &auto[..]].concat(), "");
    let report: Value = serde_json::from_str(&generate.ok()).unwrap();
    assert_eq!(report["cache"]["lambda_auto"], true);
    let found = report["cache"]["lambda"].as_f64().unwrap();
    assert!(found <= smallest, "a short prompt leaves more for the cache: {report}");
    assert!(number(&report, "/memory_bytes/planned") <= number(&report, "/memory_bytes/allowed"), "{report}");
    assert_eq!(report["cache_bytes"]["planned"], report["cache_bytes"]["measured"]);

    let error = tiny.command("generate", &["hi", "--lambda", "auto"], "").error();
    assert!(error.contains("give --max-memory SIZE, or a λ"), "{error}");
}

#[test]
fn bad_numbers_are_refused() {
    let tiny = tiny();
    for (option, value, says) in [
        ("--memory", "2G", "not \"2G\""),
        ("--memory", "0", "outside what memory can be"),
        ("--batch", "0", "--batch"),
        ("--context", "0", "--context"),
        ("--lambda", "auto", "λ is a number"),
    ] {
        let run = tiny.plan(&[option, value]);
        assert_eq!(run.code, 2, "{run:?}");
        assert!(run.stderr.contains(says) && run.stdout.is_empty(), "{run:?}");
    }
    let error = tiny.plan(&["--context", "513"]).error();
    assert!(error.contains("--context 513") && error.contains("context of 512"), "{error}");
    assert!(tiny.plan(&["--recent", "5000"]).error().contains("recent tokens"));
    assert!(tiny.plan(&["--batch", "70000"]).error().contains("slots"));
    let error = tiny.command("generate", &["hi", "--max-memory", "1GiB", "--device", "cuda"], "").error();
    assert!(error.contains("--device ndarray"), "{error}");
}
