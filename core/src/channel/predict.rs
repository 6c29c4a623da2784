//! Predictive coding of keys: channels are stored one after the other, each as what those before it do not tell.
//!
//! Regression on kept channels, as [`compensate`](super::compensate) has it, can be written step by step. With the channels
//! j₁, j₂, … in the order in which they are [chosen](super::residual), and C′ the covariance that those before leave,
//!
//! ```text
//! aᵢ = C′_·jᵢ / C′_jᵢjᵢ,   e ← k − m;   for each i: yᵢ = e_jᵢ, e ← e − ŷᵢ aᵢ;   k ≈ m + Σ ŷᵢ aᵢ
//! ```
//!
//! where ŷᵢ is what is stored of yᵢ. The loop is closed, as in differential pulse-code modulation (Cutler, US patent 2,605,361,
//! 1952): what rounding took from a channel is part of what later ones store, and of what is guessed of the pruned. A logit is
//! q·k ≈ q·m + Σ ŷᵢ (q·aᵢ), so that a query is multiplied once by the D×(T+1) numbers of all aᵢ and m, as by those of a
//! [projection](super::lowrank), and the thin prefix is read as any other.
//!
//! Channels that come late tell little that is new, and can have fewer bits: all but the first [quarter](crate::quant::mixed).
//! Measured on SmolLM2-135M (WikiText-2 validation, 16 windows of 2,048 + 256 tokens, values in trellis2, one run): with a share
//! λ = 0.6 of the channels pruned the cache takes 12.1% of f16 at 8,000 tokens and diverges by 0.0566 nats from it, with λ = 0.5
//! 13.0% and 0.0394, where regression on whole codes of four bits takes 14.5% and diverges by 0.0383, at λ = 0.6. Two bits for all
//! channels, evenly apart, did not do: 0.096 at λ = 0.4. aᵢ is from whole keys, so that it does not learn rounding.

use super::compensate::take;
use crate::{ChannelMask, Error, MAX_HEAD_DIM, error::check_len, storage::Element};

/// By what the keys of a head are predicted.
#[derive(Clone, Copy, Debug)]
pub struct Prediction<'a, E = f32> {
    kept: usize,
    /// `[D][T+1]`: by channel what each of those stored tells of it, then its m.
    columns: &'a [E],
    /// The channels in the order in which they are stored, as numbers.
    order: &'a [E],
}

#[cfg(feature = "defmt")]
impl<E> defmt::Format for Prediction<'_, E> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "Prediction {{ columns: {=usize}, kept: {=usize} }}", self.columns.len(), self.kept);
    }
}

impl Prediction<'_> {
    /// Numbers that the prediction of a head takes: `[D][T+1]`, then T.
    #[must_use]
    pub const fn len(head_dim: usize, kept: usize) -> usize {
        head_dim * (kept + 1) + kept
    }

    /// Floats of scratch memory that [`solve`](Prediction::solve) takes.
    #[must_use]
    pub const fn scratch_len(head_dim: usize, kept: usize) -> usize {
        head_dim * kept
    }
}

impl<'a, E: Element> Prediction<'a, E> {
    /// The prediction from the channels of `order`, each by those before it, and the mean and covariance that
    /// [`moments`](super::compensate::moments) wrote, in the first [`len`](Prediction::len) numbers of `memory`.
    ///
    /// It is Cholesky's decomposition of C_SS, columns scaled, and goes on to the other channels: O(T²·D/2).
    ///
    /// # Errors
    /// [`Error::HeadDim`]; [`Error::Kept`] where no channel is listed, or one twice; [`Error::Index`] for a channel that is
    /// none; [`Error::Length`] where slices do not fit, [`Error::Capacity`] with the numbers needed, [`Error::NotANumber`]
    /// where the covariance is none.
    pub fn solve(
        mean: &[f32],
        covariance: &[f32],
        order: &[u16],
        scratch: &mut [f32],
        memory: &'a mut [E],
    ) -> Result<Self, Error> {
        let (d, kept) = (mean.len(), order.len());
        ChannelMask::from_channels(d, order.iter().map(|&channel| channel.into()))?;
        check_len("covariance", d * d, covariance.len())?;
        let factors = take("prediction scratch", scratch, Prediction::scratch_len(d, kept))?;
        // The variance that each channel has left when its turn comes.
        let mut left = [0.0f32; MAX_HEAD_DIM];
        for (step, &channel) in order.iter().enumerate() {
            let channel = usize::from(channel);
            let (before, rest) = factors.split_at_mut(step * d);
            let factor = &mut rest[..d];
            factor.copy_from_slice(&covariance[channel * d..][..d]);
            for (before, &left) in before.chunks_exact(d).zip(&left) {
                let share = left * before[channel];
                factor.iter_mut().zip(before).for_each(|(x, y)| *x -= share * y);
            }
            let own = factor[channel];
            if !own.is_finite() {
                return Err(Error::NotANumber { channel });
            }
            // What is left of a channel's variance below this is rounding: it tells nothing of others.
            if own > covariance[channel * (d + 1)] * 1e-6 {
                left[step] = own;
                factor.iter_mut().for_each(|x| *x /= own);
            } else {
                factor.fill(0.0);
            }
            order[..step].iter().for_each(|&before| factor[usize::from(before)] = 0.0);
            factor[channel] = 1.0;
            if let Some(channel) = factor.iter().position(|x| !x.is_finite()) {
                return Err(Error::NotANumber { channel });
            }
        }
        let order = order.iter().map(|&channel| usize::from(channel));
        let factor = |step: usize, channel: usize| factors[step * d + channel];
        Self::write(mean, (kept, order), factor, memory)
    }

