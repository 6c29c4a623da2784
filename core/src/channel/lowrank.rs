//! Low-rank keys: instead of T of D channels a token stores T coordinates of its key in the directions in which the
//! keys vary most (principal components, here weighted by attention as in [`compensate`](super::compensate)).
//!
//! With P [T×D] the top eigenvectors of C as rows, the stored key is k′ = P (k − m), and a logit
//! q·k ≈ (P q)·k′ + q·m. Any T channels with any correction are a projection of rank T too, so for the mean square
//! error of *keys* none is better. It costs more: a D×D eigenvalue problem a head and a T×D product for every key
//! stored; and where keys rotate (RoPE), the directions hold for the prompt they were found in.

use super::compensate::take;
use crate::{ChannelMask, Error, MAX_HEAD_DIM, channel::select, error::check_len, storage::Element};

/// Sweeps after which [`eigen`] stops at the latest; about eight are enough for 256 channels.
const MAX_SWEEPS: usize = 30;

/// Eigenvalues and eigenvectors of a symmetric matrix (`[D][D]`) by cyclic Jacobi rotations (Golub & Van Loan, Matrix
/// Computations, section 8.5): `matrix` is left with the eigenvalues on its diagonal, in no order, and row i of
/// `vectors` (`[D][D]`) is the unit eigenvector of the i-th. Returns the sweeps taken, each O(D³).
///
/// # Errors
/// [`Error::HeadDim`], [`Error::Length`] where slices do not fit, [`Error::NotANumber`] where the matrix is none.
pub fn eigen(head_dim: usize, matrix: &mut [f32], vectors: &mut [f32]) -> Result<usize, Error> {
    let d = head_dim;
    if d == 0 || d > MAX_HEAD_DIM {
        return Err(Error::HeadDim { head_dim });
    }
    check_len("symmetric matrix", d * d, matrix.len())?;
    check_len("eigenvectors", d * d, vectors.len())?;
    if let Some(at) = matrix.iter().position(|x| !x.is_finite()) {
        return Err(Error::NotANumber { channel: at / d });
    }
    vectors.fill(0.0);
    vectors.iter_mut().step_by(d + 1).for_each(|x| *x = 1.0);
    // A rotation takes its rows of the whole matrix; what it does to the columns is the same by symmetry.
    let all: f64 = matrix.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    // The square of the share that f32 cannot tell from none.
    let enough = all * 1e-14;
    for sweep in 0..MAX_SWEEPS {
        let off: f64 = (0..d)
            .flat_map(|p| (p + 1..d).map(move |q| p * d + q))
            .map(|at| f64::from(matrix[at]) * f64::from(matrix[at]))
            .sum();
        if 2.0 * off <= enough {
            return Ok(sweep);
        }
        // Rotations of what is far below the average of the rest are left for later sweeps.
        let small = libm::sqrt(enough / (d * d) as f64) as f32 * 0.1;
        for p in 0..d {
            for q in p + 1..d {
                if matrix[p * d + q].abs() > small {
                    rotate(matrix, vectors, d, p, q);
                }
            }
        }
    }
    Ok(MAX_SWEEPS)
}

/// Makes element (p, q) of the matrix zero.
fn rotate(matrix: &mut [f32], vectors: &mut [f32], d: usize, p: usize, q: usize) {
    let (app, aqq, apq) = (f64::from(matrix[p * d + p]), f64::from(matrix[q * d + q]), f64::from(matrix[p * d + q]));
    let theta = (aqq - app) / (2.0 * apq);
    // The smaller root of t² + 2θt − 1 = 0: an angle of at most 45°.
    let t = 1.0 / (theta.abs() + libm::sqrt(theta * theta + 1.0));
    let t = if theta < 0.0 { -t } else { t };
    let c = 1.0 / libm::sqrt(t * t + 1.0);
    let (sine, cosine) = ((t * c) as f32, c as f32);
    turn(matrix, d, p, q, sine, cosine);
    turn(vectors, d, p, q, sine, cosine);
    for k in 0..d {
        matrix[k * d + p] = matrix[p * d + k];
        matrix[k * d + q] = matrix[q * d + k];
    }
    matrix[p * d + p] = (app - t * apq) as f32;
    matrix[q * d + q] = (aqq + t * apq) as f32;
    matrix[p * d + q] = 0.0;
    matrix[q * d + p] = 0.0;
}

/// Rotates rows p and q (p < q).
fn turn(matrix: &mut [f32], d: usize, p: usize, q: usize, sine: f32, cosine: f32) {
    let (front, back) = matrix.split_at_mut(q * d);
    for (a, b) in front[p * d..][..d].iter_mut().zip(&mut back[..d]) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

/// The projection of a head's keys on their T main directions.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    head_dim: usize,
    /// `[T][D]`
    matrix: &'a [f32],
    /// `[D]`
    mean: &'a [f32],
}

#[cfg(feature = "defmt")]
impl defmt::Format for Projection<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "Projection {{ head_dim: {=usize}, kept: {=usize} }}", self.head_dim, self.kept());
    }
}

