//! The `f32` micro-kernel: C = A·B (+ C) for a panel of up to 32 columns.
//!
//! Products of any width are sums and rows of such panels: linear layers dequantise 32 rows of weights into one,
//! attention has its blocks of 32 tokens. A tile of C stays in registers while k runs ([`Simd::TILE_ROWS`] rows of
//! [`Simd::TILE_VECTORS`] vectors); a step loads a row of B once and broadcasts one element of each row of A.

use super::simd::{Kernel, LANES, Level, Simd};

/// Columns of a panel.
pub const PANEL: usize = 2 * LANES;

/// m × k, k × n and m × n are the shapes of A, B and C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// Columns of B and C, at most [`PANEL`].
    pub n: usize,
}

/// Rows of floats that start `stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    /// From the first row's first float to the last row's last one, at least.
    pub data: &'a [f32],
    /// Floats from the start of a row to the start of the next.
    pub stride: usize,
}

/// Mutable [`Strided`] rows.
#[derive(Debug)]
pub struct StridedMut<'a> {
    /// From the first row's first float to the last row's last one, at least.
    pub data: &'a mut [f32],
    /// Floats from the start of a row to the start of the next, no less than a row is long.
    pub stride: usize,
}

/// C = A·B, or C += A·B where `accumulate`: `a` is m × k, `c` is m × n; the k rows of `b` are n floats long and
/// readable up to the next multiple of sixteen (what is there is not used).
///
/// # Panics
/// Where a slice is too short for its shape, `shape.n` is over [`PANEL`], or rows of `c` overlap.
pub fn gemm_panel(level: Level, shape: Shape, a: Strided<'_>, b: Strided<'_>, c: StridedMut<'_>, accumulate: bool) {
    let Shape { m, k: _, n } = shape;
    assert!(m <= 1 || c.stride >= n, "rows of {n} floats overlap at a stride of {}", c.stride);
    assert!(extent(m, n, c.stride) <= c.data.len(), "{} floats are too few for C of {shape:?}", c.data.len());
    // SAFETY: C is exclusively ours and, as just checked, large enough.
    unsafe { gemm_panel_raw(level, shape, a, b, c.data.as_mut_ptr(), c.stride, accumulate) }
}

/// [`gemm_panel`] that writes through a pointer, for threads that share the rows of C and own columns of it.
///
/// # Safety
/// The n floats from `c + i · c_stride` are valid for reads and writes for every i < m, and no other thread touches
/// them meanwhile.
///
/// # Panics
/// Where `a` or `b` is too short for its shape or `shape.n` is over [`PANEL`].
pub(super) unsafe fn gemm_panel_raw(
    level: Level,
    shape: Shape,
    a: Strided<'_>,
    b: Strided<'_>,
    c: *mut f32,
    c_stride: usize,
    accumulate: bool,
) {
    let Shape { m, k, n } = shape;
    assert!(n <= PANEL, "{n} columns are more than a panel of {PANEL}");
    assert!(extent(m, k, a.stride) <= a.data.len(), "{} floats are too few for A of {shape:?}", a.data.len());
    let padded = n.next_multiple_of(LANES);
    assert!(extent(k, padded, b.stride) <= b.data.len(), "{} floats are too few for B of {shape:?}", b.data.len());
    level.dispatch(Panel { shape, a, b, c, c_stride, accumulate });
}

/// Floats from the start of the first to the end of the last of `rows` rows; saturated, so that no slice has as many
/// where it overflows.
fn extent(rows: usize, len: usize, stride: usize) -> usize {
    if rows == 0 || len == 0 { 0 } else { (rows - 1).saturating_mul(stride).saturating_add(len) }
}

/// The arguments of [`gemm_panel_raw`], checked; only it makes one.
struct Panel<'a> {
    shape: Shape,
    a: Strided<'a>,
    b: Strided<'a>,
    c: *mut f32,
    c_stride: usize,
    accumulate: bool,
}

impl Kernel for Panel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Shape { m, k, n } = self.shape;
        if n == 0 || m == 0 {
            return;
        }
        // Tiles of almost equal height: 15 rows are 8 + 7 and not 14 + 1, which would leave the pipeline empty.
        let stripes = m.div_ceil(S::TILE_ROWS);
        let mut column = 0;
        while column < n {
            let n = n - column;
            let vectors = n.div_ceil(LANES).min(S::TILE_VECTORS);
            let n = n.min(vectors * LANES);
            let mut row = 0;
            for stripe in 0..stripes {
                let rows = m / stripes + usize::from(stripe < m % stripes);
                // SAFETY: rows row..row + rows of A and C and columns column..column + n of C and B (B's padded) are
                // inside what `gemm_panel_raw` checked or its caller promised; with k = 0, `a` and `b` may be empty
                // and are not read.
                unsafe {
                    let tile = Tile {
                        k,
                        a: self.a.data.as_ptr().wrapping_add(row * self.a.stride),
                        a_stride: self.a.stride,
                        b: self.b.data.as_ptr().wrapping_add(column),
                        b_stride: self.b.stride,
                        c: self.c.add(row * self.c_stride + column),
                        c_stride: self.c_stride,
                        n,
                        accumulate: self.accumulate,
                    };
                    if vectors == 2 { tile.run_rows::<S, 2>(simd, rows) } else { tile.run_rows::<S, 1>(simd, rows) }
                }
                row += rows;
            }
            column += n;
        }
    }
}

struct Tile {
    k: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    n: usize,
    accumulate: bool,
}

