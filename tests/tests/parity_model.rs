//! The default model against recorded logits of an independent f32 implementation.
//!
//! The model is fetched if it is not in the store. Recordings that hold logits are named in `THINKEY_FIXTURES`; the slice
//! in the repository has none, so its prompt-free counterpart here is the greedy continuation of a short text.

use std::ops::ControlFlow;
use thinkey::{
    engine::{Activations, Engine, EngineOptions, Session, SessionOptions},
    model::transformer::WINDOW,
    store::{DEFAULT, Store},
    weights::Checkpoint,
};
use thinkey_core::{Lambda, StorageKind};
use thinkey_tests::recording::Recording;

fn engine(activations: Activations) -> Engine {
    let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
    let options = EngineOptions { threads: 2, activations, ..EngineOptions::default() };
    Engine::load(&Checkpoint::open(&path).unwrap(), options, &mut |_, _| {}).unwrap()
}

fn session(engine: &Engine, tokens: usize, slots: usize, lambda: Lambda, kind: StorageKind) -> Session {
    let config = engine.config();
    let plan = config.cache_plan(slots, tokens, 32, kind);
    engine.session(SessionOptions::new(plan, WINDOW), |_, _| lambda.kept(config.head_dim)).unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// KL(softmax(exact) ‖ softmax(logits)) in nats.
fn divergence(exact: &[f32], logits: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let largest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        largest + logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum::<f64>().ln()
    };
    let (p_sum, q_sum) = (log_sum(exact), log_sum(logits));
    let log_ratio = |p: f64, q: f64| (p - p_sum) - (q - q_sum);
    exact.iter().zip(logits).map(|(&p, &q)| (f64::from(p) - p_sum).exp() * log_ratio(p.into(), q.into())).sum()
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    u32::try_from(best.0).unwrap()
}

/// Feeds the prompt of every recording and then its next token, for every share of pruned channels and both storages;
/// calls `check(what, recorded logits, logits)` for both.
fn compare(activations: Activations, mut check: impl FnMut(&str, &[f32], &[f32])) {
    let mut engine = engine(activations);
    for recording in Recording::all() {
        if !recording.has("input_ids") {
            continue;
        }
        let ids: Vec<u32> = recording.integers("input_ids").data.iter().map(|&id| u32::try_from(id).unwrap()).collect();
        let next = u32::try_from(recording.integers("next_token").data[0]).unwrap();
        for (lambda, suffix) in [(0, "none"), (400, "think.0.4"), (500, "think.0.5"), (600, "think.0.6")] {
            for kind in [StorageKind::F32, StorageKind::F16] {
                let lambda = Lambda::from_per_mille(lambda).unwrap();
                let what = format!("{suffix} {}", kind.name());
                let mut session = session(&engine, ids.len() + 1, 1, lambda, kind);
                let prompt = engine.prefill(&mut session, 0, &ids, &mut |_, _| ControlFlow::Continue(())).unwrap();
                check(&format!("{what}, prompt"), &recording.floats("prefill_last_logits").data, prompt);
                assert_eq!(session.allocated(), session.planned().total());
                let step = engine.decode(&mut session, &[0], &[next]).unwrap();
                check(&what, &recording.floats(&format!("decode_logits.{suffix}")).data, step);
            }
        }
    }
}

#[test]
fn logits_equal_the_recordings() {
    compare(Activations::Exact, |what, recorded, logits| {
        let off = largest_difference(recorded, logits);
        eprintln!("{what}: logits off by {off}");
        assert!(off < 0.05, "{what}: logits are off by {off}");
    });
}

#[test]
fn int8_activations_hardly_change_what_comes_next() {
    compare(Activations::Int8, |what, recorded, logits| {
        let (kl, off) = (divergence(recorded, logits), largest_difference(recorded, logits));
        eprintln!("{what}: KL {kl:.2e}, logits off by {off}");
        assert!(kl <= 2e-3, "{what}: KL to the recorded logits is {kl}");
    });
}

/// Token by token, in one prompt, in two turns, and beside another sequence: the same logits within rounding where
/// nothing is pruned.
#[test]
fn all_ways_to_feed_tokens_agree() {
    let mut engine = engine(Activations::Exact);
    let ids: Vec<u32> = (0..150u32).map(|i| (i * 7919 + 13) % 49_000).collect();
    let mut whole = [1, 1, 2].map(|slots| session(&engine, 200, slots, Lambda::WHOLE, StorageKind::F32));
    let [once, turns, steps] = &mut whole;
    let expected = engine.prefill(once, 0, &ids, &mut |_, _| ControlFlow::Continue(())).unwrap().to_vec();
    engine.prefill(turns, 0, &ids[..90], &mut |_, _| ControlFlow::Continue(())).unwrap();
    let two = engine.prefill(turns, 0, &ids[90..], &mut |_, _| ControlFlow::Continue(())).unwrap();
    let off = largest_difference(two, &expected);
    assert!(off < 2e-3, "two turns: off by {off}");
    engine.prefill(steps, 1, &ids[..20], &mut |_, _| ControlFlow::Continue(())).unwrap();
    engine.prefill(steps, 0, &ids[..20], &mut |_, _| ControlFlow::Continue(())).unwrap();
    let mut last = Vec::new();
    for &id in &ids[20..] {
        last = engine.decode(steps, &[1, 0], &[argmax(&expected), id]).unwrap().to_vec();
    }
    let off = largest_difference(&last[expected.len()..], &expected);
    assert!(off < 2e-3, "token by token beside another sequence: off by {off}");
}
