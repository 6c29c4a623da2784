//! Linear layers over quantised weights: out = x·Wᵀ + bias.
//!
//! Weights are read in the format of their file. A few rows of x (decoding) go through dot products, which stream the
//! weights once and are bound by memory or by unpacking; more of them (prefill) go through panels: 32 rows of weights
//! at a time are dequantised and multiplied with every row of x.
//!
//! [`Activations`] says in what numbers: `f32` throughout, weights dequantised in registers or in a panel that stays in
//! the L2 cache; or x in eight bits and sums of integers, where the format has codes.

/// Runs `$body` for rows of x, `$m` in all, from row `$first` on with the constant `$M`, how many they are: as many as
/// have registers share what is unpacked of the weights, or one at a time where `$S` is a [`Simd`](super::simd::Simd) that
/// does not [share](super::simd::Simd::SHARES).
macro_rules! shared_rows {
    ($S:ty, $m:expr, ($M:ident, $first:ident) => $body:expr) => {
        if <$S as Simd>::SHARES {
            let (mut $first, m) = (0, $m);
            while $first < m {
                $first += match m - $first {
                    1 => {
                        const $M: usize = 1;
                        $body;
                        $M
                    }
                    2 | 3 => {
                        const $M: usize = 2;
                        $body;
                        $M
                    }
                    _ => {
                        const $M: usize = 4;
                        $body;
                        $M
                    }
                };
            }
        } else {
            for $first in 0..$m {
                const $M: usize = 1;
                $body
            }
        }
    };
}

mod ahead;
mod dot;
mod integer;
mod integer_panel;
mod panel;
mod quantise;

use super::aligned::AlignedVec;
use super::pool::Pool;
use super::simd::Level;
use crate::format::{Matrix, PAIR};
use quantise::{PanelRows, Segment};
use std::sync::Mutex;

/// Rows of x up to which dot products are faster than panels: two groups of four, each of which unpacks the weights
/// once, against unpacking them once, transposing and storing them.
const DOT_ROWS: usize = 8;

/// One or more weight matrices of as many columns, stacked along their rows: layers that read the same input (query,
/// key and value; gate and up) run as one. The parts may differ in format.
#[derive(Clone, Debug)]
pub struct Linear {
    parts: Vec<Matrix>,
    rows: usize,
    cols: usize,
    bias: Option<Vec<f32>>,
}

/// Why matrices cannot be a [`Linear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinearError {
    /// No matrix, or none with a row and a column.
    #[error("a linear layer needs a matrix with at least one row and one column")]
    Empty,
    /// The matrices do not take the same input.
    #[error("a matrix of {actual} columns cannot be stacked on one of {expected}")]
    Columns {
        /// Columns of the first matrix.
        expected: usize,
        /// Columns of the one that differs.
        actual: usize,
    },
    /// The bias does not fit the rows.
    #[error("a bias of {actual} values does not fit {expected} rows")]
    Bias {
        /// Rows of all matrices.
        expected: usize,
        /// Length of the bias.
        actual: usize,
    },
}

/// In what numbers a linear layer reads its input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// As they are, in `f32`.
    Exact,
    /// In eight bits with a scale for every few, where that is faster and the format
    /// [has codes](crate::format::WeightFormat::has_codes): for a few rows everywhere, a scale for every four; for many
    /// rows where a byte product is one instruction (VNNI), a scale for every sixteen. An activation is off by at most
    /// 1/254 of the largest that shares its scale, so an output by at most Σ |w| · largest / 254. After 1,200 tokens the
    /// distribution of SmolLM2-135M's next token diverges from the exact one by less than 1e-3 nats, whatever share of
    /// channels is pruned; with a scale for every 32, as ggml has, it was 2e-3.
    #[default]
    Int8,
}

impl Activations {
    /// The name people choose it by.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Int8 => "int8",
        }
    }
}

/// How [`Linear::forward`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// The instructions.
    pub level: Level,
    /// The numbers.
    pub activations: Activations,
}

/// What [`Linear::forward`] does with its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Overwrites the output.
    Store,
    /// Adds to the output: a residual connection.
    Add,
}

/// Buffers of [`Linear::forward`], one set for any number of layers. They grow to what the largest layer needs and
/// are not allocated again until they [rest](LinearScratch::rest).
#[derive(Debug, Default)]
pub struct LinearScratch {
    /// x with its rows padded, where their length is no whole number of vectors.
    x: AlignedVec,
    /// x in eight bits: 896 bytes for every 256 activations of a row, or part of them.
    quantised: Vec<Segment>,
    /// Many rows of x in eight bits: 1.5 bytes for every activation.
    quantised_rows: PanelRows,
    /// One a thread of the pool. The locks are never contended: they are what makes the access safe.
    panels: Vec<Mutex<Panels>>,
}

