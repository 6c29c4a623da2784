//! Byte vectors on NEON, with and without the dot-product instructions (dotprod).
//!
//! ARM's dot product takes two signed factors where VNNI takes one without a sign. Every code is an `i8`, so neither
//! [`Bytes::dot`] nor [`Bytes::store_weights`] has to make anything of it: no offset of 128 is added, none subtracted.

use super::Simd;
use super::bytes::{BYTES, ByteKernel, Bytes, Quarter, SIGNED};
use super::{neon::Neon, trellis};
use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

/// NEON, where `DOT` with the dot products of bytes. A value proves that the machine has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeonBytes<const DOT: bool>(Neon);

impl From<Neon> for NeonBytes<false> {
    fn from(proof: Neon) -> Self {
        Self(proof)
    }
}

impl NeonBytes<true> {
    /// The proof, if the machine has NEON with dot products.
    #[must_use]
    pub fn detect() -> Option<Self> {
        Neon::detect().filter(|_| is_aarch64_feature_detected!("dotprod")).map(Self)
    }
}

impl<const DOT: bool> NeonBytes<DOT> {
    #[inline]
    pub(super) fn vectorise<K: ByteKernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn plain<B: Bytes, K: ByteKernel>(bytes: B, kernel: K) -> K::Output {
            kernel.run(bytes)
        }
        #[target_feature(enable = "dotprod,neon")]
        fn dot<B: Bytes, K: ByteKernel>(bytes: B, kernel: K) -> K::Output {
            kernel.run(bytes)
        }
        // SAFETY: `self` exists only where the extensions named were found.
        unsafe { if DOT { dot(self, kernel) } else { plain(self, kernel) } }
    }

    /// Adds Σ a · b over every four neighbours; no b is -128.
    #[inline(always)]
    fn add_dot(self, sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: `self` proves NEON, with `DOT` the dot products.
        unsafe {
            if DOT {
                return sdot(sums, a, b);
            }
            // Sixteen bits hold the sum of two products, 2 · 128 · 127.
            let (low, high) = (vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
            vpadalq_s16(sums, vpaddq_s16(low, high))
        }
    }
}

