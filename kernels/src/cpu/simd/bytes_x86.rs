//! Byte vectors on AVX2 and AVX-512, each with and without the dot-product instructions (VNNI).
//!
//! Without VNNI, products of unsigned and signed bytes are summed in pairs of sixteen bits, which saturate: they hold
//! 2 · 63 · 127 for codes of six bits and 2 · 128 · 127 for weights of eight, whose sign is moved to the activation.
//!
//! No intrinsic is called in a closure that an iterator or array adaptor runs: those are compiled without the level's
//! instructions, ten times as slow.

use super::Simd;
use super::bytes::{BYTES, ByteKernel, Bytes, Quarter, SIGNED, offset_shift};
use super::trellis;
use super::x86::{Avx2, Avx512};
use std::arch::x86_64::*;

/// AVX2, where `VNNI` with the dot products of 256 bits. A value proves that the machine has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Narrow<const VNNI: bool>(Avx2);

/// AVX-512 with its dot products. A value proves that the machine has them. AVX-512 without them (Skylake's) computes with
/// bytes as AVX2 does: a level of its own would be a fifth of all that is compiled here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wide(Avx512);

impl From<Avx2> for Narrow<false> {
    fn from(proof: Avx2) -> Self {
        Self(proof)
    }
}

impl From<Avx512> for Narrow<false> {
    fn from(proof: Avx512) -> Self {
        Self(proof.into())
    }
}

impl Narrow<true> {
    /// The proof, if the machine has AVX2 and AVX-VNNI.
    #[must_use]
    pub fn detect() -> Option<Self> {
        Avx2::detect().filter(|_| is_x86_feature_detected!("avxvnni")).map(Self)
    }
}

impl Wide {
    /// The proof, if the machine has AVX-512 with VNNI.
    #[must_use]
    pub fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| is_x86_feature_detected!("avx512vnni")).map(Self)
    }
}

impl<const VNNI: bool> Narrow<VNNI> {
    #[inline]
    pub(super) fn vectorise<K: ByteKernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
        fn plain<B: Bytes, K: ByteKernel>(bytes: B, kernel: K) -> K::Output {
            kernel.run(bytes)
        }
        #[target_feature(enable = "avxvnni,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
        fn vnni<B: Bytes, K: ByteKernel>(bytes: B, kernel: K) -> K::Output {
            kernel.run(bytes)
        }
        // SAFETY: `self` exists only where the vector extensions named were found; every processor with AVX2 has the
        // scalar ones.
        unsafe { if VNNI { vnni(self, kernel) } else { plain(self, kernel) } }
    }
}

impl Wide {
    #[inline]
    pub(super) fn vectorise<K: ByteKernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
        fn inner<K: ByteKernel>(bytes: Wide, kernel: K) -> K::Output {
            kernel.run(bytes)
        }
        // SAFETY: `self` exists only where the vector extensions named were found; every processor with AVX-512 has
        // the scalar ones.
        unsafe { inner(self, kernel) }
    }
}

impl<const VNNI: bool> Bytes for Narrow<VNNI> {
    type Simd = Avx2;
    type F32 = [__m256; 2];
    type Codes = [__m256i; 2];
    type I32 = [__m256i; 2];

    // Six accumulators of integers and six of floats, two vectors of weights, one broadcast: 15 of 16 registers.
    const TILE_ROWS: usize = 3;
    const TILE_VECTORS: usize = 1;
    const INTEGER_FACTORS: bool = true;

    type Fine = [[__m256i; 2]; 2];
    type FineCodes = [[__m256i; 2]; 2];
    type Coarse = [__m256i; 2];

    #[inline(always)]
    fn simd(self) -> Avx2 {
        self.0
    }

