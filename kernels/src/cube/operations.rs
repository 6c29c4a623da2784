//! The operations on a software Vulkan against plain tensors on the processor: prompts, further prompts, single tokens.

use super::{Device, launch::launches};
use crate::{
    cpu::{Cpu, linear::Activations, rows::Pairs, simd::Level},
    format::{Matrix, WeightFormat},
    ops::{Cache, Choosing, HeadNorms, Heads, Norm, Rotation, Rows, ThinOps},
    reference::Reference,
};
use burn::tensor::{Tensor, TensorData};
use burn_ndarray::NdArray;
use burn_wgpu::{Wgpu, WgpuRuntime};
use bytes::Bytes;
use thinkey_core::{
    CachePlan, Lambda, StorageKind,
    policy::{Fix, Score},
};

const HEADS: Heads = Heads { heads: 6, kv_heads: 2, head_dim: 32 };
const LAYERS: usize = 2;
/// Rows of a prompt that are held at once.
const RUN: usize = 96;

fn plan(kind: StorageKind, sinks: usize, window: Option<usize>, copies: usize) -> CachePlan {
    CachePlan {
        layers: LAYERS,
        kv_heads: HEADS.kv_heads,
        copies,
        flexible: false,
        renews: false,
        head_dim: HEADS.head_dim,
        sinks,
        recent: 32,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 2,
        tokens: 600,
        window,
        keys: kind,
        values: kind,
        eviction: None,
    }
}

/// Feeds the same rows to `ops` and returns all attention outputs.
fn outputs<O: ThinOps>(mut ops: O, plan: CachePlan, score: Score) -> Vec<f32> {
    let device = Default::default();
    let mut cache = ops.cache(plan, 8, &|layer, head| 8 + 5 * layer + 3 * head).unwrap();
    cache.choose_by(Choosing { score, ..Choosing::default() });
    let (mut all, mut part, mut seed) = (Vec::new(), Vec::new(), 1u64);
    let mut rows = |count: usize| -> Rows<O> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let width = HEADS.width();
        let data = (0..count * width).map(|at| next() * (1 + at * 7 % 5) as f32).collect::<Vec<f32>>();
        Tensor::from_data(TensorData::new(data, [count, width]), &device)
    };
    let mut take = |ops: &O, out: Rows<O>| {
        ops.read(&out, &mut part);
        all.extend_from_slice(&part);
    };
    let prompts = [(0, 200), (1, 7), (0, 50), (1, 131)];
    for (slot, count) in prompts {
        cache.begin(slot, count, true).unwrap();
        for layer in 0..LAYERS {
            let mut prompt = ops.prompt(&cache, slot, count, 8, HEADS);
            for first in (0..count).step_by(RUN) {
                let fused = rows(RUN.min(count - first));
                ops.hold(&cache, layer, &mut prompt, &fused).unwrap();
                let out = ops.rows(fused.dims()[0], HEADS.keys());
                let out = ops.attend_prompt(&cache, layer, &prompt, &fused, out).unwrap();
                take(&ops, out);
            }
            ops.admit_prompt(&mut cache, layer, &prompt).unwrap();
        }
        cache.commit(slot);
    }
    for step in 0..40 {
        // Now one sequence, now both.
        let slots: &[usize] = if step % 3 == 0 { &[1] } else { &[1, 0] };
        slots.iter().for_each(|&slot| cache.begin(slot, 1, false).unwrap());
        for layer in 0..LAYERS {
            let fused = rows(slots.len());
            ops.admit(&mut cache, layer, slots, &fused, HEADS).unwrap();
            let out = ops.rows(slots.len(), HEADS.keys());
            let out = ops.attend(&cache, layer, slots, &fused, HEADS, out).unwrap();
            take(&ops, out);
        }
        slots.iter().for_each(|&slot| cache.commit(slot));
    }
    all
}

fn compare(plan: CachePlan, score: Score, actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len());
    for (at, (x, y)) in actual.iter().zip(expected).enumerate() {
        assert!((x - y).abs() <= 2e-4 * (1.0 + y.abs()), "{plan:?}, {score:?}: place {at}: {x}, not {y}");
    }
}

fn device() -> Device<Wgpu, WgpuRuntime> {
    Device::new(Default::default())
}

fn cpu() -> Cpu {
    Cpu::new(1, Level::best(), Activations::Exact).unwrap()
}

#[test]
fn outputs_are_those_of_plain_tensors() {
    for (kind, sinks, window, copies) in
        [(StorageKind::F32, 4, None, 1), (StorageKind::F16, 0, Some(90), 1), (StorageKind::F32, 3, Some(40), 3)]
    {
        let plan = plan(kind, sinks, window, copies);
        let expected = outputs(Reference::<NdArray>::new(Default::default()), plan, Score::Query);
        compare(plan, Score::Query, &outputs(device(), plan, Score::Query), &expected);
    }
}