    /// The prediction of the channels of `mask` by nothing but the `mean`: what there is to do where too few keys are known to
    /// tell more. Memory as for [`solve`](Self::solve).
    ///
    /// # Errors
    /// [`Error::Length`] for another mean, [`Error::Capacity`] with the numbers needed.
    pub fn means(mean: &[f32], mask: &ChannelMask, memory: &'a mut [E]) -> Result<Self, Error> {
        check_len("mean key", mask.head_dim(), mean.len())?;
        let mut memory_of_order = [0u16; MAX_HEAD_DIM];
        memory_of_order.iter_mut().zip(mask.channels()).for_each(|(to, channel)| *to = channel as u16);
        let order = &memory_of_order[..mask.kept()];
        let factor = |step: usize, channel: usize| if usize::from(order[step]) == channel { 1.0 } else { 0.0 };
        Self::write(mean, (mask.kept(), mask.channels()), factor, memory)
    }

    fn write(
        mean: &[f32],
        (kept, order): (usize, impl Iterator<Item = usize>),
        factor: impl Fn(usize, usize) -> f32,
        memory: &'a mut [E],
    ) -> Result<Self, Error> {
        let memory = take("prediction", memory, Prediction::len(mean.len(), kept))?;
        let (columns, own_order) = memory.split_at_mut(mean.len() * (kept + 1));
        for ((channel, column), &mean) in columns.chunks_exact_mut(kept + 1).enumerate().zip(mean) {
            let factors = (0..kept).map(|step| factor(step, channel)).chain([mean]);
            column.iter_mut().zip(factors).for_each(|(to, x)| *to = E::store(x));
        }
        own_order.iter_mut().zip(order).for_each(|(to, channel)| *to = E::store(channel as f32));
        Ok(Self { kept, columns, order: own_order })
    }

