//! What storing the cache in fewer bits costs the default model: divergence from a cache in f32, token by token, on real
//! text.

use std::ops::ControlFlow;
use thinkey::{
    engine::{Activations, Engine, EngineOptions, SessionOptions},
    model::transformer::WINDOW,
    store::{DEFAULT, Store},
    text::Tokenizer,
    weights::Checkpoint,
};
use thinkey_core::{Lambda, StorageKind};

/// Log-probabilities after every step that follows a prompt, each step fed the text's own token.
fn predictions(
    engine: &mut Engine,
    (prompt, steps): (&[u32], &[u32]),
    lambda: Lambda,
    kind: StorageKind,
) -> Vec<Vec<f64>> {
    let config = engine.config();
    let plan = config.cache_plan(1, prompt.len() + steps.len(), 32, kind);
    let mut session = engine.session(SessionOptions::new(plan, WINDOW), |_, _| lambda.kept(config.head_dim)).unwrap();
    engine.prefill(&mut session, 0, prompt, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(session.allocated(), session.planned().total());
    let log_probabilities = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
        logits.iter().map(|&x| f64::from(x - max) - sum.ln()).collect()
    };
    steps.iter().map(|&id| log_probabilities(engine.decode(&mut session, &[0], &[id]).unwrap())).collect()
}

/// Mean over the steps of Σ p·ln(p/q).
fn divergence(p: &[Vec<f64>], q: &[Vec<f64>]) -> f64 {
    let one = |p: &Vec<f64>, q: &Vec<f64>| -> f64 { p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum() };
    p.iter().zip(q).map(|(p, q)| one(p, q)).sum::<f64>() / p.len() as f64
}

/// Measures after so many tokens, over so many more.
fn fewer_bits_cost_little(prompt: usize, steps: usize) {
    let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tokenizer = Tokenizer::new(checkpoint.tokenizer().unwrap()).unwrap();
    let text = include_str!("../../runtime/assets/pig-and-pepper.txt");
    let mut ids = tokenizer.encode(text, false).unwrap();
    ids.truncate(prompt + steps);
    let text = ids.split_at(prompt);
    // Rounding to eight bits would turn the least difference into a step.
    let options = EngineOptions { activations: Activations::Exact, ..EngineOptions::default() };
    let mut engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
    for lambda in [Lambda::WHOLE, Lambda::from_per_mille(500).unwrap()] {
        let exact = predictions(&mut engine, text, lambda, StorageKind::F32);
        for (kind, most) in [
            (StorageKind::F16, 1e-5),
            (StorageKind::Bf16, 1e-3),
            (StorageKind::Int8, 1e-3),
            (StorageKind::Int4, 2e-2),
            (StorageKind::Int3, 0.2),
            (StorageKind::Int2, 2.0),
        ] {
            let off = divergence(&exact, &predictions(&mut engine, text, lambda, kind));
            eprintln!("λ = {} per mille, {}: divergence {off:.2e}", lambda.per_mille(), kind.name());
            assert!(off < most, "{}: {off}", kind.name());
        }
    }
}

#[test]
fn fewer_bits_cost_little_in_a_short_text() {
    fewer_bits_cost_little(200, 24);
}

/// What the README tells of.
#[test]
#[ignore = "takes a minute"]
fn fewer_bits_cost_little_in_a_longer_text() {
    fewer_bits_cost_little(600, 48);
}
