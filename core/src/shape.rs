//! λ, channels kept, and head shapes that are fixed at compile time.

use crate::Error;
use serde::{Deserialize, Serialize};

/// Tokens in a block: KIVI's quantisation group, the flush size of the recent ring, a GPU warp.
pub const BLOCK: usize = 32;

/// Largest head dimension that masks and scratch space are made for.
pub const MAX_HEAD_DIM: usize = 256;

/// Most query heads that may share one KV head.
pub const MAX_GROUP: usize = 32;

/// λ, the share of key channels that is pruned, in per mille: 0 ≤ λ < 1.
///
/// An integer, because the floor of a product of floats gets some channel counts wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Lambda(u16);

impl Lambda {
    /// λ = 0: every channel is kept.
    pub const WHOLE: Self = Self(0);

    /// λ of `per_mille` thousandths.
    ///
    /// # Errors
    /// [`Error::Lambda`] from 1000 on.
    pub const fn from_per_mille(per_mille: u16) -> Result<Self, Error> {
        if per_mille < 1000 { Ok(Self(per_mille)) } else { Err(Error::Lambda { per_mille }) }
    }

    /// λ in thousandths.
    #[must_use]
    pub const fn per_mille(self) -> u16 {
        self.0
    }

    /// Channels kept of `head_dim`: `D - floor(D·λ)`, as the authors' code counts them. At least one.
    ///
    /// ```
    /// # use thinkey_core::Lambda;
    /// let lambda = Lambda::from_per_mille(400)?;
    /// assert_eq!((lambda.kept(64), lambda.kept(128)), (39, 77));
    /// # Ok::<(), thinkey_core::Error>(())
    /// ```
    #[must_use]
    pub const fn kept(self, head_dim: usize) -> usize {
        head_dim - head_dim * self.0 as usize / 1000
    }
}

impl TryFrom<u16> for Lambda {
    type Error = Error;

    fn try_from(per_mille: u16) -> Result<Self, Error> {
        Self::from_per_mille(per_mille)
    }
}

impl From<Lambda> for u16 {
    fn from(lambda: Lambda) -> Self {
        lambda.0
    }
}

/// The shape of one attention head, known at compile time.
pub trait HeadShape {
    /// Channels per head, D.
    const HEAD_DIM: usize;
    /// Channels kept in the prefix, T.
    const KEPT: usize;
}

/// A head of `D` channels of which λ = `PER_MILLE` thousandths are pruned.
///
/// ```
/// use thinkey_core::{Head, HeadShape};
/// type Small = Head<64, 500>;
/// const KEPT: usize = Small::KEPT;
/// assert_eq!(KEPT, 32);
/// ```
///
/// Impossible shapes do not build:
/// ```compile_fail
/// use thinkey_core::{Head, HeadShape};
/// const KEPT: usize = <Head<64, 1000>>::KEPT;
/// ```
/// ```compile_fail
/// use thinkey_core::{Head, HeadShape};
/// const KEPT: usize = <Head<512, 500>>::KEPT;
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Head<const D: usize, const PER_MILLE: u16>;

impl<const D: usize, const PER_MILLE: u16> HeadShape for Head<D, PER_MILLE> {
    const HEAD_DIM: usize = D;
    const KEPT: usize = {
        assert!(D > 0 && D <= MAX_HEAD_DIM, "the head dimension is outside 1 to MAX_HEAD_DIM");
        match Lambda::from_per_mille(PER_MILLE) {
            Ok(lambda) => lambda.kept(D),
            Err(_) => panic!("lambda is outside 0 to 999 per mille"),
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_follows_the_authors_floor() {
        for (head_dim, table) in [
            (64, [(300, 45), (400, 39), (500, 32), (600, 26), (700, 20), (800, 13)].as_slice()),
            (128, [(400, 77), (500, 64), (600, 52)].as_slice()),
        ] {
            for &(per_mille, kept) in table {
                assert_eq!(
                    Lambda::from_per_mille(per_mille).unwrap().kept(head_dim),
                    kept,
                    "D={head_dim} λ={per_mille}"
                );
            }
        }
        assert_eq!(Lambda::WHOLE.kept(64), 64);
        assert_eq!(Lambda::from_per_mille(999).unwrap().kept(256), 1);
    }

    #[test]
    fn lambda_of_one_is_refused() {
        assert_eq!(Lambda::from_per_mille(1000), Err(Error::Lambda { per_mille: 1000 }));
    }
}