    #[inline(always)]
    fn join(self, a: &[u8; 32], b: &[u8; 32]) -> Self::Codes {
        // SAFETY: 32 bytes are readable at each; `self` proves AVX2 (so in every method of this impl).
        unsafe { [_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast())] }
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; BYTES]) -> Self::Codes {
        let p = bytes.as_ptr();
        // SAFETY: 64 bytes are readable at `p`, 32 of them from p + 32.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }

    #[inline(always)]
    fn low_high(self, bytes: &[u8; BYTES]) -> [Self::Codes; 2] {
        let [a, b] = self.load(bytes);
        // SAFETY: see `join`.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let high = [_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)];
            [
                [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)],
                [_mm256_and_si256(high[0], mask), _mm256_and_si256(high[1], mask)],
            ]
        }
    }

    #[inline(always)]
    fn two_bits(self, bytes: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 32 bytes are readable there.
        unsafe {
            let (x, mask) = (_mm256_loadu_si256(bytes.as_ptr().cast()), _mm256_set1_epi8(3));
            let (b, c, d) = (_mm256_srli_epi16::<2>(x), _mm256_srli_epi16::<4>(x), _mm256_srli_epi16::<6>(x));
            [
                [_mm256_and_si256(x, mask), _mm256_and_si256(b, mask)],
                [_mm256_and_si256(c, mask), _mm256_and_si256(d, mask)],
            ]
        }
    }

    #[inline(always)]
    fn three_bits(self, bytes: &[u8; 48]) -> [Self::Codes; 2] {
        // SAFETY: 48 bytes are readable there, sixteen of them from the thirty-third.
        unsafe {
            let (x, mask) = (_mm256_loadu_si256(bytes.as_ptr().cast()), _mm256_set1_epi8(3));
            let (b, c, d) = (_mm256_srli_epi16::<2>(x), _mm256_srli_epi16::<4>(x), _mm256_srli_epi16::<6>(x));
            // Two of the bits at a time go to bit 2, one in each half.
            let high = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().add(32).cast()));
            let four = _mm256_set1_epi8(4);
            let e = _mm256_and_si256(four, _mm256_sllv_epi64(high, _mm256_setr_epi64x(2, 2, 1, 1)));
            let f = _mm256_and_si256(four, _mm256_srlv_epi64(high, _mm256_setr_epi64x(0, 0, 1, 1)));
            let g = _mm256_and_si256(four, _mm256_srlv_epi64(high, _mm256_setr_epi64x(2, 2, 3, 3)));
            let h = _mm256_and_si256(four, _mm256_srlv_epi64(high, _mm256_setr_epi64x(4, 4, 5, 5)));
            [
                [_mm256_or_si256(_mm256_and_si256(x, mask), e), _mm256_or_si256(_mm256_and_si256(b, mask), f)],
                [_mm256_or_si256(_mm256_and_si256(c, mask), g), _mm256_or_si256(_mm256_and_si256(d, mask), h)],
            ]
        }
    }

    #[inline(always)]
    fn trellis(self, quad: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 32 bytes are readable there.
        unsafe {
            let [a, b] = trellis::x86::nibbles(_mm256_loadu_si256(quad.as_ptr().cast()));
            let (table, mask) = (trellis::x86::table(), _mm256_set1_epi8(15));
            let low = |x| _mm256_shuffle_epi8(table, _mm256_and_si256(x, mask));
            let high = |x| low(_mm256_srli_epi16::<4>(x));
            [[low(a), low(b)], [high(a), high(b)]]
        }
    }

    #[inline(always)]
    fn nibbles16(self, a: &[u8; 16], b: &[u8; 16]) -> Self::Codes {
        // SAFETY: sixteen bytes are readable at each.
        unsafe {
            let (shifts, mask) = (_mm256_setr_epi64x(0, 0, 4, 4), _mm256_set1_epi8(15));
            let a = _mm256_broadcastsi128_si256(_mm_loadu_si128(a.as_ptr().cast()));
            let b = _mm256_broadcastsi128_si256(_mm_loadu_si128(b.as_ptr().cast()));
            [_mm256_and_si256(_mm256_srlv_epi64(a, shifts), mask), _mm256_and_si256(_mm256_srlv_epi64(b, shifts), mask)]
        }
    }

    #[inline(always)]
    fn nibbles32(self, bytes: &[u8; 32]) -> Self::Codes {
        // SAFETY: 32 bytes are readable there.
        unsafe {
            let (bytes, mask) = (_mm256_loadu_si256(bytes.as_ptr().cast()), _mm256_set1_epi8(15));
            [_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask)]
        }
    }

    #[inline(always)]
    fn six_bits(self, low: &[u8; 64], high: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 64 and 32 bytes are readable there.
        unsafe {
            let low = [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(low.as_ptr().add(32).cast())];
            let high = _mm256_loadu_si256(high.as_ptr().cast());
            let (fours, twos) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
            let join = |low, high| _mm256_or_si256(_mm256_and_si256(low, fours), _mm256_and_si256(high, twos));
            [
                [join(low[0], _mm256_slli_epi16::<4>(high)), join(low[1], _mm256_slli_epi16::<2>(high))],
                [
                    join(_mm256_srli_epi16::<4>(low[0]), high),
                    join(_mm256_srli_epi16::<4>(low[1]), _mm256_srli_epi16::<2>(high)),
                ],
            ]
        }
    }

    #[inline(always)]
    fn fifth_bits<const GROUP: u32>(self, codes: Self::Codes, high: &[u8; 32]) -> Self::Codes {
        // SAFETY: 32 bytes are readable there.
        unsafe {
            let high = _mm256_loadu_si256(high.as_ptr().cast());
            let zero = _mm256_setzero_si256();
            // The bytes in which the bit is clear lose the sixteen that all get.
            let with = |codes, bit: u32| {
                let clear = _mm256_cmpeq_epi8(_mm256_and_si256(high, _mm256_set1_epi8((1_u8 << bit) as i8)), zero);
                _mm256_or_si256(codes, _mm256_andnot_si256(clear, _mm256_set1_epi8(16)))
            };
            [with(codes[0], GROUP), with(codes[1], GROUP + 1)]
        }
    }

    #[inline(always)]
    fn dot(self, codes: Self::Codes, offset: u8, x: &Quarter) -> Self::F32 {
        let mut out = self.0.splat(0.0);
        for half in 0..2 {
            // SAFETY: 64 codes and sixteen sums are readable there, half of them from the middle; with `VNNI`, `self`
            // proves AVX-VNNI.
            unsafe {
                let (codes, ones) = (codes[half], _mm256_set1_epi16(1));
                let x_codes = _mm256_loadu_si256(x.codes.as_ptr().add(32 * half).cast());
                let sums = || _mm256_loadu_si256(x.sums.as_ptr().add(8 * half).cast());
                let dot = match offset {
                    0 if VNNI => _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes, x_codes),
                    _ if VNNI => {
                        // As unsigned codes with an offset of 128, which the sums take away.
                        let codes =
                            _mm256_add_epi8(codes, _mm256_set1_epi8(SIGNED.wrapping_sub(offset % SIGNED) as i8));
                        _mm256_dpbusd_avx_epi32(sums(), codes, x_codes)
                    }
                    SIGNED => {
                        let x = _mm256_sign_epi8(x_codes, codes);
                        _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(codes), x), ones)
                    }
                    _ => {
                        let dot = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x_codes), ones);
                        let shift = _mm256_set1_epi32(offset_shift(offset));
                        if offset == 0 { dot } else { _mm256_add_epi32(dot, _mm256_srav_epi32(sums(), shift)) }
                    }
                };
                out[half] = _mm256_cvtepi32_ps(dot);
            }
        }
        out
    }

    #[inline(always)]
    fn store_weights(self, codes: Self::Codes, offset: u8, out: &mut [u8; BYTES]) -> u8 {
        // SAFETY: 64 bytes are writable there, 32 of them from the middle.
        unsafe {
            let sign = _mm256_set1_epi8((offset & SIGNED).cast_signed());
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_xor_si256(codes[0], sign));
            _mm256_storeu_si256(out.as_mut_ptr().add(32).cast(), _mm256_xor_si256(codes[1], sign));
        }
        offset
    }

    #[inline(always)]
    fn zero(self) -> Self::I32 {
        // SAFETY: see `join`.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn add_products(self, sums: Self::I32, codes: Self::Codes, x: [i8; 4]) -> Self::I32 {
        let mut out = sums;
        for half in 0..2 {
            let codes = codes[half];
            // SAFETY: see `join`; with `VNNI`, `self` proves AVX-VNNI.
            unsafe {
                let x = _mm256_set1_epi32(i32::from_ne_bytes(x.map(i8::cast_unsigned)));
                out[half] = if VNNI {
                    _mm256_dpbusd_avx_epi32(sums[half], codes, x)
                } else {
                    // Every other code at a time: the sum of two products would saturate.
                    let (ones, even) = (_mm256_set1_epi16(1), _mm256_set1_epi16(0xFF));
                    let evens = _mm256_maddubs_epi16(_mm256_and_si256(even, codes), x);
                    let odds = _mm256_maddubs_epi16(_mm256_andnot_si256(even, codes), x);
                    let sum = _mm256_add_epi32(_mm256_madd_epi16(evens, ones), _mm256_madd_epi16(odds, ones));
                    _mm256_add_epi32(sums[half], sum)
                };
            }
        }
        out
    }

    #[inline(always)]
    fn floats(self, integers: Self::I32) -> Self::F32 {
        // SAFETY: see `join`.
        unsafe { [_mm256_cvtepi32_ps(integers[0]), _mm256_cvtepi32_ps(integers[1])] }
    }

    #[inline(always)]
    fn fine_factors(self, factors: [Self::F32; 2], words: &mut [i32; 16]) {
        for (half, [a, b]) in factors.into_iter().enumerate() {
            // SAFETY: see `join`; four words are writable at both places, for the second half too.
            unsafe {
                // Quads 0, 2 and 1, 3.
                let x = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
                let words16 = if VNNI {
                    // Lower bytes have signs, so upper ones are rounded: 0, 2 above, 0, 2 below, 1, 3 above, 1, 3 below.
                    let high = _mm256_srai_epi16::<8>(_mm256_add_epi16(x, _mm256_set1_epi16(128)));
                    let both = _mm256_packs_epi16(high, _mm256_sub_epi16(x, _mm256_slli_epi16::<8>(high)));
                    _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
                } else {
                    // First and third factor of a quad, second and fourth.
                    let order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
                    let x = _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(order));
                    _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7))
                };
                let words = words.as_mut_ptr().add(4 * half);
                _mm_storeu_si128(words.cast(), _mm256_castsi256_si128(words16));
                _mm_storeu_si128(words.add(8).cast(), _mm256_extracti128_si256::<1>(words16));
            }
        }
    }

    #[inline(always)]
    fn fine_zero(self) -> Self::Fine {
        [self.zero(); 2]
    }

    #[inline(always)]
    fn fine_codes(self, codes: Self::Codes) -> Self::FineCodes {
        if VNNI {
            return [codes; 2];
        }
        // SAFETY: see `join`.
        unsafe {
            let even = _mm256_set1_epi16(0xFF);
            [
                [_mm256_and_si256(codes[0], even), _mm256_and_si256(codes[1], even)],
                [_mm256_srli_epi16::<8>(codes[0]), _mm256_srli_epi16::<8>(codes[1])],
            ]
        }
    }

    #[inline(always)]
    fn add_fine(self, sums: Self::Fine, codes: Self::FineCodes, words: [i32; 2]) -> Self::Fine {
        let mut out = sums;
        // SAFETY: see `join`; with `VNNI`, `self` proves AVX-VNNI.
        unsafe {
            let words = [_mm256_set1_epi32(words[0]), _mm256_set1_epi32(words[1])];
            for half in 0..2 {
                for part in 0..2 {
                    if VNNI {
                        out[part][half] = _mm256_dpbusd_avx_epi32(out[part][half], codes[part][half], words[part]);
                    } else {
                        // All in one sum: registers are few.
                        let products = _mm256_madd_epi16(codes[part][half], words[part]);
                        out[0][half] = _mm256_add_epi32(out[0][half], products);
                    }
                }
            }
        }
        out
    }

    #[inline(always)]
    fn fine_sums(self, sums: Self::Fine) -> Self::F32 {
        let [high, low] = sums;
        if VNNI { self.0.fma(self.floats(high), self.0.splat(256.0), self.floats(low)) } else { self.floats(high) }
    }

    #[inline(always)]
    fn coarse_factors(self, factors: [Self::F32; 2], words: &mut [i32; 8]) {
        let [[a, b], [c, d]] = factors;
        // SAFETY: see `join`; eight words are writable there.
        unsafe {
            let first = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
            let second = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
            // Quads 0, 2, 4, 6, 1, 3, 5, 7.
            let all = _mm256_packs_epi16(first, second);
            let all = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            _mm256_storeu_si256(words.as_mut_ptr().cast(), all);
        }
    }

    #[inline(always)]
    fn coarse_begin(self, total: Self::I32) -> (Self::I32, Self::Coarse) {
        if VNNI { (self.zero(), total) } else { (total, self.zero()) }
    }

    #[inline(always)]
    fn add_coarse(self, sums: Self::Coarse, codes: Self::Codes, word: i32) -> Self::Coarse {
        let mut out = sums;
        for half in 0..2 {
            // SAFETY: see `join`; with `VNNI`, `self` proves AVX-VNNI.
            unsafe {
                let word = _mm256_set1_epi32(word);
                out[half] = if VNNI {
                    _mm256_dpbusd_avx_epi32(sums[half], codes[half], word)
                } else {
                    // Sums of sixteen bits: no product of codes up to 15 saturates, nor do the sums of `COARSE` words.
                    _mm256_add_epi16(sums[half], _mm256_maddubs_epi16(codes[half], word))
                };
            }
        }
        out
    }

    #[inline(always)]
    fn coarse_end(self, waiting: Self::I32, sums: Self::Coarse) -> Self::I32 {
        if VNNI {
            return sums;
        }
        let mut out = waiting;
        for half in 0..2 {
            // SAFETY: see `join`.
            unsafe {
                let sums = _mm256_madd_epi16(sums[half], _mm256_set1_epi16(1));
                out[half] = _mm256_add_epi32(waiting[half], sums);
            }
        }
        out
    }

    #[inline(always)]
    fn halves(self, words: [u32; 8]) -> Self::F32 {
        // SAFETY: F16C comes with the proof.
        unsafe {
            let halves = split_halves(words);
            [_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves))]
        }
    }

    #[inline(always)]
    fn spread8<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32 {
        let lane = 2 * QUARTER as i32;
        // SAFETY: see `join`.
        unsafe {
            [
                _mm256_permutevar8x32_ps(vector[0], _mm256_set1_epi32(lane)),
                _mm256_permutevar8x32_ps(vector[0], _mm256_set1_epi32(lane + 1)),
            ]
        }
    }

    #[inline(always)]
    fn spread4<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32 {
        let (a, vector) = (4 * (QUARTER as i32 % 2), vector[QUARTER / 2]);
        let (b, c, d) = (a + 1, a + 2, a + 3);
        // SAFETY: see `join`.
        unsafe {
            [
                _mm256_permutevar8x32_ps(vector, _mm256_setr_epi32(a, a, a, a, b, b, b, b)),
                _mm256_permutevar8x32_ps(vector, _mm256_setr_epi32(c, c, c, c, d, d, d, d)),
            ]
        }
    }

    #[inline(always)]
    fn upper(self, vector: Self::F32) -> Self::F32 {
        [self.0.splat(0.0)[0], vector[1]]
    }
}

