//! Many rows of x in eight bits: the codes of 32 rows of weights are laid out in a panel, then multiplied with all of x.
//!
//! Integers are summed over sixteen columns, four instructions that each multiply and add four bytes in every lane; then
//! they are scaled by both sides' scales. Codes have a sign or none, as the instruction wants them: what is to be subtracted
//! from them is a part of the minimum, which is multiplied with the sum of x.

use super::quantise::{PANEL_GROUP, PanelRow, PanelRows, panel_groups};
use super::{Chunk, Mode, Output};
use crate::cpu::aligned::AlignedVec;
use crate::cpu::gemm::PANEL;
use crate::cpu::simd::{
    LANES, Level, Simd,
    bytes::{BYTES, ByteKernel, Bytes},
};
use crate::format::codes::{CodeSink, CodeVisitor, Codes};

/// Columns of weights in a panel at a time: 128 KiB of codes and as much of scales and minima. A multiple of every block
/// length.
const DEPTH: usize = 4096;

/// Columns that are unpacked before they are transposed: a segment of [`Codes`].
const STEP: usize = 256;

/// Vectors of a step: 64 bytes each.
const VECTORS: usize = STEP / BYTES;

/// Four columns of a panel.
type Columns = [[u8; BYTES]; PANEL / LANES];

/// Buffers of one thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// [columns / 4][32 rows][4 codes], as floats of any bits.
    panel: AlignedVec,
    /// [columns / 16][scale, minimum][32 rows].
    affine: AlignedVec,
}

impl Scratch {
    /// Most bytes of these buffers, for layers of up to `cols` columns.
    pub(super) fn bytes(cols: usize) -> usize {
        let groups = panel_groups(cols.min(DEPTH));
        AlignedVec::bytes(groups * PANEL_GROUP / 4 * PANEL) + AlignedVec::bytes(groups * 2 * PANEL)
    }
}

/// Computes the columns of `chunk`, at most [`PANEL`] and of a format that has codes, for the rows of `x`.
///
/// # Safety
/// `output` is valid for reads and writes in the columns of `chunk`, which no other thread touches meanwhile.
pub(super) unsafe fn run(level: Level, chunk: &Chunk<'_>, x: &PanelRows, output: Output, scratch: &mut Scratch) {
    let cols = chunk.matrix.cols();
    for start in (0..cols).step_by(DEPTH) {
        let depth = DEPTH.min(cols - start);
        level.dispatch_bytes(Pack { chunk, start, depth, scratch: &mut *scratch });
        // SAFETY: the caller's promise.
        unsafe { multiply(level, Product { chunk, start, depth, x, output, scratch: &*scratch }) };
    }
}

/// Fills the panel with columns start..start + depth of the chunk.
struct Pack<'a> {
    chunk: &'a Chunk<'a>,
    start: usize,
    depth: usize,
    scratch: &'a mut Scratch,
}

impl ByteKernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<B: Bytes>(self, bytes: B) {
        self.chunk.matrix.format().visit_codes(PackWith(self, bytes));
    }
}

struct PackWith<'a, B>(Pack<'a>, B);

impl<B: Bytes> CodeVisitor for PackWith<'_, B> {
    type Output = ();

    #[inline(always)]
    fn visit<C: Codes>(self) {
        let Self(Pack { chunk, start, depth, scratch }, bytes) = self;
        let simd = bytes.simd();
        let Scratch { panel, affine } = scratch;
        let groups = panel_groups(depth);
        panel.grow(groups * PANEL_GROUP / 4 * PANEL);
        affine.grow(groups * 2 * PANEL);
        let format = chunk.matrix.format();
        let (data, row_bytes) = chunk.bytes();
        let offset = |column: usize| column / format.block_len() * format.block_bytes();
        let mut codes = [[[0.0; LANES]; VECTORS]; LANES];
        for half in 0..chunk.count.div_ceil(LANES) {
            for step in (0..depth).step_by(STEP) {
                let len = STEP.min(depth - step);
                let range = offset(start + step)..offset(start + step + len);
                let rows = data.chunks_exact(row_bytes).skip(LANES * half).take(LANES);
                for (r, (row, codes)) in rows.zip(&mut codes).enumerate() {
                    let affine = &mut affine[step / PANEL_GROUP * 2 * PANEL + LANES * half + r..];
                    C::codes(bytes, &row[range.clone()], &mut Store { bytes, codes, affine, scales: [0.0; LANES] });
                }
                for vector in 0..len.div_ceil(BYTES) {
                    // Floats are moved, never computed with: any bits pass.
                    let mut square = [simd.splat(0.0); LANES];
                    for r in 0..LANES {
                        square[r] = simd.load(&codes[r][vector]);
                    }
                    let square = simd.transpose(square);
                    let (out, _) = panel[(step + BYTES * vector) / 4 * PANEL..].as_chunks_mut();
                    for c in 0..LANES {
                        simd.store(square[c], &mut out[c * (PANEL / LANES) + half]);
                    }
                }
            }
        }
    }
}

