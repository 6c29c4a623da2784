//! `thinkey eval`.

use super::{
    command::{Run, run, thinkey},
    fixture,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// A folder with a tiny model of 512 tokens of context in it, and a text.
struct Tiny {
    folder: TempDir,
    model: PathBuf,
    text: PathBuf,
}

fn tiny() -> Tiny {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("tiny.gguf"), folder.path().join("text.txt"));
    fs::write(&model, fixture::gguf(&fixture::config(512)).to_bytes()).unwrap();
    let sentence = |at| format!("A sentence of number {at} that is not very long. ");
    fs::write(&text, (0..40).map(sentence).collect::<String>()).unwrap();
    Tiny { folder, model, text }
}

impl Tiny {
    fn eval(&self, what: &str, arguments: &[&str]) -> Run {
        let mut command = thinkey(self.folder.path());
        run(command.args(["eval", what]).arg(&self.model).args(["--threads", "2"]).args(arguments), "")
    }

    /// With the text.
    fn on_text(&self, what: &str, arguments: &[&str]) -> Run {
        self.eval(what, &[&["--text", self.text.to_str().unwrap()], arguments].concat())
    }

    fn report(&self, run: Run) -> Value {
        let json: Value = serde_json::from_str(&run.ok()).unwrap();
        assert_eq!(json["model"], "tiny");
        json["report"].clone()
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

fn plots(path: impl AsRef<Path>) -> usize {
    let html = fs::read_to_string(path).unwrap();
    assert!(html.starts_with("<!DOCTYPE html>") && !html.contains("<script"), "{html}");
    html.matches("<svg ").count()
}

const SMALL: [&str; 6] = ["--prefix", "200", "--predict", "10", "--windows", "3"];

#[test]
fn policies_are_compared_with_the_whole_cache() {
    let tiny = tiny();
    let html = tiny.path("report.html");
    let policies = ["--policy", "choice=top(.9),keys=int4", "--policy", "think", "--policy", "choice=top(.7)"];
    let text = tiny.on_text("ppl", &[&SMALL[..], &policies, &["--html", &html]].concat()).ok();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "tiny");
    assert!(lines[1].starts_with("3 windows of a text of ") && lines[1].contains("200 read, 10 predicted"), "{text}");
    let names = ["policy", "full", "choice=top(.9),keys=int4", "think", "choice=top(.7)"];
    assert!(lines[3..8].iter().zip(names).all(|(line, name)| line.starts_with(name)), "{text}");
    assert!(lines[4].contains("  0.00000 ± 0.00000   100.00%  "), "{text}");
    // The frontier, and perplexity by λ.
    assert_eq!(plots(html), 2);

    let report = tiny.report(tiny.on_text("ppl", &[&SMALL[..], &policies, &["--json"]].concat()));
    assert_eq!((&report["prefix"], &report["windows"]), (&200.into(), &3.into()));
    let rows = report["policies"].as_array().unwrap();
    assert!(rows.iter().zip(&names[1..]).all(|(row, name)| row["policy"] == *name), "{report}");
    let number = |row: &Value, pointer: &str| row.pointer(pointer).and_then(Value::as_f64).unwrap();
    assert_eq!(number(&rows[0], "/divergence/mean"), 0.0);
    for row in rows {
        assert!(number(row, "/perplexity/mean") > 1.0 && number(row, "/perplexity/error") > 0.0, "{row}");
        assert_eq!(row["allocated"]["tokens"], 210);
        assert_eq!((&row["planned"][0]["tokens"], &row["planned"][1]["tokens"]), (&200.into(), &8000.into()));
        assert!(number(row, "/decode_rate") > 0.0);
    }
    assert!(rows[1..].iter().all(|row| number(row, "/divergence/mean") > 0.0), "{report}");
    assert!(number(&rows[2], "/planned/1/share") < number(&rows[0], "/planned/1/share"));
    assert_eq!(rows[2]["lambda"], 0.5);
}

#[test]
fn every_policy_looks_for_the_same_numbers() {
    let tiny = tiny();
    let prompts = ["--lengths", "300,400", "--depths", "0,50,100", "--trials", "2", "--policy", "think"];
    for what in ["passkey", "needle"] {
        let html = tiny.path(what);
        let with = |more: &[&str]| {
            let arguments = [&prompts[..], more].concat();
            if what == "needle" { tiny.on_text(what, &arguments) } else { tiny.eval(what, &arguments) }
        };
        let text = with(&["--html", &html]).ok();
        assert!(text.contains(&format!("\n{what}: numbers found, of 2 by depth and length in tokens\n")), "{text}");
        assert!(text.contains("\nfull: 0 of 12 (0%)\n") && text.contains("\nthink: 0 of 12 (0%)\n"), "{text}");
        assert!(text.contains("\n  50%     0    0\n"), "{text}");
        assert_eq!(plots(html), 2);
        let report = tiny.report(with(&["--json", "--seed", "3"]));
        assert_eq!((&report["seed"], &report["lengths"][1]), (&3.into(), &400.into()));
        assert_eq!(report["policies"][1]["found"][2][1], 0);
    }
}

#[test]
fn energy_is_told_head_by_head() {
    let tiny = tiny();
    let (html, options) = (tiny.path("energy.html"), ["--tokens", "200", "--windows", "3", "--lambda", "0.5"]);
    let text = tiny.on_text("energy", &[&options[..], &["--html", &html]].concat()).ok();
    let rows: Vec<_> = text.lines().skip(3).collect();
    assert_eq!(rows.len(), 1 + 4 + 1 + 3 + 1 + 1 + 8, "{text}");
    assert!(rows[7].starts_with("scores beside the exact one: ") && rows[7].contains("all 4 heads"), "{text}");
    let names = ["score", "query", "sample(128)", "sample(256)", "sample(512)", "sketch(8)"];
    assert!(rows[9..].iter().zip(names).all(|(row, name)| row.starts_with(name)), "{text}");
    // A sample of all 200 tokens is exact.
    assert_eq!(rows[12].split_whitespace().collect::<Vec<_>>()[..3], ["sample(256)", "100.0%", "100.0%"], "{text}");
    assert!(rows[0].starts_with("layer  head  rank of logits  centred  rank of keys  best 10%"), "{text}");
    assert!(
        rows[1].starts_with("0         0") && rows[4].starts_with("1         1") && rows[5].starts_with("mean"),
        "{text}"
    );
    assert_eq!(plots(html), 4);
    let few = ["--scores", "l2,random(3)", "--json"];
    let report = tiny.report(tiny.on_text("energy", &[&options[..], &few].concat()));
    let scores = report["scoring"]["scores"].as_array().unwrap();
    assert!(scores.iter().map(|row| &row["score"]).eq(["l2", "random(3)"]), "{report}");
    assert!(scores[0]["overlap"]["mean"].as_f64() > scores[1]["overlap"]["mean"].as_f64(), "{report}");
    let refused = tiny.on_text("energy", &["--scores", "sample(0)"]);
    assert!(refused.code == 2 && refused.stderr.contains("needs a token to score by"), "{refused:?}");
    assert_eq!((&report["head_dim"], report["heads"].as_array().unwrap().len()), (&16.into(), 4));
    let one = tiny.report(tiny.on_text("energy", &["--tokens", "200", "--windows", "1", "--json"]));
    assert_eq!(one["heads"][0]["overlap"], Value::Null, "one mask has nothing to be compared with");
}

#[test]
fn what_cannot_be_measured_is_one_line() {
    let tiny = tiny();
    let think = ["--policy", "think"];
    let ppl = |arguments: &[&str]| tiny.on_text("ppl", &[arguments, &think].concat()).error();
    let needed = fixture::count(&fs::read_to_string(&tiny.text).unwrap());
    let error = ppl(&["--prefix", "500", "--predict", "12", "--windows", "200"]);
    assert!(error.contains("windows are so close in a text of this length"), "{error}");
    assert!(
        ppl(&["--prefix", "500", "--predict", "13"]).contains("513 tokens are more than the model's context of 512")
    );
    assert!(
        ppl(&["--windows", "0", "--prefix", "9", "--predict", "9"]).contains("number of windows must be at least 1")
    );
    assert!(ppl(&["--predict", "0"]).contains("the number of predictions must be at least 1"));
    let error = ppl(&["--prefix", "9", "--predict", "9", "--policy", "balanced"]);
    assert!(error.starts_with("policy balanced: this model is not calibrated: "), "{error}");
    let error = tiny.on_text("energy", &["--tokens", "512", "--windows", "99"]).error();
    assert!(error.contains(&format!("ask for at most {}", needed / 512)), "{error}");

    let short = tiny.path("short.txt");
    fs::write(&short, "hello").unwrap();
    let on_short = |what: &str, more: &[&str]| tiny.eval(what, &[&["--text", &short], more].concat()).error();
    let error = on_short("ppl", &[&SMALL[..], &think].concat());
    assert_eq!(error, "211 tokens of text are needed, and there are 4; give a longer text, or ask for fewer tokens");
    assert!(on_short("needle", &[&["--lengths", "300"][..], &think].concat()).contains("and there are "));
    let error = tiny.eval("passkey", &[&["--lengths", "30"][..], &think].concat()).error();
    assert!(error.starts_with("a prompt of 30 tokens has no room: fact and question need "), "{error}");
    let error = tiny.eval("ppl", &[&["--text", &tiny.path("none")][..], &think].concat()).error();
    assert!(error.starts_with("cannot read ") && error.contains("none"), "{error}");
    let error = ppl(&["--html", &tiny.path("no/such.html")]);
    assert!(error.starts_with("cannot write ") && error.contains("such.html"), "{error}");
}

#[test]
fn policies_that_are_none_are_refused() {
    let tiny = tiny();
    for (policy, says) in [
        ("best", "at byte 0 of the policy: expected slot=value, or full, think"),
        ("choice=top(2)", "at byte "),
        ("choice=whole,fix=compensated", "choice=whole does not go with fix"),
    ] {
        let run = tiny.on_text("ppl", &["--policy", policy]);
        assert_eq!(run.code, 2, "{run:?}");
        assert!(run.stderr.contains(says) && run.stdout.is_empty(), "{run:?}");
    }
    let run = tiny.on_text("ppl", &[]);
    assert!(run.code == 2 && run.stderr.contains("--policy <POLICY>"), "{run:?}");
}
