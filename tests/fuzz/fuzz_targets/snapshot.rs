//! Any bytes as a snapshot, and as what a head of one holds: restored where they can be, and gone on with.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thinkey_core::{
    BLOCK, Head, HeadLayout, HeadMut, HeadRef, KeyOrder, Masks, Plain, Rows, Span, StorageKind, attend,
    policy::Fix,
    snapshot::{MAX_HEADER, Progress, Snapshot, SnapshotHeader, check},
};

const D: usize = 16;
const PAGES: u32 = 3;
const RECENT: u16 = 8;

/// Heads that store everything differently.
fn layouts() -> [HeadLayout; 5] {
    let base = HeadLayout::of::<Head<D, 500>>(RECENT, PAGES, StorageKind::Int4, StorageKind::Int2);
    let ranked = PAGES * BLOCK as u32;
    [
        base,
        HeadLayout { fix: Fix::Compensated, sinks: 2, keys: StorageKind::F16, values: StorageKind::Turned3, ..base },
        HeadLayout { fix: Fix::Lowrank, keys: StorageKind::F32, values: StorageKind::F16, ..base },
        HeadLayout { renews: true, kept_values: 7, values: StorageKind::Int3, ..base },
        HeadLayout { ranked, sinks: 2, keys: StorageKind::Int8, values: StorageKind::F32, ..base },
    ]
}

fn read(bytes: &[u8]) {
    if let Ok(snapshot) = Snapshot::open(bytes) {
        let header = snapshot.header();
        assert_eq!(snapshot.tokens().len(), header.tokens as usize);
        assert_eq!(snapshot.kept().len(), usize::from(header.layers) * usize::from(header.heads));
        let _ = header.progress.check(4, 32, false);
        assert!(header.encode(&mut [0; MAX_HEADER]).is_ok());
    }
}

/// What a head holds after `bytes`, as often as it takes, and what comes of it.
fn restore(layout: HeadLayout, span: Span, bytes: &[u8]) {
    let mut memory = vec![0; layout.bytes()];
    let pages: Vec<u32> = (0..PAGES).collect();
    let masked = bytes.first().is_some_and(|byte| byte & 1 == 1);
    let len = if span.blocks <= PAGES { layout.snapshot_bytes(span, masked) } else { bytes.len() };
    let mut all: Vec<u8> = bytes.iter().copied().cycle().take(len).collect();
    if let Some(first) = all.first_mut() {
        *first &= 3;
    }
    let Ok(mut head) = HeadMut::new(layout, &mut memory, 0) else { return };
    let Ok(masks) = head.restore(&pages, span, &all) else { return };
    let view = head.view(&pages, span, masks.as_ref()).expect("it was restored");
    let mut again = Vec::new();
    view.save(|part| again.extend_from_slice(part)).expect("it was restored");
    assert!(again.len() == all.len());
    go_on(layout, &mut memory, &pages, span, masks.as_ref());
}

/// Attention, and tokens until a block is full.
fn go_on(layout: HeadLayout, memory: &mut [u8], pages: &[u32], mut span: Span, masks: Option<&Masks>) {
    let (row, mut out, mut scratch) = ([0.5; D], [0.0; D], vec![0.0; attend::attend_len(1, D)]);
    for _ in 0..2 * BLOCK {
        let Ok(head) = HeadRef::new(layout, memory, 0, pages, span, masks) else { return };
        if span.tokens() > 0 {
            let _ = attend::attend(&Plain, &head, &row, usize::MAX, &mut scratch, &mut out);
        }
        let admission = span.admit(1, layout.retention(), false);
        if admission.after.blocks > PAGES {
            return;
        }
        let rows = Rows { keys: &row, order: KeyOrder::Rows, values: &row, stride: D };
        let admitted = HeadMut::new(layout, memory, 0).and_then(|mut head| head.admit(&admission, pages, masks, rows));
        if admitted.is_err() {
            return;
        }
        span = admission.after;
    }
}

fuzz_target!(|data: &[u8]| {
    read(data);
    // With a check that fits, since that is not guessed; and with a header that does, and any numbers in it.
    read(&[data, &check([data])].concat());
    let Some((numbers, rest)) = data.split_first_chunk::<8>() else { return };
    let [which, sinks, blocks, hidden, recent, position, tokens, heads] = *numbers;
    let layout = layouts()[usize::from(which) % layouts().len()];
    let span = Span { sinks: sinks.into(), blocks: blocks.into(), hidden: hidden.into(), recent: recent.into() };
    let progress =
        Progress { span, position: position.into(), chosen: true, since: sinks.into(), scored: recent.into() };
    let header = SnapshotHeader {
        model: [heads; 16],
        policy: Default::default(),
        layout,
        layers: u16::from(heads & 3),
        heads: u16::from(heads >> 6),
        window: 32,
        sliding_window: None,
        progress,
        tokens: tokens.into(),
        bytes: rest.len() as u64 / 2,
    };
    let mut memory = [0; MAX_HEADER];
    let front = header.encode(&mut memory).expect("it fits");
    read(&[front, rest, &check([front, rest])].concat());
    let recent = u32::from(recent) % (layout.ring_capacity() as u32 + 1);
    let span =
        Span { sinks: u32::from(sinks & 3), blocks: u32::from(blocks & 3), hidden: u32::from(hidden & 31), recent };
    restore(layout, span, rest);
});
