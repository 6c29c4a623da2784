//! Vectors of sixty-four bytes beside the [`Simd`] vectors of floats: integer products of quantised weights and
//! quantised activations.
//!
//! Every level computes the same integers. A [`ByteKernel`] is to [`Level::dispatch_bytes`] what a
//! [`Kernel`](super::Kernel) is to [`Level::dispatch`](super::Level::dispatch).

#[cfg(target_arch = "aarch64")]
use super::bytes_neon::NeonBytes;
#[cfg(target_arch = "x86_64")]
use super::bytes_x86::Narrow;
use super::{Kind, LANES, Level, Portable, Simd, trellis};

/// Bytes of a vector.
pub const BYTES: usize = 4 * LANES;

/// The largest factor of 16 bits: 127 in its upper byte, nothing in the lower one.
pub const FINE_LIMIT: f32 = 127.0 * 256.0;
/// The largest factor of 8 bits.
pub const COARSE_LIMIT: f32 = 127.0;
/// Words of factors whose products [`Bytes::Coarse`] can sum: 8 · 4 · 15 · 127 is below 2^15.
pub const COARSE: usize = 8;

/// The offset that marks codes as `i8`: no code of an unsigned format is as large.
pub const SIGNED: u8 = 128;

/// Sixty-four activations in eight bits and what their products need besides.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub struct Quarter {
    /// The codes, -127 to 127.
    pub codes: [i8; BYTES],
    /// -128 times the sums of every four codes.
    pub sums: [i32; LANES],
    /// The scales of every four codes.
    pub scales: [f32; LANES],
}

impl Quarter {
    /// Zeros.
    pub const ZERO: Self = Self { codes: [0; BYTES], sums: [0; LANES], scales: [0.0; LANES] };
}

/// A computation that [`Level::dispatch_bytes`] compiles for every level.
pub trait ByteKernel {
    /// What it computes.
    type Output;

    /// The computation; mark every implementation `#[inline(always)]`.
    fn run<B: Bytes>(self, bytes: B) -> Self::Output;
}

