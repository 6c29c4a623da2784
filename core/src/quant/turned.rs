//! Codes of values that are [turned](crate::value::turn): about 0, with one scale a token.

use super::{Affine, CodeKind, GROUP, Groups, GroupsMut, QUAD, trellis};
use crate::{
    BLOCK, Error, MAX_HEAD_DIM,
    storage::{Element, elements, elements_mut},
};
use half::f16;

impl CodeKind {
    /// Bytes of a block of 32 turned values of `head_dim` channels, with their scales.
    #[must_use]
    pub const fn turned_bytes(self, head_dim: usize) -> usize {
        self.code_bytes(BLOCK * head_dim.div_ceil(GROUP)) + BLOCK * size_of::<f16>()
    }

    /// The parts of a block of 32 turned values of `head_dim` channels: codes as of other values, then scales.
    ///
    /// # Errors
    /// As [`parts`](Self::parts).
    pub fn turned_parts(self, bytes: &[u8], head_dim: usize) -> Result<Groups<'_>, Error> {
        let (needed, actual) = (self.turned_bytes(head_dim), bytes.len());
        let bytes = bytes.get(..needed).ok_or(Error::Length { what: "turned values", expected: needed, actual })?;
        let (codes, scales) = bytes.split_at(needed - BLOCK * size_of::<f16>());
        Ok(Groups { kind: self, codes, affine: Affine::Turned { scales: elements::<f16>(scales)? } })
    }

    /// [`turned_parts`](Self::turned_parts), for writing.
    ///
    /// # Errors
    /// As [`parts`](Self::parts).
    pub(crate) fn turned_parts_mut(self, bytes: &mut [u8], head_dim: usize) -> Result<GroupsMut<'_>, Error> {
        let (needed, actual) = (self.turned_bytes(head_dim), bytes.len());
        let bytes = bytes.get_mut(..needed).ok_or(Error::Length { what: "turned values", expected: needed, actual })?;
        let (codes, scales) = bytes.split_at_mut(needed - BLOCK * size_of::<f16>());
        Ok(GroupsMut { kind: self, codes, scales: elements_mut::<f16>(scales)?, mins: &mut [] })
    }
}

impl GroupsMut<'_> {
    /// Stores `rows`, turned values of four tokens from `first`, a multiple of four, on; each has D numbers, a power of two.
    pub(crate) fn put_turned(&mut self, first: usize, rows: &[[f32; MAX_HEAD_DIM]; QUAD], head_dim: usize) {
        let mut codes = [[0; MAX_HEAD_DIM]; QUAD];
        for ((scale, row), codes) in self.scales[first..].iter_mut().zip(rows).zip(&mut codes) {
            *scale = quantise_turned(self.kind, &row[..head_dim], &mut codes[..head_dim]);
        }
        for start in (0..head_dim).step_by(GROUP) {
            let codes = codes.each_ref().map(|codes| {
                let mut group = [0; GROUP];
                group.iter_mut().zip(&codes[start..]).for_each(|(to, &code)| *to = code);
                group
            });
            self.pack((start / GROUP * BLOCK + first) / QUAD, &codes);
        }
    }

    /// Stores the turned value of `token` alone, in place of what was there.
    pub(crate) fn replace_turned(&mut self, token: usize, row: &[f32]) {
        let mut codes = [0; MAX_HEAD_DIM];
        self.scales[token] = quantise_turned(self.kind, row, &mut codes[..row.len()]);
        for (group, codes) in codes[..row.len()].chunks(GROUP).enumerate() {
            self.put_codes(group * BLOCK + token, (0..).zip(codes.iter().copied()));
        }
    }
}

