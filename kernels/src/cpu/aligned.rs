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

    /// Grows to at least `len` floats; new ones are zero. Never shrinks, so a buffer allocates only until it has seen
    /// its largest use.
    pub fn grow(&mut self, len: usize) {
        let lines = len.div_ceil(16);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0.0; 16]));
        }
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
    fn it_grows_in_lines_and_keeps_its_floats() {
        let mut buffer = AlignedVec::default();
        assert!(buffer.is_empty());
        for len in [1, 16, 17, 1000, 3] {
            buffer.grow(len);
            assert!(buffer.len() >= len && buffer.len().is_multiple_of(16));
            assert!(buffer.as_ptr().addr().is_multiple_of(64));
            buffer[len - 1] = len as f32;
        }
        assert_eq!((buffer[0], buffer[2], buffer[15], buffer[16], buffer[999]), (1.0, 3.0, 16.0, 17.0, 1000.0));
        assert_eq!(buffer.iter().filter(|v| **v != 0.0).count(), 5);
        assert_eq!(AlignedVec::zeros(17).as_ref() as &[f32], [0.0; 32]);
    }
}
