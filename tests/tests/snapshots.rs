//! Sequences that go on elsewhere: in another session, of another engine, from bytes.

use proptest::prelude::*;
use std::{ops::ControlFlow, path::Path, sync::OnceLock};
use thinkey::{
    engine::{Engine, EngineOptions, Origin, Session},
    model::ModelError,
    policy::CacheDesign,
    weights::Checkpoint,
};
use thinkey_core::{
    Policy,
    snapshot::{self, MAX_HEADER, Progress, Snapshot, SnapshotError},
};

const CONTEXT: usize = 700;

/// Every slot of a policy that changes what a cache stores.
const POLICIES: [&str; 16] = [
    "full",
    "think,lambda=.6,keys=int8,values=int4",
    "choice=top(.5),fix=compensated,keys=int4,values=int2",
    "choice=top(.5),fix=lowrank,keys=f32,values=f32",
    "choice=top(.5),thin-values=query(.4),values=int3",
    "choice=top(.5),thin-values=l2(.4),keys=bf16",
    "choice=top(.4),heads=query",
    "choice=top(.4),life=turn",
    "choice=top(.4),life=every(64),keys=int4",
    "choice=adaptive(.5,4),keys=int4,values=int2",
    "choice=threshold(.8),fix=compensated",
    "score=random(7),choice=top(.5)",
    "score=residual,choice=top(.5),fix=compensated",
    "tokens=window(4,100),choice=top(.5)",
    "tokens=snapkv(192,32,7,avg),choice=top(.5),keys=int4",
    "tokens=h2o(160,32),choice=top(.5),fix=compensated",
];

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name)).unwrap()
}

fn engine(checkpoint: &Checkpoint) -> Engine {
    Engine::load(checkpoint, EngineOptions { threads: 1, ..EngineOptions::default() }, &mut |_, _| {}).unwrap()
}

fn session(engine: &Engine, policy: Policy, context: usize) -> Session {
    let design = CacheDesign::new(policy, engine.config(), None).unwrap();
    engine.session(design.options(1, context, 32, 32), |layer, head| design.kept(layer, head)).unwrap()
}

fn tokens(engine: &Engine, range: std::ops::Range<usize>) -> Vec<u32> {
    range.map(|at| (at * 7919 % engine.config().vocab) as u32).collect()
}

fn prefill(engine: &mut Engine, session: &mut Session, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
    Ok(engine.prefill(session, 0, tokens, &mut |_, _| ControlFlow::Continue(()))?.to_vec())
}

/// A step for each of some tokens, another prompt and some more steps: the bits of all logits.
fn go_on(engine: &mut Engine, session: &mut Session) -> Result<Vec<u32>, ModelError> {
    let mut all = Vec::new();
    for token in tokens(engine, 500..570) {
        all.extend_from_slice(engine.decode(session, &[0], &[token])?);
    }
    let prompt = tokens(engine, 600..700);
    all.extend(prefill(engine, session, &prompt)?);
    for token in tokens(engine, 700..710) {
        all.extend_from_slice(engine.decode(session, &[0], &[token])?);
    }
    Ok(all.into_iter().map(f32::to_bits).collect())
}

/// A session of `policy` after a prompt and an answer.
fn under_way(engine: &mut Engine, policy: Policy, prompt: usize, steps: usize) -> (Session, Vec<u32>) {
    let mut session = session(engine, policy, CONTEXT);
    let tokens = tokens(engine, 0..prompt + steps);
    prefill(engine, &mut session, &tokens[..prompt]).unwrap();
    for token in &tokens[prompt..] {
        engine.decode(&mut session, &[0], &[*token]).unwrap();
    }
    (session, tokens)
}

