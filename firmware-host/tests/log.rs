//! The log of a real firmware: core's freestanding binary, built with its feature `defmt` and run here.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use proptest::prelude::*;
use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::Duration,
};
use thinkey_core::link::{
    Device, Engine,
    engine::Step,
    message::{Capabilities, Code, Failure, Snapshot, Start, Stats},
    reliable::Timing,
};
use thinkey_firmware_host::{
    log::{Level, LogDecoder, LogError, MAX_FRAME, Record},
    port::Port,
    serve::{Clock, serve},
};

/// What one run of the firmware left.
struct Run {
    elf: PathBuf,
    decoder: LogDecoder,
    results: String,
    frames: Vec<u8>,
    records: Vec<Record>,
}

fn run() -> &'static Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(|| {
        let elf = build();
        let output = Command::new(&elf).output().unwrap();
        assert!(output.status.success(), "{}", output.status);
        let decoder = LogDecoder::new(&fs::read(&elf).unwrap()).unwrap();
        let records = decoder.stream(Level::Trace).decode(&output.stderr);
        Run { elf, decoder, results: String::from_utf8(output.stdout).unwrap(), frames: output.stderr, records }
    })
}

/// Builds the firmware; the path of its ELF file.
///
/// The target directory is one of its own: the cargo that runs this test may hold the lock of the usual one.
fn build() -> PathBuf {
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--release", "--locked", "--features", "defmt", "--message-format=json-render-diagnostics"])
        .args(["--target-dir", concat!(env!("CARGO_TARGET_TMPDIR"), "/freestanding")])
        .current_dir(root().join("core/freestanding"))
        .env("DEFMT_LOG", "trace")
        .env_remove("CARGO_BUILD_TARGET")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "the firmware does not build: {}", output.status);
    let messages = String::from_utf8(output.stdout).unwrap();
    let executable = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).unwrap();
        Some(message["executable"].as_str()?.into())
    });
    executable.expect("cargo names the executable")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Where each frame of `frames` ends, its zero byte included.
fn ends(frames: &[u8]) -> Vec<usize> {
    (1..frames.len()).filter(|&at| frames[at] == 0).map(|at| at + 1).collect()
}

fn decode(frames: &[u8]) -> Vec<Record> {
    run().decoder.stream(Level::Trace).decode(frames)
}

#[test]
fn the_log_says_what_the_scenario_does() {
    // A prompt of 120 tokens leaves 32 whole: 88 go into three blocks, of half of 64 channels (lambda .5). The ring of 64
    // overflows at the 33rd token of the answer and every 32 tokens from there: three times in 100.
    let flush = "thinned 32 tokens into 1 blocks of 32 channels";
    let layout = "HeadLayout { head_dim: 64, kept: 32, sinks: 0, recent: 32, fix: None, kept_values: 64, renews: false, slots: 1, pages: 8, keys: F16, values: F16, ranked: 0 }";
    let sum = run().results.strip_prefix("checksum ").unwrap().trim_end();
    let (select, cache, main) = ("thinkey_core::channel::select", "thinkey_core::cache", "thinkey_freestanding");
    let expected = [
        (Level::Info, main, layout),
        (Level::Debug, select, "selected 32 of 64 channels"),
        (Level::Debug, cache, "thinned 88 tokens into 3 blocks of 32 channels"),
        (Level::Debug, cache, flush),
        (Level::Debug, cache, flush),
        (Level::Debug, cache, flush),
        (Level::Info, main, &format!("checksum {sum}")),
    ];
    assert_eq!(run().records.len(), expected.len(), "{:#?}", run().records);
    for (step, (record, (level, module, message))) in run().records.iter().zip(expected).enumerate() {
        assert_eq!(record.timestamp, Some(step.to_string()));
        assert_eq!((record.level, record.message.as_str()), (Some(level), message));
        let location = record.location.as_ref().unwrap();
        assert!(location.module.starts_with(module), "{location:?}");
        let source = fs::read_to_string(&location.file).unwrap();
        let line = source.lines().nth(location.line as usize - 1).unwrap();
        assert!(line.contains(if level == Level::Debug { "debug!(" } else { "info!(" }), "{location:?}: {line}");
    }
}

#[test]
fn logging_changes_no_result() {
    let test = fs::read_to_string(root().join("core/tests/freestanding.rs")).unwrap();
    let sum = test.lines().find_map(|line| line.strip_prefix("const CHECKSUM: u64 = 0x")).unwrap();
    assert_eq!(run().results, format!("checksum {}\n", sum.replace(['_', ';'], "")));
}

#[test]
fn a_level_leaves_out_what_is_below() {
    for (least, count) in [(Level::Debug, 7), (Level::Info, 2), (Level::Warn, 0)] {
        let records = run().decoder.stream(least).decode(&run().frames);
        assert_eq!(records.len(), count);
        assert!(records.iter().all(|record| record.level >= Some(least)));
    }
}