impl Tile {
    /// `run` for a number of rows that is known at run time.
    ///
    /// # Safety
    /// As [`run`](Self::run) with `rows` rows.
    #[inline(always)]
    unsafe fn run_rows<S: Simd, const V: usize>(self, simd: S, rows: usize) {
        macro_rules! by_rows {
            ($($r:literal)*) => {
                match rows {
                    // The guards are constants: a level compiles only the tiles that it has.
                    // SAFETY: as promised to this function.
                    $($r if $r <= S::TILE_ROWS && V <= S::TILE_VECTORS => unsafe { self.run::<S, $r, V>(simd) },)*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        by_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    }

    /// A tile of `R` rows and `V` vectors.
    ///
    /// # Safety
    /// `R` rows of k floats at `a`, k rows of `V` vectors at `b` are readable, `R` rows of n ≤ 16·`V` floats at `c`
    /// writable (and readable where `accumulate`).
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        let mut sums = [[simd.splat(0.0); V]; R];
        for p in 0..self.k {
            // SAFETY: p < k, r < R and v < V.
            unsafe {
                let b = self.b.add(p * self.b_stride);
                let mut vectors = [simd.splat(0.0); V];
                for (v, vector) in vectors.iter_mut().enumerate() {
                    *vector = simd.load(&*b.add(LANES * v).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = simd.splat(*self.a.add(r * self.a_stride + p));
                    for v in 0..V {
                        sums[v] = simd.fma(a, vectors[v], sums[v]);
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: r < R; `len` floats from lane 16·v on are the valid ones of this vector.
                unsafe {
                    let c = self.c.add(r * self.c_stride + LANES * v);
                    let len = self.n.saturating_sub(LANES * v);
                    if len >= LANES {
                        let c = &mut *c.cast::<[f32; LANES]>();
                        simd.store(if self.accumulate { simd.add(sum, simd.load(c)) } else { sum }, c);
                    } else {
                        let mut lanes = [0.0; LANES];
                        simd.store(sum, &mut lanes);
                        for (i, lane) in lanes[..len].iter().enumerate() {
                            *c.add(i) = if self.accumulate { *c.add(i) + lane } else { *lane };
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A deterministic float of about unit size.
    fn float(i: usize) -> f32 {
        ((i.wrapping_mul(2_654_435_761) >> 7) % 2001) as f32 / 1000.0 - 1.0
    }

    proptest! {
        #[test]
        fn every_level_multiplies_any_shape(
            m in 0usize..40, k in 0usize..70, n in 0usize..=PANEL, pads in prop::array::uniform3(0usize..20),
            accumulate: bool,
        ) {
            let shape = Shape { m, k, n };
            let (a_stride, b_stride, c_stride) = (k + pads[0], n.next_multiple_of(LANES) + pads[1], n + pads[2]);
            // Exactly as long as the contract asks for: a read or write beyond is one that a checker sees.
            let a: Vec<f32> = (0..extent(m, k, a_stride)).map(float).collect();
            let mut b: Vec<f32> = (7..7 + extent(k, n.next_multiple_of(LANES), b_stride)).map(float).collect();
            for row in b.chunks_mut(b_stride.max(1)) {
                row.iter_mut().skip(n).for_each(|v| *v = f32::NAN);
            }
            let c: Vec<f32> = (3..3 + extent(m, n, c_stride)).map(float).collect();
            for level in Level::available() {
                let mut actual = c.clone();
                let (a, b) = (Strided { data: &a, stride: a_stride }, Strided { data: &b, stride: b_stride });
                gemm_panel(level, shape, a, b, StridedMut { data: &mut actual, stride: c_stride }, accumulate);
                for (i, (value, before)) in actual.iter().zip(&c).enumerate() {
                    let (row, column) = (i / c_stride, i % c_stride);
                    if column >= n {
                        prop_assert_eq!(value, before, "padding of C");
                        continue;
                    }
                    let term = |p: usize| f64::from(a.data[row * a_stride + p]) * f64::from(b.data[p * b_stride + column]);
                    let expected = (0..k).map(term).sum::<f64>() + if accumulate { f64::from(*before) } else { 0.0 };
                    prop_assert!((f64::from(*value) - expected).abs() < 2e-5, "{} {shape:?}: {value} {expected}", level.name());
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "31 floats are too few for B")]
    fn a_short_panel_is_refused() {
        let data = &[0.0; 31];
        let shape = Shape { m: 1, k: 2, n: 9 };
        let c = StridedMut { data: &mut [0.0; 9], stride: 9 };
        gemm_panel(Level::best(), shape, Strided { data, stride: 2 }, Strided { data, stride: 16 }, c, false);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_rows_are_refused() {
        let data = &[0.0; 64];
        let shape = Shape { m: 2, k: 1, n: 9 };
        let c = StridedMut { data: &mut [0.0; 32], stride: 8 };
        gemm_panel(Level::best(), shape, Strided { data, stride: 1 }, Strided { data, stride: 32 }, c, false);
    }

    #[test]
    #[should_panic(expected = "too few for A")]
    fn an_overflowing_stride_is_refused() {
        let data = &[0.0; 64];
        let shape = Shape { m: 3, k: 1, n: 1 };
        let c = StridedMut { data: &mut [0.0; 32], stride: 8 };
        gemm_panel(Level::best(), shape, Strided { data, stride: usize::MAX }, Strided { data, stride: 32 }, c, false);
    }
}
