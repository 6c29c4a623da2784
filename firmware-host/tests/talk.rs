//! The default model answers over a line as it does without one.
#![allow(missing_docs, reason = "tests")]
#![cfg(unix)]

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    ops::ControlFlow,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
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

use thinkey_firmware_host::port::{Input, Port, Pty};

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
    let context: &[&str] = if arguments.contains(&"--context") { &[] } else { &["--context", "700"] };
    let mut child = command("run").args(context).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let line = line.split_whitespace().last().expect("where it is").to_owned();
    Device { child, line }
}

/// What `talk` says that fails.
fn refused(to: &[&str], arguments: &[&str]) -> String {
    let output = command("talk").args(to).args(arguments).output().unwrap();
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
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
    let lines = talk(&["--connect", &tcp.line], &[PROMPT, "--max-tokens", "3", "--stats"]);
    assert!(lines.contains(" blocks thinned, λ = 0.4: whole ") && lines.contains("prefix keys "), "{lines}");
    let health = talk(&["--connect", &tcp.line], &["--health"]);
    assert!(
        health.starts_with("idle, up for ") && health.contains(" 4 requests ended, 0 waiting; 0 frames "),
        "{health}"
    );
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
    let refused = |arguments: &[&str]| refused(&["--connect", &device.line], arguments);
    assert!(refused(&["hi", "--temperature=-1"]).contains("(Sampling)"));
    assert!(refused(&[&"word ".repeat(2000)]).contains("(Context)"));
    let output = command("talk").args(["--connect", "127.0.0.1:9", "hi"]).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("127.0.0.1:9"));
}

/// What a document is: long enough to be thinned, and for tokens to be evicted.
fn document() -> String {
    include_str!("../../runtime/assets/pig-and-pepper.txt").chars().take(1600).collect()
}

/// A document that was read, and a device that is switched off: another goes on as the first would have.
#[test]
fn a_snapshot_goes_on_where_the_device_was_switched_off() {
    // All that a policy may change is tried on tiny models, without a line: these differ in what a snapshot holds beside keys
    // and values.
    let policies = ["full", "balanced", "tokens=snapkv(256,32,7,avg),choice=top(.5),keys=int4", "tokens=h2o(256,32)"];
    let folder = tempfile::tempdir().unwrap();
    let file = |index: usize| folder.path().join(index.to_string()).to_str().unwrap().to_owned();
    let (tcp, text) = (device(&["--listen", "127.0.0.1:0"]), document());
    let to = ["--connect", &tcp.line];
    let expected: Vec<String> = (0..)
        .zip(policies)
        .map(|(index, policy)| {
            let first = ["--raw", &text, "--max-tokens", "5", "--policy", policy, "--save", &file(index)];
            assert!(talk(&to, &first).len() > 5, "{policy}");
            talk(&to, &["--append", "", "--max-tokens", "40", "--policy", policy])
        })
        .collect();
    drop(tcp);

    // Of another context, and with another policy of its own.
    let pty = device(&["--context", "800", "--pty"]);
    let to = ["--port", &pty.line];
    for (index, (policy, expected)) in policies.iter().zip(&expected).enumerate() {
        assert!(expected.len() > 60, "{policy}: {expected}");
        let restored = talk(&to, &["--restore", &file(index), "--append", "", "--max-tokens", "40"]);
        assert_eq!(restored, *expected, "{policy}");
    }
    // A snapshot alone: to the device and back it is the same file.
    assert_eq!(talk(&to, &["--restore", &file(1)]), "");
    let again = folder.path().join("again");
    assert_eq!(talk(&to, &["--save", again.to_str().unwrap()]), "");
    let bytes = fs::read(file(1)).unwrap();
    assert!(bytes == fs::read(&again).unwrap());

    let bad = folder.path().join("bad");
    let with = |bytes: &[u8]| {
        fs::write(&bad, bytes).unwrap();
        refused(&to, &["--restore", bad.to_str().unwrap()])
    };
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 4;
    for damaged in [&bytes[..bytes.len() / 3], &flipped, b"GGUF", b""] {
        let error = with(damaged);
        assert!(error.contains("(Damaged)"), "{error}");
    }
    let mut newer = bytes.clone();
    newer[4] = 77;
    assert!(with(&newer).contains("(Foreign): the snapshot has format version 77"), "{}", with(&newer));
    drop(pty);
    let small = device(&["--context", "300", "--listen", "127.0.0.1:0"]);
    let error = refused(&["--connect", &small.line], &["--restore", &file(0)]);
    assert!(error.contains("(Context)") && error.contains("the context is 300"), "{error}");
    let error = refused(&["--connect", &small.line], &["--save", again.to_str().unwrap()]);
    assert!(error.contains("(Unsupported): the cache is empty"), "{error}");
}

