//! Fixed-capacity top-T: the T best channels, without sorting and without an allocator.

use super::mask::ChannelMask;
use crate::{Error, MAX_HEAD_DIM, log::debug};
use core::cmp::Ordering;
use heapless::binary_heap::{BinaryHeap, Min};

/// A channel and its score, ordered from worse to better: a higher score is better, and of equal scores the lower
/// channel.
#[derive(Clone, Copy, PartialEq)]
struct Candidate {
    score: f32,
    channel: u16,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // Scores are checked for NaN on entry, so the partial order is total; unlike total_cmp it holds 0 = -0.
        self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal).then(other.channel.cmp(&self.channel))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Keeps the `N` or fewer best of the candidates pushed, in O(log N) each: a min-heap whose root is the weakest
/// candidate kept.
pub struct TopT<const N: usize> {
    heap: BinaryHeap<Candidate, Min, N>,
    kept: usize,
}

#[cfg(feature = "defmt")]
impl<const N: usize> defmt::Format for TopT<N> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "TopT {{ kept: {=usize}, held: {=usize} }}", self.kept, self.heap.len());
    }
}

impl<const N: usize> TopT<N> {
    /// Room for the `kept` best.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the capacity needed where `kept` is above `N`.
    pub fn new(kept: usize) -> Result<Self, Error> {
        if kept > N {
            return Err(Error::Capacity { what: "top-T", needed: kept, capacity: N });
        }
        Ok(Self { heap: BinaryHeap::new(), kept })
    }

    /// Offers `channel` with its `score`.
    ///
    /// # Errors
    /// [`Error::NotANumber`] for a NaN.
    pub fn push(&mut self, channel: u16, score: f32) -> Result<(), Error> {
        if score.is_nan() {
            return Err(Error::NotANumber { channel: channel as usize });
        }
        let candidate = Candidate { score, channel };
        if self.heap.len() < self.kept {
            // Below `kept` ≤ N, so there is room.
            let _ = self.heap.push(candidate);
        } else if let Some(mut weakest) = self.heap.peek_mut()
            && candidate > *weakest
        {
            *weakest = candidate;
        }
        Ok(())
    }

    /// The channels kept, in no particular order.
    pub fn channels(&self) -> impl Iterator<Item = u16> + '_ {
        self.heap.iter().map(|candidate| candidate.channel)
    }
}

/// The mask of the `kept` best of `scores` (one a channel); of equal scores the lower channel is kept.
///
/// # Errors
/// [`Error::HeadDim`] for too many channels, [`Error::Kept`] where `kept` is zero or above their number,
/// [`Error::NotANumber`] for a NaN.
pub fn select(scores: &[f32], kept: usize) -> Result<ChannelMask, Error> {
    let head_dim = scores.len();
    if head_dim == 0 || head_dim > MAX_HEAD_DIM {
        return Err(Error::HeadDim { head_dim });
    }
    if kept == 0 || kept > head_dim {
        return Err(Error::Kept { kept, head_dim });
    }
    let mut top = TopT::<MAX_HEAD_DIM>::new(kept)?;
    for (channel, &score) in (0u16..).zip(scores) {
        top.push(channel, score)?;
    }
    let mask = ChannelMask::from_channels(head_dim, top.channels().map(usize::from))?;
    debug!("selected {} of {} channels", kept, head_dim);
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// Brute force: stable sort by falling score keeps lower channels first among equals.
    fn by_sorting(scores: &[f32], kept: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap());
        let mut best = order[..kept].to_vec();
        best.sort_unstable();
        best
    }

    fn any_score() -> impl Strategy<Value = f32> {
        prop_oneof![
            prop::sample::select(&[0.0, -0.0, 1.0, 1.5, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE][..]),
            any::<f32>().prop_filter("NaN is refused", |x| !x.is_nan()),
        ]
    }

    proptest! {
        #[test]
        fn equals_a_full_sort(
            (scores, kept) in prop::collection::vec(any_score(), 1..=256)
                .prop_flat_map(|scores| { let n = scores.len(); (Just(scores), 1..=n) }),
        ) {
            let mask = select(&scores, kept).unwrap();
            prop_assert_eq!(mask.kept(), kept);
            prop_assert_eq!(mask.channels().collect::<Vec<_>>(), by_sorting(&scores, kept));
        }
    }

    #[test]
    fn ties_go_to_the_lower_channel() {
        let mask = select(&[1.0; 8], 3).unwrap();
        assert_eq!(mask.channels().collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn bad_input_is_refused_with_the_value() {
        assert_eq!(select(&[0.0, f32::NAN], 1), Err(Error::NotANumber { channel: 1 }));
        assert_eq!(select(&[0.0; 4], 5), Err(Error::Kept { kept: 5, head_dim: 4 }));
        assert_eq!(select(&[0.0; 4], 0), Err(Error::Kept { kept: 0, head_dim: 4 }));
        assert!(matches!(TopT::<8>::new(9), Err(Error::Capacity { needed: 9, capacity: 8, .. })));
    }
}
