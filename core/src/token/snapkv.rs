//! SnapKV ([arXiv 2404.14469](https://arxiv.org/abs/2404.14469)): the last queries of a prompt vote, with the attention
//! they pay, which of the tokens before them are kept.
//!
//! Votes are pooled over neighbours first, so that what is kept comes in runs and not in single tokens. As the authors'
//! code pools: stride 1, the ends padded, so that an average counts padding as zeros.

use super::{best, range, room};
use crate::{
    Error, Loops,
    mass::{QueryWindow, TokenRows, group_mass, head_mass},
};
use serde::{Deserialize, Serialize};

/// How votes of neighbours are pooled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// Their mean.
    Avg,
    /// The largest.
    Max,
}

/// SnapKV's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct SnapKv {
    /// Tokens kept of a prompt, the window's included.
    pub capacity: usize,
    /// Newest tokens, all kept, whose queries vote.
    pub window: usize,
    /// Neighbours whose votes are pooled, an odd number; 1 pools nothing.
    pub kernel: usize,
    /// How.
    pub pool: Pool,
}

impl SnapKv {
    /// Checks the numbers against each other.
    ///
    /// # Errors
    /// [`Error::Index`] for a window above the capacity or an even kernel, [`Error::Length`] for no window.
    pub const fn check(&self) -> Result<(), Error> {
        if self.window == 0 {
            return Err(Error::Length { what: "window that votes", expected: 1, actual: 0 });
        }
        if self.window > self.capacity {
            return Err(Error::Index { what: "window that votes", index: self.window, limit: self.capacity + 1 });
        }
        if self.kernel.is_multiple_of(2) {
            return Err(Error::Index { what: "even pooling kernel", index: self.kernel, limit: 0 });
        }
        Ok(())
    }

    /// Tokens kept of `tokens`.
    #[must_use]
    pub const fn kept(&self, tokens: usize) -> usize {
        if self.capacity < tokens { self.capacity } else { tokens }
    }

    /// Writes the tokens kept, ascending, to the front of `kept`, and says how many. `mass` is the attention mass of all
    /// tokens; what the voters pay each other does not count. It takes as many floats of `scratch`.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::Capacity`] with what is needed, [`Error::TokenScore`] for a NaN.
    pub fn keep(&self, mass: &[f32], scratch: &mut [f32], kept: &mut [u32]) -> Result<usize, Error> {
        self.check()?;
        let tokens = mass.len();
        if tokens <= self.capacity {
            return range(0, tokens, kept);
        }
        let before = tokens - self.window;
        let capacity = scratch.len();
        let pooled =
            scratch.get_mut(..before).ok_or(Error::Capacity { what: "pooled votes", needed: before, capacity })?;
        if let Some(token) = mass[..before].iter().position(|x| x.is_nan()) {
            return Err(Error::TokenScore { token });
        }
        self.pool(&mass[..before], pooled);
        room(kept, self.capacity)?;
        let len = best(pooled, self.capacity - self.window, kept)?;
        Ok(len + range(before, tokens, &mut kept[len..])?)
    }

    /// Pools the votes of consecutive tokens: `pooled` has as many entries. What is beyond the ends has no votes.
    pub fn pool(&self, votes: &[f32], pooled: &mut [f32]) {
        let reach = self.kernel / 2;
        for (token, pooled) in pooled.iter_mut().enumerate() {
            let near = &votes[token.saturating_sub(reach)..votes.len().min(token.saturating_add(reach + 1))];
            *pooled = match self.pool {
                Pool::Avg => near.iter().sum::<f32>() / self.kernel as f32,
                Pool::Max => near.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            };
        }
    }

    /// [`keep`](Self::keep) with the votes of all heads of a group: one list for a KV head, whose cache keeps its size.
    ///
    /// `scratch` takes 2·S floats.
    ///
    /// # Errors
    /// As [`keep`](Self::keep) and [`group_mass`]; [`Error::Length`] where the queries' window is another one.
    pub fn keep_group<L: Loops>(
        &self,
        loops: &L,
        queries: &QueryWindow<'_>,
        keys: &TokenRows<'_>,
        scratch: &mut [f32],
        kept: &mut [u32],
    ) -> Result<usize, Error> {
        self.vote(queries, keys, scratch, kept, |row, mass| group_mass(loops, queries, keys, row, mass))
    }

    /// [`keep`](Self::keep) with the votes of one query head alone, as in the authors' code: its own list, so that a group
    /// of G heads stores up to G copies of its KV head.
    ///
    /// `scratch` takes 2·S floats.
    ///
    /// # Errors
    /// As [`keep_group`](Self::keep_group); [`Error::Index`] where there is no head `head`.
    pub fn keep_query_head<L: Loops>(
        &self,
        loops: &L,
        queries: &QueryWindow<'_>,
        head: usize,
        keys: &TokenRows<'_>,
        scratch: &mut [f32],
        kept: &mut [u32],
    ) -> Result<usize, Error> {
        self.vote(queries, keys, scratch, kept, |row, mass| head_mass(loops, queries, head, keys, row, mass))
    }