/// A segment of a row, to memory.
struct Store<'a, B> {
    bytes: B,
    codes: &'a mut [[f32; LANES]; VECTORS],
    /// Where the scale of the first group goes; the minimum is a panel's width after it, then the next group's scale.
    affine: &'a mut [f32],
    /// Those of the segment, as they come.
    scales: [f32; LANES],
}

impl<B: Bytes> Store<'_, B> {
    /// Stores codes, and scale and minimum of each of their four groups.
    #[inline(always)]
    fn store(&mut self, quarter: usize, codes: B::Codes, offset: u8, affine: impl Fn(usize) -> [f32; 2]) {
        let out: &mut [u8; BYTES] = bytemuck::cast_mut(&mut self.codes[quarter]);
        let offset = self.bytes.store_weights(codes, offset, out);
        for group in 4 * quarter..4 * quarter + 4 {
            let [scale, min] = affine(group);
            self.affine[2 * PANEL * group] = scale;
            self.affine[2 * PANEL * group + PANEL] = min - f32::from(offset) * scale;
        }
    }
}

impl<B: Bytes> CodeSink<B> for Store<'_, B> {
    #[inline(always)]
    fn blocks(&mut self, _: usize, affine: B::F32, _: bool) {
        self.bytes.simd().store(affine, &mut self.scales);
    }

    #[inline(always)]
    fn half_blocks(&mut self, _: usize, scales: B::F32) {
        self.bytes.simd().store(scales, &mut self.scales);
    }

    #[inline(always)]
    fn codes<const QUARTER: usize>(&mut self, codes: B::Codes, offset: u8) {
        let scales = self.scales;
        self.store(QUARTER, codes, offset, |group| [scales[group / 2], scales[8 + group / 2]]);
    }

    #[inline(always)]
    fn pair(&mut self, _: usize, quarter: usize, affine: B::F32, _: bool, codes: B::Codes, offset: u8) {
        self.bytes.simd().store(affine, &mut self.scales);
        let scales = self.scales;
        self.store(quarter, codes, offset, |group| [scales[group / 2 % 2], scales[8 + group / 2 % 2]]);
    }

    #[inline(always)]
    fn half_block_codes<const QUARTER: usize>(&mut self, codes: B::Codes, offset: u8) {
        let scales = self.scales;
        self.store(QUARTER, codes, offset, |group| [scales[group], 0.0]);
    }
}

/// A packed panel times rows of x, columns start..start + depth; made by [`run`] only.
struct Product<'a> {
    chunk: &'a Chunk<'a>,
    start: usize,
    depth: usize,
    x: &'a PanelRows,
    output: Output,
    scratch: &'a Scratch,
}

/// # Safety
/// As [`run`].
unsafe fn multiply(level: Level, product: Product<'_>) {
    level.dispatch_bytes(product);
}

impl ByteKernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<B: Bytes>(self, bytes: B) {
        let m = self.output.m;
        // Tiles of almost equal height, as in `gemm`.
        let stripes = m.div_ceil(B::TILE_ROWS);
        let vectors = self.chunk.count.div_ceil(LANES);
        let mut vector = 0;
        while vector < vectors {
            let wide = B::TILE_VECTORS == 2 && vectors - vector >= 2;
            let mut row = 0;
            for stripe in 0..stripes {
                let rows = m / stripes + usize::from(stripe < m % stripes);
                if wide {
                    self.rows::<B, 2>(bytes, row, rows, vector)
                } else {
                    self.rows::<B, 1>(bytes, row, rows, vector)
                }
                row += rows;
            }
            vector += if wide { 2 } else { 1 };
        }
    }
}

