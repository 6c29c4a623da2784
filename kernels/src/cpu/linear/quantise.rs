//! Activations in eight bits.
//!
//! Every four have a scale of their own, their largest magnitude over 127, so that a code is off by at most half a scale.
//! Four is what integer products are summed over before they become floats, so this costs one multiplication for
//! sixteen sums against one scale for 32 (ggml's Q8_1), and an outlier spoils three neighbours instead of 31. The sum of
//! 32 goes with them, for formats that have minima.
//!
//! Products of matrices cannot afford a scale for every four: they have one for every sixteen ([`PanelRows`]).

use crate::cpu::pool::Pool;
use crate::cpu::simd::{
    Kernel, LANES, Level, Simd,
    bytes::{BYTES, Quarter},
};
use crate::format::PAIR;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Activations that share a scale.
pub(crate) const GROUP: usize = BYTES / LANES;

/// Activations whose sum is kept: a block of weights.
const BLOCK: usize = PAIR;

/// Blocks of a segment.
const BLOCKS: usize = 8;

/// Activations of a segment: a super-block of weights.
const SEGMENT: usize = BLOCKS * BLOCK;

/// Below this the largest magnitude of a group has no reciprocal; such a group is zero.
const SMALLEST: f32 = 1e-36;

/// 256 activations.
#[derive(Clone, Debug, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Segment {
    pub(crate) quarters: [Quarter; SEGMENT / BYTES],
    /// Eight ones, then the sums of the eight blocks: what the scales and minima of blocks of weights are multiplied
    /// with. Zeros follow, for [`window`](Self::window).
    pub(crate) affine: [f32; 3 * BLOCKS],
}

impl Segment {
    const ZERO: Self = Self { quarters: [Quarter::ZERO; SEGMENT / BYTES], affine: [0.0; 3 * BLOCKS] };

    /// What the scales and minima of blocks from the first of a quarter on are multiplied with: ones from lane 0 on, their
    /// sums from lane 8 on.
    #[inline(always)]
    pub(super) fn window(&self, quarter: usize) -> &[f32; LANES] {
        match self.affine[2 * quarter..].first_chunk() {
            Some(window) => window,
            None => unreachable!("quarter {quarter} of a segment"),
        }
    }
}

/// Segments of a row of `cols` activations.
pub(crate) fn segments(cols: usize) -> usize {
    cols.div_ceil(SEGMENT)
}

/// Bytes of `rows` rows of `cols` activations, quantised.
pub(super) fn bytes(rows: usize, cols: usize) -> usize {
    rows * segments(cols) * size_of::<Segment>()
}

/// Quantises the rows of x [m, cols] into `out`, each padded with zeros to whole segments; returns those. Groups that
/// hold an infinity or a NaN become NaN.
pub(super) fn quantise<'a>(level: Level, x: &[f32], cols: usize, out: &'a mut Vec<Segment>) -> &'a [Segment] {
    let len = x.len() / cols * segments(cols);
    if out.len() < len {
        // The old memory is given back first, and no more is taken than is needed: what is planned is what is held.
        *out = Vec::new();
        out.reserve_exact(len);
        out.resize(len, Segment::ZERO);
    }
    let out = &mut out[..len];
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(segments(cols))) {
        level.dispatch(Quantise { x, out });
    }
    out
}

struct Quantise<'a> {
    x: &'a [f32],
    out: &'a mut [Segment],
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, segment) in self.x.chunks(SEGMENT).zip(self.out) {
            let Segment { quarters, affine } = segment;
            let (ones, sums) = affine[..2 * BLOCKS].split_at_mut(BLOCKS);
            ones.fill(1.0);
            let (whole, rest) = x.as_chunks();
            let mut padded = [0.0; BYTES];
            padded[..rest.len()].copy_from_slice(rest);
            for (index, (quarter, sums)) in quarters.iter_mut().zip(sums.as_chunks_mut().0).enumerate() {
                *sums = match whole.get(index) {
                    Some(x) => quantise_quarter(x, quarter),
                    None if index == whole.len() => quantise_quarter(&padded, quarter),
                    None => quantise_quarter(&[0.0; BYTES], quarter),
                };
            }
        }
    }
}

/// Quantises 64 activations; returns the sums of their two blocks. Loops go over the groups, sixteen as a vector has
/// lanes.
#[inline(always)]
fn quantise_quarter(x: &[f32; BYTES], out: &mut Quarter) -> [f32; 2] {
    let x: [[f32; LANES]; GROUP] = std::array::from_fn(|j| std::array::from_fn(|i| x[GROUP * i + j]));
    // As integers, magnitudes order as they do as floats, and infinities and NaN are the largest.
    let mut largest = [0_u32; LANES];
    for x in &x {
        for i in 0..LANES {
            largest[i] = largest[i].max(x[i].to_bits() & 0x7FFF_FFFF);
        }
    }
    let mut inverse = [0.0; LANES];
    for i in 0..LANES {
        [out.scales[i], inverse[i]] = scale(f32::from_bits(largest[i]));
    }
    let mut words = [0_u32; LANES];
    let mut totals = [0_i32; LANES];
    for (j, x) in x.iter().enumerate() {
        for i in 0..LANES {
            let code = code(x[i], inverse[i]);
            words[i] |= (code.cast_unsigned() & 0xFF) << (8 * j);
            totals[i] += code;
        }
    }
    for i in 0..LANES {
        out.sums[i] = -128 * totals[i];
        let bytes = words[i].to_le_bytes().map(u8::cast_signed);
        out.codes[GROUP * i..GROUP * (i + 1)].copy_from_slice(&bytes);
    }
    let block = |first: usize| (first..first + LANES / 2).map(|i| out.scales[i] * totals[i] as f32).sum();
    [block(0), block(LANES / 2)]
}

