//! Shipped scenarios, through the command.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use thinkey_firmware_host::sim::{self, Scenario};

fn scenario(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios").join(name)
}

fn run(arguments: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_thinkey-firmware-host")).arg("sim").args(arguments).output().unwrap()
}

/// The issue's case: 16k tokens of a Llama-3.1-8B in 4 bits on an Orin Nano of 8 GB.
#[test]
fn the_whole_cache_does_not_fit_beside_the_weights_and_balanced_does() {
    let path = scenario("orin-nano-8gb-long-prompt.toml");
    let output = run(&[&path, Path::new("--json")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let budget = report["budget"].as_u64().unwrap();
    let [full, balanced] = ["full", "balanced"]
        .map(|name| report["policies"].as_array().unwrap().iter().find(|policy| policy["policy"] == name).unwrap());
    let bytes = |policy: &serde_json::Value, part: &str| policy["parts"][part].as_u64().unwrap();
    assert!(bytes(full, "total") > budget && full["fits"] == false);
    assert!(bytes(balanced, "total") <= budget && balanced["fits"] == true);
    // What the whole cache takes is known by hand: 32 layers, 8 heads, 128 channels, keys and values, 2 bytes, 16,896 tokens.
    let whole = 32 * 8 * 128 * 2 * 2 * 16_896;
    assert_eq!(full["whole"].as_u64(), Some(whole));
    assert!((whole..whole + whole / 50).contains(&bytes(full, "cache")));
    assert!(bytes(balanced, "cache") < whole * 3 / 10);
    assert!(full["answers"][0]["tokens"] == 0 && balanced["answers"][0]["tokens"] == 256);
    // Neither weights and whole cache alone would fit beside nothing else.
    assert_eq!(bytes(full, "weights"), bytes(balanced, "weights"));
}

#[test]
fn every_shipped_scenario_comes_out_as_it_says_and_twice_the_same() {
    for file in fs::read_dir(scenario("")).unwrap() {
        let path = file.unwrap().path();
        let [first, second] = [(); 2].map(|()| run(&[&path]));
        assert!(first.status.success(), "{}\n{}", path.display(), String::from_utf8_lossy(&first.stdout));
        assert_eq!(first.stdout, second.stdout, "{}", path.display());
    }
}

#[test]
fn the_scenario_of_the_readme_comes_out_as_it_says() {
    let readme = include_str!("../README.md");
    let text = readme.split_once("```toml\n").unwrap().1.split_once("```").unwrap().0;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("readme.toml");
    fs::write(&path, text).unwrap();
    let output = run(&[&path]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    // And what it shows of a shipped one is what that shows.
    let shown = String::from_utf8(run(&[&scenario("orin-nano-8gb-long-prompt.toml")]).stdout).unwrap();
    assert!(readme.contains(shown.trim_end()), "{shown}");
}

#[test]
fn what_is_not_met_fails_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.toml");
    let text = fs::read_to_string(scenario("orin-nano-8gb-long-prompt.toml")).unwrap();
    fs::write(&path, text.replace("fits = false", "fits = true")).unwrap();
    let output = run(&[&path]);
    assert_eq!(output.status.code(), Some(1));
    let (shown, error) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(shown.contains("NOT MET full: does not fit (expected: fits)"), "{shown}");
    assert!(error.contains("1 of 4 expectations are not met"), "{error}");
    // A file that is none, one that is not there, and a board that nobody knows.
    fs::write(&path, "name = 3").unwrap();
    assert_eq!(run(&[&path]).status.code(), Some(1));
    assert_eq!(run(&[Path::new("nowhere.toml")]).status.code(), Some(1));
    fs::write(&path, text.replace("orin-nano-8gb", "orin")).unwrap();
    let error = String::from_utf8(run(&[&path]).stderr).unwrap();
    assert!(error.contains("there is no board \"orin\""), "{error}");
}

#[test]
fn the_page_holds_everything_and_fetches_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let output = run(&[&scenario("orin-nano-8gb-long-prompt.toml"), Path::new("--html"), &page]);
    assert!(output.status.success());
    let html = fs::read_to_string(&page).unwrap();
    assert!(html.contains("<svg") && html.contains("balanced") && html.contains("does not fit"));
    for fetched in ["<script", "<link", "src=", "href="] {
        assert!(!html.contains(fetched), "{fetched}");
    }
}

/// Power that is cut and memory that goes, by hand: a prompt of 512 tokens and 9 steps of a model whose bytes are known.
#[test]
fn cuts_begin_anew_and_memory_that_goes_ends_an_answer() {
    let text = |more: &str| {
        format!(
            "name='a'\nboard='orin-nano-4gb'\nmodel='smollm2-135m'\npolicies=['full']\ncontext=1000\n\
             [[request]]\nprompt=512\ntokens=10\n{more}"
        )
    };
    let run = |more: &str| {
        let scenario = Scenario::parse(&text(more), Path::new("a.toml")).unwrap();
        sim::run(&scenario, Path::new("."), &mut |_, _| {}).unwrap().policies.remove(0)
    };
    let calm = run("");
    let answer = calm.answers[0];
    assert_eq!((answer.tokens, answer.restarts, calm.broken.len()), (10, 0, 0));
    // 134.5 million weights of 5 bits at 34 GB/s are 2.5 ms.
    let step = answer.step.0.as_secs_f64();
    assert!((0.0024..0.0035).contains(&step), "{step}");

    let cut = run("[[cut]]\nat='10ms'\ndown='3s'\n");
    assert_eq!((cut.answers[0].tokens, cut.answers[0].restarts), (10, 1));
    assert!(cut.answers[0].first.0.as_secs_f64() > 3.0);

    let shrunk = run("[[shrink]]\nat='10ms'\nby='4GiB'\n[[expect]]\nbroken=0\n");
    assert_eq!(shrunk.broken.len(), 1);
    assert!((1..10).contains(&shrunk.answers[0].tokens));
}
