//! Traces of a tiny real model: recorded by the runtime, replayed by core alone.

use proptest::prelude::*;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};
use tempfile::TempDir;
use thinkey::{
    engine::{Engine, EngineOptions},
    policy::CacheDesign,
    weights::Checkpoint,
};
use thinkey_core::{
    ChannelMask,
    trace::{Record, TraceReader, What},
};
use thinkey_firmware_host::trace::{self, Recording, TraceFileError};

const RECORDING: Recording = Recording { prompt: 150, steps: 40, window: 16, recent: 32, heads: 3 };

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures/architectures/llama")
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|at| 3 + at * at * 7 % 109).collect()
}

/// Records the model under `policy` into `folder`.
fn record(folder: &TempDir, policy: &str, recording: Recording) -> Result<PathBuf, TraceFileError> {
    let checkpoint = Checkpoint::open(&model()).unwrap();
    let design = CacheDesign::new(policy.parse().unwrap(), checkpoint.config(), None).unwrap();
    let options = EngineOptions { threads: 1, ..EngineOptions::default() };
    let mut engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
    let path = folder.path().join("a.trace");
    let heads = trace::record(&mut engine, &design, &tokens(200), recording, &path, &mut |_, _| {})?;
    assert_eq!(heads, recording.heads);
    Ok(path)
}

/// The bytes of one trace.
fn recorded() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        fs::read(record(&folder, "balanced,choice=top(.5),values=int4", RECORDING).unwrap()).unwrap()
    })
}

#[test]
fn a_real_run_is_computed_again_without_the_model() {
    let folder = tempfile::tempdir().unwrap();
    // The model's heads have twelve channels, which cannot be turned.
    let refused = record(&folder, "small,choice=top(.7)", RECORDING).unwrap_err().to_string();
    assert!(refused.contains("12 of 12 channels cannot be turned"), "{refused}");
    for policy in [
        "think",
        "balanced,choice=top(.5),values=int4",
        "small,choice=top(.7),values=int2",
        "quality",
        "balanced,choice=top(.5),fix=predictive,keys=int4/2,values=int2",
    ] {
        let path = record(&folder, policy, RECORDING).unwrap();
        let outcome = trace::replay(&path, 0.0).unwrap();
        assert!(outcome.replayed.same(), "{policy}: {outcome:?}");
        assert_eq!((outcome.replayed.heads, outcome.replayed.compared), (3, 3 * 40 * 2));
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left of the recording");
}

/// The masks are those of plain sums over what the engine shows of its heads.
#[test]
fn recorded_masks_are_the_models() {
    let checkpoint = Checkpoint::open(&model()).unwrap();
    let mut engine =
        Engine::load(&checkpoint, EngineOptions { threads: 1, ..EngineOptions::default() }, &mut |_, _| {}).unwrap();
    let mut expected = Vec::new();
    // As long as the prompt alone: what comes after it changes nothing.
    engine
        .try_examine(&tokens(150), 16, |layer, head, held| {
            let energy = |rows: &[f32], channel: usize| {
                rows.chunks(held.head_dim).map(|row| f64::from(row[channel]).powi(2)).sum::<f64>()
            };
            let score = |channel: usize| energy(&held.queries, channel) * energy(&held.keys, channel);
            let mut order: Vec<usize> = (0..held.head_dim).collect();
            order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
            let kept = order[..held.head_dim / 2].iter().copied();
            expected.push((layer as u16, head as u16, ChannelMask::from_channels(held.head_dim, kept).unwrap()));
            Ok::<_, thinkey::model::ModelError>(())
        })
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(record(&folder, "think", RECORDING).unwrap()).unwrap();
    let mut reader = TraceReader::open(&bytes).unwrap();
    let (mut place, mut found) = ((0, 0), Vec::new());
    while let Some(record) = reader.read().unwrap() {
        match record {
            Record::Head { layer, head, .. } => place = (layer, head),
            Record::Mask(mask) => found.push((place.0, place.1, mask)),
            _ => {}
        }
    }
    assert_eq!(found.len(), 3);
    for mask in found {
        assert!(expected.contains(&mask), "{mask:?} is not in {expected:?}");
    }
}

#[test]
fn the_command_fails_where_something_differs_and_says_what() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.trace");
    let replay = |bytes: &[u8], tolerance: &str| {
        fs::write(&path, bytes).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_thinkey-firmware-host"))
            .args(["trace", "replay", "--tolerance", tolerance])
            .arg(&path)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, shown, error) = replay(recorded(), "0");
    assert_eq!(code, Some(0), "{error}");
    assert!(shown.contains("3 masks and 240 outputs are as recorded"), "{shown}");

    // Another value of the first prompt, as a board would read it from a flash that has aged.
    let changed = with_row(recorded(), "PromptValue", |numbers| numbers[3] ^= 1);
    let (code, _, error) = replay(&changed, "1e-4");
    assert_eq!(code, Some(1));
    assert!(error.contains("0 of 3 masks") && error.contains("first at layer 0, KV head 0: step"), "{error}");
    assert!(trace::replay(&path, 1e9).unwrap().replayed.same(), "no difference is that large");
    let first = trace::replay(&path, 1e-4).unwrap().replayed.first.unwrap();
    assert!(matches!(first.what, What::Output { .. }));

    let (code, _, error) = replay(&recorded()[..1000], "0");
    assert_eq!(code, Some(1));
    assert!(error.contains("is cut off"), "{error}");
}

/// A trace with the first row of a kind changed, and its checksum with it.
fn with_row(bytes: &[u8], kind: &str, change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut at = 0;
    loop {
        let len = usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        let frame = &mut bytes[at + 2..at + 2 + len];
        let record: Option<Record<'_>> = (at > 0).then(|| thinkey_core::wire::decode(frame).unwrap());
        if let Some(Record::Row { kind: found, numbers, .. }) = record
            && format!("{found:?}") == kind
        {
            let numbers = numbers.len();
            let body = len - 4;
            change(&mut frame[body - numbers..body]);
            let sum = crc32(&frame[..body]);
            frame[body..].copy_from_slice(&sum.to_le_bytes());
            return bytes;
        }
        at += 2 + len;
    }
}

/// CRC-32 (ISO-HDLC), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum: u32, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| sum >> 1 ^ (0xedb8_8320 & (sum & 1).wrapping_neg()))
    })
}

#[test]
fn what_cannot_be_recorded_is_refused_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |policy: &str, recording| record(&folder, policy, recording).unwrap_err().to_string();
    let short = refused("think", Recording { prompt: 60, ..RECORDING });
    assert!(short.contains("65 are the fewest"), "{short}");
    let long = refused("think", Recording { prompt: 190, ..RECORDING });
    assert!(long.contains("230 tokens are to be recorded, and the text has 200"), "{long}");
    for policy in
        ["choice=top(.5),fix=lowrank", "think,thin-values=query(.3)", "think,life=every(64)", "think,score=l2"]
    {
        refused(policy, RECORDING);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_files_never_panic(
        noise in prop::collection::vec(any::<u8>(), 0..400),
        at in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hostile.trace");
        fs::write(&path, &noise).unwrap();
        prop_assert!(trace::replay(&path, 0.0).is_err());
        let mut bytes = recorded().to_vec();
        let from = at.index(bytes.len() - noise.len());
        bytes[from..from + noise.len()].copy_from_slice(&noise);
        fs::write(&path, &bytes[..cut.index(bytes.len())]).unwrap();
        prop_assert!(trace::replay(&path, 0.0).is_err());
    }
}
