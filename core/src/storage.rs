//! Element kinds and the bytes of a block.
//!
//! A block is 32 tokens × the channels they keep. Keys lie channel-major, `[T][32]`, so that the scores of 32 tokens
//! accumulate lane by lane with no horizontal sum; values lie token-major, `[32][D]`. Quantised, a block is codes, then
//! the scales of its groups, then their minima, see [`quant`](crate::quant): group c of a key block is channel c, and
//! group 32g + t of a value block is channels 32g.. of token t. The codes of four groups lie interleaved. Values can also be
//! [turned](crate::value::turn) first: their codes lie the same way, and behind them is one scale a token and no minimum.

use crate::{
    BLOCK, Error,
    quant::{CodeKind, GROUP, mixed},
};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Alignment of every part of the cache in bytes: a cache line, an AVX-512 register.
pub const ALIGN: usize = 64;

/// `bytes` rounded up to [`ALIGN`].
#[must_use]
pub const fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

/// How keys or values are stored.
///
/// The numbers are part of the wire format. What is quantised is the prefix; the ring of recent tokens stays whole, see
/// [`ring`](Self::ring).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum StorageKind {
    /// IEEE binary32.
    F32,
    /// IEEE binary16; values beyond its range are stored as its largest finite number.
    F16,
    /// Asymmetric 8-bit codes in groups of 32, see [`quant`](crate::quant).
    Int8,
    /// Asymmetric 4-bit codes in groups of 32, see [`quant`](crate::quant).
    Int4,
    /// bfloat16.
    Bf16,
    /// Asymmetric 3-bit codes in groups of 32, see [`quant`](crate::quant).
    Int3,
    /// Asymmetric 2-bit codes in groups of 32, see [`quant`](crate::quant).
    Int2,
    /// Turned values in symmetric 4-bit codes, see [`Form::Turned`].
    Turned4,
    /// Turned values in symmetric 3-bit codes.
    Turned3,
    /// Turned values in symmetric 2-bit codes.
    Turned2,
    /// Of keys only, codes in groups of 32: of the first quarter of the channels asymmetric 4-bit ones, of the others 2-bit ones of
    /// a trellis, see [`Form::Mixed`].
    Int4Int2,
    /// Turned values in 2-bit codes of a [trellis](crate::quant::trellis).
    Trellis2,
}

/// The ways of storing numbers: each by itself, or as codes in groups, or values as codes of a turned vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Form {
    /// Each number by itself.
    Float(FloatKind),
    /// Codes in groups of 32 with a scale and a minimum.
    Codes(CodeKind),
    /// Of values only: codes of the [turned](crate::value::turn) value, which are symmetric about 0, with one scale a token.
    /// D must be a power of two, and no value channel may be missing.
    Turned(CodeKind),
    /// Of keys only, which are [predicted](crate::channel::predict): codes in groups of 32, of the first
    /// channels with four bits, of the [others](crate::quant::mixed) with two.
    Mixed,
}

/// Floating-point numbers as the cache stores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum FloatKind {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatKind {
    /// Bytes of one number.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl From<FloatKind> for StorageKind {
    fn from(kind: FloatKind) -> Self {
        match kind {
            FloatKind::F32 => Self::F32,
            FloatKind::F16 => Self::F16,
            FloatKind::Bf16 => Self::Bf16,
        }
    }
}

