//! What can go wrong in the thin cache.

use core::fmt;

/// An error of the thin cache: what was wrong, with which value, against which limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Error {
    /// A fixed capacity is too small; carries the capacity needed.
    Capacity {
        /// What ran out (`"arena bytes"`, `"pages"` …).
        what: &'static str,
        /// The capacity that would have been enough.
        needed: usize,
        /// The capacity there is.
        capacity: usize,
    },
    /// A slice has another length than its shape says.
    Length {
        /// Which slice.
        what: &'static str,
        /// Elements or bytes that the shape says.
        expected: usize,
        /// Elements or bytes given.
        actual: usize,
    },
    /// λ is outside 0 ≤ λ < 1 (in per mille: 0..=999).
    Lambda {
        /// The value given, in per mille.
        per_mille: u16,
    },
    /// The head dimension is zero or above [`MAX_HEAD_DIM`](crate::MAX_HEAD_DIM).
    HeadDim {
        /// The value given.
        head_dim: usize,
    },
    /// The number of kept channels is zero or above the head dimension.
    Kept {
        /// The value given.
        kept: usize,
        /// Channels there are.
        head_dim: usize,
    },
    /// More query heads share a KV head than [`MAX_GROUP`](crate::MAX_GROUP), or none does.
    Group {
        /// The value given.
        group: usize,
    },
    /// An index is outside its range.
    Index {
        /// Which index.
        what: &'static str,
        /// The value given.
        index: usize,
        /// One past the largest valid value.
        limit: usize,
    },
    /// A score is not a number, so the channels have no order.
    NotANumber {
        /// The first such channel.
        channel: usize,
    },
    /// The score of a token is not a number, or is negative where it cannot be.
    TokenScore {
        /// The first such token.
        token: usize,
    },
    /// Tokens are to be thinned, but no mask has been chosen.
    NoMask,
    /// A frame is damaged, cut off or followed by other bytes.
    Frame,
    /// A frame is of another version of the format.
    Version {
        /// Version in the frame.
        found: u16,
        /// Version this crate writes.
        supported: u16,
    },
    /// Values cannot be turned: they lack channels, or the head dimension is no power of two.
    Turned {
        /// Value channels kept.
        channels: usize,
        /// Channels there are.
        head_dim: usize,
    },
    /// A frame decodes, but its fields contradict each other.
    Inconsistent {
        /// Which field.
        what: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Capacity { what, needed, capacity } => {
                write!(f, "{what}: {needed} needed, but the capacity is {capacity}")
            }
            Self::Length { what, expected, actual } => {
                write!(f, "{what}: length {actual} given, but the shape says {expected}")
            }
            Self::Lambda { per_mille } => {
                write!(f, "λ of {per_mille} per mille is outside 0 ≤ λ < 1; give 0 to 999 per mille")
            }
            Self::HeadDim { head_dim } => {
                write!(f, "a head dimension of {head_dim} is outside 1 to {}", crate::MAX_HEAD_DIM)
            }
            Self::Kept { kept, head_dim } => write!(f, "cannot keep {kept} of {head_dim} channels"),
            Self::Group { group } => {
                write!(f, "{group} query heads per KV head are outside 1 to {}", crate::MAX_GROUP)
            }
            Self::Index { what, index, limit } => write!(f, "{what} {index} is not below {limit}"),
            Self::NotANumber { channel } => {
                write!(f, "the score of channel {channel} is not a number: the model's keys or queries overflowed")
            }
            Self::TokenScore { token } => {
                write!(f, "the score of token {token} is no number that can be ranked: attention overflowed")
            }
            Self::NoMask => write!(f, "tokens are to be thinned, but no channel mask has been chosen"),
            Self::Frame => write!(f, "the frame is damaged, cut off or followed by other bytes"),
            Self::Version { found, supported } => {
                write!(f, "the frame has format version {found}, but this build reads version {supported}")
            }
            Self::Turned { channels, head_dim } => write!(
                f,
                "values with {channels} of {head_dim} channels cannot be turned: all of a power of two are needed; store them \
                 as int4, int3 or int2"
            ),
            Self::Inconsistent { what } => write!(f, "the frame contradicts itself in {what}"),
        }
    }
}

impl core::error::Error for Error {}

/// `Err` with [`Error::Length`] unless `actual` is `expected`.
pub(crate) const fn check_len(what: &'static str, expected: usize, actual: usize) -> Result<(), Error> {
    if expected == actual { Ok(()) } else { Err(Error::Length { what, expected, actual }) }
}