impl<'a> Projection<'a> {
    /// Floats that the projection of a head takes.
    #[must_use]
    pub const fn len(head_dim: usize, kept: usize) -> usize {
        (kept + 1) * head_dim
    }

    /// Numbers that [`columns`](Self::columns) writes.
    #[must_use]
    pub const fn columns_len(head_dim: usize, kept: usize) -> usize {
        head_dim * (kept + 1)
    }

    /// Floats of scratch memory that [`solve`](Self::solve) takes.
    #[must_use]
    pub const fn scratch_len(head_dim: usize) -> usize {
        2 * head_dim * head_dim
    }

    /// The projection on the `kept` directions of largest variance, from the mean and covariance that
    /// [`moments`](super::compensate::moments) wrote, in the first [`len`](Self::len) floats of `memory`. Of equal
    /// variances the one that Jacobi's rotations leave on the lower channel is kept.
    ///
    /// # Errors
    /// [`Error::HeadDim`], [`Error::Kept`], [`Error::Length`] where slices do not fit, [`Error::Capacity`] with the
    /// floats needed, [`Error::NotANumber`] where the covariance is none.
    pub fn solve(
        mean: &[f32],
        covariance: &[f32],
        kept: usize,
        scratch: &mut [f32],
        memory: &'a mut [f32],
    ) -> Result<Self, Error> {
        let d = mean.len();
        check_len("covariance", d * d, covariance.len())?;
        let (matrix, vectors) = take("eigenvalue scratch", scratch, Self::scratch_len(d))?.split_at_mut(d * d);
        matrix.copy_from_slice(covariance);
        eigen(d, matrix, vectors)?;
        let mut values = [0.0f32; MAX_HEAD_DIM];
        for (value, &x) in values.iter_mut().zip(matrix.iter().step_by(d + 1)) {
            *value = x;
        }
        let best = select::select(&values[..d], kept)?;
        let memory = take("projection", memory, Self::len(d, kept))?;
        let (rows, own_mean) = memory.split_at_mut(kept * d);
        for (row, direction) in rows.chunks_exact_mut(d).zip(best.channels()) {
            row.copy_from_slice(&vectors[direction * d..][..d]);
        }
        own_mean.copy_from_slice(mean);
        Ok(Self { head_dim: d, matrix: rows, mean: own_mean })
    }

