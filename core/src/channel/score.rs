//! Query-driven channel score (ThinK, arXiv 2407.21018, section 3.2), as a streaming product of energies.
//!
//! ThinK scores channel j by the Frobenius norm ‖Q₍:,j₎ K₍:,j₎ᵀ‖. That matrix has rank one, so the norm is
//! ‖q₍:,j₎‖·‖k₍:,j₎‖ and no matrix is ever formed: the sums of squares of the window's queries and of all keys
//! suffice, O((W·G + S)·D). The score here is the mean of squares,
//! s_j = mean_g(mean_w q²) · mean_t k², which orders channels exactly as the norm does.

use crate::{BLOCK, Error, error::check_len};

/// Adds the squares of `rows` rows of D = `energy.len()` channels to `energy`.
///
/// Row r is `data[r * stride ..][..D]`. Rows are summed in runs of 32 first, so that the rounding error does not grow
/// with the number of tokens.
///
/// # Errors
/// [`Error::Length`] where `data` is shorter than the last row's end or rows overlap, [`Error::HeadDim`] where D is
/// zero or too large.
pub fn add_energy(data: &[f32], rows: usize, stride: usize, energy: &mut [f32]) -> Result<(), Error> {
    add_rows(data, rows, stride, energy, |x| x * x)
}

/// [`add_energy`] of `what` instead of the square.
pub(crate) fn add_rows(
    data: &[f32],
    rows: usize,
    stride: usize,
    sums: &mut [f32],
    what: impl Fn(f32) -> f32,
) -> Result<(), Error> {
    let head_dim = sums.len();
    if head_dim == 0 || head_dim > crate::MAX_HEAD_DIM {
        return Err(Error::HeadDim { head_dim });
    }
    if rows == 0 {
        return Ok(());
    }
    let needed = (rows - 1) * stride + head_dim;
    if data.len() < needed || stride < head_dim {
        return Err(Error::Length { what: "rows", expected: needed, actual: data.len() });
    }
    let mut partial = [0.0f32; crate::MAX_HEAD_DIM];
    let partial = &mut partial[..head_dim];
    for first in (0..rows).step_by(BLOCK) {
        partial.fill(0.0);
        for row in first..rows.min(first + BLOCK) {
            let row = &data[row * stride..][..head_dim];
            for (sum, &x) in partial.iter_mut().zip(row) {
                *sum += what(x);
            }
        }
        for (sum, &part) in sums.iter_mut().zip(partial.iter()) {
            *sum += part;
        }
    }
    Ok(())
}

/// Adds `what` of `tokens` keys of D = `sums.len()` channels to `sums`: the square for [`add_energy`]'s sums. They lie
/// channel-major in blocks of 32 tokens, `[block][D][32]`.
///
/// # Errors
/// [`Error::Length`] where `blocks` is shorter than the blocks of the tokens.
pub fn add_blocks(blocks: &[f32], tokens: usize, what: impl Fn(f32) -> f32, sums: &mut [f32]) -> Result<(), Error> {
    /// Sums side by side: one alone would wait for its own latency.
    const LANES: usize = 8;
    let expected = tokens.next_multiple_of(BLOCK) * sums.len();
    if blocks.len() < expected {
        return Err(Error::Length { what: "key blocks", expected, actual: blocks.len() });
    }
    for (first, block) in (0..tokens).step_by(BLOCK).zip(blocks.chunks(BLOCK * sums.len())) {
        let count = BLOCK.min(tokens - first);
        for (sum, lanes) in sums.iter_mut().zip(block.chunks_exact(BLOCK)) {
            let mut parts = [0.0f32; LANES];
            let (whole, rest) = lanes[..count].as_chunks::<LANES>();
            for lanes in whole {
                for (part, &x) in parts.iter_mut().zip(lanes) {
                    *part += what(x);
                }
            }
            for (part, &x) in parts.iter_mut().zip(rest) {
                *part += what(x);
            }
            *sum += parts.iter().sum::<f32>();
        }
    }
    Ok(())
}

