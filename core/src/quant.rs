//! Asymmetric quantisation in groups of 32 numbers, as KIVI does it ([arXiv 2402.02750](https://arxiv.org/abs/2402.02750)):
//! x ≈ code · scale + min.
//!
//! A group is 32 tokens of one key channel (keys have channels of very different size), or 32 channels of one token's
//! value. Scale and minimum are binary16, rounded so that every number of the group is inside of what the codes can say:
//! no number is off by more than half a step.
//!
//! Where codes are few, the whole range is not the best one: two bits say four numbers, and of 32 the outermost lie far from
//! most. So ranges of 2- and 3-bit codes are also tried at 85% and 70% of the width, and the one whose codes correlate best
//! with the numbers is taken; of Gaussian numbers that leaves 0.74 and 0.91 of the whole range's squared error (nine widths
//! leave 0.73 and 0.89). Scale and minimum are then not those of the range, but those that keep the group's mean and do
//! not shrink it: Σ stored·x = Σ x², both less the mean. The scale of least squares shrinks every number a little (by 10%
//! with 2 bits), in the same direction in every token, and attention, which averages what tokens are off by, does not
//! average that away: with values in int2 the divergence from the whole cache was 0.053 by least squares, 0.026 by the
//! whole range and 0.018 so (SmolLM2-135M, news, 2 windows of 2,048 + 256 tokens).
//!
//! Values may be [turned](crate::value::turn) first. Their numbers then have no direction of their own: codes are symmetric
//! about 0, x ≈ (code − middle) · scale, and a token has one scale for all of its channels, 2.25 bits a number of 64 where
//! groups with two bits take 3. Four steps are tried, and the scale does not shrink the vector: Σ stored·x = Σ x². Two bits say
//! most of them by a [trellis].
//!
//! Four groups lie interleaved, number by number: the four codes that a query (over channels) or a row of weights (over
//! tokens) meets together are one 32-bit word, which is what integer dot products of bytes take.

use crate::{
    BLOCK, Error, MAX_HEAD_DIM,
    storage::{Element, elements, elements_mut},
};
use half::f16;

pub mod halves;
pub mod small;
pub mod trellis;

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

    /// Bytes of a block of 32 turned values of `head_dim` channels, with their scales.
    #[must_use]
    pub const fn turned_bytes(self, head_dim: usize) -> usize {
        self.code_bytes(BLOCK * head_dim.div_ceil(GROUP)) + BLOCK * size_of::<f16>()
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

    /// Writes the codes of a whole quad.
    fn pack(self, quad: &mut [u8], codes: &[[u8; GROUP]; QUAD]) {
        // Part of the codes from `index` on in steps of `step`, as many bits of each, shifted: those of all groups.
        let packed = |index: usize, step: usize, (shift, bits): (usize, usize)| -> [u8; QUAD] {
            core::array::from_fn(|group| {
                let codes = codes[group][index..].iter().step_by(step).enumerate();
                codes.fold(0, |byte, (at, code)| byte | (code >> shift & (u8::MAX >> (8 - bits))) << (at * bits))
            })
        };
        for (index, to) in quad.as_chunks_mut::<QUAD>().0.iter_mut().enumerate() {
            *to = match self {
                Self::Int8 => core::array::from_fn(|group| codes[group][index]),
                Self::Int4 => core::array::from_fn(|group| codes[group][index] | codes[group][index + GROUP / 2] << 4),
                Self::Int3 if index >= QUARTER / QUAD => packed(index - QUARTER / QUAD, GROUP / 8, (2, 1)),
                Self::Int3 | Self::Int2 | Self::Trellis2 => packed(index, GROUP / 4, (0, 2)),
            };
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
            (*scale, *min) = quantise(self.kind, numbers, codes);
        }
        self.pack(quad, &codes);
    }

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

    /// Stores the codes of a whole quad.
    fn pack(&mut self, quad: usize, codes: &[[u8; GROUP]; QUAD]) {
        self.kind.pack(&mut self.codes[quad * self.kind.quad_bytes()..][..self.kind.quad_bytes()], codes);
    }
}

