//! How fast this machine reads memory: the limit of decoding, which reads every weight for every token.

use super::{
    pool::Pool,
    simd::{Kernel, Level, Simd},
};
use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Bytes of a task.
const TASK: usize = 1 << 20;

/// Bytes a second that all threads of `pool` read together from a buffer of `bytes` (far more than the caches hold),
/// the best of `passes`.
///
/// # Panics
/// Where the system does not give the memory.
#[must_use]
pub fn read_bandwidth(pool: &Pool, level: Level, bytes: usize, passes: usize) -> f64 {
    // Written, so that the pages exist.
    let buffer = vec![1.0f32; bytes / 4];
    let sum = Mutex::new(0.0);
    let mut best = 0.0f64;
    for _ in 0..passes {
        let start = Instant::now();
        pool.run(buffer.len().div_ceil(TASK / 4), &|task| {
            let part = &buffer[task * (TASK / 4)..buffer.len().min((task + 1) * (TASK / 4))];
            *sum.lock().unwrap_or_else(PoisonError::into_inner) += level.dispatch(Sum(part));
        });
        best = best.max(size_of_val(&buffer[..]) as f64 / start.elapsed().as_secs_f64());
    }
    // The sum is used, so the reads cannot be left out.
    std::hint::black_box(sum);
    best
}

/// The sum of floats, in eight vectors: plain loops over words are compiled to gathers, a tenth as fast.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.splat(0.0); 8];
        let (vectors, rest) = self.0.as_chunks();
        let (groups, vectors) = vectors.as_chunks::<8>();
        for group in groups {
            for i in 0..8 {
                sums[i] = simd.add(sums[i], simd.load(&group[i]));
            }
        }
        for (i, vector) in vectors.iter().enumerate() {
            sums[i] = simd.add(sums[i], simd.load(vector));
        }
        sums.into_iter().map(|sum| simd.sum(sum)).sum::<f32>() + rest.iter().sum::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float_is_read() {
        for len in [0, 5, 1000, 1024, 1040] {
            let floats: Vec<f32> = (0..len).map(|i| (i % 7) as f32).collect();
            let expected = floats.iter().sum::<f32>();
            for level in Level::available() {
                assert_eq!(level.dispatch(Sum(&floats)), expected);
            }
        }
        assert!(read_bandwidth(&Pool::new(2).unwrap(), Level::best(), 3 << 20, 2) > 1e6);
    }
}
