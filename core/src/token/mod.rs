//! Which tokens to keep: what is evicted takes no memory at all, of keys and of values.
//!
//! Every method lists the indices of the tokens it keeps, ascending, in memory that the caller passes in; ties go to the
//! lower index. Eviction comes before channels are scored, so that a token that is gone scores nothing.
//!
//! A cache carries SnapKV and H2O out as an [`Eviction`]: every head ranks the tokens that leave its ring, and those that
//! it has stored thin, and keeps the best; see [`cache`](crate::cache#evicting-tokens).

use crate::{Error, rank::Cut};
use h2o::H2o;
use snapkv::SnapKv;

pub mod h2o;
pub mod snapkv;
pub mod window;

/// How a cache of bounded size ranks the tokens that compete for a place in it. All heads hold as many tokens; which ones is
/// each KV head's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Eviction {
    /// By the pooled votes of a prompt's newest queries, anew for each prompt whose tokens leave the ring. Those of an answer
    /// rank above all that were voted for, the younger the higher, until the next vote.
    SnapKv(SnapKv),
    /// By the attention gathered from all queries so far.
    H2o(H2o),
}

impl Eviction {
    /// Checks the numbers.
    ///
    /// # Errors
    /// As [`SnapKv::check`] and [`H2o::check`].
    pub fn check(&self) -> Result<(), Error> {
        match self {
            Self::SnapKv(snapkv) => snapkv.check(),
            Self::H2o(h2o) => h2o.check(),
        }
    }

    /// Most tokens held, sinks and whole ones included.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        match self {
            Self::SnapKv(snapkv) => snapkv.capacity,
            Self::H2o(h2o) => h2o.capacity,
        }
    }

    /// Newest tokens that are never evicted.
    #[must_use]
    pub const fn recent(&self) -> usize {
        match self {
            Self::SnapKv(snapkv) => snapkv.window,
            Self::H2o(h2o) => h2o.recent,
        }
    }

    /// Newest queries of a prompt that vote; 0 where all count.
    #[must_use]
    pub const fn voters(&self) -> usize {
        match self {
            Self::SnapKv(snapkv) => snapkv.window,
            Self::H2o(_) => 0,
        }
    }

    /// Whether all queries count, those of a step too.
    #[must_use]
    pub const fn gathers(&self) -> bool {
        matches!(self, Self::H2o(_))
    }
}

/// Writes the indices of the `best` largest of `scores` to the front of `kept`, ascending, and says how many: found by
/// counting, with no sort and no memory. Of equal scores the lower index is kept.
///
/// # Errors
/// [`Error::TokenScore`] for a NaN, [`Error::Capacity`] with the entries needed.
pub fn best(scores: &[f32], best: usize, kept: &mut [u32]) -> Result<usize, Error> {
    if let Some(token) = scores.iter().position(|x| x.is_nan()) {
        return Err(Error::TokenScore { token });
    }
    let best = best.min(scores.len());
    let room = room(kept, best)?;
    let mut cut = Cut::new(scores, best);
    let chosen = (0u32..).zip(scores).filter(|&(_, &score)| cut.takes(score));
    for (to, (token, _)) in room.iter_mut().zip(chosen) {
        *to = token;
    }
    Ok(best)
}

/// The first `needed` entries of a list of kept tokens.
fn room(kept: &mut [u32], needed: usize) -> Result<&mut [u32], Error> {
    let capacity = kept.len();
    kept.get_mut(..needed).ok_or(Error::Capacity { what: "kept tokens", needed, capacity })
}

/// Writes the tokens `from..to` to the front of `kept`.
fn range(from: usize, to: usize, kept: &mut [u32]) -> Result<usize, Error> {
    let len = to.saturating_sub(from);
    for (kept, token) in room(kept, len)?.iter_mut().zip(from as u32..) {
        *kept = token;
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    proptest! {
        #[test]
        fn the_best_are_those_of_a_stable_sort(
            scores in prop::collection::vec((0u8..20).prop_map(f32::from), 0..80), n in 0usize..100,
        ) {
            let mut order: Vec<u32> = (0..scores.len() as u32).collect();
            order.sort_by(|&a, &b| scores[b as usize].partial_cmp(&scores[a as usize]).unwrap());
            order.truncate(n);
            order.sort_unstable();
            let mut kept = vec![0; scores.len()];
            let len = best(&scores, n, &mut kept).unwrap();
            prop_assert_eq!(&kept[..len], order);
        }
    }

    #[test]
    fn bad_input_is_refused() {
        assert_eq!(best(&[0.0, f32::NAN], 1, &mut [0]), Err(Error::TokenScore { token: 1 }));
        assert!(matches!(best(&[0.0; 4], 3, &mut [0; 2]), Err(Error::Capacity { needed: 3, capacity: 2, .. })));
    }
}
