//! Asymmetric quantisation in groups of 32 numbers, as KIVI does it ([arXiv 2402.02750](https://arxiv.org/abs/2402.02750)):
//! x ≈ code · scale + min.
//!
//! A group is 32 tokens of one key channel (keys have channels of very different size), or 32 channels of one token's
//! value. Scale and minimum are binary16, rounded so that every number of the group is inside of what the codes can say:
//! no number is off by more than half a step. With codes of two and three bits the range is narrowed where that suits the numbers
//! better, by a scale that keeps their mean and does not shrink them.
//!
//! Values may be [turned](crate::value::turn) first. Their numbers then have no direction of their own: codes are symmetric
//! about 0, x ≈ (code − middle) · scale, and a token has one scale for all of its channels, 2.25 bits a number of 64 where
//! groups with two bits take 3. Four steps are tried, and the scale does not shrink the vector: Σ stored·x = Σ x². Two bits say
//! most of them by a [trellis]. Predicted keys can have codes of two kinds, with [scales of eight bits](small): see [mixed].
//!
//! Four groups lie interleaved, number by number: the four codes that a query (over channels) or a row of weights (over
//! tokens) meets together are one 32-bit word, which is what integer dot products of bytes take.

use crate::{
    BLOCK, Error,
    storage::{Element, elements, elements_mut},
};
use half::f16;

pub mod mixed;
mod range;
pub mod small;
pub mod trellis;
mod turned;

/// Numbers of a group.
pub const GROUP: usize = BLOCK;

/// Groups whose codes lie interleaved.
pub const QUAD: usize = 4;

/// Bytes of the low two bits of a quad's codes.
const QUARTER: usize = QUAD * GROUP / 4;

/// Integer codes that numbers are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum CodeKind {
    /// 0..=255, one a byte: byte 4·i + g of a quad holds code i of its group g.
    Int8,
    /// 0..=15, two a byte: byte 4·i + g of a quad holds code i of its group g in its low half, code i + 16 in its high
    /// half.
    Int4,
    /// 0..=7: the low two bits of all codes as [`Int2`](Self::Int2) has them, then the high ones in 16 bytes: bit k of byte
    /// 4·i + g of these is that of code i + 4·k of group g.
    Int3,
    /// 0..=3, four a byte: byte 4·i + g of a quad holds codes i, i + 8, i + 16 and i + 24 of its group g, the first in its
    /// lowest two bits.
    Int2,
    /// 0..=15 in two bits each, which lie as those of [`Int2`](Self::Int2): what they stand for depends on the two before them in
    /// their group, see [`trellis`]. Of turned values only.
    Trellis2,
}

impl CodeKind {
    /// The largest code.
    #[must_use]
    pub const fn largest(self) -> u8 {
        match self {
            Self::Int8 => 255,
            Self::Int4 | Self::Trellis2 => 15,
            Self::Int3 => 7,
            Self::Int2 => 3,
        }
    }

    /// Bits of a code.
    #[must_use]
    pub const fn bits(self) -> usize {
        match self {
            Self::Int8 => 8,
            Self::Int4 => 4,
            Self::Int3 => 3,
            Self::Int2 | Self::Trellis2 => 2,
        }
    }

    /// Bytes of the codes of four groups.
    #[must_use]
    pub const fn quad_bytes(self) -> usize {
        QUAD * GROUP * self.bits() / 8
    }

    /// Bytes of the codes of `groups` groups, in whole quads.
    #[must_use]
    pub const fn code_bytes(self, groups: usize) -> usize {
        groups.div_ceil(QUAD) * self.quad_bytes()
    }

    /// Bytes of `groups` groups with their scales and minima.
    #[must_use]
    pub const fn bytes(self, groups: usize) -> usize {
        self.code_bytes(groups) + groups * 2 * size_of::<f16>()
    }

