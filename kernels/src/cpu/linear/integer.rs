//! Few rows of x in eight bits: integer dot products straight from the blocks.
//!
//! Products of four neighbours are summed as integers, exactly, and those sums are scaled as floats. So every level
//! gives the same result but for the rounding of those, and the result differs from that of [`dot`](super::dot) by what
//! quantising x changes.

use super::ahead::WeightsAhead;
use super::quantise::{Segment, segments};
use super::{Chunk, Mode, Output};
use crate::cpu::simd::{
    Level, Simd,
    bytes::{ByteKernel, Bytes},
};
use crate::format::codes::{CodeSink, CodeVisitor, Codes};

/// Computes the columns of `chunk`, whose format has codes, for every row of x.
///
/// # Safety
/// `output` is valid for reads and writes in the columns of `chunk`, which no other thread touches meanwhile.
pub(super) unsafe fn run(level: Level, chunk: &Chunk<'_>, x: &[Segment], output: Output) {
    level.dispatch_bytes(Dots { chunk, x, output });
}

/// The products of all rows of x; made by [`run`] only.
struct Dots<'a> {
    chunk: &'a Chunk<'a>,
    x: &'a [Segment],
    output: Output,
}

impl ByteKernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<B: Bytes>(self, bytes: B) {
        self.chunk.matrix.format().visit_codes(WithBytes(self, bytes));
    }
}

struct WithBytes<'a, B>(Dots<'a>, B);

impl<B: Bytes> CodeVisitor for WithBytes<'_, B> {
    type Output = ();

    #[inline(always)]
    fn visit<C: Codes>(self) {
        shared_rows!(B::Simd, self.0.output.m, (M, first) => self.rows::<C, M>(first));
    }
}

impl<B: Bytes> WithBytes<'_, B> {
    /// Rows `first`.. of x, `M` of them.
    #[inline(always)]
    fn rows<C: Codes, const M: usize>(&self, first: usize) {
        let &Self(Dots { chunk, x, output }, bytes) = self;
        let simd = bytes.simd();
        let segments = segments(chunk.matrix.cols());
        let x: [&[Segment]; M] = std::array::from_fn(|i| &x[segments * (first + i)..][..segments]);
        let zero = simd.splat(0.0);
        let (data, row_bytes) = chunk.bytes();
        let mut ahead = WeightsAhead::new(data, chunk.next, row_bytes);
        for (r, row) in data.chunks_exact(row_bytes).enumerate() {
            ahead.fetch(simd);
            let at = x.map(|row| &row[0]);
            let mut sums = Sums { bytes, x, at, scales: [zero; M], sums: [zero; M], mins: [zero; M] };
            C::codes(bytes, row, &mut sums);
            let bias = chunk.bias.map_or(0.0, |bias| bias[r]);
            for i in 0..M {
                let value = simd.sum(simd.add(sums.sums[i], bytes.upper(sums.mins[i]))) + bias;
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
struct Sums<'a, B: Bytes, const M: usize> {
    bytes: B,
    x: [&'a [Segment]; M],
    /// The segments at hand.
    at: [&'a Segment; M],
    /// Scales of weights, after them minima times sums of x.
    scales: [B::F32; M],
    sums: [B::F32; M],
    /// In lanes 8..16, minima times sums of x.
    mins: [B::F32; M],
}

impl<B: Bytes, const M: usize> Sums<'_, B, M> {
    /// Adds the products with a quarter of a segment of row i of x.
    #[inline(always)]
    fn add(&mut self, i: usize, quarter: usize, codes: B::Codes, offset: u8, scales: B::F32) {
        let (simd, x) = (self.bytes.simd(), &self.at[i].quarters[quarter]);
        let dot = self.bytes.dot(codes, offset, x);
        self.sums[i] = simd.fma(dot, simd.mul(scales, simd.load(&x.scales)), self.sums[i]);
    }
}

impl<B: Bytes, const M: usize> CodeSink<B> for Sums<'_, B, M> {
    #[inline(always)]
    fn blocks(&mut self, index: usize, affine: B::F32, has_min: bool) {
        let simd = self.bytes.simd();
        for i in 0..M {
            self.at[i] = &self.x[i][index];
            self.scales[i] = simd.mul(affine, simd.load(self.at[i].window(0)));
            if has_min {
                self.mins[i] = simd.add(self.mins[i], self.scales[i]);
            }
        }
    }

    #[inline(always)]
    fn half_blocks(&mut self, index: usize, scales: B::F32) {
        self.at = self.x.map(|x| &x[index]);
        self.scales = [scales; M];
    }

    #[inline(always)]
    fn codes<const QUARTER: usize>(&mut self, codes: B::Codes, offset: u8) {
        for i in 0..M {
            self.add(i, QUARTER, codes, offset, self.bytes.spread8::<QUARTER>(self.scales[i]));
        }
    }

    #[inline(always)]
    fn pair(&mut self, index: usize, quarter: usize, affine: B::F32, has_min: bool, codes: B::Codes, offset: u8) {
        let simd = self.bytes.simd();
        for i in 0..M {
            self.at[i] = &self.x[i][index];
            let scales = simd.mul(affine, simd.load(self.at[i].window(quarter)));
            if has_min {
                self.mins[i] = simd.add(self.mins[i], scales);
            }
            self.add(i, quarter, codes, offset, self.bytes.spread8::<0>(scales));
        }
    }

    #[inline(always)]
    fn half_block_codes<const QUARTER: usize>(&mut self, codes: B::Codes, offset: u8) {
        for i in 0..M {
            self.add(i, QUARTER, codes, offset, self.bytes.spread4::<QUARTER>(self.scales[i]));
        }
    }
}
