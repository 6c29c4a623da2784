//! The heap against its plan.

use super::{counting::count, fixture};
use bytes::Bytes;
use std::{ops::ControlFlow, path::Path};
use thinkey::{
    engine::{Engine, EngineOptions},
    model::{Architecture, ModelConfig, transformer::WINDOW},
    plan::{Planner, Workload},
    store::{DEFAULT, Store},
    weights::Checkpoint,
};

/// What is fed to which sequence: so many tokens of a prompt, or one step of every sequence of the list.
enum Feed<'a> {
    Prompt(usize, usize),
    Steps(&'a [usize], usize),
}

/// Loads the model of `checkpoint`, feeds its sequences, and holds the heap against the plan, which counts the panels of both
/// ways that a layer may be computed; how much of it was held at
/// most is to be at least `share`.
fn check(what: &str, checkpoint: &Checkpoint, workload: &Workload, feeds: &[Feed<'_>], share: f64) {
    let config = checkpoint.config();
    let planner = Planner::new(checkpoint, None);
    let (plan, design) = (planner.plan(workload).unwrap(), planner.design(workload.policy).unwrap());
    let prompt: Vec<u32> = (0..workload.context).map(|at| (at * 7919 % config.vocab) as u32).collect();
    let (allocated, account) = count(|| {
        let options = EngineOptions { threads: workload.threads, ..EngineOptions::default() };
        let mut engine = Engine::load(checkpoint, options, &mut |_, _| {}).unwrap();
        let options = design.options(workload.slots, workload.context, workload.recent, workload.window);
        let mut session = engine.session(options, |layer, head| design.kept(layer, head)).unwrap();
        for feed in feeds {
            match *feed {
                Feed::Prompt(slot, tokens) => {
                    engine
                        .prefill(&mut session, slot, &prompt[..tokens], &mut |_, _| ControlFlow::Continue(()))
                        .unwrap();
                }
                Feed::Steps(slots, steps) => {
                    for _ in 0..steps {
                        engine.decode(&mut session, slots, &prompt[..slots.len()]).unwrap();
                    }
                }
            }
        }
        session.allocated()
    });
    assert_eq!(allocated, plan.cache.total(), "{what}: the cache is what was planned");
    // The cache's arena is mapped and not of the heap.
    let most = account.most + plan.cache.arena();
    println!("heap: {what}: at most {most} of {} bytes planned, {allocated} of them cache", plan.heap());
    assert!(most <= plan.heap(), "{what}: {most}, {account:?}, is more than planned: {plan:?}");
    assert!(
        most as f64 >= share * plan.heap() as f64,
        "{what}: {most}, {account:?}, is far less than planned: {plan:?}"
    );
    assert_eq!(account.kept, 0, "{what}: everything is given back");
}

/// Tiny models of every family, prompts and batches that grow, so that every buffer grows too.
pub fn the_heap_of_tiny_models_is_as_planned() {
    let llama = fixture::config(2048);
    let configs = [
        llama.clone(),
        ModelConfig { architecture: Architecture::Mistral, width: 60, sliding_window: Some(300), ..llama.clone() },
        ModelConfig { architecture: Architecture::Qwen2, qkv_bias: true, ..llama.clone() },
        ModelConfig { architecture: Architecture::Qwen3, qk_norm: true, tied_embeddings: true, ..llama },
    ];
    for config in configs {
        let file = fixture::gguf(&config).to_bytes();
        let checkpoint = Checkpoint::from_gguf(Path::new("tiny.gguf"), Bytes::from(file)).unwrap();
        for (threads, policy) in [
            (1, "full,keys=f32,values=f32"),
            (2, "think"),
            (4, "think,lambda=.9"),
            (2, "think,fix=compensated,keys=int4,values=int8"),
            (2, "think,fix=compensated,tokens=snapkv(500,60,7,avg)"),
            (2, "tokens=h2o(700,64),keys=int8"),
        ] {
            if config.sliding_window.is_some() && policy.contains("tokens=") {
                continue;
            }
            let workload = Workload {
                // Two whole runs, and one that is all but whole.
                context: 1540,
                prompt: None,
                slots: 3,
                policy: policy.parse().unwrap(),
                recent: 40,
                window: WINDOW,
                threads,
            };
            let what = format!("{}, {policy}, {threads} threads", config.architecture);
            let feeds = [
                Feed::Prompt(0, 5),
                Feed::Steps(&[0], 2),
                Feed::Prompt(1, 700),
                Feed::Steps(&[1, 0], 2),
                Feed::Prompt(1, 550),
                Feed::Prompt(2, 1535),
                Feed::Steps(&[2, 1, 0], 3),
                Feed::Steps(&[1], 1),
            ];
            check(&what, &checkpoint, &workload, &feeds, 0.9);
        }
    }
}

/// The default model, if it is in the store.
pub fn the_heap_of_the_default_model_is_as_planned() {
    let found = Store::open().ok().and_then(|store| store.find(DEFAULT.id).ok().flatten());
    let Some(path) = found else {
        println!("heap: the default model is not in the store; only tiny ones were tested");
        return;
    };
    let checkpoint = Checkpoint::open(&path).unwrap();
    // What is held at other times weighs more beside a smaller cache.
    for (policy, share) in [("think", 0.95), ("think,fix=compensated,keys=int4,values=int4", 0.92)] {
        let workload = Workload {
            context: 2048,
            prompt: Some(2000),
            slots: 1,
            policy: policy.parse().unwrap(),
            recent: 32,
            window: WINDOW,
            threads: 2,
        };
        let what = format!("default model, {policy}");
        check(&what, &checkpoint, &workload, &[Feed::Prompt(0, 2000), Feed::Steps(&[0], 48)], share);
    }
}
