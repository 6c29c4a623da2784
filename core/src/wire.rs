//! Masks, layouts and cache headers as checked bytes: postcard, with a CRC-32 (ISO-HDLC) at the end.
//!
//! ```
//! use thinkey_core::{wire, ChannelMask};
//! let mask = ChannelMask::from_channels(64, [3, 40])?;
//! let mut memory = [0; 64];
//! let frame = wire::encode(&mask, &mut memory)?;
//! assert_eq!(wire::decode::<ChannelMask>(frame)?, mask);
//! # Ok::<(), thinkey_core::Error>(())
//! ```

use crate::{CachePlan, Error, Lambda, StorageKind, policy::Fix};
use crc::{CRC_32_ISO_HDLC, Crc};
use serde::{Deserialize, Serialize};

pub(crate) const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// Version of the format of [`CacheHeader`].
pub const VERSION: u16 = 3;

/// The CRC-32 (ISO-HDLC) of `bytes`.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u32 {
    CRC.checksum(bytes)
}

/// Encodes `value` into the front of `memory`; returns the bytes used.
///
/// # Errors
/// [`Error::Capacity`] with the bytes needed where `memory` is too small.
pub fn encode<'a, T: Serialize>(value: &T, memory: &'a mut [u8]) -> Result<&'a mut [u8], Error> {
    let capacity = memory.len();
    let needed = encoded_len(value)?;
    if needed > capacity {
        return Err(Error::Capacity { what: "frame bytes", needed, capacity });
    }
    postcard::to_slice_crc32(value, memory, CRC.digest()).map_err(|_| Error::Frame)
}

/// Bytes that [`encode`] takes for `value`.
///
/// # Errors
/// [`Error::Frame`] for a value that has no encoding.
pub fn encoded_len<T: Serialize>(value: &T) -> Result<usize, Error> {
    let body = postcard::serialize_with_flavor(value, postcard::ser_flavors::Size::default());
    Ok(body.map_err(|_| Error::Frame)? + size_of::<u32>())
}

/// Decodes a frame that is exactly one `T`, which may borrow from it.
///
/// # Errors
/// [`Error::Frame`] where the frame is damaged, cut off, followed by other bytes or no valid `T`.
pub fn decode<'a, T: Deserialize<'a>>(frame: &'a [u8]) -> Result<T, Error> {
    // postcard reads past a checksum without complaint: the rest must be empty.
    match postcard::take_from_bytes_crc32(frame, CRC.digest()) {
        Ok((value, [])) => Ok(value),
        _ => Err(Error::Frame),
    }
}

/// Most layers, KV heads a layer and caches a KV head of a header: far more than any model's, and few enough that counting
/// the bytes of all heads of a hostile one is soon done.
const MOST: [(&str, u16); 3] = [("layers", 1024), ("kv_heads", 64), ("copies", crate::MAX_GROUP as u16)];

/// What a stored or sent cache starts with: enough to allocate for it and to refuse it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct CacheHeader {
    /// Format version, [`VERSION`].
    pub version: u16,
    /// λ in force.
    pub lambda: Lambda,
    /// Layers.
    pub layers: u16,
    /// KV heads per layer.
    pub kv_heads: u16,
    /// Caches of a KV head.
    pub copies: u16,
    /// Whether heads share their channels out anew for every prompt.
    pub flexible: bool,
    /// Whether masks are chosen anew in the course of a sequence.
    pub renews: bool,
    /// Channels per head, D.
    pub head_dim: u16,
    /// First tokens stored whole for good.
    pub sinks: u16,
    /// Newest tokens stored whole, R.
    pub recent: u16,
    /// How queries make up for what the keys of the prefix lack.
    pub fix: Fix,
    /// Share of value channels that the prefix lacks.
    pub value_lambda: Lambda,
    /// Tokens that there is room for.
    pub tokens: u32,
    /// Sliding window of the model, if any.
    pub window: Option<u32>,
    /// How keys are stored.
    pub keys: StorageKind,
    /// How values are stored.
    pub values: StorageKind,
}

impl CacheHeader {
    /// The header of a cache with one sequence.
    ///
    /// # Errors
    /// [`Error::Capacity`] where a number of the plan does not fit its field; [`Error::Inconsistent`] for one that evicts
    /// tokens by ranks, which the format has not.
    pub fn new(plan: &CachePlan, lambda: Lambda) -> Result<Self, Error> {
        if plan.eviction.is_some() {
            return Err(Error::Inconsistent { what: "eviction" });
        }
        Ok(Self {
            version: VERSION,
            lambda,
            layers: narrow("layers", plan.layers)?,
            kv_heads: narrow("kv_heads", plan.kv_heads)?,
            copies: narrow("copies", plan.copies)?,
            flexible: plan.flexible,
            renews: plan.renews,
            head_dim: narrow("head_dim", plan.head_dim)?,
            sinks: narrow("sinks", plan.sinks)?,
            recent: narrow("recent", plan.recent)?,
            fix: plan.fix,
            value_lambda: plan.value_lambda,
            tokens: narrow("tokens", plan.tokens)?,
            window: plan.window.map(|window| narrow("window", window)).transpose()?,
            keys: plan.keys,
            values: plan.values,
        })
    }

