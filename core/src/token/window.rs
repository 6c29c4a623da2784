//! Sinks and a sliding window (StreamingLLM, [arXiv 2309.17453](https://arxiv.org/abs/2309.17453)): the first tokens,
//! which soak up attention whatever they say, and the newest.

use super::range;
use crate::Error;

/// Keeps the first `sinks` tokens and the newest `window`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Window {
    /// First tokens kept.
    pub sinks: usize,
    /// Newest tokens kept.
    pub window: usize,
}

impl Window {
    /// Tokens kept of `tokens`.
    #[must_use]
    pub const fn kept(&self, tokens: usize) -> usize {
        let most = self.sinks.saturating_add(self.window);
        if most < tokens { most } else { tokens }
    }

    /// Writes the tokens kept of `tokens` to the front of `kept`, ascending, and says how many.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the entries needed.
    pub fn keep(&self, tokens: usize, kept: &mut [u32]) -> Result<usize, Error> {
        super::room(kept, self.kept(tokens))?;
        let sinks = range(0, self.sinks.min(tokens), kept)?;
        let newest = range(tokens.saturating_sub(self.window).max(sinks), tokens, &mut kept[sinks..])?;
        Ok(sinks + newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    proptest! {
        #[test]
        fn keeps_what_is_first_or_new((sinks, window, tokens) in (0usize..10, 0usize..40, 0usize..60)) {
            let policy = Window { sinks, window };
            let expected: Vec<u32> = (0..tokens).filter(|&t| t < sinks || t + window >= tokens).map(|t| t as u32).collect();
            let mut kept = vec![0; tokens];
            let len = policy.keep(tokens, &mut kept).unwrap();
            prop_assert_eq!(&kept[..len], &expected[..]);
            prop_assert_eq!(policy.kept(tokens), len);
            if len > 0 {
                prop_assert!(policy.keep(tokens, &mut vec![0; len - 1]).is_err());
            }
        }
    }
}