/// Whatever channels are scored by, and corrected by what a prompt or too few tokens tell.
#[test]
fn outputs_are_those_of_the_processor() {
    let scores = [
        (Score::Residual, Fix::Compensated, 4, None, 1),
        (Score::Query, Fix::Compensated, 0, Some(120), 3),
        (Score::L1, Fix::None, 4, None, 1),
        (Score::Random { seed: 5 }, Fix::None, 4, None, 1),
        (Score::Sketch { rows: 40 }, Fix::None, 3, None, 3),
        (Score::Sample { tokens: 20 }, Fix::None, 0, None, 1),
    ];
    for (score, fix, sinks, window, copies) in scores {
        let plan = CachePlan { fix, ..plan(StorageKind::F32, sinks, window, copies) };
        compare(plan, score, &outputs(device(), plan, score), &outputs(cpu(), plan, score));
    }
    let plan = CachePlan { fix: Fix::Compensated, values: StorageKind::Int4, ..plan(StorageKind::Int4, 4, None, 1) };
    // Codes by loops of floats, as the device: where the processor multiplies integers it rounds queries and weights to
    // eight bits.
    let cpu = Cpu::new(1, Level::PORTABLE, Activations::Exact).unwrap();
    compare(plan, Score::Residual, &outputs(device(), plan, Score::Residual), &outputs(cpu, plan, Score::Residual));
}

/// Keys and queries that are no numbers neither hang nor make a place of a cache that there is not; other sequences do not
/// see them.
#[test]
fn what_is_no_number_stays_where_it_is() {
    let plan = plan(StorageKind::Int4, 4, None, 1);
    let mut ops = device();
    let mut cache = ops.cache(plan, 8, &|_, _| 12).unwrap();
    let rows = |count: usize, x: f32| -> Rows<Device<Wgpu, WgpuRuntime>> {
        let data: Vec<f32> = (0..count * HEADS.width()).map(|at| x + (at * 7 % 11) as f32).collect();
        Tensor::from_data(TensorData::new(data, [count, HEADS.width()]), &Default::default())
    };
    let mut out = Vec::new();
    for (slot, x) in [(0, f32::NAN), (1, 0.5)] {
        cache.begin(slot, 150, true).unwrap();
        for layer in 0..LAYERS {
            let (mut prompt, fused) = (ops.prompt(&cache, slot, 150, 8, HEADS), rows(150, x));
            ops.hold(&cache, layer, &mut prompt, &fused).unwrap();
            ops.admit_prompt(&mut cache, layer, &prompt).unwrap();
        }
        cache.commit(slot);
    }
    for layer in 0..LAYERS {
        if layer == 0 {
            [0, 1].iter().for_each(|&slot| cache.begin(slot, 1, false).unwrap());
        }
        let fused = rows(2, 0.25);
        ops.admit(&mut cache, layer, &[0, 1], &fused, HEADS).unwrap();
        let mixed = ops.rows(2, HEADS.keys());
        let mixed = ops.attend(&cache, layer, &[0, 1], &fused, HEADS, mixed).unwrap();
        ops.read(&mixed, &mut out);
        assert!(out[HEADS.keys()..].iter().all(|x| x.is_finite()), "the other sequence");
    }
}

