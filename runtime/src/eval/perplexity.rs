//! Perplexity, and divergence from the whole cache: what a policy makes of a text's next tokens.
//!
//! A window's first tokens are read as a prompt, once for all policies. The rest is fed token by token, the same to every
//! policy, so that each prediction that counts is made over the cache of that policy. Standard errors are over windows:
//! tokens of one window are not independent.

use super::{
    EvalError, Footprint, line,
    session::prefill,
    session_for, spread,
    stats::{Estimate, Prediction, Reference},
    with_reference,
};
use crate::{
    engine::{Engine, Session},
    policy::Calibration,
};
use serde::Serialize;
use std::time::{Duration, Instant};
use thinkey_core::policy::Policy;

/// Tokens at which a cache's bytes are planned beside those that are measured.
pub const PLANNED: usize = 8000;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PerplexityOptions {
    /// Tokens of a window that are read as a prompt.
    pub prefix: usize,
    /// Predictions in a window.
    pub predict: usize,
    /// Windows of the text.
    pub windows: usize,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PerplexityReport {
    /// How.
    #[serde(flatten)]
    pub options: PerplexityOptions,
    /// Tokens of the text.
    pub text: usize,
    /// The policies, [the one that others are compared with](with_reference) first.
    pub policies: Vec<PolicyRow>,
}

/// What one policy makes of the text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PolicyRow {
    /// The policy.
    #[serde(serialize_with = "line")]
    pub policy: Policy,
    /// Share of key channels that it prunes, if its choice is by such a share.
    pub lambda: Option<f64>,
    /// exp of the mean surprise.
    pub perplexity: Estimate,
    /// By how much that is more than the first policy's, from differences in the same windows.
    pub excess: Estimate,
    /// Mean KL(first policy ‖ this one), in nats a token.
    pub divergence: Estimate,
    /// Share of predictions that find the same token likeliest as the first policy.
    pub agreement: Estimate,
    /// The cache that was measured.
    pub allocated: Footprint,
    /// The cache as planned for the prefix alone, and for [`PLANNED`] tokens.
    pub planned: [Footprint; 2],
    /// Decode steps a second, with the other policies' steps in between.
    pub decode_rate: f64,
}

/// What is about to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Windows that are through.
    pub window: usize,
    /// Predictions of the window at hand that are made; 0 while its prefix is read.
    pub predicted: usize,
}

/// A policy, and what its windows came to.
struct Candidate {
    policy: Policy,
    session: Session,
    windows: Vec<Sums>,
    time: Duration,
}

/// Sums over the predictions of a window.
#[derive(Clone, Copy, Default)]
struct Sums {
    surprise: f64,
    divergence: f64,
    agreed: usize,
}

impl Sums {
    fn add(&mut self, Prediction { surprise, divergence, agrees }: Prediction) {
        self.surprise += surprise;
        self.divergence += divergence;
        self.agreed += usize::from(agrees);
    }
}

/// Measures `policies` on a text: the tokens that the model expects before a text, and the text's.
///
/// # Errors
/// [`EvalError`] where a policy is not supported, the text is too short for the windows, or a window too long for the model.
pub fn measure(
    engine: &mut Engine,
    calibration: Option<&Calibration>,
    text: (&[u32], &[u32]),
    policies: &[Policy],
    options: PerplexityOptions,
    progress: &mut dyn FnMut(Step),
) -> Result<PerplexityReport, EvalError> {
    let PerplexityOptions { prefix, predict, windows } = options;
    for (what, number) in [("the prefix", prefix), ("the number of predictions", predict)] {
        if number == 0 {
            return Err(EvalError::Zero { what });
        }
    }
    let (fed, context) = (prefix.saturating_add(predict), engine.config().context);
    if fed > context {
        return Err(EvalError::Context { needed: fed, context });
    }
    // The last token is predicted and not fed.
    let all = spread(text, fed + 1, windows, predict)?;
    let mut candidates = Vec::new();
    for policy in with_reference(policies) {
        let session = session_for(engine, calibration, &policy, fed)?;
        candidates.push(Candidate { policy, session, windows: Vec::new(), time: Duration::ZERO });
    }
    for (window, tokens) in all.iter().enumerate() {
        progress(Step { window, predicted: 0 });
        let mut sessions: Vec<_> = candidates.iter_mut().map(|candidate| &mut candidate.session).collect();
        sessions.iter_mut().for_each(|session| session.clear(0));
        prefill(engine, &mut sessions, &tokens[..prefix], |_, _| ())?;
        candidates.iter_mut().for_each(|candidate| candidate.windows.push(Sums::default()));
        let mut reference = Reference::default();
        for (at, pair) in tokens[prefix..].windows(2).enumerate() {
            let &[token, next] = pair else { unreachable!("two are asked for") };
            for (index, Candidate { session, windows, time, .. }) in candidates.iter_mut().enumerate() {
                let start = Instant::now();
                let logits = engine.decode(session, &[0], &[token])?;
                *time += start.elapsed();
                if index == 0 {
                    reference.set(logits);
                }
                windows[window].add(reference.compare(logits, next));
            }
            progress(Step { window, predicted: at + 1 });
        }
    }
    let rows = candidates.iter().map(|candidate| row(engine, calibration, candidate, &candidates[0].windows, options));
    let policies = rows.collect::<Result<_, _>>()?;
    Ok(PerplexityReport { options, text: text.1.len(), policies })
}

