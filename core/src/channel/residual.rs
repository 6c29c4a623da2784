//! Channels chosen for what regression on them leaves: the compensated mode's own choice.
//!
//! The ordinary score looks at each channel alone. But a channel that others tell need not be kept, and of two that tell
//! each other one is enough. With keys of covariance C and queries of second moment Q = mean q qᵀ, the error of the logits
//! that is left when channels S are kept and the others [guessed](super::compensate) is
//!
//! ```text
//! mean (q·(k − k̂))² = tr(Q C′),   C′ = C − C_·S C_SS⁻¹ C_S·
//! ```
//!
//! Channels are chosen one by one, each the one that takes most of the error away, (C′ Q C′)_jj / C′_jj, as column-subset
//! selection does (Farahat, Ghodsi & Kamel, [arXiv 1312.6838](https://arxiv.org/abs/1312.6838)); C′ and C′Q are kept by
//! updates of rank one, so that a choice takes O(D²).

use super::compensate::take;
use crate::{ChannelMask, Error, MAX_HEAD_DIM, error::check_len};

/// Floats of scratch memory that [`choose`] takes: C′Q.
#[must_use]
pub const fn scratch_len(head_dim: usize) -> usize {
    head_dim * head_dim
}

/// What the moment of two different channels of the queries counts for, beside that of one: later queries have turned
/// (RoPE), and few are known. Between 0.3 and 0.6 it makes no difference, at 0 and 1 results are worse.
const BETWEEN: f32 = 0.5;

/// Writes Q, the sum of q qᵀ over `rows` query rows (length D, `stride` apart), `[D][D]`, its off-diagonal damped.
///
/// # Errors
/// [`Error::Length`] where slices do not fit.
pub fn moment(queries: &[f32], rows: usize, stride: usize, head_dim: usize, out: &mut [f32]) -> Result<(), Error> {
    check_len("query moment", head_dim * head_dim, out.len())?;
    let expected = if rows > 0 { (rows - 1) * stride + head_dim } else { 0 };
    if queries.len() < expected {
        return Err(Error::Length { what: "queries", expected, actual: queries.len() });
    }
    out.fill(0.0);
    for query in queries.chunks(stride.max(1)).take(rows) {
        let query = &query[..head_dim];
        for (&x, line) in query.iter().zip(out.chunks_exact_mut(head_dim)) {
            for (sum, &y) in line.iter_mut().zip(query) {
                *sum += x * y;
            }
        }
    }
    for (channel, line) in out.chunks_exact_mut(head_dim).enumerate() {
        line.iter_mut().enumerate().filter(|(other, _)| *other != channel).for_each(|(_, x)| *x *= BETWEEN);
    }
    Ok(())
}

/// The `kept` channels that are chosen; in the order of choice, what each takes off the error into the front of `gains`
/// (length D), and the channels themselves into `order` (length T). `covariance` is C, `[D][D]`, which becomes C′, and `moment` is Q, up to a factor.
///
/// Where nothing of the error is left, the lowest channels follow.
///
/// # Errors
/// [`Error::Length`] where slices do not fit, [`Error::Kept`], [`Error::Capacity`] with the scratch floats needed,
/// [`Error::NotANumber`] with a channel that is none.
pub fn choose(
    covariance: &mut [f32],
    moment: &[f32],
    kept: usize,
    scratch: &mut [f32],
    gains: &mut [f32],
    order: &mut [u16],
) -> Result<ChannelMask, Error> {
    let d = gains.len();
    if d == 0 || d > MAX_HEAD_DIM {
        return Err(Error::HeadDim { head_dim: d });
    }
    if kept == 0 || kept > d {
        return Err(Error::Kept { kept, head_dim: d });
    }
    check_len("covariance", d * d, covariance.len())?;
    check_len("query moment", d * d, moment.len())?;
    check_len("order of choice", kept, order.len())?;
    let product = take("channels left", scratch, scratch_len(d))?;
    for (line, out) in covariance.chunks_exact(d).zip(product.chunks_exact_mut(d)) {
        out.fill(0.0);
        for (&x, other) in line.iter().zip(moment.chunks_exact(d)) {
            out.iter_mut().zip(other).for_each(|(sum, &y)| *sum += x * y);
        }
    }
    // What is left of a channel's variance below this is rounding.
    let mut floors = [0.0f32; MAX_HEAD_DIM];
    for (channel, floor) in floors[..d].iter_mut().enumerate() {
        *floor = covariance[channel * (d + 1)] * 1e-6;
    }
    gains.fill(0.0);
    let mut taken = [false; MAX_HEAD_DIM];
    for step in 0..kept {
        let (mut best, mut gain) = (None, f32::NEG_INFINITY);
        for channel in (0..d).filter(|&channel| !taken[channel]) {
            let (line, other) = (&covariance[channel * d..][..d], &product[channel * d..][..d]);
            let own = line[channel];
            let sum: f32 = dot(line, other);
            if sum.is_nan() || own.is_nan() {
                return Err(Error::NotANumber { channel });
            }
            let takes = if own > floors[channel] { sum / own } else { 0.0 };
            if takes > gain {
                (best, gain) = (Some(channel), takes);
            }
        }
        // There is one: no more are kept than there are.
        let Some(channel) = best else { break };
        (order[step], taken[channel], gains[step]) = (channel as u16, true, gain.max(0.0));
        let own = covariance[channel * d + channel];
        if own > floors[channel] {
            update(covariance, product, channel, own, d);
        }
    }
    ChannelMask::from_channels(d, order.iter().map(|&channel| usize::from(channel)))
}

