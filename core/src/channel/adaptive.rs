//! One budget of channels over all layers and heads: heads whose channels matter keep more.
//!
//! Every head keeps a minimum; what is left of Σ T = heads · kept(D, λ) goes to the largest
//! [budget scores](super::compensate::budget_scores) anywhere. That is a threshold: a head keeps as many channels as it
//! has scores above it. It is found by bisection over the bits of `f32` and counting ([`distribute`]), with no sort of
//! all scores and no memory beside T itself.
//!
//! T hardly depends on the prompt: [`Calibration`] averages the *sorted* scores of some windows of text once, and T per
//! head is then fixed, so that shapes are static and only *which* channels is decided by each prompt.

use crate::{Error, Lambda, MAX_HEAD_DIM, error::check_len, rank};

/// Channels that every head keeps at least, unless told otherwise.
pub const MIN_KEPT: usize = 8;

/// What T may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Grid {
    /// Channels of a head, D.
    pub head_dim: usize,
    /// Channels that every head keeps at least.
    pub minimum: usize,
    /// T is a multiple of it, or D: 1, or what a backend's vectors ask for.
    pub multiple: usize,
}

impl Grid {
    fn check(&self) -> Result<(), Error> {
        let head_dim = self.head_dim;
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { head_dim });
        }
        for kept in [self.minimum, self.multiple] {
            if kept == 0 || kept > head_dim {
                return Err(Error::Kept { kept, head_dim });
            }
        }
        Ok(())
    }

    /// The T of a head of which `above` scores lie above the threshold: the nearest multiple, halves up.
    const fn nearest(&self, above: usize) -> usize {
        let least = self.minimum.next_multiple_of(self.multiple);
        let nearest = (above + self.multiple / 2) / self.multiple * self.multiple;
        let kept = if nearest < least { least } else { nearest };
        if kept > self.head_dim { self.head_dim } else { kept }
    }
}

/// Writes T of each head, `kept` having one entry a head, from the budget scores of all layers' heads (`[heads][D]`, in
/// any order within a head). Σ T is at most heads · kept(D, `lambda`); with a multiple of 1 it is exactly that.
///
/// With a larger multiple T is rounded to the nearest multiple *before* the sum is compared, so the threshold moves
/// until the rounded T fit. Of equal scores at the threshold, those of lower heads come first.
///
/// # Errors
/// [`Error::HeadDim`], [`Error::Kept`] for a grid that cannot be, [`Error::Length`] where slices do not fit,
/// [`Error::NotANumber`] with the channel for a NaN, [`Error::Capacity`] where the budget is below the minimum of all
/// heads.
pub fn distribute(scores: &[f32], grid: Grid, lambda: Lambda, kept: &mut [u16]) -> Result<(), Error> {
    grid.check()?;
    spread(scores, grid, kept.len() * lambda.kept(grid.head_dim), kept)
}

/// [`distribute`] for any budget: Σ T is at most `channels`.
///
/// # Errors
/// As [`distribute`].
pub fn spread(scores: &[f32], grid: Grid, channels: usize, kept: &mut [u16]) -> Result<(), Error> {
    grid.check()?;
    let d = grid.head_dim;
    check_len("budget scores", kept.len().saturating_mul(d), scores.len())?;
    if let Some(at) = scores.iter().position(|x| x.is_nan()) {
        return Err(Error::NotANumber { channel: at % d });
    }
    let channels = channels.min(kept.len() * d);
    let above = |head: &[f32], threshold: u32| head.iter().filter(|&&x| rank::key(x) >= threshold).count();
    let total = |threshold: u32| scores.chunks_exact(d).map(|head| grid.nearest(above(head, threshold))).sum::<usize>();
    let Some(threshold) = rank::smallest(|threshold| total(threshold) <= channels) else {
        return Err(Error::Capacity { what: "channels over all heads", needed: total(u32::MAX), capacity: channels });
    };
    let mut left = channels - total(threshold);
    for (kept, head) in kept.iter_mut().zip(scores.chunks_exact(d)) {
        let sure = grid.nearest(above(head, threshold));
        // What the scores just below the threshold ask for, all equal, as far as it goes.
        let asked = grid.nearest(above(head, threshold.saturating_sub(1))) - sure;
        let more = if asked <= left { asked } else { left / grid.multiple * grid.multiple };
        left -= more;
        *kept = (sure + more) as u16;
    }
    Ok(())
}

/// Averages the sorted budget scores of some windows of text, to fix T per head once for a model.
///
/// Each window counts the same: its scores are divided by their sum over all heads.
///
/// ```
/// use thinkey_core::{Lambda, channel::adaptive::{Calibration, Grid}};
/// // Two heads of four channels; the second one's queries use all of theirs.
/// let mut memory = [0.0; 8];
/// let mut calibration = Calibration::new(&mut memory, 4)?;
/// calibration.add(&[9.0, 0.1, 0.2, 0.1, 3.0, 4.0, 2.0, 5.0])?;
/// let mut kept = [0; 2];
/// let grid = Grid { head_dim: 4, minimum: 1, multiple: 1 };
/// calibration.table(grid, Lambda::from_per_mille(400)?, &mut kept)?;
/// assert_eq!(kept, [2, 4]);
/// # Ok::<(), thinkey_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Calibration<'a> {
    /// `[heads][D]`, each head falling.
    sums: &'a mut [f32],
    head_dim: usize,
    windows: usize,
}

