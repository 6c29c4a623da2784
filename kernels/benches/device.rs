//! Decode attention over the thin cache on a CUDA device, beside what the device copies; the attention of a prompt to itself
//! and to what a cache holds, and what it takes to make it thin: `cargo bench -p thinkey-kernels --features cuda --bench device`.
//!
//! 8 KV heads of 4 query heads and 128 channels, of which half are kept. Where there is no device, this says so, and of a
//! cache that takes more than half of its free memory too. It has not been run on a GPU yet.

use burn::tensor::{Distribution, Tensor};
use std::time::Instant;
use thinkey_core::{CachePlan, Lambda, StorageKind, policy::Fix};
use thinkey_kernels::{
    cuda::{Backend, Device, Ops, allocate_synchronously, copy_bandwidth, memory, probe},
    ops::{Cache, Heads, ThinOps},
};

const HEADS: Heads = Heads { heads: 32, kv_heads: 8, head_dim: 128 };
/// Launches that are timed together.
const TIMES: usize = 50;
/// Tokens of a prompt that are admitted at once.
const RUN: usize = 512;
/// Newest queries that score, W.
const WINDOW: usize = 32;

fn rows(count: usize, device: &Device) -> Tensor<Backend, 2> {
    Tensor::random([count, HEADS.width()], Distribution::Uniform(-1.0, 1.0), device)
}

/// Waits until the device has done what it was asked for.
fn wait(device: &Device) {
    Tensor::<Backend, 1>::zeros([1], device).into_data();
}

fn plan(kind: StorageKind, slots: usize, tokens: usize) -> CachePlan {
    CachePlan {
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
        tokens,
        window: None,
        keys: kind,
        values: kind,
        eviction: None,
    }
}

/// Channels kept, T.
fn kept(_: usize, _: usize) -> usize {
    HEADS.head_dim / 2
}

/// Feeds `tokens` tokens to each of the slots.
fn fill(ops: &mut Ops, cache: &mut <Ops as ThinOps>::Cache, slots: usize, tokens: usize, device: &Device) {
    for slot in 0..slots {
        for first in (0..tokens).step_by(RUN) {
            let count = RUN.min(tokens - first);
            cache.begin(slot, count, true).expect("room");
            let (mut prompt, fused) = (ops.prompt(cache, slot, count, WINDOW, HEADS), rows(count, device));
            ops.hold(cache, 0, &mut prompt, &fused).expect("rows");
            ops.admit_prompt(cache, 0, &prompt).expect("numbers");
            cache.commit(slot);
        }
    }
}

/// A step of attention at `tokens` tokens for each of `slots` sequences.
fn attention(kind: StorageKind, slots: usize, tokens: usize, bandwidth: f64) {
    let device = Device::default();
    let mut ops = Ops::new(device.clone());
    let mut cache = ops.cache(plan(kind, slots, tokens + 1), WINDOW, &kept).expect("a cache");
    fill(&mut ops, &mut cache, slots, tokens, &device);
    let all: Vec<usize> = (0..slots).collect();
    all.iter().for_each(|&slot| cache.begin(slot, 1, false).expect("room"));
    let fused = rows(slots, &device);
    ops.admit(&mut cache, 0, &all, &fused, HEADS).expect("numbers");
    let mut out = ops.rows(slots, HEADS.keys());
    let mut attend = |times: usize| {
        wait(&device);
        let start = Instant::now();
        for _ in 0..times {
            out = ops.attend(&cache, 0, &all, &fused, HEADS, out.clone()).expect("a cache");
        }
        wait(&device);
        start.elapsed().as_secs_f64() / times as f64
    };
    attend(3);
    let seconds = attend(TIMES);
    let bytes = cache.planned().total() as f64;
    println!(
        "{:6} batch {slots:3} tokens {tokens:6}: {:9.1} µs, {:8.1} MB, {:3.0}% of what is copied",
        kind.name(),
        seconds * 1e6,
        bytes / 1e6,
        100.0 * bytes / seconds / bandwidth
    );
}

