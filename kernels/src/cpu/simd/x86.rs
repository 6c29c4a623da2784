//! AVX2 and AVX-512.

use super::{Affine, Kernel, LANES, LINE, Simd};
use std::arch::x86_64::*;

/// AVX2, FMA and F16C: x86-64-v3, every such processor since 2013. A value proves that the machine has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// AVX-512 F, BW, DQ and VL on top of [`Avx2`]: x86-64-v4. A value proves that the machine has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

impl From<Avx512> for Avx2 {
    fn from(_: Avx512) -> Self {
        Self(())
    }
}

impl Avx2 {
    /// The proof, if the machine has the instructions.
    #[must_use]
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        (found && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }

    #[inline]
    pub(super) fn vectorise<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
        fn inner<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only where `detect` found AVX2, FMA and F16C; every processor with AVX2 has the
        // scalar extensions named beside them.
        unsafe { inner(self, kernel) }
    }
}

impl Avx512 {
    /// The proof, if the machine has the instructions.
    #[must_use]
    pub fn detect() -> Option<Self> {
        let found = Avx2::detect().is_some() && is_x86_feature_detected!("avx512f");
        let found = found && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq");
        (found && is_x86_feature_detected!("avx512vl")).then_some(Self(()))
    }

    #[inline]
    pub(super) fn vectorise<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
        fn inner<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only where `detect` found every vector extension named; every processor with
        // AVX-512 has the scalar ones.
        unsafe { inner(self, kernel) }
    }
}

impl Simd for Avx2 {
    type F32 = [__m256; 2];

    // Twelve accumulators, two vectors of the panel, one broadcast: 15 of 16 registers.
    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 1;

