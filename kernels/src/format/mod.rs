//! Weight formats: how a row of a weight matrix lies in memory.
//!
//! Weights stay in the format of their file. A matrix is row-major, one row an output feature; a row is a
//! whole number of blocks. The block layouts are those of GGUF (ggml), little-endian.
//!
//! One file a format, each with one function: `Decode::decode` turns a row into vectors of sixteen weights. Compiled
//! for [`Portable`] it computes exactly what ggml's `dequantize_row_*` does; compiled for wider levels it is the inner
//! loop of the matrix products in [`cpu`](crate::cpu). Formats that are worth it also have `Codes::codes`, which hands
//! over integers for products with quantised activations.

mod blocks;
pub(crate) mod codes;
pub mod float;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

use crate::cpu::simd::{LANES, Portable, Simd};
use blocks::Blocks;
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

    /// Weights of a row of `bytes` into `out`, bit for bit as ggml computes them.
    ///
    /// # Panics
    /// Where `bytes` is not a row of `out.len()` weights.
    pub fn dequantise_row(self, bytes: &[u8], out: &mut [f32]) {
        struct Row<'a>(&'a [u8], &'a mut [f32]);
        impl Visitor for Row<'_> {
            type Output = ();

            #[inline(always)]
            fn visit<D: Decode>(mut self) {
                D::decode(Portable, self.0, &mut self);
            }
        }
        impl Sink<Portable> for Row<'_> {
            #[inline(always)]
            fn pair(&mut self, index: usize, weights: [[f32; LANES]; 2]) {
                let out = &mut self.1[PAIR * index..];
                let len = out.len().min(PAIR);
                out[..len].copy_from_slice(&weights.as_flattened()[..len]);
            }
        }
        let expected = self.row_bytes(out.len());
        assert_eq!(Some(bytes.len()), expected, "bytes of a row of {} {} weights", out.len(), self.name());
        self.visit(Row(bytes, out));
    }

    /// Calls `visitor` with the decoder of the format.
    #[inline(always)]
    pub(crate) fn visit<V: Visitor>(self, visitor: V) -> V::Output {
        match self {
            Self::F32 => visitor.visit::<float::F32>(),
            Self::F16 => visitor.visit::<float::F16>(),
            Self::Bf16 => visitor.visit::<float::Bf16>(),
            Self::Q8_0 => visitor.visit::<Blocks<q8_0::Q8_0, 34>>(),
            Self::Q4_0 => visitor.visit::<Blocks<q4_0::Q4_0, 18>>(),
            Self::Q4_1 => visitor.visit::<Blocks<q4_1::Q4_1, 20>>(),
            Self::Q5_0 => visitor.visit::<Blocks<q5_0::Q5_0, 22>>(),
            Self::Q5_1 => visitor.visit::<Blocks<q5_1::Q5_1, 24>>(),
            Self::Q4K => visitor.visit::<q4_k::Q4K>(),
            Self::Q5K => visitor.visit::<q5_k::Q5K>(),
            Self::Q6K => visitor.visit::<q6_k::Q6K>(),
        }
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

/// Most bytes of weights that devices dequantise at once, for products with many rows.
pub const PART: usize = 32 << 20;

/// Weights of the pair of vectors that decoders hand over at a time.
pub(crate) const PAIR: usize = 2 * LANES;

/// What becomes of decoded weights. A trait and no closure, because only a method can insist on being inlined, and
/// code that is not is compiled without the instructions of its level.
pub(crate) trait Sink<S: Simd> {
    /// Takes the weights 32·`index`..32·`index` + 32 of a row; `#[inline(always)]`.
    fn pair(&mut self, index: usize, weights: [S::F32; 2]);
}

/// Turns rows of one format into vectors.
pub(crate) trait Decode {
    /// Hands the weights 32i..32i + 32 of `row` to `sink` for every i, ascending from 0. Where the columns are no
    /// multiple of 32 (float formats only), the last pair of vectors ends in zeros.
    fn decode<S: Simd>(simd: S, row: &[u8], sink: &mut impl Sink<S>);
}

/// Code that is generic over the format of a matrix, see [`WeightFormat::visit`].
pub(crate) trait Visitor {
    /// What it computes.
    type Output;

    /// The computation for one format; `#[inline(always)]`, so that it is compiled for the caller's instruction set.
    fn visit<D: Decode>(self) -> Self::Output;
}

/// `N` bytes from `at`; inlined with a constant `at`, the bounds check is gone.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("a part of a block")
}

