//! Channel scores from keys alone: their L1 and L2 norms, which know nothing of the queries.
//!
//! They stream as the [query-driven score](super::score) does: sums over rows first, then scores from sums. For L2 the
//! sums are [`add_energy`](super::score::add_energy)'s.

use super::score::add_rows;
use crate::{Error, error::check_len};

/// Adds the absolute values of `rows` rows of D = `sums.len()` channels to `sums`. Row r is `data[r * stride ..][..D]`.
///
/// # Errors
/// As [`add_energy`](super::score::add_energy).
pub fn add_absolute(data: &[f32], rows: usize, stride: usize, sums: &mut [f32]) -> Result<(), Error> {
    add_rows(data, rows, stride, sums, f32::abs)
}

/// L1 scores, the mean absolute value of `keys` rows, from the sums of [`add_absolute`].
///
/// # Errors
/// [`Error::Length`] where the slices differ in length or there is no key.
pub fn l1(sums: &[f32], keys: usize, scores: &mut [f32]) -> Result<(), Error> {
    means(sums, keys, scores)
}

/// L2 scores, the root mean square of `keys` rows, from the sums of [`add_energy`](super::score::add_energy).
///
/// # Errors
/// As [`l1`].
pub fn l2(energy: &[f32], keys: usize, scores: &mut [f32]) -> Result<(), Error> {
    means(energy, keys, scores)?;
    scores.iter_mut().for_each(|score| *score = libm::sqrtf(*score));
    Ok(())
}

fn means(sums: &[f32], rows: usize, scores: &mut [f32]) -> Result<(), Error> {
    check_len("scores", sums.len(), scores.len())?;
    if rows == 0 {
        return Err(Error::Length { what: "rows that score", expected: 1, actual: 0 });
    }
    for (score, &sum) in scores.iter_mut().zip(sums) {
        *score = sum / rows as f32;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{channel::score::add_energy, mass::tests::numbers};
    use proptest::prelude::*;
    use std::vec;

    proptest! {
        #[test]
        fn equals_the_norms_in_f64((rows, d, gap, seed) in (1usize..100, 1usize..20, 0usize..4, any::<u64>())) {
            let stride = d + gap;
            let data = numbers(seed, rows * stride);
            let (mut sums, mut energy) = (vec![0.0; d], vec![0.0; d]);
            let (mut one, mut two) = (vec![0.0; d], vec![0.0; d]);
            add_absolute(&data, rows, stride, &mut sums).unwrap();
            add_energy(&data, rows, stride, &mut energy).unwrap();
            l1(&sums, rows, &mut one).unwrap();
            l2(&energy, rows, &mut two).unwrap();
            for c in 0..d {
                let column = || (0..rows).map(|t| f64::from(data[t * stride + c]));
                let mean = column().map(f64::abs).sum::<f64>() / rows as f64;
                let root = (column().map(|x| x * x).sum::<f64>() / rows as f64).sqrt();
                prop_assert!((f64::from(one[c]) - mean).abs() < 1e-5 && (f64::from(two[c]) - root).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(add_absolute(&[1.0; 5], 2, 3, &mut [0.0; 3]).is_err());
        assert!(l1(&[1.0], 0, &mut [0.0]).is_err() && l2(&[1.0], 1, &mut [0.0; 2]).is_err());
    }
}