    /// Code `index` of group `group` of a quad.
    #[inline(always)]
    #[must_use]
    pub fn code(self, quad: &[u8], group: usize, index: usize) -> u8 {
        match self {
            Self::Int8 => quad[QUAD * index + group],
            Self::Int4 => quad[QUAD * (index % 16) + group] >> (index / 16 * 4) & 15,
            Self::Int3 => {
                let high = quad[QUARTER + QUAD * (index % 4) + group] >> (index / 4) & 1;
                Self::Int2.code(quad, group, index) | high << 2
            }
            Self::Int2 => quad[QUAD * (index % 8) + group] >> (index / 8 * 2) & 3,
            Self::Trellis2 => {
                let back = |by: usize| index.checked_sub(by).map_or(0, |index| Self::Int2.code(quad, group, index));
                trellis::level(back(0), back(1), back(2))
            }
        }
    }

    /// Writes code `index` of group `group` of a quad, of as many bits as the kind has.
    fn set(self, quad: &mut [u8], group: usize, index: usize, code: u8) {
        let mut put = |at: usize, shift: usize, bits: u32| {
            let byte = &mut quad[QUAD * at + group];
            let mask = u8::MAX >> (8 - bits);
            *byte = *byte & !(mask << shift) | (code & mask) << shift;
        };
        match self {
            Self::Int8 => put(index, 0, 8),
            Self::Int4 => put(index % 16, index / 16 * 4, 4),
            Self::Int2 | Self::Trellis2 => put(index % 8, index / 8 * 2, 2),
            Self::Int3 => {
                put(index % 8, index / 8 * 2, 2);
                let byte = &mut quad[QUARTER + QUAD * (index % 4) + group];
                *byte = *byte & !(1 << (index / 4)) | (code >> 2) << (index / 4);
            }
        }
    }

    /// Writes the codes of quad `quad` among those of all.
    fn pack(self, all: &mut [u8], quad: usize, codes: &[[u8; GROUP]; QUAD]) {
        // Part of the codes from `index` on in steps of `step`, as many bits of each, shifted: those of all groups.
        let packed = |index: usize, step: usize, (shift, bits): (usize, usize)| -> [u8; QUAD] {
            core::array::from_fn(|group| {
                let codes = codes[group][index..].iter().step_by(step).enumerate();
                codes.fold(0, |byte, (at, code)| byte | (code >> shift & (u8::MAX >> (8 - bits))) << (at * bits))
            })
        };
        let quad = &mut all[quad * self.quad_bytes()..][..self.quad_bytes()];
        for (index, to) in quad.as_chunks_mut::<QUAD>().0.iter_mut().enumerate() {
            *to = match self {
                Self::Int8 => core::array::from_fn(|group| codes[group][index]),
                Self::Int4 => core::array::from_fn(|group| codes[group][index] | codes[group][index + GROUP / 2] << 4),
                Self::Int3 if index >= QUARTER / QUAD => packed(index - QUARTER / QUAD, GROUP / 8, (2, 1)),
                Self::Int3 | Self::Int2 | Self::Trellis2 => packed(index, GROUP / 4, (0, 2)),
            };
        }
    }

    /// Writes the quad that ends with group `group` of `groups`, in which codes of groups that are none become 0; before its end
    /// there is nothing to do.
    fn pack_ended(self, all: &mut [u8], (group, groups): (usize, usize), quad: &mut [[u8; GROUP]; QUAD]) {
        let at = group % QUAD;
        if at + 1 == QUAD || group + 1 == groups {
            quad[at + 1..].fill([0; GROUP]);
            self.pack(all, group / QUAD, quad);
        }
    }

    /// The parts of `bytes`, which start with `groups` groups: codes, then scales, then minima.
    ///
    /// # Errors
    /// [`Error::Length`] where `bytes` is too short or not aligned for binary16.
    pub fn parts(self, bytes: &[u8], groups: usize) -> Result<Groups<'_>, Error> {
        let (needed, actual) = (self.bytes(groups), bytes.len());
        let bytes = bytes.get(..needed).ok_or(Error::Length { what: "quantised groups", expected: needed, actual })?;
        let (codes, affine) = bytes.split_at(self.code_bytes(groups));
        let (scales, mins) = elements::<f16>(affine)?.split_at(groups);
        Ok(Groups { kind: self, codes, affine: Affine::Halves { scales, mins } })
    }

    /// [`parts`](Self::parts), for writing.
    ///
    /// # Errors
    /// As [`parts`](Self::parts).
    pub(crate) fn parts_mut(self, bytes: &mut [u8], groups: usize) -> Result<GroupsMut<'_>, Error> {
        let (needed, actual) = (self.bytes(groups), bytes.len());
        let bytes =
            bytes.get_mut(..needed).ok_or(Error::Length { what: "quantised groups", expected: needed, actual })?;
        let (codes, affine) = bytes.split_at_mut(self.code_bytes(groups));
        let (scales, mins) = elements_mut::<f16>(affine)?.split_at_mut(groups);
        Ok(GroupsMut { kind: self, codes, scales, mins })
    }
}