/// Adds Σ a · b over every four neighbours. The intrinsic is not stable in every Rust that this crate allows.
#[inline]
#[target_feature(enable = "dotprod")]
fn sdot(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: the function has the instruction's feature; it reads and writes registers only.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

impl<const DOT: bool> Bytes for NeonBytes<DOT> {
    type Simd = Neon;
    type F32 = [float32x4_t; 4];
    type Codes = [uint8x16_t; 4];
    type I32 = [int32x4_t; 4];

    // Twelve accumulators of integers and twelve of floats, four vectors of weights, one broadcast: 29 of 32 registers.
    const TILE_ROWS: usize = 3;
    const TILE_VECTORS: usize = 1;
    const INTEGER_FACTORS: bool = DOT;

    type Fine = [int32x4_t; 4];
    type FineCodes = [[int16x8_t; 2]; 4];
    type Coarse = [int32x4_t; 4];

    #[inline(always)]
    fn simd(self) -> Neon {
        self.0
    }

    #[inline(always)]
    fn join(self, a: &[u8; 32], b: &[u8; 32]) -> Self::Codes {
        let (a, b) = (a.as_ptr(), b.as_ptr());
        // SAFETY: 32 bytes are readable at each; `self` proves NEON (so in every method of this impl).
        unsafe { [vld1q_u8(a), vld1q_u8(a.add(16)), vld1q_u8(b), vld1q_u8(b.add(16))] }
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; BYTES]) -> Self::Codes {
        let p = bytes.as_ptr();
        // SAFETY: 64 bytes are readable at `p`, sixteen of them from p + 48.
        unsafe { [vld1q_u8(p), vld1q_u8(p.add(16)), vld1q_u8(p.add(32)), vld1q_u8(p.add(48))] }
    }

    #[inline(always)]
    fn low_high(self, bytes: &[u8; BYTES]) -> [Self::Codes; 2] {
        let [a, b, c, d] = self.load(bytes);
        // SAFETY: see `join`.
        unsafe {
            let mask = vdupq_n_u8(15);
            let low = [vandq_u8(a, mask), vandq_u8(b, mask), vandq_u8(c, mask), vandq_u8(d, mask)];
            [low, [vshrq_n_u8::<4>(a), vshrq_n_u8::<4>(b), vshrq_n_u8::<4>(c), vshrq_n_u8::<4>(d)]]
        }
    }

    #[inline(always)]
    fn two_bits(self, bytes: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 32 bytes are readable there, sixteen of them from the middle.
        unsafe {
            let (a, b) = (vld1q_u8(bytes.as_ptr()), vld1q_u8(bytes.as_ptr().add(16)));
            let mask = vdupq_n_u8(3);
            let two = |x| vandq_u8(vshrq_n_u8::<2>(x), mask);
            let four = |x| vandq_u8(vshrq_n_u8::<4>(x), mask);
            [
                [vandq_u8(a, mask), vandq_u8(b, mask), two(a), two(b)],
                [four(a), four(b), vshrq_n_u8::<6>(a), vshrq_n_u8::<6>(b)],
            ]
        }
    }

    #[inline(always)]
    fn three_bits(self, bytes: &[u8; 48]) -> [Self::Codes; 2] {
        let (low, _) = bytes.as_chunks::<32>();
        let mut codes = self.two_bits(&low[0]);
        for bit in 0..8 {
            // SAFETY: sixteen bytes are readable from the thirty-third on.
            unsafe {
                let set = vtstq_u8(vld1q_u8(bytes.as_ptr().add(32)), vdupq_n_u8(1 << bit));
                let codes = &mut codes[bit / 4][bit % 4];
                *codes = vorrq_u8(*codes, vandq_u8(set, vdupq_n_u8(4)));
            }
        }
        codes
    }

    #[inline(always)]
    fn trellis(self, quad: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 32 bytes are readable there, sixteen of them from the middle.
        unsafe { trellis::neon::numbers(vld1q_u8(quad.as_ptr()), vld1q_u8(quad.as_ptr().add(16))) }
    }

    #[inline(always)]
    fn nibbles16(self, a: &[u8; 16], b: &[u8; 16]) -> Self::Codes {
        // SAFETY: sixteen bytes are readable at each.
        unsafe {
            let (a, b, mask) = (vld1q_u8(a.as_ptr()), vld1q_u8(b.as_ptr()), vdupq_n_u8(15));
            [vandq_u8(a, mask), vshrq_n_u8::<4>(a), vandq_u8(b, mask), vshrq_n_u8::<4>(b)]
        }
    }

    #[inline(always)]
    fn nibbles32(self, bytes: &[u8; 32]) -> Self::Codes {
        // SAFETY: 32 bytes are readable there, sixteen of them from the middle.
        unsafe {
            let (a, b) = (vld1q_u8(bytes.as_ptr()), vld1q_u8(bytes.as_ptr().add(16)));
            let mask = vdupq_n_u8(15);
            [vandq_u8(a, mask), vandq_u8(b, mask), vshrq_n_u8::<4>(a), vshrq_n_u8::<4>(b)]
        }
    }

    #[inline(always)]
    fn six_bits(self, low: &[u8; 64], high: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 64 and 32 bytes are readable there.
        unsafe {
            let mut out = [[vdupq_n_u8(0); 4]; 2];
            let (fours, twos) = (vdupq_n_u8(15), vdupq_n_u8(0x30));
            for i in 0..2 {
                let high = vld1q_u8(high.as_ptr().add(16 * i));
                let a = vld1q_u8(low.as_ptr().add(16 * i));
                let b = vld1q_u8(low.as_ptr().add(16 * i + 32));
                out[0][i] = vorrq_u8(vandq_u8(a, fours), vandq_u8(vshlq_n_u8::<4>(high), twos));
                out[0][i + 2] = vorrq_u8(vandq_u8(b, fours), vandq_u8(vshlq_n_u8::<2>(high), twos));
                out[1][i] = vorrq_u8(vshrq_n_u8::<4>(a), vandq_u8(high, twos));
                out[1][i + 2] = vorrq_u8(vshrq_n_u8::<4>(b), vandq_u8(vshrq_n_u8::<2>(high), twos));
            }
            out
        }
    }

    #[inline(always)]
    fn fifth_bits<const GROUP: u32>(self, codes: Self::Codes, high: &[u8; 32]) -> Self::Codes {
        let mut out = codes;
        // SAFETY: 32 bytes are readable there, sixteen of them from the middle.
        unsafe {
            let sixteen = vdupq_n_u8(16);
            for i in 0..2 {
                let high = vld1q_u8(high.as_ptr().add(16 * i));
                for half in 0..2 {
                    let set = vtstq_u8(high, vdupq_n_u8(1 << (GROUP + half)));
                    let codes = &mut out[2 * half as usize + i];
                    *codes = vorrq_u8(*codes, vandq_u8(set, sixteen));
                }
            }
        }
        out
    }

    #[inline(always)]
    fn dot(self, codes: Self::Codes, offset: u8, x: &Quarter) -> Self::F32 {
        let mut out = self.0.splat(0.0);
        for i in 0..4 {
            // SAFETY: 64 codes are readable there, sixteen of them from each quarter.
            unsafe {
                // Between -32 and 63, or any `i8` as it is.
                let codes = vreinterpretq_s8_u8(vsubq_u8(codes[i], vdupq_n_u8(offset % SIGNED)));
                let x = vld1q_s8(x.codes.as_ptr().add(16 * i));
                out[i] = vcvtq_f32_s32(self.add_dot(vdupq_n_s32(0), codes, x));
            }
        }
        out
    }

    #[inline(always)]
    fn store_weights(self, codes: Self::Codes, offset: u8, out: &mut [u8; BYTES]) -> u8 {
        for i in 0..4 {
            // SAFETY: 64 bytes are writable there, sixteen of them from each quarter.
            unsafe { vst1q_u8(out.as_mut_ptr().add(16 * i), codes[i]) };
        }
        offset % SIGNED
    }

    #[inline(always)]
    fn zero(self) -> Self::I32 {
        // SAFETY: see `join`.
        unsafe { [vdupq_n_s32(0); 4] }
    }

    #[inline(always)]
    fn add_products(self, sums: Self::I32, weights: Self::Codes, x: [i8; 4]) -> Self::I32 {
        let mut out = sums;
        for i in 0..4 {
            // SAFETY: see `join`.
            unsafe {
                let x = vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(x.map(i8::cast_unsigned))));
                out[i] = self.add_dot(sums[i], vreinterpretq_s8_u8(weights[i]), x);
            }
        }
        out
    }

    #[inline(always)]
    fn floats(self, integers: Self::I32) -> Self::F32 {
        let [a, b, c, d] = integers;
        // SAFETY: see `join`.
        unsafe { [vcvtq_f32_s32(a), vcvtq_f32_s32(b), vcvtq_f32_s32(c), vcvtq_f32_s32(d)] }
    }

    #[inline(always)]
    fn fine_factors(self, factors: [Self::F32; 2], words: &mut [i32; 16]) {
        let [first, second] = factors;
        for (quad, factors) in first.into_iter().chain(second).enumerate() {
            // SAFETY: see `join`; four numbers of sixteen bits are writable there.
            unsafe {
                // First and third factor, second and fourth.
                let x = vmovn_s32(vcvtnq_s32_f32(factors));
                let x = vuzp_s16(x, x);
                let x = vreinterpret_s32_s16(vext_s16::<2>(x.0, x.1));
                words[quad] = vget_lane_s32::<0>(x);
                words[8 + quad] = vget_lane_s32::<1>(x);
            }
        }
    }

    #[inline(always)]
    fn fine_zero(self) -> Self::Fine {
        self.zero()
    }

    #[inline(always)]
    fn fine_codes(self, codes: Self::Codes) -> Self::FineCodes {
        // SAFETY: see `join`.
        unsafe {
            let zero = vdupq_n_s16(0);
            let mut out = [[zero; 2]; 4];
            for i in 0..4 {
                let pairs = vreinterpretq_u16_u8(codes[i]);
                let (even, odd) = (vandq_u16(pairs, vdupq_n_u16(0xFF)), vshrq_n_u16::<8>(pairs));
                out[i] = [vreinterpretq_s16_u16(even), vreinterpretq_s16_u16(odd)];
            }
            out
        }
    }

    #[inline(always)]
    fn add_fine(self, sums: Self::Fine, codes: Self::FineCodes, words: [i32; 2]) -> Self::Fine {
        let mut out = sums;
        for i in 0..4 {
            for part in 0..2 {
                // SAFETY: see `join`.
                unsafe {
                    let (codes, word) = (codes[i][part], vreinterpretq_s16_s32(vdupq_n_s32(words[part])));
                    let low = vmull_s16(vget_low_s16(codes), vget_low_s16(word));
                    out[i] = vaddq_s32(out[i], vpaddq_s32(low, vmull_high_s16(codes, word)));
                }
            }
        }
        out
    }

    #[inline(always)]
    fn fine_sums(self, sums: Self::Fine) -> Self::F32 {
        self.floats(sums)
    }

    #[inline(always)]
    fn coarse_factors(self, factors: [Self::F32; 2], words: &mut [i32; 8]) {
        for (half, [a, b, c, d]) in factors.into_iter().enumerate() {
            // SAFETY: see `join`; four words are writable there, from the middle for the second half.
            unsafe {
                let low = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(a)), vmovn_s32(vcvtnq_s32_f32(b)));
                let high = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(c)), vmovn_s32(vcvtnq_s32_f32(d)));
                let bytes = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
                vst1q_s32(words.as_mut_ptr().add(4 * half), vreinterpretq_s32_s8(bytes));
            }
        }
    }

    #[inline(always)]
    fn coarse_begin(self, total: Self::I32) -> (Self::I32, Self::Coarse) {
        (self.zero(), total)
    }

    #[inline(always)]
    fn add_coarse(self, sums: Self::Coarse, codes: Self::Codes, word: i32) -> Self::Coarse {
        self.add_products(sums, codes, word.to_ne_bytes().map(u8::cast_signed))
    }

    #[inline(always)]
    fn coarse_end(self, _: Self::I32, sums: Self::Coarse) -> Self::I32 {
        sums
    }

    #[inline(always)]
    fn halves(self, words: [u32; 8]) -> Self::F32 {
        // SAFETY: eight words are readable there, four of them from the middle.
        let (firsts, seconds) = unsafe {
            let a = vreinterpretq_u16_u32(vld1q_u32(words.as_ptr()));
            let b = vreinterpretq_u16_u32(vld1q_u32(words.as_ptr().add(4)));
            (vuzp1q_u16(a, b), vuzp2q_u16(a, b))
        };
        let ([a, b], [c, d]) = (self.0.widen_f16(firsts), self.0.widen_f16(seconds));
        [a, b, c, d]
    }

    #[inline(always)]
    fn spread8<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32 {
        let vector = vector[QUARTER / 2];
        // SAFETY: see `join`.
        unsafe {
            let pair = if QUARTER % 2 == 0 { vget_low_f32(vector) } else { vget_high_f32(vector) };
            let (a, b) = (vdupq_lane_f32::<0>(pair), vdupq_lane_f32::<1>(pair));
            [a, a, b, b]
        }
    }

    #[inline(always)]
    fn spread4<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32 {
        let vector = vector[QUARTER];
        // SAFETY: see `join`.
        unsafe {
            [
                vdupq_laneq_f32::<0>(vector),
                vdupq_laneq_f32::<1>(vector),
                vdupq_laneq_f32::<2>(vector),
                vdupq_laneq_f32::<3>(vector),
            ]
        }
    }

    #[inline(always)]
    fn upper(self, [_, _, c, d]: Self::F32) -> Self::F32 {
        let [zero, ..] = self.0.splat(0.0);
        [zero, zero, c, d]
    }
}
