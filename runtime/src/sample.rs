//! Choosing the next token from logits.

use std::{cmp::Ordering, ops::RangeInclusive};

/// How the next token is chosen. The steps apply in the order of the fields; the defaults are greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits of tokens that were seen, or multiplies them where negative (CTRL, arXiv 1909.05858); 1 is off.
    pub repetition_penalty: f32,
    /// Divides the logits; 0 takes the most likely token whatever the rest says.
    pub temperature: f32,
    /// Most tokens to choose from; 0 is off.
    pub top_k: usize,
    /// Smallest set of likeliest tokens whose probabilities sum to this; 1 is off (arXiv 1904.09751).
    pub top_p: f32,
    /// Least probability, as a share of the likeliest token's; 0 is off (arXiv 2407.01082).
    pub min_p: f32,
    /// Same seed, same choice.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { repetition_penalty: 1.0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

/// A sampling option outside its range.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{option} of {value} is outside {least} to {most}")]
pub struct SamplingError {
    /// Which option.
    pub option: &'static str,
    /// The value given.
    pub value: f32,
    /// Smallest value allowed.
    pub least: f32,
    /// Largest value allowed.
    pub most: f32,
}

/// Chooses tokens, reproducibly: the choice depends on the options, the logits and how many tokens were chosen before.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: Sampling,
    state: u64,
    /// Tokens and logits, then probabilities; kept to allocate once.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler with `options`.
    ///
    /// # Errors
    /// [`SamplingError`] naming the option that is outside its range.
    pub fn new(options: Sampling) -> Result<Self, SamplingError> {
        let check = |option, value: f32, range: RangeInclusive<f32>| {
            if range.contains(&value) {
                Ok(())
            } else {
                Err(SamplingError { option, value, least: *range.start(), most: *range.end() })
            }
        };
        check("temperature", options.temperature, 0.0..=100.0)?;
        check("top-p", options.top_p, 0.0..=1.0)?;
        check("min-p", options.min_p, 0.0..=1.0)?;
        check("repetition penalty", options.repetition_penalty, 0.01..=100.0)?;
        Ok(Self { options, state: options.seed, candidates: Vec::new() })
    }

    /// How many of the largest logits are all that a choice depends on; `None` where it may depend on each.
    #[must_use]
    pub fn wants(&self) -> Option<usize> {
        match self.options {
            Sampling { repetition_penalty, .. } if repetition_penalty != 1.0 => None,
            Sampling { temperature: 0.0, .. } => Some(1),
            Sampling { top_k: 0, .. } => None,
            Sampling { top_k, .. } => Some(top_k),
        }
    }

    /// The next token, of the logits that it [wants](Self::wants), with their tokens, in any order: what
    /// [`sample`](Self::sample) chooses of all.
    pub fn sample_best(&mut self, best: &[(u32, f32)]) -> u32 {
        self.candidates.clear();
        self.candidates.extend(best.iter().map(|&(token, x)| (token, if x.is_nan() { f32::NEG_INFINITY } else { x })));
        self.choose()
    }

    /// The next token. `seen` are the tokens that a repetition penalty applies to. Logits that are not numbers are never
    /// chosen unless there are no others.
    pub fn sample(&mut self, logits: &[f32], seen: &[u32]) -> u32 {
        let repetition_penalty = self.options.repetition_penalty;
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend((0u32..).zip(logits.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x })));
        if repetition_penalty != 1.0 {
            for &token in seen {
                if let (Some(candidate), Some(&logit)) =
                    (candidates.get_mut(token as usize), logits.get(token as usize))
                {
                    // From the original logit, so that a token seen twice is not penalised twice.
                    let penalised = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
                    candidate.1 = if penalised.is_nan() { f32::NEG_INFINITY } else { penalised };
                }
            }
        }
        self.choose()
    }

    /// One of the candidates.
    fn choose(&mut self) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.options;
        let candidates = &mut self.candidates;
        // Highest first; of equals the lower token.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if temperature == 0.0 {
            return candidates.iter().min_by(|a, b| order(a, b)).map_or(0, |candidate| candidate.0);
        }
        let keep = if top_k == 0 { candidates.len() } else { top_k.min(candidates.len()) };
        if keep < candidates.len() && keep > 0 {
            candidates.select_nth_unstable_by(keep - 1, order);
            candidates.truncate(keep);
        }
        candidates.sort_unstable_by(order);
        let Some(&(first, largest)) = candidates.first() else { return 0 };
        let mut sum = 0.0;
        for candidate in &mut *candidates {
            candidate.1 = if candidate.1 == largest { 1.0 } else { ((candidate.1 - largest) / temperature).exp() };
            sum += candidate.1;
        }
        let mut mass = 0.0;
        let end = candidates.iter().position(|&(_, weight)| {
            let cut = weight < min_p || mass >= top_p * sum;
            mass += weight;
            cut
        });
        candidates.truncate(end.unwrap_or(candidates.len()).max(1));
        let total: f32 = candidates.iter().map(|candidate| candidate.1).sum();
        let mut left = uniform(&mut self.state) * total;
        for &(token, weight) in &*candidates {
            left -= weight;
            if left < 0.0 {
                return token;
            }
        }
        candidates
            .iter()
            .rfind(|candidate| candidate.1.partial_cmp(&0.0) == Some(Ordering::Greater))
            .map_or(first, |c| c.0)
    }
}

