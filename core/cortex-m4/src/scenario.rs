// A thin head end to end on fixed arrays: scores, top-T, corrections and quantised blocks of a prompt, then an answer that
// flushes, with attention at every step. Shared by the image and by a test on the host, which compares the checksums.

use thinkey_core::{
    BLOCK, Error, HeadLayout, HeadMut, HeadRef, KeyOrder, Masks, Moments, Plain, Rows, Scoring, Span, StorageKind,
    TokenRows, attend, channel::compensate, policy::Fix,
};

const D: usize = 32;
const KEPT: usize = 16;
const GROUP: usize = 2;
const PROMPT: usize = 100;
const ANSWER: usize = 80;
const WINDOW: usize = 16;
const PAGES: usize = HeadLayout::blocks_for(PROMPT + ANSWER, RECENT);
const RECENT: usize = 32;

/// The head's shape: half of the channels, corrected for, keys and values in four bits.
pub const LAYOUT: HeadLayout = HeadLayout {
    head_dim: D as u16,
    kept: KEPT as u16,
    sinks: 4,
    recent: RECENT as u16,
    fix: Fix::Compensated,
    kept_values: D as u16,
    renews: false,
    slots: 1,
    pages: PAGES as u32,
    keys: StorageKind::Int4,
    values: StorageKind::Int4,
    ranked: 0,
};

/// Everything that the scenario works on, for a `static` that starts as zeros.
#[repr(C, align(64))]
pub struct Memory {
    cache: [u8; LAYOUT.bytes()],
    keys: [f32; PROMPT * D],
    values: [f32; PROMPT * D],
    window: [f32; WINDOW * GROUP * D],
    weights: [f32; PROMPT],
    covariance: [f32; D * D],
    centred: [f32; compensate::moments_scratch(D)],
    triangle: [f32; LAYOUT.scratch_len()],
    attention: [f32; attend::attend_len(GROUP, D)],
}

impl Memory {
    /// All zeros.
    pub const ZEROED: Self = Self {
        cache: [0; LAYOUT.bytes()],
        keys: [0.0; PROMPT * D],
        values: [0.0; PROMPT * D],
        window: [0.0; WINDOW * GROUP * D],
        weights: [0.0; PROMPT],
        covariance: [0.0; D * D],
        centred: [0.0; compensate::moments_scratch(D)],
        triangle: [0.0; LAYOUT.scratch_len()],
        attention: [0.0; attend::attend_len(GROUP, D)],
    };
}

/// Deterministic numbers in -1..1, a linear congruential generator (Knuth's MMIX constants).
struct Numbers(u64);

impl Numbers {
    fn fill(&mut self, out: &mut [f32]) {
        for x in out {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *x = (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        }
    }
}

/// FNV-1a over the channels chosen and the bits of every attention output.
fn hash(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Runs the scenario in `memory`; the checksum of all that it computed.
pub fn run(memory: &mut Memory) -> Result<u64, Error> {
    let Memory { cache, keys, values, window, weights, covariance, centred, triangle, attention } = memory;
    let pages: [u32; PAGES] = core::array::from_fn(|page| page as u32);
    let mut numbers = Numbers(6);
    let mut sum = 0xcbf2_9ce4_8422_2325;
    for numbers_of in [&mut keys[..], &mut values[..], &mut window[..]] {
        numbers.fill(numbers_of);
    }

    // The prompt: scores and top-T by its last queries, corrections by the covariance of its prefix.
    let rows = Rows { keys, order: KeyOrder::Rows, values, stride: D };
    let admission = Span::default().admit(PROMPT, LAYOUT.retention(), true);
    let mut head = HeadMut::new(LAYOUT, cache, 0)?;
    head.clear_energy();
    head.add_query_energy(window, WINDOW * GROUP, D)?;
    let scoring = Scoring { queries: WINDOW * GROUP, ..Scoring::default() };
    let masks = Masks::of_keys(head.choose(&scoring, &admission, rows)?);
    for channel in masks.keys.channels() {
        sum = hash(sum, &[channel as u8]);
    }
    let prefix = admission.sunk + admission.thinned;
    let weights = &mut weights[..prefix];
    compensate::weigh(weights, admission.sunk)?;
    let mut mean = [0.0; D];
    compensate::moments(&TokenRows::new(&keys[..prefix * D], prefix, D, D)?, weights, centred, &mut mean, covariance)?;
    head.correct(&masks.keys, Moments::Known { mean: &mean, covariance, order: &[], scratch: triangle })?;
    head.admit(&admission, &pages[..admission.after.blocks as usize], Some(&masks), rows)?;

    let mut span = admission.after;
    let (mut query, mut key, mut value, mut out) = ([0.0; GROUP * D], [0.0; D], [0.0; D], [0.0; GROUP * D]);
    for _ in 0..ANSWER {
        for numbers_of in [&mut query[..], &mut key[..], &mut value[..]] {
            numbers.fill(numbers_of);
        }
        let admission = span.admit(1, LAYOUT.retention(), false);
        span = admission.after;
        let pages = &pages[..span.blocks as usize];
        let rows = Rows { keys: &key, order: KeyOrder::Rows, values: &value, stride: D };
        HeadMut::new(LAYOUT, cache, 0)?.admit(&admission, pages, Some(&masks), rows)?;
        let head = HeadRef::new(LAYOUT, cache, 0, pages, span, Some(&masks))?;
        attend::attend(&Plain, &head, &query, usize::MAX, attention, &mut out)?;
        for x in out {
            sum = hash(sum, &x.to_bits().to_le_bytes());
        }
    }
    // The ring has overflowed twice and more.
    if span.prefix() < prefix - LAYOUT.sinks as usize + 2 * BLOCK {
        return Err(Error::Inconsistent { what: "prefix" });
    }
    Ok(sum)
}
