//! Memory is asked for before it is read.

use super::simd::{LINE, Simd};
use std::slice::Iter;

/// Bytes that will be read soon, asked for bit by bit beside other work.
pub(super) struct Ahead<'a> {
    lines: Iter<'a, [u8; LINE]>,
    /// Lines at a time.
    count: usize,
}

impl<'a> Ahead<'a> {
    /// `bytes`, about `step` at a time.
    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], step: usize) -> Self {
        Self { lines: bytes.as_chunks().0.iter(), count: step.div_ceil(LINE) }
    }

    /// Asks for the next ones; says whether there were as many.
    #[inline(always)]
    pub(super) fn fetch<S: Simd>(&mut self, simd: S) -> bool {
        for _ in 0..self.count {
            let Some(line) = self.lines.next() else { return false };
            simd.prefetch(line);
        }
        true
    }
}