/// The low halves of the words, then the high ones.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn split_halves(words: [u32; 8]) -> __m256i {
    let [a, b, c, d, e, f, g, h] = words.map(u32::cast_signed);
    // SAFETY: as promised to this function.
    unsafe {
        let words = _mm256_setr_epi32(a, b, c, d, e, f, g, h);
        let order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        let split = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
        _mm256_permute4x64_epi64::<0b11_01_10_00>(split)
    }
}

impl Bytes for Wide {
    type Simd = Avx512;
    type F32 = __m512;
    type Codes = __m512i;
    type I32 = __m512i;

    // Twelve accumulators of integers and twelve of floats, two vectors of weights, scales: 32 registers.
    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 2;
    const INTEGER_FACTORS: bool = true;

    type Fine = [__m512i; 2];
    type FineCodes = __m512i;
    type Coarse = __m512i;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn join(self, a: &[u8; 32], b: &[u8; 32]) -> Self::Codes {
        // SAFETY: 32 bytes are readable at each; `self` proves AVX-512 F, BW, DQ and VL (so in every method of this
        // impl).
        unsafe {
            let first = _mm512_castsi256_si512(_mm256_loadu_si256(a.as_ptr().cast()));
            _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(b.as_ptr().cast()))
        }
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; BYTES]) -> Self::Codes {
        // SAFETY: 64 bytes are readable there.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn low_high(self, bytes: &[u8; BYTES]) -> [Self::Codes; 2] {
        let bytes = self.load(bytes);
        // SAFETY: see `join`.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            [_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask)]
        }
    }

    #[inline(always)]
    fn two_bits(self, bytes: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 32 bytes are readable there.
        unsafe {
            let x = _mm512_broadcast_i64x4(_mm256_loadu_si256(bytes.as_ptr().cast()));
            let mask = _mm512_set1_epi8(3);
            let low = _mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2));
            let high = _mm512_srlv_epi64(x, _mm512_setr_epi64(4, 4, 4, 4, 6, 6, 6, 6));
            [_mm512_and_si512(low, mask), _mm512_and_si512(high, mask)]
        }
    }

    #[inline(always)]
    fn three_bits(self, bytes: &[u8; 48]) -> [Self::Codes; 2] {
        let (low, _) = bytes.as_chunks::<32>();
        let [first, second] = self.two_bits(&low[0]);
        // SAFETY: sixteen bytes are readable from the thirty-third on.
        unsafe {
            // Four of the bits at a time go to bit 2, one in each quarter.
            let high = _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().add(32).cast()));
            let four = _mm512_set1_epi8(4);
            let e = _mm512_rolv_epi64(high, _mm512_setr_epi64(2, 2, 1, 1, 0, 0, 63, 63));
            let f = _mm512_srlv_epi64(high, _mm512_setr_epi64(2, 2, 3, 3, 4, 4, 5, 5));
            // a | b & c
            [_mm512_ternarylogic_epi64::<0xF8>(first, e, four), _mm512_ternarylogic_epi64::<0xF8>(second, f, four)]
        }
    }

    #[inline(always)]
    fn trellis(self, quad: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 32 bytes are readable there.
        unsafe {
            let [a, b] = trellis::x86::nibbles(_mm256_loadu_si256(quad.as_ptr().cast()));
            let nibbles = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
            let (table, mask) = (_mm512_broadcast_i64x4(trellis::x86::table()), _mm512_set1_epi8(15));
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), mask);
            [_mm512_shuffle_epi8(table, _mm512_and_si512(nibbles, mask)), _mm512_shuffle_epi8(table, high)]
        }
    }

    #[inline(always)]
    fn nibbles16(self, a: &[u8; 16], b: &[u8; 16]) -> Self::Codes {
        // SAFETY: sixteen bytes are readable at each.
        unsafe {
            let first = _mm512_broadcast_i32x4(_mm_loadu_si128(a.as_ptr().cast()));
            let both = _mm512_mask_broadcast_i32x4(first, 0xFF00, _mm_loadu_si128(b.as_ptr().cast()));
            let shifts = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
            _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(15))
        }
    }

    #[inline(always)]
    fn nibbles32(self, bytes: &[u8; 32]) -> Self::Codes {
        // SAFETY: 32 bytes are readable there.
        unsafe {
            let twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(bytes.as_ptr().cast()));
            let shifts = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
            _mm512_and_si512(_mm512_srlv_epi64(twice, shifts), _mm512_set1_epi8(15))
        }
    }

    #[inline(always)]
    fn six_bits(self, low: &[u8; 64], high: &[u8; 32]) -> [Self::Codes; 2] {
        // SAFETY: 64 and 32 bytes are readable there.
        unsafe {
            let low = _mm512_loadu_si512(low.as_ptr().cast());
            let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(high.as_ptr().cast()));
            let first = _mm512_sllv_epi64(high, _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2));
            let second = _mm512_srlv_epi64(high, _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2));
            let (fours, twos) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
            // a | b & c
            let join = |low, high| _mm512_ternarylogic_epi64::<0xF8>(_mm512_and_si512(low, fours), high, twos);
            [join(low, first), join(_mm512_srli_epi16::<4>(low), second)]
        }
    }

    #[inline(always)]
    fn fifth_bits<const GROUP: u32>(self, codes: Self::Codes, high: &[u8; 32]) -> Self::Codes {
        // SAFETY: 32 bytes are readable there.
        unsafe {
            let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(high.as_ptr().cast()));
            let (a, b) = (0x0101_0101_0101_0101_i64 << GROUP, 0x0101_0101_0101_0101_i64 << (GROUP + 1));
            let set = _mm512_test_epi8_mask(high, _mm512_setr_epi64(a, a, a, a, b, b, b, b));
            _mm512_or_si512(codes, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(16)))
        }
    }

    #[inline(always)]
    fn dot(self, codes: Self::Codes, offset: u8, x: &Quarter) -> Self::F32 {
        // SAFETY: 64 codes and sixteen sums are readable there; `self` proves AVX512-VNNI.
        unsafe {
            let x_codes = _mm512_loadu_si512(x.codes.as_ptr().cast());
            let dot = if offset == 0 {
                _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x_codes)
            } else {
                // As unsigned codes with an offset of 128, which the sums take away.
                let codes = _mm512_add_epi8(codes, _mm512_set1_epi8(SIGNED.wrapping_sub(offset % SIGNED) as i8));
                _mm512_dpbusd_epi32(_mm512_loadu_si512(x.sums.as_ptr().cast()), codes, x_codes)
            };
            _mm512_cvtepi32_ps(dot)
        }
    }

    #[inline(always)]
    fn store_weights(self, codes: Self::Codes, offset: u8, out: &mut [u8; BYTES]) -> u8 {
        // SAFETY: 64 bytes are writable there.
        unsafe {
            let sign = _mm512_set1_epi8((offset & SIGNED).cast_signed());
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_xor_si512(codes, sign));
        }
        offset
    }

    #[inline(always)]
    fn zero(self) -> Self::I32 {
        // SAFETY: see `join`.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn add_products(self, sums: Self::I32, codes: Self::Codes, x: [i8; 4]) -> Self::I32 {
        // SAFETY: see `join`; `self` proves AVX512-VNNI.
        unsafe { _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(i32::from_ne_bytes(x.map(i8::cast_unsigned)))) }
    }

    #[inline(always)]
    fn floats(self, integers: Self::I32) -> Self::F32 {
        // SAFETY: see `join`.
        unsafe { _mm512_cvtepi32_ps(integers) }
    }

    #[inline(always)]
    fn fine_factors(self, factors: [Self::F32; 2], words: &mut [i32; 16]) {
        let [a, b] = factors;
        // SAFETY: see `join`; sixteen words are writable there.
        unsafe {
            // In quarters: quads 0, 4; 1, 5; 2, 6; 3, 7.
            let x = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            // Lower bytes have signs, so upper ones are rounded: 0, 4 above, 0, 4 below, 1, 5 above and so on.
            let high = _mm512_srai_epi16::<8>(_mm512_add_epi16(x, _mm512_set1_epi16(128)));
            let both = _mm512_packs_epi16(high, _mm512_sub_epi16(x, _mm512_slli_epi16::<8>(high)));
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_storeu_si512(words.as_mut_ptr().cast(), _mm512_permutexvar_epi32(order, both));
        }
    }

    #[inline(always)]
    fn fine_zero(self) -> Self::Fine {
        [self.zero(); 2]
    }

    #[inline(always)]
    fn fine_codes(self, codes: Self::Codes) -> Self::FineCodes {
        codes
    }

    #[inline(always)]
    fn add_fine(self, sums: Self::Fine, codes: Self::FineCodes, words: [i32; 2]) -> Self::Fine {
        let mut out = sums;
        for part in 0..2 {
            // SAFETY: see `join`; `self` proves AVX512-VNNI.
            out[part] = unsafe { _mm512_dpbusd_epi32(sums[part], codes, _mm512_set1_epi32(words[part])) };
        }
        out
    }

    #[inline(always)]
    fn fine_sums(self, sums: Self::Fine) -> Self::F32 {
        let [high, low] = sums;
        self.0.fma(self.floats(high), self.0.splat(256.0), self.floats(low))
    }

    #[inline(always)]
    fn coarse_factors(self, factors: [Self::F32; 2], words: &mut [i32; 8]) {
        for (half, factors) in factors.into_iter().enumerate() {
            // SAFETY: see `join`; sixteen bytes are writable there, from the middle for the second half.
            unsafe {
                let bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(factors));
                _mm_storeu_si128(words.as_mut_ptr().add(4 * half).cast(), bytes);
            }
        }
    }

    #[inline(always)]
    fn coarse_begin(self, total: Self::I32) -> (Self::I32, Self::Coarse) {
        (self.zero(), total)
    }

    #[inline(always)]
    fn add_coarse(self, sums: Self::Coarse, codes: Self::Codes, word: i32) -> Self::Coarse {
        // SAFETY: see `join`; `self` proves AVX512-VNNI.
        unsafe { _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(word)) }
    }

    #[inline(always)]
    fn coarse_end(self, _: Self::I32, sums: Self::Coarse) -> Self::I32 {
        sums
    }

    #[inline(always)]
    fn halves(self, words: [u32; 8]) -> Self::F32 {
        // SAFETY: see `join`; AVX-512 comes with AVX2.
        unsafe { _mm512_cvtph_ps(split_halves(words)) }
    }

    #[inline(always)]
    fn spread8<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32 {
        let (a, b) = (2 * QUARTER as i32, 2 * QUARTER as i32 + 1);
        // SAFETY: see `join`.
        unsafe {
            let lanes = _mm512_setr_epi32(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b);
            _mm512_permutexvar_ps(lanes, vector)
        }
    }

    #[inline(always)]
    fn spread4<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|lane| 4 * QUARTER as i32 + lane);
        // SAFETY: see `join`.
        unsafe {
            let lanes = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
            _mm512_permutexvar_ps(lanes, vector)
        }
    }

    #[inline(always)]
    fn upper(self, vector: Self::F32) -> Self::F32 {
        // SAFETY: see `join`.
        unsafe { _mm512_maskz_mov_ps(0xFF00, vector) }
    }
}