    /// The prediction that an earlier [`solve`](Self::solve) of the same shape left in `memory`.
    ///
    /// # Errors
    /// [`Error::HeadDim`], [`Error::Kept`], [`Error::Capacity`] with the numbers needed; [`Error::Index`] where the memory is
    /// damaged.
    pub fn resume(head_dim: usize, kept: usize, memory: &'a [E]) -> Result<Self, Error> {
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { head_dim });
        }
        if kept == 0 || kept > head_dim {
            return Err(Error::Kept { kept, head_dim });
        }
        let (needed, capacity) = (Prediction::len(head_dim, kept), memory.len());
        let memory = memory.get(..needed).ok_or(Error::Capacity { what: "prediction", needed, capacity })?;
        let (columns, order) = memory.split_at(head_dim * (kept + 1));
        let found = Self { kept, columns, order };
        match found.channels().find(|&channel| channel >= head_dim) {
            Some(index) => Err(Error::Index { what: "channel", index, limit: head_dim }),
            None => Ok(found),
        }
    }

    /// Channels stored, T.
    #[must_use]
    pub const fn kept(&self) -> usize {
        self.kept
    }

    /// The channels, in the order in which they are stored.
    pub fn channels(&self) -> impl ExactSizeIterator<Item = usize> + use<'a, E> {
        self.order.iter().map(|x| x.load() as usize)
    }

    /// What each of the channels stored tells of `channel` (length T), and its mean.
    ///
    /// # Panics
    /// Where there is no such channel.
    #[must_use]
    pub fn column(&self, channel: usize) -> (&'a [E], E) {
        let column = &self.columns[channel * (self.kept + 1)..][..self.kept + 1];
        (&column[..self.kept], column[self.kept])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        channel::compensate::{Correction, moments, moments_scratch},
        mass::{TokenRows, tests::numbers},
    };
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// The key that is told by numbers that are stored one after the other, each rounded to multiples of `step` where that is
    /// not 0: by the definition, in f64.
    fn told(prediction: &Prediction<'_>, key: &[f32], step: f64) -> Vec<f64> {
        let mean = |channel: usize| f64::from(prediction.column(channel).1);
        let mut left: Vec<f64> = key.iter().enumerate().map(|(channel, &x)| f64::from(x) - mean(channel)).collect();
        let mut told: Vec<f64> = (0..key.len()).map(mean).collect();
        for (index, channel) in prediction.channels().enumerate() {
            let number = if step > 0.0 { (left[channel] / step).round() * step } else { left[channel] };
            for other in 0..key.len() {
                let share = f64::from(prediction.column(other).0[index]) * number;
                (left[other], told[other]) = (left[other] - share, told[other] + share);
            }
        }
        told
    }

    proptest! {
        /// Numbers stored whole tell what regression on all of them does, in any order; rounded ones tell the kept channels
        /// within half a step, however far a channel is predicted by others.
        #[test]
        fn tells_what_regression_does(d in 2usize..24, share in 0.0f64..=1.0, step in 0.01f64..0.5, seed in any::<u64>()) {
            let tokens = 4 * d;
            let mut keys = numbers(seed, tokens * d);
            // Channels go together.
            for row in keys.chunks_exact_mut(d) {
                (1..d).for_each(|c| row[c] += row[c - 1] * 0.7);
            }
            let rows = TokenRows::new(&keys, tokens, d, d).unwrap();
            let (weights, mut scratch) = (vec![1.0 / tokens as f32; tokens], vec![0.0; moments_scratch(d)]);
            let (mut mean, mut covariance) = (vec![0.0; d], vec![0.0; d * d]);
            moments(&rows, &weights, &mut scratch, &mut mean, &mut covariance).unwrap();
            let kept = ((d as f64 * share) as usize).max(1);
            let mut order: Vec<u16> = (0..d as u16).collect();
            order.sort_by_key(|&channel| seed.rotate_left(u32::from(channel) * 7) ^ u64::from(channel));
            order.truncate(kept);
            let mut memory = vec![f32::NAN; Prediction::len(d, kept)];
            let mut scratch = vec![f32::NAN; Prediction::scratch_len(d, kept)];
            let prediction = Prediction::solve(&mean, &covariance, &order, &mut scratch, &mut memory).unwrap();
            prop_assert!(prediction.channels().eq(order.iter().map(|&channel| usize::from(channel))));

            let mask = ChannelMask::from_channels(d, prediction.channels()).unwrap();
            let (mut scratch, mut columns) = (vec![0.0; Correction::scratch_len(kept)], vec![0.0; Correction::len(d, kept)]);
            let correction = Correction::solve(&mean, &covariance, &mask, &mut scratch, &mut columns).unwrap();
            let (query, mut thin) = (numbers(seed ^ 5, d), vec![0.0; kept]);
            let added = correction.correct(&query, &mut thin).unwrap();
            for key in keys.chunks_exact(d).take(4) {
                let whole = told(&prediction, key, 0.0);
                let logit: f64 = query.iter().zip(&whole).map(|(&q, k)| f64::from(q) * k).sum();
                let expected: f64 = mask.channels().zip(&thin).map(|(c, &q)| f64::from(q) * f64::from(key[c])).sum();
                prop_assert!((logit - expected - f64::from(added)).abs() < 2e-2 * d as f64, "{logit} {expected}");
                let rounded = told(&prediction, key, step);
                for channel in mask.channels() {
                    prop_assert!((rounded[channel] - f64::from(key[channel])).abs() <= step / 2.0 + 1e-3);
                }
            }
            let again = Prediction::resume(d, kept, &memory).unwrap();
            prop_assert_eq!(again.column(d - 1), (&memory[(d - 1) * (kept + 1)..][..kept], mean[d - 1]));
        }
    }

    #[test]
    fn means_tell_nothing_of_others() {
        let mask = ChannelMask::from_channels(3, [0, 2]).unwrap();
        let mut memory = [0.0; Prediction::len(3, 2)];
        let prediction = Prediction::means(&[5.0, 6.0, 7.0], &mask, &mut memory).unwrap();
        assert!(prediction.channels().eq([0, 2]));
        assert_eq!(prediction.column(0), (&[1.0, 0.0][..], 5.0));
        assert_eq!(prediction.column(1), (&[0.0, 0.0][..], 6.0));
        assert_eq!(prediction.column(2), (&[0.0, 1.0][..], 7.0));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let solve = |covariance: &[f32], order: &[u16], scratch: usize, memory: usize| {
            let (mut scratch, mut memory) = (vec![0.0; scratch], vec![0.0f32; memory]);
            Prediction::solve(&[0.0; 2], covariance, order, &mut scratch, &mut memory).map(|_| ())
        };
        let good = [2.0, 1.0, 1.0, 2.0];
        assert_eq!(solve(&good, &[1, 0], 4, 8), Ok(()));
        for (covariance, order, scratch, memory) in [
            (&good[..3], &[1u16, 0][..], 4, 8),
            (&good, &[2], 4, 8),
            (&good, &[0, 0], 4, 8),
            (&good, &[], 4, 8),
            (&good, &[1, 0], 3, 8),
            (&good, &[1, 0], 4, 7),
            (&[f32::NAN; 4], &[1, 0], 4, 8),
        ] {
            assert!(solve(covariance, order, scratch, memory).is_err(), "{covariance:?} {order:?} {scratch} {memory}");
        }
        assert!(Prediction::resume(2, 3, &[0.0f32; 99]).is_err() && Prediction::resume(2, 1, &[0.0f32; 4]).is_err());
        assert!(Prediction::resume(2, 1, &[9.0f32; 5]).is_err());
    }
}
