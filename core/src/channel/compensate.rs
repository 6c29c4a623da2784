//! The compensated mode: what the pruned channels would have added to a logit is guessed from the kept ones.
//!
//! The cache is that of plain pruning; only the query changes. With the mean m and covariance C of a head's keys, the
//! best linear guess of a key k from its kept channels S is m + Cᵀ_S C_SS⁻¹ (k_S − m_S) (the conditional mean of
//! regression), so that
//!
//! ```text
//! q·k ≈ k_S·(R q) + (q·m − m_S·(R q)),   R = C_SS⁻¹ C_S   [T×D]
//! ```
//!
//! KL divergence from the exact output is about half the variance, under the attention itself, of the logit error: so
//! the keys are [weighed](weigh) by the attention that the last queries pay them, mixed with uniform weights. The
//! newest tokens and the first few, the sinks, are stored whole and have no weight.
//!
//! In order: [`group_mass`](crate::mass::group_mass) → [`weigh`] → [`moments`] → [`budget_scores`], which
//! [`adaptive`](super::adaptive) turns into T → the T best of the ordinary score → [`Correction::solve`].

use crate::{BLOCK, ChannelMask, Error, MAX_HEAD_DIM, error::check_len, mass::TokenRows, storage::Element};

/// First tokens that are stored whole and have no weight.
pub const SINKS: usize = 4;

/// What is added to the diagonal of C, as a share of its mean.
pub const RIDGE: f32 = 1e-5;

/// Whether `tokens` keys of `head_dim` channels tell how channels go together: fewer would be fitted, and not described.
#[must_use]
pub const fn tells(tokens: usize, head_dim: usize) -> bool {
    tokens >= 2 * head_dim
}

/// Turns the attention mass of the prefix tokens (the first entries of what
/// [`group_mass`](crate::mass::group_mass) writes) into weights that sum to 1, in place: the first `sinks` get none, the
/// others half of it by mass and half uniformly. Returns M, the mass of all prefix tokens, sinks included, before.
///
/// # Errors
/// [`Error::Length`] where there is no token beside the sinks, [`Error::TokenScore`] for a mass that is no finite number
/// ≥ 0.
pub fn weigh(mass: &mut [f32], sinks: usize) -> Result<f32, Error> {
    if mass.len() <= sinks {
        return Err(Error::Length { what: "prefix beyond the sinks", expected: sinks + 1, actual: mass.len() });
    }
    if let Some(token) = mass.iter().position(|&x| !(x >= 0.0 && x.is_finite())) {
        return Err(Error::TokenScore { token });
    }
    let total: f64 = mass.iter().map(|&x| f64::from(x)).sum();
    let (none, weights) = mass.split_at_mut(sinks);
    none.fill(0.0);
    let sum: f64 = weights.iter().map(|&x| f64::from(x)).sum();
    let uniform = 1.0 / weights.len() as f64;
    // Where all attention goes to sinks, nothing tells the other tokens apart.
    let (by_mass, by_count) = if sum > 0.0 { (0.5 / sum, 0.5 * uniform) } else { (0.0, uniform) };
    for weight in weights {
        *weight = (f64::from(*weight) * by_mass + by_count) as f32;
    }
    Ok(total as f32)
}

/// Floats of scratch memory that [`moments`] takes.
#[must_use]
pub const fn moments_scratch(head_dim: usize) -> usize {
    BLOCK * head_dim
}