    /// The plan of the cache that follows.
    ///
    /// # Errors
    /// [`Error::Version`] for another version; [`Error::Capacity`] for more layers or heads than any model has; as
    /// [`CachePlan::head`] for numbers that cannot be.
    pub fn plan(&self) -> Result<CachePlan, Error> {
        if self.version != VERSION {
            return Err(Error::Version { found: self.version, supported: VERSION });
        }
        for ((what, most), number) in MOST.into_iter().zip([self.layers, self.kv_heads, self.copies]) {
            if number > most {
                return Err(Error::Capacity { what, needed: number.into(), capacity: most.into() });
            }
        }
        let plan = CachePlan {
            layers: self.layers as usize,
            kv_heads: self.kv_heads as usize,
            copies: self.copies as usize,
            flexible: self.flexible,
            renews: self.renews,
            head_dim: self.head_dim as usize,
            sinks: self.sinks as usize,
            recent: self.recent as usize,
            fix: self.fix,
            value_lambda: self.value_lambda,
            slots: 1,
            tokens: self.tokens as usize,
            window: self.window.map(|window| window as usize),
            keys: self.keys,
            values: self.values,
            eviction: None,
        };
        plan.head(self.lambda.kept(plan.head_dim))?;
        Ok(plan)
    }
}

fn narrow<T: TryFrom<usize>>(what: &'static str, value: usize) -> Result<T, Error> {
    let capacity = if size_of::<T>() == 2 { u16::MAX as usize } else { u32::MAX as usize };
    T::try_from(value).map_err(|_| Error::Capacity { what, needed: value, capacity })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChannelMask, HeadLayout};
    use proptest::prelude::*;

    const LAYOUT: HeadLayout = HeadLayout {
        head_dim: 64,
        kept: 26,
        sinks: 4,
        recent: 32,
        fix: Fix::Compensated,
        kept_values: 45,
        renews: false,
        slots: 2,
        pages: 300,
        keys: StorageKind::F16,
        values: StorageKind::F32,
        ranked: 0,
    };

    fn header() -> CacheHeader {
        CacheHeader {
            version: VERSION,
            lambda: Lambda::from_per_mille(600).unwrap(),
            layers: 30,
            kv_heads: 3,
            copies: 3,
            flexible: true,
            renews: false,
            head_dim: 64,
            sinks: 4,
            recent: 32,
            fix: Fix::Lowrank,
            value_lambda: Lambda::from_per_mille(300).unwrap(),
            tokens: 8192,
            window: None,
            keys: StorageKind::F16,
            values: StorageKind::F16,
        }
    }

    proptest! {
        #[test]
        fn masks_round_trip(head_dim in 1usize..=256, seed in any::<u64>()) {
            let kept = (0..head_dim).filter(|&c| c == 0 || seed.rotate_left(c as u32 * 7) & 1 == 1);
            let mask = ChannelMask::from_channels(head_dim, kept).unwrap();
            let mut memory = [0; 128];
            let frame = encode(&mask, &mut memory).unwrap();
            prop_assert_eq!(frame.len(), encoded_len(&mask).unwrap());
            prop_assert_eq!(decode::<ChannelMask>(frame).unwrap(), mask);
        }

        #[test]
        fn hostile_frames_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode::<ChannelMask>(&bytes);
            let _ = decode::<HeadLayout>(&bytes);
            let _ = decode::<CacheHeader>(&bytes).map(|header| header.plan());
        }
    }

    #[test]
    fn layout_and_header_round_trip() {
        let mut memory = [0; 64];
        let frame = encode(&LAYOUT, &mut memory).unwrap();
        assert_eq!(decode::<HeadLayout>(frame), Ok(LAYOUT));
        let frame = encode(&header(), &mut memory).unwrap();
        assert_eq!(decode::<CacheHeader>(frame), Ok(header()));
        let plan = header().plan().unwrap();
        assert_eq!(CacheHeader::new(&plan, header().lambda), Ok(header()));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut memory = [0; 64];
        let len = encode(&header(), &mut memory).unwrap().len();
        for bit in 0..len * 8 {
            let mut frame = memory;
            frame[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode::<CacheHeader>(&frame[..len]), Err(Error::Frame), "bit {bit}");
        }
    }

    #[test]
    fn cut_and_padded_frames_are_refused() {
        let mut memory = [0; 64];
        let len = encode(&LAYOUT, &mut memory).unwrap().len();
        for cut in 0..len {
            assert!(decode::<HeadLayout>(&memory[..cut]).is_err());
        }
        assert!(decode::<HeadLayout>(&memory[..len + 1]).is_err());
        assert_eq!(
            encode(&LAYOUT, &mut [0; 3]).unwrap_err(),
            Error::Capacity { what: "frame bytes", needed: len, capacity: 3 }
        );
    }

    #[test]
    fn impossible_headers_are_refused() {
        assert_eq!(CacheHeader { version: 9, ..header() }.plan(), Err(Error::Version { found: 9, supported: VERSION }));
        // Counting these heads one by one would take hours.
        for many in [
            CacheHeader { layers: u16::MAX, ..header() },
            CacheHeader { kv_heads: u16::MAX, ..header() },
            CacheHeader { copies: u16::MAX, ..header() },
        ] {
            assert!(matches!(many.plan(), Err(Error::Capacity { needed: 65535, .. })));
        }
        assert!(CacheHeader { head_dim: 0, ..header() }.plan().is_err());
        assert!(CacheHeader { recent: u16::MAX, ..header() }.plan().is_err());
    }
}