/// Channel scores from the summed squares of `queries` query rows (window × group) and of `keys` key rows.
///
/// Both energies and `scores` have one entry a channel.
///
/// # Errors
/// [`Error::Length`] where the three slices differ in length or a count is zero.
pub fn score(
    query_energy: &[f32],
    queries: usize,
    key_energy: &[f32],
    keys: usize,
    scores: &mut [f32],
) -> Result<(), Error> {
    check_len("key energies", query_energy.len(), key_energy.len())?;
    check_len("scores", query_energy.len(), scores.len())?;
    if queries == 0 || keys == 0 {
        return Err(Error::Length { what: "rows that score", expected: 1, actual: 0 });
    }
    let (queries, keys) = (queries as f32, keys as f32);
    for ((score, &query), &key) in scores.iter_mut().zip(query_energy).zip(key_energy) {
        *score = (query / queries) * (key / keys);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// A worked example that circulates gives 33.94; the right value is √29·√194.
    #[test]
    fn worked_example() {
        let (mut q, mut k, mut s) = ([0.0], [0.0], [0.0]);
        add_energy(&[2.0, 3.0, 4.0], 3, 1, &mut q).unwrap();
        add_energy(&[9.0, 8.0, 7.0], 3, 1, &mut k).unwrap();
        score(&q, 3, &k, 3, &mut s).unwrap();
        let norm = libm::sqrtf(s[0] * 9.0);
        assert!((norm - 75.01).abs() < 0.005, "{norm}");
    }

    proptest! {
        /// The square root of the score, rescaled, is the Frobenius norm of the matrix that is never formed.
        #[test]
        fn equals_the_frobenius_norm(
            q in prop::collection::vec(-3.0f32..3.0, 4 * 6),
            k in prop::collection::vec(-3.0f32..3.0, 50 * 6),
        ) {
            let (d, w, s) = (6, 4, 50);
            let (mut qe, mut ke, mut scores) = ([0.0; 6], [0.0; 6], [0.0; 6]);
            add_energy(&q, w, d, &mut qe).unwrap();
            add_energy(&k, s, d, &mut ke).unwrap();
            score(&qe, w, &ke, s, &mut scores).unwrap();
            for j in 0..d {
                let mut squares = Vec::new();
                for a in 0..w {
                    for b in 0..s {
                        let product = f64::from(q[a * d + j]) * f64::from(k[b * d + j]);
                        squares.push(product * product);
                    }
                }
                let frobenius: f64 = squares.iter().sum();
                let ours = f64::from(scores[j]) * (w * s) as f64;
                prop_assert!((ours - frobenius).abs() <= 1e-5 * frobenius.max(1e-9), "{ours} {frobenius}");
            }
        }
    }

    proptest! {
        /// However keys lie, their energies are the same.
        #[test]
        fn blocks_have_the_energy_of_their_tokens(k in prop::collection::vec(-3.0f32..3.0, 5..5 * 80)) {
            let (d, tokens) = (5, k.len() / 5);
            let mut blocks = std::vec![f32::NAN; tokens.next_multiple_of(BLOCK) * d];
            for (at, &x) in k[..tokens * d].iter().enumerate() {
                let (token, channel) = (at / d, at % d);
                blocks[(token / BLOCK * d + channel) * BLOCK + token % BLOCK] = x;
            }
            let mut energy = [1.0; 5];
            add_blocks(&blocks, tokens, |x| x * x, &mut energy).unwrap();
            for (channel, &energy) in energy.iter().enumerate() {
                let squares: f64 = (0..tokens).map(|token| f64::from(k[token * d + channel]).powi(2)).sum();
                prop_assert!((f64::from(energy) - 1.0 - squares).abs() <= 1e-5 * (1.0 + squares));
            }
            prop_assert!(add_blocks(&blocks[1..], tokens, |x| x * x, &mut [0.0; 5]).is_err());
        }
    }

    #[test]
    fn short_rows_and_zero_counts_are_errors() {
        assert!(add_energy(&[1.0; 5], 2, 3, &mut [0.0; 3]).is_err());
        assert!(add_energy(&[1.0; 6], 3, 2, &mut [0.0; 3]).is_err());
        assert!(score(&[1.0], 0, &[1.0], 1, &mut [0.0]).is_err());
    }
}