impl StorageKind {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Int8,
        Self::Int4,
        Self::Int3,
        Self::Int2,
        Self::Turned4,
        Self::Turned3,
        Self::Turned2,
        Self::Int4Int2,
        Self::Trellis2,
    ];

    /// How numbers lie in the prefix.
    #[must_use]
    pub const fn form(self) -> Form {
        match self {
            Self::F32 => Form::Float(FloatKind::F32),
            Self::F16 => Form::Float(FloatKind::F16),
            Self::Bf16 => Form::Float(FloatKind::Bf16),
            Self::Int8 => Form::Codes(CodeKind::Int8),
            Self::Int4 => Form::Codes(CodeKind::Int4),
            Self::Int3 => Form::Codes(CodeKind::Int3),
            Self::Int2 => Form::Codes(CodeKind::Int2),
            Self::Turned4 => Form::Turned(CodeKind::Int4),
            Self::Turned3 => Form::Turned(CodeKind::Int3),
            Self::Turned2 => Form::Turned(CodeKind::Int2),
            Self::Int4Int2 => Form::Mixed,
            Self::Trellis2 => Form::Turned(CodeKind::Trellis2),
        }
    }

    /// Whether it is for values alone.
    #[must_use]
    pub const fn turns(self) -> bool {
        matches!(self.form(), Form::Turned(_))
    }

    /// Whether it is for keys alone, and only where their channels have an order.
    #[must_use]
    pub const fn mixed(self) -> bool {
        matches!(self.form(), Form::Mixed)
    }

    /// The kind in which tokens of the recent ring are stored: never quantised.
    #[must_use]
    pub const fn ring(self) -> FloatKind {
        match self.form() {
            Form::Float(kind) => kind,
            Form::Codes(_) | Form::Turned(_) | Form::Mixed => FloatKind::F16,
        }
    }

    /// Bytes of a thin key block of 32 tokens × `kept` channels, rounded up to [`ALIGN`].
    #[must_use]
    pub const fn key_block_bytes(self, kept: usize) -> usize {
        match self.form() {
            Form::Float(kind) => align(BLOCK * kept * kind.bytes()),
            Form::Codes(kind) | Form::Turned(kind) => align(kind.bytes(kept)),
            Form::Mixed => align(mixed::bytes(kept)),
        }
    }

    /// Bytes of a value block of 32 tokens × `head_dim` channels, rounded up to [`ALIGN`].
    #[must_use]
    pub const fn value_block_bytes(self, head_dim: usize) -> usize {
        match self.form() {
            Form::Float(kind) => align(BLOCK * head_dim * kind.bytes()),
            Form::Codes(kind) => align(kind.bytes(BLOCK * head_dim.div_ceil(GROUP))),
            // There are none.
            Form::Mixed => 0,
            Form::Turned(kind) => align(kind.turned_bytes(head_dim)),
        }
    }

    /// The name the command line uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Bf16 => "bf16",
            Self::Int3 => "int3",
            Self::Int2 => "int2",
            Self::Turned4 => "turned4",
            Self::Turned3 => "turned3",
            Self::Turned2 => "turned2",
            Self::Int4Int2 => "int4/2",
            Self::Trellis2 => "trellis2",
        }
    }
}

/// Keys are never turned: a layout with such keys is refused before there are any.
pub(crate) const TURNED_KEYS: Error = Error::Inconsistent { what: "how keys are stored" };

/// Values are of one kind: a layout with such values is refused before there are any.
pub(crate) const MIXED_VALUES: Error = Error::Inconsistent { what: "how values are stored" };

/// A number as the cache stores it.
pub trait Element: bytemuck::Pod {
    /// Its kind.
    const KIND: FloatKind;

    /// The number as f32.
    fn load(self) -> f32;

    /// The nearest stored number.
    fn store(x: f32) -> Self;
}

impl Element for f32 {
    const KIND: FloatKind = FloatKind::F32;

    #[inline(always)]
    fn load(self) -> f32 {
        self
    }

