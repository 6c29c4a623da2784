//! Every operation of the processor against its plain tensor reference: quantised weights, vectors and threads on one
//! side, burn's tensor operations on the other.

use burn::tensor::{Tensor, TensorData};
use burn_ndarray::{NdArray, NdArrayDevice};
use bytes::Bytes;
use half::f16;
use proptest::prelude::*;
use std::ops::Range;
use thinkey_core::{
    BLOCK, CachePlan, Lambda, StorageKind,
    policy::{Fix, Life, Score, ThinValues},
    token::{Eviction, h2o::H2o},
};
use thinkey_kernels::{
    cpu::{Cpu, cache::CacheError, linear::Activations, rows::Pairs, simd::Level},
    format::{Matrix, WeightFormat},
    ops::{Cache, Choosing, HeadNorms, Heads, HeldHead, Norm, Rotation, ThinOps},
    reference::Reference,
};

type Backend = NdArray<f32>;
type Rows = Tensor<Backend, 2>;

/// A deterministic stream of numbers in -1..1.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn take(&mut self, len: usize) -> Vec<f32> {
        std::iter::repeat_with(|| self.next()).take(len).collect()
    }

    fn rows(&mut self, rows: usize, width: usize) -> Rows {
        Tensor::from_data(TensorData::new(self.take(rows * width), [rows, width]), &NdArrayDevice::Cpu)
    }

    fn norm(&mut self, width: usize) -> Norm<Backend> {
        Norm { weight: Tensor::from_data(TensorData::new(self.take(width), [width]), &NdArrayDevice::Cpu), eps: 1e-5 }
    }

    /// A matrix of `f32`, or of random 4-bit blocks.
    fn matrix(&mut self, format: WeightFormat, rows: usize, cols: usize) -> Matrix {
        let bytes: Vec<u8> = match format {
            WeightFormat::F32 => self.take(rows * cols).into_iter().flat_map(f32::to_le_bytes).collect(),
            _ => (0..rows * cols / 32)
                .flat_map(|_| {
                    let scale = f16::from_f32(0.1 * self.next()).to_le_bytes();
                    let codes = [(); 16].map(|()| (self.next() * 128.0) as i8 as u8);
                    scale.into_iter().chain(codes).collect::<Vec<_>>()
                })
                .collect(),
        };
        Matrix::new(format, rows, cols, Bytes::from(bytes)).unwrap()
    }
}

fn close(ours: &Rows, theirs: &Rows, what: &str) -> Result<(), TestCaseError> {
    prop_assert_eq!(ours.dims(), theirs.dims(), "{}", what);
    for (at, (a, b)) in ours.to_data().iter::<f32>().zip(theirs.to_data().iter::<f32>()).enumerate() {
        prop_assert!((a - b).abs() <= 5e-4 * b.abs().max(1.0), "{what}: {a} instead of {b} at {at}");
    }
    Ok(())
}

