//! What cache policies cost the default model on real text: in the order in which they are offered, and as planned.

use std::ops::ControlFlow;
use thinkey::{
    engine::{Engine, EngineOptions},
    eval::perplexity::{self, PerplexityOptions},
    policy::Calibration,
    store::{DEFAULT, Store},
    text::Tokenizer,
    weights::Checkpoint,
};

/// The text of the measurements below, and the model.
fn measure(lines: &[&str], windows: usize) -> (Vec<f64>, Vec<usize>) {
    let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let calibration = Calibration::find(&checkpoint).unwrap();
    let tokenizer = Tokenizer::new(checkpoint.tokenizer().unwrap()).unwrap();
    let text = tokenizer.encode_plain(include_str!("../../runtime/assets/pig-and-pepper.txt"), false).unwrap();
    let mut engine = Engine::load(&checkpoint, EngineOptions::default(), &mut |_, _| {}).unwrap();
    let policies: Vec<_> = lines.iter().map(|line| line.parse().unwrap()).collect();
    let options = PerplexityOptions { prefix: 1000, predict: 40, windows };
    let report =
        perplexity::measure(&mut engine, calibration.as_ref(), (&[], &text), &policies, options, &mut |_| {}).unwrap();
    for row in &report.policies {
        println!("{}: {:.5} nats, {} bytes", row.policy, row.divergence.mean, row.allocated.bytes);
    }
    report.policies.iter().map(|row| (row.divergence.mean, row.allocated.bytes)).unzip()
}

/// Every other part of a policy does in a cache what it is for.
#[test]
fn parts_do_what_they_are_for() {
    let lines = [
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
    ];
    let (divergences, bytes) = measure(&lines, 2);
    let [_, think, official, lowrank, corrected, adaptive, threshold, by_queries, by_energy, turn, every, sketch] =
        divergences[..]
    else {
        panic!("{divergences:?}")
    };
    assert!(official < think && bytes[2] > 2 * bytes[1], "{official} and {think}");
    // Of the same rank, no projection of keys has a smaller error than that on their main directions.
    assert!(lowrank < 0.7 * think && corrected < 0.7 * think, "{lowrank} and {corrected} of {think}");
    assert!(adaptive < corrected && bytes[5] < bytes[4] * 21 / 20, "{adaptive} and {corrected}");
    assert!(threshold < think, "{threshold} and {think}");
    assert!(by_queries < by_energy && by_energy < 1.0, "{by_queries} and {by_energy}");
    assert!(bytes[7] < bytes[0] * 9 / 10 && bytes[7] == bytes[8]);
    // A single prompt is a single turn; and a mask of its newest tokens' own is not far from it.
    assert_eq!(turn, think);
    assert!(every != think && every < 2.0 * think, "{every} and {think}");
    assert!(sketch < 3.0 * think, "{sketch} and {think}");
}

/// Channels that are chosen better diverge less, and corrections do the most: far from the noise of one short text.
#[test]
fn corrected_caches_diverge_less_than_those_that_only_prune() {
    let lines =
        ["choice=top(.6),score=random(1)", "choice=top(.6)", "choice=top(.6),fix=compensated", "balanced,lambda=.6"];
    let (divergences, bytes) = measure(&lines, 3);
    let [whole, random, think, corrected, balanced] = divergences[..] else { panic!("{divergences:?}") };
    assert_eq!(whole, 0.0);
    assert!(random > 5.0 * think, "random channels are no worse: {random} and {think}");
    assert!(corrected < 0.7 * think, "corrections gain little: {corrected} and {think}");
    // Four bits cost something too; in return it is a third of the size.
    assert!(balanced < 0.6 * think, "the default gains little: {balanced} and {think}");
    assert!(bytes[4] * 2 < bytes[2] && bytes[2] < bytes[0], "{bytes:?}");
}
