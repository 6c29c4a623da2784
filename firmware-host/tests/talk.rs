//! The default model answers over a line as it does without one.
#![allow(missing_docs, reason = "tests")]
#![cfg(unix)]

use std::{
    io::{BufRead, BufReader, Read},
    ops::ControlFlow,
    process::{Child, Command, Stdio},
};
use thinkey::{
    engine::{Engine, EngineOptions},
    generate::{Request, generate},
    model::transformer::{RECENT, WINDOW},
    plan::Planner,
    policy::{self, Calibration},
    sample::{Sampler, Sampling},
    store::{DEFAULT, Store},
    text::{Message, Tokenizer},
    weights::Checkpoint,
};

const PROMPT: &str = "Why is the sky blue? Answer in two sentences.";
const TOKENS: usize = 40;

/// A device that is switched off when it is dropped.
struct Device {
    child: Child,
    line: String,
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(name: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_thinkey-firmware-host"));
    command.arg(name);
    command
}

fn device(arguments: &[&str]) -> Device {
    let mut child = command("run").args(["--context", "700"]).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let line = line.split_whitespace().last().expect("where it is").to_owned();
    Device { child, line }
}

/// What `talk` prints.
fn talk(to: &[&str], arguments: &[&str]) -> String {
    let output = command("talk").args(to).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The answer without a line, as `thinkey generate` makes it.
fn answer(temperature: f32, seed: u64) -> String {
    let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let calibration = Calibration::find(&checkpoint).unwrap();
    let tokenizer = Tokenizer::new(checkpoint.tokenizer().unwrap()).unwrap();
    let text = tokenizer.chat_template().unwrap().render(&[Message::user(PROMPT)], true).unwrap();
    let mut tokens = tokenizer.encode(&text, false).unwrap();
    let options = EngineOptions::default();
    let mut engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
    let policy = policy::default(checkpoint.config().head_dim, calibration.is_some(), options.device);
    let design = Planner::new(&checkpoint, calibration.as_ref()).design(policy).unwrap();
    let options = design.options(1, tokens.len() + TOKENS, RECENT, WINDOW);
    let mut session = engine.session(options, |layer, head| design.kept(layer, head)).unwrap();
    let mut sampler = Sampler::new(Sampling { temperature, seed, ..Sampling::default() }).unwrap();
    let request = Request {
        slot: 0,
        tokens: &mut tokens,
        sampler: &mut sampler,
        tokenizer: &tokenizer,
        max_tokens: TOKENS,
        continues: false,
    };
    generate(&mut engine, &mut session, request, &mut |_| ControlFlow::Continue(())).unwrap().text
}

#[test]
fn the_answer_over_tcp_and_a_pseudo_terminal_is_that_of_generate() {
    let tcp = device(&["--listen", "127.0.0.1:0"]);
    let pty = device(&["--pty"]);
    let most = TOKENS.to_string();
    for (temperature, seed) in [("0", "0"), ("1", "5")] {
        let expected = answer(temperature.parse().unwrap(), seed.parse().unwrap()) + "\n";
        assert!(expected.len() > 40, "{expected}");
        let arguments = [PROMPT, "--max-tokens", &most, "--temperature", temperature, "--seed", seed];
        assert_eq!(talk(&["--connect", &tcp.line], &arguments), expected, "TCP");
        assert_eq!(talk(&["--port", &pty.line], &arguments), expected, "a pseudo-terminal");
    }
    // The same device serves one after the other, and says what it holds.
    let report = talk(&["--connect", &tcp.line], &[PROMPT, "--max-tokens", "3", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(
        (&report["tokens"]["new"], &report["end"], &report["cache"]["tokens"]),
        (&3.into(), &"max_tokens".into(), &700.into())
    );
    let parts = report["cache_bytes"]["parts"].as_object().unwrap();
    let sum: u64 = parts.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(report["cache_bytes"]["total"], sum);
}

#[test]
fn ctrl_c_cancels_the_answer_and_not_the_device() {
    let device = device(&["--listen", "127.0.0.1:0"]);
    let mut child = command("talk")
        .args(["--connect", &device.line, "Count to a thousand.", "--max-tokens", "600"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"), "{output:?}");
    assert_eq!(talk(&["--connect", &device.line], &["--raw", "The", "--max-tokens", "0"]), "\n");
}

#[test]
fn what_the_device_refuses_is_said() {
    let device = device(&["--listen", "127.0.0.1:0"]);
    let refused = |arguments: &[&str]| {
        let output = command("talk").args(["--connect", &device.line]).args(arguments).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["hi", "--temperature=-1"]).contains("(Sampling)"));
    assert!(refused(&[&"word ".repeat(2000)]).contains("(Context)"));
    let output = command("talk").args(["--connect", "127.0.0.1:9", "hi"]).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("127.0.0.1:9"));
}
