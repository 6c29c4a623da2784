//! H2O, heavy hitters ([arXiv 2306.14048](https://arxiv.org/abs/2306.14048)): the tokens that have gathered the most
//! attention from all queries so far, and the newest.
//!
//! Each token has an accumulator, in the order of the tokens held. A step [adds](accumulate) the weights of its softmax;
//! where too many tokens are held, [`H2o::keep`] lists those that stay and [`compact`] moves their accumulators up, as
//! the cache moves their keys and values.

use super::{best, range, room};
use crate::{
    Error, Loops,
    error::check_len,
    mass::{QueryWindow, TokenRows, each_query},
};

/// H2O's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct H2o {
    /// Tokens kept, the recent ones included.
    pub capacity: usize,
    /// Newest tokens, always kept.
    pub recent: usize,
}

/// Adds the attention weights of one query head's step, one a token held, to the accumulators. Accumulators that are not
/// yet in use (new tokens) are 0.
///
/// # Errors
/// [`Error::Length`] where there are fewer accumulators than weights.
pub fn accumulate(weights: &[f32], accumulators: &mut [f32]) -> Result<(), Error> {
    if accumulators.len() < weights.len() {
        let (expected, actual) = (weights.len(), accumulators.len());
        return Err(Error::Length { what: "attention accumulators", expected, actual });
    }
    for (sum, &weight) in accumulators.iter_mut().zip(weights) {
        *sum += weight;
    }
    Ok(())
}

/// Adds the attention of all `queries` of a group (of a prompt: as many as there are tokens) to the accumulators, one a
/// token of `keys`. `scratch` takes S floats; it takes O(W·G·S·D), for a whole prompt as much as attention itself.
///
/// # Errors
/// As [`each_query`]; [`Error::Length`] where there are fewer accumulators than tokens.
pub fn accumulate_queries<L: Loops>(
    loops: &L,
    queries: &QueryWindow<'_>,
    keys: &TokenRows<'_>,
    scratch: &mut [f32],
    accumulators: &mut [f32],
) -> Result<(), Error> {
    for head in 0..queries.group() {
        each_query(loops, queries, head, keys, scratch, |weights| accumulate(weights, accumulators))?;
    }
    Ok(())
}

/// Moves the accumulators of the tokens `kept` (ascending) to the front and clears the others, for new tokens.
///
/// # Errors
/// [`Error::Index`] for a token without accumulator or out of order; the accumulators are unchanged then.
pub fn compact(kept: &[u32], accumulators: &mut [f32]) -> Result<(), Error> {
    let limit = accumulators.len();
    for (at, &token) in kept.iter().enumerate() {
        if token as usize >= limit || at > 0 && token <= kept[at - 1] {
            return Err(Error::Index { what: "kept token", index: token as usize, limit });
        }
    }
    // Ascending, so nothing is overwritten before it has moved.
    for (at, &token) in kept.iter().enumerate() {
        accumulators[at] = accumulators[token as usize];
    }
    accumulators[kept.len()..].fill(0.0);
    Ok(())
}

impl H2o {
    /// Checks the numbers against each other.
    ///
    /// # Errors
    /// [`Error::Index`] where more recent tokens are kept than tokens, [`Error::Length`] where none is.
    pub fn check(&self) -> Result<(), Error> {
        if self.capacity == 0 {
            return Err(Error::Length { what: "tokens kept", expected: 1, actual: 0 });
        }
        if self.recent > self.capacity {
            return Err(Error::Index { what: "recent token", index: self.recent, limit: self.capacity + 1 });
        }
        Ok(())
    }

    /// Writes the tokens kept of those held (one accumulator each) to the front of `kept`, ascending, and says how many.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::Capacity`] with the entries needed, [`Error::TokenScore`] for a NaN.
    pub fn keep(&self, accumulators: &[f32], kept: &mut [u32]) -> Result<usize, Error> {
        self.check()?;
        let tokens = accumulators.len();
        if tokens <= self.capacity {
            return range(0, tokens, kept);
        }
        room(kept, self.capacity)?;
        let before = tokens - self.recent;
        let len = best(&accumulators[..before], self.capacity - self.recent, kept)?;
        Ok(len + range(before, tokens, &mut kept[len..])?)
    }

