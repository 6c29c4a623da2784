//! Few rows of x: dot products straight from the blocks.

use super::{Chunk, Mode, Output};
use crate::cpu::simd::{Kernel, LANES, Level, Simd};
use crate::format::{Decode, PAIR, Sink, Visitor};

/// Computes the columns of `chunk` for every row of x, padded to whole pairs.
///
/// # Safety
/// `output` is valid for reads and writes in the columns of `chunk`, which no other thread touches meanwhile.
pub(super) unsafe fn run(level: Level, chunk: &Chunk<'_>, x: &[[f32; PAIR]], output: Output) {
    let pairs = x.len() / output.m;
    let mut first = 0;
    while first < output.m {
        let rows = &x[pairs * first..];
        // Rows of x that share a dequantised block: as many as have registers.
        let taken = match output.m - first {
            1 => level.dispatch(Dots::<1>::new(chunk, rows, first, output)),
            2 => level.dispatch(Dots::<2>::new(chunk, rows, first, output)),
            3 => level.dispatch(Dots::<3>::new(chunk, rows, first, output)),
            _ => level.dispatch(Dots::<4>::new(chunk, rows, first, output)),
        };
        first += taken;
    }
}

/// The products of `M` rows of x; made by [`run`] only.
struct Dots<'a, const M: usize> {
    chunk: &'a Chunk<'a>,
    x: [&'a [[f32; PAIR]]; M],
    first: usize,
    output: Output,
}

impl<'a, const M: usize> Dots<'a, M> {
    fn new(chunk: &'a Chunk<'a>, rows: &'a [[f32; PAIR]], first: usize, output: Output) -> Self {
        let pairs = chunk.matrix.cols().div_ceil(PAIR);
        let x = std::array::from_fn(|i| &rows[pairs * i..pairs * (i + 1)]);
        Self { chunk, x, first, output }
    }
}

impl<const M: usize> Kernel for Dots<'_, M> {
    /// Rows of x done.
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        self.chunk.matrix.format().visit(WithSimd(self, simd));
        M
    }
}

struct WithSimd<'a, S, const M: usize>(Dots<'a, M>, S);

impl<S: Simd, const M: usize> Visitor for WithSimd<'_, S, M> {
    type Output = ();

    #[inline(always)]
    fn visit<D: Decode>(self) {
        let Self(Dots { chunk, x, first, output }, simd) = self;
        let (bytes, row_bytes) = chunk.bytes();
        for (r, row) in bytes.chunks_exact(row_bytes).enumerate() {
            let mut sums = Sums { simd, x, sums: [[simd.splat(0.0); 2]; M] };
            D::decode(simd, row, &mut sums);
            let bias = chunk.bias.map_or(0.0, |bias| bias[r]);
            for (i, [even, odd]) in sums.sums.into_iter().enumerate() {
                let value = simd.sum(simd.add(even, odd)) + bias;
                // SAFETY: row first + i < m, a column of the chunk.
                unsafe {
                    let out = output.data.add((first + i) * output.stride + chunk.column + r);
                    *out = if output.mode == Mode::Add { *out + value } else { value };
                }
            }
        }
    }
}

/// A row of weights times rows of x.
struct Sums<'a, S: Simd, const M: usize> {
    simd: S,
    x: [&'a [[f32; PAIR]]; M],
    /// Two a row of x: one alone would wait for its own latency.
    sums: [[S::F32; 2]; M],
}

impl<S: Simd, const M: usize> Sink<S> for Sums<'_, S, M> {
    #[inline(always)]
    fn pair(&mut self, index: usize, [even, odd]: [S::F32; 2]) {
        for i in 0..M {
            let (x, _) = self.x[i][index].as_chunks::<LANES>();
            self.sums[i][0] = self.simd.fma(even, self.simd.load(&x[0]), self.sums[i][0]);
            self.sums[i][1] = self.simd.fma(odd, self.simd.load(&x[1]), self.sums[i][1]);
        }
    }
}