/// What a policy's windows come to, beside those of the first one.
fn row(
    engine: &Engine,
    calibration: Option<&Calibration>,
    candidate: &Candidate,
    first: &[Sums],
    options: PerplexityOptions,
) -> Result<PolicyRow, EvalError> {
    let (Candidate { policy, session, windows, time }, config) = (candidate, engine.config());
    let PerplexityOptions { prefix, predict, .. } = options;
    let count = predict as f64;
    let mean =
        |of: &dyn Fn(&Sums) -> f64| Estimate::of(&windows.iter().map(|sums| of(sums) / count).collect::<Vec<_>>());
    let surprises = |windows: &[Sums]| windows.iter().map(|sums| sums.surprise / count).collect::<Vec<_>>();
    let (perplexity, excess) = perplexities(&surprises(windows), &surprises(first));
    Ok(PolicyRow {
        policy: *policy,
        lambda: policy.choice.lambda().map(|lambda| f64::from(lambda.per_mille()) / 1000.0),
        perplexity,
        excess,
        divergence: mean(&|sums| sums.divergence),
        agreement: mean(&|sums| sums.agreed as f64),
        allocated: Footprint::new(config, session.plan().tokens, session.allocated()),
        planned: [
            Footprint::planned(config, calibration, policy, prefix)?,
            Footprint::planned(config, calibration, policy, PLANNED)?,
        ],
        decode_rate: (predict * windows.len()) as f64 / time.as_secs_f64(),
    })
}

