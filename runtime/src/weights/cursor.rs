//! Bounds-checked little-endian reading.

use std::ops::Range;

/// A place in a file's bytes.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// The file ends before what its header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the header asks for {want} bytes at byte {at}, but the file has {have} in all: \
     cut off or damaged; download it again"
)]
pub struct Short {
    /// Where the reader stood.
    pub at: usize,
    /// Bytes it was told to read there.
    pub want: u64,
    /// Length of the file in bytes.
    pub have: usize,
}

impl<'a> Cursor<'a> {
    /// A cursor over `bytes` that starts at byte `at`.
    pub fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    /// Bytes before the cursor.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Bytes after the cursor.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Steps over `len` bytes and says where they lie. A length that overflowed on the way here is `None`.
    pub fn skip(&mut self, len: Option<u64>) -> Result<Range<usize>, Short> {
        let short = Short { at: self.at, want: len.unwrap_or(u64::MAX), have: self.bytes.len() };
        let len = len.and_then(|len| usize::try_from(len).ok()).filter(|&len| len <= self.remaining()).ok_or(short)?;
        let start = self.at;
        self.at += len;
        Ok(start..self.at)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let short = Short { at: self.at, want: N as u64, have: self.bytes.len() };
        let array = *self.bytes[self.at..].first_chunk().ok_or(short)?;
        self.at += N;
        Ok(array)
    }

    /// The next u32.
    pub fn u32(&mut self) -> Result<u32, Short> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next u64.
    pub fn u64(&mut self) -> Result<u64, Short> {
        self.array().map(u64::from_le_bytes)
    }

    /// The bytes of the next GGUF string: its length as u64, then the text.
    pub fn text(&mut self) -> Result<&'a [u8], Short> {
        let len = self.u64()?;
        self.skip(Some(len)).map(|range| &self.bytes[range])
    }
}
