//! The set of channels that a head keeps.

use crate::{Error, MAX_HEAD_DIM};
use serde::{Deserialize, Serialize};

const WORDS: usize = MAX_HEAD_DIM / 32;

/// The channels one KV head keeps, as a bit set: 36 bytes for any head dimension up to 256.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawMask", into = "RawMask")]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct ChannelMask {
    head_dim: u16,
    kept: u16,
    bits: [u32; WORDS],
}

/// What travels on the wire: `kept` is not repeated, and the bits are checked against `head_dim`.
#[derive(Serialize, Deserialize)]
struct RawMask {
    head_dim: u16,
    bits: [u32; WORDS],
}

impl ChannelMask {
    /// Keeps all `head_dim` channels.
    ///
    /// # Errors
    /// [`Error::HeadDim`] where `head_dim` is zero or above [`MAX_HEAD_DIM`].
    pub fn whole(head_dim: usize) -> Result<Self, Error> {
        let mut mask = Self::empty(head_dim)?;
        for channel in 0..head_dim {
            mask.insert(channel);
        }
        Ok(mask)
    }

    /// Keeps the channels listed, in any order.
    ///
    /// # Errors
    /// [`Error::HeadDim`], [`Error::Index`] for a channel outside the head, [`Error::Kept`] where none or one twice is
    /// listed.
    pub fn from_channels(head_dim: usize, channels: impl IntoIterator<Item = usize>) -> Result<Self, Error> {
        let mut mask = Self::empty(head_dim)?;
        let mut listed = 0;
        for channel in channels {
            if channel >= head_dim {
                return Err(Error::Index { what: "channel", index: channel, limit: head_dim });
            }
            mask.insert(channel);
            listed += 1;
        }
        if listed == 0 || listed != mask.kept() {
            return Err(Error::Kept { kept: listed, head_dim });
        }
        Ok(mask)
    }

    /// The mask as bits, the first channel's lowest, in the front of `bytes`, which has room for D.
    pub(crate) fn to_bits(self, bytes: &mut [u8]) {
        let words = self.bits.iter().flat_map(|word| word.to_le_bytes());
        bytes.iter_mut().zip(words).take(self.head_dim().div_ceil(8)).for_each(|(to, byte)| *to = byte);
    }

    /// The mask whose bits are in the front of `bytes`.
    pub(crate) fn from_bits(head_dim: usize, bytes: &[u8]) -> Result<Self, Error> {
        let mut mask = Self::empty(head_dim)?;
        let bit = |channel: &usize| bytes.get(channel / 8).is_some_and(|byte| byte >> (channel % 8) & 1 == 1);
        (0..head_dim).filter(bit).for_each(|channel| mask.insert(channel));
        Ok(mask)
    }

    /// The mask of as many channels that keeps all.
    #[must_use]
    pub(crate) fn all(self) -> Self {
        let mut all = self;
        (0..self.head_dim()).for_each(|channel| all.insert(channel));
        all
    }

    fn empty(head_dim: usize) -> Result<Self, Error> {
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { head_dim });
        }
        Ok(Self { head_dim: head_dim as u16, kept: 0, bits: [0; WORDS] })
    }

    fn insert(&mut self, channel: usize) {
        if !self.contains(channel) {
            self.bits[channel / 32] |= 1 << (channel % 32);
            self.kept += 1;
        }
    }

    /// Channels of the head, D.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.head_dim as usize
    }

    /// Channels kept, T.
    #[must_use]
    pub const fn kept(&self) -> usize {
        self.kept as usize
    }

    /// Whether `channel` is kept; false outside the head.
    #[must_use]
    pub const fn contains(&self, channel: usize) -> bool {
        channel < self.head_dim as usize && self.bits[channel / 32] >> (channel % 32) & 1 == 1
    }

    /// The kept channels, ascending.
    pub fn channels(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        let bits = self.bits;
        (0..WORDS).flat_map(move |word| {
            let mut rest = bits[word];
            core::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros() as usize)?;
                rest &= rest - 1;
                Some(word * 32 + bit)
            })
        })
    }

    /// Copies the kept channels of `whole` (length D) to `thin` (length T).
    ///
    /// # Panics
    /// Where a slice is shorter than that.
    pub fn gather(&self, whole: &[f32], thin: &mut [f32]) {
        for (to, channel) in thin[..self.kept()].iter_mut().zip(self.channels()) {
            *to = whole[channel];
        }
    }
}

impl core::fmt::Debug for ChannelMask {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} of {}: ", self.kept, self.head_dim)?;
        f.debug_set().entries(self.channels()).finish()
    }
}

impl From<ChannelMask> for RawMask {
    fn from(mask: ChannelMask) -> Self {
        Self { head_dim: mask.head_dim, bits: mask.bits }
    }
}

impl TryFrom<RawMask> for ChannelMask {
    type Error = Error;

    fn try_from(raw: RawMask) -> Result<Self, Error> {
        let whole = Self::whole(raw.head_dim as usize)?;
        if raw.bits.iter().zip(whole.bits).any(|(&bits, valid)| bits & !valid != 0) {
            return Err(Error::Inconsistent { what: "mask bits" });
        }
        let kept = raw.bits.iter().map(|word| word.count_ones()).sum::<u32>() as u16;
        if kept == 0 {
            return Err(Error::Kept { kept: 0, head_dim: raw.head_dim as usize });
        }
        Ok(Self { head_dim: raw.head_dim, kept, bits: raw.bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn channels_ascend_and_gather() {
        let mask = ChannelMask::from_channels(100, [99, 0, 32, 31, 64]).unwrap();
        assert_eq!(mask.channels().collect::<Vec<_>>(), [0, 31, 32, 64, 99]);
        let whole: Vec<f32> = (0..100u8).map(f32::from).collect();
        let mut thin = [0.0; 5];
        mask.gather(&whole, &mut thin);
        assert_eq!(thin, [0.0, 31.0, 32.0, 64.0, 99.0]);
        assert!(mask.contains(99) && !mask.contains(98) && !mask.contains(1000));
    }

    #[test]
    fn bad_lists_are_refused() {
        assert!(ChannelMask::from_channels(8, [8]).is_err());
        assert!(ChannelMask::from_channels(8, []).is_err());
        assert!(ChannelMask::from_channels(8, [1, 1]).is_err());
        assert!(ChannelMask::whole(0).is_err() && ChannelMask::whole(257).is_err());
        assert_eq!(ChannelMask::whole(256).unwrap().kept(), 256);
    }
}
