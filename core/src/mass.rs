//! The attention that the last queries of a prompt pay to each token: what the compensated mode weighs keys by, what
//! token eviction votes with, and what scores value channels.
//!
//! The probabilities are exact: a causal softmax over the whole keys, scale 1/√D. A prompt of S tokens and a window of
//! W queries of G heads take O(W·G·S·D) and one row of S floats.

use crate::{Error, Loops, MAX_GROUP, MAX_HEAD_DIM, error::check_len};
use core::ops::Range;

/// Keys or values of one KV head, whole and after RoPE: those of token t are `data[t * stride ..][..D]`.
#[derive(Clone, Copy, Debug)]
pub struct TokenRows<'a> {
    data: &'a [f32],
    tokens: usize,
    stride: usize,
    head_dim: usize,
}

#[cfg(feature = "defmt")]
impl defmt::Format for TokenRows<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "TokenRows {{ tokens: {=usize}, head_dim: {=usize} }}", self.tokens, self.head_dim);
    }
}

impl<'a> TokenRows<'a> {
    /// The first `tokens` rows of `data`, `stride` floats apart, of `head_dim` floats each.
    ///
    /// # Errors
    /// [`Error::HeadDim`]; [`Error::Length`] where `data` ends before the last row does or rows overlap.
    pub fn new(data: &'a [f32], tokens: usize, stride: usize, head_dim: usize) -> Result<Self, Error> {
        check_rows("token rows", data, tokens, stride, head_dim)?;
        Ok(Self { data, tokens, stride, head_dim })
    }

    /// Tokens, S.
    #[must_use]
    pub const fn tokens(&self) -> usize {
        self.tokens
    }

    /// Channels, D.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The rows, oldest first.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &'a [f32]> + use<'a> {
        let head_dim = self.head_dim;
        self.data.chunks(self.stride).take(self.tokens).map(move |row| &row[..head_dim])
    }

    /// The first `tokens` of them.
    ///
    /// # Errors
    /// [`Error::Index`] where there are fewer.
    pub fn first(&self, tokens: usize) -> Result<Self, Error> {
        if tokens > self.tokens {
            return Err(Error::Index { what: "token", index: tokens, limit: self.tokens + 1 });
        }
        Ok(Self { tokens, ..*self })
    }
}

/// The last W queries, after RoPE and unscaled, of the G query heads that share a KV head: the query of head g at
/// window position w is `data[g * head_stride + w * stride ..][..D]`.
#[derive(Clone, Copy, Debug)]
pub struct QueryWindow<'a> {
    data: &'a [f32],
    group: usize,
    window: usize,
    head_stride: usize,
    stride: usize,
    head_dim: usize,
}

#[cfg(feature = "defmt")]
impl defmt::Format for QueryWindow<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "QueryWindow {{ group: {=usize}, window: {=usize} }}", self.group, self.window);
    }
}

impl<'a> QueryWindow<'a> {
    /// The queries of `group` heads, `head_stride` floats apart, at `window` positions, `stride` floats apart.
    ///
    /// # Errors
    /// [`Error::HeadDim`], [`Error::Group`]; [`Error::Length`] where there is no query, or `data` ends before the last
    /// one does.
    pub fn new(
        data: &'a [f32],
        [group, head_stride]: [usize; 2],
        [window, stride]: [usize; 2],
        head_dim: usize,
    ) -> Result<Self, Error> {
        if group == 0 || group > MAX_GROUP {
            return Err(Error::Group { group });
        }
        if window == 0 {
            return Err(Error::Length { what: "queries", expected: 1, actual: 0 });
        }
        let last = (group - 1).saturating_mul(head_stride);
        let tail = data.get(last..).ok_or(Error::Length { what: "queries", expected: last, actual: data.len() })?;
        check_rows("queries", tail, window, stride.max(head_dim), head_dim)?;
        Ok(Self { data, group, window, head_stride, stride: stride.max(head_dim), head_dim })
    }

    /// Query heads, G.
    #[must_use]
    pub const fn group(&self) -> usize {
        self.group
    }

    /// Queries of a head, W.
    #[must_use]
    pub const fn window(&self) -> usize {
        self.window
    }

    /// The queries of head `head`, oldest first.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such head.
    pub fn head(&self, head: usize) -> Result<TokenRows<'a>, Error> {
        if head >= self.group {
            return Err(Error::Index { what: "query head", index: head, limit: self.group });
        }
        TokenRows::new(&self.data[head * self.head_stride..], self.window, self.stride, self.head_dim)
    }
}

