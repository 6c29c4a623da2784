//! NEON: four vectors of four floats.
//!
//! What is written as assembly are conversions of binary16, whose intrinsics take a type that is not stable, and the
//! prefetch, which has none. A compiler without the instruction in its baseline would not assemble it; NEON and FCVTL
//! are in every 64-bit ARM's.

use super::{Affine, Kernel, LANES, LINE, Simd};
use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

// Stored numbers are little-endian, and so are vectors in memory where the machine is.
const _: () = assert!(cfg!(target_endian = "little"), "big-endian ARM is not supported");

/// NEON, with its fused multiply-add and its conversions of binary16: every 64-bit ARM that runs an operating system.
/// A value proves that the machine has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neon(());

impl Neon {
    /// The proof, if the machine has the instructions.
    #[must_use]
    pub fn detect() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    #[inline]
    pub(super) fn vectorise<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn inner<K: Kernel>(simd: Neon, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only where `detect` found NEON.
        unsafe { inner(self, kernel) }
    }

    /// The first four and the last four of eight binary16.
    #[inline(always)]
    pub(super) fn widen_f16(self, halves: uint16x8_t) -> [float32x4_t; 2] {
        let (low, high);
        // SAFETY: FCVTL is a part of NEON, which `self` proves; it reads and writes registers only.
        unsafe {
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) low, in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags));
            asm!("fcvtl2 {0:v}.4s, {1:v}.8h", out(vreg) high, in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags));
        }
        [low, high]
    }

    /// Sixteen signed bytes as floats.
    #[inline(always)]
    fn widen_i8(self, bytes: int8x16_t) -> [float32x4_t; 4] {
        // SAFETY: `self` proves NEON.
        unsafe {
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }
}

/// The same operation on all four registers of one, two or three vectors.
macro_rules! each {
    ($operation:ident, $a:expr $(, $more:expr)*) => {
        // SAFETY: only methods of the impl below use this, whose `self` proves NEON; nothing reads or writes memory.
        unsafe {
            [
                $operation($a[0] $(, $more[0])*),
                $operation($a[1] $(, $more[1])*),
                $operation($a[2] $(, $more[2])*),
                $operation($a[3] $(, $more[3])*),
            ]
        }
    };
}

impl Simd for Neon {
    type F32 = [float32x4_t; 4];

    // Twenty-four accumulators, four vectors of the panel, one or two broadcasts: 30 of 32 registers.
    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 1;

