use super::*;
use crate::{BLOCK, Lambda, Plain, StorageKind, mass::tests::numbers, policy::Fix};
use proptest::prelude::*;
use std::{vec, vec::Vec};

const D: usize = 16;
const GROUP: usize = 2;
const WINDOW: usize = 8;
const PROMPT: usize = 90;
const STEPS: usize = 40;
const HEADS: usize = 2;

const HEADER: TraceHeader<'static> = TraceHeader {
    magic: MAGIC,
    version: VERSION,
    model: "tiny",
    head_dim: D as u16,
    group: GROUP as u16,
    window: WINDOW as u16,
    prompt: PROMPT as u32,
    steps: STEPS as u32,
    heads: HEADS as u32,
    residual: false,
};

fn layout(kind: StorageKind, fix: Fix) -> HeadLayout {
    let sinks = if fix == Fix::None { 0 } else { 4 };
    HeadLayout {
        head_dim: D as u16,
        kept: Lambda::from_per_mille(500).unwrap().kept(D) as u16,
        sinks,
        recent: BLOCK as u16,
        fix,
        kept_values: D as u16,
        renews: false,
        slots: 1,
        pages: HeadLayout::blocks_for(PROMPT + STEPS - sinks as usize, BLOCK) as u32,
        keys: kind,
        values: kind,
        ranked: 0,
    }
}

struct Memory(Vec<f32>, Vec<u64>, Vec<u32>);

impl Memory {
    fn new(needs: Needs) -> Self {
        Self(vec![f32::NAN; needs.floats], vec![!0; needs.words], vec![!0; needs.pages])
    }

    fn work(&mut self) -> Work<'_> {
        Work { floats: &mut self.0, words: &mut self.1, pages: &mut self.2 }
    }
}

/// Queries, keys and values of a head.
fn given(seed: u64) -> [Vec<f32>; 3] {
    [GROUP * (WINDOW + STEPS), PROMPT + STEPS, PROMPT + STEPS].map(|rows| numbers(seed + rows as u64, rows * D))
}

fn recorded(layout: HeadLayout) -> Vec<u8> {
    recorded_as(&HEADER, layout)
}

fn recorded_as(header: &TraceHeader<'_>, layout: HeadLayout) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut memory = Memory::new(Needs::of(header, &layout).unwrap());
    let mut writer = TraceWriter::new(
        |frame: &[u8]| {
            bytes.extend_from_slice(frame);
            Ok::<_, TraceError>(())
        },
        header,
    )
    .unwrap();
    for head in 0..HEADS {
        let [queries, keys, values] = given(head as u64);
        let given = Prompt { queries: &queries, keys: &keys, values: &values };
        record(&Plain, header, (3, head as u16, layout), given, &mut memory.work(), &mut writer).unwrap();
    }
    let _ = writer.finish().unwrap();
    bytes
}

fn replayed(bytes: &[u8], layout: &HeadLayout) -> Result<Replayed, TraceError> {
    let reader = TraceReader::open(bytes)?;
    let mut memory = Memory::new(Needs::of(reader.header(), layout)?);
    replay(&Plain, reader, 0.0, &mut memory.work())
}

/// Frames of a trace: where each begins and ends.
fn frames(bytes: &[u8]) -> Vec<core::ops::Range<usize>> {
    let mut at = 0;
    let mut frames = Vec::new();
    while at < bytes.len() {
        let (_, next) = frame(bytes, at).unwrap();
        frames.push(at..next);
        at = next;
    }
    frames
}

#[test]
fn what_was_recorded_is_computed_again() {
    for kind in StorageKind::ALL {
        for fix in [Fix::None, Fix::Compensated, Fix::Predictive] {
            let mut layout = layout(kind, fix);
            // Some kinds are of keys or of values alone, or not of predicted keys.
            if kind.mixed() {
                layout.values = StorageKind::Int3;
            }
            if layout.check().is_err() {
                layout.keys = StorageKind::Int4;
            }
            let told = replayed(&recorded(layout), &layout).unwrap();
            assert!(told.same(), "{kind:?} {fix:?}: {told:?}");
            assert_eq!((told.heads, told.compared), (HEADS as u32, (HEADS * STEPS * GROUP) as u32));
            assert_eq!((told.worst, told.first), (0.0, None));
        }
    }
}

/// Chosen by residuals, masks are others than by energies. That they are right is tested where they are chosen.
#[test]
fn residual_choices_are_recorded_and_computed_again() {
    let header = TraceHeader { residual: true, ..HEADER };
    let layout = layout(StorageKind::F16, Fix::Compensated);
    let (bytes, plain) = (recorded_as(&header, layout), recorded(layout));
    let told = replayed(&bytes, &layout).unwrap();
    assert!(told.same() && told.heads == HEADS as u32, "{told:?}");
    assert_ne!(masks(&bytes), masks(&plain));
    // Without a covariance there is nothing to regress on.
    let none = HeadLayout { sinks: 0, fix: Fix::None, pages: layout.pages, ..layout };
    let none = HeadLayout { pages: HeadLayout::blocks_for(PROMPT + STEPS, BLOCK) as u32, ..none };
    assert_eq!(masks(&recorded_as(&header, none)), masks(&recorded(none)));
}