    /// The projection that an earlier [`solve`](Self::solve) of the same shape left in `memory`.
    ///
    /// # Errors
    /// [`Error::HeadDim`], [`Error::Kept`], [`Error::Capacity`] with the floats needed.
    pub fn resume(head_dim: usize, kept: usize, memory: &'a [f32]) -> Result<Self, Error> {
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { head_dim });
        }
        if kept == 0 || kept > head_dim {
            return Err(Error::Kept { kept, head_dim });
        }
        let (needed, capacity) = (Self::len(head_dim, kept), memory.len());
        let memory = memory.get(..needed).ok_or(Error::Capacity { what: "projection", needed, capacity })?;
        let (matrix, mean) = memory.split_at(kept * head_dim);
        Ok(Self { head_dim, matrix, mean })
    }

    /// Directions kept, T.
    #[must_use]
    pub const fn kept(&self) -> usize {
        self.matrix.len() / self.head_dim
    }

    /// P, `[T][D]`: its rows are orthonormal.
    #[must_use]
    pub const fn matrix(&self) -> &'a [f32] {
        self.matrix
    }

    /// m, `[D]`.
    #[must_use]
    pub const fn mean(&self) -> &'a [f32] {
        self.mean
    }

    /// Writes, as [`columns`](Self::columns) does, the projection on the channels of `mask` of keys whose mean is `mean`: what
    /// there is to do where too few keys are known to tell more.
    ///
    /// # Errors
    /// [`Error::Length`] for another mean, [`Error::Capacity`] with the numbers needed.
    pub fn onto<E: Element>(mask: &ChannelMask, mean: &[f32], memory: &mut [E]) -> Result<(), Error> {
        let (d, kept) = (mask.head_dim(), mask.kept());
        check_len("mean key", d, mean.len())?;
        let memory = take("projection", memory, Self::columns_len(d, kept))?;
        memory.fill(E::store(0.0));
        for (row, channel) in mask.channels().enumerate() {
            memory[channel * (kept + 1) + row] = E::store(1.0);
        }
        for (stored, &mean) in memory.chunks_exact_mut(kept + 1).zip(mean) {
            stored[kept] = E::store(mean);
        }
        Ok(())
    }

    /// Writes the projection as a cache stores it and queries meet it, `[D][T+1]`: by channel its column of P, then its m.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the numbers needed.
    pub fn columns<E: Element>(&self, memory: &mut [E]) -> Result<(), Error> {
        let (d, kept) = (self.head_dim, self.kept());
        let memory = take("projection", memory, Self::columns_len(d, kept))?;
        for ((channel, stored), mean) in memory.chunks_exact_mut(kept + 1).enumerate().zip(self.mean) {
            let column = self.matrix[channel..].iter().step_by(d);
            for (stored, &x) in stored.iter_mut().zip(column.chain([mean])) {
                *stored = E::store(x);
            }
        }
        Ok(())
    }

    /// Writes what is stored of `key` (length D): P (k − m), length T.
    ///
    /// # Errors
    /// [`Error::Length`] where slices do not fit.
    pub fn store(&self, key: &[f32], thin: &mut [f32]) -> Result<(), Error> {
        check_len("key", self.head_dim, key.len())?;
        check_len("projected key", self.kept(), thin.len())?;
        let mut centred = [0.0f32; MAX_HEAD_DIM];
        let centred = &mut centred[..self.head_dim];
        for (centred, (&x, &mean)) in centred.iter_mut().zip(key.iter().zip(self.mean)) {
            *centred = x - mean;
        }
        for (thin, row) in thin.iter_mut().zip(self.matrix.chunks_exact(self.head_dim)) {
            *thin = crate::mass::dot(row, centred);
        }
        Ok(())
    }

    /// Writes P q (length T) for `query` (length D, scaled or not) and returns what is added to the logit of every thin
    /// token, q·m.
    ///
    /// # Errors
    /// [`Error::Length`] where slices do not fit.
    pub fn project(&self, query: &[f32], thin: &mut [f32]) -> Result<f32, Error> {
        check_len("query", self.head_dim, query.len())?;
        check_len("projected query", self.kept(), thin.len())?;
        for (thin, row) in thin.iter_mut().zip(self.matrix.chunks_exact(self.head_dim)) {
            *thin = crate::mass::dot(row, query);
        }
        Ok(crate::mass::dot(self.mean, query))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mass::{dot, tests::numbers};
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// A A ᵀ of random A: symmetric, with eigenvalues ≥ 0 of very different size.
    fn symmetric(seed: u64, d: usize) -> Vec<f32> {
        let a = numbers(seed, d * d);
        let mut s = vec![0.0; d * d];
        for i in 0..d {
            for j in 0..d {
                s[i * d + j] = (0..d).map(|k| a[i * d + k] * a[j * d + k] / (1 + k * k) as f32).sum();
            }
        }
        s
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn eigenvectors_are_orthonormal_and_fulfil_their_equation((d, seed) in (1usize..50, any::<u64>())) {
            let original = symmetric(seed, d);
            let (mut matrix, mut vectors) = (original.clone(), vec![f32::NAN; d * d]);
            prop_assert!(eigen(d, &mut matrix, &mut vectors).unwrap() < 12);
            let size = original.iter().map(|x| x * x).sum::<f32>().sqrt();
            for (i, v) in vectors.chunks(d).enumerate() {
                for (j, w) in vectors.chunks(d).enumerate() {
                    let expected = if i == j { 1.0 } else { 0.0 };
                    prop_assert!((dot(v, w) - expected).abs() < 1e-4);
                }
                for (line, &x) in original.chunks(d).zip(v) {
                    prop_assert!((dot(line, v) - matrix[i * d + i] * x).abs() < 1e-4 * size, "eigenvector {i}");
                }
            }
        }

        /// With all directions kept a logit is exact; with T of them the error is the variance of the others.
        #[test]
        fn all_directions_give_the_logit((d, seed) in (1usize..30, any::<u64>())) {
            let (mean, covariance) = (numbers(seed, d), symmetric(!seed, d));
            let (mut scratch, mut memory) = (vec![0.0; Projection::scratch_len(d)], vec![0.0; Projection::len(d, d)]);
            let projection = Projection::solve(&mean, &covariance, d, &mut scratch, &mut memory).unwrap();
            let (key, query) = (numbers(seed ^ 3, d), numbers(seed ^ 7, d));
            let (mut k, mut q) = (vec![0.0; d], vec![0.0; d]);
            projection.store(&key, &mut k).unwrap();
            let logit = projection.project(&query, &mut q).unwrap() + dot(&k, &q);
            prop_assert!((logit - dot(&key, &query)).abs() < 1e-3, "{logit} {}", dot(&key, &query));
        }
    }

    #[test]
    fn the_largest_variances_are_kept() {
        let covariance = [2.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 4.0];
        let (mut scratch, mut memory) = ([0.0; Projection::scratch_len(3)], [0.0; Projection::len(3, 2)]);
        let projection = Projection::solve(&[1.0, 0.0, 0.0], &covariance, 2, &mut scratch, &mut memory).unwrap();
        assert_eq!(projection.matrix(), [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        let resumed = (projection.matrix().to_vec(), projection.mean().to_vec());
        let again = Projection::resume(3, 2, &memory).unwrap();
        assert_eq!((again.matrix(), again.mean(), again.kept()), (&resumed.0[..], &resumed.1[..], 2));
    }

    #[test]
    fn what_is_no_number_or_does_not_fit_is_refused() {
        assert_eq!(eigen(2, &mut [1.0, 0.0, f32::NAN, 1.0], &mut [0.0; 4]), Err(Error::NotANumber { channel: 1 }));
        assert!(eigen(0, &mut [], &mut []).is_err() && eigen(2, &mut [0.0; 3], &mut [0.0; 4]).is_err());
        assert!(Projection::solve(&[], &[], 1, &mut [], &mut []).is_err());
        assert!(Projection::resume(4, 5, &[0.0; 100]).is_err());
    }
}
