//! Many rows of x: 32 rows of weights are dequantised and transposed into a panel, then multiplied with all of x.

use super::{Chunk, Mode, Output};
use crate::cpu::aligned::AlignedVec;
use crate::cpu::gemm::{PANEL, Shape, Strided, gemm_panel_raw};
use crate::cpu::simd::{Kernel, LANES, Level, Simd};
use crate::format::{Decode, PAIR, Sink, Visitor};

/// Rows of weights in a chunk.
pub(super) const ROWS: usize = PANEL;

/// Columns of weights in a panel at a time: 256 KiB of floats, which stay in an L2 cache of 512 KiB.
const DEPTH: usize = 2048;

/// Columns that are dequantised before they are transposed, sixteen rows of them in the L1 cache. A multiple of every
/// block length.
const STEP: usize = 256;

/// Buffers of one thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// [columns][32 rows].
    panel: AlignedVec,
    /// [16 rows][[`STEP`]].
    rows: AlignedVec,
}

impl Scratch {
    /// Bytes of the buffers of one thread for layers of up to `cols` columns.
    pub(super) const fn bytes(cols: usize) -> usize {
        let depth = if cols < DEPTH { cols.next_multiple_of(PAIR) } else { DEPTH };
        AlignedVec::bytes(depth * PANEL) + AlignedVec::bytes(LANES * STEP)
    }
}

/// Computes the columns of `chunk`, at most [`ROWS`], for every row of `x`.
///
/// # Safety
/// `output` is valid for reads and writes in the columns of `chunk`, which no other thread touches meanwhile.
pub(super) unsafe fn run(level: Level, chunk: &Chunk<'_>, x: &[f32], output: Output, scratch: &mut Scratch) {
    let cols = chunk.matrix.cols();
    let Output { data, stride, m, mode } = output;
    // SAFETY: the first column of the chunk is inside of the first row.
    let out = unsafe { data.add(chunk.column) };
    let mut accumulate = mode == Mode::Add;
    if let Some(bias) = chunk.bias {
        for row in 0..m {
            for (i, bias) in bias.iter().enumerate() {
                // SAFETY: a row of the output, a column of the chunk.
                unsafe {
                    let out = out.add(row * stride + i);
                    *out = if accumulate { *out + bias } else { *bias };
                }
            }
        }
        accumulate = true;
    }
    for start in (0..cols).step_by(DEPTH) {
        let depth = DEPTH.min(cols - start);
        level.dispatch(Pack { chunk, start, depth, scratch: &mut *scratch });
        let shape = Shape { m, k: depth, n: chunk.count };
        let (a, b) = (Strided { data: &x[start..], stride: cols }, Strided { data: &scratch.panel, stride: PANEL });
        // SAFETY: the caller's promise.
        unsafe { gemm_panel_raw(level, shape, a, b, out, stride, accumulate) };
        accumulate = true;
    }
}

/// Fills the panel with columns start..start + depth of the chunk.
struct Pack<'a> {
    chunk: &'a Chunk<'a>,
    start: usize,
    depth: usize,
    scratch: &'a mut Scratch,
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.chunk.matrix.format().visit(WithSimd(self, simd));
    }
}

struct WithSimd<'a, S>(Pack<'a>, S);

impl<S: Simd> Visitor for WithSimd<'_, S> {
    type Output = ();

    #[inline(always)]
    fn visit<D: Decode>(self) {
        let Self(Pack { chunk, start, depth, scratch }, simd) = self;
        let Scratch { panel, rows } = scratch;
        panel.grow(depth.next_multiple_of(PAIR) * PANEL);
        rows.grow(LANES * STEP);
        let format = chunk.matrix.format();
        let (bytes, row_bytes) = chunk.bytes();
        let offset = |column: usize| column / format.block_len() * format.block_bytes();
        for half in 0..chunk.count.div_ceil(LANES) {
            let first = half * LANES;
            let count = LANES.min(chunk.count - first);
            rows[count * STEP..LANES * STEP].fill(0.0);
            for step in (0..depth).step_by(STEP) {
                let len = STEP.min(depth - step);
                let range = offset(start + step)..offset(start + step + len);
                for (r, row) in bytes.chunks_exact(row_bytes).skip(first).take(count).enumerate() {
                    let (out, _) = rows[r * STEP..(r + 1) * STEP].as_chunks_mut();
                    D::decode(simd, &row[range.clone()], &mut Store { simd, out });
                }
                let (vectors, _) = rows.as_chunks();
                for block in 0..len.div_ceil(LANES) {
                    let mut square = [simd.splat(0.0); LANES];
                    for r in 0..LANES {
                        square[r] = simd.load(&vectors[r * (STEP / LANES) + block]);
                    }
                    let square = simd.transpose(square);
                    let (out, _) = panel[(step + LANES * block) * PANEL..].as_chunks_mut();
                    for c in 0..LANES {
                        simd.store(square[c], &mut out[c * (PANEL / LANES) + half]);
                    }
                }
            }
        }
    }
}

/// Decoded weights, to memory.
struct Store<'a, S> {
    simd: S,
    out: &'a mut [[f32; LANES]],
}

impl<S: Simd> Sink<S> for Store<'_, S> {
    #[inline(always)]
    fn pair(&mut self, index: usize, [even, odd]: [S::F32; 2]) {
        self.simd.store(even, &mut self.out[2 * index]);
        self.simd.store(odd, &mut self.out[2 * index + 1]);
    }
}