fn masks(bytes: &[u8]) -> Vec<ChannelMask> {
    let mut reader = TraceReader::open(bytes).unwrap();
    core::iter::from_fn(|| reader.read().unwrap())
        .filter_map(|record| if let Record::Mask(mask) = record { Some(mask) } else { None })
        .collect()
}

/// The mask and the outputs of a trace are those of plain sums in f64, of numbers as they are stored.
#[test]
fn recorded_outputs_equal_brute_force() {
    let layout = layout(StorageKind::F32, Fix::None);
    let bytes = recorded(layout);
    let mut reader = TraceReader::open(&bytes).unwrap();
    let [queries, keys, values] = given(0);
    let square = |x: f32| f64::from(x) * f64::from(x);
    let sum =
        |rows: &mut dyn Iterator<Item = &[f32]>, channel: usize| rows.map(|row| square(row[channel])).sum::<f64>();
    let scores: Vec<f64> = (0..D)
        .map(|channel| {
            let mut window =
                queries.chunks(D).enumerate().filter(|(at, _)| at % (WINDOW + STEPS) < WINDOW).map(|(_, q)| q);
            sum(&mut window, channel) * sum(&mut keys.chunks(D).take(PROMPT), channel)
        })
        .collect();
    let mut order: Vec<usize> = (0..D).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mask = ChannelMask::from_channels(D, order[..D / 2].iter().copied()).unwrap();

    let mut compared = 0;
    while let Some(record) = reader.read().unwrap() {
        match record {
            Record::Head { head, .. } if head > 0 => break,
            Record::Mask(found) => assert_eq!(found, mask),
            Record::Row { kind: RowKind::Output, index, numbers } => {
                let (step, head) = (index as usize / GROUP, index as usize % GROUP);
                let query = &queries[(head * (WINDOW + STEPS) + WINDOW + step) * D..][..D];
                let tokens = PROMPT + step + 1;
                // What the span says of a ring of 64 that starts with 32.
                let whole = BLOCK + (step + 1) - (step + 1).saturating_sub(1) / BLOCK * BLOCK;
                let logit = |token: usize| {
                    let kept = |channel: &usize| token + whole >= tokens || mask.contains(*channel);
                    let key = &keys[token * D..][..D];
                    let dot: f64 = (0..D).filter(kept).map(|c| f64::from(query[c]) * f64::from(key[c])).sum();
                    (dot / (D as f64).sqrt()).exp()
                };
                let weights: Vec<f64> = (0..tokens).map(logit).collect();
                let all: f64 = weights.iter().sum();
                for (channel, number) in numbers.chunks(4).enumerate() {
                    let expected: f64 =
                        weights.iter().zip(values.chunks(D)).map(|(w, v)| w * f64::from(v[channel]) / all).sum();
                    let found = f32::from_le_bytes(number.try_into().unwrap());
                    assert!((f64::from(found) - expected).abs() < 1e-5, "step {step}: {found} {expected}");
                    compared += 1;
                }
            }
            _ => {}
        }
    }
    assert_eq!(compared, STEPS * GROUP * D);
}

/// A trace with one record changed, checksums and all.
fn changed(bytes: &[u8], change: impl Fn(Record<'_>) -> Option<Vec<u8>>) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, range) in frames(bytes).into_iter().enumerate() {
        let frame = &bytes[range];
        let other = (index > 0).then(|| change(wire::decode(&frame[PREFIX..]).unwrap())).flatten();
        out.extend(other.unwrap_or_else(|| frame.to_vec()));
    }
    out
}

fn encoded(record: &Record<'_>) -> Vec<u8> {
    let mut memory = [0; MAX_FRAME];
    let body = wire::encode(record, &mut memory).unwrap();
    [&(body.len() as u16).to_le_bytes(), &*body].concat()
}

