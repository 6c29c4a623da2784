//! As many channels as a head needs: the fewest whose scores hold a share of the head's total.
//!
//! The weakest score that is still needed is found by bisection over the bits of `f32`, comparing and adding up, with no
//! sort.

use crate::{ChannelMask, Error, MAX_HEAD_DIM, rank};

/// The mask of the fewest channels whose `scores` (one a channel) hold `energy` per mille of their sum, at least one and
/// at most `most`; of equal scores the lower channel is kept. Scores below 0 hold nothing.
///
/// # Errors
/// [`Error::HeadDim`], [`Error::Kept`] where `most` is zero or above the number of channels, [`Error::NotANumber`] for a
/// NaN, [`Error::Index`] for more than 1000 per mille.
pub fn threshold(scores: &[f32], energy: u16, most: usize) -> Result<ChannelMask, Error> {
    let head_dim = scores.len();
    if head_dim == 0 || head_dim > MAX_HEAD_DIM {
        return Err(Error::HeadDim { head_dim });
    }
    if most == 0 || most > head_dim {
        return Err(Error::Kept { kept: most, head_dim });
    }
    if energy > 1000 {
        return Err(Error::Index { what: "energy per mille", index: energy as usize, limit: 1001 });
    }
    if let Some(channel) = scores.iter().position(|x| x.is_nan()) {
        return Err(Error::NotANumber { channel });
    }
    let worth = |score: f32| f64::from(score.max(0.0));
    // What scores above the key hold. Infinite ones hold everything.
    let above = |key: u32| scores.iter().filter(|&&x| rank::key(x) > key).map(|&x| worth(x)).sum::<f64>();
    let total: f64 = scores.iter().map(|&x| worth(x)).sum();
    let asked = total * f64::from(energy) / 1000.0;
    // The largest key such that what is strictly above it does not do: the weakest score needed.
    let weakest = rank::smallest(|key| above(key) < asked).unwrap_or(u32::MAX);
    let (strong, mut held) = (scores.iter().filter(|&&x| rank::key(x) > weakest).count(), above(weakest));
    let mut kept = strong;
    for &score in scores.iter().filter(|&&x| rank::key(x) == weakest) {
        if held >= asked {
            break;
        }
        held += worth(score);
        kept += 1;
    }
    super::select::select(scores, kept.clamp(1, most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// Brute force: sorted by falling score, one after the other until they hold the share.
    fn by_sorting(scores: &[f32], energy: u16, most: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap());
        let asked = scores.iter().map(|&x| f64::from(x)).sum::<f64>() * f64::from(energy) / 1000.0;
        let (mut held, mut kept) = (0.0, Vec::new());
        for channel in order {
            if kept.len() == most || !kept.is_empty() && held >= asked {
                break;
            }
            held += f64::from(scores[channel]);
            kept.push(channel);
        }
        kept.sort_unstable();
        kept
    }

    proptest! {
        /// Small whole numbers add up exactly in any order.
        #[test]
        fn equals_adding_up_sorted_scores(
            (scores, most) in prop::collection::vec((0u8..40).prop_map(f32::from), 1..100)
                .prop_flat_map(|scores| { let n = scores.len(); (Just(scores), 1..=n) }),
            energy in 0u16..=1000,
        ) {
            let mask = threshold(&scores, energy, most).unwrap();
            prop_assert_eq!(mask.channels().collect::<Vec<_>>(), by_sorting(&scores, energy, most));
        }
    }

    #[test]
    fn edges() {
        let kept =
            |scores: &[f32], energy, most| threshold(scores, energy, most).unwrap().channels().collect::<Vec<_>>();
        assert_eq!(kept(&[0.0; 4], 900, 4), [0], "nothing to hold: one channel");
        assert_eq!(kept(&[1.0, f32::INFINITY, 2.0], 500, 3), [1]);
        assert_eq!(kept(&[1.0, -5.0, 2.0], 1000, 3), [0, 2]);
        assert_eq!(threshold(&[1.0, f32::NAN], 500, 1), Err(Error::NotANumber { channel: 1 }));
        assert!(threshold(&[], 500, 1).is_err() && threshold(&[1.0], 500, 2).is_err());
        assert!(threshold(&[1.0], 1001, 1).is_err() && threshold(&[1.0], 500, 0).is_err());
    }
}
