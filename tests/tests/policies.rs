//! What cache policies cost the default model on real text: in the order in which they are offered, and as planned.

use std::ops::ControlFlow;
use thinkey::{
    engine::{Engine, EngineOptions, Session},
    eval::perplexity::{self, PerplexityOptions},
    model::transformer::{RECENT, WINDOW},
    plan::{Planner, Workload},
    policy::{CacheDesign, Calibration},
    store::{DEFAULT, Store},
    text::Tokenizer,
    weights::Checkpoint,
};
use thinkey_core::{Policy, policy::Tokens};

/// Channels that are chosen better diverge less, and corrections do the most: far from the noise of one short text.
#[test]
fn corrected_caches_diverge_less_than_those_that_only_prune() {
    let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let calibration = Calibration::find(&checkpoint).unwrap();
    let tokenizer = Tokenizer::new(checkpoint.tokenizer().unwrap()).unwrap();
    let text = tokenizer.encode_plain(include_str!("../../runtime/assets/pig-and-pepper.txt"), false).unwrap();
    let mut engine = Engine::load(&checkpoint, EngineOptions::default(), &mut |_, _| {}).unwrap();
    let lines =
        ["choice=top(.6),score=random(1)", "choice=top(.6)", "choice=top(.6),fix=compensated", "balanced,lambda=.6"];
    let policies = lines.map(|line| line.parse().unwrap());
    let options = PerplexityOptions { prefix: 1000, predict: 40, windows: 3 };
    let report =
        perplexity::measure(&mut engine, calibration.as_ref(), (&[], &text), &policies, options, &mut |_| {}).unwrap();
    let divergences: Vec<f64> = report.policies.iter().map(|row| row.divergence.mean).collect();
    println!("divergence at λ = .6: {divergences:?}");
    let [whole, random, think, corrected, balanced] = divergences[..] else { panic!("{divergences:?}") };
    assert_eq!(whole, 0.0);
    assert!(random > 5.0 * think, "random channels are no worse: {random} and {think}");
    assert!(corrected < 0.7 * think, "corrections gain little: {corrected} and {think}");
    // Four bits cost something too; in return it is a third of the size.
    assert!(balanced < 0.6 * think, "the default gains little: {balanced} and {think}");
    let bytes: Vec<usize> = report.policies.iter().map(|row| row.allocated.bytes).collect();
    assert!(bytes[4] * 2 < bytes[2] && bytes[2] < bytes[0], "{bytes:?}");
}

/// A session of `line` for a context of `tokens`.
fn session(engine: &Engine, calibration: Option<&Calibration>, line: &str, tokens: usize) -> Session {
    let design = CacheDesign::new(line.parse().unwrap(), engine.config(), calibration).unwrap();
    engine.session(design.options(1, tokens, RECENT, WINDOW), |layer, head| design.kept(layer, head)).unwrap()
}

/// A capacity that is not reached changes nothing; one that is bounds the memory, as planned, however long the answer and
/// however many turns.
#[test]
fn evicting_caches_stay_within_their_capacity() {
    const CONTEXT: usize = 700;
    let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let calibration = Calibration::find(&checkpoint).unwrap();
    let tokenizer = Tokenizer::new(checkpoint.tokenizer().unwrap()).unwrap();
    let text = tokenizer.encode_plain(include_str!("../../runtime/assets/pig-and-pepper.txt"), false).unwrap();
    let mut engine = Engine::load(&checkpoint, EngineOptions::default(), &mut |_, _| {}).unwrap();
    let mut feed = |session: &mut Session, all: usize| {
        let mut last = Vec::new();
        engine.prefill(session, 0, &text[..300], &mut |_, _| ControlFlow::Continue(())).unwrap();
        for &token in &text[300..400] {
            last = engine.decode(session, &[0], &[token]).unwrap().to_vec();
        }
        if all > 400 {
            engine.prefill(session, 0, &text[400..550], &mut |_, _| ControlFlow::Continue(())).unwrap();
            for &token in &text[550..all] {
                last = engine.decode(session, &[0], &[token]).unwrap().to_vec();
            }
        }
        assert_eq!((session.position(0), session.allocated()), (all, session.planned().total()));
        assert!(last.iter().all(|x| x.is_finite()));
        last
    };
    let engine = Engine::load(&checkpoint, EngineOptions::default(), &mut |_, _| {}).unwrap();
    let new = |line: &str| session(&engine, calibration.as_ref(), line, CONTEXT);
    for rest in ["", ",balanced,lambda=.6", ",choice=top(.4),keys=int8,values=int2"] {
        // The preset comes first in a line.
        let line = |tokens: &str| match rest.strip_prefix(",balanced") {
            Some(rest) => format!("balanced{tokens}{rest}"),
            None => format!("full{tokens}{rest}"),
        };
        let whole = feed(&mut new(&line("")), 400);
        for tokens in ["snapkv(900,32,7,avg)", "h2o(900,32)"] {
            assert_eq!(feed(&mut new(&line(&format!(",tokens={tokens}"))), 400), whole, "{tokens}{rest}");
        }
        let bytes = new(&line("")).planned();
        for tokens in ["snapkv(200,16,5,max)", "h2o(200,64)"] {
            let line = line(&format!(",tokens={tokens}"));
            let mut session = new(&line);
            feed(&mut session, 690);
            let small = session.planned();
            assert!(small.ranks > 0 && small.prefix_keys * 3 < bytes.prefix_keys, "{line}: {small:?} and {bytes:?}");
            assert!(small.total() * 3 < bytes.total() * 2, "{line}: {small:?} and {bytes:?}");
            // What is planned before the model is loaded is what is allocated.
            let policy: Policy = line.parse().unwrap();
            assert!(!matches!(policy.tokens, Tokens::All));
            let workload = Workload {
                context: CONTEXT,
                prompt: Some(300),
                slots: 1,
                policy,
                recent: RECENT,
                window: WINDOW,
                threads: 2,
            };
            let plan = Planner::new(&checkpoint, calibration.as_ref()).plan(&workload).unwrap();
            assert_eq!(plan.cache.total(), session.allocated(), "{line}");
        }
    }
}