#[test]
fn every_kind_of_difference_is_told() {
    let layout = layout(StorageKind::F16, Fix::Compensated);
    let bytes = recorded(layout);
    let nudged = |kind: RowKind, at: u32| {
        let trace = changed(&bytes, |record| match record {
            Record::Row { kind: found, index, numbers } if found == kind && index == at => {
                let mut numbers = numbers.to_vec();
                numbers[6] ^= 1;
                Some(encoded(&Record::Row { kind, index, numbers: &numbers }))
            }
            _ => None,
        });
        replayed(&trace, &layout).unwrap()
    };
    let told = nudged(RowKind::Output, 7);
    assert_eq!((told.outputs, told.masks, told.energies), (HEADS as u32, 0, 0));
    let Some(Difference { layer: 3, head: 0, what: What::Output { step: 3, query_head: 1, channel: 1, .. } }) =
        told.first
    else {
        panic!("{told:?}");
    };
    assert!(nudged(RowKind::QueryEnergy, 0).energies == HEADS as u32);
    let told = nudged(RowKind::KeyEnergy, 0);
    assert!(matches!(told.first, Some(Difference { what: What::Energy { queries: false, channel: 1, .. }, .. })));
    // A value of the prompt is in every output, a key in the energies too.
    assert!(nudged(RowKind::PromptValue, 80).outputs > 0);
    assert!(nudged(RowKind::PromptKey, 80).energies > 0);

    let other = ChannelMask::from_channels(D, 0..D / 2).unwrap();
    let trace = changed(&bytes, |record| matches!(record, Record::Mask(_)).then(|| encoded(&Record::Mask(other))));
    let told = replayed(&trace, &layout).unwrap();
    assert_eq!((told.masks, told.outputs), (HEADS as u32, 0));
    assert!(std::format!("{}", told.first.unwrap()).contains("other channels are kept"));
}

#[test]
fn cut_reordered_and_foreign_traces_are_errors() {
    let layout = layout(StorageKind::Int8, Fix::None);
    let bytes = recorded(layout);
    let frames = frames(&bytes);
    for cut in (0..bytes.len()).step_by(97).chain(frames.iter().map(|frame| frame.start)) {
        let error = replayed(&bytes[..cut], &layout).unwrap_err();
        assert!(matches!(error, TraceError::Cut { .. }), "{cut}: {error:?}");
    }
    let without = |at: usize| [&bytes[..frames[at].start], &bytes[frames[at].end..]].concat();
    for at in 1..frames.len() - 1 {
        assert!(matches!(replayed(&without(at), &layout), Err(TraceError::Order { .. })), "{at}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(replayed(&longer, &layout), Err(TraceError::Order { .. })));
    assert_eq!(TraceReader::open(b"\x03\x00abc").unwrap_err(), TraceError::Magic);
    let fewer = TraceHeader { heads: 1, ..HEADER };
    let mut memory = [0; 64];
    let body = wire::encode(&fewer, &mut memory).unwrap();
    let trace = [&(body.len() as u16).to_le_bytes(), &*body, &bytes[frames[0].end..]].concat();
    assert!(matches!(replayed(&trace, &layout), Err(TraceError::Order { .. })));
}

#[test]
fn too_little_memory_is_told_with_what_is_needed() {
    let layout = layout(StorageKind::Int4, Fix::Compensated);
    let (bytes, needs) = (recorded(layout), Needs::of(&HEADER, &layout).unwrap());
    let mut memory = Memory::new(Needs { floats: needs.floats - 1, ..needs });
    let error = replay(&Plain, TraceReader::open(&bytes).unwrap(), 0.0, &mut memory.work()).unwrap_err();
    let (needed, capacity) = (needs.floats, needs.floats - 1);
    assert_eq!(error, Error::Capacity { what: "trace floats", needed, capacity }.into());
    let short = TraceHeader { prompt: 64, ..HEADER };
    assert_eq!(Needs::of(&short, &layout), Err(TraceError::Short { prompt: 64, needed: 69 }));
    for layout in [
        HeadLayout { slots: 2, ..layout },
        HeadLayout { kept_values: 3, ..layout },
        HeadLayout { fix: Fix::Lowrank, ..layout },
        HeadLayout { head_dim: 32, ..layout },
    ] {
        assert!(Needs::of(&HEADER, &layout).is_err());
    }
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(mut reader) = TraceReader::open(&bytes) {
            while let Ok(Some(_)) = reader.read() {}
        }
    }

    /// Records that are well-formed but lie: sizes, orders and layouts of any kind.
    #[test]
    fn hostile_records_never_panic(
        numbers in prop::collection::vec(any::<u16>(), 12),
        flip in any::<prop::sample::Index>(),
        to in any::<u8>(),
    ) {
        let layout = layout(StorageKind::Int4, Fix::Compensated);
        let bytes = recorded(layout);
        // Any one byte of any one frame, with a checksum that fits.
        let ranges = frames(&bytes);
        let range = ranges[flip.index(ranges.len())].clone();
        let mut body = bytes[range.start + PREFIX..range.end - 4].to_vec();
        let at = flip.index(body.len());
        body[at] = to;
        let sum = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(&body);
        body.extend(sum.to_le_bytes());
        let trace = [&bytes[..range.start], &(body.len() as u16).to_le_bytes(), &body, &bytes[range.end..]].concat();
        let _ = replayed(&trace, &layout);

        let [head_dim, kept, sinks, recent, slots, pages, ..] = numbers[..] else { unreachable!() };
        let hostile = HeadLayout { head_dim, kept, sinks, recent, slots, pages: pages.into(), ..layout };
        let header = TraceHeader { head_dim, group: kept, window: sinks, prompt: recent.into(), ..HEADER };
        if header.check().is_ok() {
            let _ = Needs::of(&header, &hostile);
        }
    }
}
