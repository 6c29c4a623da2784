//! Element-wise operations on rows of activations: normalisation, rotary embedding, the gated activation.

use super::{
    exponential::exponential,
    pool::Pool,
    simd::{Kernel, LANES, Level, Portable, Simd},
};

/// Rows of a task: enough to pay for handing it out.
const TASK_FLOATS: usize = 1 << 14;

/// Calls `body(first row, rows)` for runs of whole rows of `out`, [rows, `len`], on the pool's threads.
fn for_rows(pool: &Pool, out: &mut [f32], len: usize, body: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    /// A pointer that tasks share, see below.
    struct Shared(*mut f32);
    // SAFETY: each task makes a slice of its own rows from it, and no two tasks have a row in common.
    unsafe impl Sync for Shared {}
    impl Shared {
        fn at(&self, offset: usize) -> *mut f32 {
            self.0.wrapping_add(offset)
        }
    }

    let rows = out.len() / len;
    let run = (TASK_FLOATS / len).max(1);
    let shared = Shared(out.as_mut_ptr());
    pool.run(rows.div_ceil(run), &|task| {
        let first = task * run;
        let count = run.min(rows - first);
        // SAFETY: rows first..first + count are inside `out`, which is borrowed mutably until the run has ended, and
        // belong to this task alone.
        let rows = unsafe { std::slice::from_raw_parts_mut(shared.at(first * len), count * len) };
        body(first, rows);
    });
}

/// RMS normalisation: `out[r][c] = x[r][c] / √(mean_c x² + eps) · weight[c]`; both are [rows, D], D = `weight.len()`.
///
/// # Panics
/// Where `x` and `out` differ in length or are no whole number of rows.
pub fn rms_norm(pool: &Pool, level: Level, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let len = weight.len();
    assert_eq!(x.len(), out.len(), "the output has another shape");
    assert!(x.len().is_multiple_of(len), "{} floats are no rows of {len}", x.len());
    for_rows(pool, out, len, &|first, out| {
        level.dispatch(Norm { x: &x[first * len..][..out.len()], weight, eps, out });
    });
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.weight.len();
        let (weights, weights_rest) = self.weight.as_chunks::<LANES>();
        for (x, out) in self.x.chunks_exact(len).zip(self.out.chunks_exact_mut(len)) {
            let scale = simd.splat(inverse_rms(simd, x, self.eps));
            let ((x, rest), (out, out_rest)) = (x.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
            for ((x, weight), out) in x.iter().zip(weights).zip(out) {
                simd.store(simd.mul(simd.mul(simd.load(x), scale), simd.load(weight)), out);
            }
            let scaled = simd.mul(simd.load_part(rest, 0.0), scale);
            simd.store_part(simd.mul(scaled, simd.load_part(weights_rest, 0.0)), out_rest);
        }
    }
}

/// 1 / √(mean x² + eps).
#[inline(always)]
fn inverse_rms<S: Simd>(simd: S, x: &[f32], eps: f32) -> f32 {
    // Two sums: one alone would wait for its own latency.
    let (pairs, rest) = x.as_chunks::<{ 2 * LANES }>();
    let mut sums = [simd.splat(0.0); 2];
    for pair in pairs {
        if let ([low, high], _) = pair.as_chunks::<LANES>() {
            let (low, high) = (simd.load(low), simd.load(high));
            sums = [simd.fma(low, low, sums[0]), simd.fma(high, high, sums[1])];
        }
    }
    for part in rest.chunks(LANES) {
        let part = simd.load_part(part, 0.0);
        sums[0] = simd.fma(part, part, sums[0]);
    }
    1.0 / (simd.sum(simd.add(sums[0], sums[1])) / x.len() as f32 + eps).sqrt()
}

/// Which channels rotary embedding turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// 2i and 2i + 1.
    Adjacent,
    /// i and i + D/2.
    Halves,
}

/// What is done to the query and key heads of a row before attention.
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// Angular frequencies, [D/2], in radians a position.
    pub frequencies: &'a [f32],
    /// Which channels turn together.
    pub pairs: Pairs,
    /// RMS-norm weights of query heads and of key heads, D each, and epsilon: applied before the rotation.
    pub norms: Option<(&'a [f32], &'a [f32], f32)>,
}

/// Normalises (where the model does) and rotates the first `heads` query heads and the `kv_heads` key heads after them,
/// in place; row r of `fused` (`stride` floats) is at `position(r)`.
///
/// # Panics
/// Where rows are shorter than their heads.
pub fn rotate(
    pool: &Pool,
    rotary: Rotary<'_>,
    fused: &mut [f32],
    stride: usize,
    (heads, kv_heads): (usize, usize),
    position: &(dyn Fn(usize) -> usize + Sync),
) {
    let half = rotary.frequencies.len();
    for_rows(pool, fused, stride, &|first, rows| {
        let mut turns = [(0.0f32, 0.0f32); thinkey_core::MAX_HEAD_DIM / 2];
        let turns = &mut turns[..half];
        for (row, data) in rows.chunks_exact_mut(stride).enumerate() {
            let position = position(first + row) as f32;
            for (turn, frequency) in turns.iter_mut().zip(rotary.frequencies) {
                *turn = (position * frequency).sin_cos();
            }
            for (head, x) in data.chunks_exact_mut(2 * half).take(heads + kv_heads).enumerate() {
                if let Some((query, key, eps)) = rotary.norms {
                    let scale = inverse_rms(Portable, x, eps);
                    let weight = if head < heads { query } else { key };
                    x.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * scale * weight);
                }
                match rotary.pairs {
                    Pairs::Adjacent => {
                        for (pair, &(sin, cos)) in x.as_chunks_mut::<2>().0.iter_mut().zip(&*turns) {
                            let [a, b] = *pair;
                            *pair = [a * cos - b * sin, a * sin + b * cos];
                        }
                    }
                    Pairs::Halves => {
                        let (low, high) = x.split_at_mut(half);
                        for ((a, b), &(sin, cos)) in low.iter_mut().zip(high).zip(&*turns) {
                            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                        }
                    }
                }
            }
        }
    });
}