#[test]
fn what_comes_after_is_what_would_have_come_without() {
    // The second has a sliding window.
    for name in ["llama3.gguf", "mistral.gguf"] {
        let checkpoint = checkpoint(name);
        let model = checkpoint.fingerprint();
        for line in POLICIES {
            let policy: Policy = line.parse().unwrap();
            if name == "mistral.gguf" && line.starts_with("tokens") {
                continue;
            }
            let origin = Origin { model, policy };
            // A prompt that is thinned, and one that is not yet.
            for (prompt, steps) in [(333, 70), (40, 3)] {
                let mut first = engine(&checkpoint);
                let (mut session_then, mut tokens) = under_way(&mut first, policy, prompt, steps);
                // One waits, as after an answer.
                tokens.push(5);
                let bytes = session_then.save(0, &origin, &tokens).unwrap();
                assert_eq!(bytes, session_then.save(0, &origin, &tokens).unwrap(), "{line}: saved twice");
                let expected = go_on(&mut first, &mut session_then).unwrap();

                let mut second = engine(&checkpoint);
                let mut session_now = session(&second, policy, CONTEXT + 300);
                // Something else was there.
                prefill(&mut second, &mut session_now, &[9; 150]).unwrap();
                let snapshot = Snapshot::open(&bytes).unwrap();
                assert_eq!(session_now.restore(0, &origin, &snapshot).unwrap(), tokens, "{line}");
                assert_eq!(session_now.position(0), prompt + steps);
                assert_eq!(session_now.save(0, &origin, &tokens).unwrap(), bytes, "{line}: saved again");
                assert!(go_on(&mut second, &mut session_now).unwrap() == expected, "{line}, prompt of {prompt}");
                // And the slot can be used for other sequences.
                session_now.clear(0);
                prefill(&mut second, &mut session_now, &tokens).unwrap();
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let checkpoint = checkpoint("llama3.gguf");
    let policy: Policy = POLICIES[1].parse().unwrap();
    let origin = Origin { model: checkpoint.fingerprint(), policy };
    let mut engine = engine(&checkpoint);
    let (mut session_then, tokens) = under_way(&mut engine, policy, 300, 20);
    let bytes = session_then.save(0, &origin, &tokens).unwrap();
    let snapshot = Snapshot::open(&bytes).unwrap();

    let other = Origin { model: [0; 16], ..origin };
    assert_eq!(session_then.restore(0, &other, &snapshot), Err(SnapshotError::Model));
    let other = Origin { policy: Policy::default(), ..origin };
    let mut whole = session(&engine, Policy::default(), CONTEXT);
    let error = whole.restore(0, &other, &snapshot).unwrap_err();
    assert_eq!(error, SnapshotError::Policy { slot: policy.difference(&Policy::default()).unwrap() });
    // A session that is not what its origin says.
    let error = whole.restore(0, &origin, &snapshot).unwrap_err();
    assert_eq!(error, SnapshotError::Shape { what: "heads of another shape" });
    let design = CacheDesign::new(policy, engine.config(), None).unwrap();
    let mut fewer = engine.session(design.options(1, CONTEXT, 32, 32), |_, _| 3).unwrap();
    let error = fewer.restore(0, &origin, &snapshot).unwrap_err();
    assert_eq!(error, SnapshotError::Shape { what: "channels per head" });
    let mut narrow =
        engine.session(design.options(1, CONTEXT, 32, 16), |layer, head| design.kept(layer, head)).unwrap();
    let error = narrow.restore(0, &origin, &snapshot).unwrap_err();
    assert_eq!(error, SnapshotError::Shape { what: "queries that score" });
    let mut short = session(&engine, policy, 319);
    prefill(&mut engine, &mut short, &tokens[..100]).unwrap();
    let error = short.restore(0, &origin, &snapshot).unwrap_err();
    assert_eq!(error, SnapshotError::Context { tokens: 320, context: 319 });
    assert_eq!(short.position(0), 100, "what it held is still there");
    session(&engine, policy, 320).restore(0, &origin, &snapshot).unwrap();

    assert_eq!(session(&engine, policy, 9).save(0, &origin, &[]), Err(SnapshotError::Empty));
    let tokens_of = |tokens: &[u32]| session_then.save(0, &origin, tokens);
    assert_eq!(tokens_of(&tokens[1..]), Err(SnapshotError::Impossible { what: "tokens" }));
    assert_eq!(tokens_of(&[&tokens[..], &[1, 2]].concat()), Err(SnapshotError::Impossible { what: "tokens" }));
}

/// A model, and snapshots of it: of whose cache, and their bytes.
type Saved = (Checkpoint, Vec<(Origin, Vec<u8>)>);

/// One for each policy.
fn saved() -> &'static Saved {
    static SAVED: OnceLock<Saved> = OnceLock::new();
    SAVED.get_or_init(|| {
        let checkpoint = checkpoint("llama3.gguf");
        let mut engine = engine(&checkpoint);
        let snapshots = POLICIES.iter().map(|line| {
            let origin = Origin { model: checkpoint.fingerprint(), policy: line.parse().unwrap() };
            let (session, tokens) = under_way(&mut engine, origin.policy, 250, 5);
            let bytes = session.save(0, &origin, &tokens).unwrap();
            (origin, bytes)
        });
        let snapshots = snapshots.collect();
        (checkpoint, snapshots)
    })
}

/// The bytes as if they had been written like this.
fn checked(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 4;
    let sum = snapshot::check([&bytes[..end]]);
    bytes[end..].copy_from_slice(&sum);
    bytes
}

/// Restores and goes on; nothing may panic.
fn survives(origin: &Origin, bytes: &[u8]) {
    let mut engine = engine(&saved().0);
    let mut session = session(&engine, origin.policy, CONTEXT);
    if let Ok(snapshot) = Snapshot::open(bytes)
        && session.restore(0, origin, &snapshot).is_ok()
    {
        let _ = go_on(&mut engine, &mut session);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Bytes that a check does not tell, since somebody made one that fits.
    #[test]
    fn forged_snapshots_never_panic(
        which in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
    ) {
        let (origin, bytes) = which.get(&saved().1);
        let mut bytes = bytes.clone();
        for (at, byte, early) in damage {
            // Half of them where the numbers are.
            let len = if early { 400 } else { bytes.len() };
            bytes[at.index(len)] = byte;
        }
        survives(origin, &checked(bytes));
    }

    /// Any numbers of how far a sequence is.
    #[test]
    fn forged_progress_never_panics(
        which in any::<prop::sample::Index>(),
        numbers in prop::collection::vec(prop_oneof![0u32..40, 240..260u32, any::<u32>()], 7),
        chosen in any::<bool>(),
        mask in 0u8..128,
    ) {
        let (origin, bytes) = which.get(&saved().1);
        let found = Snapshot::open(bytes).unwrap();
        let mut header = *found.header();
        let Progress { mut span, mut position, mut since, mut scored, .. } = header.progress;
        let fields =
            [&mut span.sinks, &mut span.blocks, &mut span.hidden, &mut span.recent, &mut position, &mut since, &mut scored];
        for (bit, (field, number)) in fields.into_iter().zip(numbers).enumerate() {
            if mask >> bit & 1 == 1 {
                *field = number;
            }
        }
        header.progress = Progress { span, position, chosen, since, scored };
        let mut memory = [0; MAX_HEADER];
        let mut forged = header.encode(&mut memory).unwrap().to_vec();
        found.tokens().for_each(|token| forged.extend(token.to_le_bytes()));
        found.kept().for_each(|kept| forged.extend(kept.to_le_bytes()));
        forged.extend(found.heads());
        forged.extend([0; 4]);
        survives(origin, &checked(forged));
    }
}
