//! Any bytes as a trace: read, and replayed where what they ask for is small. And a recorded trace with any bytes changed,
//! frames left out and repeated.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use thinkey_core::{
    HeadLayout, Plain, StorageKind,
    policy::Fix,
    trace::{self, MAGIC, Needs, Prompt, Record, TraceError, TraceHeader, TraceReader, TraceWriter, VERSION, Work},
    wire,
};

/// Floats that a replay may take: a fuzzer that waits for attention over many tokens finds nothing.
const MOST: usize = 1 << 16;

const D: u16 = 8;
const GROUP: u16 = 2;
const WINDOW: u16 = 4;
const PROMPT: u32 = 70;
/// Enough for the ring to overflow.
const STEPS: u32 = 36;

/// Traces of one head each, of every kind of correction that a trace can have.
fn recorded() -> &'static [Vec<u8>] {
    static RECORDED: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    RECORDED.get_or_init(|| {
        [(Fix::None, StorageKind::F16), (Fix::Compensated, StorageKind::Int4), (Fix::Predictive, StorageKind::Int4)]
            .map(|(fix, kind)| record(fix, kind))
            .into()
    })
}

/// A trace as the lengths and bodies of its frames, without checks.
fn record(fix: Fix, kind: StorageKind) -> Vec<u8> {
    let (sinks, recent) = (if fix == Fix::None { 0 } else { 4 }, 32);
    let header = TraceHeader {
        magic: MAGIC,
        version: VERSION,
        model: "tiny",
        head_dim: D,
        group: GROUP,
        window: WINDOW,
        prompt: PROMPT,
        steps: STEPS,
        heads: 1,
        residual: false,
    };
    let layout = HeadLayout {
        head_dim: D,
        kept: D / 2,
        sinks,
        recent,
        fix,
        kept_values: D,
        renews: false,
        slots: 1,
        pages: HeadLayout::blocks_for((PROMPT + STEPS) as usize - usize::from(sinks), recent.into()) as u32,
        keys: kind,
        values: kind,
        ranked: 0,
    };
    // Knuth's linear congruential generator, in -1..1.
    let mut state = 5_u64;
    let mut numbers = |rows: u32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..rows * u32::from(D)).map(|_| next()).collect()
    };
    let queries = numbers(u32::from(GROUP) * (u32::from(WINDOW) + STEPS));
    let (keys, values) = (numbers(PROMPT + STEPS), numbers(PROMPT + STEPS));
    let needs = Needs::of(&header, &layout).expect("the layout is one");
    let (mut floats, mut words, mut pages) = (vec![0.0; needs.floats], vec![0; needs.words], vec![0; needs.pages]);
    let mut work = Work { floats: &mut floats, words: &mut words, pages: &mut pages };
    let mut bytes = Vec::new();
    let out = |frame: &[u8]| {
        bytes.extend_from_slice(frame);
        Ok::<_, TraceError>(())
    };
    let mut writer = TraceWriter::new(out, &header).expect("it is written to memory");
    let given = Prompt { queries: &queries, keys: &keys, values: &values };
    trace::record(&Plain, &header, (0, 0, layout), given, &mut work, &mut writer).expect("it can be recorded");
    let _ = writer.finish().expect("it is whole");
    bytes
}

/// A recorded trace after what `data` says, five bytes each: of which frame which byte becomes what, or that the frame is left
/// out or repeated.
fn changed(data: &[u8]) -> Vec<u8> {
    let Some((&which, edits)) = data.split_first() else { return Vec::new() };
    let mut rest = &recorded()[usize::from(which) % recorded().len()][..];
    let mut frames = Vec::new();
    while let Some((&len, tail)) = rest.split_first_chunk::<2>() {
        let (frame, tail) = tail.split_at(usize::from(u16::from_le_bytes(len)));
        frames.push(frame[..frame.len() - 4].to_vec());
        rest = tail;
    }
    for &[low, high, place, to, kind] in edits.as_chunks().0 {
        if frames.is_empty() {
            break;
        }
        let at = usize::from(u16::from_le_bytes([low, high])) % frames.len();
        match kind {
            0 => drop(frames.remove(at)),
            1 => frames.insert(at, frames[at].clone()),
            _ => {
                let place = usize::from(place) % frames[at].len().max(1);
                if let Some(byte) = frames[at].get_mut(place) {
                    *byte = to;
                }
            }
        }
    }
    frames.iter().flat_map(|body| frame(body)).collect()
}

/// `body` with its length and check.
fn frame(body: &[u8]) -> Vec<u8> {
    let check = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(body);
    [&((body.len() + 4) as u16).to_le_bytes(), body, &check.to_le_bytes()].concat()
}

/// Frames with lengths and checks that fit, since those are not guessed: a piece of `data` for each.
fn framed(data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = data;
    while let Some((&len, tail)) = rest.split_first_chunk::<2>() {
        let (body, tail) = tail.split_at(usize::from(u16::from_le_bytes(len)).min(tail.len()));
        bytes.extend(frame(body));
        rest = tail;
    }
    bytes
}

fn read(bytes: &[u8]) {
    let Ok(reader) = TraceReader::open(bytes) else { return };
    let (header, mut records, mut needs) = (*reader.header(), reader, Needs::default());
    while let Ok(Some(record)) = records.read() {
        if let Record::Head { layout, .. } = record
            && let Ok(head) = Needs::of(&header, &layout)
        {
            needs = needs.max(head);
        }
    }
    if needs.floats.max(needs.words) <= MOST && header.steps < 64 {
        let (mut floats, mut words, mut pages) = (vec![0.0; needs.floats], vec![0; needs.words], vec![0; needs.pages]);
        let mut work = Work { floats: &mut floats, words: &mut words, pages: &mut pages };
        let _ = trace::replay(&Plain, reader, 1e-4, &mut work);
    }
}

fuzz_target!(|data: &[u8]| {
    read(data);
    read(&framed(data));
    read(&changed(data));
    let _ = wire::decode::<Record<'_>>(data);
});