    fn vote(
        &self,
        queries: &QueryWindow<'_>,
        keys: &TokenRows<'_>,
        scratch: &mut [f32],
        kept: &mut [u32],
        mass: impl FnOnce(&mut [f32], &mut [f32]) -> Result<(), Error>,
    ) -> Result<usize, Error> {
        self.check()?;
        let tokens = keys.tokens();
        if tokens <= self.capacity {
            return range(0, tokens, kept);
        }
        crate::error::check_len("queries that vote", self.window, queries.window())?;
        let capacity = scratch.len();
        let scratch =
            scratch.get_mut(..2 * tokens).ok_or(Error::Capacity { what: "votes", needed: 2 * tokens, capacity })?;
        let (row, votes) = scratch.split_at_mut(tokens);
        mass(row, votes)?;
        self.keep(votes, row, kept)
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
    use std::{vec, vec::Vec};

    /// Padded pooling and a stable sort.
    fn slowly(policy: &SnapKv, mass: &[f32]) -> Vec<u32> {
        let tokens = mass.len();
        if tokens <= policy.capacity {
            return (0..tokens as u32).collect();
        }
        let before = tokens - policy.window;
        let reach = policy.kernel as isize / 2;
        let pooled: Vec<f32> = (0..before as isize)
            .map(|t| {
                let near = (t - reach..=t + reach).map(|t| usize::try_from(t).ok().filter(|&t| t < before));
                match policy.pool {
                    Pool::Avg => near.map(|t| t.map_or(0.0, |t| mass[t])).sum::<f32>() / policy.kernel as f32,
                    Pool::Max => {
                        near.map(|t| t.map_or(f32::NEG_INFINITY, |t| mass[t])).fold(f32::NEG_INFINITY, f32::max)
                    }
                }
            })
            .collect();
        let mut order: Vec<u32> = (0..before as u32).collect();
        order.sort_by(|&a, &b| pooled[b as usize].partial_cmp(&pooled[a as usize]).unwrap());
        order.truncate(policy.capacity - policy.window);
        order.extend(before as u32..tokens as u32);
        order.sort_unstable();
        order
    }

    fn policies() -> impl Strategy<Value = SnapKv> {
        (1usize..6, 0usize..30, 0usize..6, prop::sample::select(&[Pool::Avg, Pool::Max][..])).prop_map(
            |(window, more, half, pool)| SnapKv { capacity: window + more, window, kernel: 2 * half + 1, pool },
        )
    }

    proptest! {
        #[test]
        fn equals_padded_pooling_and_a_sort(policy in policies(), mass in prop::collection::vec((0u8..9).prop_map(f32::from), 0..80)) {
            let (mut scratch, mut kept) = (vec![0.0; mass.len()], vec![0; mass.len()]);
            let len = policy.keep(&mass, &mut scratch, &mut kept).unwrap();
            prop_assert_eq!(len, policy.kept(mass.len()));
            prop_assert_eq!(&kept[..len], slowly(&policy, &mass));
        }

        /// From queries and keys: one list for the group, one for each query head.
        #[test]
        fn heads_vote_together_or_alone(policy in policies(), group in 1usize..4, more in 1usize..60, seed in any::<u64>()) {
            let (d, window, tokens) = (8, policy.window, policy.window + more);
            let (q, k) = (numbers(seed, group * window * d), numbers(!seed, tokens * d));
            let queries = QueryWindow::new(&q, [group, window * d], [window, d], d).unwrap();
            let keys = TokenRows::new(&k, tokens, d, d).unwrap();
            let rows = brute_force(&q, &k, d, window);
            let mean = |rows: &[Vec<f64>]| -> Vec<f32> {
                (0..tokens).map(|t| (rows.iter().map(|row| row[t]).sum::<f64>() / rows.len() as f64) as f32).collect()
            };
            let (mut scratch, mut kept) = (vec![0.0; 2 * tokens], vec![0; tokens]);
            // Votes that differ by rounding alone may fall either way: compare the sum of what is kept.
            let worth = |mass: &[f32], list: &[u32]| -> f64 {
                let before = tokens - window;
                let mut pooled = vec![0.0; before];
                policy.pool(&mass[..before], &mut pooled);
                list.iter().filter(|&&t| (t as usize) < before).map(|&t| f64::from(pooled[t as usize])).sum()
            };
            for head in 0..=group {
                let (len, mass) = if head == group {
                    (policy.keep_group(&Plain, &queries, &keys, &mut scratch, &mut kept).unwrap(), mean(&rows))
                } else {
                    let len = policy.keep_query_head(&Plain, &queries, head, &keys, &mut scratch, &mut kept).unwrap();
                    (len, mean(&rows[head * window..(head + 1) * window]))
                };
                let expected = slowly(&policy, &mass);
                prop_assert_eq!(len, expected.len());
                prop_assert!((worth(&mass, &kept[..len]) - worth(&mass, &expected)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn impossible_numbers_are_refused() {
        let policy = SnapKv { capacity: 8, window: 4, kernel: 3, pool: Pool::Avg };
        assert!(SnapKv { window: 9, ..policy }.check().is_err() && SnapKv { window: 0, ..policy }.check().is_err());
        assert!(SnapKv { kernel: 2, ..policy }.check().is_err() && SnapKv { kernel: 0, ..policy }.check().is_err());
        let mass = [1.0, f32::NAN, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(policy.keep(&mass, &mut [0.0; 9], &mut [0; 9]), Err(Error::TokenScore { token: 1 }));
        assert!(policy.keep(&[0.0; 9], &mut [0.0; 4], &mut [0; 9]).is_err());
        assert!(policy.keep(&[0.0; 9], &mut [0.0; 9], &mut [0; 7]).is_err());
    }
}
