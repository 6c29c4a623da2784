//! Whole models on a software Vulkan against the processor: logits of a prompt, of another one, and of single tokens.

use super::{Architecture, Model, ModelConfig, transformer::WINDOW};
use crate::{
    engine::{Device, SessionOptions},
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

/// Tokens of the default model's prompt: beside sinks and recent ones two blocks, of which the first is not full.
const PROMPT: usize = 80;

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