/// The scale of activations of which this is the largest magnitude, and its inverse: 0 where all codes are.
#[inline(always)]
fn scale(largest: f32) -> [f32; 2] {
    // Both comparisons are false for a NaN.
    let sound = largest > SMALLEST && largest <= f32::MAX;
    let spoilt = if largest <= SMALLEST { 0.0 } else { f32::NAN };
    [if sound { largest * (1.0 / 127.0) } else { spoilt }, if sound { 127.0 / largest } else { 0.0 }]
}

/// x / scale, rounded to the nearest integer.
#[inline(always)]
fn code(x: f32, inverse: f32) -> i32 {
    // The nearest even integer is then in the lowest bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let code = (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
    if inverse > 0.0 { code.cast_signed() } else { 0 }
}

/// Activations that share a scale in [`PanelRows`].
pub(super) const PANEL_GROUP: usize = 16;

/// Activations of a row of [`PanelRows`] are padded with zeros to a multiple of this.
const PADDING: usize = BYTES;

/// Many rows of x in eight bits, every sixteen activations of a row with a scale of their own: integer products of
/// matrices are summed over as many before they become floats.
#[derive(Debug, Default)]
pub(super) struct PanelRows {
    /// [rows][groups].
    codes: Vec<[i8; PANEL_GROUP]>,
    /// [rows][groups]: the scale of a group and the sum of its dequantised activations.
    affine: Vec<[f32; 2]>,
}

/// One of [`PanelRows`].
#[derive(Clone, Copy)]
pub(super) struct PanelRow<'a> {
    pub(super) codes: &'a [[i8; PANEL_GROUP]],
    pub(super) affine: &'a [[f32; 2]],
}

/// Groups of a row of `cols` activations.
pub(super) fn panel_groups(cols: usize) -> usize {
    cols.next_multiple_of(PADDING) / PANEL_GROUP
}

impl PanelRows {
    /// Bytes of `rows` rows of `cols` activations.
    pub(super) fn bytes(rows: usize, cols: usize) -> usize {
        rows * panel_groups(cols) * (size_of::<[i8; PANEL_GROUP]>() + size_of::<[f32; 2]>())
    }

    /// Quantises the rows of x [m, cols].
    pub(super) fn quantise(&mut self, pool: &Pool, level: Level, x: &[f32], cols: usize) {
        /// Rows of a task.
        const ROWS: usize = 16;
        let groups = panel_groups(cols);
        let len = x.len() / cols * groups;
        if self.codes.len() < len {
            *self = Self::default();
            self.codes.reserve_exact(len);
            self.codes.resize(len, [0; PANEL_GROUP]);
            self.affine.reserve_exact(len);
            self.affine.resize(len, [0.0; 2]);
        }
        let out = self.codes[..len].chunks_mut(ROWS * groups).zip(self.affine[..len].chunks_mut(ROWS * groups));
        let work = Mutex::new(x.chunks(ROWS * cols).zip(out));
        pool.run(x.len().div_ceil(ROWS * cols), &|_| {
            let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
            if let Some((x, (codes, affine))) = next {
                level.dispatch(QuantisePanelRows { x, cols, codes, affine });
            }
        });
    }

    /// The groups `range` of row `index` of rows of `groups` groups.
    #[inline(always)]
    pub(super) fn row(&self, index: usize, groups: usize, range: Range<usize>) -> PanelRow<'_> {
        let range = index * groups + range.start..index * groups + range.end;
        PanelRow { codes: &self.codes[range.clone()], affine: &self.affine[range] }
    }
}

struct QuantisePanelRows<'a> {
    x: &'a [f32],
    cols: usize,
    codes: &'a mut [[i8; PANEL_GROUP]],
    affine: &'a mut [[f32; 2]],
}

impl Kernel for QuantisePanelRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let groups = panel_groups(self.cols);
        let out = self.codes.chunks_exact_mut(groups).zip(self.affine.chunks_exact_mut(groups));
        for (x, (codes, affine)) in self.x.chunks_exact(self.cols).zip(out) {
            let (whole, rest) = x.as_chunks();
            let mut padded = [0.0; PANEL_GROUP];
            padded[..rest.len()].copy_from_slice(rest);
            for (index, (codes, affine)) in codes.iter_mut().zip(affine).enumerate() {
                *affine = match whole.get(index) {
                    Some(x) => quantise_group(x, codes),
                    None if index == whole.len() => quantise_group(&padded, codes),
                    None => quantise_group(&[0.0; PANEL_GROUP], codes),
                };
            }
        }
    }
}