/// The weighted mean of `keys`, m = Σ w k (length D), and covariance, C = Σ w (k−m)(k−m)ᵀ + 1e-5·(tr C / D)·I (`[D][D]`,
/// symmetric). `weights` has one entry a token and sums to 1.
///
/// Tokens are summed in runs of 32 first, so that the rounding error does not grow with their number. O(S·D²/2).
///
/// # Errors
/// [`Error::Length`] where slices do not fit, [`Error::Capacity`] with the scratch floats needed.
pub fn moments(
    keys: &TokenRows<'_>,
    weights: &[f32],
    scratch: &mut [f32],
    mean: &mut [f32],
    covariance: &mut [f32],
) -> Result<(), Error> {
    let d = keys.head_dim();
    check_len("weights", keys.tokens(), weights.len())?;
    check_len("mean key", d, mean.len())?;
    check_len("covariance", d * d, covariance.len())?;
    let centred = take("covariance scratch", scratch, moments_scratch(d))?;

    let mut sums = [0.0f64; MAX_HEAD_DIM];
    for (row, &weight) in keys.rows().zip(weights) {
        for (sum, &x) in sums.iter_mut().zip(row) {
            *sum += f64::from(weight) * f64::from(x);
        }
    }
    for (mean, &sum) in mean.iter_mut().zip(&sums) {
        *mean = sum as f32;
    }

    covariance.fill(0.0);
    let mut rows = keys.rows();
    for weights in weights.chunks(BLOCK) {
        for (centred, row) in centred.chunks_exact_mut(d).zip(rows.by_ref().take(weights.len())) {
            for (centred, (&x, &mean)) in centred.iter_mut().zip(row.iter().zip(&*mean)) {
                *centred = x - mean;
            }
        }
        for (i, line) in covariance.chunks_exact_mut(d).enumerate() {
            // The upper triangle, from a multiple of eight on: whole vectors.
            let start = i / 8 * 8;
            let mut partial = [0.0f32; MAX_HEAD_DIM];
            let partial = &mut partial[start..d];
            for (row, &weight) in centred.chunks_exact(d).zip(weights) {
                let factor = weight * row[i];
                for (sum, &x) in partial.iter_mut().zip(&row[start..]) {
                    *sum += factor * x;
                }
            }
            for (sum, &part) in line[start..].iter_mut().zip(&*partial) {
                *sum += part;
            }
        }
    }
    complete(covariance, d);
    Ok(())
}

/// Completes the sum Σ w (k−m)(k−m)ᵀ of which `covariance`, `[D][D]`, has the upper triangle: the lower one, and the ridge
/// on the diagonal. For those who sum in another order than [`moments`].
///
/// # Panics
/// Where the slice is shorter than that.
pub fn complete(covariance: &mut [f32], d: usize) {
    // A head whose keys are all the same has C = 0; any ridge then gives the right correction, none.
    let ridge = (RIDGE * trace(covariance, d) / d as f32).max(f32::MIN_POSITIVE);
    for i in 0..d {
        for j in 0..i {
            covariance[i * d + j] = covariance[j * d + i];
        }
        covariance[i * d + i] += ridge;
    }
}

fn trace(matrix: &[f32], d: usize) -> f32 {
    matrix.iter().step_by(d + 1).map(|&x| f64::from(x)).sum::<f64>() as f32
}

/// Budget scores of a head's channels: score′_j = mean q²_j · C_jj · M, the error that pruning channel j alone would
/// bring. They are comparable between heads and layers.
///
/// `query_energy` sums the squares of `queries` queries, as for the ordinary score
/// ([`add_energy`](super::score::add_energy)); `mass` is M, from [`weigh`].
///
/// # Errors
/// [`Error::Length`] where slices do not fit or there is no query.
pub fn budget_scores(
    query_energy: &[f32],
    queries: usize,
    covariance: &[f32],
    mass: f32,
    scores: &mut [f32],
) -> Result<(), Error> {
    let d = query_energy.len();
    check_len("covariance", d * d, covariance.len())?;
    check_len("scores", d, scores.len())?;
    if queries == 0 {
        return Err(Error::Length { what: "rows that score", expected: 1, actual: 0 });
    }
    for ((score, &energy), &variance) in scores.iter_mut().zip(query_energy).zip(covariance.iter().step_by(d + 1)) {
        *score = energy / queries as f32 * variance * mass;
    }
    Ok(())
}

/// How a head's queries are corrected for the channels that are not kept.
///
/// On the kept channels R is the identity, so only its other D−T columns are held, each followed by its entry of
/// b = m − Rᵀm_S (0 on kept channels): (D−T)·(T+1) numbers of type `E`. The corrected query and what is added to every
/// logit are one product of the query's pruned channels with them.
#[derive(Clone, Copy, Debug)]
pub struct Correction<'a, E = f32> {
    mask: ChannelMask,
    /// `[D−T][T+1]`: by pruned channel its column of R, then its b.
    columns: &'a [E],
}