/// Vectors of sixty-four codes of weights: one AVX-512 register, two of AVX2, four of NEON.
///
/// As with [`Simd`], a value is the proof that its instructions exist.
pub trait Bytes: Copy + Send + Sync + 'static {
    /// The level's vectors of floats.
    type Simd: Simd<F32 = Self::F32>;
    /// Its vector of sixteen floats.
    type F32: Copy;
    /// Sixty-four codes.
    type Codes: Copy;
    /// Sixteen integers of 32 bits.
    type I32: Copy;

    /// Rows of x in a tile of a matrix product whose accumulators fill the registers, see `linear::integer_panel`.
    const TILE_ROWS: usize;
    /// Vectors of sixteen rows of weights in such a tile, at most 2.
    const TILE_VECTORS: usize;
    /// Whether integer products of codes and factors ([`add_fine`](Self::add_fine), [`add_coarse`](Self::add_coarse)) are
    /// faster here than those of floats.
    const INTEGER_FACTORS: bool;

    /// Sixteen sums of products with factors of 16 bits.
    type Fine: Copy;
    /// Codes as such products read them.
    type FineCodes: Copy;
    /// Sixteen sums of products with factors of 8 bits, of no more than [`COARSE`] words of factors.
    type Coarse: Copy;

    /// The level's vectors of floats.
    fn simd(self) -> Self::Simd;

    /// Thirty-two bytes and thirty-two more.
    fn join(self, a: &[u8; 32], b: &[u8; 32]) -> Self::Codes;

    /// Sixty-four bytes.
    fn load(self, bytes: &[u8; BYTES]) -> Self::Codes;

    /// Low halves, and high halves.
    fn low_high(self, bytes: &[u8; BYTES]) -> [Self::Codes; 2];

    /// Bits 0 and 1 of every byte, bits 2 and 3; bits 4 and 5, bits 6 and 7.
    fn two_bits(self, bytes: &[u8; 32]) -> [Self::Codes; 2];

    /// [`two_bits`](Self::two_bits) of the first 32, and a third bit for every code: bits 0 of the other sixteen for the
    /// first sixteen codes, then bits 1 and so on.
    fn three_bits(self, bytes: &[u8; 48]) -> [Self::Codes; 2];

    /// The numbers, at most 15, of a quad of a [trellis](thinkey_core::quant::trellis), in the order of [`two_bits`](Self::two_bits).
    fn trellis(self, quad: &[u8; 32]) -> [Self::Codes; 2];

    /// Low halves of `a`, high halves of `a`, low halves of `b`, high halves of `b`.
    fn nibbles16(self, a: &[u8; 16], b: &[u8; 16]) -> Self::Codes;

    /// Low halves, then high halves.
    fn nibbles32(self, bytes: &[u8; 32]) -> Self::Codes;

    /// The codes of 6 bits of half a super-block of Q6_K. Of the first, the low four bits are the low halves of `low`;
    /// of the second, the high ones; the two bits above those are bits 0, 2, 4, 6 of `high`, each for 32 codes.
    fn six_bits(self, low: &[u8; 64], high: &[u8; 32]) -> [Self::Codes; 2];

    /// Adds a fifth bit to codes of 4 bits: bit `GROUP` of `high` to the first 32, bit `GROUP` + 1 to the others.
    fn fifth_bits<const GROUP: u32>(self, codes: Self::Codes, high: &[u8; 32]) -> Self::Codes;

    /// Σ (code − `offset`) · x over every four neighbours, exactly; x without its scales. Codes are at most 63, or, where `offset` is
    /// [`SIGNED`], `i8` and nothing is subtracted; `offset` is a power of two, or 0.
    fn dot(self, codes: Self::Codes, offset: u8, x: &Quarter) -> Self::F32;

    /// Stores `codes` as [`add_products`](Self::add_products) reads weights: bytes with or without a sign, whichever the
    /// level multiplies. Gives what is still to be subtracted from every weight, [`SIGNED`] where 128 was added to codes
    /// that had a sign.
    fn store_weights(self, codes: Self::Codes, offset: u8, out: &mut [u8; BYTES]) -> u8;

    /// Sixteen zeros.
    fn zero(self) -> Self::I32;

    /// Adds Σ weight · x over every four weights, exactly: of what [`store_weights`](Self::store_weights) left. x is not -128.
    fn add_products(self, sums: Self::I32, weights: Self::Codes, x: [i8; 4]) -> Self::I32;

    /// Integers as floats.
    fn floats(self, integers: Self::I32) -> Self::F32;

    /// Thirty-two factors, at most [`FINE_LIMIT`] in magnitude, as integers: two words for every four, as
    /// [`add_fine`](Self::add_fine) takes them. The eight second ones follow the first: of neighbours a compiler makes one
    /// load and then takes them apart in other registers, where each by itself is spread as it is loaded.
    fn fine_factors(self, factors: [Self::F32; 2], words: &mut [i32; 16]);

    /// Sums of nothing.
    fn fine_zero(self) -> Self::Fine;

    /// Codes of any eight bits without a sign, prepared once for the factors of several heads.
    fn fine_codes(self, codes: Self::Codes) -> Self::FineCodes;

    /// Adds Σ code · factor over every four codes, exactly, for sums below 2^31.
    fn add_fine(self, sums: Self::Fine, codes: Self::FineCodes, words: [i32; 2]) -> Self::Fine;

    /// The sums as floats.
    fn fine_sums(self, sums: Self::Fine) -> Self::F32;

    /// Thirty-two factors, at most [`COARSE_LIMIT`] in magnitude, as integers of 8 bits.
    fn coarse_factors(self, factors: [Self::F32; 2], words: &mut [i32; 8]);

    /// Begins to add coarse products to `total`: what of it waits until the [end](Self::coarse_end), and sums.
    fn coarse_begin(self, total: Self::I32) -> (Self::I32, Self::Coarse);

    /// Adds Σ code · factor over every four codes, which are at most 15.
    fn add_coarse(self, sums: Self::Coarse, codes: Self::Codes, word: i32) -> Self::Coarse;

    /// The total with the sums.
    fn coarse_end(self, waiting: Self::I32, sums: Self::Coarse) -> Self::I32;

    /// Eight pairs of binary16, the low half of a word first: firsts to lanes 0..8, seconds to lanes 8..16.
    fn halves(self, words: [u32; 8]) -> Self::F32;

    /// Lane 2·`QUARTER` eight times, then the next lane eight times; `QUARTER` is below 4.
    fn spread8<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32;

    /// Lanes 4·`QUARTER`.. four times each; `QUARTER` is below 4.
    fn spread4<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32;

    /// Lanes 8..16 as they are, zeros before them.
    fn upper(self, vector: Self::F32) -> Self::F32;
}

