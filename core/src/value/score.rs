//! Value channel scores: how much of the attention output of the last queries a channel carries (ThinK, arXiv 2407.21018,
//! appendix on value pruning), or its energy alone.
//!
//! Channel j's part of the output of all queries is softmax(Q Kᵀ/√D)·V₍:,j₎, one number a query; the score is its squared
//! norm. [Choosing](crate::channel::select) is as for keys.

use crate::{
    Error, Loops, MAX_HEAD_DIM,
    channel::{norm, score},
    error::check_len,
    mass::{QueryWindow, TokenRows, each_query},
};

/// Adds the squares of what one query takes from each value channel to `scores` (one a channel): `weights` are its
/// attention probabilities, one a token.
///
/// # Errors
/// [`Error::Length`] where slices do not fit.
pub fn add_output(weights: &[f32], values: &TokenRows<'_>, scores: &mut [f32]) -> Result<(), Error> {
    check_len("attention weights", values.tokens(), weights.len())?;
    check_len("value scores", values.head_dim(), scores.len())?;
    let mut output = [0.0f32; MAX_HEAD_DIM];
    let output = &mut output[..scores.len()];
    for (row, &weight) in values.rows().zip(weights) {
        // Causal rows end in zeros.
        if weight == 0.0 {
            continue;
        }
        for (sum, &x) in output.iter_mut().zip(row) {
            *sum += weight * x;
        }
    }
    for (score, &x) in scores.iter_mut().zip(&*output) {
        *score += x * x;
    }
    Ok(())
}

/// Writes the `query` scores: the squared norm, over all W·G queries, of what they take from each channel.
///
/// `scratch` takes S floats; O(W·G·S·D).
///
/// # Errors
/// As [`each_query`]; [`Error::Length`] where keys, values and scores do not fit.
pub fn query<L: Loops>(
    loops: &L,
    queries: &QueryWindow<'_>,
    keys: &TokenRows<'_>,
    values: &TokenRows<'_>,
    scratch: &mut [f32],
    scores: &mut [f32],
) -> Result<(), Error> {
    check_len("values of a window", keys.tokens(), values.tokens())?;
    scores.fill(0.0);
    for head in 0..queries.group() {
        each_query(loops, queries, head, keys, scratch, |weights| add_output(weights, values, scores))?;
    }
    Ok(())
}

/// Writes the `l2` scores: the root mean square of each channel of `rows` value rows, `stride` floats apart.
///
/// # Errors
/// As [`add_energy`](score::add_energy); [`Error::Length`] for no row.
pub fn l2(data: &[f32], rows: usize, stride: usize, scores: &mut [f32]) -> Result<(), Error> {
    let mut energy = [0.0f32; MAX_HEAD_DIM];
    let head_dim = scores.len();
    let energy = energy.get_mut(..head_dim).ok_or(Error::HeadDim { head_dim })?;
    score::add_energy(data, rows, stride, energy)?;
    norm::l2(energy, rows, scores)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Plain,
        mass::tests::{brute_force, numbers},
    };
    use proptest::prelude::*;
    use std::vec;

    proptest! {
        #[test]
        fn equals_the_outputs_in_f64(
            (group, window, more, d, seed) in (1usize..4, 1usize..6, 0usize..40, 1usize..12, any::<u64>()),
        ) {
            let tokens = window + more;
            let (q, k) = (numbers(seed, group * window * d), numbers(!seed, tokens * d));
            let v = numbers(seed ^ 77, tokens * d);
            let queries = QueryWindow::new(&q, [group, window * d], [window, d], d).unwrap();
            let keys = TokenRows::new(&k, tokens, d, d).unwrap();
            let values = TokenRows::new(&v, tokens, d, d).unwrap();
            let (mut scratch, mut scores) = (vec![0.0; tokens], vec![9.0; d]);
            query(&Plain, &queries, &keys, &values, &mut scratch, &mut scores).unwrap();
            let mut roots = vec![0.0; d];
            l2(&v, tokens, d, &mut roots).unwrap();
            let rows = brute_force(&q, &k, d, window);
            for c in 0..d {
                let out = |row: &[f64]| row.iter().enumerate().map(|(t, p)| p * f64::from(v[t * d + c])).sum::<f64>();
                let expected: f64 = rows.iter().map(|row| out(row).powi(2)).sum();
                prop_assert!((f64::from(scores[c]) - expected).abs() < 1e-4 * expected.max(1.0));
                let energy: f64 = (0..tokens).map(|t| f64::from(v[t * d + c]).powi(2)).sum();
                prop_assert!((f64::from(roots[c]) - (energy / tokens as f64).sqrt()).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let data = [0.0; 8];
        let rows = TokenRows::new(&data, 2, 4, 4).unwrap();
        assert!(add_output(&[1.0], &rows, &mut [0.0; 4]).is_err());
        assert!(add_output(&[1.0; 2], &rows, &mut [0.0; 3]).is_err());
        assert!(l2(&data, 0, 4, &mut [0.0; 4]).is_err() && l2(&[0.0; 300], 1, 300, &mut [0.0; 300]).is_err());
    }
}
