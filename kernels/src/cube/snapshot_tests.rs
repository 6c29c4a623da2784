//! Sequences that go on elsewhere: on a software Vulkan, and between it and the processor.

use super::Device;
use crate::{
    cpu::{Cpu, linear::Activations, simd::Level},
    ops::{Cache, Heads, Rows, ThinOps},
};
use burn::tensor::{Tensor, TensorData};
use burn_wgpu::{Wgpu, WgpuRuntime};
use thinkey_core::{
    CachePlan, Lambda, StorageKind,
    policy::Fix,
    snapshot::{Progress, SnapshotError},
};

const HEADS: Heads = Heads { heads: 6, kv_heads: 2, head_dim: 32 };
const LAYERS: usize = 2;
const WINDOW: usize = 8;

fn plan((keys, values): (StorageKind, StorageKind), fix: Fix, tokens: usize) -> CachePlan {
    CachePlan {
        layers: LAYERS,
        kv_heads: HEADS.kv_heads,
        copies: 1,
        flexible: false,
        renews: false,
        head_dim: HEADS.head_dim,
        sinks: 4,
        recent: 32,
        fix,
        value_lambda: Lambda::WHOLE,
        slots: 2,
        tokens,
        window: None,
        keys,
        values,
        eviction: None,
    }
}

fn kept(layer: usize, head: usize) -> usize {
    9 + 7 * layer + 3 * head
}

/// A cache, what computes with it, and what it has given.
struct Under<O: ThinOps> {
    ops: O,
    cache: O::Cache,
    given: Vec<f32>,
}

impl<O: ThinOps> Under<O> {
    fn new(ops: O, plan: CachePlan) -> Self {
        let cache = ops.cache(plan, WINDOW, &kept).unwrap();
        Self { ops, cache, given: Vec::new() }
    }

    fn rows(&self, seed: usize, count: usize) -> Rows<O> {
        let width = HEADS.width();
        let mut data = super::prompt_tests::random(seed as u64, count * width);
        data.iter_mut().enumerate().for_each(|(at, x)| *x *= (1 + at % width * 7 % 5) as f32);
        Tensor::from_data(TensorData::new(data, [count, width]), &Default::default())
    }

    fn take(&mut self, out: &Rows<O>) {
        let mut part = Vec::new();
        self.ops.read(out, &mut part);
        self.given.append(&mut part);
    }

    /// Feeds a prompt and steps to a slot.
    fn feed(&mut self, slot: usize, seed: usize, count: usize, steps: usize) {
        self.cache.begin(slot, count, true).unwrap();
        for layer in 0..LAYERS {
            let mut prompt = self.ops.prompt(&self.cache, slot, count, WINDOW, HEADS);
            let fused = self.rows(1000 * seed + layer, count);
            self.ops.hold(&self.cache, layer, &mut prompt, &fused).unwrap();
            let out = self.ops.rows(count, HEADS.keys());
            let out = self.ops.attend_prompt(&self.cache, layer, &prompt, &fused, out).unwrap();
            self.take(&out);
            self.ops.admit_prompt(&mut self.cache, layer, &prompt).unwrap();
        }
        self.cache.commit(slot);
        for step in 0..steps {
            self.cache.begin(slot, 1, false).unwrap();
            for layer in 0..LAYERS {
                let fused = self.rows(1000 * seed + 10 * step + layer + 10, 1);
                self.ops.admit(&mut self.cache, layer, &[slot], &fused, HEADS).unwrap();
                let out = self.ops.rows(1, HEADS.keys());
                let out = self.ops.attend(&self.cache, layer, &[slot], &fused, HEADS, out).unwrap();
                self.take(&out);
            }
            self.cache.commit(slot);
        }
    }

    fn save(&self, slot: usize) -> (Progress, Vec<u16>, Vec<u8>) {
        let (progress, bytes) = self.cache.progress(slot).unwrap();
        let mut out = Vec::new();
        self.cache.save(slot, &mut out).unwrap();
        let heads = out.split_off(LAYERS * HEADS.kv_heads * 2);
        assert_eq!(heads.len(), bytes);
        (progress, bytemuck::pod_collect_to_vec(&out), heads)
    }

    /// What it gives after a snapshot was restored over something else, in other pages than those it was in; and that it saves
    /// what it was given.
    fn goes_on(mut self, (progress, kept, heads): &(Progress, Vec<u16>, Vec<u8>)) -> Vec<f32> {
        self.feed(0, 50, 70, 0);
        self.feed(1, 51, 90, 3);
        self.cache.restore(1, progress, kept, heads).unwrap();
        assert_eq!(self.cache.position(1), progress.position as usize);
        let again = self.save(1);
        assert!(again == (*progress, kept.clone(), heads.clone()), "what is saved again is the same");
        self.feed(0, 52, 40, 0);
        self.given.clear();
        go_on(&mut self, 1);
        self.given
    }
}

fn go_on<O: ThinOps>(under: &mut Under<O>, slot: usize) {
    under.given.clear();
    under.feed(slot, 7, 1, 40);
    under.feed(slot, 8, 50, 3);
}

fn device(plan: CachePlan) -> Under<Device<Wgpu, WgpuRuntime>> {
    Under::new(Device::new(Default::default()), plan)
}