/// How far to shift [`Quarter::sums`] right for -`offset` times the sums; `offset` is a power of two, or 0.
#[cfg(target_arch = "x86_64")]
pub(super) const fn offset_shift(offset: u8) -> i32 {
    offset.leading_zeros() as i32
}

impl Level {
    /// Runs `kernel` with the byte vectors of this level.
    #[inline]
    pub fn dispatch_bytes<K: ByteKernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Kind::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(proof) => Narrow::from(proof).vectorise(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2Vnni(bytes) => bytes.vectorise(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(proof) => Narrow::from(proof).vectorise(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni(bytes) => bytes.vectorise(kernel),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(proof) => NeonBytes::from(proof).vectorise(kernel),
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot(bytes) => bytes.vectorise(kernel),
        }
    }

    /// Whether [`Bytes::add_products`] is one instruction: products of matrices gain nothing from bytes without it.
    #[must_use]
    pub const fn has_byte_products(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2Vnni(_) | Kind::Avx512Vnni(_) => true,
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot(_) => true,
            _ => false,
        }
    }
}

impl Bytes for Portable {
    type Simd = Self;
    type F32 = [f32; LANES];
    type Codes = [u8; BYTES];
    type I32 = [i32; LANES];

    const TILE_ROWS: usize = 1;
    const TILE_VECTORS: usize = 1;
    const INTEGER_FACTORS: bool = false;

    type Fine = [i32; LANES];
    type FineCodes = [u8; BYTES];
    type Coarse = [i32; LANES];