#[cfg(feature = "defmt")]
impl defmt::Format for Calibration<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "Calibration {{ heads: {=usize}, windows: {=usize} }}", self.heads(), self.windows);
    }
}

impl<'a> Calibration<'a> {
    /// An empty average in `memory`, `[heads][D]` over all layers.
    ///
    /// # Errors
    /// [`Error::HeadDim`]; [`Error::Length`] where `memory` is no whole number of heads.
    pub fn new(memory: &'a mut [f32], head_dim: usize) -> Result<Self, Error> {
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { head_dim });
        }
        check_len("calibration", memory.len().next_multiple_of(head_dim), memory.len())?;
        memory.fill(0.0);
        Ok(Self { sums: memory, head_dim, windows: 0 })
    }

    /// Heads, over all layers.
    #[must_use]
    pub const fn heads(&self) -> usize {
        self.sums.len() / self.head_dim
    }

    /// Windows averaged so far.
    #[must_use]
    pub const fn windows(&self) -> usize {
        self.windows
    }

    /// The mean of the sorted, normalised scores, `[heads][D]`, falling within a head.
    pub fn profile(&self) -> impl Iterator<Item = f32> + '_ {
        let scale = 1.0 / self.windows.max(1) as f32;
        self.sums.iter().map(move |&x| x * scale)
    }

    /// Adds the budget scores of a window of text, `[heads][D]`. What was averaged before is unchanged where it fails.
    ///
    /// # Errors
    /// [`Error::Length`] for another length, [`Error::NotANumber`] with the channel for a score that is no finite number
    /// ≥ 0 or where all are 0.
    pub fn add(&mut self, scores: &[f32]) -> Result<(), Error> {
        check_len("budget scores", self.sums.len(), scores.len())?;
        let d = self.head_dim;
        if let Some(at) = scores.iter().position(|&x| !(x >= 0.0 && x.is_finite())) {
            return Err(Error::NotANumber { channel: at % d });
        }
        let total: f64 = scores.iter().map(|&x| f64::from(x)).sum();
        if total == 0.0 {
            return Err(Error::NotANumber { channel: 0 });
        }
        let mut sorted = [0.0f32; MAX_HEAD_DIM];
        let sorted = &mut sorted[..d];
        for (sums, head) in self.sums.chunks_exact_mut(d).zip(scores.chunks_exact(d)) {
            sorted.copy_from_slice(head);
            sorted.sort_unstable_by(|a, b| b.total_cmp(a));
            for (sum, &x) in sums.iter_mut().zip(&*sorted) {
                *sum += (f64::from(x) / total) as f32;
            }
        }
        self.windows += 1;
        Ok(())
    }

    /// Writes T of each head, as [`distribute`] does from the average.
    ///
    /// # Errors
    /// As [`distribute`]; [`Error::Length`] where no window was added or the grid has another D.
    pub fn table(&self, grid: Grid, lambda: Lambda, kept: &mut [u16]) -> Result<(), Error> {
        if self.windows == 0 {
            return Err(Error::Length { what: "windows that calibrate", expected: 1, actual: 0 });
        }
        check_len("calibrated channels", self.head_dim, grid.head_dim)?;
        distribute(self.sums, grid, lambda, kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    fn lambda(per_mille: u16) -> Lambda {
        Lambda::from_per_mille(per_mille).unwrap()
    }

    /// Brute force: every head its `minimum` best, then one at a time the largest that is left anywhere, lower heads
    /// first.
    fn one_by_one(scores: &[f32], d: usize, minimum: usize, budget: usize) -> Vec<u16> {
        let sorted: Vec<Vec<f32>> = scores
            .chunks(d)
            .map(|head| {
                let mut head = head.to_vec();
                head.sort_by(|a, b| b.partial_cmp(a).unwrap());
                head
            })
            .collect();
        let mut kept = vec![minimum; sorted.len()];
        for _ in minimum * sorted.len()..budget {
            let (mut best, mut score) = (None, f32::NEG_INFINITY);
            for (head, &kept) in kept.iter().enumerate().filter(|&(_, &kept)| kept < d) {
                if best.is_none() || sorted[head][kept] > score {
                    (best, score) = (Some(head), sorted[head][kept]);
                }
            }
            kept[best.unwrap()] += 1;
        }
        kept.into_iter().map(|kept| kept as u16).collect()
    }

    fn heads() -> impl Strategy<Value = (usize, usize, Vec<f32>)> {
        (1usize..24, 1usize..12).prop_flat_map(|(d, heads)| {
            // Few values: many ties.
            let score = prop_oneof![(0u8..6).prop_map(f32::from), 0.0f32..1e9, 0.0f32..1e-30];
            (Just(d), Just(heads), prop::collection::vec(score, d * heads))
        })
    }

    proptest! {
        #[test]
        fn equals_giving_them_out_one_by_one((d, heads, scores) in heads(), per_mille in 0u16..1000, minimum in 1usize..24) {
            let budget = lambda(per_mille).kept(d);
            prop_assume!(minimum <= budget);
            let grid = Grid { head_dim: d, minimum, multiple: 1 };
            let mut kept = vec![0; heads];
            distribute(&scores, grid, lambda(per_mille), &mut kept).unwrap();
            prop_assert_eq!(kept.iter().map(|&t| t as usize).sum::<usize>(), heads * budget);
            prop_assert_eq!(kept, one_by_one(&scores, d, minimum, heads * budget));
        }

        #[test]
        fn multiples_stay_within_the_budget((d, heads, scores) in heads(), per_mille in 0u16..1000, multiple in 1usize..9) {
            let grid = Grid { head_dim: d, minimum: 1, multiple };
            let mut kept = vec![0; heads];
            match distribute(&scores, grid, lambda(per_mille), &mut kept) {
                Ok(()) => {
                    let total: usize = kept.iter().map(|&t| t as usize).sum();
                    prop_assert!(total <= heads * lambda(per_mille).kept(d));
                    for &kept in &kept {
                        let kept = kept as usize;
                        prop_assert!(kept >= 1 && (kept.is_multiple_of(multiple) || kept == d), "{}", kept);
                    }
                }
                Err(Error::Kept { .. }) => prop_assert!(multiple > d),
                Err(Error::Capacity { needed, capacity, .. }) => {
                    prop_assert_eq!((needed, capacity), (heads * multiple, heads * lambda(per_mille).kept(d)));
                    prop_assert!(needed > capacity);
                }
                Err(error) => prop_assert!(false, "{}", error),
            }
        }

        /// The order of channels within a head says nothing; nor does the scale of a window.
        #[test]
        fn one_window_calibrates_to_its_own_table((d, heads, scores) in heads(), per_mille in 0u16..900) {
            prop_assume!(scores.iter().any(|&x| x > 0.0));
            let distinct: Vec<f32> = scores.iter().enumerate().map(|(i, &x)| x + i as f32 * 1e-3).collect();
            let grid = Grid { head_dim: d, minimum: 1, multiple: 1 };
            let (mut memory, mut table, mut own) = (vec![1.0; d * heads], vec![0; heads], vec![0; heads]);
            let mut calibration = Calibration::new(&mut memory, d).unwrap();
            calibration.add(&distinct).unwrap();
            let sum: f32 = calibration.profile().sum();
            prop_assert!((sum - 1.0).abs() < 1e-4);
            calibration.table(grid, lambda(per_mille), &mut table).unwrap();
            let normalised: Vec<f32> = distinct.iter()
                .map(|&x| (f64::from(x) / distinct.iter().map(|&x| f64::from(x)).sum::<f64>()) as f32).collect();
            distribute(&normalised, grid, lambda(per_mille), &mut own).unwrap();
            prop_assert_eq!(table, own);
        }
    }

    #[test]
    fn windows_are_averaged_sorted_and_normalised() {
        let mut memory = [7.0; 4];
        let mut calibration = Calibration::new(&mut memory, 2).unwrap();
        calibration.add(&[1.0, 3.0, 2.0, 2.0]).unwrap();
        calibration.add(&[80.0, 0.0, 0.0, 0.0]).unwrap();
        let profile: Vec<f32> = calibration.profile().collect();
        assert_eq!(profile, [(0.375 + 1.0) / 2.0, 0.125 / 2.0, 0.25 / 2.0, 0.25 / 2.0]);
        assert_eq!((calibration.windows(), calibration.heads()), (2, 2));
    }

    #[test]
    fn bad_input_is_refused() {
        let grid = Grid { head_dim: 4, minimum: 3, multiple: 1 };
        let call = |scores: &[f32], grid| distribute(scores, grid, lambda(500), &mut [0; 2]);
        assert_eq!(
            call(&[0.0; 8], grid),
            Err(Error::Capacity { what: "channels over all heads", needed: 6, capacity: 4 })
        );
        assert!(call(&[0.0; 7], grid).is_err());
        assert!(call(&[0.0; 8], Grid { minimum: 5, ..grid }).is_err());
        assert!(call(&[0.0; 8], Grid { multiple: 0, ..grid }).is_err());
        let nan = [0.0, 0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0, 0.0];
        assert_eq!(call(&nan, Grid { minimum: 1, ..grid }), Err(Error::NotANumber { channel: 1 }));
        let mut memory = [0.0; 4];
        let mut calibration = Calibration::new(&mut memory, 4).unwrap();
        assert!(calibration.table(grid, lambda(0), &mut [0]).is_err());
        assert!(calibration.add(&[0.0; 4]).is_err() && calibration.add(&[-1.0, 1.0, 1.0, 1.0]).is_err());
        assert!(calibration.add(&[f32::INFINITY; 4]).is_err() && calibration.windows() == 0);
        assert!(Calibration::new(&mut [0.0; 5], 4).is_err());
    }
}
