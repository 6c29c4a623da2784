//! Decode attention over the thin cache on a CUDA device, beside what the device copies:
//! `cargo bench -p thinkey-kernels --features cuda --bench device`.
//!
//! 8 KV heads of 4 query heads and 128 channels, of which half are kept. Where there is no device, this says so.

use burn::tensor::{Distribution, Tensor};
use std::time::Instant;
use thinkey_core::{CachePlan, Lambda, StorageKind, policy::Fix};
use thinkey_kernels::{
    cuda::{Backend, Device, Ops, allocate_synchronously, probe},
    ops::{Cache, Heads, ThinOps},
};

const HEADS: Heads = Heads { heads: 32, kv_heads: 8, head_dim: 128 };
/// Launches that are timed together.
const TIMES: usize = 50;
/// Tokens of a prompt that are admitted at once.
const RUN: usize = 512;

fn rows(count: usize, device: &Device) -> Tensor<Backend, 2> {
    Tensor::random([count, HEADS.width()], Distribution::Uniform(-1.0, 1.0), device)
}

/// Bytes that the device reads and writes in a second.
fn copies(device: &Device) -> f64 {
    let from = Tensor::<Backend, 1>::ones([1 << 26], device);
    let copy = || from.clone() + 1.0;
    copy().narrow(0, 0, 1).into_data();
    let start = Instant::now();
    let mut last = copy();
    (1..TIMES).for_each(|_| last = copy());
    last.narrow(0, 0, 1).into_data();
    (TIMES * 2 * 4 * (1 << 26)) as f64 / start.elapsed().as_secs_f64()
}

fn measure(kind: StorageKind, slots: usize, tokens: usize, bandwidth: f64) {
    let plan = CachePlan {
        layers: 1,
        kv_heads: HEADS.kv_heads,
        copies: 1,
        flexible: false,
        renews: false,
        head_dim: HEADS.head_dim,
        sinks: 4,
        recent: 32,
        fix: Fix::Compensated,
        value_lambda: Lambda::WHOLE,
        slots,
        tokens: tokens + 1,
        window: None,
        keys: kind,
        values: kind,
        eviction: None,
    };
    let device = Device::default();
    let mut ops = Ops::new(device.clone());
    let mut cache = ops.cache(plan, 32, &|_, _| HEADS.head_dim / 2).expect("a cache");
    for slot in 0..slots {
        for first in (0..tokens).step_by(RUN) {
            let count = RUN.min(tokens - first);
            cache.begin(slot, count, true).expect("room");
            let (mut prompt, fused) = (ops.prompt(&cache, slot, count, 32, HEADS), rows(count, &device));
            ops.hold(&cache, 0, &mut prompt, &fused).expect("rows");
            ops.admit_prompt(&mut cache, 0, &prompt).expect("numbers");
            cache.commit(slot);
        }
    }
    let all: Vec<usize> = (0..slots).collect();
    all.iter().for_each(|&slot| cache.begin(slot, 1, false).expect("room"));
    let fused = rows(slots, &device);
    ops.admit(&mut cache, 0, &all, &fused, HEADS).expect("numbers");
    let mut out = ops.rows(slots, HEADS.keys());
    let mut host = Vec::new();
    let mut attend = |times: usize| {
        let start = Instant::now();
        for _ in 0..times {
            out = ops.attend(&cache, 0, &all, &fused, HEADS, out.clone()).expect("a cache");
        }
        ops.read(&out, &mut host);
        start.elapsed().as_secs_f64() / times as f64
    };
    attend(3);
    let seconds = attend(TIMES);
    let bytes = cache.planned().total() as f64;
    println!(
        "{:6} batch {slots:3} tokens {tokens:6}: {:9.1} µs, {:6.1} MB, {:3.0}% of what is copied",
        kind.name(),
        seconds * 1e6,
        bytes / 1e6,
        100.0 * bytes / seconds / bandwidth
    );
}

fn main() {
    if let Err(error) = probe() {
        return println!("{error}");
    }
    let _ = allocate_synchronously();
    let bandwidth = copies(&Device::default());
    println!("copies: {:.0} GB/s", bandwidth / 1e9);
    for kind in [StorageKind::F16, StorageKind::Int8, StorageKind::Int4] {
        for slots in [1, 8, 32] {
            for tokens in [4096, 16_384, 65_536] {
                measure(kind, slots, tokens, bandwidth);
            }
        }
    }
}
