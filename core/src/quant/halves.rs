//! Key blocks of which one half of the channels has more bits than the other.
//!
//! Where channels are stored in the order in which they matter, the first half in four bits and the others in two take three
//! bits a number. Such a block is two, one behind the other.

use super::{CodeKind, GROUP, Groups, GroupsMut, QUAD};
use crate::{
    Error,
    storage::{Form, TURNED_KEYS},
};

/// Channels that have four bits, of `kept`: half of them, in whole quads.
#[must_use]
pub const fn fine(kept: usize) -> usize {
    let fine = kept.div_ceil(2).next_multiple_of(QUAD);
    if fine < kept { fine } else { kept }
}

/// Bytes of a block of `kept` channels.
#[must_use]
pub const fn bytes(kept: usize) -> usize {
    CodeKind::Int4.bytes(fine(kept)) + CodeKind::Int2.bytes(kept - fine(kept))
}

/// At least the bytes of a block, growing evenly with `kept`: sixteen a channel, and what rounding to quads adds.
#[must_use]
pub(crate) const fn most_bytes(kept: usize) -> usize {
    16 * kept + CodeKind::Int4.bytes(QUAD)
}

/// How the groups of a key block are split: so many of one kind, the others of the other.
const fn split(form: Form, channels: usize) -> Result<[(CodeKind, usize); 2], Error> {
    match form {
        Form::Codes(kind) => Ok([(kind, channels), (kind, 0)]),
        Form::Halves => {
            let fine = fine(channels);
            Ok([(CodeKind::Int4, fine), (CodeKind::Int2, channels - fine)])
        }
        Form::Float(_) | Form::Turned(_) => Err(TURNED_KEYS),
    }
}

/// The groups of a key block, for reading: group c is channel c.
#[derive(Clone, Copy, Debug)]
pub struct KeyGroups<'a> {
    /// Those of the first channels, then those of the others; where all are of one kind, there are no others.
    pub parts: [Groups<'a>; 2],
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
        let [(kind, first), (other, rest)] = split(form, channels)?;
        let parts = [kind.parts(bytes, first)?, other.parts(&bytes[kind.bytes(first)..], rest)?];
        Ok(Self { parts })
    }

    /// Channel `channel` of the key of lane `lane`.
    ///
    /// # Panics
    /// Where there is no such channel or lane.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, channel: usize, lane: usize) -> f32 {
        let [first, rest] = &self.parts;
        match channel.checked_sub(first.scales.len()) {
            None => first.get(channel, lane),
            Some(channel) => rest.get(channel, lane),
        }
    }
}

/// The groups of a key block, for writing one after the other.
pub(crate) struct KeyGroupsMut<'a> {
    parts: [GroupsMut<'a>; 2],
    /// Codes of the quad at hand.
    quad: [[u8; GROUP]; QUAD],
}

impl<'a> KeyGroupsMut<'a> {
    /// As [`KeyGroups::new`].
    pub(crate) fn new(form: Form, bytes: &'a mut [u8], channels: usize) -> Result<Self, Error> {
        let [(kind, first), (other, rest)] = split(form, channels)?;
        let (needed, actual) = (kind.bytes(first) + other.bytes(rest), bytes.len());
        let (front, back) = bytes.split_at_mut_checked(kind.bytes(first)).ok_or(Error::Length {
            what: "quantised groups",
            expected: needed,
            actual,
        })?;
        Ok(Self { parts: [kind.parts_mut(front, first)?, other.parts_mut(back, rest)?], quad: [[0; GROUP]; QUAD] })
    }

    /// Stores the numbers of a channel, which is the next one, and replaces them by what is stored of them.
    pub(crate) fn put(&mut self, channel: usize, numbers: &mut [f32; GROUP]) {
        let [first, rest] = &mut self.parts;
        match channel.checked_sub(first.scales.len()) {
            None => first.put_next(channel, numbers, &mut self.quad),
            Some(channel) => rest.put_next(channel, numbers, &mut self.quad),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn halves_are_whole_quads() {
        for (kept, first) in [(1, 1), (3, 3), (4, 4), (7, 4), (8, 4), (9, 8), (16, 8), (40, 20), (64, 32), (255, 128)] {
            assert_eq!(fine(kept), first, "{kept}");
        }
        assert_eq!(bytes(40), 20 * (16 + 4) + 20 * (8 + 4));
        assert!((1..=256).all(|kept| bytes(kept) <= most_bytes(kept)));
    }

    /// What is read is what was said to be stored, channel by channel, and as groups of one kind alone have it.
    #[test]
    fn channels_are_stored_one_after_the_other() {
        for form in [Form::Halves, Form::Codes(CodeKind::Int3)] {
            for channels in [1, 4, 6, 13, 40] {
                let len = bytes(channels).max(CodeKind::Int3.bytes(channels));
                let mut memory = vec![u16::MAX; len / 2];
                let mut told = vec![[0.0; GROUP]; channels];
                let mut groups = KeyGroupsMut::new(form, bytemuck::cast_slice_mut(&mut memory), channels).unwrap();
                for (channel, numbers) in told.iter_mut().enumerate() {
                    *numbers = core::array::from_fn(|lane| ((lane * 7 + channel * 3) % 23) as f32 - 9.5);
                    groups.put(channel, numbers);
                }
                let groups = KeyGroups::new(form, bytemuck::cast_slice(&memory), channels).unwrap();
                for (channel, numbers) in told.iter().enumerate() {
                    let few = if form == Form::Halves && channel < fine(channels) { 0.8 } else { 6.5 };
                    for (lane, &x) in numbers.iter().enumerate() {
                        assert_eq!(groups.get(channel, lane), x);
                        let given = ((lane * 7 + channel * 3) % 23) as f32 - 9.5;
                        assert!((given - x).abs() < few, "{form:?} {channel}: {given} became {x}");
                    }
                }
            }
        }
        assert!(KeyGroups::new(Form::Halves, &[0; 10], 8).is_err());
        assert!(KeyGroups::new(Form::Turned(CodeKind::Int2), &[0; 1000], 8).is_err());
    }
}
