//! A prompt that several sessions share, and what is seen of one.

use super::*;
use crate::{
    model::Architecture,
    weights::{Checkpoint, fixture},
};
use std::path::Path;
use thinkey_core::StorageKind;
use thinkey_kernels::cpu::cache::ThinCache;

/// Two whole runs of a prompt and some rows.
const TOKENS: usize = 1100;

fn engine(config: &ModelConfig, threads: usize) -> Engine {
    let file = fixture::gguf(config).to_bytes();
    let checkpoint = Checkpoint::from_gguf(Path::new("m.gguf"), file.into()).unwrap();
    Engine::load(&checkpoint, EngineOptions { threads, ..EngineOptions::default() }, &mut |_, _| {}).unwrap()
}

fn config(sliding_window: Option<usize>) -> ModelConfig {
    ModelConfig { context: 2048, sliding_window, ..fixture::config(Architecture::Llama) }
}

fn prompt(engine: &Engine, tokens: usize) -> Vec<u32> {
    (0..tokens).map(|at| (at * 7919 % engine.config().vocab) as u32).collect()
}

fn proceed(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Sessions that differ in everything that may.
fn sessions(engine: &Engine) -> Vec<Session> {
    let kinds = [
        (StorageKind::F32, StorageKind::F32, 32, 32, 16),
        (StorageKind::F16, StorageKind::F16, 40, 32, 8),
        (StorageKind::Int8, StorageKind::Int4, 32, 50, 3),
        (StorageKind::Int4, StorageKind::F16, 0, 1, 5),
    ];
    let session = |(keys, values, recent, window, kept)| {
        let plan = engine.config().cache_plan(2, TOKENS + 100, recent, keys);
        engine.session(SessionOptions::new(CachePlan { values, ..plan }, window), |layer, _| kept - layer).unwrap()
    };
    kinds.into_iter().map(session).collect()
}

fn cache(session: &Session) -> &ThinCache {
    match &session.0 {
        State::Ndarray(state) => state.cache(),
        #[cfg(feature = "cuda")]
        State::Cuda(_) => unreachable!("the processor's engine made it"),
    }
}

/// Every byte that heads hold of slot 1: blocks and ring of keys and values, and masks.
fn bytes(session: &Session, config: &ModelConfig) -> Vec<u8> {
    let mut bytes = Vec::new();
    for layer in 0..config.layers {
        for head in 0..config.kv_heads {
            let head = cache(session).head(layer, head, 1, true).unwrap();
            for block in 0..head.span().blocks as usize {
                bytes.extend(head.key_block(block));
                bytes.extend(head.value_block(block));
            }
            bytes.extend(head.ring_keys());
            bytes.extend(head.ring_values());
            bytes.extend(format!("{:?}", head.mask()).into_bytes());
        }
    }
    bytes
}

#[test]
fn a_shared_prompt_is_to_each_session_what_its_own_would_be() {
    for sliding_window in [None, Some(300)] {
        let config = config(sliding_window);
        let mut engine = engine(&config, 2);
        let prompt = prompt(&engine, TOKENS);
        let (mut shared, mut own) = (sessions(&engine), sessions(&engine));
        let mut layers = Vec::new();
        let mut together: Vec<_> = shared.iter_mut().collect();
        let logits = engine
            .prefill_shared(&mut together, 1, &prompt, &mut |done, of| {
                layers.push((done, of));
                ControlFlow::Continue(())
            })
            .unwrap()
            .to_vec();
        assert_eq!(layers, [(1, 2), (2, 2)]);
        for (at, (shared, own)) in shared.iter_mut().zip(&mut own).enumerate() {
            let expected = engine.prefill(own, 1, &prompt, &mut proceed).unwrap();
            assert_eq!(logits, expected, "session {at}");
            assert_eq!((shared.position(0), shared.position(1)), (0, TOKENS));
            assert!(bytes(shared, &config) == bytes(own, &config), "cache of session {at}");
            for (step, &token) in prompt[..70].iter().enumerate() {
                let expected = engine.decode(own, &[1], &[token]).unwrap().to_vec();
                assert_eq!(engine.decode(shared, &[1], &[token]).unwrap(), expected, "session {at}, step {step}");
            }
        }
    }
}

#[test]
fn what_cannot_be_shared_is_refused_and_nothing_changes() {
    let mut engine = engine(&config(None), 1);
    let prompt = prompt(&engine, 200);
    let mut sessions = sessions(&engine);
    engine.prefill(&mut sessions[2], 0, &prompt[..7], &mut proceed).unwrap();
    let mut all: Vec<_> = sessions.iter_mut().collect();
    let error = engine.prefill_shared(&mut all, 0, &prompt, &mut proceed).unwrap_err();
    assert!(error.to_string().contains("one holds 7 tokens"), "{error}");

    let plan = engine.config().cache_plan(2, 199, 32, StorageKind::F16);
    let mut small = engine.session(SessionOptions::new(plan, 32), |_, _| 8).unwrap();
    let mut all: Vec<_> = sessions.iter_mut().chain([&mut small]).collect();
    let error = engine.prefill_shared(&mut all, 1, &prompt, &mut proceed).unwrap_err();
    assert!(matches!(error, ModelError::Core(_)), "{error}");
    let error = engine.prefill_shared(&mut all, 1, &prompt[..50], &mut |_, _| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, ModelError::Interrupted), "{error}");
    assert!(all.iter().all(|session| session.position(1) == 0));
    engine.prefill_shared(&mut all, 1, &prompt[..50], &mut proceed).unwrap();
    assert!(all.iter().all(|session| session.position(1) == 50));
}

