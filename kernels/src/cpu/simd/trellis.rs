//! Codes of a [trellis](thinkey_core::quant::trellis) as the numbers of four bits that they stand for.
//!
//! A quad has eight words of four bytes, one a group: byte g of word i has, lowest first, codes i, i + 8, i + 16 and i + 24 of
//! group g. So the codes before all of its own are those of the word before, and before the first word comes the last one,
//! shifted by a code: nothing else crosses a byte. Then a number is a nibble of the codes before and of those mixed, looked up
//! sixteen (or more) at a time.

use thinkey_core::quant::trellis;

/// Bytes of a quad.
const QUAD: usize = 32;

/// The numbers of a quad's codes: those of the lowest two bits of all bytes, then of the next two and so on.
#[inline(always)]
pub(super) fn portable(quad: &[u8; QUAD]) -> [[u8; 2 * QUAD]; 2] {
    let before = |words: usize| -> [u8; QUAD] {
        std::array::from_fn(|at| match at.checked_sub(4 * words) {
            Some(at) => quad[at],
            None => quad[at + QUAD - 4 * words] << 2,
        })
    };
    let (before, second) = (before(1), before(2));
    let mut numbers = [[0; 2 * QUAD]; 2];
    for (code, numbers) in numbers.as_flattened_mut().chunks_exact_mut(QUAD).enumerate() {
        for (at, number) in numbers.iter_mut().enumerate() {
            let code = |bytes: &[u8; QUAD]| bytes[at] >> (2 * code) & 3;
            *number = trellis::level(code(quad), code(&before), code(&second));
        }
    }
    numbers
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::trellis;
    use std::arch::x86_64::*;

    /// The nibbles of a quad's codes: bytes whose low and high halves are those of the lowest and the third two bits, and those
    /// of the second and the highest.
    ///
    /// # Safety
    /// There must be AVX2.
    #[inline(always)]
    pub(in super::super) unsafe fn nibbles(quad: __m256i) -> [__m256i; 2] {
        // SAFETY: of registers alone, and the caller has AVX2.
        unsafe {
            // Words that come from the end are shifted by a code, and lose what comes in from the byte beside.
            let whole = _mm256_set1_epi8(-1);
            let first = _mm256_setr_epi32(2, 0, 0, 0, 0, 0, 0, 0);
            let two = _mm256_setr_epi32(2, 2, 0, 0, 0, 0, 0, 0);
            let high = _mm256_set1_epi8(!3);
            let before = _mm256_permutevar8x32_epi32(quad, _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6));
            let second = _mm256_permutevar8x32_epi32(quad, _mm256_setr_epi32(6, 7, 0, 1, 2, 3, 4, 5));
            let before = _mm256_and_si256(_mm256_sllv_epi32(before, first), _mm256_blend_epi32::<1>(whole, high));
            let second = _mm256_and_si256(_mm256_sllv_epi32(second, two), _mm256_blend_epi32::<3>(whole, high));
            let mixed = _mm256_xor_si256(quad, second);
            let (even, odd) = (_mm256_set1_epi8(0x33), _mm256_set1_epi8(!0x33));
            [
                _mm256_or_si256(_mm256_slli_epi16::<2>(_mm256_and_si256(mixed, even)), _mm256_and_si256(before, even)),
                _mm256_or_si256(_mm256_and_si256(mixed, odd), _mm256_srli_epi16::<2>(_mm256_and_si256(before, odd))),
            ]
        }
    }

    /// Sixteen numbers by their nibbles, in both halves.
    ///
    /// # Safety
    /// There must be AVX2.
    #[inline(always)]
    pub(in super::super) unsafe fn table() -> __m256i {
        // SAFETY: sixteen bytes are readable there, and the caller has AVX2.
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(trellis::TABLE.as_ptr().cast())) }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) mod neon {
    use super::trellis;
    use std::arch::aarch64::*;

    /// The numbers of a quad's codes, given in halves; in the order of [`portable`](super::portable).
    ///
    /// # Safety
    /// There must be NEON.
    #[inline(always)]
    pub(in super::super) unsafe fn numbers(a: uint8x16_t, b: uint8x16_t) -> [[uint8x16_t; 4]; 2] {
        // Words that come from the end are shifted by a code.
        const FIRST: [i8; 16] = [2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        const TWO: [i8; 16] = [2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0];
        // SAFETY: sixteen bytes are readable at each array, and the caller has NEON.
        unsafe {
            let (first, two, table) =
                (vld1q_s8(FIRST.as_ptr()), vld1q_s8(TWO.as_ptr()), vld1q_u8(trellis::TABLE.as_ptr().cast()));
            let before = [vshlq_u8(vextq_u8::<12>(b, a), first), vextq_u8::<12>(a, b)];
            let second = [vshlq_u8(vextq_u8::<8>(b, a), two), vextq_u8::<8>(a, b)];
            let mixed = [veorq_u8(a, second[0]), veorq_u8(b, second[1])];
            let (even, low) = (vdupq_n_u8(0x33), vdupq_n_u8(15));
            let nibbles = |half: usize| {
                let (mixed, before) = (mixed[half], before[half]);
                [
                    vorrq_u8(vshlq_n_u8::<2>(vandq_u8(mixed, even)), vandq_u8(before, even)),
                    vorrq_u8(vbicq_u8(mixed, even), vshrq_n_u8::<2>(vbicq_u8(before, even))),
                ]
            };
            let (a, b) = (nibbles(0), nibbles(1));
            let (low, high) = (|x| vqtbl1q_u8(table, vandq_u8(x, low)), |x| vqtbl1q_u8(table, vshrq_n_u8::<4>(x)));
            [[low(a[0]), low(b[0]), low(a[1]), low(b[1])], [high(a[0]), high(b[0]), high(a[1]), high(b[1])]]
        }
    }
}