impl GroupsMut<'_> {
    /// The bytes of the quad of group `group`, and the group's place in it.
    fn quad(&mut self, group: usize) -> (&mut [u8], usize) {
        (&mut self.codes[group / QUAD * self.kind.quad_bytes()..][..self.kind.quad_bytes()], group % QUAD)
    }

    /// Stores group `group` alone.
    pub(crate) fn put_group(&mut self, group: usize, numbers: &[f32; GROUP]) {
        let mut codes = [0; GROUP];
        (self.scales[group], self.mins[group]) = quantise(self.kind, numbers, &mut codes);
        self.put_codes(group, (0..).zip(codes));
    }

    /// Stores group `group`, which follows the one stored before, and replaces its numbers by what is stored of them. `quad` holds
    /// codes until there are four groups, or all.
    fn put_next(&mut self, group: usize, numbers: &mut [f32; GROUP], quad: &mut [[u8; GROUP]; QUAD]) {
        let at = group % QUAD;
        let (scale, min) = quantise(self.kind, numbers, &mut quad[at]);
        (self.scales[group], self.mins[group]) = (scale, min);
        let (scale, min) = (scale.load(), min.load());
        numbers.iter_mut().zip(&quad[at]).for_each(|(x, &code)| *x = f32::from(code) * scale + min);
        if at + 1 == QUAD || group + 1 == self.scales.len() {
            quad[at + 1..].fill([0; GROUP]);
            self.pack(group / QUAD, quad);
        }
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
        let affine = Line { scale: self.scales[group], min: self.mins[group], levels: f32::from(self.kind.largest()) };
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
            let (scale, min) = quantise(kind, &mixed, &mut anew);
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

/// Writes the codes of `numbers` and returns their scale and minimum. A number that is not one makes the minimum one that
/// is not: it stays visible.
fn quantise(kind: CodeKind, numbers: &[f32; GROUP], codes: &mut [u8; GROUP]) -> (f16, f16) {
    const LARGEST: f32 = 65504.0;
    const LANES: usize = 8;
    // Lane by lane, so that the loops become vector instructions.
    let (mut least, mut most, mut nan) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES], [0u32; LANES]);
    for numbers in numbers.chunks_exact(LANES) {
        for (((&x, least), most), nan) in numbers.iter().zip(&mut least).zip(&mut most).zip(&mut nan) {
            *least = if x < *least { x } else { *least };
            *most = if x > *most { x } else { *most };
            *nan |= u32::from(x.is_nan());
        }
    }
    if nan.iter().any(|&nan| nan != 0) {
        codes.fill(0);
        return (f16::ZERO, f16::NAN);
    }
    let least = least.iter().copied().fold(f32::INFINITY, f32::min);
    let most = most.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (least, most) = (least.clamp(-LARGEST, LARGEST), most.clamp(-LARGEST, LARGEST));
    let whole = Line::new(kind, least, most);
    if kind.largest() > 7 {
        whole.encode(numbers, codes);
        return (whole.scale, whole.min);
    }
    let (middle, half) = (least / 2.0 + most / 2.0, most / 2.0 - least / 2.0);
    let (mut found, mut best) = (None, 0.0);
    for width in WIDTHS {
        let mut other = [0; GROUP];
        Line::new(kind, middle - width * half, middle + width * half).encode(numbers, &mut other);
        let fit = Fit::new(&other, numbers);
        if fit.quality() > best {
            (found, best, *codes) = (fit.affine(), fit.quality(), other);
        }
    }
    found.unwrap_or_else(|| {
        whole.encode(numbers, codes);
        (whole.scale, whole.min)
    })
}

/// Shares of the whole range that few codes are tried over.
const WIDTHS: [f32; 3] = [1.0, 0.85, 0.7];

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
        let scale = <f16 as Element>::store(quantise_by_trellis(numbers, codes));
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