/// Quantised groups, for reading.
#[derive(Clone, Copy, Debug)]
pub struct Groups<'a> {
    /// How the codes are stored.
    pub kind: CodeKind,
    /// The codes, quad after quad, [`CodeKind::quad_bytes`] each. A quad that the groups do not fill has codes of 0 in the
    /// others.
    pub codes: &'a [u8],
    /// What the codes mean.
    pub affine: Affine<'a>,
}

/// What codes mean.
#[derive(Clone, Copy, Debug)]
pub enum Affine<'a> {
    /// A group's own scale and minimum.
    Halves {
        /// Scales, one a group.
        scales: &'a [f16],
        /// Minima, one a group.
        mins: &'a [f16],
    },
    /// Of turned values: codes are [about 0](Groups::middle).
    Turned {
        /// Scales, one a token.
        scales: &'a [f16],
    },
    /// A group's own scale in [eight bits](small), and what a code of 0 stands for in steps of it.
    Small {
        /// Scales, one a group.
        scales: &'a [u8],
        /// Minima, one a group.
        zeros: &'a [i8],
    },
    /// A group's own scale in [eight bits](small); codes are [about 0](Groups::middle).
    Middle {
        /// Scales, one a group.
        scales: &'a [u8],
    },
}

impl Affine<'_> {
    /// Groups; of turned values tokens.
    #[inline(always)]
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Halves { scales, .. } | Self::Turned { scales } => scales.len(),
            Self::Small { scales, .. } | Self::Middle { scales } => scales.len(),
        }
    }

    /// Whether there is no group.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(feature = "defmt")]
impl defmt::Format for Groups<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "Groups {{ kind: {}, groups: {=usize} }}", self.kind, self.affine.len());
    }
}

impl Groups<'_> {
    /// Number `index` of group `group`.
    ///
    /// # Panics
    /// Where there is no such group.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, group: usize, index: usize) -> f32 {
        let quad = &self.codes[group / QUAD * self.kind.quad_bytes()..][..self.kind.quad_bytes()];
        let code = f32::from(self.kind.code(quad, group % QUAD, index));
        match self.affine {
            Affine::Halves { scales, mins } => code * scales[group].load() + mins[group].load(),
            Affine::Turned { scales } => (code - self.middle()) * scales[group % BLOCK].load(),
            Affine::Small { scales, zeros } => (code + f32::from(zeros[group])) * small::scale(scales[group]),
            Affine::Middle { scales } => (code - self.middle()) * small::scale(scales[group]),
        }
    }

    /// What stands for 0 where codes are about it: a number between two codes.
    #[inline(always)]
    #[must_use]
    pub fn middle(&self) -> f32 {
        f32::from(self.kind.largest()) / 2.0
    }

    /// Channel `channel` of the key of lane `lane`, where the groups are a key block: a group is a channel.
    ///
    /// # Panics
    /// Where there is no such channel or lane.
    #[inline(always)]
    #[must_use]
    pub fn key(&self, channel: usize, lane: usize) -> f32 {
        self.get(channel, lane)
    }

    /// Channel `channel` of the value of token `token`, where the groups are a value block: a group is 32 channels of a
    /// token, the first 32 of all tokens before the next.
    ///
    /// # Panics
    /// Where there is no such channel or token.
    #[inline(always)]
    #[must_use]
    pub fn value(&self, token: usize, channel: usize) -> f32 {
        self.get(channel / GROUP * BLOCK + token, channel % GROUP)
    }
}

/// Quantised groups, for writing.
pub(crate) struct GroupsMut<'a> {
    kind: CodeKind,
    codes: &'a mut [u8],
    scales: &'a mut [f16],
    mins: &'a mut [f16],
}