#[cfg(feature = "defmt")]
impl<E> defmt::Format for Correction<'_, E> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "Correction {{ mask: {} }}", self.mask);
    }
}

impl Correction<'_> {
    /// Numbers that the correction of a head takes.
    #[must_use]
    pub const fn len(head_dim: usize, kept: usize) -> usize {
        (head_dim - kept) * (kept + 1)
    }

    /// Floats of scratch memory that [`solve`](Self::solve) takes: a triangle of T×T, and a column.
    #[must_use]
    pub const fn scratch_len(kept: usize) -> usize {
        kept * (kept + 1) / 2 + kept
    }
}

impl<'a, E: Element> Correction<'a, E> {
    /// The correction for the channels of `mask`, from what [`moments`] wrote, in the first [`len`](Self::len) numbers of
    /// `memory`.
    ///
    /// By Cholesky's decomposition of C_SS, held in `f32` with sums in `f64`: O(T³/6 + T²·(D−T)).
    ///
    /// # Errors
    /// [`Error::Length`] where slices do not fit, [`Error::Capacity`] with the numbers needed,
    /// [`Error::NotANumber`] where the covariance is none.
    pub fn solve(
        mean: &[f32],
        covariance: &[f32],
        mask: &ChannelMask,
        scratch: &mut [f32],
        memory: &'a mut [E],
    ) -> Result<Self, Error> {
        let (d, kept) = (mask.head_dim(), mask.kept());
        check_len("mean key", d, mean.len())?;
        check_len("covariance", d * d, covariance.len())?;
        let scratch = take("Cholesky scratch", scratch, Correction::scratch_len(kept))?;
        let (triangle, column) = scratch.split_at_mut(kept * (kept + 1) / 2);
        let memory = take("correction", memory, Correction::len(d, kept))?;

        // With the ridge in it, no eigenvalue of C is below the ridge: what is, is rounding.
        let floor = f64::from(trace(covariance, d)) / d as f64 * f64::from(RIDGE) * 0.5;
        decompose(covariance, mask, floor, triangle)?;
        for (channel, stored) in pruned(mask).zip(memory.chunks_exact_mut(kept + 1)) {
            mask.gather(&covariance[channel * d..][..d], column);
            substitute(triangle, column);
            let guessed: f64 =
                mask.channels().zip(&*column).map(|(kept, &r)| f64::from(mean[kept]) * f64::from(r)).sum();
            let bias = (f64::from(mean[channel]) - guessed) as f32;
            if !bias.is_finite() {
                return Err(Error::NotANumber { channel });
            }
            for (stored, &x) in stored.iter_mut().zip(column.iter().chain([&bias])) {
                *stored = E::store(x);
            }
        }
        Ok(Self { mask: *mask, columns: memory })
    }

    /// The correction that guesses every pruned channel to be at its mean, whatever the others are: what there is to do
    /// where too few keys are known to tell more. Memory as for [`solve`](Self::solve).
    ///
    /// # Errors
    /// [`Error::Length`] where slices do not fit, [`Error::Capacity`] with the numbers needed.
    pub fn means(mean: &[f32], mask: &ChannelMask, memory: &'a mut [E]) -> Result<Self, Error> {
        let (d, kept) = (mask.head_dim(), mask.kept());
        check_len("mean key", d, mean.len())?;
        let memory = take("correction", memory, Correction::len(d, kept))?;
        for (channel, stored) in pruned(mask).zip(memory.chunks_exact_mut(kept + 1)) {
            stored.fill(E::store(0.0));
            stored[kept] = E::store(mean[channel]);
        }
        Ok(Self { mask: *mask, columns: memory })
    }

    /// The correction that an earlier [`solve`](Self::solve) for the same mask left in `memory`.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the numbers needed.
    pub fn resume(mask: &ChannelMask, memory: &'a [E]) -> Result<Self, Error> {
        let (needed, capacity) = (Correction::len(mask.head_dim(), mask.kept()), memory.len());
        let columns = memory.get(..needed).ok_or(Error::Capacity { what: "correction", needed, capacity })?;
        Ok(Self { mask: *mask, columns })
    }

