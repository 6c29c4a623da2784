//! Key blocks of which the first channels have more bits than the others.
//!
//! Where channels are stored in the order in which they matter, later ones need fewer bits. The first quarter has codes of four
//! bits, and a scale and a zero point of [eight bits](super::small) each for its 32 tokens: 4.5 bits a number. The others are
//! stored by the [trellis], along the tokens, with a scale of eight bits: 2.25. What room is left in the last
//! line of a block goes to the first ones, so that a number takes 3 to 3.4 bits.
//!
//! ```text
//! codes of the first channels, four bits each, in quads
//! their scales u8, their zero points i8
//! codes of the others, two bits each, in quads
//! their scales u8
//! ```
//!
//! Measured on SmolLM2-135M (WikiText-2 validation, 4 windows of 2,048 + 256 tokens, values in trellis2, blocks not filled) as the
//! divergence from the whole cache in nats, with as many channels as so many bits a key allow:
//!
//! | bits of the channels | 102 bits a key | 65 bits a key |
//! |---|---|---|
//! | 4.5 for the first half, 2.25 for the others | 0.0290 ± 0.0029 | 0.0581 ± 0.0055 |
//! | 4.5 for the first quarter, 2.25 for the others | | 0.0550 ± 0.0023 |
//! | 4.5, 3.5 and twice 2.25, for a quarter each | 0.0285 ± 0.0033 | |
//! | 3.5 for the first half, 2.25 for the others | 0.0335 ± 0.0046 | |
//! | 3.5 for all | 0.0389 ± 0.0043 | |
//! | 2.25 for all | | 0.128 ± 0.013 |
//! | 5 and 3, codes evenly apart with scales and minima in binary16 | 0.0388 ± 0.0035 | |
//!
//! As blocks are stored, and over 16 windows, with shares λ = 0.4, 0.5, 0.6 and 0.7 of the channels pruned, a first quarter takes
//! 14.0, 13.0, 12.1 and 11.1% of a whole f16 cache of 8,000 tokens and diverges by 0.0336, 0.0394, 0.0566 and 0.0771; a first
//! half took 14.9, 13.8, 12.8 and 11.8% and diverged by 0.0225, 0.0290, 0.0426 and 0.0681. The half is the better one of more than
//! about 12.5%, and the quarter below, which is what such keys are for.

use super::{Affine, CodeKind, GROUP, Groups, GroupsMut, QUAD, small, trellis};
use crate::{
    Error,
    storage::{ALIGN, Form, TURNED_KEYS, align},
};

/// Channels that have four bits, of `kept`: a quarter of them, in whole quads, and as many quads more as have room in the last line
/// of the block, which is there anyway.
#[must_use]
pub const fn fine(kept: usize) -> usize {
    let mut fine = quarter(kept);
    while fine < kept && block_bytes(fine + QUAD, kept) <= align(block_bytes(fine, kept)) {
        fine += QUAD;
    }
    if fine < kept { fine } else { kept }
}

/// A quarter of the channels, in whole quads.
const fn quarter(kept: usize) -> usize {
    kept.div_ceil(4).next_multiple_of(QUAD)
}

/// Bytes of the first channels, `fine` of them: codes, scales and zero points.
const fn fine_bytes(fine: usize) -> usize {
    CodeKind::Int4.code_bytes(fine) + 2 * fine
}

/// Bytes of the others, `rest` of them: codes and scales.
const fn rest_bytes(rest: usize) -> usize {
    CodeKind::Trellis2.code_bytes(rest) + rest
}

/// Bytes of a block of `kept` channels, of which `fine` have four bits, or all.
const fn block_bytes(fine: usize, kept: usize) -> usize {
    let fine = if fine < kept { fine } else { kept };
    fine_bytes(fine) + rest_bytes(kept - fine)
}

/// Bytes of a block of `kept` channels.
#[must_use]
pub const fn bytes(kept: usize) -> usize {
    block_bytes(fine(kept), kept)
}

/// At least the bytes of a block in whole lines, growing evenly with `kept`: 11.25 a channel, and what rounding to quads and lines adds.
#[must_use]
pub(crate) const fn most_bytes(kept: usize) -> usize {
    (45 * kept).div_ceil(4) + fine_bytes(QUAD) + ALIGN
}

/// What does not fit.
const fn misfit(expected: usize, actual: usize) -> Error {
    Error::Length { what: "quantised groups", expected, actual }
}

/// The groups of a key block, for reading: group c is channel c.
#[derive(Clone, Copy, Debug)]
pub struct KeyGroups<'a> {
    /// Those of the first channels, then those of the others; where all are of one kind, there are no others.
    pub parts: [Groups<'a>; 2],
    /// Bytes of the first ones.
    pub front: usize,
}