/// The gated activation: `out[r][c] = silu(x[r][c]) · x[r][F + c]`, x being [rows, 2F] and `out` [rows, F].
///
/// # Panics
/// Where `x` is not twice as long as `out`, or `out` no whole number of rows of `len` = F.
pub fn gated_silu(pool: &Pool, level: Level, x: &[f32], len: usize, out: &mut [f32]) {
    assert_eq!(x.len(), 2 * out.len(), "the output has another shape");
    assert!(out.len().is_multiple_of(len), "{} floats are no rows of {len}", out.len());
    for_rows(pool, out, len, &|first, out| {
        level.dispatch(Gate { x: &x[2 * first * len..][..2 * out.len()], len, out });
    });
}

struct Gate<'a> {
    x: &'a [f32],
    len: usize,
    out: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, out) in self.x.chunks_exact(2 * self.len).zip(self.out.chunks_exact_mut(self.len)) {
            let (gate, up) = x.split_at(self.len);
            let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks::<LANES>(), up.as_chunks::<LANES>());
            let (out, out_rest) = out.as_chunks_mut::<LANES>();
            for ((gate, up), out) in gate.iter().zip(up).zip(out) {
                simd.store(gated(simd, simd.load(gate), simd.load(up)), out);
            }
            let rest = gated(simd, simd.load_part(gate_rest, 0.0), simd.load_part(up_rest, 0.0));
            simd.store_part(rest, out_rest);
        }
    }
}

/// gate / (1 + e^-gate) · up.
#[inline(always)]
fn gated<S: Simd>(simd: S, gate: S::F32, up: S::F32) -> S::F32 {
    let e = exponential(simd, simd.mul(gate, simd.splat(-1.0)));
    simd.mul(simd.div(gate, simd.add(simd.splat(1.0), e)), up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(ours: &[f32], theirs: impl IntoIterator<Item = f64>) -> Result<(), TestCaseError> {
        for (a, b) in ours.iter().zip(theirs) {
            prop_assert!((f64::from(*a) - b).abs() <= 2e-5 * b.abs().max(1.0), "{a} instead of {b}");
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn norm_and_gate_equal_their_formulas(
            len in 1usize..70,
            rows in 1usize..40,
            threads in 1usize..4,
            values in prop::collection::vec(-20.0f32..20.0, 70 * 40 * 2),
        ) {
            let pool = Pool::new(threads).unwrap();
            let (x, weight) = (&values[..rows * len], &values[values.len() - len..]);
            for level in Level::available() {
                let mut out = vec![0.0; rows * len];
                rms_norm(&pool, level, x, weight, 1e-5, &mut out);
                for (x, out) in x.chunks(len).zip(out.chunks(len)) {
                    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / len as f64;
                    let scale = 1.0 / (mean + 1e-5).sqrt();
                    close(out, x.iter().zip(weight).map(|(x, w)| f64::from(*x) * scale * f64::from(*w)))?;
                }
                let x = &values[..2 * rows * len];
                gated_silu(&pool, level, x, len, &mut out);
                for (x, out) in x.chunks(2 * len).zip(out.chunks(len)) {
                    let silu = |x: f32| f64::from(x) / (1.0 + (-f64::from(x)).exp());
                    close(out, (0..len).map(|c| silu(x[c]) * f64::from(x[len + c])))?;
                }
            }
        }

        #[test]
        fn rotation_equals_complex_multiplication(
            values in prop::collection::vec(-2.0f32..2.0, 3 * 40),
            position in 0usize..5000,
        ) {
            // Rows of two query heads, one key head and one value head of eight channels, and some more.
            let frequencies = [1.0, 0.1, 0.01, 0.001];
            let pool = Pool::new(2).unwrap();
            let norms = [0.5f32; 8];
            for pairs in [Pairs::Adjacent, Pairs::Halves] {
                for norms in [None, Some((&norms[..], &norms[..], 1e-6))] {
                    let mut ours = values.clone();
                    let rotary = Rotary { frequencies: &frequencies, pairs, norms };
                    rotate(&pool, rotary, &mut ours, 40, (2, 1), &|row| position + row);
                    for (row, (ours, x)) in ours.chunks(40).zip(values.chunks(40)).enumerate() {
                        for head in 0..3 {
                            let x = &x[head * 8..][..8];
                            let scale = norms.map_or(1.0, |_| {
                                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 8.0;
                                0.5 / (mean + 1e-6).sqrt()
                            });
                            for (pair, frequency) in frequencies.iter().enumerate() {
                                let (a, b) = match pairs {
                                    Pairs::Adjacent => (2 * pair, 2 * pair + 1),
                                    Pairs::Halves => (pair, pair + 4),
                                };
                                let angle = f64::from((position + row) as f32 * frequency);
                                let (re, im) = (f64::from(x[a]) * scale, f64::from(x[b]) * scale);
                                let turned = [re * angle.cos() - im * angle.sin(), re * angle.sin() + im * angle.cos()];
                                close(&[ours[head * 8 + a], ours[head * 8 + b]], turned)?;
                            }
                        }
                        prop_assert_eq!(&ours[24..], &x[24..]);
                    }
                }
            }
        }
    }
}