/// The scores of what is shown choose the channels that a cache keeps.
#[test]
fn what_is_examined_is_what_a_cache_is_made_of() {
    let config = config(None);
    let mut engine = engine(&config, 2);
    let prompt = prompt(&engine, 600);
    let plan = config.cache_plan(2, 600, 32, StorageKind::F32);
    let mut session = engine.session(SessionOptions::new(plan, 20), |_, _| 5).unwrap();
    engine.prefill(&mut session, 1, &prompt, &mut proceed).unwrap();
    let (mut seen, dim) = (Vec::new(), config.head_dim);
    engine
        .examine(&prompt, 20, &mut |layer, head, held| {
            seen.push((layer, head));
            let energy = |rows: &[f32], channel| rows.chunks(dim).map(|row| row[channel] * row[channel]).sum::<f32>();
            assert_eq!((held.tokens(), held.window, held.head_dim), (600, 20, dim));
            assert_eq!(held.queries.len(), config.heads / config.kv_heads * 20 * dim);
            let scores: Vec<_> =
                (0..dim).map(|channel| energy(&held.queries, channel) * energy(&held.keys, channel)).collect();
            let mut best: Vec<_> = (0..dim).collect();
            best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let view = cache(&session).head(layer, head, 1, true).unwrap();
            let mask = view.mask().unwrap();
            assert!(best[..5].iter().all(|&channel| mask.contains(channel)), "{mask:?} of {scores:?}");
            let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
            for token in 0..view.span().recent as usize {
                view.read_recent(token, &mut key, &mut value).unwrap();
                let at = (view.span().prefix() + token) * dim;
                assert_eq!((&held.keys[at..at + dim], &held.values[at..at + dim]), (&key[..], &value[..]));
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(seen, [(0, 0), (0, 1), (1, 0), (1, 1)]);

    // A prompt that is shorter than the window.
    let short = |_, _, held: &HeldHead| {
        assert_eq!((held.tokens(), held.window), (7, 7));
        ControlFlow::Break(())
    };
    let error = engine.examine(&prompt[..7], 32, &mut { short }).unwrap_err();
    assert!(matches!(error, ModelError::Interrupted), "{error}");
    assert!(matches!(engine.examine(&[], 32, &mut { short }).unwrap_err(), ModelError::Empty));
}