/// Panels of one thread.
#[derive(Debug, Default)]
struct Panels {
    floats: panel::Scratch,
    integers: integer_panel::Scratch,
}

impl LinearScratch {
    /// Gives back what only many rows of x need.
    pub fn rest(&mut self) {
        self.quantised_rows = PanelRows::default();
        self.panels = Vec::new();
    }

    /// Most bytes of these buffers, for layers of `cols` columns and up to `rows` rows of x at once on `threads` threads.
    #[must_use]
    pub fn bytes(threads: usize, rows: usize, cols: &[usize]) -> usize {
        let padded =
            cols.iter().filter(|cols| !cols.is_multiple_of(PAIR)).map(|cols| cols.next_multiple_of(PAIR)).max();
        let widest = cols.iter().copied().max().unwrap_or(0);
        let few = rows.min(DOT_ROWS);
        let x = AlignedVec::bytes(few * padded.unwrap_or(0)) + quantise::bytes(few, widest);
        if rows <= DOT_ROWS {
            return x;
        }
        let panels = panel::Scratch::bytes(widest) + integer_panel::Scratch::bytes(widest);
        x + PanelRows::bytes(rows, widest) + threads * (size_of::<Mutex<Panels>>() + panels)
    }
}

/// A contiguous run of rows of one part: the unit of work.
struct Chunk<'a> {
    matrix: &'a Matrix,
    /// First row in the matrix.
    first: usize,
    count: usize,
    /// First row in the layer: the column of the output.
    column: usize,
    bias: Option<&'a [f32]>,
    /// The weights that the same thread will likely read after these.
    next: &'a [u8],
}

/// The output, [m, `stride`] floats: shared by tasks that own disjoint columns.
#[derive(Clone, Copy)]
struct Output {
    data: *mut f32,
    stride: usize,
    m: usize,
    mode: Mode,
}

// SAFETY: the tasks of a run write disjoint columns, and nobody else touches the output meanwhile: `forward` has it
// borrowed mutably.
unsafe impl Send for Output {}
// SAFETY: as for `Send`.
unsafe impl Sync for Output {}