    #[inline(always)]
    fn prefetch(self, line: &[u8; LINE]) {
        // SAFETY: SSE is part of x86-64, and a prefetch touches nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: `self` proves AVX2 (so in every method of this impl).
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F32 {
        let p = values.as_ptr();
        // SAFETY: sixteen floats are readable at `p`, eight of them from p + 8.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }

    #[inline(always)]
    fn store(self, [v0, v1]: Self::F32, out: &mut [f32; LANES]) {
        let p = out.as_mut_ptr();
        // SAFETY: sixteen floats are writable at `p`, eight of them from p + 8.
        unsafe {
            _mm256_storeu_ps(p, v0);
            _mm256_storeu_ps(p.add(8), v1);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max_abs(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            [
                _mm256_max_ps(_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, b[0])),
                _mm256_max_ps(_mm256_andnot_ps(sign, a[1]), _mm256_andnot_ps(sign, b[1])),
            ]
        }
    }

    #[inline(always)]
    fn power_of_two(self, [a, b]: Self::F32) -> Self::F32 {
        // Not in a closure that an array adaptor runs: it is compiled without the level's instructions, and the exponential
        // function around it then takes several times as long.
        // SAFETY: see `splat`.
        unsafe {
            let offset = _mm256_set1_epi32(127);
            let a = _mm256_add_epi32(_mm256_castps_si256(a), offset);
            let b = _mm256_add_epi32(_mm256_castps_si256(b), offset);
            [_mm256_castsi256_ps(_mm256_slli_epi32::<23>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<23>(b))]
        }
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`; FMA comes with it.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn affine(self, code: Self::F32, affine: Affine) -> Self::F32 {
        self.fma(code, self.splat(affine.scale), self.splat(affine.min))
    }

    #[inline(always)]
    fn sum(self, [v0, v1]: Self::F32) -> f32 {
        // SAFETY: see `splat`.
        unsafe {
            let v = _mm256_add_ps(v0, v1);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; LANES]) -> Self::F32 {
        let p = bytes.as_ptr();
        // SAFETY: sixteen bytes are readable at `p`, eight of them from p + 8.
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
            ]
        }
    }

    #[inline(always)]
    fn i8_words(self, [a, b, c, d]: [u32; 4]) -> Self::F32 {
        let [a, b, c, d] = [a.cast_signed(), b.cast_signed(), c.cast_signed(), d.cast_signed()];
        // SAFETY: see `splat`.
        unsafe {
            let bytes = _mm_setr_epi32(a, b, c, d);
            let high = _mm_unpackhi_epi64(bytes, bytes);
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
        }
    }

    #[inline(always)]
    fn word_codes<const SHIFT: u32, const MASK: u32>(self, words: &[u8; 4 * LANES]) -> Self::F32 {
        let p = words.as_ptr();
        // SAFETY: 64 bytes are readable at `p`, 32 of them from p + 32; x86 is little-endian.
        unsafe {
            let (shift, mask) = (_mm_cvtsi32_si128(SHIFT as i32), _mm256_set1_epi32(MASK as i32));
            let code = |words| _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(words, shift), mask));
            [code(_mm256_loadu_si256(p.cast())), code(_mm256_loadu_si256(p.add(32).cast()))]
        }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> Self::F32 {
        let p = bytes.as_ptr();
        // SAFETY: 64 bytes are readable at `p`, 32 of them from p + 32; x86 is little-endian.
        unsafe { [_mm256_loadu_ps(p.cast()), _mm256_loadu_ps(p.add(32).cast())] }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Self::F32 {
        let p = bytes.as_ptr();
        // SAFETY: 32 bytes are readable at `p`, sixteen of them from p + 16; F16C comes with the proof.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast()))] }
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Self::F32 {
        let p = bytes.as_ptr();
        // SAFETY: 32 bytes are readable at `p`, sixteen of them from p + 16.
        unsafe {
            let first = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let second = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(16).cast()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(first)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(second))]
        }
    }

    #[inline(always)]
    fn splat_f16(self, bytes: &[u8; 2]) -> Self::F32 {
        // Spread, then widened: the widening of a lone half would wait for the register's last value.
        // SAFETY: F16C comes with the proof.
        unsafe { [_mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(*bytes))); 2] }
    }

    #[inline(always)]
    fn f16x8(self, [a, b, c, d]: [u32; 4]) -> [f32; 8] {
        let [a, b, c, d] = [a.cast_signed(), b.cast_signed(), c.cast_signed(), d.cast_signed()];
        let mut out = [0.0; 8];
        // SAFETY: F16C comes with the proof; eight floats are writable there.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_setr_epi32(a, b, c, d))) };
        out
    }

    #[inline(always)]
    fn nibbles<const ZERO: u8>(self, bytes: &[u8; LANES], low: Affine, high: Affine) -> [Self::F32; 2] {
        let p = bytes.as_ptr();
        // SAFETY: sixteen bytes are readable at `p`, eight of them from p + 8.
        let [low_codes, high_codes] = unsafe {
            let first = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let second = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()));
            let (mask, zero) = (_mm256_set1_epi32(15), _mm256_set1_epi32(i32::from(ZERO)));
            let low = [_mm256_and_si256(first, mask), _mm256_and_si256(second, mask)];
            let high = [_mm256_srli_epi32::<4>(first), _mm256_srli_epi32::<4>(second)];
            [
                [
                    _mm256_cvtepi32_ps(_mm256_sub_epi32(low[0], zero)),
                    _mm256_cvtepi32_ps(_mm256_sub_epi32(low[1], zero)),
                ],
                [
                    _mm256_cvtepi32_ps(_mm256_sub_epi32(high[0], zero)),
                    _mm256_cvtepi32_ps(_mm256_sub_epi32(high[1], zero)),
                ],
            ]
        };
        [self.affine(low_codes, low), self.affine(high_codes, high)]
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::F32; LANES]) -> [Self::F32; LANES] {
        let mut out = rows;
        for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let mut quarter = [rows[0][0]; 8];
            for r in 0..8 {
                quarter[r] = rows[8 * i + r][j];
            }
            let quarter = transpose8(self, quarter);
            for r in 0..8 {
                out[8 * j + r][i] = quarter[r];
            }
        }
        out
    }
}

/// The transpose of an 8 × 8 matrix of rows.
#[inline(always)]
fn transpose8(simd: Avx2, r: [__m256; 8]) -> [__m256; 8] {
    let top = transpose4x2(simd, [r[0], r[1], r[2], r[3]]);
    let bottom = transpose4x2(simd, [r[4], r[5], r[6], r[7]]);
    let mut out = r;
    for i in 0..4 {
        // SAFETY: the first argument proves AVX2.
        unsafe {
            out[i] = _mm256_permute2f128_ps::<0x20>(top[i], bottom[i]);
            out[i + 4] = _mm256_permute2f128_ps::<0x31>(top[i], bottom[i]);
        }
    }
    out
}

/// The transposes of two 4 × 4 matrices, one in each half of the rows.
#[inline(always)]
fn transpose4x2(_: Avx2, r: [__m256; 4]) -> [__m256; 4] {
    // SAFETY: the first argument proves AVX2.
    unsafe {
        let (low0, high0) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
        let (low1, high1) = (_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
        [
            _mm256_shuffle_ps::<0x44>(low0, low1),
            _mm256_shuffle_ps::<0xEE>(low0, low1),
            _mm256_shuffle_ps::<0x44>(high0, high1),
            _mm256_shuffle_ps::<0xEE>(high0, high1),
        ]
    }
}

impl Simd for Avx512 {
    type F32 = __m512;

    // Twenty-eight accumulators, two vectors of the panel, one or two broadcasts: 32 registers.
    const TILE_ROWS: usize = 14;
    const TILE_VECTORS: usize = 2;

    #[inline(always)]
    fn prefetch(self, line: &[u8; LINE]) {
        // SAFETY: SSE is part of x86-64, and a prefetch touches nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F, BW, DQ and VL (so in every method of this impl).
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F32 {
        // SAFETY: sixteen floats are readable there.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, vector: Self::F32, out: &mut [f32; LANES]) {
        // SAFETY: sixteen floats are writable there.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), vector) }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn max_abs(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // Larger magnitude, sign cleared.
        // SAFETY: see `splat`.
        unsafe { _mm512_range_ps::<0b10_11>(a, b) }
    }

    #[inline(always)]
    fn power_of_two(self, shifted: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe {
            let n = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn affine(self, code: Self::F32, affine: Affine) -> Self::F32 {
        self.fma(code, self.splat(affine.scale), self.splat(affine.min))
    }

    #[inline(always)]
    fn sum(self, vector: Self::F32) -> f32 {
        // SAFETY: see `splat`.
        unsafe { Avx2(()).sum([_mm512_castps512_ps256(vector), _mm512_extractf32x8_ps::<1>(vector)]) }
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; LANES]) -> Self::F32 {
        // SAFETY: sixteen bytes are readable there.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn i8_words(self, [a, b, c, d]: [u32; 4]) -> Self::F32 {
        let [a, b, c, d] = [a.cast_signed(), b.cast_signed(), c.cast_signed(), d.cast_signed()];
        // SAFETY: see `splat`.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_setr_epi32(a, b, c, d))) }
    }

    #[inline(always)]
    fn word_codes<const SHIFT: u32, const MASK: u32>(self, words: &[u8; 4 * LANES]) -> Self::F32 {
        // SAFETY: 64 bytes are readable there; x86 is little-endian.
        unsafe {
            let words = _mm512_srli_epi32::<SHIFT>(_mm512_loadu_si512(words.as_ptr().cast()));
            _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(MASK as i32)))
        }
    }

    #[inline(always)]
    fn largest(self, vector: Self::F32) -> f32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_reduce_max_ps(vector) }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> Self::F32 {
        // SAFETY: 64 bytes are readable there; x86 is little-endian.
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Self::F32 {
        // SAFETY: 32 bytes are readable there.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Self::F32 {
        // SAFETY: 32 bytes are readable there.
        let wide = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast())) };
        // SAFETY: see `splat`.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)) }
    }

    #[inline(always)]
    fn splat_f16(self, bytes: &[u8; 2]) -> Self::F32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(*bytes))) }
    }

    #[inline(always)]
    fn f16x8(self, halves: [u32; 4]) -> [f32; 8] {
        Avx2(()).f16x8(halves)
    }

    /// A half byte can take sixteen values, as many as a register has lanes: one multiplication makes the table of
    /// its dequantised values, one permutation looks sixteen of them up. That is half the instructions of masking,
    /// converting and scaling each weight.
    #[inline(always)]
    fn nibbles<const ZERO: u8>(self, bytes: &[u8; LANES], low: Affine, high: Affine) -> [Self::F32; 2] {
        let codes = self.load(&const { codes(ZERO) });
        let (low, high) = (self.affine(codes, low), self.affine(codes, high));
        // SAFETY: sixteen bytes are readable there; the permutation reads the low four bits of each index only.
        unsafe {
            let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            [_mm512_permutexvar_ps(index, low), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(index), high)]
        }
    }

    #[inline(always)]
    fn transpose(self, r: [Self::F32; LANES]) -> [Self::F32; LANES] {
        // quads[b][j], lane l of four floats: column 4l + j of rows 4b..4b + 4.
        let quads = [
            transpose4x4(self, [r[0], r[1], r[2], r[3]]),
            transpose4x4(self, [r[4], r[5], r[6], r[7]]),
            transpose4x4(self, [r[8], r[9], r[10], r[11]]),
            transpose4x4(self, [r[12], r[13], r[14], r[15]]),
        ];
        let mut out = r;
        for j in 0..4 {
            let [q0, q1, q2, q3] = [quads[0][j], quads[1][j], quads[2][j], quads[3][j]];
            // SAFETY: see `splat`.
            unsafe {
                let (even01, odd01) = (_mm512_shuffle_f32x4::<0x88>(q0, q1), _mm512_shuffle_f32x4::<0xDD>(q0, q1));
                let (even23, odd23) = (_mm512_shuffle_f32x4::<0x88>(q2, q3), _mm512_shuffle_f32x4::<0xDD>(q2, q3));
                out[j] = _mm512_shuffle_f32x4::<0x88>(even01, even23);
                out[j + 8] = _mm512_shuffle_f32x4::<0xDD>(even01, even23);
                out[j + 4] = _mm512_shuffle_f32x4::<0x88>(odd01, odd23);
                out[j + 12] = _mm512_shuffle_f32x4::<0xDD>(odd01, odd23);
            }
        }
        out
    }
}

/// The transposes of four 4 × 4 matrices, one in each quarter of the rows.
#[inline(always)]
fn transpose4x4(_: Avx512, r: [__m512; 4]) -> [__m512; 4] {
    // SAFETY: the first argument proves AVX-512 F.
    unsafe {
        let (low0, high0) = (_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
        let (low1, high1) = (_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
        [
            _mm512_shuffle_ps::<0x44>(low0, low1),
            _mm512_shuffle_ps::<0xEE>(low0, low1),
            _mm512_shuffle_ps::<0x44>(high0, high1),
            _mm512_shuffle_ps::<0xEE>(high0, high1),
        ]
    }
}

/// The codes of the values of a half byte.
const fn codes(zero: u8) -> [f32; LANES] {
    let mut codes = [0.0; LANES];
    let mut i = 0;
    while i < LANES {
        codes[i] = i as f32 - zero as f32;
        i += 1;
    }
    codes
}