/// Writes the codes of `numbers`, which are some, by the [trellis](trellis), and returns the scale that does not shrink them; 0
/// where there is none.
fn quantise_by_trellis(numbers: &[f32], codes: &mut [u8]) -> f32 {
    let mut bounded = [0.0; MAX_HEAD_DIM];
    let bounded = &mut bounded[..numbers.len()];
    bounded.iter_mut().zip(numbers).for_each(|(to, x)| *to = x.clamp(-65504.0, 65504.0));
    let (squares, most) =
        bounded.iter().fold((0.0, 0.0), |(sum, most): (f32, f32), x| (sum + x * x, most.max(x.abs())));
    // Where one number stands far out, it is met halfway.
    let step = (trellis::STEP * libm::sqrtf(squares / numbers.len() as f32)).max(most / (1.5 * trellis::MIDDLE));
    let inverse = 1.0 / step;
    codes.fill(0);
    if !inverse.is_finite() {
        return 0.0;
    }
    let mut both = 0.0;
    for (numbers, codes) in bounded.chunks(GROUP).zip(codes.chunks_mut(GROUP)) {
        trellis::encode(numbers, inverse, codes);
        both += trellis::levels(codes).zip(numbers).map(|(level, x)| level * x).sum::<f32>();
    }
    if both > 0.0 { squares / both } else { 0.0 }
}

/// Codes and the numbers that they stand for, as a regression sees them.
#[derive(Clone, Copy)]
struct Fit {
    /// Mean of the codes and of the numbers.
    means: (f32, f32),
    /// Σ (code − mean)².
    codes: f32,
    /// Σ (number − mean)².
    numbers: f32,
    /// Σ (code − mean)·(number − mean).
    both: f32,
}

impl Fit {
    fn new(codes: &[u8; GROUP], numbers: &[f32; GROUP]) -> Self {
        const LANES: usize = 8;
        let mut sums = [[0.0f32; LANES]; 2];
        for (codes, numbers) in codes.as_chunks::<LANES>().0.iter().zip(numbers.as_chunks::<LANES>().0) {
            for (lane, (&code, &x)) in codes.iter().zip(numbers).enumerate() {
                sums[0][lane] += f32::from(code);
                sums[1][lane] += x;
            }
        }
        let means = sums.map(|sums| sums.iter().sum::<f32>() / GROUP as f32);
        let mut sums = [[0.0f32; LANES]; 3];
        for (codes, numbers) in codes.as_chunks::<LANES>().0.iter().zip(numbers.as_chunks::<LANES>().0) {
            for (lane, (&code, &x)) in codes.iter().zip(numbers).enumerate() {
                let (code, x) = (f32::from(code) - means[0], x - means[1]);
                sums[0][lane] += code * code;
                sums[1][lane] += x * x;
                sums[2][lane] += code * x;
            }
        }
        let [codes, numbers, both] = sums.map(|sums| sums.iter().sum());
        Self { means: (means[0], means[1]), codes, numbers, both }
    }

    /// The square of the correlation, times what is the same for all codes of a group.
    fn quality(&self) -> f32 {
        self.both * (self.both / self.codes)
    }

    /// The scale and minimum that keep the mean, and what the numbers have in common with themselves: Σ stored·x = Σ x·x,
    /// both less the mean. `None` where half precision has no such numbers.
    fn affine(&self) -> Option<(f16, f16)> {
        let scale = <f16 as Element>::store(self.numbers / self.both);
        let min = <f16 as Element>::store(self.means.1 - scale.load() * self.means.0);
        (scale >= f16::MIN_POSITIVE && scale < f16::MAX && min > f16::MIN && min < f16::MAX).then_some((scale, min))
    }
}

/// What codes mean: a line.
#[derive(Clone, Copy)]
struct Line {
    scale: f16,
    min: f16,
    /// The largest code.
    levels: f32,
}

impl Line {
    /// Codes that reach from `least` to `most`, both finite binary16 or between such.
    fn new(kind: CodeKind, least: f32, most: f32) -> Self {
        let mut min = <f16 as Element>::store(least);
        if min.load() > least {
            min = below(min);
        }
        let (offset, levels) = (min.load(), f32::from(kind.largest()));
        let mut scale = <f16 as Element>::store((most - offset) / levels);
        if scale.load() * levels < most - offset {
            scale = f16::from_bits(scale.to_bits() + 1);
        }
        Self { scale, min, levels }
    }