    /// The channels that the corrected query is for.
    #[must_use]
    pub const fn mask(&self) -> &ChannelMask {
        &self.mask
    }

    /// By pruned channel, ascending, its column of R (length T) and its b.
    pub fn columns(&self) -> impl ExactSizeIterator<Item = (&'a [E], E)> + use<'a, E> {
        let kept = self.mask.kept();
        self.columns.chunks_exact(kept + 1).map(move |column| (&column[..kept], column[kept]))
    }

    /// Writes the corrected query R q (length T) for `query` (length D, scaled or not) and returns what is added to the
    /// logit of every thin token, q·m − m_S·(R q) = q·b.
    ///
    /// # Errors
    /// [`Error::Length`] where slices do not fit.
    pub fn correct(&self, query: &[f32], thin: &mut [f32]) -> Result<f32, Error> {
        check_len("query", self.mask.head_dim(), query.len())?;
        check_len("corrected query", self.mask.kept(), thin.len())?;
        self.mask.gather(query, thin);
        let mut added = 0.0;
        for (channel, (column, bias)) in pruned(&self.mask).zip(self.columns()) {
            let q = query[channel];
            added += q * bias.load();
            for (thin, &r) in thin.iter_mut().zip(column) {
                *thin += q * r.load();
            }
        }
        Ok(added)
    }
}

/// The channels that `mask` does not keep, ascending.
pub(crate) fn pruned(mask: &ChannelMask) -> impl Iterator<Item = usize> + use<> {
    let mask = *mask;
    (0..mask.head_dim()).filter(move |&channel| !mask.contains(channel))
}

/// The first `needed` numbers of `memory`.
pub(crate) fn take<'a, E>(what: &'static str, memory: &'a mut [E], needed: usize) -> Result<&'a mut [E], Error> {
    let capacity = memory.len();
    memory.get_mut(..needed).ok_or(Error::Capacity { what, needed, capacity })
}

/// Cholesky's lower triangle L of C_SS = L Lᵀ, rows packed: row i starts at i(i+1)/2. Pivots below `floor` are raised
/// to it.
fn decompose(covariance: &[f32], mask: &ChannelMask, floor: f64, triangle: &mut [f32]) -> Result<(), Error> {
    let d = mask.head_dim();
    for (i, channel) in mask.channels().enumerate() {
        let line = &covariance[channel * d..][..d];
        let (before, rest) = triangle.split_at_mut(i * (i + 1) / 2);
        let row = &mut rest[..=i];
        for (j, other) in mask.channels().take(i).enumerate() {
            let start = j * (j + 1) / 2;
            let pivot = f64::from(before[start + j]);
            row[j] = ((f64::from(line[other]) - dot64(&row[..j], &before[start..start + j])) / pivot) as f32;
        }
        let square = f64::from(line[channel]) - dot64(&row[..i], &row[..i]);
        if !square.is_finite() {
            return Err(Error::NotANumber { channel });
        }
        row[i] = libm::sqrt(square.max(floor)) as f32;
    }
    Ok(())
}

/// Solves L Lᵀ x = b in place.
fn substitute(triangle: &[f32], b: &mut [f32]) {
    let mut work = [0.0f64; MAX_HEAD_DIM];
    let work = &mut work[..b.len()];
    for (i, &b) in b.iter().enumerate() {
        let row = &triangle[i * (i + 1) / 2..][..=i];
        let known: f64 = row[..i].iter().zip(&*work).map(|(&l, &y)| f64::from(l) * y).sum();
        work[i] = (f64::from(b) - known) / f64::from(row[i]);
    }
    for i in (0..b.len()).rev() {
        let row = &triangle[i * (i + 1) / 2..][..=i];
        let x = work[i] / f64::from(row[i]);
        b[i] = x as f32;
        for (y, &l) in work[..i].iter_mut().zip(row) {
            *y -= f64::from(l) * x;
        }
    }
}

fn dot64(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 4];
    let (a4, a_rest) = a.as_chunks::<4>();
    let (b4, b_rest) = b.as_chunks::<4>();
    for (a, b) in a4.iter().zip(b4) {
        for (lane, (&x, &y)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f64::from(x) * f64::from(y);
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mass::tests::numbers;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// Keys whose channels depend on each other, and weights that sum to 1.
    fn sample(seed: u64, tokens: usize, d: usize) -> (Vec<f32>, Vec<f32>) {
        let mut keys = numbers(seed, tokens * d);
        for row in keys.chunks_mut(d) {
            (1..d).for_each(|c| row[c] = 0.3 * row[c] + 0.7 * row[c - 1] + c as f32 * 0.1);
        }
        let mut weights: Vec<f32> = numbers(!seed, tokens).iter().map(|x| x.abs() + 0.01).collect();
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
        (keys, weights)
    }

    struct Moments {
        mean: Vec<f32>,
        covariance: Vec<f32>,
    }

    fn moments_of(keys: &[f32], weights: &[f32], d: usize) -> Moments {
        let rows = TokenRows::new(keys, weights.len(), d, d).unwrap();
        let (mut mean, mut covariance) = (vec![0.0; d], vec![f32::NAN; d * d]);
        moments(&rows, weights, &mut vec![f32::NAN; moments_scratch(d)], &mut mean, &mut covariance).unwrap();
        Moments { mean, covariance }
    }

    #[test]
    fn weights_are_half_mass_half_uniform_without_sinks() {
        let mut mass = [0.2, 0.1, 0.05, 0.05, 0.3, 0.0, 0.1];
        let total = weigh(&mut mass, SINKS).unwrap();
        assert!((total - 0.8).abs() < 1e-6);
        for (ours, expected) in mass.iter().zip([0.0, 0.0, 0.0, 0.0, 0.375 + 1.0 / 6.0, 1.0 / 6.0, 0.125 + 1.0 / 6.0]) {
            assert!((ours - expected).abs() < 1e-6, "{mass:?}");
        }
        let mut mass = [1.0, 0.0, 0.0];
        weigh(&mut mass, 1).unwrap();
        assert_eq!(mass, [0.0, 0.5, 0.5], "all attention goes to the sink");
        assert!(weigh(&mut [1.0; 4], 4).is_err());
        assert_eq!(weigh(&mut [1.0, f32::NAN], 0), Err(Error::TokenScore { token: 1 }));
        assert_eq!(weigh(&mut [-1.0, 2.0], 0), Err(Error::TokenScore { token: 0 }));
    }

    proptest! {
        #[test]
        fn moments_equal_those_in_f64((tokens, d, seed) in (1usize..100, 1usize..40, any::<u64>())) {
            let (keys, weights) = sample(seed, tokens, d);
            let ours = moments_of(&keys, &weights, d);
            let at = |t: usize, c: usize| f64::from(keys[t * d + c]);
            let mean = |c: usize| (0..tokens).map(|t| f64::from(weights[t]) * at(t, c)).sum::<f64>();
            let covariance = |i: usize, j: usize| {
                let (a, b) = (mean(i), mean(j));
                (0..tokens).map(|t| f64::from(weights[t]) * (at(t, i) - a) * (at(t, j) - b)).sum::<f64>()
            };
            let ridge = 1e-5 * (0..d).map(|c| covariance(c, c)).sum::<f64>() / d as f64;
            for i in 0..d {
                prop_assert!((f64::from(ours.mean[i]) - mean(i)).abs() < 1e-5);
                for j in 0..d {
                    let expected = covariance(i, j) + if i == j { ridge } else { 0.0 };
                    prop_assert!((f64::from(ours.covariance[i * d + j]) - expected).abs() < 1e-5, "{i} {j}");
                }
            }
        }

        /// The corrected logit is q·(m + C_·S C_SS⁻¹ (k_S − m_S)): what is left of a pruned channel is uncorrelated
        /// with every kept one.
        #[test]
        fn what_is_left_is_uncorrelated(
            (d, seed, kept) in (1usize..40).prop_flat_map(|d| (Just(d), any::<u64>(), 1..=d)),
        ) {
            let tokens = 150;
            let (keys, weights) = sample(seed, tokens, d);
            let Moments { mean, covariance } = moments_of(&keys, &weights, d);
            let order = numbers(seed ^ 5, d);
            let mask = super::super::select::select(&order, kept).unwrap();
            let mut scratch = vec![f32::NAN; Correction::scratch_len(kept)];
            let mut memory = vec![f32::NAN; Correction::len(d, kept)];
            let ours = Correction::solve(&mean, &covariance, &mask, &mut scratch, &mut memory).unwrap();
            let channels: Vec<usize> = mask.channels().collect();
            let pruned: Vec<usize> = (0..d).filter(|&c| !mask.contains(c)).collect();
            let scale = f64::from(trace(&covariance, d)) / d as f64;
            for (&channel, (column, _)) in pruned.iter().zip(ours.columns()) {
                for &line in &channels {
                    let guessed: f64 = channels.iter().zip(column)
                        .map(|(&c, &r)| f64::from(covariance[line * d + c]) * f64::from(r)).sum();
                    let left = f64::from(covariance[line * d + channel]) - guessed;
                    prop_assert!(left.abs() < 1e-4 * scale, "{channel} {line}: {left}");
                }
            }
            let query = numbers(seed ^ 9, d);
            let mut thin = vec![0.0; kept];
            let added = f64::from(ours.correct(&query, &mut thin).unwrap());
            let qm: f64 = query.iter().zip(&mean).map(|(&q, &m)| f64::from(q) * f64::from(m)).sum();
            let known: f64 = channels.iter().zip(&thin).map(|(&c, &q)| f64::from(q) * f64::from(mean[c])).sum();
            prop_assert!((added - (qm - known)).abs() < 1e-3, "{added} {}", qm - known);
        }
    }

    #[test]
    fn budget_scores_are_the_product() {
        let mut scores = [0.0; 2];
        budget_scores(&[8.0, 2.0], 4, &[3.0, 9.0, 9.0, 5.0], 0.5, &mut scores).unwrap();
        assert_eq!(scores, [2.0 * 3.0 * 0.5, 0.5 * 5.0 * 0.5]);
        assert!(budget_scores(&[1.0], 0, &[1.0], 1.0, &mut [0.0]).is_err());
    }

    #[test]
    fn keys_that_are_all_the_same_need_no_correction_but_their_mean() {
        let keys = [1.0, 2.0, 3.0].repeat(5);
        let Moments { mean, covariance } = moments_of(&keys, &[0.2; 5], 3);
        let mask = ChannelMask::from_channels(3, [1]).unwrap();
        let (mut scratch, mut memory) = ([0.0; 2], [0.0; 4]);
        let ours = Correction::solve(&mean, &covariance, &mask, &mut scratch, &mut memory).unwrap();
        let mut thin = [0.0];
        let added = ours.correct(&[10.0, 20.0, 30.0], &mut thin).unwrap();
        assert!((thin[0] * 2.0 + added - 140.0).abs() < 1e-3, "{thin:?} {added}");
        let columns: Vec<_> = ours.columns().map(|(column, bias)| (column.to_vec(), bias)).collect();
        let again = Correction::resume(&mask, &memory).unwrap();
        assert!(again.columns().map(|(column, bias)| (column.to_vec(), bias)).eq(columns));
    }

    #[test]
    fn what_is_no_number_or_does_not_fit_is_refused() {
        let mask = ChannelMask::from_channels(2, [1]).unwrap();
        let solve = |covariance: &[f32], scratch: usize, memory: usize| {
            let (mut scratch, mut memory) = (vec![0.0; scratch], vec![0.0; memory]);
            Correction::<f32>::solve(&[0.0; 2], covariance, &mask, &mut scratch, &mut memory).map(|_| ())
        };
        assert_eq!(solve(&[1.0, 0.0, 0.0, 1.0], 2, 2), Ok(()));
        assert!(matches!(solve(&[1.0, 0.0, 0.0, 1.0], 1, 2), Err(Error::Capacity { needed: 2, .. })));
        assert!(matches!(solve(&[1.0, 0.0, 0.0, 1.0], 2, 1), Err(Error::Capacity { needed: 2, .. })));
        assert_eq!(solve(&[1.0, 0.0, 0.0, f32::NAN], 2, 2), Err(Error::NotANumber { channel: 1 }));
        assert!(matches!(solve(&[1.0, f32::NAN, f32::NAN, 1.0], 2, 2), Err(Error::NotANumber { .. })));
    }
}