    #[inline(always)]
    fn store(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    const KIND: FloatKind = FloatKind::F16;

    #[inline(always)]
    fn load(self) -> f32 {
        // Branch-free, so that loops over it vectorise: shift exponent and mantissa into place and let one
        // multiplication by 2^112 fix the bias, subnormals included. Stored numbers are finite (see `store`).
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn store(x: f32) -> Self {
        // Round to nearest even without a branch on the common path; an infinity would turn an attention score into NaN
        // later, hence the clamp. NaN stays NaN (as the largest number's neighbour it would be hidden).
        const LARGEST: f32 = 65504.0;
        if x.is_nan() {
            return f16::NAN;
        }
        let sign = (x.to_bits() >> 16) & 0x8000;
        let x = x.abs().min(LARGEST);
        let bits = if x < 6.103_515_6e-5 {
            // Subnormal in f16: adding 0.5 leaves a multiple of 2^-24 in the low mantissa, rounded by the hardware.
            (x + 0.5).to_bits() - 0.5f32.to_bits()
        } else {
            let bits = x.to_bits();
            (bits + 0xfff + (bits >> 13 & 1) - (112 << 23)) >> 13
        };
        f16::from_bits((bits.min(0x7bff) | sign) as u16)
    }
}

impl Element for bf16 {
    const KIND: FloatKind = FloatKind::Bf16;

    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn store(x: f32) -> Self {
        // Round to nearest even; an infinity becomes the largest number, as f16's does, and NaN stays NaN.
        const LARGEST: u32 = 0x7f7f;
        if x.is_nan() {
            return bf16::NAN;
        }
        let bits = x.to_bits();
        let magnitude = ((bits & 0x7fff_ffff) + 0x7fff + (bits >> 16 & 1)) >> 16;
        bf16::from_bits((magnitude.min(LARGEST) | bits >> 16 & 0x8000) as u16)
    }
}

/// `bytes` as numbers of kind `E`.
///
/// # Errors
/// [`Error::Length`] where the length is no whole number of them or the address is not aligned for `E`.
pub fn elements<E: Element>(bytes: &[u8]) -> Result<&[E], Error> {
    bytemuck::try_cast_slice(bytes).map_err(|_| misfit::<E>(bytes.len()))
}

/// `bytes` as writable numbers of kind `E`.
///
/// # Errors
/// As [`elements`].
pub fn elements_mut<E: Element>(bytes: &mut [u8]) -> Result<&mut [E], Error> {
    let len = bytes.len();
    bytemuck::try_cast_slice_mut(bytes).map_err(|_| misfit::<E>(len))
}

fn misfit<E: Element>(len: usize) -> Error {
    Error::Length { what: "aligned cache bytes", expected: len.next_multiple_of(size_of::<E>()), actual: len }
}

/// Runs `$body` with the type `$E` standing for the element of the [`FloatKind`] `$kind`.
macro_rules! with_element {
    ($kind:expr, $E:ident => $body:expr) => {
        match $kind {
            $crate::storage::FloatKind::F32 => {
                type $E = f32;
                $body
            }
            $crate::storage::FloatKind::F16 => {
                type $E = ::half::f16;
                $body
            }
            $crate::storage::FloatKind::Bf16 => {
                type $E = ::half::bf16;
                $body
            }
        }
    };
}
pub(crate) use with_element;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn f16_loads_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            if x.is_finite() {
                assert_eq!(x.load().to_bits(), x.to_f32().to_bits(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn f16_keeps_what_it_stored() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            if x.is_finite() {
                assert_eq!(<f16 as Element>::store(x.to_f32()).to_bits(), bits);
            }
        }
        assert_eq!(<f16 as Element>::store(f32::INFINITY), f16::MAX);
        assert_eq!(<f16 as Element>::store(-1e30), f16::MIN);
        assert!(<f16 as Element>::store(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_keeps_what_it_stored() {
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits);
            if x.is_finite() {
                assert_eq!(<bf16 as Element>::load(x).to_bits(), x.to_f32().to_bits());
                assert_eq!(<bf16 as Element>::store(x.to_f32()).to_bits(), bits);
            }
        }
        assert_eq!(<bf16 as Element>::store(f32::INFINITY), bf16::MAX);
        assert_eq!(<bf16 as Element>::store(f32::MIN), bf16::MIN);
        assert!(<bf16 as Element>::store(f32::NAN).is_nan());
    }

    /// The order of the kinds is part of the wire format.
    #[test]
    fn kinds_keep_their_numbers() {
        let kinds = [
            "f32", "f16", "int8", "int4", "bf16", "int3", "int2", "turned4", "turned3", "turned2", "int4/2", "trellis2",
        ];
        for (number, name) in kinds.into_iter().enumerate() {
            let kind = StorageKind::ALL.into_iter().find(|kind| kind.name() == name).unwrap();
            assert_eq!(kind as usize, number, "{name}");
        }
        assert_eq!(StorageKind::Bf16.ring(), FloatKind::Bf16);
    }

    proptest! {
        #[test]
        fn bf16_rounds_as_the_half_crate_does(x in any::<f32>()) {
            prop_assume!(!x.is_nan());
            let expected = bf16::from_f32(x);
            let expected = if expected.is_finite() { expected } else { bf16::MAX.copysign(expected) };
            prop_assert_eq!(<bf16 as Element>::store(x).to_bits(), expected.to_bits());
        }

        #[test]
        fn f16_rounds_as_the_half_crate_does(x in prop_oneof![any::<f32>(), -1e-4f32..1e-4, -70000.0f32..70000.0]) {
            prop_assume!(!x.is_nan());
            let expected = f16::from_f32(x.clamp(-65504.0, 65504.0));
            prop_assert_eq!(<f16 as Element>::store(x).to_bits(), expected.to_bits());
        }
    }
}