#[test]
fn a_flipped_bit_costs_no_other_frame() {
    let Run { frames, records, .. } = run();
    let ends = ends(frames);
    for bit in 0..frames.len() * 8 {
        let at = bit / 8;
        let mut damaged = frames.clone();
        damaged[at] ^= 1 << (bit % 8);
        let decoded = decode(&damaged);
        // The frame that the bit is in; a lost separator joins it and the next.
        let before = ends.iter().filter(|&&end| end <= at).count();
        let after = (ends.iter().filter(|&&end| end <= at + 1).count() + 1).min(records.len());
        assert!(decoded.starts_with(&records[..before]), "bit {bit}");
        assert!(decoded.ends_with(&records[after..]), "bit {bit}");
        assert!(decoded.len() >= before + records.len() - after, "bit {bit}");
    }
}

#[test]
fn a_stream_cut_anywhere_keeps_its_whole_frames() {
    let Run { frames, records, decoder, .. } = run();
    let ends = ends(frames);
    for cut in 0..=frames.len() {
        let whole = ends.iter().filter(|&&end| end <= cut).count();
        let mut stream = decoder.stream(Level::Trace);
        assert_eq!(stream.decode(&frames[..cut]), records[..whole], "cut {cut}");
        let start = if whole == 0 { 1.min(cut) } else { ends[whole - 1] };
        assert_eq!((stream.malformed(), stream.pending()), (0, cut - start), "cut {cut}");

        let rest = decode(&frames[cut..]);
        assert!(rest.ends_with(&records[(whole + 1).min(records.len())..]), "from {cut}");
    }
}

#[test]
fn a_stream_without_frames_is_given_up_until_the_next_begins() {
    let Run { frames, records, decoder, .. } = run();
    let mut stream = decoder.stream(Level::Trace);
    for _ in 0..3 {
        assert!(stream.decode(&[1; MAX_FRAME]).is_empty());
    }
    assert_eq!(stream.decode(frames), *records);
    assert_eq!((stream.malformed(), stream.pending()), (1, 0));
}

proptest! {
    #[test]
    fn bytes_may_arrive_in_any_pieces(pieces in prop::collection::vec(1usize..20, 1..50)) {
        let Run { frames, records, decoder, .. } = run();
        let (mut stream, mut rest, mut decoded) = (decoder.stream(Level::Trace), &frames[..], Vec::new());
        for piece in pieces {
            let (now, later) = rest.split_at(piece.min(rest.len()));
            decoded.extend(stream.decode(now));
            rest = later;
        }
        decoded.extend(stream.decode(rest));
        prop_assert_eq!(&decoded, records);
        prop_assert_eq!(stream.malformed(), 0);
    }

    #[test]
    fn noise_never_panics_and_loses_no_frame_after_it(
        noise in prop::collection::vec(prop_oneof![Just(0u8), 0u8..16, any::<u8>()], 0..300),
    ) {
        let Run { frames, records, .. } = run();
        let stream = [&noise[..], frames].concat();
        prop_assert!(decode(&stream).ends_with(records));
    }

    #[test]
    fn damaged_firmware_files_never_panic(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30)) {
        let mut elf = elf();
        for (at, byte) in damage {
            let at = at.index(elf.len());
            elf[at] = byte;
        }
        if let Ok(decoder) = LogDecoder::new(&elf) {
            decoder.stream(Level::Trace).decode(&run().frames);
        }
    }
}

fn elf() -> Vec<u8> {
    fs::read(&run().elf).unwrap()
}

/// The firmware's file with a symbol renamed, in the symbol table and wherever else its name stands.
fn renamed(from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut elf = elf();
    let places: Vec<usize> = (0..elf.len() - from.len()).filter(|&at| elf[at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    for at in places {
        elf[at..at + to.len()].copy_from_slice(to);
    }
    elf
}

#[test]
fn files_that_explain_no_log_are_refused() {
    assert!(matches!(LogDecoder::new(b"no ELF file"), Err(LogError::Elf { .. })));
    assert!(matches!(LogDecoder::new(&elf()[..4000]), Err(LogError::Elf { .. })));
    let without = fs::read(env::current_exe().unwrap()).unwrap();
    assert!(matches!(LogDecoder::new(&without), Err(LogError::NoStatements)));

    let version = LogDecoder::new(&renamed(b"_defmt_version_ = 4", b"_defmt_version_ = 9")).unwrap_err();
    assert!(matches!(version, LogError::Version { .. }), "{version:?}");
    assert!(version.to_string().contains("firmware is using 9"), "{version}");

    let raw = LogDecoder::new(&renamed(b"_defmt_encoding_ = rzcobs\0", b"_defmt_encoding_ = raw\0")).unwrap_err();
    assert!(matches!(raw, LogError::Encoding), "{raw:?}");
}

/// The command `log` for the firmware.
fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_thinkey-firmware-host"));
    command.args(["log", "--elf"]).arg(&run().elf).current_dir(root());
    command
}

#[test]
fn the_command_prints_a_line_a_record() {
    let frames = Path::new(env!("CARGO_TARGET_TMPDIR")).join("frames.bin");
    fs::write(&frames, [&run().frames[..], &[9, 9, 9, 0, 7]].concat()).unwrap();

    let output = command().args(["--level", "debug"]).arg(&frames).output().unwrap();
    let (text, notes) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{notes}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 7, "{text}");
    let select = run().records[1].location.as_ref().unwrap();
    let expected =
        format!("1 DEBUG {} selected 32 of 64 channels (core/src/channel/select.rs:{})", select.module, select.line);
    assert_eq!(lines[1], expected);
    assert!(notes.contains("1 malformed frames") && notes.contains("last 1 bytes"), "{notes}");

    let output = command().args(["--level", "info", "--json"]).arg(&frames).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
    assert_eq!(text.lines().count(), 2);
    assert_eq!((&last["timestamp"], &last["level"]), (&"6".into(), &"info".into()));
    assert!(last["line"].as_u64().unwrap() > 0 && last["file"].as_str().unwrap().ends_with("main.rs"), "{last}");
}