/// The perplexity of windows of these mean surprises, and by how much it is more than that of `first`.
///
/// exp is steep where it is large: errors are those of the surprises, times the slope of exp at their mean. The error of
/// the difference is that of the differences in each window, which is far smaller than that of either.
fn perplexities(surprises: &[f64], first: &[f64]) -> (Estimate, Estimate) {
    let slope = |values: &[f64]| Estimate::of(values).mean.exp();
    let (own, other) = (slope(surprises), slope(first));
    let scaled = |slope: f64, values: &[f64]| values.iter().map(|value| slope * value).collect::<Vec<_>>();
    let gaps: Vec<f64> = scaled(own, surprises).iter().zip(scaled(other, first)).map(|(a, b)| a - b).collect();
    (
        Estimate { mean: own, error: Estimate::of(&scaled(own, surprises)).error },
        Estimate { mean: own - other, error: Estimate::of(&gaps).error },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::EngineOptions,
        model::Architecture,
        weights::{Checkpoint, fixture},
    };
    use std::ops::ControlFlow;
    use std::path::Path;

    fn engine() -> Engine {
        let file = fixture::gguf(&fixture::config(Architecture::Llama)).to_bytes();
        let checkpoint = Checkpoint::from_gguf(Path::new("m.gguf"), file.into()).unwrap();
        Engine::load(&checkpoint, EngineOptions { threads: 1, ..EngineOptions::default() }, &mut |_, _| {}).unwrap()
    }

    const OPTIONS: PerplexityOptions = PerplexityOptions { prefix: 70, predict: 20, windows: 3 };

    fn policies(lines: &[&str]) -> Vec<Policy> {
        lines.iter().map(|line| line.parse().unwrap()).collect()
    }

    /// Every policy by itself, from prompts of its own and probabilities that are formed.
    #[test]
    fn equals_brute_force() {
        let (mut engine, text) = (engine(), (0..400).map(|at| at * at % 37).collect::<Vec<u32>>());
        let more = [
            "tokens=window(2,40)",
            "choice=adaptive(.5,2)",
            "choice=top(.5),heads=query",
            "score=residual,choice=top(.5),fix=predictive,keys=int4/2",
        ];
        let policies =
            policies(&[&["choice=top(.7)", "keys=f32,values=f32", "choice=top(.9),keys=int4"][..], &more[..]].concat());
        let mut steps = Vec::new();
        let report =
            measure(&mut engine, None, (&[39], &text), &policies, OPTIONS, &mut |step| steps.push(step)).unwrap();
        assert_eq!(steps.len(), 3 * 21);
        assert_eq!(steps.last(), Some(&Step { window: 2, predicted: 20 }));
        let lines: Vec<_> = report.policies.iter().map(|row| row.policy.to_string()).collect();
        assert_eq!(lines[..3], ["keys=f32,values=f32", "choice=top(.7)", "choice=top(.9),keys=int4"]);
        assert_eq!(lines[3..], more);

        let windows = spread((&[39], &text), 91, 3, 20).unwrap();
        let mut distributions = |policy: &Policy| -> Vec<Vec<f64>> {
            let mut all = Vec::new();
            for window in &windows {
                let mut session = session_for(&engine, None, policy, 90).unwrap();
                engine.prefill(&mut session, 0, &window[..70], &mut |_, _| ControlFlow::Continue(())).unwrap();
                for &token in &window[70..90] {
                    let logits = engine.decode(&mut session, &[0], &[token]).unwrap();
                    let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
                    all.push(logits.iter().map(|&x| f64::from(x).exp() / sum).collect());
                }
            }
            all
        };
        let whole = distributions(&report.policies[0].policy);
        let best = |p: &[f64]| (0..p.len()).max_by(|&a, &b| p[a].total_cmp(&p[b])).unwrap();
        for row in &report.policies {
            let own = distributions(&row.policy);
            let next = windows.iter().flat_map(|window| &window[71..]);
            let surprise = next.zip(&own).map(|(&token, p)| -p[token as usize].ln()).sum::<f64>() / 60.0;
            assert!((row.perplexity.mean - surprise.exp()).abs() < 1e-9 * surprise.exp(), "{row:?}");
            let divergence =
                |(p, q): (&Vec<f64>, &Vec<f64>)| p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            let divergence = whole.iter().zip(&own).map(divergence).sum::<f64>() / 60.0;
            assert!((row.divergence.mean - divergence).abs() < 1e-9, "{row:?} instead of {divergence}");
            let agreed = whole.iter().zip(&own).filter(|(p, q)| best(p) == best(q)).count();
            assert!((row.agreement.mean - agreed as f64 / 60.0).abs() < 1e-12, "{row:?}");
            assert_eq!(row.allocated.tokens, 90);
        }
        for row in &report.policies {
            assert_eq!(row.allocated.bytes, session_for(&engine, None, &row.policy, 90).unwrap().planned().total());
        }
        let first = &report.policies[0];
        assert_eq!((first.divergence.mean, first.excess.mean, first.agreement.mean), (0.0, 0.0, 1.0));
        assert!(report.policies[1].divergence.mean > 0.0);
    }

    #[test]
    fn errors_of_perplexities_are_those_of_small_changes() {
        let (own, first) = ([2.0, 2.1, 1.8], [1.9, 2.02, 1.69]);
        let (perplexity, excess) = perplexities(&own, &first);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / 3.0;
        assert!((perplexity.mean - mean(&own).exp()).abs() < 1e-12);
        assert!((excess.mean - (mean(&own).exp() - mean(&first).exp())).abs() < 1e-12);
        // By the bootstrap's relative, the infinitesimal jackknife: a little more weight on one window at a time.
        let shifted = |values: &[f64], at: usize| {
            const SHIFT: f64 = 1e-6;
            (mean(values) + SHIFT * (values[at] - mean(values))).exp() / SHIFT
        };
        let spread =
            |of: &dyn Fn(usize) -> f64| (0..3).map(|at| of(at).powi(2)).sum::<f64>().sqrt() / (3.0f64 * 2.0).sqrt();
        let zero = |values: &[f64]| mean(values).exp() / 1e-6;
        let expected = spread(&|at| shifted(&own, at) - zero(&own));
        assert!((perplexity.error.unwrap() / expected - 1.0).abs() < 1e-4, "{perplexity:?} {expected}");
        let expected = spread(&|at| shifted(&own, at) - zero(&own) - shifted(&first, at) + zero(&first));
        assert!((excess.error.unwrap() / expected - 1.0).abs() < 1e-3, "{excess:?} {expected}");
        assert!(excess.error < perplexity.error);
    }

    #[test]
    fn what_cannot_be_measured_is_an_error() {
        let (mut engine, text) = (engine(), vec![1; 400]);
        let mut error = |text: &[u32], lines: &[&str], options| {
            measure(&mut engine, None, (&[], text), &policies(lines), options, &mut |_| {}).unwrap_err().to_string()
        };
        assert!(error(&text, &["balanced"], OPTIONS).contains("this model is not calibrated"));
        assert!(error(&text[..90], &[], OPTIONS).starts_with("91 tokens of text are needed, and there are 90"));
        assert!(error(&text, &[], PerplexityOptions { windows: 50, ..OPTIONS }).contains("at most 16"));
        for (options, says) in [
            (PerplexityOptions { windows: 0, ..OPTIONS }, "number of windows must be at least 1"),
            (PerplexityOptions { prefix: 0, ..OPTIONS }, "the prefix must be at least 1"),
            (PerplexityOptions { predict: 0, ..OPTIONS }, "number of predictions must be at least 1"),
            (PerplexityOptions { prefix: 109, ..OPTIONS }, "129 tokens are more than the model's context of 128"),
        ] {
            let error = error(&text, &[], options);
            assert!(error.contains(says), "{error}");
        }
    }
}
