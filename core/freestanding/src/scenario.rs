// A small cache end to end, on a fixed arena: a prompt, a long answer that flushes, attention at every step, and the
// header on the wire. Shared by the freestanding binary and by a test on the host, which compares the checksums.

use thinkey_core::{
    CachePlan, Error, Head, HeadLayout, KeyOrder, Lambda, Plain, Rows, StorageKind, attend,
    fixed::FixedHead,
    policy::Fix,
    wire::{self, CacheHeader},
};

const D: usize = 64;
const GROUP: usize = 3;
/// The head's shape.
pub const LAYOUT: HeadLayout = HeadLayout::of::<Head<D, 500>>(32, 8, StorageKind::F16, StorageKind::F16);
const PROMPT: usize = 120;
const ANSWER: usize = 100;

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

/// FNV-1a over the bits of every attention output and of the header's frame.
fn hash(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Runs the scenario; the checksum of all that it computed.
pub fn run() -> Result<u64, Error> {
    let mut numbers = Numbers(2024);
    let mut sum = 0xcbf2_9ce4_8422_2325;
    let mut head = FixedHead::<{ LAYOUT.bytes() }, 8>::new(LAYOUT)?;
    let (mut keys, mut values, mut window) = ([0.0; PROMPT * D], [0.0; PROMPT * D], [0.0; 32 * GROUP * D]);
    numbers.fill(&mut keys);
    numbers.fill(&mut values);
    numbers.fill(&mut window);
    head.admit(&window, Rows { keys: &keys, order: KeyOrder::Rows, values: &values, stride: D }, PROMPT, true)?;

    let (mut query, mut key, mut value) = ([0.0; GROUP * D], [0.0; D], [0.0; D]);
    let (mut memory, mut out) = ([0.0; attend::attend_len(GROUP, D)], [0.0; GROUP * D]);
    for _ in 0..ANSWER {
        numbers.fill(&mut query);
        numbers.fill(&mut key);
        numbers.fill(&mut value);
        head.admit(&query, Rows { keys: &key, order: KeyOrder::Rows, values: &value, stride: D }, 1, false)?;
        attend::attend(&Plain, &head.view()?, &query, usize::MAX, &mut memory, &mut out)?;
        for x in out {
            sum = hash(sum, &x.to_bits().to_le_bytes());
        }
    }

    let plan = CachePlan {
        layers: 1,
        kv_heads: 1,
        head_dim: D,
        sinks: 0,
        recent: 32,
        copies: 1,
        flexible: false,
        renews: false,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: PROMPT + ANSWER,
        window: None,
        keys: StorageKind::F16,
        values: StorageKind::F16,
        eviction: None,
    };
    let mut frame = [0; 64];
    let header = CacheHeader::new(&plan, Lambda::from_per_mille(500)?)?;
    let frame = wire::encode(&header, &mut frame)?;
    if wire::decode::<CacheHeader>(frame)? != header {
        return Err(Error::Frame);
    }
    Ok(hash(sum, frame))
}