/// `value`, in memory. A load spreads a float over a register or widens bytes to integers on its way; a value that the
/// compiler keeps in registers is shuffled apart, on the one port that unpacking is bound by.
#[inline(always)]
fn in_memory<T>(value: &T) -> &T {
    std::hint::black_box(value)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Kernel, Level};

    /// Weights of each format in the golden file.
    const GOLDEN: usize = 512;

    /// For every format its name, random blocks and the values that the `gguf` package computes; `golden.py` wrote it.
    fn golden() -> impl Iterator<Item = (WeightFormat, &'static [u8], Vec<f32>)> {
        let mut file: &[u8] = include_bytes!("golden.bin");
        WeightFormat::ALL.into_iter().map(move |format| {
            let (bytes, rest) = file.split_at(format.row_bytes(GOLDEN).unwrap());
            let (values, rest) = rest.split_at(4 * GOLDEN);
            file = rest;
            (format, bytes, values.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        })
    }

    #[test]
    fn dequantised_rows_equal_those_of_the_gguf_package_bit_for_bit() {
        for (format, bytes, expected) in golden() {
            let mut actual = vec![f32::NAN; GOLDEN];
            format.dequantise_row(bytes, &mut actual);
            for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
                assert_eq!(a.to_bits(), e.to_bits(), "{} weight {i}: {a} for {e}", format.name());
            }
        }
        assert_eq!(golden().count(), WeightFormat::ALL.len());
    }

    struct Decoded<'a>(WeightFormat, &'a [u8]);
    struct At<'a, S>(S, &'a [u8]);
    struct Collect<S>(S, Vec<f32>);

    impl<S: Simd> Sink<S> for Collect<S> {
        #[inline(always)]
        fn pair(&mut self, index: usize, weights: [S::F32; 2]) {
            assert_eq!(self.1.len(), PAIR * index, "pairs come in order");
            for vector in weights {
                let mut lanes = [0.0; LANES];
                self.0.store(vector, &mut lanes);
                self.1.extend(lanes);
            }
        }
    }

    impl<S: Simd> Visitor for At<'_, S> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn visit<D: Decode>(self) -> Self::Output {
            let mut sink = Collect(self.0, Vec::new());
            D::decode(self.0, self.1, &mut sink);
            sink.1
        }
    }

    impl Kernel for Decoded<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            self.0.visit(At(simd, self.1))
        }
    }

    #[test]
    fn every_level_decodes_to_within_one_rounding() {
        for (format, bytes, expected) in golden() {
            for level in Level::available() {
                let actual = level.dispatch(Decoded(format, bytes));
                assert_eq!(actual.len(), GOLDEN);
                // A fused product and sum rounds once: the other's rounding is relative to the larger operand.
                let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (a, e) in actual.iter().zip(&expected) {
                    assert!((a - e).abs() <= 1e-6 * scale, "{} {}: {a} for {e}", level.name(), format.name());
                }
            }
        }
    }

    #[test]
    fn float_rows_may_have_any_length() {
        for len in 0..40 {
            let bytes: Vec<u8> = (0..len).flat_map(|i| (i as f32 - 7.5).to_le_bytes()).collect();
            let mut out = vec![0.0; len];
            WeightFormat::F32.dequantise_row(&bytes, &mut out);
            assert!(out.iter().enumerate().all(|(i, v)| *v == i as f32 - 7.5));
        }
    }

    #[test]
    #[should_panic(expected = "bytes of a row of 64 Q4_1 weights")]
    fn a_short_row_is_refused() {
        WeightFormat::Q4_1.dequantise_row(&[0; 39], &mut [0.0; 64]);
    }

    #[test]
    fn matrices_check_their_shape() {
        let bytes = |n| Bytes::from(vec![0; n]);
        let matrix = Matrix::new(WeightFormat::Q8_0, 3, 64, bytes(204)).unwrap();
        assert_eq!(matrix.row(2).len(), 68);
        let error = Matrix::new(WeightFormat::Q8_0, 3, 65, bytes(204)).unwrap_err();
        assert_eq!(error, MatrixError::Columns { format: WeightFormat::Q8_0, cols: 65 });
        let error = Matrix::new(WeightFormat::Q8_0, usize::MAX, 64, bytes(204)).unwrap_err();
        assert_eq!(error.to_string(), format!("a {0}×64 Q8_0 matrix takes {0} bytes, not 204", usize::MAX));
    }
}