#[test]
fn records_are_printed_as_soon_as_they_are_whole() {
    let mut child = command().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || BufReader::new(output).lines().try_for_each(|line| sender.send(line.unwrap())));

    let Run { frames, records, .. } = run();
    let mut start = 0;
    for (end, record) in ends(frames).into_iter().zip(records) {
        input.write_all(&frames[start..end]).unwrap();
        start = end;
        let line = lines.recv_timeout(Duration::from_secs(30)).expect("a line while the input is still open");
        assert!(line.contains(&record.message), "{line}");
    }
    drop(input);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_missing_file_is_named() {
    let mut child = command();
    let output = child.arg("no such frames").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("no such frames"));
}

/// The frames of the firmware, logged by a device at the other end of a link.
#[test]
fn a_log_comes_over_a_link() {
    struct Nothing;
    impl Engine for Nothing {
        fn capabilities(&self) -> Capabilities<'_> {
            Capabilities { model: "nothing", ..Capabilities::default() }
        }
        fn start(&mut self, _: &Start<'_>) -> Result<(), Failure> {
            Err(Failure::new(Code::Unsupported, "nothing"))
        }
        fn prompt(&mut self, _: &[u8]) -> Result<(), Failure> {
            Ok(())
        }
        fn begin(&mut self) -> Result<(), Failure> {
            Ok(())
        }
        fn step(&mut self) -> Result<Step<'_>, Failure> {
            Ok(Step::Pending)
        }
        fn cancel(&mut self) {}
        fn stats(&self) -> Stats {
            Stats::default()
        }
        fn save(&mut self) -> Result<(), Failure> {
            Err(Failure::new(Code::Unsupported, "nothing"))
        }
        fn saved(&mut self) -> Result<Option<Snapshot>, Failure> {
            Ok(None)
        }
        fn read_snapshot(&mut self, _: u32, _: &mut [u8]) -> usize {
            0
        }
        fn restore(&mut self, _: Snapshot) -> Result<(), Failure> {
            Ok(())
        }
        fn write_snapshot(&mut self, _: &[u8]) -> Result<(), Failure> {
            Ok(())
        }
        fn restored(&mut self) -> Result<Option<u32>, Failure> {
            Ok(None)
        }
    }

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let clock = Clock::default();
        let mut device = Device::new(Nothing, 1, Timing::default(), clock.now());
        for stream in listener.incoming() {
            // In pieces that are no frames, the first before anybody is there.
            let mut rest = &run().frames[..];
            device.log(rest.split_off(..7).unwrap());
            let mut next = |most: usize| rest.split_off(..rest.len().min(9).min(most)).unwrap().to_vec();
            serve(&mut device, &mut Port::tcp(stream.unwrap()).unwrap(), clock, &mut next);
        }
    });
    let mut child = Command::new(env!("CARGO_BIN_EXE_thinkey-firmware-host"))
        .args(["log", "--connect", &address, "--elf"])
        .arg(&run().elf)
        .current_dir(root())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let lines: Vec<String> = lines.take(run().records.len()).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    for (line, record) in lines.iter().zip(&run().records) {
        let location = record.location.as_ref().unwrap();
        let file = location.file.strip_prefix(root()).unwrap_or(&location.file);
        let start = format!("{} {:5} {} ", record.timestamp.as_ref().unwrap(), record.level.unwrap(), location.module);
        assert!(line.starts_with(&start), "{line}");
        assert!(line.ends_with(&format!("{} ({}:{})", record.message, file.display(), location.line)), "{line}");
    }

    // And beside what else is said.
    let output = Command::new(env!("CARGO_BIN_EXE_thinkey-firmware-host"))
        .args(["talk", "--connect", &address, "hello", "--level", "info", "--log"])
        .arg(&run().elf)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("(Unsupported): nothing"), "{text}");
}