    /// [`accumulate`] for every query head of a group, `weights` being `[group][tokens held]`.
    ///
    /// # Errors
    /// [`Error::Length`] where slices do not fit.
    pub fn step(&self, weights: &[f32], held: usize, accumulators: &mut [f32]) -> Result<(), Error> {
        if held == 0 {
            return check_len("attention weights", 0, weights.len());
        }
        check_len("attention weights", weights.len().next_multiple_of(held), weights.len())?;
        weights.chunks_exact(held).try_for_each(|weights| accumulate(weights, accumulators))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Plain,
        mass::tests::{brute_force, numbers},
    };
    use proptest::prelude::*;
    use std::{collections::BTreeMap, vec, vec::Vec};

    proptest! {
        /// A life of steps against a map from token to what it has gathered.
        #[test]
        fn equals_a_map_of_tokens(
            (capacity, recent) in (1usize..20).prop_flat_map(|c| (Just(c), 0..=c)),
            steps in prop::collection::vec(prop::collection::vec(0u8..7, 40), 1..60),
        ) {
            let policy = H2o { capacity, recent };
            let (mut accumulators, mut kept) = (vec![0.0; capacity + 1], vec![0; capacity + 1]);
            let mut held: Vec<usize> = Vec::new();
            let mut gathered: BTreeMap<usize, f32> = BTreeMap::new();
            for (token, weights) in steps.iter().enumerate() {
                held.push(token);
                let weights: Vec<f32> = weights.iter().take(held.len()).map(|&x| f32::from(x)).collect();
                policy.step(&weights, held.len(), &mut accumulators).unwrap();
                held.iter().zip(&weights).for_each(|(&token, &weight)| *gathered.entry(token).or_default() += weight);
                let len = policy.keep(&accumulators[..held.len()], &mut kept).unwrap();
                compact(&kept[..len], &mut accumulators).unwrap();
                if held.len() > capacity {
                    let newest = held.split_off(held.len() - recent);
                    // Of the others the weakest goes; of equal ones the youngest.
                    let worst = *held.iter().rev().min_by(|a, b| gathered[a].partial_cmp(&gathered[b]).unwrap()).unwrap();
                    held.retain(|&token| token != worst);
                    held.extend(newest);
                }
                prop_assert_eq!(len, held.len());
                let expected: Vec<f32> = held.iter().map(|token| gathered[token]).collect();
                prop_assert_eq!(&accumulators[..len], expected);
            }
        }

        #[test]
        fn a_prompt_gathers_what_all_its_queries_pay((tokens, group, seed) in (1usize..20, 1usize..3, any::<u64>())) {
            let d = 6;
            let (q, k) = (numbers(seed, group * tokens * d), numbers(!seed, tokens * d));
            let queries = QueryWindow::new(&q, [group, tokens * d], [tokens, d], d).unwrap();
            let keys = TokenRows::new(&k, tokens, d, d).unwrap();
            let (mut scratch, mut sums) = (vec![0.0; tokens], vec![0.0; tokens]);
            accumulate_queries(&Plain, &queries, &keys, &mut scratch, &mut sums).unwrap();
            let rows = brute_force(&q, &k, d, tokens);
            for (token, &ours) in sums.iter().enumerate() {
                let expected: f64 = rows.iter().map(|row| row[token]).sum();
                prop_assert!((f64::from(ours) - expected).abs() < 1e-4, "{ours} {expected}");
            }
        }
    }

    #[test]
    fn bad_input_is_refused() {
        assert!(H2o { capacity: 4, recent: 5 }.check().is_err() && H2o { capacity: 0, recent: 0 }.check().is_err());
        let policy = H2o { capacity: 2, recent: 1 };
        assert_eq!(policy.keep(&[f32::NAN, 0.0, 0.0], &mut [0; 2]), Err(Error::TokenScore { token: 0 }));
        assert!(policy.keep(&[0.0; 3], &mut [0; 1]).is_err());
        assert!(accumulate(&[0.0; 3], &mut [0.0; 2]).is_err() && policy.step(&[0.0; 3], 2, &mut [0.0; 2]).is_err());
        let mut sums = [1.0, 2.0, 3.0];
        assert!(compact(&[1, 1], &mut sums).is_err() && compact(&[3], &mut sums).is_err());
        assert_eq!(sums, [1.0, 2.0, 3.0]);
    }
}
