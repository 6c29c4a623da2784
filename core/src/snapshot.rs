//! Snapshots: what a cache holds of one sequence, as bytes that another process, or another device of the same model, goes on
//! with. A long document need not be read twice.
//!
//! The thin cache is stored as it is, so that what comes after is what would have come without: to the byte, where the same
//! loops compute it. Blocks lie in the order of the sequence and not where its pages were, so a cache that is planned for
//! another number of tokens takes them, if they fit.
//!
//! # Format
//!
//! ```text
//! magic      "tkSN"
//! version    u16
//! length     u16       of the header
//! header     SnapshotHeader as postcard
//! tokens     u32 each  the sequence's tokens; the last may not be in the cache yet
//! kept       u16 each  T of every head, layer after layer
//! heads                layer after layer, each:
//!     masks  u8        1 where channels are chosen, and then two lists of D bits (bytes filled up): of keys and of values
//!     keys             blocks, as they are stored
//!     values           blocks
//!     slot             ring, energies, sinks and correction, as a slot of HeadLayout has them
//!     ranks  f32 each  of the lanes of the blocks, then of the ring; where tokens are evicted by ranks
//! check      u32       CRC-32 (ISO-HDLC) of all before
//! ```
//!
//! Numbers are little-endian. A file in which a byte is wrong or missing, that is of another version, model or policy, or too
//! long for the context is refused with a [`SnapshotError`], before anything is changed.
//!
//! ```
//! use thinkey_core::snapshot::{Snapshot, SnapshotError};
//! assert_eq!(Snapshot::open(b"GGUF").unwrap_err(), SnapshotError::Magic);
//! assert_eq!(Snapshot::open(b"tkSN\x07\0").unwrap_err(), SnapshotError::Version { found: 7 });
//! assert_eq!(Snapshot::open(b"tkSN\x02\0\x02\0a").unwrap_err(), SnapshotError::Cut { needed: 14, found: 9 });
//! ```

use crate::{Error, HeadLayout, Policy, Span, wire::CRC};
use core::fmt;
use serde::{Deserialize, Serialize};

/// Version of the format.
pub const VERSION: u16 = 2;

/// What every snapshot starts with.
pub const MAGIC: [u8; 4] = *b"tkSN";

/// Most bytes of the header, with what comes before it.
pub const MAX_HEADER: usize = 384;

/// Magic, version and length.
const FRONT: usize = 8;

/// Bytes of the check.
const CHECK: usize = 4;

/// How far a sequence is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Progress {
    /// How many tokens are where.
    pub span: Span,
    /// Tokens ever admitted: the position of the next one.
    pub position: u32,
    /// Whether channels have been chosen.
    pub chosen: bool,
    /// Tokens thinned since.
    pub since: u32,
    /// Query rows of each query head in the energies.
    pub scored: u32,
}

impl Progress {
    /// Whether a sequence can be so far, where `sinks` first tokens and `recent` newest ones stay whole, and all tokens are
    /// held unless some are `lost`, evicted or left behind by a window.
    ///
    /// # Errors
    /// [`SnapshotError::Impossible`].
    pub fn check(&self, sinks: usize, recent: usize, lost: bool) -> Result<(), SnapshotError> {
        let Self { span, position, since, scored, .. } = *self;
        let position = position as usize;
        let impossible = |what| Err(SnapshotError::Impossible { what });
        // In wide numbers: they may be anything.
        let held = u64::from(span.blocks) * crate::BLOCK as u64 + u64::from(span.recent) + u64::from(span.sinks);
        let held = held.wrapping_sub(span.hidden.into());
        if span.hidden as usize >= crate::BLOCK || (span.blocks == 0 && span.hidden > 0) {
            return impossible("hidden lanes");
        }
        if held > position as u64 || (!lost && held < position as u64) {
            return impossible("tokens held");
        }
        if span.sinks as usize != sinks.min(position) {
            return impossible("first tokens");
        }
        if span.blocks > 0 && (span.recent as usize) < recent {
            return impossible("newest tokens");
        }
        if since as usize > position || scored as usize > position {
            return impossible("tokens since the channels were chosen");
        }
        Ok(())
    }
}

