//! Few rows of x: dot products straight from the blocks.

use super::ahead::WeightsAhead;
use super::{Chunk, Mode, Output};
use crate::cpu::simd::{Kernel, LANES, Level, Simd};
use crate::format::{Decode, PAIR, Sink, Visitor};

/// Computes the columns of `chunk` for every row of x, padded to whole pairs.
///
/// # Safety
/// `output` is valid for reads and writes in the columns of `chunk`, which no other thread touches meanwhile.
pub(super) unsafe fn run(level: Level, chunk: &Chunk<'_>, x: &[[f32; PAIR]], output: Output) {
    level.dispatch(Dots { chunk, x, output });
}

/// The products of all rows of x; made by [`run`] only.
struct Dots<'a> {
    chunk: &'a Chunk<'a>,
    x: &'a [[f32; PAIR]],
    output: Output,
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.chunk.matrix.format().visit(WithSimd(self, simd));
    }
}

struct WithSimd<'a, S>(Dots<'a>, S);

impl<S: Simd> Visitor for WithSimd<'_, S> {
    type Output = ();

    #[inline(always)]
    fn visit<D: Decode>(self) {
        shared_rows!(S, self.0.output.m, (M, first) => self.rows::<D, M>(first));
    }
}

impl<S: Simd> WithSimd<'_, S> {
    /// Rows `first`.. of x, `M` of them.
    #[inline(always)]
    fn rows<D: Decode, const M: usize>(&self, first: usize) {
        let &Self(Dots { chunk, x, output }, simd) = self;
        let pairs = chunk.matrix.cols().div_ceil(PAIR);
        let x: [&[[f32; PAIR]]; M] = std::array::from_fn(|i| &x[pairs * (first + i)..][..pairs]);
        let (bytes, row_bytes) = chunk.bytes();
        let mut ahead = WeightsAhead::new(bytes, chunk.next, row_bytes);
        for (r, row) in bytes.chunks_exact(row_bytes).enumerate() {
            ahead.fetch(simd);
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