impl Product<'_> {
    /// `tile` for a number of rows that is known at run time.
    #[inline(always)]
    fn rows<B: Bytes, const V: usize>(&self, bytes: B, row: usize, rows: usize, vector: usize) {
        macro_rules! by_rows {
            ($($r:literal)*) => {
                match rows {
                    // The guards are constants: a level compiles only the tiles that it has.
                    $($r if $r <= B::TILE_ROWS && V <= B::TILE_VECTORS => self.tile::<B, $r, V>(bytes, row, vector),)*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        by_rows!(1 2 3 4 5 6);
    }

    /// A tile of `R` rows of x and `V` vectors of sixteen rows of weights.
    #[inline(always)]
    fn tile<B: Bytes, const R: usize, const V: usize>(&self, bytes: B, row: usize, vector: usize) {
        let simd = bytes.simd();
        let groups = panel_groups(self.depth);
        let first = self.start / PANEL_GROUP;
        let all = panel_groups(self.chunk.matrix.cols());
        let x: [PanelRow<'_>; R] = std::array::from_fn(|r| self.x.row(row + r, all, first..first + groups));
        let panel: &[Columns] = bytemuck::cast_slice(&self.scratch.panel[..groups * PANEL_GROUP / 4 * PANEL]);
        let (panel, _) = panel.as_chunks::<{ PANEL_GROUP / 4 }>();
        let (affine, _) = self.scratch.affine.as_chunks::<LANES>();
        let (affine, _) = affine.as_chunks::<{ 2 * PANEL / LANES }>();
        let mut sums = [[simd.splat(0.0); V]; R];
        for (group, (columns, affine)) in panel.iter().zip(affine).enumerate() {
            let mut products = [[bytes.zero(); V]; R];
            for (step, columns) in columns.iter().enumerate() {
                for r in 0..R {
                    let codes = &x[r].codes[group].as_chunks::<4>().0[step];
                    for v in 0..V {
                        let weights = bytes.load(&columns[vector + v]);
                        products[r][v] = bytes.add_products(products[r][v], weights, *codes);
                    }
                }
            }
            for r in 0..R {
                let [scale, sum] = x[r].affine[group];
                let (scale, sum) = (simd.splat(scale), simd.splat(sum));
                for v in 0..V {
                    let (weight_scale, min) = (simd.load(&affine[vector + v]), simd.load(&affine[2 + vector + v]));
                    let scaled = simd.fma(bytes.floats(products[r][v]), simd.mul(weight_scale, scale), sums[r][v]);
                    sums[r][v] = simd.fma(min, sum, scaled);
                }
            }
        }
        let Chunk { count, column, bias, .. } = *self.chunk;
        let Output { data, stride, mode, .. } = self.output;
        let add = mode == Mode::Add || self.start > 0;
        let bias = bias.filter(|_| self.start == 0);
        for v in 0..V {
            let at = LANES * (vector + v);
            let len = LANES.min(count - at);
            let mut lanes = [0.0; LANES];
            if let Some(bias) = bias {
                lanes[..len].copy_from_slice(&bias[at..at + len]);
            }
            let bias = simd.load(&lanes);
            for (r, sums) in sums.iter().enumerate() {
                // SAFETY: a row of the output, `len` columns of the chunk, which `run` was promised.
                let out = unsafe { std::slice::from_raw_parts_mut(data.add((row + r) * stride + column + at), len) };
                let sum = simd.add(sums[v], bias);
                if let Some(out) = out.first_chunk_mut() {
                    simd.store(if add { simd.add(sum, simd.load(out)) } else { sum }, out);
                } else {
                    simd.store(sum, &mut lanes);
                    for (out, lane) in out.iter_mut().zip(&lanes) {
                        *out = if add { *out + lane } else { *lane };
                    }
                }
            }
        }
    }
}