/// What a snapshot is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct SnapshotHeader {
    /// A digest of the model, as whoever runs it makes it.
    pub model: [u8; 16],
    /// What the cache does.
    pub policy: Policy,
    /// The shape of a head that keeps all of its channels, without pages.
    pub layout: HeadLayout,
    /// Layers.
    pub layers: u16,
    /// Heads that are cached a layer: KV heads, times their copies.
    pub heads: u16,
    /// Newest queries of a prompt that score its channels, W.
    pub window: u32,
    /// Sliding window of the model, if any.
    pub sliding_window: Option<u32>,
    /// How far the sequence is.
    pub progress: Progress,
    /// Tokens listed: those that the cache holds or has held, and at most one more.
    pub tokens: u32,
    /// Bytes of all heads together.
    pub bytes: u64,
}

impl SnapshotHeader {
    /// All heads.
    const fn all_heads(&self) -> u64 {
        self.layers as u64 * self.heads as u64
    }

    /// Bytes of a snapshot whose front and header are `front` bytes long.
    fn total(&self, front: usize) -> u64 {
        let lists = u64::from(self.tokens) * 4 + self.all_heads() * 2;
        (front as u64 + lists + CHECK as u64).saturating_add(self.bytes)
    }

    /// Writes what comes before the tokens to the front of `memory`; returns it. The tokens, the numbers of channels and the
    /// heads follow, and then the [check].
    ///
    /// # Errors
    /// [`Error::Capacity`] where `memory` is shorter than [`MAX_HEADER`] and the header longer than it.
    pub fn encode<'m>(&self, memory: &'m mut [u8]) -> Result<&'m [u8], Error> {
        let capacity = memory.len();
        let short = Error::Capacity { what: "snapshot header", needed: MAX_HEADER, capacity };
        let (front, rest) = memory.split_at_mut_checked(FRONT).ok_or(short)?;
        let len = postcard::to_slice(self, rest).map_err(|_| short)?.len();
        front[..4].copy_from_slice(&MAGIC);
        front[4..6].copy_from_slice(&VERSION.to_le_bytes());
        front[6..].copy_from_slice(&(len as u16).to_le_bytes());
        Ok(&memory[..FRONT + len])
    }
}

/// The check of a snapshot, all of whose other bytes are `parts`, one after the other.
pub fn check<'p>(parts: impl IntoIterator<Item = &'p [u8]>) -> [u8; 4] {
    let mut digest = CRC.digest();
    parts.into_iter().for_each(|part| digest.update(part));
    digest.finalize().to_le_bytes()
}

