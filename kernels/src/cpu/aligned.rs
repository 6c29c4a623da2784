//! Float buffers on cache-line boundaries, where a 64-byte load touches one line and not two.

use std::ops::{Deref, DerefMut};

/// One cache line, one AVX-512 register.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A buffer of floats that starts on a cache line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AlignedVec {
    lines: Vec<Line>,
}

impl AlignedVec {
    /// `len` zeros, rounded up to whole lines.
    #[must_use]
    pub fn zeros(len: usize) -> Self {
        Self { lines: vec![Line([0.0; 16]); len.div_ceil(16)] }
    }

    /// Makes room for at least `len` floats, whose contents are old or zero. Never shrinks, so a buffer allocates only
    /// until it has seen its largest use, and then it has exactly [`bytes`](Self::bytes): what it held is given back
    /// before, not copied.
    pub fn grow(&mut self, len: usize) {
        if self.len() < len {
            self.lines = Vec::new();
            *self = Self::zeros(len);
        }
    }

    /// Bytes of a buffer of `len` floats.
    #[must_use]
    pub const fn bytes(len: usize) -> usize {
        len.div_ceil(16) * size_of::<Line>()
    }
}

impl Deref for AlignedVec {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: a `Line` is sixteen floats without padding (`repr(C)`, 64 bytes of size and alignment), so the
        // lines are 16 · lines initialised floats in a row, borrowed as long as `self`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), 16 * self.lines.len()) }
    }
}

impl DerefMut for AlignedVec {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), 16 * self.lines.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_in_lines_to_what_its_largest_use_takes() {
        let mut buffer = AlignedVec::default();
        assert!(buffer.is_empty());
        for len in [1, 16, 17, 1000, 3] {
            buffer.grow(len);
            assert!(buffer.len() >= len && buffer.len().is_multiple_of(16));
            assert!(buffer.as_ptr().addr().is_multiple_of(64));
            buffer[len - 1] = len as f32;
        }
        assert_eq!((buffer[2], buffer[999]), (3.0, 1000.0), "a smaller use changes nothing");
        assert_eq!(buffer.lines.capacity() * 64, AlignedVec::bytes(1000));
        assert_eq!(AlignedVec::zeros(17).as_ref() as &[f32], [0.0; 32]);
    }
}