/// A number in 0..1 by SplitMix64 (Steele, Lea & Flood 2014): 24 random bits.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 3.0];

    fn frequencies(options: Sampling, draws: usize) -> [f64; 5] {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = [0.0; 5];
        for _ in 0..draws {
            counts[sampler.sample(&LOGITS, &[]) as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_best() {
        assert_eq!(Sampler::new(Sampling::default()).unwrap().sample(&LOGITS, &[]), 1);
        let mut sampler = Sampler::new(Sampling { repetition_penalty: 2.0, ..Sampling::default() }).unwrap();
        assert_eq!(sampler.sample(&LOGITS, &[1, 1, 4]), 2);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let found = frequencies(Sampling { temperature: 1.5, ..Sampling::default() }, 40_000);
        let weights = LOGITS.map(|x| (f64::from(x) / 1.5).exp());
        let sum: f64 = weights.iter().sum();
        for (found, weight) in found.iter().zip(weights) {
            assert!((found - weight / sum).abs() < 0.01, "{found} instead of {}", weight / sum);
        }
    }

    #[test]
    fn filters_leave_what_they_say() {
        let base = Sampling { temperature: 1.0, ..Sampling::default() };
        let kept = |options| frequencies(options, 3000).map(|share| share > 0.0);
        assert_eq!(kept(Sampling { top_k: 1, ..base }), [false, true, false, false, false]);
        assert_eq!(kept(Sampling { top_k: 3, ..base }), [false, true, true, false, true]);
        // The two likeliest hold 79% together.
        assert_eq!(kept(Sampling { top_p: 0.7, ..base }), [false, true, false, false, true]);
        // e^-1 = 0.37 and e^-2 = 0.14 of the likeliest.
        assert_eq!(kept(Sampling { min_p: 0.2, ..base }), [false, true, true, false, true]);
        assert_eq!(kept(Sampling { top_p: 0.0, ..base }), [false, true, false, false, false]);
    }

    #[test]
    fn same_seed_same_tokens() {
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::default() }).unwrap();
            std::array::from_fn::<_, 50, _>(|_| sampler.sample(&LOGITS, &[]))
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn options_outside_their_range_are_named() {
        let error = Sampler::new(Sampling { top_p: 1.5, ..Sampling::default() }).unwrap_err();
        assert_eq!(error.to_string(), "top-p of 1.5 is outside 0 to 1");
        assert!(Sampler::new(Sampling { temperature: f32::NAN, ..Sampling::default() }).is_err());
    }

    proptest! {
        /// What a sampler says that it wants is enough, whatever the options.
        #[test]
        fn the_best_logits_are_as_good_as_all(
            logits in prop::collection::vec(prop_oneof![any::<f32>(), (-3i8..3).prop_map(f32::from)], 1..80),
            temperature in prop_oneof![Just(0.0f32), 0.1f32..3.0],
            top_k in 1usize..20,
            top_p in 0.0f32..=1.0,
            min_p in 0.0f32..=1.0,
            seed in any::<u64>(),
        ) {
            let options = Sampling { temperature, top_k, top_p, min_p, repetition_penalty: 1.0, seed };
            let (mut all, mut few) = (Sampler::new(options).unwrap(), Sampler::new(options).unwrap());
            let mut best = Vec::new();
            thinkey_kernels::ops::keep_best(&logits, few.wants().unwrap(), &mut best);
            for _ in 0..5 {
                prop_assert_eq!(few.sample_best(&best), all.sample(&logits, &[]));
            }
        }

        #[test]
        fn any_logits_give_a_token(
            logits in prop::collection::vec(prop_oneof![any::<f32>(), -5.0f32..5.0], 1..50),
            temperature in 0.0f32..3.0,
            top_k in 0usize..60,
            top_p in 0.0f32..=1.0,
            min_p in 0.0f32..=1.0,
        ) {
            let options = Sampling { temperature, top_k, top_p, min_p, repetition_penalty: 1.3, seed: 1 };
            let token = Sampler::new(options).unwrap().sample(&logits, &[0, 3, 900]);
            prop_assert!((token as usize) < logits.len());
        }
    }
}
