//! Weight formats: how a row of a weight matrix lies in memory.
//!
//! Weights stay in the format of their file. A matrix is row-major, one row an output feature; a row is a
//! whole number of blocks. The block layouts are those of GGUF (ggml), little-endian.

use bytes::Bytes;

/// Storage format of a weight matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightFormat {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 weights: f16 scale, 32 × i8.
    Q8_0,
    /// 32 weights: f16 scale, 32 × 4 bits, offset 8.
    Q4_0,
    /// 32 weights: f16 scale, f16 minimum, 32 × 4 bits.
    Q4_1,
    /// 32 weights: f16 scale, 32 high bits, 32 × 4 bits, offset 16.
    Q5_0,
    /// 32 weights: f16 scale, f16 minimum, 32 high bits, 32 × 4 bits.
    Q5_1,
    /// 256 weights: super-block of 8 × 32 with 6-bit scales and minima, 4 bits.
    Q4K,
    /// 256 weights: super-block of 8 × 32 with 6-bit scales and minima, 5 bits.
    Q5K,
    /// 256 weights: super-block of 16 × 16 with 8-bit scales, 6 bits.
    Q6K,
}

impl WeightFormat {
    /// Every format, in the order of their declaration.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Weights in one block.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` weights; `None` where `cols` is not a whole number of blocks or the product
    /// overflows.
    #[must_use]
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The name people know the format by, as GGUF spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }
}

/// A weight matrix in the format of its file: `rows` output features of `cols` inputs each.
///
/// The bytes are shared, not copied: they usually are a slice of a memory-mapped file, of any alignment.
#[derive(Clone, Debug)]
pub struct Matrix {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

/// Why bytes cannot be a [`Matrix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// A row is not a whole number of blocks.
    #[error("{cols} columns are not a whole number of {} blocks of {}", format.name(), format.block_len())]
    Columns {
        /// Format of the matrix.
        format: WeightFormat,
        /// Columns asked for.
        cols: usize,
    },
    /// The byte count does not fit the shape.
    #[error("a {rows}×{cols} {} matrix takes {expected} bytes, not {actual}", format.name())]
    Length {
        /// Format of the matrix.
        format: WeightFormat,
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Bytes that the shape takes (saturated on overflow).
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
}

impl Matrix {
    /// A `rows` × `cols` matrix over `bytes`.
    ///
    /// # Errors
    /// [`MatrixError`] where `cols` is no whole number of blocks or `bytes` has another length than the shape.
    pub fn new(format: WeightFormat, rows: usize, cols: usize, bytes: Bytes) -> Result<Self, MatrixError> {
        let row = format.row_bytes(cols).ok_or(MatrixError::Columns { format, cols })?;
        let expected = row.saturating_mul(rows);
        if expected != bytes.len() {
            let actual = bytes.len();
            return Err(MatrixError::Length { format, rows, cols, expected, actual });
        }
        Ok(Self { format, rows, cols, bytes })
    }

    /// Storage format.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All bytes, row after row.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of row `row`.
    ///
    /// # Panics
    /// Where `row` is not below [`rows`](Self::rows).
    #[must_use]
    pub fn row(&self, row: usize) -> &[u8] {
        let len = self.bytes.len() / self.rows;
        &self.bytes[row * len..(row + 1) * len]
    }
}
