//! λ from the load: the smallest one at which all sequences fit the free bytes.
//!
//! It is exact: the caller says what a cache takes (the planner, byte by byte), and λ is the smallest per mille that
//! fits. It falls with free bytes and rises with tokens and sequences, never the other way, as long as what a cache takes
//! does.

use crate::{Error, Lambda};

/// The bounds of λ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Bounds {
    /// The least λ: what is taken where everything fits.
    pub least: Lambda,
    /// The most that quality bears.
    pub most: Lambda,
}

/// What has to fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Load {
    /// Bytes free for caches.
    pub free: u64,
    /// Tokens of the longest sequence.
    pub tokens: usize,
    /// Sequences at a time.
    pub sequences: usize,
}

/// What decided λ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Reason {
    /// All fits at the least λ.
    Fits,
    /// One sequence would fit at the least λ, but so many do not.
    Sequences,
    /// Already one sequence of that length does not fit at the least λ.
    Tokens,
    /// It does not fit at the most λ either, which is what is given: fewer sequences or tokens must do.
    TooLarge,
}

impl core::fmt::Display for Reason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Fits => "all fits at the least λ",
            Self::Sequences => "one sequence would fit at the least λ, but so many do not",
            Self::Tokens => "a sequence of that length does not fit at the least λ",
            Self::TooLarge => "it does not fit at the most λ either",
        })
    }
}

/// The λ for `load`, and why. `bytes(λ, tokens, sequences)` is what the caches take; it must not rise with λ nor fall with
/// the others.
///
/// ```
/// use thinkey_core::{Lambda, channel::dynamic::{Bounds, Load, Reason, fit}};
/// let bounds = Bounds { least: Lambda::WHOLE, most: Lambda::from_per_mille(800)? };
/// // A token takes 128 bytes of values and 2 bytes a key channel.
/// let bytes = |lambda: Lambda, tokens, sequences| Ok((128 + 2 * lambda.kept(64)) as u64 * (tokens * sequences) as u64);
/// let load = Load { free: 200_000, tokens: 1000, sequences: 1 };
/// let (lambda, reason) = fit(bounds, load, bytes)?;
/// // 36 channels are the most that fit, and 438 per mille the least that keeps no more.
/// assert_eq!((lambda.per_mille(), lambda.kept(64), reason), (438, 36, Reason::Tokens));
/// # Ok::<(), thinkey_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lambda`] where the least λ is above the most; what `bytes` returns.
pub fn fit(
    bounds: Bounds,
    load: Load,
    bytes: impl Fn(Lambda, usize, usize) -> Result<u64, Error>,
) -> Result<(Lambda, Reason), Error> {
    let Bounds { least, most } = bounds;
    if least > most {
        return Err(Error::Lambda { per_mille: least.per_mille() });
    }
    let fits = |lambda, sequences| Ok::<_, Error>(bytes(lambda, load.tokens, sequences)? <= load.free);
    if fits(least, load.sequences)? {
        return Ok((least, Reason::Fits));
    }
    if !fits(most, load.sequences)? {
        return Ok((most, Reason::TooLarge));
    }
    // It does not fit at `low`, and does at `high`.
    let (mut low, mut high) = (least.per_mille(), most.per_mille());
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(Lambda::from_per_mille(middle)?, load.sequences)? { high = middle } else { low = middle }
    }
    let reason = if fits(least, load.sequences.min(1))? { Reason::Sequences } else { Reason::Tokens };
    Ok((Lambda::from_per_mille(high)?, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CachePlan, StorageKind, policy::Fix};
    use proptest::prelude::*;

    /// What the planner says.
    fn planned(lambda: Lambda, tokens: usize, slots: usize) -> Result<u64, Error> {
        let (keys, values) = (StorageKind::Int4, StorageKind::F16);
        let plan = CachePlan {
            layers: 4,
            kv_heads: 3,
            head_dim: 64,
            sinks: 0,
            recent: 32,
            copies: 1,
            flexible: false,
            renews: false,
            fix: Fix::None,
            value_lambda: Lambda::WHOLE,
            slots,
            tokens,
            window: None,
            keys,
            values,
            eviction: None,
        };
        Ok(plan.bytes(|_, _| lambda.kept(64))?.total() as u64)
    }

    fn lambda(per_mille: u16) -> Lambda {
        Lambda::from_per_mille(per_mille).unwrap()
    }

    proptest! {
        /// By trying every per mille.
        #[test]
        fn is_the_smallest_that_fits(
            (least, most) in (0u16..999).prop_flat_map(|least| (Just(least), least..1000)),
            free in 0u64..40_000_000, tokens in 1usize..6000, sequences in 1usize..6,
        ) {
            let bounds = Bounds { least: lambda(least), most: lambda(most) };
            let (ours, reason) = fit(bounds, Load { free, tokens, sequences }, planned).unwrap();
            let fits = |per_mille: u16, n| planned(lambda(per_mille), tokens, n).unwrap() <= free;
            let expected = (least..=most).find(|&per_mille| fits(per_mille, sequences));
            prop_assert_eq!(ours.per_mille(), expected.unwrap_or(most));
            let why = match expected {
                None => Reason::TooLarge,
                Some(x) if x == least => Reason::Fits,
                Some(_) if fits(least, 1) => Reason::Sequences,
                Some(_) => Reason::Tokens,
            };
            prop_assert_eq!(reason, why);
        }

        #[test]
        fn is_monotone(
            free in 0u64..40_000_000, more in 0u64..10_000_000,
            tokens in 1usize..6000, longer in 0usize..2000, sequences in 1usize..6, others in 0usize..4,
        ) {
            let bounds = Bounds { least: lambda(100), most: lambda(900) };
            let of = |free, tokens, sequences| fit(bounds, Load { free, tokens, sequences }, planned).unwrap().0;
            let here = of(free, tokens, sequences);
            prop_assert!(of(free + more, tokens, sequences) <= here);
            prop_assert!(of(free, tokens + longer, sequences) >= here);
            prop_assert!(of(free, tokens, sequences + others) >= here);
        }
    }

    #[test]
    fn bounds_in_the_wrong_order_are_refused() {
        let bounds = Bounds { least: lambda(500), most: lambda(400) };
        let load = Load { free: 0, tokens: 1, sequences: 1 };
        assert_eq!(fit(bounds, load, planned), Err(Error::Lambda { per_mille: 500 }));
    }
}
