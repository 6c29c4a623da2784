//! What cache policies cost the default model on real text: in the order in which they are offered, and as planned.

use std::{ops::ControlFlow, sync::LazyLock};
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

/// What the tests below compare, on one prompt that is read once.
const LINES: [&str; 20] = [
    "full",
    "think",
    "think,heads=query",
    "choice=top(.5),fix=lowrank",
    "choice=top(.5),fix=compensated",
    "choice=adaptive(.5,8),fix=compensated",
    "choice=threshold(.999)",
    "thin-values=query(.3)",
    "thin-values=l2(.3)",
    "think,life=turn",
    "think,life=every(32)",
    "think,score=sketch(32)",
    "choice=top(.6),score=random(1)",
    "choice=top(.6)",
    "choice=top(.6),fix=compensated",
    "balanced,lambda=.6",
    "balanced",
    "balanced,keys=int2",
    "balanced,fix=predictive",
    "balanced,fix=predictive,keys=int4/2",
];

/// The default model, its calibration, and a real text in its tokens.
fn default_model() -> (Checkpoint, Engine, Option<Calibration>, Vec<u32>) {
    let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let calibration = Calibration::find(&checkpoint).unwrap();
    let tokenizer = Tokenizer::new(checkpoint.tokenizer().unwrap()).unwrap();
    let text = tokenizer.encode_plain(include_str!("../../runtime/assets/pig-and-pepper.txt"), false).unwrap();
    let engine = Engine::load(&checkpoint, EngineOptions::default(), &mut |_, _| {}).unwrap();
    (checkpoint, engine, calibration, text)
}

/// Divergence from the whole cache in nats, and bytes, of policies among [`LINES`].
fn measured<const N: usize>(lines: [&str; N]) -> ([f64; N], [usize; N]) {
    static MEASURED: LazyLock<Vec<(f64, usize)>> = LazyLock::new(|| {
        let (_, mut engine, calibration, text) = default_model();
        // The whole cache is always the first.
        let policies: Vec<_> = LINES[1..].iter().map(|line| line.parse().unwrap()).collect();
        let options = PerplexityOptions { prefix: 800, predict: 48, windows: 1 };
        let report =
            perplexity::measure(&mut engine, calibration.as_ref(), (&[], &text), &policies, options, &mut |_| {})
                .unwrap();
        for row in &report.policies {
            println!("{}: {:.5} nats, {} bytes", row.policy, row.divergence.mean, row.allocated.bytes);
        }
        report.policies.iter().map(|row| (row.divergence.mean, row.allocated.bytes)).collect()
    });
    let row = |line| MEASURED[LINES.iter().position(|known| *known == line).expect(line)];
    (lines.map(|line| row(line).0), lines.map(|line| row(line).1))
}

/// Every other part of a policy does in a cache what it is for.
#[test]
fn parts_do_what_they_are_for() {
    let ([think, official, lowrank], [bytes, copied, _]) =
        measured(["think", "think,heads=query", "choice=top(.5),fix=lowrank"]);
    assert!(official < think && copied > 2 * bytes, "{official} and {think}");
    let ([corrected, adaptive, threshold], [even, uneven, _]) =
        measured(["choice=top(.5),fix=compensated", "choice=adaptive(.5,8),fix=compensated", "choice=threshold(.999)"]);
    // Of the same rank, no projection of keys has a smaller error than that on their main directions.
    assert!(lowrank < 0.7 * think && corrected < 0.7 * think, "{lowrank} and {corrected} of {think}");
    assert!(adaptive < corrected && uneven < even * 21 / 20, "{adaptive} and {corrected}");
    assert!(threshold < think, "{threshold} and {think}");
    // Three of ten value channels: chosen either way, far from what the same keys would cost.
    let ([_, by_queries, by_energy], [whole, some, as_many]) =
        measured(["full", "thin-values=query(.3)", "thin-values=l2(.3)"]);
    assert!(by_queries < think && by_energy < think, "{by_queries} and {by_energy}");
    assert!(some < whole * 9 / 10 && some == as_many);
    // A single prompt is a single turn; and a mask of its newest tokens' own is not far from it.
    let ([turn, every, sketch], _) = measured(["think,life=turn", "think,life=every(32)", "think,score=sketch(32)"]);
    assert_eq!(turn, think);
    assert!(every != think && every < 2.0 * think, "{every} and {think}");
    assert!(sketch < 3.0 * think, "{sketch} and {think}");
}

/// Channels that are chosen better diverge less, and corrections do the most: far from the noise of one short text.
#[test]
fn corrected_caches_diverge_less_than_those_that_only_prune() {
    let lines = [
        "full",
        "choice=top(.6),score=random(1)",
        "choice=top(.6)",
        "choice=top(.6),fix=compensated",
        "balanced,lambda=.6",
    ];
    let ([whole, random, think, corrected, balanced], bytes) = measured(lines);
    assert_eq!(whole, 0.0);
    assert!(random > 5.0 * think, "random channels are no worse: {random} and {think}");
    assert!(corrected < 0.7 * think, "corrections gain little: {corrected} and {think}");
    // Four bits cost something too; in return it is a third of the size.
    assert!(balanced < 0.6 * think, "the default gains little: {balanced} and {think}");
    assert!(bytes[4] * 2 < bytes[2] && bytes[2] < bytes[0], "{bytes:?}");
}

/// Keys that are told one channel after the other are smaller and better than those of as many bits that are not.
#[test]
fn predicted_keys_diverge_less_than_others_of_their_size() {
    let lines = ["balanced", "balanced,keys=int2", "balanced,fix=predictive", "balanced,fix=predictive,keys=int4/2"];
    let ([four, two, predicted, mixed], bytes) = measured(lines);
    assert!(predicted < 1.3 * four, "{predicted} and {four}");
    assert!(mixed < 0.6 * two && mixed < 2.2 * four, "{mixed}, {four} and {two}");
    assert!(bytes[3] < bytes[0], "{bytes:?}");
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
    let (checkpoint, mut engine, calibration, text) = default_model();
    let mut feed = |session: &mut Session, all: usize| {
        let mut last = Vec::new();
        engine.prefill(session, 0, &text[..300], &mut |_, _| ControlFlow::Continue(())).unwrap();
        for &token in &text[300..340] {
            last = engine.decode(session, &[0], &[token]).unwrap().to_vec();
        }
        if all > 340 {
            engine.prefill(session, 0, &text[340..490], &mut |_, _| ControlFlow::Continue(())).unwrap();
            for &token in &text[490..all] {
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
        let whole = feed(&mut new(&line("")), 340);
        for tokens in ["snapkv(900,32,7,avg)", "h2o(900,32)"] {
            assert_eq!(feed(&mut new(&line(&format!(",tokens={tokens}"))), 340), whole, "{tokens}{rest}");
        }
        let bytes = new(&line("")).planned();
        for tokens in ["snapkv(200,16,5,max)", "h2o(200,64)"] {
            let line = line(&format!(",tokens={tokens}"));
            let mut session = new(&line);
            feed(&mut session, 530);
            let small = session.planned();
            assert!(small.ranks > 0 && small.prefix_keys * 3 < bytes.prefix_keys, "{line}: {small:?} and {bytes:?}");
            assert!(small.prefix_values * 3 < bytes.prefix_values, "{line}: {small:?} and {bytes:?}");
            // Where values take two bits, what H2O's ring takes more is half of what it saves.
            assert!(small.total() * 4 < bytes.total() * 3, "{line}: {small:?} and {bytes:?}");
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