#[cfg(feature = "defmt")]
impl defmt::Format for KeyGroups<'_> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "KeyGroups {{ parts: {} }}", self.parts);
    }
}

impl<'a> KeyGroups<'a> {
    /// Those of `bytes`, which start with a block of so many channels.
    ///
    /// # Errors
    /// [`Error::Length`] where `bytes` is too short or not aligned for binary16, [`Error::Inconsistent`] for a form that has no
    /// groups or is not of keys.
    pub fn new(form: Form, bytes: &'a [u8], channels: usize) -> Result<Self, Error> {
        match form {
            Form::Codes(kind) => {
                let front = kind.bytes(channels);
                Ok(Self { parts: [kind.parts(bytes, channels)?, kind.parts(&bytes[front..], 0)?], front })
            }
            Form::Mixed => {
                let (needed, actual) = (self::bytes(channels), bytes.len());
                let bytes = bytes.get(..needed).ok_or(misfit(needed, actual))?;
                let fine = fine(channels);
                let (first, rest) = bytes.split_at(fine_bytes(fine));
                let (codes, affine) = first.split_at(first.len() - 2 * fine);
                let (scales, zeros) = affine.split_at(fine);
                let affine = Affine::Small { scales, zeros: bytemuck::cast_slice(zeros) };
                let front = Groups { kind: CodeKind::Int4, codes, affine };
                let (codes, scales) = rest.split_at(rest.len() - (channels - fine));
                let rest = Groups { kind: CodeKind::Trellis2, codes, affine: Affine::Middle { scales } };
                Ok(Self { parts: [front, rest], front: first.len() })
            }
            Form::Float(_) | Form::Turned(_) => Err(TURNED_KEYS),
        }
    }

    /// Channel `channel` of the key of lane `lane`.
    ///
    /// # Panics
    /// Where there is no such channel or lane.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, channel: usize, lane: usize) -> f32 {
        let [first, rest] = &self.parts;
        match channel.checked_sub(first.affine.len()) {
            None => first.get(channel, lane),
            Some(channel) => rest.get(channel, lane),
        }
    }
}

/// The groups of a key block, for writing one after the other.
pub(crate) struct KeyGroupsMut<'a> {
    parts: PartsMut<'a>,
    /// Codes of the quad at hand.
    quad: [[u8; GROUP]; QUAD],
}

enum PartsMut<'a> {
    Groups(GroupsMut<'a>),
    Mixed { fine: Fine<'a>, rest: Rest<'a> },
}

/// The first channels.
struct Fine<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    zeros: &'a mut [i8],
}

/// The others.
struct Rest<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl<'a> KeyGroupsMut<'a> {
    /// As [`KeyGroups::new`].
    pub(crate) fn new(form: Form, bytes: &'a mut [u8], channels: usize) -> Result<Self, Error> {
        let parts = match form {
            Form::Codes(kind) => PartsMut::Groups(kind.parts_mut(bytes, channels)?),
            Form::Mixed => {
                let (needed, actual) = (self::bytes(channels), bytes.len());
                let bytes = bytes.get_mut(..needed).ok_or(misfit(needed, actual))?;
                let fine = fine(channels);
                let (first, rest) = bytes.split_at_mut(fine_bytes(fine));
                let (codes, affine) = first.split_at_mut(CodeKind::Int4.code_bytes(fine));
                let (scales, zeros) = affine.split_at_mut(fine);
                let fine = Fine { codes, scales, zeros: bytemuck::cast_slice_mut(zeros) };
                let (codes, scales) = rest.split_at_mut(CodeKind::Trellis2.code_bytes(channels - fine.scales.len()));
                PartsMut::Mixed { fine, rest: Rest { codes, scales } }
            }
            Form::Float(_) | Form::Turned(_) => return Err(TURNED_KEYS),
        };
        Ok(Self { parts, quad: [[0; GROUP]; QUAD] })
    }

    /// Stores the numbers of a channel, which is the next one, and replaces them by what is stored of them.
    pub(crate) fn put(&mut self, channel: usize, numbers: &mut [f32; GROUP]) {
        match &mut self.parts {
            PartsMut::Groups(groups) => groups.put_next(channel, numbers, &mut self.quad),
            PartsMut::Mixed { fine, rest } => match channel.checked_sub(fine.scales.len()) {
                None => {
                    let at = channel % QUAD;
                    (fine.scales[channel], fine.zeros[channel]) = quantise(numbers, &mut self.quad[at]);
                    let (scale, zero) = (small::scale(fine.scales[channel]), f32::from(fine.zeros[channel]));
                    let codes = &self.quad[at];
                    numbers.iter_mut().zip(codes).for_each(|(x, &code)| *x = (f32::from(code) + zero) * scale);
                    CodeKind::Int4.pack_ended(fine.codes, (channel, fine.scales.len()), &mut self.quad);
                }
                Some(channel) => {
                    let codes = &mut self.quad[channel % QUAD];
                    rest.scales[channel] = small::nearest(match numbers.iter().any(|x| x.is_nan()) {
                        true => f32::NAN,
                        false => trellis::quantise(numbers, codes),
                    });
                    let scale = small::scale(rest.scales[channel]);
                    numbers.iter_mut().zip(trellis::levels(codes)).for_each(|(x, level)| *x = level * scale);
                    CodeKind::Trellis2.pack_ended(rest.codes, (channel, rest.scales.len()), &mut self.quad);
                }
            },
        }
    }
}

