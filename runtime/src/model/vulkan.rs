//! Whole models on a software Vulkan against the processor: logits of a prompt, of another one, and of single tokens.

use super::{
    Architecture, Model, ModelConfig,
    config::{Pairing, Rope, RopeScaling},
    transformer::WINDOW,
};
use crate::{
    engine::{Device, SessionOptions},
    plan::{Planner, Workload},
    policy::{self, CacheDesign, Calibration},
    store::{DEFAULT, Store},
    weights::{Checkpoint, fixture},
};
use std::{ops::ControlFlow, path::Path};
use thinkey_core::{Lambda, Policy};
use thinkey_kernels::{
    cpu::{Cpu, linear::Activations, simd::Level},
    ops::ThinOps,
    vulkan,
};

/// Tokens of the default model's prompt: beside sinks and recent ones twice as many as a head has channels, which is what it
/// takes to learn how queries are corrected, and a few more, so that the first block is not full.
const PROMPT: usize = 170;

/// Logits of some prompts and some tokens.
fn logits<O: ThinOps>(
    checkpoint: &Checkpoint,
    ops: O,
    design: &CacheDesign,
    prompts: &[&[u32]],
    steps: usize,
) -> Vec<f32> {
    let mut model = Model::load(checkpoint, ops, &mut |_, _| {}).unwrap();
    let tokens = prompts.iter().map(|prompt| prompt.len()).sum::<usize>() + steps;
    let options: SessionOptions = design.options(1, tokens, 32, WINDOW);
    let mut session = model.session(options, &|layer, head| design.kept(layer, head)).unwrap();
    let mut all = Vec::new();
    for prompt in prompts {
        all.extend_from_slice(model.prefill(&mut session, 0, prompt, &mut |_, _| ControlFlow::Continue(())).unwrap());
    }
    for &token in &prompts[0][..steps] {
        all.extend_from_slice(model.decode(&mut session, &[0], &[token]).unwrap());
    }
    all
}

/// By loops of floats, as the device: where the processor multiplies integers it rounds queries and weights of codes to eight
/// bits.
fn cpu() -> Cpu {
    Cpu::new(2, Level::PORTABLE, Activations::Exact).unwrap()
}

/// Compares relative to the largest logit of a row.
fn compare(what: &str, actual: &[f32], expected: &[f32], vocab: usize, tolerance: f32) {
    assert_eq!(actual.len(), expected.len());
    for (row, (x, y)) in actual.chunks(vocab).zip(expected.chunks(vocab)).enumerate() {
        let most = y.iter().fold(0.0f32, |most, y| most.max(y.abs()));
        for (at, (x, y)) in x.iter().zip(y).enumerate() {
            assert!((x - y).abs() <= tolerance * most, "{what}: row {row}, logit {at}: {x}, not {y} of {most}");
        }
    }
}

/// Biases and normalised heads among them; blocks of prompts and of steps.
#[test]
fn tiny_models_say_what_they_do_on_the_processor() {
    let policies = ["think,keys=f32,values=f32", "choice=top(.5),fix=compensated,score=residual,keys=f32,values=f32"];
    for (architecture, policy) in [
        (Architecture::Llama, policies[0]),
        (Architecture::Qwen2, policies[1]),
        (Architecture::Mistral, policies[0]),
        (Architecture::Qwen3, policies[1]),
    ] {
        let config = ModelConfig { context: 512, ..fixture::config(architecture) };
        let file = fixture::gguf(&config).to_bytes();
        let checkpoint = Checkpoint::from_gguf(Path::new("m.gguf"), file.into()).unwrap();
        let design = CacheDesign::new(policy.parse().unwrap(), checkpoint.config(), None).unwrap();
        let tokens: Vec<u32> = (0..120).map(|at| (at * 7919 % config.vocab) as u32).collect();
        let prompts = [&tokens[..90], &tokens[90..110]];
        let expected = logits(&checkpoint, cpu(), &design, &prompts, 40);
        let actual = logits(&checkpoint, vulkan::ops(), &design, &prompts, 40);
        compare(&format!("{architecture:?}, {policy}"), &actual, &expected, config.vocab, 5e-3);
    }
}