/// C′ and C′Q when `channel`, of variance `own`, is kept too.
fn update(covariance: &mut [f32], product: &mut [f32], channel: usize, own: f32, d: usize) {
    let (mut line, mut other) = ([0.0f32; MAX_HEAD_DIM], [0.0f32; MAX_HEAD_DIM]);
    let (line, other) = (&mut line[..d], &mut other[..d]);
    line.copy_from_slice(&covariance[channel * d..][..d]);
    other.copy_from_slice(&product[channel * d..][..d]);
    let lines = covariance.chunks_exact_mut(d).zip(product.chunks_exact_mut(d));
    for (&x, (covariance, product)) in line.iter().zip(lines) {
        let factor = x / own;
        covariance.iter_mut().zip(&*line).for_each(|(c, &y)| *c -= factor * y);
        product.iter_mut().zip(&*other).for_each(|(p, &y)| *p -= factor * y);
    }
}

/// In lanes, so that it becomes vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 8;
    let mut sums = [0.0f32; LANES];
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, x), y) in sums.iter_mut().zip(a).zip(b) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest_a.iter().zip(rest_b).map(|(x, y)| x * y).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mass::tests::numbers;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// tr(Q C′) when `kept` are kept, by Gauss elimination in f64.
    fn left(covariance: &[f32], moment: &[f32], kept: &[usize], d: usize) -> f64 {
        let mut c: Vec<f64> = covariance.iter().map(|&x| f64::from(x)).collect();
        for &p in kept {
            let line: Vec<f64> = c[p * d..][..d].to_vec();
            for i in 0..d {
                let factor = line[i] / line[p];
                (0..d).for_each(|j| c[i * d + j] -= factor * line[j]);
            }
        }
        c.iter().zip(moment).map(|(c, &q)| c * f64::from(q)).sum()
    }

    fn positive(seed: u64, d: usize, rows: usize) -> Vec<f32> {
        let mut moment = vec![0.0; d * d];
        super::moment(&numbers(seed, rows * d), rows, d, d, &mut moment).unwrap();
        moment
    }

    proptest! {
        /// Each choice is the best of all that could be made, and takes off what it says.
        #[test]
        fn equals_trying_every_channel((d, seed) in (1usize..12, any::<u64>()), share in 0.0f64..=1.0) {
            let (covariance, moment) = (positive(seed, d, 3 * d), positive(seed ^ 1, d, 4));
            let kept = ((d as f64 * share) as usize).max(1);
            let (mut scratch, mut gains, mut order) = (vec![f32::NAN; scratch_len(d)], vec![0.0; d], vec![u16::MAX; kept]);
            let mask = choose(&mut covariance.clone(), &moment, kept, &mut scratch, &mut gains, &mut order).unwrap();
            let whole = left(&covariance, &moment, &[], d);
            let mut chosen: Vec<usize> = Vec::new();
            for &gain in &gains[..kept] {
                let before = left(&covariance, &moment, &chosen, d);
                let rest = |channel: usize| left(&covariance, &moment, &[&chosen[..], &[channel]].concat(), d);
                let others = mask.channels().filter(|channel| !chosen.contains(channel));
                let own = others.min_by(|&a, &b| rest(a).total_cmp(&rest(b))).unwrap();
                prop_assert!((before - rest(own) - f64::from(gain)).abs() < 1e-3 * whole, "{gain} {before}");
                for channel in (0..d).filter(|channel| !chosen.contains(channel)) {
                    prop_assert!(rest(channel) >= rest(own) - 1e-3 * whole, "{channel} is better than {own}");
                }
                // Of two that take as much either may come first.
                let said = usize::from(order[chosen.len()]);
                prop_assert!(rest(said) <= rest(own) + 1e-3 * whole, "{said} is no choice beside {own}");
                chosen.push(said);
            }
            chosen.sort_unstable();
            prop_assert!(mask.channels().eq(chosen));
        }
    }

    #[test]
    fn of_two_that_tell_each_other_one_is_enough() {
        // Channels 0 and 1 are the same and the largest, 2 is apart.
        let mut covariance = [4.0, 4.0, 0.0, 4.0, 4.0, 0.0, 0.0, 0.0, 1.0];
        let moment = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        let mut gains = [0.0; 3];
        let mut order = [0; 2];
        let mask = choose(&mut covariance, &moment, 2, &mut [0.0; 9], &mut gains, &mut order).unwrap();
        assert_eq!(mask, ChannelMask::from_channels(3, [0, 2]).unwrap());
        assert_eq!((gains, order), ([8.0, 1.0, 0.0], [0, 2]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let gains = &mut [0.0; 2][..];
        let choose = |c: &mut [f32], q: &[f32], kept, gains: &mut [f32]| {
            choose(c, q, kept, &mut [0.0; 4], gains, &mut [0; 3][..kept])
        };
        assert!(choose(&mut [1.0; 3], &[1.0; 4], 1, gains).is_err());
        assert!(choose(&mut [1.0; 4], &[1.0; 4], 3, gains).is_err());
        assert!(choose(&mut [1.0; 4], &[f32::NAN; 4], 1, gains).is_err());
        assert!(moment(&[1.0; 3], 2, 2, 2, &mut [0.0; 4]).is_err());
        assert!(moment(&[1.0; 4], 2, 2, 2, &mut [0.0; 3]).is_err());
    }
}