/// The launches of a layer of a decode step, as the module says.
#[test]
fn a_layer_of_a_step_is_nine_launches() {
    let (mut ops, width) = (device(), 64);
    let matrix = |rows: usize, cols: usize| {
        Matrix::new(WeightFormat::F16, rows, cols, Bytes::from(vec![0; rows * cols * 2])).unwrap()
    };
    let qkv = ops.linear(vec![matrix(HEADS.width(), width)], None).unwrap();
    let output = ops.linear(vec![matrix(width, HEADS.keys())], None).unwrap();
    let gate_up = ops.linear(vec![matrix(96, width), matrix(96, width)], None).unwrap();
    let down = ops.linear(vec![matrix(width, 96)], None).unwrap();
    let norm = Norm { weight: ops.vector(vec![1.0; width]), eps: 1e-5 };
    let frequencies = vec![0.1; HEADS.head_dim / 2];
    for slots in [&[0][..], &[1, 0]] {
        let mut cache = ops.cache(plan(StorageKind::Int4, 4, None, 1), 8, &|_, _| 12).unwrap();
        let mut counts = Vec::new();
        // 4 sinks, 32 recent tokens and a block: the ring is full, and then again.
        for _ in 0..104 {
            let mut x = ops.rows(slots.len(), width);
            let (mut fused, mut mixed) = (ops.rows(slots.len(), HEADS.width()), ops.rows(slots.len(), HEADS.keys()));
            slots.iter().for_each(|&slot| cache.begin(slot, 1, false).unwrap());
            let before = launches();
            for layer in 0..LAYERS {
                fused = ops.norm_linear(&x, 0..slots.len(), &norm, &qkv, fused);
                let rotation = Rotation { frequencies: &frequencies, pairs: Pairs::Halves, norms: None };
                fused = ops.rotate(fused, HEADS, rotation, &|_| 3);
                ops.admit(&mut cache, layer, slots, &fused, HEADS).unwrap();
                mixed = ops.attend(&cache, layer, slots, &fused, HEADS, mixed).unwrap();
                x = ops.add_linear(&mixed, &output, x, 0..slots.len());
                x = ops.feed_forward(x, 0..slots.len(), &norm, &gate_up, &down);
            }
            counts.push((launches() - before) as f64 / LAYERS as f64);
            slots.iter().for_each(|&slot| cache.commit(slot));
        }
        // Energies are counted until channels are chosen, and a block is written then and after every 32 tokens.
        let chosen = counts.iter().position(|&count| count == 12.0).unwrap();
        assert!(counts[..chosen].iter().all(|&count| count == 10.0), "{counts:?}");
        for (since, &count) in counts[chosen..].iter().enumerate().skip(1) {
            assert_eq!(count, if since % 32 == 0 { 10.0 } else { 9.0 }, "{since} steps after channels are chosen");
        }
        assert!(counts.len() > chosen + 33);
    }
}

/// Rotation, with and without what comes before it, of both ways to pair channels.
#[test]
fn heads_are_rotated_as_by_plain_tensors() {
    fn rotated<O: ThinOps>(mut ops: O, normed: bool, pairs: Pairs) -> Vec<f32> {
        let data: Vec<f32> = (0..5 * HEADS.width()).map(|at| (at * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let fused = Tensor::from_data(TensorData::new(data, [5, HEADS.width()]), &Default::default());
        let factors = |step: usize| (0..HEADS.head_dim).map(|at| (at * step % 7) as f32 - 2.0).collect();
        let norms = HeadNorms {
            query: Norm { weight: ops.vector(factors(3)), eps: 1e-6 },
            key: Norm { weight: ops.vector(factors(5)), eps: 1e-6 },
        };
        let frequencies: Vec<f32> = (0..HEADS.head_dim / 2).map(|at| 10_000f32.powf(-(at as f32) / 16.0)).collect();
        let rotation = Rotation { frequencies: &frequencies, pairs, norms: normed.then_some(&norms) };
        let out = ops.rotate(fused, HEADS, rotation, &|row| row * row * 100 + 3);
        let mut numbers = Vec::new();
        ops.read(&out, &mut numbers);
        numbers
    }
    for normed in [false, true] {
        for pairs in [Pairs::Adjacent, Pairs::Halves] {
            let expected = rotated(Reference::<NdArray>::new(Default::default()), normed, pairs);
            for (x, y) in rotated(device(), normed, pairs).iter().zip(&expected) {
                assert!((x - y).abs() < 2e-3, "{normed} {pairs:?}: {x}, not {y}");
            }
        }
    }
}

/// The candidates of every row, of vocabularies of one cube and more, equals and what is no number among them; and that no more
/// than two launches are taken.
#[test]
fn the_best_logits_are_those_of_the_host() {
    let (mut ops, mut plain) = (device(), Reference::<NdArray>::new(Default::default()));
    for (vocab, count, most) in [(50_000, 1, 2), (50_000, 64, 2), (300, 7, 1), (5, 9, 1), (4097, 40, 2), (9000, 100, 0)]
    {
        let mut data = super::prompt_tests::random(vocab as u64, 3 * vocab);
        data.iter_mut().step_by(7).for_each(|x| *x = (*x * 8.0).round());
        data.iter_mut().skip(2).step_by(5).for_each(|x| *x = f32::NAN);
        data[vocab..2 * vocab].iter_mut().skip(4).for_each(|x| *x = f32::NEG_INFINITY);
        let (mut actual, mut expected) = (Vec::new(), Vec::new());
        plain.best(
            &Tensor::from_data(TensorData::new(data.clone(), [3, vocab]), &Default::default()),
            count,
            &mut expected,
        );
        let before = launches();
        ops.best(&Tensor::from_data(TensorData::new(data, [3, vocab]), &Default::default()), count, &mut actual);
        assert_eq!(launches() - before, most, "launches for {count} of {vocab}");
        assert_eq!(actual, expected, "{count} of {vocab}");
        assert_eq!(actual.len(), 3 * count.min(vocab));
    }
}