/// Scoring, choosing, correcting, thinning and storing a prompt of `tokens` tokens in one layer.
fn admission(kind: StorageKind, tokens: usize) {
    let device = Device::default();
    let mut ops = Ops::new(device.clone());
    let mut cache = ops.cache(plan(kind, 1, tokens), WINDOW, &kept).expect("a cache");
    let mut seconds: Vec<f64> = (0..6)
        .map(|_| {
            cache.clear(0);
            cache.begin(0, tokens, true).expect("room");
            let mut prompt = ops.prompt(&cache, 0, tokens, WINDOW, HEADS);
            for first in (0..tokens).step_by(RUN) {
                ops.hold(&cache, 0, &mut prompt, &rows(RUN.min(tokens - first), &device)).expect("rows");
            }
            wait(&device);
            let start = Instant::now();
            ops.admit_prompt(&mut cache, 0, &prompt).expect("numbers");
            wait(&device);
            start.elapsed().as_secs_f64()
        })
        .skip(1)
        .collect();
    seconds.sort_by(f64::total_cmp);
    println!("{:6} prompt of {tokens} tokens thinned and stored: {:9.1} µs a layer", kind.name(), seconds[2] * 1e6);
}

/// The attention of a prompt of `tokens` tokens to itself and to `past` tokens of the cache in one layer, run after run.
fn prompt(kind: StorageKind, past: usize, tokens: usize) {
    let device = Device::default();
    let mut ops = Ops::new(device.clone());
    let mut cache = ops.cache(plan(kind, 1, past + tokens), WINDOW, &kept).expect("a cache");
    fill(&mut ops, &mut cache, 1, past, &device);
    cache.begin(0, tokens, true).expect("room");
    let runs: Vec<_> = (0..tokens).step_by(RUN).map(|first| rows(RUN.min(tokens - first), &device)).collect();
    let mut prompt = ops.prompt(&cache, 0, tokens, WINDOW, HEADS);
    let mut seconds: Vec<f64> = (0..6)
        .map(|_| {
            wait(&device);
            let start = Instant::now();
            for fused in &runs {
                ops.hold(&cache, 0, &mut prompt, fused).expect("rows");
                let out = ops.rows(fused.dims()[0], HEADS.keys());
                ops.attend_prompt(&cache, 0, &prompt, fused, out).expect("rows");
            }
            wait(&device);
            start.elapsed().as_secs_f64()
        })
        .skip(1)
        .collect();
    seconds.sort_by(f64::total_cmp);
    // Two products, of whose own tokens half is behind one, a multiplication and an addition each.
    let operations = 4.0 * (HEADS.keys() * tokens) as f64 * (past as f64 + tokens as f64 / 2.0);
    let speed = operations / seconds[2] / 1e12;
    let after = if past > 0 { format!(" after {past} in {}", kind.name()) } else { String::new() };
    println!("prompt of {tokens} tokens{after} attends: {:9.1} µs a layer, {speed:5.2} TFLOP/s", seconds[2] * 1e6);
}

/// Whether what is to be measured, caches of `plan`, takes half of `free` bytes at most; says so where it does not.
fn fits(plan: CachePlan, free: usize) -> bool {
    let bytes = plan.bytes(kept).map_or(usize::MAX, |bytes| bytes.total());
    if bytes > free / 2 {
        println!(
            "{:6} batch {:3} tokens {:6}: left out, takes {:.1} of {:.1} free GB",
            plan.keys.name(),
            plan.slots,
            plan.tokens,
            bytes as f64 / 1e9,
            free as f64 / 1e9
        );
    }
    bytes <= free / 2
}

fn main() {
    if let Err(error) = probe() {
        return println!("{error}");
    }
    let _ = allocate_synchronously();
    let free = memory().map_or(0, |memory| memory.free);
    let bandwidth = copy_bandwidth();
    println!("copies: {:.0} GB/s", bandwidth / 1e9);
    for kind in [StorageKind::F16, StorageKind::Int8, StorageKind::Int4] {
        for slots in [1, 8, 32] {
            for tokens in [4096, 16_384, 65_536] {
                if fits(plan(kind, slots, tokens + 1), free) {
                    attention(kind, slots, tokens, bandwidth);
                }
            }
        }
    }
    for tokens in [512, 2048, 16_384] {
        prompt(StorageKind::F16, 0, tokens);
    }
    for kind in [StorageKind::F16, StorageKind::Int4] {
        for tokens in [16, 512] {
            prompt(kind, 16_384, tokens);
        }
    }
    for kind in [StorageKind::F16, StorageKind::Int4] {
        admission(kind, 16_384);
    }
}
