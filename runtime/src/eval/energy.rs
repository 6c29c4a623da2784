//! Where the energy is: how many directions and channels hold what the window's queries and the keys say to each other.
//!
//! For each KV head, with the queries Q [W·G × D] of the window and the keys K [S × D] of a prompt:
//!
//! - **rank**: how many singular values hold 90% of the energy (the sum of their squares) of the logits Q Kᵀ, and of K; also
//!   of the logits less each query's mean over the keys, which softmax does not see and which is most of the energy;
//! - **skew**: the share of the channel scores (‖q_j‖² ‖k_j‖², as ThinK has them) that the best 10, 25 and 50% of the channels
//!   hold;
//! - **overlap**: how much of the mask of one window's prompt is in that of another's;
//! - **scores**: how much of that mask other scores find, those that look at a sample or a sketch of the keys among them, and
//!   what time they save.
//!
//! No matrix of W·G × S is formed. The squares of the singular values of Q Kᵀ are the eigenvalues of QᵀQ KᵀK, and, where
//! KᵀK = V Λ Vᵀ, those of the symmetric Λ^½ Vᵀ QᵀQ V Λ^½, which is D × D.

mod scores;

pub use scores::{ScoreReport, ScoreRow};

use super::{EvalError, spread, stats::Estimate};
use crate::engine::{Engine, HeldHead};
use scores::Scores;
use serde::Serialize;
use std::time::{Duration, Instant};
use thinkey_core::{
    ChannelMask, Error, Lambda,
    channel::{lowrank::eigen, overlap::overlap, score, select::select},
    policy::Score,
};

/// The share of energy that a rank holds.
pub const SHARE: f64 = 0.9;

/// Shares of the channels, in percent, whose share of the score is told.
pub const BEST: [usize; 3] = [10, 25, 50];

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnergyOptions<'a> {
    /// Tokens of a prompt, S.
    pub tokens: usize,
    /// Prompts, taken evenly from the text.
    pub windows: usize,
    /// Newest queries of a prompt that score, W.
    pub window: usize,
    /// Share of the channels that masks prune.
    pub lambda: Lambda,
    /// Scores that are compared with ThinK's exact one. `residual`, which needs a covariance, is the exact one here.
    pub scores: &'a [Score],
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EnergyReport {
    /// Tokens of a prompt, S.
    pub tokens: usize,
    /// Prompts.
    pub windows: usize,
    /// Newest queries of a prompt that score, W.
    pub window: usize,
    /// Share of the channels that masks prune.
    pub lambda: f64,
    /// Channels of a head, D.
    pub head_dim: usize,
    /// Every KV head of every layer, in order.
    pub heads: Vec<HeadEnergy>,
    /// Other scores beside the exact one.
    pub scoring: ScoreReport,
}

/// One KV head.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HeadEnergy {
    /// Its layer, from 0.
    pub layer: usize,
    /// Which of the layer's, from 0.
    pub head: usize,
    /// Singular values that hold [`SHARE`] of the energy of the window's logits.
    pub logit_rank: Estimate,
    /// As many of the logits less each query's mean over the keys.
    pub centred_rank: Estimate,
    /// As many of the keys.
    pub key_rank: Estimate,
    /// Share of the score that the best channels hold, [`BEST`] percent of them.
    pub skew: [Estimate; 3],
    /// Share of a mask's channels that the mask of another prompt keeps too, mean over all pairs of prompts.
    pub overlap: Option<f64>,
    /// The same as channels in both over channels in either (Jaccard).
    pub jaccard: Option<f64>,
}

/// One head in one prompt.
struct Sample {
    logit_rank: f64,
    centred_rank: f64,
    key_rank: f64,
    skew: [f64; 3],
    mask: ChannelMask,
}

