//! Decode steps.

use super::{
    counting::{Account, count},
    fixture,
};
use bytes::Bytes;
use std::{ops::ControlFlow, path::Path};
use thinkey::{
    engine::{Engine, EngineOptions, SessionOptions},
    model::{Architecture, ModelConfig, transformer::WINDOW},
    weights::Checkpoint,
};
use thinkey_core::{
    CachePlan, StorageKind,
    policy::Fix,
    token::{
        Eviction,
        h2o::H2o,
        snapkv::{Pool, SnapKv},
    },
};

/// Steps long enough that every sequence begins, fills and flushes blocks, and one drops some.
const STEPS: u32 = 150;

/// After the first one of its batch size; flushes of the ring are among them, and the first choice of channels.
pub fn a_decode_step_allocates_nothing() {
    let llama = fixture::config(512);
    let configs = [
        llama.clone(),
        // A width that is no multiple of a vector; a window that blocks fall out of.
        ModelConfig { architecture: Architecture::Mistral, width: 60, sliding_window: Some(100), ..llama.clone() },
        ModelConfig { architecture: Architecture::Qwen2, qkv_bias: true, ..llama.clone() },
        ModelConfig { architecture: Architecture::Qwen3, qk_norm: true, tied_embeddings: true, ..llama },
    ];
    for config in configs {
        let file = fixture::gguf(&config).to_bytes();
        let checkpoint = Checkpoint::from_gguf(Path::new("tiny.gguf"), Bytes::from(file)).unwrap();
        for (threads, kind) in [(1, StorageKind::F32), (2, StorageKind::F16)] {
            let mut engine =
                Engine::load(&checkpoint, EngineOptions { threads, ..EngineOptions::default() }, &mut |_, _| {})
                    .unwrap();
            let plan = engine.config().cache_plan(3, 480, 32, kind);
            // With sinks and corrections too.
            let sinks = if kind == StorageKind::F16 { 4 } else { 0 };
            // And where tokens are evicted, all of which but a few are soon.
            let eviction = match (threads, config.sliding_window) {
                (_, Some(_)) => None,
                (1, None) => Some(Eviction::SnapKv(SnapKv { capacity: 132, window: 32, kernel: 7, pool: Pool::Avg })),
                _ => Some(Eviction::H2o(H2o { capacity: 132, recent: 32 })),
            };
            let fix = if sinks > 0 { Fix::Compensated } else { Fix::None };
            let plan = CachePlan { sinks, fix, eviction, ..plan };
            let mut session = engine.session(SessionOptions::new(plan, WINDOW), |_, _| 8).unwrap();
            for slot in 0..3 {
                let prompt: Vec<u32> = (0..10 + 100 * slot as u32).collect();
                engine.prefill(&mut session, slot, &prompt, &mut |_, _| ControlFlow::Continue(())).unwrap();
            }
            for slots in [&[1, 2, 0][..], &[2]] {
                engine.decode(&mut session, slots, &[0; 3][..slots.len()]).unwrap();
                for step in 0..STEPS / slots.len() as u32 {
                    let tokens = &[step, 0, 1][..slots.len()];
                    let (_, account) = count(|| engine.decode(&mut session, slots, tokens).unwrap()[0]);
                    assert_eq!(account, Account::default(), "step {step} of {slots:?}, {:?}", config.architecture);
                }
            }
        }
    }
}
