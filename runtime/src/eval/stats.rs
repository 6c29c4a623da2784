//! Means with their errors, and distributions over the vocabulary.

use serde::Serialize;

/// A mean over windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Its standard error, √(s²/n) with the sample variance s²; `None` where there is a single value.
    pub error: Option<f64>,
}

impl Estimate {
    /// Of independent `values`; of none it is not a number.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let error = (values.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt());
        Self { mean, error }
    }
}

/// ln Σ exp(x), in f64; the largest is taken out first.
#[must_use]
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if most == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let most = f64::from(most);
    most + logits.iter().map(|&x| (f64::from(x) - most).exp()).sum::<f64>().ln()
}

/// The token of the largest logit, of equal ones the first.
#[must_use]
pub fn likeliest(logits: &[f32]) -> u32 {
    let best = |best: (u32, f32), (token, &logit): (u32, &f32)| if logit > best.1 { (token, logit) } else { best };
    (0..).zip(logits).fold((0, f32::NEG_INFINITY), best).0
}

/// What a policy makes of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// −ln p of the token that came, in nats.
    pub surprise: f64,
    /// KL(reference ‖ policy), in nats.
    pub divergence: f64,
    /// Whether both find the same token likeliest.
    pub agrees: bool,
}

/// The distribution that others are compared with; its memory is used again.
#[derive(Clone, Debug, Default)]
pub struct Reference {
    logits: Vec<f32>,
    probabilities: Vec<f64>,
    log_sum: f64,
    likeliest: u32,
}

impl Reference {
    /// Takes the distribution of `logits` in place of the one before.
    pub fn set(&mut self, logits: &[f32]) {
        self.log_sum = log_sum_exp(logits);
        self.likeliest = likeliest(logits);
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.probabilities.clear();
        self.probabilities.extend(logits.iter().map(|&x| (f64::from(x) - self.log_sum).exp()));
    }

    /// What the distribution of `logits` makes of `token`, compared with this one.
    ///
    /// # Panics
    /// Where `token` is not in the vocabulary.
    #[must_use]
    pub fn compare(&self, logits: &[f32], token: u32) -> Prediction {
        let log_sum = log_sum_exp(logits);
        // Differences of logits first: what both distributions have in common must not drown what they have not.
        let gap = |((p, &a), &b): ((&f64, &f32), &f32)| if *p > 0.0 { p * (f64::from(a) - f64::from(b)) } else { 0.0 };
        let gap: f64 = self.probabilities.iter().zip(&self.logits).zip(logits).map(gap).sum();
        Prediction {
            surprise: log_sum - f64::from(logits[token as usize]),
            divergence: (gap + log_sum - self.log_sum).max(0.0),
            agrees: likeliest(logits) == self.likeliest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_mean_and_its_error() {
        // Variance 5/3 of four values: √(5/12).
        let estimate = Estimate::of(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(estimate.mean, 2.5);
        assert!((estimate.error.unwrap() - (5.0f64 / 12.0).sqrt()).abs() < 1e-15);
        assert_eq!(Estimate::of(&[7.0]), Estimate { mean: 7.0, error: None });
        assert_eq!(Estimate::of(&[3.0; 5]).error, Some(0.0));
    }

    #[test]
    fn large_logits_do_not_overflow() {
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2f64.ln())).abs() < 1e-12);
        assert!((log_sum_exp(&[-1000.0, f32::NEG_INFINITY]) + 1000.0).abs() < 1e-12);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY]), f64::NEG_INFINITY);
        assert_eq!(likeliest(&[1.0, 3.0, 3.0, 2.0]), 1);
    }

    proptest! {
        /// By the definitions, with probabilities that are formed.
        #[test]
        fn predictions_equal_brute_force(
            (ours, theirs, token) in (2usize..50).prop_flat_map(|vocab| {
                let logits = || prop::collection::vec(-20.0f32..20.0, vocab);
                (logits(), logits(), 0..vocab as u32)
            }),
        ) {
            let softmax = |logits: &[f32]| -> Vec<f64> {
                let powers: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.iter().map(|power| power / sum).collect()
            };
            let (p, q) = (softmax(&ours), softmax(&theirs));
            let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            let mut reference = Reference::default();
            reference.set(&[9.0]);
            reference.set(&ours);
            let got = reference.compare(&theirs, token);
            prop_assert!((got.divergence - divergence).abs() < 1e-9, "{got:?} instead of {divergence}");
            prop_assert!((got.surprise + q[token as usize].ln()).abs() < 1e-9);
            let best = |p: &[f64]| (0..p.len()).max_by(|&a, &b| p[a].total_cmp(&p[b])).unwrap();
            prop_assert_eq!(got.agrees, best(&p) == best(&q));
            let own = reference.compare(&ours, token);
            prop_assert_eq!((own.divergence, own.agrees), (0.0, true));
        }
    }
}