/// Writes the codes of a turned value and returns its scale. A number that is not one makes the scale one that is not: it
/// stays visible.
fn quantise_turned(kind: CodeKind, numbers: &[f32], codes: &mut [u8]) -> f16 {
    const LANES: usize = 8;
    let (levels, middle) = (f32::from(kind.largest()), f32::from(kind.largest()) / 2.0);
    // Finite and between what half precision has; what is no number comes through.
    let bounded = |x: f32| x.clamp(-65504.0, 65504.0);
    let (mut most, mut nan) = ([0.0f32; LANES], [false; LANES]);
    for numbers in numbers.chunks(LANES) {
        for ((&x, most), nan) in numbers.iter().zip(&mut most).zip(&mut nan) {
            *most = if x.abs() > *most { x.abs() } else { *most };
            *nan |= x.is_nan();
        }
    }
    let most = bounded(most.iter().copied().fold(0.0, f32::max));
    if nan.contains(&true) {
        codes.fill(0);
        return f16::NAN;
    }
    if kind == CodeKind::Trellis2 {
        let scale = <f16 as Element>::store(trellis::quantise(numbers, codes));
        return if scale < f16::MAX { scale } else { f16::ZERO };
    }
    let (mut found, mut best) = (f16::ZERO, 0.0);
    codes.fill(kind.largest() / 2);
    // From the step with which the outermost codes are the largest numbers on.
    for width in [(levels + 1.0) / levels, 1.0, 0.85, 0.7] {
        let inverse = (levels + 1.0) / (2.0 * width * most);
        if !inverse.is_finite() {
            continue;
        }
        let mut sums = [[0.0f32; LANES]; 3];
        let mut other = [0; MAX_HEAD_DIM];
        for (numbers, codes) in numbers.chunks(LANES).zip(other.chunks_mut(LANES)) {
            for (lane, (&x, code)) in numbers.iter().zip(codes).enumerate() {
                let x = bounded(x);
                let steps = x * inverse + middle;
                let steps = if steps > 0.0 { steps } else { 0.0 };
                let steps = if steps < levels { steps } else { levels };
                // See `Line::encode`.
                *code = (steps + 8_388_608.0).to_bits() as u8;
                let steps = f32::from(*code) - middle;
                sums[0][lane] += steps * steps;
                sums[1][lane] += steps * x;
                sums[2][lane] += x * x;
            }
        }
        let [steps, both, squares] = sums.map(|sums| sums.iter().sum::<f32>());
        let (scale, quality) = (<f16 as Element>::store(squares / both), both * (both / steps));
        if quality > best && scale < f16::MAX {
            (found, best) = (scale, quality);
            codes.copy_from_slice(&other[..codes.len()]);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::tests::affine, *};
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    proptest! {
        /// Of turned values nothing shrinks, the codes are no worse than those of the whole range, and a value that is put
        /// alone is as it is among four.
        #[test]
        fn turned_values_do_not_shrink(
            bits in 0u32..=8,
            numbers in prop::collection::vec(-3.0f32..3.0, 4 * 256),
            scale in prop_oneof![Just(1.0f32), 1e-3f32..1e3, Just(0.0)],
        ) {
            let head_dim = 1usize << bits;
            let mut rows = [[0.0; MAX_HEAD_DIM]; QUAD];
            for (row, numbers) in rows.iter_mut().zip(numbers.chunks(256)) {
                row.iter_mut().zip(numbers).take(head_dim).for_each(|(to, x)| *to = x * scale);
            }
            for kind in [CodeKind::Int4, CodeKind::Int3, CodeKind::Int2, CodeKind::Trellis2] {
                let (mut memory, mut alone) = (vec![0u16; kind.turned_bytes(head_dim) / 2], vec![0u16; kind.turned_bytes(head_dim) / 2]);
                let bytes = bytemuck::cast_slice_mut(&mut memory);
                kind.turned_parts_mut(bytes, head_dim).unwrap().put_turned(8, &rows, head_dim);
                let groups = kind.turned_parts(bytes, head_dim).unwrap();
                let bytes = bytemuck::cast_slice_mut(&mut alone);
                for (token, row) in (8..).zip(&rows) {
                    kind.turned_parts_mut(bytes, head_dim).unwrap().replace_turned(token, &row[..head_dim]);
                }
                let others = kind.turned_parts(bytes, head_dim).unwrap();
                for (token, row) in (8..).zip(&rows) {
                    let row = &row[..head_dim];
                    let stored: Vec<f64> = (0..head_dim).map(|c| f64::from(groups.value(token, c))).collect();
                    prop_assert!((0..head_dim).all(|c| others.value(token, c) == groups.value(token, c)));
                    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
                    let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                    let squares = dot(&row, &row);
                    if squares == 0.0 {
                        prop_assert!(stored.iter().all(|&x| x == 0.0));
                        continue;
                    }
                    // A scale below the least normal binary16 has few bits.
                    if affine(&groups, token).0 < f16::MIN_POSITIVE {
                        continue;
                    }
                    let both = dot(&stored, &row);
                    prop_assert!((both / squares - 1.0).abs() < 2e-3, "{kind:?}: {both} of {squares}");
                    let most = row.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                    let levels = f64::from((1u32 << kind.bits()) - 1);
                    let middle = levels / 2.0;
                    let whole: Vec<f64> = row.iter().map(|x| (x / most * middle + middle).round().min(levels) - middle).collect();
                    let quality = |codes: &[f64]| dot(codes, &row).powi(2) / dot(codes, codes) / squares;
                    // The steps of a trellis are those that suit many Gaussian numbers.
                    let slack = match kind {
                        CodeKind::Trellis2 if head_dim < 16 => 0.5,
                        CodeKind::Trellis2 => 0.1,
                        _ => 0.01,
                    };
                    prop_assert!(quality(&stored) > quality(&whole) - slack, "{kind:?}: {} of {}", quality(&stored), quality(&whole));
                }
            }
        }
    }
}