fn machines() -> impl Iterator<Item = Cpu> {
    let threads = [2, 1, 3].into_iter().cycle();
    Level::available().zip(threads).map(|(level, threads)| Cpu::new(threads, level, Activations::Exact).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.min(24)))]

    #[test]
    fn dense_operations(rows in 1usize..40, blocks in 1usize..4, features in 1usize..70, seed in any::<u64>()) {
        let mut numbers = Numbers(seed);
        let (width, inner) = (32 * blocks, 32 * (features % 3 + 1));
        let x = numbers.rows(rows, width);
        let norm = numbers.norm(width);
        let layers = Layers {
            fused: vec![
                numbers.matrix(WeightFormat::Q4_0, features, width),
                numbers.matrix(WeightFormat::F32, 3, width),
            ],
            bias: numbers.take(features + 3),
            square: numbers.matrix(WeightFormat::Q4_0, width, width),
            gate_up: [(); 2].map(|()| numbers.matrix(WeightFormat::Q4_0, inner, width)),
            down: numbers.matrix(WeightFormat::Q4_0, width, inner),
        };
        let tokens: Vec<u32> = (0..rows).map(|row| (row * 31 % features) as u32).collect();
        let part = rows / 3..rows;
        let theirs = dense(&mut Reference::<Backend>::default(), &layers, &x, &norm, &tokens, part.clone());
        for mut cpu in machines() {
            let ours = dense(&mut cpu, &layers, &x, &norm, &tokens, part.clone());
            for ((what, ours), (_, theirs)) in ours.iter().zip(&theirs) {
                close(ours, theirs, what)?;
            }
            let mut host = Vec::new();
            cpu.read(&x, &mut host);
            prop_assert_eq!(host, x.to_data().to_vec::<f32>().unwrap());
        }
    }

    #[test]
    fn rotation(rows in 1usize..9, half in 1usize..20, first in 0usize..3000, seed in any::<u64>()) {
        let mut numbers = Numbers(seed);
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 2 * half };
        let frequencies: Vec<f32> = (0..half).map(|i| 100f32.powf(-(i as f32) / half as f32)).collect();
        let norms = HeadNorms { query: numbers.norm(2 * half), key: numbers.norm(2 * half) };
        let fused = numbers.rows(rows, heads.width());
        for pairs in [Pairs::Adjacent, Pairs::Halves] {
            for norms in [None, Some(&norms)] {
                let rotation = Rotation { frequencies: &frequencies, pairs, norms };
                let theirs = Reference::<Backend>::default().rotate(fused.clone(), heads, rotation, &|row| first + row);
                for mut cpu in machines() {
                    let ours = cpu.rotate(fused.clone(), heads, rotation, &|row| first + row);
                    close(&ours, &theirs, "rotate")?;
                }
            }
        }
    }

    /// Prompts, further turns and steps of two sequences in one cache: each pass of each layer attends alike, so the
    /// masks, the thinned keys and the recent tokens are alike. The processor's prompts go through a layer in runs of
    /// some blocks, the reference's as a whole.
    #[test]
    fn admission_and_attention(
        (sinks, corrected, per_query) in (prop_oneof![Just(0usize), 1usize..6, Just(33usize)], any::<bool>(), any::<bool>()),
        life in prop_oneof![
            2 => Just(Life::Prompt),
            1 => Just(Life::Turn),
            1 => (1u32..100).prop_map(|tokens| Life::Every { tokens }),
        ],
        thin_values in prop_oneof![
            2 => Just(ThinValues::Whole),
            1 => (1u16..1000).prop_map(|x| ThinValues::L2 { lambda: Lambda::from_per_mille(x).unwrap() }),
            1 => (1u16..1000).prop_map(|x| ThinValues::Query { lambda: Lambda::from_per_mille(x).unwrap() }),
        ],
        recent in 0usize..40,
        window in prop::option::of(20usize..150),
        half in any::<bool>(),
        kept in [1usize..=16, 1usize..=16],
        scoring in 1usize..40,
        score in prop_oneof![
            3 => Just(Score::Query),
            1 => Just(Score::L1),
            1 => Just(Score::L2),
            1 => (1u32..60).prop_map(|tokens| Score::Sample { tokens }),
            1 => any::<u64>().prop_map(|seed| Score::Random { seed }),
            1 => (1u32..64).prop_map(|rows| Score::Sketch { rows }),
        ],
        run in 1usize..4,
        passes in prop::collection::vec((prop_oneof![2 => Just(0usize), 1 => 1usize..120], 0usize..2), 1..12),
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let heads = Heads { heads: 6, kv_heads: 2, head_dim: 16 };
        let kind = if half { StorageKind::F16 } else { StorageKind::F32 };
        let tokens = passes.iter().map(|pass| pass.0.max(1)).sum();
        let plan = CachePlan {
            layers: 2, kv_heads: 2, copies: if per_query { 3 } else { 1 }, flexible: false,
            renews: life != Life::Prompt, head_dim: 16, sinks, recent,
            fix: if corrected && life == Life::Prompt { Fix::Compensated } else { Fix::None },
            value_lambda: match thin_values {
                ThinValues::Whole => Lambda::WHOLE,
                ThinValues::L2 { lambda } | ThinValues::Query { lambda } => lambda,
            },
            slots: 2, tokens, window, keys: kind, values: kind, eviction: None,
        };
        let channels = |layer: usize, head: usize| if layer == 0 { kept[head % 2] } else { 16 };
        let mut plain = Reference::<Backend>::default();
        let mut machines: Vec<_> = machines().map(|cpu| (cpu.cache(plan, scoring, &channels).unwrap(), cpu)).collect();
        let mut theirs = plain.cache(plan, scoring, &channels).unwrap();
        let choosing = Choosing { score, values: thin_values, life };
        theirs.choose_by(choosing);
        machines.iter_mut().for_each(|(cache, _)| cache.choose_by(choosing));
        for &(prompt, slot) in &passes {
            // Nothing of a prompt: one step of both sequences.
            let slots = [slot, 1 - slot];
            let (rows, slots) = if prompt > 0 { (prompt, &slots[..1]) } else { (2, &slots[..]) };
            let new = if prompt > 0 { prompt } else { 1 };
            if slots.iter().any(|&slot| theirs.check(slot, new).is_err()) {
                continue;
            }
            slots.iter().for_each(|&slot| theirs.begin(slot, new, prompt > 0).unwrap());
            for (cache, _) in &mut machines {
                slots.iter().for_each(|&slot| cache.begin(slot, new, prompt > 0).unwrap());
            }
            for layer in 0..2 {
                let fused = numbers.rows(rows, heads.width());
                let run_of = |run| if prompt > 0 { Some(run) } else { None };
                let (expected, held) = turn(&mut plain, &mut theirs, layer, (slots, run_of(rows)), &fused, heads);
                for (cache, cpu) in &mut machines {
                    let (ours, seen) = turn(cpu, cache, layer, (slots, run_of(run * BLOCK)), &fused, heads);
                    close(&ours, &expected, "attend")?;
                    prop_assert_eq!(&seen, &held);
                }
            }
            slots.iter().for_each(|&slot| theirs.commit(slot));
            for (cache, _) in &mut machines {
                slots.iter().for_each(|&slot| cache.commit(slot));
                slots.iter().for_each(|&slot| assert_eq!(cache.position(slot), theirs.position(slot)));
            }
        }
        // What is forgotten leaves no trace.
        theirs.clear(0);
        prop_assert_eq!(theirs.position(0), 0);
        theirs.clear(1);
        prop_assert_eq!(theirs.allocated(), 0);
    }
}

