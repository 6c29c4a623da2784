//! Ranking by comparing and counting: the n-th largest of many numbers is found bit by bit, 32 passes that only count,
//! without a sort and without memory. It is how a threshold is found over all heads of a model and over all tokens of a
//! prompt; a pass over 8,192 tokens is some microseconds.

/// A number that orders as `x` does among all floats but NaN, -0 and 0 being equal.
pub(crate) const fn key(x: f32) -> u32 {
    // Adding 0 turns -0 into 0.
    let bits = (x + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// The smallest key for which `holds`, given that it holds for every key above one for which it does; `None` where it
/// holds for none. 32 calls.
pub(crate) fn smallest(holds: impl Fn(u32) -> bool) -> Option<u32> {
    if !holds(u32::MAX) {
        return None;
    }
    let (mut low, mut high) = (0u32, u32::MAX);
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Some(low)
}

/// Where the `best` largest of some numbers end: those above the cut are all in, of those on it the first few.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    key: u32,
    ties: usize,
}

impl Cut {
    /// The cut of the `best` largest of `scores`, which are not NaN.
    pub(crate) fn new(scores: &[f32], best: usize) -> Self {
        Self::of(scores.iter().copied(), best)
    }

    /// [`new`](Self::new) of scores that lie wherever.
    pub(crate) fn of(scores: impl Iterator<Item = f32> + Clone, best: usize) -> Self {
        let above = |key: u32| scores.clone().filter(|&x| self::key(x) > key).count();
        // Above the n-th largest there are fewer than n; at most `best` are, for the smallest such key.
        let key = smallest(|key| above(key) < best.max(1)).unwrap_or(u32::MAX);
        Self { key, ties: if best == 0 { 0 } else { best - above(key) } }
    }

    /// Whether the next score, in the order of `scores`, is among the best.
    pub(crate) fn takes(&mut self, score: f32) -> bool {
        let key = key(score);
        if key == self.key && self.ties > 0 {
            self.ties -= 1;
            return true;
        }
        key > self.key
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    proptest! {
        #[test]
        fn keys_order_as_floats(a in any::<f32>(), b in any::<f32>()) {
            prop_assume!(!a.is_nan() && !b.is_nan());
            prop_assert_eq!(key(a).partial_cmp(&key(b)), a.partial_cmp(&b));
        }

        #[test]
        fn a_cut_equals_a_stable_sort(
            (scores, best) in prop::collection::vec(
                prop_oneof![(-3i8..3).prop_map(f32::from), Just(-0.0f32), any::<f32>().prop_filter("NaN", |x| !x.is_nan())], 1..60,
            ).prop_flat_map(|scores| { let n = scores.len(); (Just(scores), 0..=n) }),
        ) {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap());
            let mut expected = order[..best].to_vec();
            expected.sort_unstable();
            let mut cut = Cut::new(&scores, best);
            let ours: Vec<usize> = (0..scores.len()).filter(|&i| cut.takes(scores[i])).collect();
            prop_assert_eq!(ours, expected);
        }
    }
}
