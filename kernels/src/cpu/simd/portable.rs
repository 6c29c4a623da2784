//! Sixteen lanes in plain Rust: compilers turn its loops into four SSE2 or NEON instructions.

use super::{Affine, LANES, Simd};
use crate::format::float::{bf16_to_f32, f16_to_f32};

/// The level that every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Portable;

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type F32 = [f32; LANES];

    // Accumulators of eight of SSE2's 16 registers, twenty-four of NEON's 32.
    const TILE_ROWS: usize = if cfg!(target_arch = "aarch64") { 6 } else { 2 };
    const TILE_VECTORS: usize = 1;
    const SHARES: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F32 {
        *values
    }

    #[inline(always)]
    fn store(self, vector: Self::F32, out: &mut [f32; LANES]) {
        *out = vector;
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a / b)
    }

    // Comparisons and no `f32::max`: they are one instruction, and what that does with what is no number.
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn power_of_two(self, shifted: Self::F32) -> Self::F32 {
        // The integer n sits in the low bits; 127 biases the exponent.
        shifted.map(|x| f32::from_bits(x.to_bits().wrapping_add(127) << 23))
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // `mul_add` without an instruction for it is a library call.
        if cfg!(target_arch = "aarch64") {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    fn affine(self, code: Self::F32, affine: Affine) -> Self::F32 {
        code.map(|c| c * affine.scale + affine.min)
    }

    #[inline(always)]
    fn sum(self, vector: Self::F32) -> f32 {
        let mut width = LANES / 2;
        let mut v = vector;
        while width > 0 {
            for i in 0..width {
                v[i] += v[i + width];
            }
            width /= 2;
        }
        v[0]
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; LANES]) -> Self::F32 {
        bytes.map(|b| f32::from(b.cast_signed()))
    }

    #[inline(always)]
    fn i8_words(self, words: [u32; 4]) -> Self::F32 {
        std::array::from_fn(|i| f32::from((words[i / 4] >> (8 * (i % 4))) as i8))
    }

    #[inline(always)]
    fn word_codes<const SHIFT: u32, const MASK: u32>(self, words: &[u8; 4 * LANES]) -> Self::F32 {
        let (words, _) = words.as_chunks();
        // By way of a signed integer: what a vector unit converts.
        std::array::from_fn(|i| (u32::from_le_bytes(words[i]) >> SHIFT & MASK).cast_signed() as f32)
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> Self::F32 {
        let (floats, _) = bytes.as_chunks();
        std::array::from_fn(|i| f32::from_le_bytes(floats[i]))
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Self::F32 {
        std::array::from_fn(|i| f16_to_f32(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Self::F32 {
        std::array::from_fn(|i| bf16_to_f32(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
    }

    #[inline(always)]
    fn splat_f16(self, bytes: &[u8; 2]) -> Self::F32 {
        [f16_to_f32(u16::from_le_bytes(*bytes)); LANES]
    }

    #[inline(always)]
    fn f16x8(self, halves: [u32; 4]) -> [f32; 8] {
        std::array::from_fn(|i| f16_to_f32((halves[i / 2] >> (16 * (i % 2))) as u16))
    }

    #[inline(always)]
    fn nibbles<const ZERO: u8>(self, bytes: &[u8; LANES], low: Affine, high: Affine) -> [Self::F32; 2] {
        let code = |nibble: u8| f32::from(nibble.wrapping_sub(ZERO).cast_signed());
        [self.affine(bytes.map(|b| code(b & 15)), low), self.affine(bytes.map(|b| code(b >> 4)), high)]
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::F32; LANES]) -> [Self::F32; LANES] {
        std::array::from_fn(|i| std::array::from_fn(|j| rows[j][i]))
    }
}
