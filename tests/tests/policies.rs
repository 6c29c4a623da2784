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