/// Why a snapshot cannot be taken or restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum SnapshotError {
    /// It is no snapshot.
    Magic,
    /// It is of another version of the format.
    Version {
        /// Its version.
        found: u16,
    },
    /// It ends too early.
    Cut {
        /// Bytes that it should have, at least.
        needed: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// A byte of it is not what it was.
    Damaged,
    /// It is of another model.
    Model,
    /// It is of another policy.
    Policy {
        /// The first slot in which the two differ. Whose policy says what, [the header](Snapshot::header) knows, and the
        /// session's maker.
        slot: &'static str,
    },
    /// It is of a cache of another shape.
    Shape {
        /// In which number.
        what: &'static str,
    },
    /// It holds more tokens than there is room for.
    Context {
        /// Tokens that it holds.
        tokens: u32,
        /// Tokens that there is room for.
        context: u32,
    },
    /// Its numbers cannot be true together.
    Impossible {
        /// Which.
        what: &'static str,
    },
    /// The sequence is empty.
    Empty,
    /// There is no memory for it.
    Memory {
        /// Bytes needed.
        bytes: u64,
    },
    /// The device has the cache in a form of its own.
    Device,
    /// What a head holds cannot be.
    Core(Error),
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Magic => write!(f, "this is no snapshot"),
            Self::Version { found } => write!(
                f,
                "the snapshot has format version {found}, but this build reads version {VERSION}; save it anew"
            ),
            Self::Cut { needed, found } => {
                write!(f, "the snapshot is cut off: {found} bytes of {needed}; save it anew")
            }
            Self::Damaged => write!(f, "the snapshot is damaged: its check does not fit; save it anew"),
            Self::Model => write!(f, "the snapshot is of another model; restore it where that runs"),
            Self::Policy { slot } => {
                write!(f, "the snapshot is of another policy, with other {slot}; give that which it was saved with")
            }
            Self::Shape { what } => write!(f, "the snapshot is of a cache with other {what}"),
            Self::Context { tokens, context } => {
                write!(f, "the snapshot holds {tokens} tokens, but the context is {context}; give a larger --context")
            }
            Self::Impossible { what } => write!(f, "the snapshot contradicts itself in its {what}"),
            Self::Empty => write!(f, "the cache is empty; ask something first"),
            Self::Memory { bytes } => write!(f, "no memory for a snapshot of {bytes} bytes"),
            Self::Device => write!(
                f,
                "this device has the cache of this policy as plain tensors, which no snapshot is of; compute on the processor (ndarray)"
            ),
            Self::Core(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for SnapshotError {}

impl From<Error> for SnapshotError {
    fn from(error: Error) -> Self {
        Self::Core(error)
    }
}

/// A whole snapshot, whose check fits.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a> {
    header: SnapshotHeader,
    tokens: &'a [u8],
    kept: &'a [u8],
    heads: &'a [u8],
}

impl<'a> Snapshot<'a> {
    /// Reads `bytes`, all of which may be hostile.
    ///
    /// # Errors
    /// [`SnapshotError::Magic`], [`Version`](SnapshotError::Version), [`Cut`](SnapshotError::Cut) and
    /// [`Damaged`](SnapshotError::Damaged).
    pub fn open(bytes: &'a [u8]) -> Result<Self, SnapshotError> {
        let cut = |needed: u64| SnapshotError::Cut { needed, found: bytes.len() as u64 };
        let (magic, version) = (&bytes[..bytes.len().min(4)], bytes.get(4..6));
        if magic != &MAGIC[..magic.len()] || magic.is_empty() {
            return Err(SnapshotError::Magic);
        }
        if let Some(version) = version.and_then(|bytes| bytes.try_into().ok().map(u16::from_le_bytes))
            && version != VERSION
        {
            return Err(SnapshotError::Version { found: version });
        }
        let (front, rest) = bytes.split_first_chunk::<FRONT>().ok_or(cut((FRONT + CHECK) as u64))?;
        let len = usize::from(u16::from_le_bytes([front[6], front[7]]));
        let header = rest.get(..len).ok_or(cut((FRONT + len + CHECK) as u64))?;
        let Ok((header, [])) = postcard::take_from_bytes::<SnapshotHeader>(header) else {
            return Err(SnapshotError::Damaged);
        };
        let needed = header.total(FRONT + len);
        if needed > bytes.len() as u64 {
            return Err(cut(needed));
        }
        let (all, sum) = bytes.split_at(bytes.len() - CHECK);
        if needed < bytes.len() as u64 || check([all]) != sum {
            return Err(SnapshotError::Damaged);
        }
        let (tokens, rest) = all[FRONT + len..].split_at(header.tokens as usize * 4);
        let (kept, heads) = rest.split_at(header.all_heads() as usize * 2);
        Ok(Self { header, tokens, kept, heads })
    }

    /// What it is of.
    #[must_use]
    pub const fn header(&self) -> &SnapshotHeader {
        &self.header
    }

    /// The sequence's tokens.
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.tokens.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes))
    }

    /// Channels that each head keeps, layer after layer.
    pub fn kept(&self) -> impl ExactSizeIterator<Item = u16> + use<'a> {
        self.kept.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes))
    }

    /// The bytes of all heads.
    #[must_use]
    pub const fn heads(&self) -> &'a [u8] {
        self.heads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn header() -> SnapshotHeader {
        SnapshotHeader {
            model: [7; 16],
            policy: Policy::BALANCED,
            layout: HeadLayout::of::<crate::Head<64, 0>>(32, 0, crate::StorageKind::Int4, crate::StorageKind::Int4),
            layers: 2,
            heads: 3,
            window: 32,
            sliding_window: None,
            progress: Progress::default(),
            tokens: 3,
            bytes: 5,
        }
    }

    fn snapshot() -> Vec<u8> {
        let mut memory = [0; MAX_HEADER];
        let mut bytes = header().encode(&mut memory).unwrap().to_vec();
        [1u32, 2, 70_000].iter().for_each(|token| bytes.extend(token.to_le_bytes()));
        (10u16..16).for_each(|kept| bytes.extend(kept.to_le_bytes()));
        bytes.extend(b"heads");
        let sum = check([&bytes[..]]);
        bytes.extend(sum);
        bytes
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = snapshot();
        let snapshot = Snapshot::open(&bytes).unwrap();
        assert_eq!(*snapshot.header(), header());
        assert!(snapshot.tokens().eq([1, 2, 70_000]) && snapshot.kept().eq(10..16));
        assert_eq!(snapshot.heads(), b"heads");
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_noticed() {
        let bytes = snapshot();
        for len in 0..bytes.len() {
            let error = Snapshot::open(&bytes[..len]).unwrap_err();
            assert!(matches!(error, SnapshotError::Cut { .. } | SnapshotError::Magic), "{len}: {error:?}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Snapshot::open(&damaged).is_err(), "bit {bit}");
        }
        assert_eq!(Snapshot::open(&[&bytes[..], &[0]].concat()).unwrap_err(), SnapshotError::Damaged);
    }

    /// Whatever the numbers are, a header fits its memory.
    #[test]
    fn the_longest_header_fits() {
        use crate::policy::{Choice, LayerTable, Life, MAX_RUNS, Score, ThinValues, Tokens};
        let lambda = crate::Lambda::from_per_mille(999).unwrap();
        let mut table = LayerTable::default();
        (0..MAX_RUNS).for_each(|_| table.push(u8::MAX, lambda).unwrap());
        let most = u32::MAX;
        let policy = Policy {
            tokens: Tokens::Snapkv {
                capacity: most,
                window: most,
                kernel: most,
                pool: crate::token::snapkv::Pool::Max,
            },
            score: Score::Random { seed: u64::MAX },
            choice: Choice::Layers { table },
            thin_values: ThinValues::Query { lambda },
            life: Life::Every { tokens: most },
            ..Policy::default()
        };
        let span = Span { sinks: most, blocks: most, hidden: most, recent: most };
        let header = SnapshotHeader {
            policy,
            layout: HeadLayout { pages: most, ranked: most, slots: u16::MAX, ..header().layout },
            layers: u16::MAX,
            heads: u16::MAX,
            window: most,
            sliding_window: Some(most),
            progress: Progress { span, position: most, chosen: true, since: most, scored: most },
            tokens: most,
            bytes: u64::MAX,
            ..header()
        };
        assert!(header.encode(&mut [0; MAX_HEADER]).is_ok());
        assert!(header.progress.check(4, 32, true).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let _ = Snapshot::open(&bytes);
            // One that was true, with checks that fit: what it says is what it has.
            let mut forged = snapshot();
            forged.truncate(forged.len() - 4);
            for (at, to) in changes {
                let at = at.index(forged.len());
                forged[at] = to;
            }
            let sum = check([&forged[..]]);
            forged.extend(sum);
            if let Ok(snapshot) = Snapshot::open(&forged) {
                let header = snapshot.header();
                prop_assert_eq!(snapshot.tokens().len(), header.tokens as usize);
                prop_assert_eq!(snapshot.kept().len(), usize::from(header.layers) * usize::from(header.heads));
                prop_assert_eq!(snapshot.heads().len() as u64, header.bytes);
                let _ = header.progress.check(header.layout.sinks.into(), header.layout.recent.into(), false);
            }
        }
    }
}