/// `Err` unless `tokens` rows of `head_dim` floats, `stride` apart, lie in `data` without overlap.
fn check_rows(what: &'static str, data: &[f32], tokens: usize, stride: usize, head_dim: usize) -> Result<(), Error> {
    if head_dim == 0 || head_dim > MAX_HEAD_DIM {
        return Err(Error::HeadDim { head_dim });
    }
    if stride < head_dim {
        return Err(Error::Length { what: "stride", expected: head_dim, actual: stride });
    }
    let expected = tokens.saturating_sub(1).saturating_mul(stride).saturating_add(head_dim);
    let expected = if tokens == 0 { 0 } else { expected };
    if data.len() < expected { Err(Error::Length { what, expected, actual: data.len() }) } else { Ok(()) }
}

/// Writes how `query` (length D, unscaled) attends to the first `seen` tokens of `keys`: a softmax with scale 1/√D over
/// those, zeros after them. `out` has one entry a token.
///
/// # Errors
/// [`Error::Length`] where slices do not fit, [`Error::Index`] where `seen` is zero or more than there are tokens.
pub fn probabilities<L: Loops>(
    loops: &L,
    query: &[f32],
    keys: &TokenRows<'_>,
    seen: usize,
    out: &mut [f32],
) -> Result<(), Error> {
    check_len("query", keys.head_dim, query.len())?;
    check_len("probabilities", keys.tokens, out.len())?;
    if seen == 0 || seen > keys.tokens {
        return Err(Error::Index { what: "token seen", index: seen, limit: keys.tokens + 1 });
    }
    let scale = 1.0 / libm::sqrtf(keys.head_dim as f32);
    let (logits, unseen) = out.split_at_mut(seen);
    for (logit, key) in logits.iter_mut().zip(keys.rows()) {
        *logit = dot(query, key) * scale;
    }
    unseen.fill(0.0);
    let shift = loops.largest(logits);
    let sum = loops.exponentials(logits, shift);
    for x in logits {
        *x /= sum;
    }
    Ok(())
}

/// Calls `each` with the probabilities (one entry a token) of every query of head `head` of the window, oldest first.
/// Query w of W is token S - W + w of the S in `keys`, and sees that token and those before.
///
/// `scratch` takes S floats.
///
/// # Errors
/// As [`probabilities`]; [`Error::Capacity`] with the scratch floats needed, [`Error::Length`] for more queries than
/// tokens; what `each` returns.
pub fn each_query<L: Loops>(
    loops: &L,
    queries: &QueryWindow<'_>,
    head: usize,
    keys: &TokenRows<'_>,
    scratch: &mut [f32],
    mut each: impl FnMut(&[f32]) -> Result<(), Error>,
) -> Result<(), Error> {
    let tokens = keys.tokens;
    let before = tokens.checked_sub(queries.window).ok_or(Error::Length {
        what: "keys of a window",
        expected: queries.window,
        actual: tokens,
    })?;
    let capacity = scratch.len();
    let row = scratch.get_mut(..tokens).ok_or(Error::Capacity { what: "attention row", needed: tokens, capacity })?;
    for (position, query) in queries.head(head)?.rows().enumerate() {
        probabilities(loops, query, keys, before + position + 1, row)?;
        each(row)?;
    }
    Ok(())
}

/// Writes the attention mass of each token, the mean over the W queries of head `head`: S numbers that sum to 1.
///
/// # Errors
/// As [`each_query`].
pub fn head_mass<L: Loops>(
    loops: &L,
    queries: &QueryWindow<'_>,
    head: usize,
    keys: &TokenRows<'_>,
    scratch: &mut [f32],
    mass: &mut [f32],
) -> Result<(), Error> {
    mean_mass(loops, queries, head..head + 1, keys, scratch, mass)
}

/// Writes the attention mass of each token, the mean over all W·G queries: S numbers that sum to 1.
///
/// # Errors
/// As [`each_query`].
pub fn group_mass<L: Loops>(
    loops: &L,
    queries: &QueryWindow<'_>,
    keys: &TokenRows<'_>,
    scratch: &mut [f32],
    mass: &mut [f32],
) -> Result<(), Error> {
    mean_mass(loops, queries, 0..queries.group, keys, scratch, mass)
}

/// The mean over all queries of `heads`.
fn mean_mass<L: Loops>(
    loops: &L,
    queries: &QueryWindow<'_>,
    heads: Range<usize>,
    keys: &TokenRows<'_>,
    scratch: &mut [f32],
    mass: &mut [f32],
) -> Result<(), Error> {
    check_len("attention mass", keys.tokens, mass.len())?;
    mass.fill(0.0);
    let scale = 1.0 / (queries.window * heads.len()) as f32;
    for head in heads {
        each_query(loops, queries, head, keys, scratch, |row| {
            mass.iter_mut().zip(row).for_each(|(mass, &p)| *mass += p);
            Ok(())
        })?;
    }
    mass.iter_mut().for_each(|x| *x *= scale);
    Ok(())
}