    /// The codes nearest to `numbers`.
    fn encode(self, numbers: &[f32; GROUP], codes: &mut [u8; GROUP]) {
        let (offset, step, levels) = (self.min.load(), self.scale.load(), self.levels);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        for (to, &x) in codes.iter_mut().zip(numbers) {
            // Adding 2^23 to a number below it rounds to an integer, in the low bits: a conversion that is one
            // instruction on every vector unit, where a saturating cast is a branch a number.
            let steps = (x - offset) * inverse;
            let steps = if steps > 0.0 { steps } else { 0.0 };
            let steps = if steps < levels { steps } else { levels };
            *to = (steps + 8_388_608.0).to_bits() as u8;
        }
    }
}

/// The next smaller binary16 of a finite one.
fn below(x: f16) -> f16 {
    match x.to_bits() {
        0 => f16::from_bits(0x8001),
        bits if bits & 0x8000 == 0 => f16::from_bits(bits - 1),
        // The most negative number stays: numbers were brought into range before.
        bits => f16::from_bits((bits + 1).min(0xfbff)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// Scale and minimum of a group; of turned values the scale of a token.
    fn affine(groups: &Groups<'_>, group: usize) -> (f16, f16) {
        match groups.affine {
            Affine::Halves { scales, mins } => (scales[group], mins[group]),
            Affine::Turned { scales } => (scales[group], f16::ZERO),
            Affine::Small { .. } | Affine::Middle { .. } => unreachable!("these are of key blocks in halves"),
        }
    }

    proptest! {
        #[test]
        fn numbers_are_off_by_half_a_step_or_not_shrunk(
            numbers in prop::array::uniform32(prop_oneof![-70000.0f32..70000.0, -1.0f32..1.0, -1e-6f32..1e-6, Just(0.0)]),
            shift in prop_oneof![Just(0.0f32), -100.0f32..100.0],
            flat in any::<bool>(),
        ) {
            let numbers = numbers.map(|x| if flat { shift } else { (x + shift).clamp(-65504.0, 65504.0) });
            for kind in [CodeKind::Int8, CodeKind::Int4, CodeKind::Int3, CodeKind::Int2] {
                let mut memory = vec![0u16; kind.bytes(6) / 2];
                let bytes = bytemuck::cast_slice_mut(&mut memory);
                kind.parts_mut(bytes, 6).unwrap().put(1, &[[0.0; 32], numbers, [1.0; 32], [2.0; 32]]);
                let groups = kind.parts(bytes, 6).unwrap();
                let (least, most) = numbers.iter().fold((f32::MAX, f32::MIN), |(l, m), &x| (l.min(x), m.max(x)));
                // Scale and minimum are rounded outwards, by a part in 2048 or the least binary16.
                let span = f64::from(most) - f64::from(least) + f64::from(least.abs()) / 1024.0 + 6e-8;
                let step = span * (1.0 + 1.0 / 1024.0) / f64::from(kind.largest()) + 6e-8;
                let stored: [f64; GROUP] = core::array::from_fn(|index| f64::from(groups.get(5, index)));
                // Half precision ends the range of what it cannot say.
                let largest = least.abs().max(most.abs());
                let fits = largest < 20_000.0 && affine(&groups, 5).0.load() > 1e-3 * largest;
                if kind.largest() <= 7 && fits && affine(&groups, 5).0 > f16::MIN_POSITIVE {
                    check_fit(kind, &numbers.map(f64::from), &stored, f64::from(affine(&groups, 5).1.load()))?;
                    continue;
                }
                let few = kind.largest() <= 7;
                for (&stored, &x) in stored.iter().zip(numbers.iter().filter(|_| !few)) {
                    let off = (stored - f64::from(x)).abs();
                    let slack = 4e-7 * f64::from(x.abs() + least.abs());
                    prop_assert!(off <= step / 2.0 + slack, "{x} is off by {off}, step {step}");
                }
            }
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
                let (s, m) = quantise(kind, &target, &mut codes);
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

    /// That few codes keep the mean and do not shrink, and correlate no worse than those of the whole range.
    fn check_fit(kind: CodeKind, numbers: &[f64; GROUP], stored: &[f64; GROUP], min: f64) -> Result<(), TestCaseError> {
        let mean = |x: &[f64; GROUP]| x.iter().sum::<f64>() / GROUP as f64;
        let both = |x: &[f64; GROUP], y: &[f64; GROUP]| -> f64 {
            x.iter().zip(y).map(|(a, b)| (a - mean(x)) * (b - mean(y))).sum()
        };
        let (spread, shared) = (both(numbers, numbers), both(numbers, stored));
        // Scale and minimum are rounded to half precision; a group may be far from zero, and its numbers nearly the same.
        let largest = numbers.iter().fold(min.abs(), |most, x| most.max(x.abs()));
        let lost = (mean(numbers) - mean(stored)).abs();
        prop_assert!(lost <= largest * 1e-3, "{kind:?}: the mean moved by {lost}, with numbers up to {largest}");
        if spread < 1e-4 * largest * largest {
            return Ok(());
        }
        prop_assert!((shared / spread - 1.0).abs() < 2e-3, "{kind:?}: {shared} of {spread}");
        let (least, most) = numbers.iter().fold((f64::MAX, f64::MIN), |(l, m), &x| (l.min(x), m.max(x)));
        let levels = f64::from(kind.largest());
        let whole = numbers.map(|x| ((x - least) / (most - least) * levels).round());
        let quality = |codes: &[f64; GROUP]| both(codes, numbers).powi(2) / both(codes, codes) / spread;
        // Half precision moves the ends of the range and with them numbers on a border.
        let (own, whole) = (quality(stored), quality(&whole));
        prop_assert!(own > whole - 0.02, "{kind:?}: {own} instead of {whole}");
        Ok(())
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

    /// What the module says of ranges narrower than the whole one.
    #[test]
    fn narrower_ranges_of_few_codes_have_less_error() {
        let mut seed = 1u64;
        let mut uniform = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 24) as f32
        };
        let mut gaussian = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
        let (mut narrow, mut whole, mut shared, mut energy) = ([0.0; 2], [0.0; 2], [0.0; 2], 0.0);
        for _ in 0..500 {
            let numbers: [f32; GROUP] = core::array::from_fn(|_| gaussian());
            let (least, most) = numbers.iter().fold((f32::MAX, f32::MIN), |(l, m), &x| (l.min(x), m.max(x)));
            energy += numbers.iter().map(|x| x * x).sum::<f32>();
            for (at, kind) in [CodeKind::Int2, CodeKind::Int3].into_iter().enumerate() {
                let mut codes = [0; GROUP];
                let error = |codes: &[u8; GROUP], scale: f16, min: f16| -> f32 {
                    let off = |(&code, x): (&u8, &f32)| (f32::from(code) * scale.load() + min.load() - x).powi(2);
                    codes.iter().zip(&numbers).map(off).sum()
                };
                let range = Line::new(kind, least, most);
                range.encode(&numbers, &mut codes);
                whole[at] += error(&codes, range.scale, range.min);
                let (scale, min) = quantise(kind, &numbers, &mut codes);
                narrow[at] += error(&codes, scale, min);
                let stored = |code: u8| f32::from(code) * scale.load() + min.load();
                shared[at] += codes.iter().zip(&numbers).map(|(&code, x)| stored(code) * x).sum::<f32>();
            }
        }
        assert!(narrow[0] < 0.77 * whole[0] && narrow[1] < 0.94 * whole[1], "{narrow:?} of {whole:?}");
        // Nothing shrinks.
        assert!(shared.iter().all(|shared| (shared / energy - 1.0).abs() < 1e-3), "{shared:?} of {energy}");
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