/// Weights of the dense operations.
struct Layers {
    fused: Vec<Matrix>,
    bias: Vec<f32>,
    square: Matrix,
    gate_up: [Matrix; 2],
    down: Matrix,
}

/// What the dense operations make of `x`.
fn dense<O: ThinOps<Backend = Backend>>(
    ops: &mut O,
    layers: &Layers,
    x: &Rows,
    norm: &Norm<Backend>,
    tokens: &[u32],
    part: Range<usize>,
) -> [(&'static str, Rows); 4] {
    let fused = ops.linear(layers.fused.clone(), Some(layers.bias.clone())).unwrap();
    let square = ops.linear(vec![layers.square.clone()], None).unwrap();
    let gate_up = ops.linear(layers.gate_up.to_vec(), None).unwrap();
    let down = ops.linear(vec![layers.down.clone()], None).unwrap();
    let width = x.dims()[1];
    let input = x.to_data().iter::<f32>().take(part.len() * width).collect();
    let input = Tensor::from_data(TensorData::new::<f32, _>(input, [part.len(), width]), &NdArrayDevice::Cpu);
    let embedded = ops.rows(tokens.len(), x.dims()[1]);
    let projected = ops.rows(part.len(), layers.bias.len());
    [
        ("embed", ops.embed(&fused, tokens, embedded)),
        ("norm_linear", ops.norm_linear(x, part.clone(), norm, &fused, projected)),
        ("add_linear", ops.add_linear(&input, &square, x.clone(), part.clone())),
        ("feed_forward", ops.feed_forward(x.clone(), part, norm, &gate_up, &down)),
    ]
}

/// One layer's attention and admission: of a step of `slots`, or of a prompt in runs of so many rows, and what is held of it.
fn turn<O: ThinOps<Backend = Backend>>(
    ops: &mut O,
    cache: &mut O::Cache,
    layer: usize,
    (slots, run): (&[usize], Option<usize>),
    fused: &Rows,
    heads: Heads,
) -> (Rows, Vec<HeldHead>) {
    let rows = fused.dims()[0];
    let Some(run) = run else {
        ops.admit(cache, layer, slots, fused, heads).unwrap();
        let out = ops.rows(rows, heads.keys());
        return (ops.attend(cache, layer, slots, fused, heads, out).unwrap(), Vec::new());
    };
    let mut prompt = ops.prompt(cache, slots[0], rows, cache.window(), heads);
    let runs = (0..rows).step_by(run).map(|first| {
        let count = run.min(rows - first);
        let values = fused.to_data().iter::<f32>().skip(first * heads.width()).take(count * heads.width()).collect();
        let fused = Tensor::from_data(TensorData::new::<f32, _>(values, [count, heads.width()]), &NdArrayDevice::Cpu);
        ops.hold(cache, layer, &mut prompt, &fused).unwrap();
        let out = ops.rows(count, heads.keys());
        ops.attend_prompt(cache, layer, &prompt, &fused, out).unwrap()
    });
    let out = Tensor::cat(runs.collect(), 0);
    ops.admit_prompt(cache, layer, &prompt).unwrap();
    let held = |head| {
        let mut held = HeldHead::default();
        ops.held(&prompt, head, &mut held);
        held
    };
    (out, (0..heads.kv_heads).map(held).collect())
}

#[test]
fn a_score_that_is_no_number_is_an_error() {
    let heads = Heads { heads: 1, kv_heads: 1, head_dim: 16 };
    let kind = StorageKind::F32;
    let plan = CachePlan {
        layers: 1,
        kv_heads: 1,
        head_dim: 16,
        sinks: 0,
        recent: 0,
        copies: 1,
        flexible: false,
        renews: false,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: 64,
        window: None,
        keys: kind,
        values: kind,
        eviction: None,
    };
    fn refuses<O: ThinOps<Backend = Backend>>(mut ops: O, plan: CachePlan, heads: Heads) {
        let mut cache = ops.cache(plan, 32, &|_, _| 8).unwrap();
        let rows = TensorData::new(vec![f32::NAN; 64 * 48], [64, 48]);
        let rows = Tensor::from_data(rows, &NdArrayDevice::Cpu);
        cache.begin(0, 64, true).unwrap();
        let mut prompt = ops.prompt(&cache, 0, 64, 32, heads);
        ops.hold(&cache, 0, &mut prompt, &rows).unwrap();
        let error = ops.admit_prompt(&mut cache, 0, &prompt).unwrap_err();
        assert!(error.to_string().starts_with("the score of channel 0 is not a number"), "{error}");
        cache.clear(0);
        assert_eq!(cache.position(0), 0);
    }
    refuses(Cpu::new(1, Level::best(), Activations::Exact).unwrap(), plan, heads);
    refuses(Reference::<Backend>::default(), plan, heads);
}

#[test]
fn the_reference_refuses_quantised_storage() {
    let plan = CachePlan {
        layers: 1,
        kv_heads: 1,
        head_dim: 16,
        sinks: 0,
        recent: 32,
        copies: 1,
        flexible: false,
        renews: false,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: 100,
        window: None,
        keys: StorageKind::F16,
        values: StorageKind::Int8,
        eviction: None,
    };
    let error = Reference::<Backend>::default().cache(plan, 32, &|_, _| 8).unwrap_err();
    assert_eq!(error, CacheError::Kind { kind: StorageKind::Int8 });
    let eviction = Some(Eviction::H2o(H2o { capacity: 512, recent: 32 }));
    let plan = CachePlan { eviction, values: StorageKind::F16, ..plan };
    assert_eq!(Reference::<Backend>::default().cache(plan, 32, &|_, _| 8).unwrap_err(), CacheError::Eviction);
    assert!(error.to_string().contains("int8 caches are not to be had"));
}
