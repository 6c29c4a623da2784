//! `thinkey calibrate`, and tables of a λ a layer.

use super::{
    command::{Run, run, thinkey},
    fixture,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn command(folder: &Path, arguments: &[&str]) -> Run {
    run(thinkey(folder).args(arguments), "")
}

#[test]
fn what_was_measured_is_shown_again_and_its_layers_are_a_policy() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let (model, text) = (path("tiny.gguf"), path("text.txt"));
    fs::write(&model, fixture::gguf(&fixture::config(512)).to_bytes()).unwrap();
    let sentence = |at| format!("A sentence of number {at} that is not very long. ");
    fs::write(&text, (0..40).map(sentence).collect::<String>()).unwrap();
    let [model, text] = [model, text].map(|path| path.to_str().unwrap().to_owned());
    let calibrate = |more: &[&str]| command(folder.path(), &[&["calibrate", "--model", &model], more].concat());

    let error = calibrate(&[]).error();
    assert!(error.starts_with("this model is not calibrated: "), "{error}");
    assert_eq!(calibrate(&["--out", "x"]).code, 2, "without a text there is nothing to write");
    let measured = calibrate(&["--text", &text, "--windows", "2", "--tokens", "150", "--json"]).ok();
    let measured: Value = serde_json::from_str(&measured).unwrap();
    assert_eq!(measured["path"], path("tiny.calibration.json").to_str().unwrap());
    let shown: Value = serde_json::from_str(&calibrate(&["--json"]).ok()).unwrap();
    assert_eq!((&shown["path"], &shown["tables"]), (&Value::Null, &measured["tables"]));
    assert_eq!((&shown["windows"], &shown["tokens"]), (&2.into(), &150.into()));
    let text = calibrate(&[]).ok();
    assert!(text.starts_with("measured before: 2 windows of 150 tokens\n"), "{text}");

    // Heads of 16 channels keep 8 at least: no table beyond λ = .5, where there is no choice.
    let tables = shown["tables"].as_array().unwrap();
    assert_eq!(tables.iter().map(|table| table["lambda"].as_f64().unwrap()).collect::<Vec<_>>(), [0.3, 0.4, 0.5]);
    let layers = tables[2]["layers"].as_str().unwrap();
    assert_eq!(layers, "choice=layers(2*.5)");
    assert!(text.contains("\n  one T a layer: choice=layers(2*.5)\n"), "{text}");

    let plan = |policy: &str| command(folder.path(), &["plan", &model, "--policy", policy, "--json"]);
    let cache = |policy: &str| -> Value {
        let report: Value = serde_json::from_str(&plan(policy).ok()).unwrap();
        report["bytes"]["cache"]["total"].clone()
    };
    assert_eq!(cache(layers), cache("choice=top(.5)"));
    assert!(cache("choice=layers(.25,.5)").as_u64() > cache(layers).as_u64());
    let error = plan("choice=layers(3*.5)").error();
    assert!(error.contains("choice=layers has a λ for 3 layers, and the model has 2"), "{error}");
    let answer = command(
        folder.path(),
        &[
            "generate",
            "--model",
            &model,
            "hi",
            "--max-tokens",
            "4",
            "--policy",
            "choice=layers(.25,.5),keys=int4",
            "--json",
        ],
    );
    let answer: Value = serde_json::from_str(&answer.ok()).unwrap();
    assert_eq!(answer["cache_bytes"]["measured"], answer["cache_bytes"]["planned"]);
}