impl Linear {
    /// A layer of `parts` stacked in their order, with a bias of as many values as they have rows together.
    ///
    /// # Errors
    /// [`LinearError`] where the parts do not fit together, the bias does not fit them, or there is nothing.
    pub fn new(parts: Vec<Matrix>, bias: Option<Vec<f32>>) -> Result<Self, LinearError> {
        let cols = parts.first().map_or(0, Matrix::cols);
        let rows = parts.iter().map(Matrix::rows).sum();
        if let Some(other) = parts.iter().find(|part| part.cols() != cols) {
            return Err(LinearError::Columns { expected: cols, actual: other.cols() });
        }
        if rows == 0 || cols == 0 {
            return Err(LinearError::Empty);
        }
        match &bias {
            Some(bias) if bias.len() != rows => Err(LinearError::Bias { expected: rows, actual: bias.len() }),
            _ => Ok(Self { parts, rows, cols, bias }),
        }
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

    /// The stacked matrices.
    #[must_use]
    pub fn parts(&self) -> &[Matrix] {
        &self.parts
    }

    /// The bias, one value a row.
    #[must_use]
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Bytes of weights that a pass reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes().len()).sum()
    }

    /// out = x·Wᵀ + bias for the m = `x.len() / cols` rows of x [m, cols]; out is [m, rows].
    ///
    /// The result of a row of x does not depend on the number of threads, nor, beyond rounding, on the other rows; with
    /// [`Activations::Int8`] it may on how many there are, within what quantising changes.
    ///
    /// # Panics
    /// Where `x` is no whole number of rows or `out` has another length than [m, rows].
    pub fn forward(
        &self,
        pool: &Pool,
        Arithmetic { level, activations }: Arithmetic,
        x: &[f32],
        out: &mut [f32],
        mode: Mode,
        scratch: &mut LinearScratch,
    ) {
        let m = x.len() / self.cols;
        assert_eq!(x.len(), m * self.cols, "x is no whole number of rows of {}", self.cols);
        assert_eq!(out.len(), m * self.rows, "the output of {m} rows of x is not [{m}, {}]", self.rows);
        let output = Output { data: out.as_mut_ptr(), stride: self.rows, m, mode };
        let integer = |part: &Matrix| activations == Activations::Int8 && part.format().has_codes();
        match m {
            0 => {}
            1..=DOT_ROWS => {
                let LinearScratch { x: buffer, quantised, .. } = scratch;
                let floats = if self.parts.iter().all(integer) { &[] } else { self.padded(x, buffer) };
                let segments = match self.parts.iter().any(integer) {
                    true => quantise::quantise(level, x, self.cols, quantised),
                    false => &[],
                };
                // Chunks that end on cache lines of the output; several a thread, so that one that is held up
                // leaves its share to the others.
                let chunk = match pool.threads() {
                    1 => self.rows,
                    threads => self.rows.div_ceil(8 * threads).next_multiple_of(16),
                };
                let chunks = self.chunks(chunk);
                pool.run(chunks, &|task| {
                    // Tasks are claimed in turns.
                    let next = (task + pool.threads() < chunks).then(|| self.chunk(chunk, task + pool.threads()));
                    let next = next.map_or(&[][..], |next| next.bytes().0);
                    let chunk = Chunk { next, ..self.chunk(chunk, task) };
                    // SAFETY: chunks are disjoint and `output` is the whole of `out`.
                    unsafe {
                        match integer(chunk.matrix) {
                            true => integer::run(level, &chunk, segments, output),
                            false => dot::run(level, &chunk, floats, output),
                        }
                    }
                });
            }
            _ => {
                let LinearScratch { quantised_rows, panels, .. } = scratch;
                panels.reserve_exact(pool.threads().saturating_sub(panels.len()));
                panels.resize_with(pool.threads().max(panels.len()), Mutex::default);
                let integer = |part: &Matrix| level.has_byte_products() && integer(part);
                if self.parts.iter().any(integer) {
                    quantised_rows.quantise(pool, level, x, self.cols);
                }
                pool.run_on_threads(self.chunks(panel::ROWS), &|task, thread| {
                    let mut scratch = panels[thread].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let chunk = self.chunk(panel::ROWS, task);
                    // SAFETY: chunks are disjoint and `output` is the whole of `out`.
                    unsafe {
                        match integer(chunk.matrix) {
                            true => {
                                integer_panel::run(level, &chunk, quantised_rows, output, &mut scratch.integers);
                            }
                            false => panel::run(level, &chunk, x, output, &mut scratch.floats),
                        }
                    }
                });
            }
        }
    }

    /// Dequantises row `index` of the layer, bit for bit as ggml does: the lookup of an embedding. The bias is not
    /// added.
    ///
    /// # Panics
    /// Where `index` is not below [`rows`](Self::rows) or `out` has another length than [`cols`](Self::cols).
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.rows, "row {index} of a layer of {}", self.rows);
        let Chunk { matrix, first, .. } = self.chunk(1, index);
        matrix.format().dequantise_row(matrix.row(first), out);
    }

    /// x in pairs of vectors: as it is where rows are whole pairs, else padded with zeros.
    fn padded<'a>(&self, x: &'a [f32], buffer: &'a mut AlignedVec) -> &'a [[f32; PAIR]] {
        if self.cols.is_multiple_of(PAIR) {
            return x.as_chunks().0;
        }
        let padded = self.cols.next_multiple_of(PAIR);
        let len = x.len() / self.cols * padded;
        buffer.grow(len);
        for (to, from) in buffer.chunks_exact_mut(padded).zip(x.chunks_exact(self.cols)) {
            to[..self.cols].copy_from_slice(from);
            to[self.cols..].fill(0.0);
        }
        buffer[..len].as_chunks().0
    }

    /// Chunks of up to `size` rows; none spans two parts.
    fn chunks(&self, size: usize) -> usize {
        self.parts.iter().map(|part| part.rows().div_ceil(size)).sum()
    }

    /// Chunk `index` of [`chunks`](Self::chunks).
    fn chunk(&self, size: usize, mut index: usize) -> Chunk<'_> {
        let mut column = 0;
        for matrix in &self.parts {
            let chunks = matrix.rows().div_ceil(size);
            if index < chunks {
                let first = index * size;
                let (count, column) = (size.min(matrix.rows() - first), column + first);
                let bias = self.bias.as_deref().map(|bias| &bias[column..column + count]);
                return Chunk { matrix, first, count, column, bias, next: &[] };
            }
            index -= chunks;
            column += matrix.rows();
        }
        unreachable!("chunk {index} past the last")
    }
}

impl<'a> Chunk<'a> {
    /// The rows' bytes, and those of one.
    fn bytes(&self) -> (&'a [u8], usize) {
        let row = self.matrix.bytes().len() / self.matrix.rows();
        (&self.matrix.bytes()[row * self.first..row * (self.first + self.count)], row)
    }
}

#[cfg(test)]
mod tests;