/// By loops of floats, as the device.
fn cpu(plan: CachePlan) -> Under<Cpu> {
    Under::new(Cpu::new(1, Level::PORTABLE, Activations::Exact).unwrap(), plan)
}

fn near(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len());
    for (at, (x, y)) in actual.iter().zip(expected).enumerate() {
        assert!((x - y).abs() <= 2e-4 * (1.0 + y.abs()), "{what}: place {at}: {x}, not {y}");
    }
}

#[test]
fn sequences_go_on_on_the_device_and_the_processor() {
    use StorageKind::{Bf16, F16, Int4, Int8, Trellis2};
    // Channels are chosen and some blocks stored; nothing but whole tokens.
    for (kinds, fix, prompt, steps) in [
        ((Int4, Trellis2), Fix::Compensated, 150, 40),
        ((Int4, Trellis2), Fix::Compensated, 20, 3),
        ((Int8, Int4), Fix::None, 150, 40),
        ((F16, Bf16), Fix::None, 150, 40),
    ] {
        let what = format!("{kinds:?}, {fix:?}, a prompt of {prompt}");
        let (plan, other) = (plan(kinds, fix, 600), plan(kinds, fix, 440));
        let (mut ours, mut processors) = (device(plan), cpu(plan));
        // Something lies beside it.
        ours.feed(1, 9, 100, 0);
        ours.feed(0, 3, prompt, steps);
        processors.feed(0, 3, prompt, steps);
        let (saved, processors_saved) = (ours.save(0), processors.save(0));
        assert!(saved == ours.save(0), "{what}: saved twice");
        assert_eq!((saved.0, &saved.1), (processors_saved.0, &processors_saved.1), "{what}");
        if fix == Fix::None {
            check_blocks(&plan, &saved, &processors_saved, &what);
        }
        go_on(&mut ours, 0);
        let expected = ours.given;
        assert!(device(other).goes_on(&saved) == expected, "{what}: on the device");
        near(&cpu(other).goes_on(&saved), &expected, &format!("{what}: on the processor"));
        go_on(&mut processors, 0);
        let what = format!("{what}: from the processor");
        near(&device(other).goes_on(&processors_saved), &processors.given, &what);
    }
}

/// Masks and blocks are the processor's, to the byte.
fn check_blocks(
    plan: &CachePlan,
    ours: &(Progress, Vec<u16>, Vec<u8>),
    processors: &(Progress, Vec<u16>, Vec<u8>),
    what: &str,
) {
    let (Progress { span, chosen, .. }, mut from) = (ours.0, 0);
    for (head, &kept) in ours.1.iter().enumerate() {
        let layout = plan.head(kept.into()).unwrap();
        let blocks = span.blocks as usize * (layout.key_block_bytes() + layout.value_block_bytes());
        let masks = if chosen { 2 * plan.head_dim.div_ceil(8) } else { 0 };
        let own = from..from + 1 + masks + blocks;
        let other = ours.2[own.clone()].iter().zip(&processors.2[own]).position(|(a, b)| a != b);
        assert_eq!(other, None, "{what}: head {head} of {kept} channels: {masks} bytes of masks, {blocks} of blocks");
        from += layout.snapshot_bytes(span, chosen);
    }
    assert_eq!(from, ours.2.len());
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_nothing() {
    let plan = plan((StorageKind::Int4, StorageKind::Int4), Fix::None, 300);
    let mut under = device(plan);
    assert_eq!(under.cache.progress(0), Err(SnapshotError::Empty));
    under.feed(0, 3, 150, 0);
    let (progress, kept, heads) = under.save(0);
    let refused =
        |under: &mut Under<Device<Wgpu, WgpuRuntime>>, progress: &Progress, kept: &[u16], heads: &[u8], expected| {
            let error = under.cache.restore(1, progress, kept, heads);
            assert_eq!(error, Err(expected));
            assert_eq!(under.cache.position(1), 0);
        };
    let shape = |what| SnapshotError::Shape { what };
    let impossible = |what| SnapshotError::Impossible { what };
    under.feed(1, 4, 40, 0);
    refused(&mut under, &progress, &kept[1..], &heads, shape("heads"));
    refused(&mut under, &progress, &[5; 4], &heads, shape("channels per head"));
    refused(&mut under, &progress, &kept, &heads[..heads.len() - 1], impossible("heads"));
    refused(&mut under, &progress, &kept, &[&heads[..], &[0]].concat(), impossible("heads"));
    refused(&mut under, &Progress { chosen: false, ..progress }, &kept, &heads, impossible("channels"));
    let long = Progress { position: 301, ..progress };
    refused(&mut under, &long, &kept, &heads, impossible("tokens held"));
    let mut short = device(CachePlan { tokens: 149, ..plan });
    let error = short.cache.restore(1, &progress, &kept, &heads);
    assert_eq!(error, Err(SnapshotError::Context { tokens: 150, context: 149 }));
    // All pages are there again.
    under.cache.restore(1, &progress, &kept, &heads).unwrap();
    under.feed(1, 5, 150, 0);
    under.feed(0, 6, 150, 0);
}