/// Writes the codes of four bits of `numbers` and returns their scale and zero point. No number is off by more than half a step,
/// where the scale is one that can be said; one that is none makes the scale one that is not, and stays visible.
fn quantise(numbers: &[f32; GROUP], codes: &mut [u8; GROUP]) -> (u8, i8) {
    const LEVELS: f32 = 15.0;
    let nan = numbers.iter().fold(false, |nan, x| nan | x.is_nan());
    let least = numbers.iter().fold(f32::MAX, |least, &x| if x < least { x } else { least });
    let most = numbers.iter().fold(f32::MIN, |most, &x| if x > most { x } else { most });
    // Of numbers that lie far from 0 the zero point has to be told in the steps that there are.
    let step = ((most - least) / LEVELS).max(least.abs() / 127.0);
    let byte = small::at_least(if nan { f32::NAN } else { step });
    if nan {
        codes.fill(0);
        return (byte, 0);
    }
    let scale = small::scale(byte);
    let zero = (i16::from((least / scale + 128.5).clamp(1.0, 255.0) as u8) - 128) as i8;
    let inverse = 1.0 / scale;
    for (code, x) in codes.iter_mut().zip(numbers) {
        // As every code is made, see `Line::encode`.
        let steps = (x * inverse - f32::from(zero)).clamp(0.0, LEVELS);
        *code = (steps + 8_388_608.0).to_bits() as u8;
    }
    (byte, zero)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn the_first_channels_are_whole_quads() {
        for (kept, first) in [(1, 1), (3, 3), (4, 4), (7, 4), (8, 4), (9, 8), (16, 4), (40, 16), (64, 20), (256, 64)] {
            assert_eq!(fine(kept), first, "{kept}");
        }
        assert_eq!(bytes(40), 16 * (16 + 2) + 24 * (8 + 1));
        for kept in 1..=256 {
            assert!(align(bytes(kept)) <= most_bytes(kept));
            let least = quarter(kept).min(kept);
            assert!(
                least <= fine(kept) && fine(kept) <= kept && (fine(kept).is_multiple_of(QUAD) || fine(kept) == kept)
            );
            // More would need another line.
            assert_eq!(align(bytes(kept)), align(block_bytes(least, kept)), "{kept}");
            let more = block_bytes(fine(kept) + QUAD, kept);
            assert!(fine(kept) == kept || more > align(bytes(kept)), "{kept}");
        }
    }

    /// What is read is what was said to be stored, channel by channel, and as groups of one kind alone have it.
    #[test]
    fn channels_are_stored_one_after_the_other() {
        for form in [Form::Mixed, Form::Codes(CodeKind::Int3)] {
            for channels in [1, 4, 6, 13, 40] {
                let len = bytes(channels).max(CodeKind::Int3.bytes(channels));
                let mut memory = vec![u16::MAX; len.div_ceil(2)];
                let mut told = vec![[0.0; GROUP]; channels];
                let mut groups = KeyGroupsMut::new(form, bytemuck::cast_slice_mut(&mut memory), channels).unwrap();
                for (channel, numbers) in told.iter_mut().enumerate() {
                    *numbers = core::array::from_fn(|lane| ((lane * 7 + channel * 3) % 23) as f32 - 9.5);
                    groups.put(channel, numbers);
                }
                let groups = KeyGroups::new(form, bytemuck::cast_slice(&memory), channels).unwrap();
                for (channel, numbers) in told.iter().enumerate() {
                    let few = if form == Form::Mixed && channel < fine(channels) { 0.8 } else { 6.5 };
                    for (lane, &x) in numbers.iter().enumerate() {
                        assert_eq!(groups.get(channel, lane), x);
                        let given = ((lane * 7 + channel * 3) % 23) as f32 - 9.5;
                        assert!((given - x).abs() < few, "{form:?} {channel}: {given} became {x}");
                    }
                }
            }
        }
        assert!(KeyGroups::new(Form::Mixed, &[0; 10], 8).is_err());
        assert!(KeyGroups::new(Form::Turned(CodeKind::Int2), &[0; 1000], 8).is_err());
    }
}