/// What the device's allocator has taken, while prompts of one and more runs are read, of a sequence that goes on and of
/// another, and while one and both take steps.
#[test]
fn no_more_is_taken_than_is_planned() {
    let rope = Rope::new(10_000.0, 64, RopeScaling::None, Pairing::Halves).unwrap();
    let config = ModelConfig {
        width: 192,
        heads: 6,
        kv_heads: 2,
        head_dim: 64,
        feed_forward: 320,
        vocab: 600,
        context: 2048,
        rope,
        ..fixture::config(Architecture::Qwen2)
    };
    let file = fixture::gguf(&config).to_bytes();
    let checkpoint = Checkpoint::from_gguf(Path::new("m.gguf"), file.into()).unwrap();
    for policy in ["think,keys=int4,values=int4", "choice=top(.5),fix=compensated,score=residual,keys=int8,values=int4"]
    {
        let workload = Workload {
            context: 1000,
            prompt: Some(600),
            slots: 2,
            policy: policy.parse().unwrap(),
            recent: 32,
            window: WINDOW,
            threads: 1,
        };
        let planned = Planner::new(&checkpoint, None).on(Device::Cuda).plan(&workload).unwrap();
        let design = CacheDesign::new(workload.policy, &config, None).unwrap();
        // On a thread of its own, whose memory is told apart from that of others.
        let most = std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                let (ops, mut most) = (vulkan::ops(), 0);
                let mut look = || {
                    most = most.max(ops.reserved());
                    ControlFlow::Continue(())
                };
                let mut model = Model::load(&checkpoint, vulkan::ops(), &mut |_, _| {}).unwrap();
                let options = design.options(2, workload.context, workload.recent, WINDOW);
                let mut session = model.session(options, &|layer, head| design.kept(layer, head)).unwrap();
                let _ = look();
                let tokens: Vec<u32> = (0..600).map(|at| (at * 7919 % config.vocab) as u32).collect();
                for (slot, count) in [(0, 600), (1, 90), (0, 40), (1, 560)] {
                    let prompt = &tokens[..count];
                    model.prefill(&mut session, slot, prompt, &mut |_, _| look()).unwrap();
                }
                for slots in [&[0, 1][..], &[1], &[0, 1]] {
                    for &token in &tokens[..3] {
                        model.decode_best(&mut session, slots, &vec![token; slots.len()], 1).unwrap();
                        let _ = look();
                    }
                }
                most
            });
            work.join().unwrap()
        });
        let total = planned.total();
        assert!(most <= total, "{policy}: {most} bytes are taken, and {total} planned: {planned:?}");
        assert!(total < 2 * most, "{policy}: {total} bytes are planned for {most}: {planned:?}");
    }
}

/// The default model, which is fetched if it is not in the store: thin in floats, and as the default is on devices.
#[test]
#[ignore = "takes minutes where the processor's loops are not optimised: .ci/cuda --ignored"]
fn the_default_model_says_what_it_does_on_the_processor() {
    let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (config, calibration) = (checkpoint.config(), Calibration::find(&checkpoint).unwrap());
    let think = Policy::preset("think").unwrap().with_lambda(Lambda::from_per_mille(500).unwrap()).unwrap();
    let default = policy::default(config.head_dim, calibration.is_some(), Device::Cuda);
    // Any tokens do, if they are the same for both.
    let tokens: Vec<u32> = (0..PROMPT as u32).map(|at| 300 + at * 7919 % 40_000).collect();
    for policy in [think, default] {
        let design = CacheDesign::new(policy, config, calibration.as_ref()).unwrap();
        let expected = logits(&checkpoint, cpu(), &design, &[&tokens], 2);
        let actual = logits(&checkpoint, vulkan::ops(), &design, &[&tokens], 2);
        let worst = actual.iter().zip(&expected).fold(0.0f32, |worst, (x, y)| worst.max((x - y).abs()));
        eprintln!("{policy}: logits differ by at most {worst}");
        compare(&policy.to_string(), &actual, &expected, config.vocab, 2e-2);
    }
}