impl GroupsMut<'_> {
    /// Stores the groups of quad `quad`, as many as there are of it.
    pub(crate) fn put(&mut self, quad: usize, numbers: &[[f32; GROUP]; QUAD]) {
        let first = quad * QUAD;
        let mut codes = [[0; GROUP]; QUAD];
        let affine = self.scales[first..].iter_mut().zip(&mut self.mins[first..]);
        for (((scale, min), numbers), codes) in affine.zip(numbers).zip(&mut codes) {
            (*scale, *min) = range::quantise(self.kind, numbers, codes);
        }
        self.pack(quad, &codes);
    }

    /// Stores the codes of a whole quad.
    fn pack(&mut self, quad: usize, codes: &[[u8; GROUP]; QUAD]) {
        self.kind.pack(self.codes, quad, codes);
    }

    /// The bytes of the quad of group `group`, and the group's place in it.
    fn quad(&mut self, group: usize) -> (&mut [u8], usize) {
        (&mut self.codes[group / QUAD * self.kind.quad_bytes()..][..self.kind.quad_bytes()], group % QUAD)
    }

    /// Stores group `group` alone.
    pub(crate) fn put_group(&mut self, group: usize, numbers: &[f32; GROUP]) {
        let mut codes = [0; GROUP];
        (self.scales[group], self.mins[group]) = range::quantise(self.kind, numbers, &mut codes);
        self.put_codes(group, (0..).zip(codes));
    }

    /// Stores group `group`, which follows the one stored before, and replaces its numbers by what is stored of them. `quad` holds
    /// codes until there are four groups, or all.
    fn put_next(&mut self, group: usize, numbers: &mut [f32; GROUP], quad: &mut [[u8; GROUP]; QUAD]) {
        let at = group % QUAD;
        let (scale, min) = range::quantise(self.kind, numbers, &mut quad[at]);
        (self.scales[group], self.mins[group]) = (scale, min);
        let (scale, min) = (scale.load(), min.load());
        numbers.iter_mut().zip(&quad[at]).for_each(|(x, &code)| *x = f32::from(code) * scale + min);
        self.kind.pack_ended(self.codes, (group, self.scales.len()), quad);
    }

    fn put_codes(&mut self, group: usize, codes: impl Iterator<Item = (usize, u8)>) {
        let kind = self.kind;
        let (quad, group) = self.quad(group);
        codes.for_each(|(index, code)| kind.set(quad, group, index, code));
    }

    /// Stores the numbers at `indices` of group `group` as `numbers` has them, in place of what was there; the others of
    /// `numbers` do not count. Scale and minimum stay, so that the other numbers are what they were, unless a number lies
    /// more than half a step outside of the range; where codes are few, unless all then are off by less.
    pub(crate) fn replace(
        &mut self,
        group: usize,
        indices: impl Iterator<Item = usize> + Clone,
        numbers: &[f32; GROUP],
    ) {
        let affine =
            range::Line { scale: self.scales[group], min: self.mins[group], levels: f32::from(self.kind.largest()) };
        let (low, step) = (affine.min.load(), affine.scale.load());
        let high = low + step * affine.levels;
        let within = low - step / 2.0..=high + step / 2.0;
        let mut codes = [0; GROUP];
        affine.encode(numbers, &mut codes);
        let error = |index: usize| f32::from(codes[index]) * step + low - numbers[index];
        if !indices.clone().all(|index| within.contains(&numbers[index])) {
            let clamped: f32 = indices.clone().map(|index| error(index) * error(index)).sum();
            let kind = self.kind;
            let mut mixed = [0.0; GROUP];
            let (quad, at) = self.quad(group);
            for (index, x) in mixed.iter_mut().enumerate() {
                *x = f32::from(kind.code(quad, at, index)) * step + low;
            }
            indices.clone().for_each(|index| mixed[index] = numbers[index]);
            let mut anew = [0; GROUP];
            let (scale, min) = range::quantise(kind, &mixed, &mut anew);
            let off = |(&code, x): (&u8, &f32)| f32::from(code) * scale.load() + min.load() - x;
            let whole: f32 = anew.iter().zip(&mixed).map(off).map(|off| off * off).sum();
            // Few codes leave numbers outside of their range anyway. What is no number stays visible.
            if kind.largest() > 7 || clamped.is_nan() || clamped > whole {
                (self.scales[group], self.mins[group]) = (scale, min);
                return self.put_codes(group, (0..).zip(anew));
            }
        }
        self.put_codes(group, indices.map(|index| (index, codes[index])));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// Scale and minimum of a group; of turned values the scale of a token.
    pub(super) fn affine(groups: &Groups<'_>, group: usize) -> (f16, f16) {
        match groups.affine {
            Affine::Halves { scales, mins } => (scales[group], mins[group]),
            Affine::Turned { scales } => (scales[group], f16::ZERO),
            Affine::Small { .. } | Affine::Middle { .. } => unreachable!("these are of mixed key blocks"),
        }
    }

    proptest! {
        /// In a range that has them, new numbers take nothing from the others; else all are as near as codes allow.
        #[test]
        fn replaced_numbers_leave_the_others_alone(
            numbers in prop::array::uniform32(-1.0f32..1.0),
            new in prop::collection::vec((0usize..32, -1.0f32..1.0), 1..6),
            far in prop_oneof![3 => Just(1.0f32), 1 => 1.0f32..20.0],
            offset in -3.0f32..3.0,
        ) {
            for kind in [CodeKind::Int8, CodeKind::Int4, CodeKind::Int3, CodeKind::Int2] {
                let mut memory = vec![0u16; kind.bytes(6) / 2];
                let bytes = bytemuck::cast_slice_mut(&mut memory);
                let numbers = numbers.map(|x| x + offset);
                let mut parts = kind.parts_mut(bytes, 6).unwrap();
                parts.put(0, &[[9.0; 32]; 4]);
                parts.put(1, &[numbers, numbers, [7.0; 32], [7.0; 32]]);
                let before: [f32; 32] = core::array::from_fn(|i| kind.parts(bytes, 6).unwrap().get(4, i));
                let affine = |bytes: &[u8]| affine(&kind.parts(bytes, 6).unwrap(), 4);
                let (scale, min) = affine(bytes);
                let (low, high) = (min.load(), min.load() + scale.load() * f32::from(kind.largest()));
                let mut target = before;
                let mut wanted = [f32::MAX; 32];
                for &(at, x) in &new {
                    wanted[at] = x * far + offset;
                    target[at] = wanted[at];
                }
                let indices = || (0..32).filter(|&at| wanted[at] != f32::MAX);
                kind.parts_mut(bytes, 6).unwrap().replace(4, indices(), &wanted);
                let groups = kind.parts(bytes, 6).unwrap();
                let slack = 1e-5 * (1.0 + low.abs());
                let step = scale.load();
                if indices().all(|at| (low - step * 0.49..=high + step * 0.49).contains(&wanted[at])) {
                    prop_assert_eq!(affine(bytes), (scale, min));
                }
                let mut error = 0.0;
                for at in 0..32 {
                    let off = groups.get(4, at) - target[at];
                    if affine(bytes) == (scale, min) && wanted[at] == f32::MAX {
                        prop_assert_eq!(groups.get(4, at), before[at]);
                    }
                    error += off * off;
                }
                // No worse than all numbers stored anew, or half a step each.
                let mut codes = [0; 32];
                let (s, m) = range::quantise(kind, &target, &mut codes);
                let anew: f32 =
                    codes.iter().zip(&target).map(|(&c, x)| (f32::from(c) * s.load() + m.load() - x).powi(2)).sum();
                let half = indices().count() as f32 * (step / 2.0 + slack).powi(2);
                prop_assert!(error <= anew.max(half) * 1.001 + 1e-9, "{error}, anew {anew}, {half}");
                let within = kind.largest() <= 7 || affine(bytes) == (scale, min);
                prop_assert!(within || indices().any(|at| !(low - step / 2.0..=high + step / 2.0).contains(&wanted[at])));
                // The groups beside it are as they were.
                let beside: Vec<f32> = (0..32).map(|at| groups.get(5, at)).collect();
                let mut twice = vec![0u16; kind.bytes(6) / 2];
                let bytes = bytemuck::cast_slice_mut(&mut twice);
                kind.parts_mut(bytes, 6).unwrap().put(1, &[numbers, numbers, [7.0; 32], [7.0; 32]]);
                prop_assert_eq!(beside, (0..32).map(|at| kind.parts(bytes, 6).unwrap().get(5, at)).collect::<Vec<_>>());
                prop_assert_eq!(groups.get(3, 31), 9.0);
                // A group put alone is as it is among four.
                kind.parts_mut(bytes, 6).unwrap().put_group(4, &numbers);
                let alone: [f32; 32] = core::array::from_fn(|i| kind.parts(bytes, 6).unwrap().get(4, i));
                prop_assert_eq!(alone, before);
            }
        }
    }

    #[test]
    fn codes_lie_where_they_are_said_to() {
        let rows = |step: usize, levels: f32| -> [[f32; 32]; 4] {
            core::array::from_fn(|group| core::array::from_fn(|i| ((i / step + group) as f32).min(levels)))
        };
        let mut memory = [0u16; 64];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
        // Code i of group g is i / 2: from 0 to 15 in every group.
        CodeKind::Int4.parts_mut(bytes, 4).unwrap().put(0, &rows(2, 100.0));
        assert_eq!(bytes[4 * 3 + 2], 0x91);
        let groups = CodeKind::Int4.parts(bytes, 4).unwrap();
        assert_eq!((groups.key(2, 3), groups.key(2, 19)), (3.0, 11.0));
        let mut memory = [0u16; 72];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
        CodeKind::Int8.parts_mut(bytes, 4).unwrap().put(0, &rows(1, 100.0));
        assert_eq!((bytes[1], bytes[4 * 31 + 3]), (0, 255));
        for kind in [CodeKind::Int2, CodeKind::Int3] {
            let mut memory = [0u16; 48];
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
            // Code i of group g is i + g, as far as the kind counts.
            let numbers = core::array::from_fn(|group| {
                core::array::from_fn(|i| ((i + group) % (usize::from(kind.largest()) + 1)) as f32)
            });
            kind.parts_mut(bytes, 4).unwrap().put(0, &numbers);
            let groups = kind.parts(bytes, 4).unwrap();
            for (group, numbers) in numbers.iter().enumerate() {
                for (i, &x) in numbers.iter().enumerate() {
                    assert_eq!(groups.get(group, i), x, "{kind:?}, number {i} of group {group}");
                }
            }
            // Codes 1, 9, 17 and 25 of group 2: all 3, but for their high bits.
            assert_eq!(bytes[4 + 2], 0xFF);
            if kind == CodeKind::Int3 {
                // Codes 1, 5, 9 and so on of group 3: 4 and 0 in turns.
                assert_eq!(bytes[32 + 4 + 3], 0b0101_0101);
            }
        }
    }

    #[test]
    fn values_lie_by_channels_first() {
        let mut memory = [0u16; CodeKind::Int8.bytes(64) / 2];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
        // Tokens 4..8, channels 32..64: groups 36..40.
        CodeKind::Int8.parts_mut(bytes, 64).unwrap().put(9, &core::array::from_fn(|t| [t as f32; 32]));
        let groups = CodeKind::Int8.parts(bytes, 64).unwrap();
        assert_eq!((groups.value(6, 40), groups.value(6, 8)), (2.0, 0.0));
    }

    #[test]
    fn what_is_no_number_stays_visible() {
        let mut numbers = [[1.0; 32]; 4];
        numbers[0][7] = f32::NAN;
        let mut memory = [0u16; 66];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
        CodeKind::Int8.parts_mut(bytes, 1).unwrap().put(0, &numbers);
        assert!(affine(&CodeKind::Int8.parts(bytes, 1).unwrap(), 0).1.is_nan());
        assert!(CodeKind::Int8.parts(bytes, 2).is_err());
    }

    #[test]
    fn infinities_are_brought_into_range() {
        let mut numbers = [[0.0; 32]; 4];
        (numbers[0][0], numbers[0][1]) = (f32::INFINITY, f32::NEG_INFINITY);
        let mut memory = [0u16; 66];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
        CodeKind::Int8.parts_mut(bytes, 1).unwrap().put(0, &numbers);
        let groups = CodeKind::Int8.parts(bytes, 1).unwrap();
        assert!((groups.get(0, 0) - 65504.0).abs() < 300.0 && (groups.get(0, 1) + 65504.0).abs() < 300.0);
    }
}