/// Carries bytes between two lines for as long as the test runs.
fn join(mut one: Port, mut other: Port) {
    thread::spawn(move || {
        let mut rest = [Vec::new(), Vec::new()];
        loop {
            for (from, rest) in [&one, &other].into_iter().zip(&mut rest) {
                match from.try_next() {
                    Some(Input::Bytes(bytes)) => rest.extend(bytes),
                    Some(Input::Closed) => return,
                    Some(Input::Work) | None => {}
                }
            }
            let [up, down] = &mut rest;
            for (to, rest) in [(&mut other, up), (&mut one, down)] {
                to.write(|out| {
                    let len = rest.len().min(out.len());
                    out[..len].copy_from_slice(&rest[..len]);
                    rest.drain(..len);
                    len
                });
            }
            thread::sleep(Duration::from_micros(200));
        }
    });
}

#[test]
fn a_serial_device_and_pipes_are_lines_too() {
    let expected = talk(&["--connect", &device(&["--listen", "127.0.0.1:0"]).line], &[PROMPT, "--max-tokens", "8"]);
    let run = |arguments: &[&str]| {
        command("run")
            .args(["--context", "700"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };

    // Two pseudo-terminals, joined as by a cable.
    let (device_end, port) = Pty::open().unwrap();
    let (host_end, other) = Pty::open().unwrap();
    join(port, other);
    let child = run(&["--serial", device_end.path.to_str().unwrap()]);
    let _off = Device { child, line: String::new() };
    let line = host_end.path.to_str().unwrap();
    // The device may still be loading.
    assert_eq!(patiently(&["--port", line], &[PROMPT, "--max-tokens", "8"]), expected);

    let mut child = run(&["--stdio"]);
    let (host_end, other) = Pty::open().unwrap();
    join(Port::new(child.stdout.take().unwrap(), child.stdin.take().unwrap()), other);
    let _off = Device { child, line: String::new() };
    assert_eq!(patiently(&["--port", host_end.path.to_str().unwrap()], &[PROMPT, "--max-tokens", "8"]), expected);
}

/// What `talk` prints, where the device may take longer to begin than a host waits.
fn patiently(to: &[&str], arguments: &[&str]) -> String {
    for _ in 0..12 {
        let output = command("talk").args(to).args(arguments).output().unwrap();
        if output.status.success() {
            return String::from_utf8(output.stdout).unwrap();
        }
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("no device answers"), "{error}");
    }
    panic!("no device begins on {to:?}");
}

#[test]
fn memory_can_be_limited() {
    let output = command("run").args(["--context", "700", "--max-memory", "1MB", "--stdio"]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("more than the 1000000 of --max-memory"), "{error}");
    let needed = error.split_once(" need ").unwrap().1.split_once(" bytes").unwrap().0;
    // What is needed is enough, and a whole cache is more.
    let device = device(&["--max-memory", &format!("{needed}B"), "--listen", "127.0.0.1:0"]);
    let to = ["--connect", &device.line];
    assert_eq!(talk(&to, &["--raw", "The", "--max-tokens", "0"]), "\n");
    let error = refused(&to, &["--raw", "The", "--policy", "full"]);
    assert!(error.contains("(Memory)") && error.contains("under full need"), "{error}");
}

/// What a round trip takes is for people to read; that there are as many as asked for is not.
#[test]
fn round_trips_are_measured() {
    let device = device(&["--pty"]);
    let report = talk(&["--port", &device.line], &["--ping", "300"]);
    assert!(report.starts_with("300 round trips: median "), "{report}");
    println!("{report}");
}