    #[inline(always)]
    fn prefetch(self, line: &[u8; LINE]) {
        // SAFETY: a prefetch changes neither memory nor registers. (With `pure` it would be left out.)
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) line, options(readonly, nostack, preserves_flags)) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: `self` proves NEON (so in every method of this impl).
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F32 {
        let p = values.as_ptr();
        // SAFETY: sixteen floats are readable at `p`, four of them from p + 12.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))] }
    }

    #[inline(always)]
    fn store(self, vector: Self::F32, out: &mut [f32; LANES]) {
        let p = out.as_mut_ptr();
        // SAFETY: sixteen floats are writable at `p`, four of them from p + 12.
        unsafe {
            vst1q_f32(p, vector[0]);
            vst1q_f32(p.add(4), vector[1]);
            vst1q_f32(p.add(8), vector[2]);
            vst1q_f32(p.add(12), vector[3]);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vaddq_f32, a, b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vmulq_f32, a, b)
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vdivq_f32, a, b)
    }

    // FMAX and FMIN would give no number where one is none; a comparison and a selection are two instructions, and what
    // the other levels do.
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        let larger = each!(vcgtq_f32, a, b);
        each!(vbslq_f32, larger, a, b)
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        let smaller = each!(vcltq_f32, a, b);
        each!(vbslq_f32, smaller, a, b)
    }

    #[inline(always)]
    fn power_of_two(self, shifted: Self::F32) -> Self::F32 {
        let mut out = shifted;
        for out in &mut out {
            // SAFETY: see `splat`.
            unsafe {
                let n = vaddq_s32(vreinterpretq_s32_f32(*out), vdupq_n_s32(127));
                *out = vreinterpretq_f32_s32(vshlq_n_s32::<23>(n));
            }
        }
        out
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        each!(vfmaq_f32, c, a, b)
    }

    #[inline(always)]
    fn affine(self, code: Self::F32, affine: Affine) -> Self::F32 {
        self.fma(code, self.splat(affine.scale), self.splat(affine.min))
    }

    #[inline(always)]
    fn sum(self, [v0, v1, v2, v3]: Self::F32) -> f32 {
        // SAFETY: see `splat`.
        unsafe {
            let v = vaddq_f32(vaddq_f32(v0, v2), vaddq_f32(v1, v3));
            vpadds_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v)))
        }
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; LANES]) -> Self::F32 {
        // SAFETY: sixteen bytes are readable there.
        self.widen_i8(unsafe { vld1q_s8(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn i8_words(self, words: [u32; 4]) -> Self::F32 {
        // SAFETY: four words are readable there.
        self.widen_i8(unsafe { vreinterpretq_s8_u32(vld1q_u32(words.as_ptr())) })
    }

    #[inline(always)]
    fn word_codes<const SHIFT: u32, const MASK: u32>(self, words: &[u8; 4 * LANES]) -> Self::F32 {
        let p = words.as_ptr();
        // SAFETY: 64 bytes are readable at `p`, sixteen of them from p + 48.
        unsafe {
            let (shift, mask) = (vdupq_n_s32(-(SHIFT as i32)), vdupq_n_u32(MASK));
            [
                vcvtq_f32_u32(vandq_u32(vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p)), shift), mask)),
                vcvtq_f32_u32(vandq_u32(vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p.add(16))), shift), mask)),
                vcvtq_f32_u32(vandq_u32(vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p.add(32))), shift), mask)),
                vcvtq_f32_u32(vandq_u32(vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p.add(48))), shift), mask)),
            ]
        }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> Self::F32 {
        let p = bytes.as_ptr();
        // SAFETY: 64 bytes are readable at `p`, sixteen of them from p + 48.
        unsafe {
            [
                vreinterpretq_f32_u8(vld1q_u8(p)),
                vreinterpretq_f32_u8(vld1q_u8(p.add(16))),
                vreinterpretq_f32_u8(vld1q_u8(p.add(32))),
                vreinterpretq_f32_u8(vld1q_u8(p.add(48))),
            ]
        }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Self::F32 {
        let p = bytes.as_ptr();
        // SAFETY: 32 bytes are readable at `p`, sixteen of them from p + 16.
        let halves = unsafe { [vreinterpretq_u16_u8(vld1q_u8(p)), vreinterpretq_u16_u8(vld1q_u8(p.add(16)))] };
        let ([a, b], [c, d]) = (self.widen_f16(halves[0]), self.widen_f16(halves[1]));
        [a, b, c, d]
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Self::F32 {
        let p = bytes.as_ptr();
        // SAFETY: 32 bytes are readable at `p`, sixteen of them from p + 16.
        unsafe {
            let first = vreinterpretq_u16_u8(vld1q_u8(p));
            let second = vreinterpretq_u16_u8(vld1q_u8(p.add(16)));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(first))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(first)),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(second))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(second)),
            ]
        }
    }

    #[inline(always)]
    fn splat_f16(self, bytes: &[u8; 2]) -> Self::F32 {
        // SAFETY: see `splat`.
        [self.widen_f16(unsafe { vdupq_n_u16(u16::from_le_bytes(*bytes)) })[0]; 4]
    }

    #[inline(always)]
    fn f16x8(self, halves: [u32; 4]) -> [f32; 8] {
        let mut out = [0.0; 8];
        // SAFETY: four words are readable at the one, eight floats writable at the other, four of them from the middle.
        unsafe {
            let [low, high] = self.widen_f16(vreinterpretq_u16_u32(vld1q_u32(halves.as_ptr())));
            vst1q_f32(out.as_mut_ptr(), low);
            vst1q_f32(out.as_mut_ptr().add(4), high);
        }
        out
    }

    #[inline(always)]
    fn nibbles<const ZERO: u8>(self, bytes: &[u8; LANES], low: Affine, high: Affine) -> [Self::F32; 2] {
        // SAFETY: sixteen bytes are readable there.
        let [low_codes, high_codes] = unsafe {
            let (bytes, zero) = (vld1q_u8(bytes.as_ptr()), vdupq_n_u8(ZERO));
            let (low, high) = (vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes));
            [vreinterpretq_s8_u8(vsubq_u8(low, zero)), vreinterpretq_s8_u8(vsubq_u8(high, zero))]
        };
        [self.affine(self.widen_i8(low_codes), low), self.affine(self.widen_i8(high_codes), high)]
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::F32; LANES]) -> [Self::F32; LANES] {
        let mut out = rows;
        for i in 0..4 {
            for j in 0..4 {
                let [a, b, c, d] = [rows[4 * i][j], rows[4 * i + 1][j], rows[4 * i + 2][j], rows[4 * i + 3][j]];
                let columns = transpose4x4(self, [a, b, c, d]);
                for c in 0..4 {
                    out[4 * j + c][i] = columns[c];
                }
            }
        }
        out
    }
}

/// The transpose of a 4 × 4 matrix of rows.
#[inline(always)]
fn transpose4x4(_: Neon, r: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // SAFETY: the first argument proves NEON.
    unsafe {
        let (even0, odd0) = (vtrn1q_f32(r[0], r[1]), vtrn2q_f32(r[0], r[1]));
        let (even1, odd1) = (vtrn1q_f32(r[2], r[3]), vtrn2q_f32(r[2], r[3]));
        let [even0, odd0] = [vreinterpretq_f64_f32(even0), vreinterpretq_f64_f32(odd0)];
        let [even1, odd1] = [vreinterpretq_f64_f32(even1), vreinterpretq_f64_f32(odd1)];
        [
            vreinterpretq_f32_f64(vtrn1q_f64(even0, even1)),
            vreinterpretq_f32_f64(vtrn1q_f64(odd0, odd1)),
            vreinterpretq_f32_f64(vtrn2q_f64(even0, even1)),
            vreinterpretq_f32_f64(vtrn2q_f64(odd0, odd1)),
        ]
    }
}