    #[inline(always)]
    fn simd(self) -> Self {
        self
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; BYTES]) -> Self::Codes {
        *bytes
    }

    #[inline(always)]
    fn low_high(self, bytes: &[u8; BYTES]) -> [Self::Codes; 2] {
        [bytes.map(|byte| byte & 15), bytes.map(|byte| byte >> 4)]
    }

    #[inline(always)]
    fn two_bits(self, bytes: &[u8; 32]) -> [Self::Codes; 2] {
        let mut codes = [[0; BYTES]; 2];
        for (quarter, codes) in codes.as_flattened_mut().chunks_exact_mut(32).enumerate() {
            codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> (2 * quarter) & 3);
        }
        codes
    }

    #[inline(always)]
    fn three_bits(self, bytes: &[u8; 48]) -> [Self::Codes; 2] {
        let (low, high) = bytes.split_at(32);
        let mut codes = self.two_bits(low.first_chunk().unwrap_or(&[0; 32]));
        for (bit, codes) in codes.as_flattened_mut().chunks_exact_mut(16).enumerate() {
            codes.iter_mut().zip(high).for_each(|(code, high)| *code |= (high >> bit & 1) << 2);
        }
        codes
    }

    #[inline(always)]
    fn trellis(self, quad: &[u8; 32]) -> [Self::Codes; 2] {
        trellis::portable(quad)
    }

    #[inline(always)]
    fn join(self, a: &[u8; 32], b: &[u8; 32]) -> Self::Codes {
        let mut codes = [0; BYTES];
        codes[..32].copy_from_slice(a);
        codes[32..].copy_from_slice(b);
        codes
    }

    #[inline(always)]
    fn nibbles16(self, a: &[u8; 16], b: &[u8; 16]) -> Self::Codes {
        let mut codes = [0; BYTES];
        for i in 0..16 {
            codes[i] = a[i] & 15;
            codes[i + 16] = a[i] >> 4;
            codes[i + 32] = b[i] & 15;
            codes[i + 48] = b[i] >> 4;
        }
        codes
    }

    #[inline(always)]
    fn nibbles32(self, bytes: &[u8; 32]) -> Self::Codes {
        let mut codes = [0; BYTES];
        for i in 0..32 {
            codes[i] = bytes[i] & 15;
            codes[i + 32] = bytes[i] >> 4;
        }
        codes
    }

    #[inline(always)]
    fn six_bits(self, low: &[u8; 64], high: &[u8; 32]) -> [Self::Codes; 2] {
        let mut codes = [[0; BYTES]; 2];
        for i in 0..32 {
            codes[0][i] = low[i] & 15 | high[i] << 4 & 0x30;
            codes[0][i + 32] = low[i + 32] & 15 | high[i] << 2 & 0x30;
            codes[1][i] = low[i] >> 4 | high[i] & 0x30;
            codes[1][i + 32] = low[i + 32] >> 4 | high[i] >> 2 & 0x30;
        }
        codes
    }

    #[inline(always)]
    fn fifth_bits<const GROUP: u32>(self, codes: Self::Codes, high: &[u8; 32]) -> Self::Codes {
        let mut codes = codes;
        for i in 0..32 {
            codes[i] |= (high[i] >> GROUP & 1) << 4;
            codes[i + 32] |= (high[i] >> (GROUP + 1) & 1) << 4;
        }
        codes
    }

    #[inline(always)]
    fn dot(self, codes: Self::Codes, offset: u8, x: &Quarter) -> Self::F32 {
        let mut out = [0.0; LANES];
        // Sixteen at a time and in pairs: what compilers make multiply-and-add instructions of 16 bits of.
        for (quarter, (codes, x)) in codes.as_chunks::<16>().0.iter().zip(x.codes.as_chunks::<16>().0).enumerate() {
            let (mut weights, mut factors) = ([0_i16; 16], [0_i16; 16]);
            for i in 0..16 {
                weights[i] = match offset {
                    SIGNED => i16::from(codes[i].cast_signed()),
                    _ => i16::from(codes[i]) - i16::from(offset),
                };
                factors[i] = i16::from(x[i]);
            }
            let mut pairs = [0_i32; 8];
            for i in 0..8 {
                pairs[i] = i32::from(weights[2 * i]) * i32::from(factors[2 * i])
                    + i32::from(weights[2 * i + 1]) * i32::from(factors[2 * i + 1]);
            }
            for i in 0..4 {
                out[4 * quarter + i] = (pairs[2 * i] + pairs[2 * i + 1]) as f32;
            }
        }
        out
    }

    #[inline(always)]
    fn store_weights(self, codes: Self::Codes, offset: u8, out: &mut [u8; BYTES]) -> u8 {
        for i in 0..BYTES {
            out[i] = codes[i] ^ offset & SIGNED;
        }
        offset
    }

    #[inline(always)]
    fn zero(self) -> Self::I32 {
        [0; LANES]
    }

    #[inline(always)]
    fn add_products(self, sums: Self::I32, weights: Self::Codes, x: [i8; 4]) -> Self::I32 {
        let mut sums = sums;
        for (sum, weights) in sums.iter_mut().zip(weights.as_chunks::<4>().0) {
            for i in 0..4 {
                *sum += i32::from(weights[i]) * i32::from(x[i]);
            }
        }
        sums
    }

    #[inline(always)]
    fn floats(self, integers: Self::I32) -> Self::F32 {
        integers.map(|integer| integer as f32)
    }

    #[inline(always)]
    fn fine_factors(self, factors: [Self::F32; 2], words: &mut [i32; 16]) {
        for (quad, factors) in factors.as_flattened().as_chunks::<4>().0.iter().enumerate() {
            let [a, b, c, d] = factors.map(|factor| factor.round_ties_even() as i32);
            (words[quad], words[8 + quad]) = (a & 0xFFFF | b << 16, c & 0xFFFF | d << 16);
        }
    }

    #[inline(always)]
    fn fine_zero(self) -> Self::Fine {
        [0; LANES]
    }

    #[inline(always)]
    fn fine_codes(self, codes: Self::Codes) -> Self::FineCodes {
        codes
    }

    #[inline(always)]
    fn add_fine(self, sums: Self::Fine, codes: Self::FineCodes, [ab, cd]: [i32; 2]) -> Self::Fine {
        let (mut sums, factors) = (sums, [ab << 16 >> 16, ab >> 16, cd << 16 >> 16, cd >> 16]);
        for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<4>().0) {
            for i in 0..4 {
                *sum += i32::from(codes[i]) * factors[i];
            }
        }
        sums
    }

    #[inline(always)]
    fn fine_sums(self, sums: Self::Fine) -> Self::F32 {
        self.floats(sums)
    }

    #[inline(always)]
    fn coarse_factors(self, factors: [Self::F32; 2], words: &mut [i32; 8]) {
        for (word, factors) in words.iter_mut().zip(factors.as_flattened().as_chunks::<4>().0) {
            *word = i32::from_le_bytes(factors.map(|factor| (factor.round_ties_even() as i8).cast_unsigned()));
        }
    }

    #[inline(always)]
    fn coarse_begin(self, total: Self::I32) -> (Self::I32, Self::Coarse) {
        ([0; LANES], total)
    }

    #[inline(always)]
    fn add_coarse(self, sums: Self::Coarse, codes: Self::Codes, word: i32) -> Self::Coarse {
        self.add_products(sums, codes, word.to_le_bytes().map(u8::cast_signed))
    }

    #[inline(always)]
    fn coarse_end(self, _: Self::I32, sums: Self::Coarse) -> Self::I32 {
        sums
    }

    #[inline(always)]
    fn halves(self, words: [u32; 8]) -> Self::F32 {
        let widen = |half: u32| crate::format::float::f16_to_f32(half as u16);
        std::array::from_fn(|i| if i < 8 { widen(words[i] & 0xFFFF) } else { widen(words[i - 8] >> 16) })
    }

    #[inline(always)]
    fn spread8<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| vector[2 * QUARTER + i / 8])
    }

    #[inline(always)]
    fn spread4<const QUARTER: usize>(self, vector: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| vector[4 * QUARTER + i / 4])
    }

    #[inline(always)]
    fn upper(self, vector: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| if i < 8 { 0.0 } else { vector[i] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use thinkey_core::attend::TILE_BLOCKS;

    /// Everything a level computes, over the same inputs.
    struct Everything<'a>(&'a [u8; 96], &'a Quarter, [f32; LANES], [u32; 8]);

    impl ByteKernel for Everything<'_> {
        type Output = Vec<[f32; LANES]>;

        #[inline(always)]
        fn run<B: Bytes>(self, b: B) -> Self::Output {
            let Self(bytes, x, floats, words) = self;
            let low: &[u8; 64] = bytes.first_chunk().unwrap();
            let [first, second, high]: [&[u8; 32]; 3] = [0, 32, 64].map(|at| bytes[at..].first_chunk().unwrap());
            let [a, c]: [&[u8; 16]; 2] = [0, 16].map(|at| bytes[at..].first_chunk().unwrap());
            let four = [b.nibbles16(a, c), b.nibbles32(first)];
            let [six0, six1] = b.six_bits(low, high);
            let five = [b.fifth_bits::<0>(four[0], high), b.fifth_bits::<6>(four[1], high)];
            let vector = b.simd().load(&floats);
            let mut out = Vec::new();
            // What is stored differs from level to level, what comes of it does not: every number is an integer below 2^24.
            for (codes, offset) in [(b.join(first, second), SIGNED), (four[0], 8), (six0, 32), (five[1], 0)] {
                let mut weights = [0; BYTES];
                let offset = b.store_weights(codes, offset, &mut weights);
                let products =
                    b.add_products(b.zero(), b.load(&weights), [x.codes[0], x.codes[1], x.codes[2], x.codes[3]]);
                let products =
                    b.add_products(products, b.load(&weights), [x.codes[4], x.codes[5], x.codes[6], x.codes[7]]);
                let sum: f32 = x.codes[..8].iter().map(|&x| f32::from(x)).sum();
                out.push(b.simd().add(b.floats(products), b.simd().splat(-f32::from(offset) * sum)));
            }
            out.extend([b.dot(b.join(first, second), SIGNED, x)]);
            out.extend(b.low_high(low).map(|halves| b.dot(halves, 0, x)));
            out.extend(b.two_bits(first).map(|codes| b.dot(codes, 0, x)));
            out.extend(b.three_bits(bytes.first_chunk().unwrap()).map(|codes| b.dot(codes, 0, x)));
            out.extend(b.trellis(first).map(|codes| b.dot(codes, 0, x)));
            for codes in four.into_iter().chain(five).chain([six0, six1]) {
                out.extend([b.dot(codes, 0, x), b.dot(codes, 8, x), b.dot(codes, 16, x), b.dot(codes, 32, x)]);
            }
            // Factors of both kinds, as large as they may be, with as many words as sums must hold.
            let largest = b.simd().largest(b.simd().max_abs(vector, b.simd().splat(1e-3)));
            let scaled = |limit: f32| {
                let first = b.simd().mul(vector, b.simd().splat(limit / largest));
                [first, b.simd().mul(first, b.simd().splat(-1.0))]
            };
            let (mut fine, mut words16) = (b.fine_zero(), [0; 16]);
            b.fine_factors(scaled(FINE_LIMIT), &mut words16);
            let codes = b.fine_codes(b.join(first, second));
            for quad in 0..TILE_BLOCKS * 8 {
                let quad = if quad < 8 { quad } else { 0 };
                fine = b.add_fine(fine, codes, [words16[quad], words16[8 + quad]]);
            }
            out.push(b.fine_sums(fine));
            let mut words8 = [0; 8];
            b.coarse_factors(scaled(COARSE_LIMIT), &mut words8);
            for words in [words8, [words8[0]; COARSE]] {
                let total = b.add_products(b.zero(), b.load(&[1; BYTES]), [1, 2, 3, 4]);
                let (waiting, mut sums) = b.coarse_begin(total);
                for word in words {
                    sums = b.add_coarse(sums, four[0], word);
                }
                out.push(b.floats(b.coarse_end(waiting, sums)));
            }
            out.extend([b.halves(words), b.upper(vector)]);
            out.extend([
                b.spread8::<0>(vector),
                b.spread8::<1>(vector),
                b.spread8::<2>(vector),
                b.spread8::<3>(vector),
            ]);
            out.extend([
                b.spread4::<0>(vector),
                b.spread4::<1>(vector),
                b.spread4::<2>(vector),
                b.spread4::<3>(vector),
            ]);
            let store = |vector| {
                let mut out = [0.0; LANES];
                b.simd().store(vector, &mut out);
                out
            };
            out.into_iter().map(store).collect()
        }
    }

    fn quarter(codes: [i8; BYTES]) -> Quarter {
        let codes = codes.map(|code| code.max(-127));
        let four = |i: usize| codes[4 * i..4 * i + 4].iter().map(|&code| i32::from(code)).sum::<i32>();
        Quarter { codes, sums: std::array::from_fn(|i| -128 * four(i)), scales: [1.0; LANES] }
    }

    fn check(bytes: &[u8; 96], x: &Quarter, floats: [f32; LANES], words: [u32; 8]) -> Result<(), TestCaseError> {
        let expected = Level::PORTABLE.dispatch_bytes(Everything(bytes, x, floats, words));
        for level in Level::available() {
            let actual = level.dispatch_bytes(Everything(bytes, x, floats, words));
            for (i, (a, e)) in actual.iter().flatten().zip(expected.iter().flatten()).enumerate() {
                let same = a == e || (a.is_nan() && e.is_nan());
                prop_assert!(same, "{} vector {} lane {}: {a} for {e}", level.name(), i / LANES, i % LANES);
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn every_level_computes_what_portable_does(
            bytes: [[u8; 32]; 3],
            x: [[i8; 32]; 2],
            floats in prop::array::uniform16(-100.0f32..100.0),
            words: [u32; 8],
        ) {
            let bytes = bytes.concat().try_into().unwrap();
            let x = quarter(x.concat().try_into().unwrap());
            check(&bytes, &x, floats, words)?;
        }
    }

    /// The largest sums there are: where sixteen bits would not hold them, a level must not saturate.
    #[test]
    fn extremes_do_not_saturate() {
        for weight in [0x80_u8, 0x7F, 0xFF, 0x00, 0x81] {
            for x in [127, -127, 1] {
                check(&[weight; 96], &quarter([x; BYTES]), [0.0; LANES], [0xFC00_7C00; 8]).unwrap();
            }
            // Factors that are all the largest there are.
            for factor in [1.0, -1.0] {
                check(&[weight; 96], &Quarter::ZERO, [factor; LANES], [0; 8]).unwrap();
            }
        }
        let x = quarter([127; BYTES]);
        let out = Level::PORTABLE.dispatch_bytes(Everything(&[0x80; 96], &x, [0.0; LANES], [0; 8]));
        // Products of bytes with a sign, then of others: codes 0 and 8 less 8, sixteen codes of each in turn.
        assert_eq!(out[0], [-128.0 * 127.0 * 8.0; LANES]);
        assert_eq!(out[1], std::array::from_fn(|i| if i / 4 % 2 == 0 { -8.0 * 127.0 * 8.0 } else { 0.0 }));
        assert_eq!(out[4], [-128.0 * 127.0 * 4.0; LANES]);
    }
}