/// Quantises sixteen activations; returns their scale and sum.
#[inline(always)]
fn quantise_group(x: &[f32; PANEL_GROUP], codes: &mut [i8; PANEL_GROUP]) -> [f32; 2] {
    let mut largest = 0;
    for x in x {
        largest = largest.max(x.to_bits() & 0x7FFF_FFFF);
    }
    let [scale, inverse] = scale(f32::from_bits(largest));
    let mut total = 0;
    for (to, x) in codes.iter_mut().zip(x) {
        let code = code(*x, inverse);
        *to = code as i8;
        total += code;
    }
    [scale, scale * total as f32]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The activations that segments stand for.
    fn dequantised(segments: &[Segment]) -> Vec<f32> {
        let quarter = |quarter: &Quarter| {
            let groups = quarter.codes.chunks(GROUP).zip(quarter.scales);
            groups.flat_map(|(codes, scale)| codes.iter().map(move |&code| f32::from(code) * scale)).collect::<Vec<_>>()
        };
        segments.iter().flat_map(|segment| segment.quarters.iter().flat_map(quarter)).collect()
    }

    proptest! {
        #[test]
        fn codes_are_off_by_half_a_scale(
            x in prop::collection::vec(prop_oneof![-1.0f32..1.0, -1e30f32..1e30, Just(0.0)], 1..600), rows in 1usize..4,
        ) {
            let cols = x.len() / rows;
            prop_assume!(cols > 0);
            let x = &x[..rows * cols];
            for level in Level::available() {
                let mut buffer = vec![Segment { affine: [f32::NAN; 24], ..Segment::ZERO }; 2];
                let out = quantise(level, x, cols, &mut buffer);
                prop_assert_eq!(out.len(), rows * cols.div_ceil(SEGMENT));
                for (x, row) in x.chunks_exact(cols).zip(out.chunks_exact(cols.div_ceil(SEGMENT))) {
                    let values = dequantised(row);
                    for (group, (x, y)) in x.chunks(GROUP).zip(values.chunks(GROUP)).enumerate() {
                        let quarter = &row[GROUP * group / SEGMENT].quarters[GROUP * group % SEGMENT / BYTES];
                        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                        let scale = quarter.scales[group % LANES];
                        prop_assert!((scale - largest / 127.0).abs() <= 1e-6 * scale);
                        for (x, y) in x.iter().zip(y) {
                            prop_assert!((x - y).abs() <= 0.50001 * scale, "{x} became {y} at a scale of {scale}");
                        }
                    }
                    for (block, y) in values.chunks(BLOCK).enumerate() {
                        let affine = &row[block / BLOCKS].affine;
                        let sum = y.iter().map(|&y| f64::from(y)).sum::<f64>();
                        let largest = y.iter().map(|&y| f64::from(y.abs())).sum::<f64>();
                        prop_assert!((f64::from(affine[BLOCKS + block % BLOCKS]) - sum).abs() <= 1e-5 * largest);
                        prop_assert_eq!(affine[block % BLOCKS], 1.0);
                    }
                    prop_assert!(values[cols..].iter().all(|&y| y == 0.0), "padding");
                    for quarter in row.iter().flat_map(|segment| &segment.quarters) {
                        prop_assert!(quarter.codes.iter().all(|&code| code >= -127));
                        for (sum, codes) in quarter.sums.iter().zip(quarter.codes.chunks(GROUP)) {
                            prop_assert_eq!(*sum, -128 * codes.iter().map(|&code| i32::from(code)).sum::<i32>());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_spoils_its_group_alone() {
        for level in Level::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = [1.0; 2 * BLOCK];
                x[BLOCK + 5] = bad;
                let mut buffer = Vec::new();
                let segment = &quantise(level, &x, x.len(), &mut buffer)[0];
                let Quarter { codes, scales, .. } = &segment.quarters[0];
                for (group, scale) in scales.iter().enumerate() {
                    assert_eq!(scale.is_nan(), group == (BLOCK + 5) / GROUP);
                }
                assert_eq!(codes[BLOCK..][..3 * GROUP], [127, 127, 127, 127, 0, 0, 0, 0, 127, 127, 127, 127]);
                assert!((segment.affine[BLOCKS] - 32.0).abs() < 1e-5);
                assert!(segment.affine[BLOCKS + 1].is_nan());
            }
            // Too small for a scale, and the largest there is.
            for (x, sound) in [(1e-38, false), (f32::MAX, true)] {
                let mut buffer = Vec::new();
                let quarter = &quantise(level, &[x; BLOCK], BLOCK, &mut buffer)[0].quarters[0];
                assert_eq!(quarter.scales[0] > 0.0, sound);
                assert_eq!(quarter.codes[0], if sound { 127 } else { 0 });
            }
        }
    }
}