/// Measures a text: the tokens that the model expects before a text, and the text's. `progress` is told how many heads of
/// how many are through, of all prompts together.
///
/// # Errors
/// [`EvalError`] where the text is too short for the prompts or a prompt too long for the model, or what is measured is
/// not a number.
pub fn measure(
    engine: &mut Engine,
    text: (&[u32], &[u32]),
    options: EnergyOptions<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<EnergyReport, EvalError> {
    let EnergyOptions { tokens, windows, window, lambda, scores: _ } = options;
    for (what, number) in [("the number of tokens", tokens), ("the number of queries", window)] {
        if number == 0 {
            return Err(EvalError::Zero { what });
        }
    }
    let config = engine.config();
    let (layers, kv_heads, head_dim, context) = (config.layers, config.kv_heads, config.head_dim, config.context);
    if tokens > context {
        return Err(EvalError::Context { needed: tokens, context });
    }
    let prompts = spread(text, tokens, windows, tokens)?;
    let count = layers * kv_heads;
    let mut samples: Vec<Vec<Sample>> = (0..count).map(|_| Vec::with_capacity(windows)).collect();
    let (mut done, kept) = (0, lambda.kept(head_dim));
    let (mut scores, mut reading) = (Scores::new(options, head_dim), Duration::ZERO);
    for prompt in &prompts {
        let (start, mut elsewhere) = (Instant::now(), Duration::ZERO);
        engine.try_examine(prompt, window, |layer, head, held| {
            let start = Instant::now();
            let at = layer * kv_heads + head;
            scores.add(at, held)?;
            samples[at].push(sample(held, kept)?);
            done += 1;
            progress(done, count * windows);
            elsewhere += start.elapsed();
            Ok::<_, EvalError>(())
        })?;
        reading += start.elapsed().saturating_sub(elsewhere);
    }
    let heads = samples.iter().enumerate().map(|(at, samples)| summary(at / kv_heads, at % kv_heads, samples));
    Ok(EnergyReport {
        tokens,
        windows,
        window,
        lambda: f64::from(lambda.per_mille()) / 1000.0,
        head_dim,
        heads: heads.collect::<Result<_, Error>>()?,
        scoring: scores.report(count, kv_heads, reading),
    })
}

fn sample(held: &HeldHead, kept: usize) -> Result<Sample, Error> {
    let dim = held.head_dim;
    let (keys, queries) = (gram(&held.keys, dim), gram(&held.queries, dim));
    let (key_rank, logit_rank) = ranks(dim, &keys, &queries)?;
    let (_, centred_rank) = ranks(dim, &centred(&held.keys, &keys), &queries)?;
    let [logit_rank, centred_rank, key_rank] = [logit_rank, centred_rank, key_rank].map(|rank| rank as f64);
    let energy = |gram: &[f64]| gram.iter().step_by(dim + 1).map(|&x| x as f32).collect::<Vec<_>>();
    let mut scores = vec![0.0; dim];
    score::score(&energy(&queries), held.queries.len() / dim, &energy(&keys), held.tokens(), &mut scores)?;
    let mask = select(&scores, kept)?;
    scores.sort_by(|a, b| b.total_cmp(a));
    let sum = |scores: &[f32]| scores.iter().map(|&x| f64::from(x)).sum::<f64>();
    let all = sum(&scores);
    let skew = BEST.map(|percent| sum(&scores[..(dim * percent).div_ceil(100)]) / all);
    Ok(Sample { logit_rank, centred_rank, key_rank, skew, mask })
}

/// XᵀX of rows of `dim` channels.
fn gram(rows: &[f32], dim: usize) -> Vec<f64> {
    let mut gram = vec![0.0; dim * dim];
    for row in rows.chunks_exact(dim) {
        for (sums, &x) in gram.chunks_exact_mut(dim).zip(row) {
            let x = f64::from(x);
            sums.iter_mut().zip(row).for_each(|(sum, &y)| *sum += x * f64::from(y));
        }
    }
    gram
}

/// XᵀX of rows less their mean, from that of the rows as they are.
fn centred(rows: &[f32], gram: &[f64]) -> Vec<f64> {
    let dim = gram.len().isqrt();
    let count = (rows.len() / dim) as f64;
    let mut sums = vec![0.0; dim];
    for row in rows.chunks_exact(dim) {
        sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    let cells = gram.iter().enumerate().map(|(at, x)| x - sums[at / dim] * sums[at % dim] / count);
    cells.collect()
}

/// The ranks of keys and of logits, from KᵀK and QᵀQ.
fn ranks(dim: usize, keys: &[f64], queries: &[f64]) -> Result<(usize, usize), Error> {
    let (values, vectors) = spectrum(dim, keys)?;
    // Rows of Λ^½ Vᵀ.
    let mut roots = Vec::with_capacity(dim * dim);
    for (vector, value) in vectors.chunks_exact(dim).zip(&values) {
        let root = value.sqrt();
        roots.extend(vector.iter().map(|&x| root * f64::from(x)));
    }
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    // Both are symmetric, so rows serve as columns.
    let half: Vec<f64> = roots
        .chunks_exact(dim)
        .flat_map(|row| queries.chunks_exact(dim).map(move |column| product(row, column)))
        .collect();
    let whole: Vec<f64> = half
        .chunks_exact(dim)
        .flat_map(|row| roots.chunks_exact(dim).map(move |column| product(row, column)))
        .collect();
    Ok((rank(values), rank(spectrum(dim, &whole)?.0)))
}

/// Eigenvalues, none below zero, and eigenvectors of a symmetric matrix without negative ones.
fn spectrum(dim: usize, matrix: &[f64]) -> Result<(Vec<f64>, Vec<f32>), Error> {
    // Scaled, so that no square is beyond f32.
    let trace: f64 = matrix.iter().step_by(dim + 1).sum();
    let scale = if trace > 0.0 { trace } else { 1.0 };
    let mut scaled: Vec<f32> = matrix.iter().map(|&x| (x / scale) as f32).collect();
    let mut vectors = vec![0.0; dim * dim];
    eigen(dim, &mut scaled, &mut vectors)?;
    Ok((scaled.iter().step_by(dim + 1).map(|&x| f64::from(x).max(0.0) * scale).collect(), vectors))
}

/// How many of the largest values hold [`SHARE`] of their sum.
fn rank(mut values: Vec<f64>) -> usize {
    values.sort_by(|a, b| b.total_cmp(a));
    let mut left = SHARE * values.iter().sum::<f64>();
    let holds = values.iter().position(|value| {
        left -= value;
        left <= 0.0
    });
    holds.map_or(values.len(), |at| at + 1)
}

fn summary(layer: usize, head: usize, samples: &[Sample]) -> Result<HeadEnergy, Error> {
    let estimate = |of: &dyn Fn(&Sample) -> f64| Estimate::of(&samples.iter().map(of).collect::<Vec<_>>());
    let (mut shares, mut jaccards) = (Vec::new(), Vec::new());
    for (at, one) in samples.iter().enumerate() {
        for other in &samples[..at] {
            let share = f64::from(overlap(&one.mask, &other.mask)?);
            shares.push(share);
            // Both masks are of one size.
            jaccards.push(share / (2.0 - share));
        }
    }
    let mean = |values: &[f64]| (!values.is_empty()).then(|| Estimate::of(values).mean);
    Ok(HeadEnergy {
        layer,
        head,
        logit_rank: estimate(&|sample| sample.logit_rank),
        centred_rank: estimate(&|sample| sample.centred_rank),
        key_rank: estimate(&|sample| sample.key_rank),
        skew: [0, 1, 2].map(|best| estimate(&|sample| sample.skew[best])),
        overlap: mean(&shares),
        jaccard: mean(&jaccards),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::EngineOptions,
        model::Architecture,
        weights::{Checkpoint, fixture},
    };
    use std::path::Path;

    fn numbers(seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    /// The energy left in a matrix once its largest directions are taken out, one by one, by power iteration.
    fn rank_by_deflation(mut matrix: Vec<f64>, rows: usize, cols: usize) -> usize {
        let energy = |matrix: &[f64]| matrix.iter().map(|x| x * x).sum::<f64>();
        let all = energy(&matrix);
        for rank in 1..=rows.min(cols) {
            let mut right: Vec<f64> = (0..cols).map(|at| 1.0 + (at as f64 * 0.7).sin()).collect();
            let mut left = vec![0.0; rows];
            for _ in 0..3000 {
                for (x, row) in left.iter_mut().zip(matrix.chunks_exact(cols)) {
                    *x = row.iter().zip(&right).map(|(a, b)| a * b).sum();
                }
                right.fill(0.0);
                for (x, row) in left.iter().zip(matrix.chunks_exact(cols)) {
                    right.iter_mut().zip(row).for_each(|(sum, a)| *sum += x * a);
                }
                let norm = right.iter().map(|x| x * x).sum::<f64>().sqrt();
                right.iter_mut().for_each(|x| *x /= norm);
            }
            for (x, row) in left.iter_mut().zip(matrix.chunks_exact(cols)) {
                *x = row.iter().zip(&right).map(|(a, b)| a * b).sum();
            }
            for (x, row) in left.iter().zip(matrix.chunks_exact_mut(cols)) {
                row.iter_mut().zip(&right).for_each(|(a, b)| *a -= x * b);
            }
            if energy(&matrix) <= (1.0 - SHARE) * all {
                return rank;
            }
        }
        rows.min(cols)
    }

    #[test]
    fn ranks_equal_those_of_the_matrices_themselves() {
        let dim = 12;
        for seed in 0..8 {
            // Channels of falling size, so that ranks differ.
            let fall = |rows: &mut Vec<f32>, by: f32| {
                rows.iter_mut().enumerate().for_each(|(at, x)| *x *= by.powi((at % dim) as i32));
            };
            let (mut keys, mut queries) = (numbers(seed, 40 * dim), numbers(seed + 100, 9 * dim));
            fall(&mut keys, 0.8 + 0.02 * seed as f32);
            fall(&mut queries, 0.95);
            let logits: Vec<f64> = queries
                .chunks(dim)
                .flat_map(|q| {
                    keys.chunks(dim).map(move |k| q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum())
                })
                .collect();
            let expected = (
                rank_by_deflation(keys.iter().map(|&x| f64::from(x)).collect(), 40, dim),
                rank_by_deflation(logits, 9, 40),
            );
            assert_eq!(ranks(dim, &gram(&keys, dim), &gram(&queries, dim)).unwrap(), expected);

            let mut less = keys.clone();
            for channel in 0..dim {
                let mean = keys[channel..].iter().step_by(dim).sum::<f32>() / 40.0;
                less[channel..].iter_mut().step_by(dim).for_each(|x| *x -= mean);
            }
            for (a, b) in centred(&keys, &gram(&keys, dim)).iter().zip(gram(&less, dim)) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }

    #[test]
    fn a_rank_is_the_fewest_that_hold_the_share() {
        assert_eq!(rank(vec![0.1, 8.0, 1.0, 0.9]), 2);
        assert_eq!(rank(vec![1.0; 10]), 9);
        assert_eq!(rank(vec![5.0, 0.0]), 1);
        assert_eq!(rank(vec![0.0, 0.0]), 1);
    }

    #[test]
    fn skew_and_overlap_count_channels() {
        let held = |best: usize| {
            let mut keys = vec![1.0; 20];
            keys[best] = 3.0;
            HeldHead { head_dim: 20, values: keys.clone(), queries: vec![1.0; 40], keys, window: 2 }
        };
        let samples = [held(0), held(0), held(19)].map(|held| sample(&held, 1).unwrap());
        // 28 in all: 9 and a 1 are a tenth of the channels.
        assert_eq!(samples[0].skew.map(|share| (share * 28.0).round()), [10.0, 13.0, 18.0]);
        let head = summary(3, 1, &samples).unwrap();
        assert_eq!((head.layer, head.head), (3, 1));
        assert!((head.overlap.unwrap() - 1.0 / 3.0).abs() < 1e-9);
        assert!((head.jaccard.unwrap() - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(head.logit_rank, Estimate { mean: 1.0, error: Some(0.0) });
        let samples = [sample(&held(0), 20).unwrap()];
        let head = summary(0, 0, &samples).unwrap();
        assert_eq!((head.overlap, head.jaccard, head.key_rank.error), (None, None, None));
    }

    #[test]
    fn every_head_of_a_model_is_measured() {
        let file = fixture::gguf(&fixture::config(Architecture::Llama)).to_bytes();
        let checkpoint = Checkpoint::from_gguf(Path::new("m.gguf"), file.into()).unwrap();
        let options = EngineOptions { threads: 1, ..EngineOptions::default() };
        let mut engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
        let text: Vec<u32> = (0..400).map(|at| at * at % 37).collect();
        let lambda = Lambda::from_per_mille(500).unwrap();
        let scores = [Score::Sample { tokens: 100 }, Score::Sample { tokens: 30 }, Score::Random { seed: 1 }];
        let options = EnergyOptions { tokens: 100, windows: 3, window: 32, lambda, scores: &scores };
        let mut seen = Vec::new();
        let report = measure(&mut engine, (&[], &text), options, &mut |done, of| seen.push((done, of))).unwrap();
        assert_eq!(seen, (1..=12).map(|done| (done, 12)).collect::<Vec<_>>());
        let heads: Vec<_> = report.heads.iter().map(|head| (head.layer, head.head)).collect();
        assert_eq!(heads, [(0, 0), (0, 1), (1, 0), (1, 1)]);
        for head in &report.heads {
            assert!((1.0..=16.0).contains(&head.logit_rank.mean) && (1.0..=16.0).contains(&head.key_rank.mean));
            let [few, some, half] = head.skew.map(|share| share.mean);
            assert!(0.1 < few && few < some && some < half && half < 1.0, "{head:?}");
            assert!(head.jaccard < head.overlap && head.overlap <= Some(1.0));
        }
        // A sample of all is exact; one of some finds more than chance does.
        let [all, some, chance] = &report.scoring.scores[..] else { panic!("{report:?}") };
        assert_eq!((all.score, some.score, chance.score), (scores[0], scores[1], scores[2]));
        assert_eq!((all.overlap, all.held), (Estimate { mean: 1.0, error: Some(0.0) }, all.overlap));
        assert!(1.0 > some.overlap.mean && some.overlap.mean > chance.overlap.mean && chance.overlap.mean > 0.2);
        for row in &report.scoring.scores {
            assert!(row.overlap.mean <= row.held.mean + 1e-9 && row.held.mean <= 1.0 + 1e-9, "{row:?}");
            assert_eq!(row.layers.len(), 2);
            let mean = row.layers.iter().sum::<f64>() / 2.0;
            assert!((mean - row.overlap.mean).abs() < 1e-9 && row.microseconds > 0.0 && row.faster > 0.0, "{row:?}");
        }
        assert!(report.scoring.reading_milliseconds > 0.0);
        let none =
            measure(&mut engine, (&[], &text), EnergyOptions { scores: &[], ..options }, &mut |_, _| {}).unwrap();
        assert_eq!((none.scoring.scores.len(), none.heads), (0, report.heads));

        let mut error = |options| measure(&mut engine, (&[], &text), options, &mut |_, _| {}).unwrap_err().to_string();
        assert!(error(EnergyOptions { tokens: 129, ..options }).contains("context of 128"));
        assert!(error(EnergyOptions { tokens: 0, ..options }).contains("the number of tokens must be"));
        assert!(error(EnergyOptions { window: 0, ..options }).contains("the number of queries must be"));
        assert!(error(EnergyOptions { windows: 5, ..options }).contains("at most 4"));
    }
}