/// The dot product, in eight lanes: a plain sum would not vectorise.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    for (a, b) in a8.iter().zip(b8) {
        for (lane, (&x, &y)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += x * y;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(&x, &y)| x * y).sum();
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h)) + rest
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Plain;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// Numbers in -2..2.
    pub(crate) fn numbers(mut seed: u64, len: usize) -> Vec<f32> {
        let next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        };
        core::iter::repeat_with(next).skip(1).take(len).collect()
    }

    /// The causal softmax in f64, of `[group][window][D]` queries over `[tokens][D]` keys: `[group][window][tokens]`.
    pub(crate) fn brute_force(q: &[f32], k: &[f32], d: usize, window: usize) -> Vec<Vec<f64>> {
        let tokens = k.len() / d;
        let rows = q.chunks(d).enumerate().map(|(index, q)| {
            let seen = tokens - window + index % window + 1;
            let logit = |key: &[f32]| -> f64 {
                q.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() / (d as f64).sqrt()
            };
            let mut row: Vec<f64> = k.chunks(d).take(seen).map(|key| logit(key).exp()).collect();
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|x| *x /= sum);
            row.resize(tokens, 0.0);
            row
        });
        rows.collect()
    }

    proptest! {
        #[test]
        fn masses_equal_a_softmax_in_f64(
            (group, window, more, d, seed) in (1usize..4, 1usize..6, 0usize..40, 1usize..20, any::<u64>()),
        ) {
            let tokens = window + more;
            let (q, k) = (numbers(seed, group * window * d), numbers(!seed, tokens * d));
            let queries = QueryWindow::new(&q, [group, window * d], [window, d], d).unwrap();
            let keys = TokenRows::new(&k, tokens, d, d).unwrap();
            let rows = brute_force(&q, &k, d, window);
            let (mut scratch, mut mass) = (vec![0.0; tokens], vec![0.0; tokens]);
            group_mass(&Plain, &queries, &keys, &mut scratch, &mut mass).unwrap();
            for (token, &ours) in mass.iter().enumerate() {
                let expected = rows.iter().map(|row| row[token]).sum::<f64>() / rows.len() as f64;
                prop_assert!((f64::from(ours) - expected).abs() < 2e-6, "{ours} {expected}");
            }
            for head in 0..group {
                head_mass(&Plain, &queries, head, &keys, &mut scratch, &mut mass).unwrap();
                for (token, &ours) in mass.iter().enumerate() {
                    let rows = &rows[head * window..(head + 1) * window];
                    let expected = rows.iter().map(|row| row[token]).sum::<f64>() / window as f64;
                    prop_assert!((f64::from(ours) - expected).abs() < 2e-6, "{ours} {expected}");
                }
            }
        }
    }

    /// Queries of several heads side by side, as a projection writes them.
    #[test]
    fn strides_reach_interleaved_heads() {
        let data = [1.0, 2.0, 10.0, 20.0, 3.0, 4.0, 30.0, 40.0];
        let queries = QueryWindow::new(&data, [2, 2], [2, 4], 2).unwrap();
        assert_eq!(queries.head(1).unwrap().rows().collect::<Vec<_>>(), [[10.0, 20.0], [30.0, 40.0]]);
        let keys = TokenRows::new(&data, 2, 4, 2).unwrap();
        assert_eq!(keys.rows().collect::<Vec<_>>(), [[1.0, 2.0], [3.0, 4.0]]);
        assert_eq!(keys.first(1).unwrap().rows().len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let data = [0.0; 8];
        assert!(TokenRows::new(&data, 3, 3, 3).is_err() && TokenRows::new(&data, 2, 2, 3).is_err());
        assert!(TokenRows::new(&data, usize::MAX, 4, 4).is_err());
        assert!(QueryWindow::new(&data, [0, 4], [1, 4], 4).is_err());
        assert!(QueryWindow::new(&data, [2, 8], [1, 4], 4).is_err());
        assert!(QueryWindow::new(&data, [1, 4], [0, 4], 4).is_err());
        let queries = QueryWindow::new(&data, [1, 4], [2, 4], 4).unwrap();
        let keys = TokenRows::new(&data, 1, 4, 4).unwrap();
        assert!(group_mass(&Plain, &queries, &keys, &mut [0.0], &mut [0.0]).is_err(), "more queries than tokens");
        let keys = TokenRows::new(&data, 2, 4, 4).unwrap();
        assert_eq!(
            group_mass(&Plain, &queries, &keys, &mut [0.0], &mut [0.0; 2]),
            Err(Error::Capacity { what: "attention row", needed: 2, capacity: 1 })
        );
        assert!(probabilities(&Plain, &[0.0; 4], &keys, 0, &mut [0.0; 2]).is_err());
    }
}
