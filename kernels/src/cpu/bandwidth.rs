//! How fast this machine reads memory: the limit of decoding, which reads every weight for every token.

use super::{
    pool::Pool,
    simd::{Kernel, Level, Simd},
};
use std::{
    sync::atomic::{AtomicU64, Ordering},
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
    let buffer: Vec<u64> = (0..bytes as u64 / 8).collect();
    let sum = AtomicU64::new(0);
    let mut best = 0.0f64;
    for _ in 0..passes {
        let start = Instant::now();
        pool.run(buffer.len().div_ceil(TASK / 8), &|task| {
            let part = &buffer[task * (TASK / 8)..buffer.len().min((task + 1) * (TASK / 8))];
            sum.fetch_xor(level.dispatch(Fold(part)), Ordering::Relaxed);
        });
        best = best.max(size_of_val(&buffer[..]) as f64 / start.elapsed().as_secs_f64());
    }
    // The sum is used, so the reads cannot be left out.
    std::hint::black_box(sum.into_inner());
    best
}

/// All words of a slice by exclusive or.
struct Fold<'a>(&'a [u64]);

impl Kernel for Fold<'_> {
    type Output = u64;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> u64 {
        let mut lanes = [0u64; 32];
        let (groups, rest) = self.0.as_chunks::<32>();
        for group in groups {
            for (lane, word) in lanes.iter_mut().zip(group) {
                *lane ^= word;
            }
        }
        lanes.iter().chain(rest).fold(0, |sum, word| sum ^ word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        let words: Vec<u64> = (0..1000).map(|i| i * 0x9E37_79B9).collect();
        let expected = words.iter().fold(0, |sum, word| sum ^ word);
        for level in Level::available() {
            assert_eq!(level.dispatch(Fold(&words)), expected);
        }
        assert!(read_bandwidth(&Pool::new(2).unwrap(), Level::best(), 3 << 20, 2) > 1e6);
    }
}
