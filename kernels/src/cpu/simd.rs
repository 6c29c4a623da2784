//! Run-time choice of the instruction set, and the sixteen-lane vector that kernels are written in.
//!
//! A kernel is safe, generic code over [`Simd`] with an `#[inline(always)]` body. [`Level::dispatch`] compiles it
//! once per instruction set inside a `#[target_feature]` function and picks one at run time. A value of a `Simd`
//! type is the proof that its instructions exist, so its methods are safe.

pub mod bytes;
#[cfg(target_arch = "aarch64")]
mod bytes_neon;
#[cfg(target_arch = "x86_64")]
mod bytes_x86;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod trellis;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use bytes::Bytes;
use std::sync::OnceLock;

pub use portable::Portable;
#[cfg(target_arch = "aarch64")]
pub use {bytes_neon::NeonBytes, neon::Neon};
#[cfg(target_arch = "x86_64")]
pub use {
    bytes_x86::{Narrow, Wide},
    x86::{Avx2, Avx512},
};

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Lanes of a [`Simd`] vector.
pub const LANES: usize = 16;

/// An instruction set that this machine has.
///
/// There is no way to make a level that the machine lacks, so taking one is taking the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni(Narrow<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Wide),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "aarch64")]
    NeonDot(NeonBytes<true>),
}

impl Level {
    /// What every machine has: the instructions that the crate was compiled for (SSE2, NEON).
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// The best level of this machine; looked up once.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().unwrap_or(Self::PORTABLE))
    }

    /// The levels of this machine, worst first: what tests go through.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let vector = [
            Avx2::detect().map(Kind::Avx2),
            Narrow::detect().map(Kind::Avx2Vnni),
            Avx512::detect().map(Kind::Avx512),
            Wide::detect().map(Kind::Avx512Vnni),
        ];
        #[cfg(target_arch = "aarch64")]
        let vector = [Neon::detect().map(Kind::Neon), NeonBytes::detect().map(Kind::NeonDot)];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let vector: [Option<Kind>; 0] = [];
        std::iter::once(Kind::Portable).chain(vector.into_iter().flatten()).map(Self)
    }

    /// The level of this machine that is called `name`, see [`name`](Self::name).
    ///
    /// # Errors
    /// [`NoLevel`] where there is none, or the machine has it not.
    pub fn named(name: &str) -> Result<Self, NoLevel> {
        Self::available().find(|level| level.name() == name).ok_or_else(|| NoLevel { name: name.to_owned() })
    }

    /// Name for logs and benchmarks.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2Vnni(_) => "avx2-vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni(_) => "avx512-vnni",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot(_) => "neon-dotprod",
        }
    }

    /// Runs `kernel` with the vectors of this level. Those of a level with and without dot products of bytes
    /// are the same.
    #[inline]
    pub fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Kind::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(simd) => simd.vectorise(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2Vnni(bytes) => bytes.simd().vectorise(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(simd) => simd.vectorise(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni(bytes) => bytes.simd().vectorise(kernel),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(simd) => simd.vectorise(kernel),
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot(bytes) => bytes.simd().vectorise(kernel),
        }
    }
}

/// A level that this machine lacks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this machine has no instruction set {name:?}; it has {}", names())]
pub struct NoLevel {
    /// As asked for.
    name: String,
}

fn names() -> String {
    Level::available().map(Level::name).collect::<Vec<_>>().join(", ")
}

/// A computation that [`Level::dispatch`] compiles for every level.
pub trait Kernel {
    /// What it computes.
    type Output;

    /// The computation; mark every implementation `#[inline(always)]`, or it is compiled without the level's
    /// instructions.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Vectors of sixteen `f32` and what the kernels do with them.
///
/// Every method is to be inlined into a function that has the target features; all do so by themselves when they
/// are reached through [`Level::dispatch`].
pub trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen lanes: one AVX-512 register, two of AVX2, four of SSE or NEON.
    type F32: Copy;

    /// Rows of a micro-kernel tile whose accumulators fill the registers, see [`gemm`](super::gemm).
    const TILE_ROWS: usize;
    /// Vectors side by side in such a tile.
    const TILE_VECTORS: usize;
    /// Whether loops serve several rows or heads with what they load or unpack once. Every number of them is one loop more
    /// to compile; where nobody waits for the result, one is enough.
    const SHARES: bool = true;

    /// Asks for a cache line that will be read soon. It changes nothing but the time that takes.
    #[inline(always)]
    fn prefetch(self, line: &[u8; LINE]) {
        let _ = line;
    }

    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::F32;

    /// Sixteen floats from memory.
    fn load(self, values: &[f32; LANES]) -> Self::F32;

    /// Sixteen floats to memory.
    fn store(self, vector: Self::F32, out: &mut [f32; LANES]);

    /// a + b.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// a · b.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// a / b.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// The larger of a and b, lane by lane; b where one is no number.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// The smaller of a and b, lane by lane; b where one is no number.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// The larger of |a| and |b|, lane by lane; of no meaning where one is no number.
    #[inline(always)]
    fn max_abs(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        let minus = self.splat(-1.0);
        self.max(self.max(a, self.mul(a, minus)), self.max(b, self.mul(b, minus)))
    }

    /// 2^n for lanes n + 1.5 · 2^23, -127 ≤ n ≤ 127; 0 for n = -127.
    fn power_of_two(self, shifted: Self::F32) -> Self::F32;

    /// a · b + c, fused where the level has an instruction for it.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;

    /// code · scale + min: the dequantised value of an integer code. [`Portable`] rounds twice, as ggml's C does.
    fn affine(self, code: Self::F32, affine: Affine) -> Self::F32;

    /// The largest lane; of no meaning where one is no number.
    #[inline(always)]
    fn largest(self, vector: Self::F32) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(vector, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// The sum of the lanes.
    fn sum(self, vector: Self::F32) -> f32;

    /// The floats of a slice shorter than a vector, then `fill`.
    #[inline(always)]
    fn load_part(self, values: &[f32], fill: f32) -> Self::F32 {
        let mut part = [fill; LANES];
        part[..values.len()].copy_from_slice(values);
        self.load(&part)
    }

    /// The first lanes to a slice shorter than a vector.
    #[inline(always)]
    fn store_part(self, vector: Self::F32, out: &mut [f32]) {
        let mut part = [0.0; LANES];
        self.store(vector, &mut part);
        out.copy_from_slice(&part[..out.len()]);
    }

    /// Sixteen signed bytes as floats.
    fn load_i8(self, bytes: &[u8; LANES]) -> Self::F32;

    /// [`load_i8`](Self::load_i8) for bytes in registers, four a word, the lowest first.
    fn i8_words(self, words: [u32; 4]) -> Self::F32;

    /// Bits `SHIFT`.. of sixteen words, little-endian, as far as `MASK` has them, as floats. `MASK` is below 2^24.
    fn word_codes<const SHIFT: u32, const MASK: u32>(self, words: &[u8; 4 * LANES]) -> Self::F32;

    /// Sixteen floats, little-endian.
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> Self::F32;

    /// Sixteen binary16, little-endian.
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Self::F32;

    /// Sixteen bfloat16, little-endian.
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Self::F32;

    /// One binary16, little-endian, in every lane.
    fn splat_f16(self, bytes: &[u8; 2]) -> Self::F32;

    /// Eight binary16, two a word, the lower half first.
    fn f16x8(self, halves: [u32; 4]) -> [f32; 8];

    /// The [`affine`](Self::affine) values of the sixteen low and the sixteen high halves of `bytes`, each with its
    /// own scale and minimum; the code of a half is its value less `ZERO`.
    fn nibbles<const ZERO: u8>(self, bytes: &[u8; LANES], low: Affine, high: Affine) -> [Self::F32; 2];

    /// The transpose of a 16 × 16 matrix of rows.
    fn transpose(self, rows: [Self::F32; LANES]) -> [Self::F32; LANES];
}

/// Scale and minimum of a group of weights: weight = code · scale + min.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// Multiplies the code.
    pub scale: f32,
    /// Added to the product; [`Affine::NO_MIN`] leaves every value as it is, the sign of a zero included.
    pub min: f32,
}

impl Affine {
    /// The neutral element of addition: -0.0, because 0.0 would turn a negative zero positive.
    pub const NO_MIN: f32 = -0.0;

    /// A scale alone.
    #[inline(always)]
    #[must_use]
    pub const fn scale(scale: f32) -> Self {
        Self { scale, min: Self::NO_MIN }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Everything a level computes, over the same inputs.
    struct Everything<'a>(&'a [u8; 32], [[f32; LANES]; 3], [Affine; 2]);

    impl Kernel for Everything<'_> {
        type Output = Vec<[f32; LANES]>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let Self(bytes, floats, [low, high]) = self;
            let half: &[u8; 16] = bytes.first_chunk().unwrap();
            let [a, b, c] = floats.map(|f| s.load(&f));
            let rows = std::array::from_fn(|r| s.add(a, s.splat(r as f32)));
            let [n0, n1] = s.nibbles::<0>(half, low, high);
            let [n2, n3] = s.nibbles::<8>(half, low, high);
            let exact = [s.load_i8(half), s.load_f16(bytes), s.load_bf16(bytes), s.mul(a, b), s.add(a, b)];
            let close = [s.fma(a, b, c), s.affine(a, low), n0, n1, n2, n3, s.splat(s.sum(a))];
            let words = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect::<Vec<_>>();
            let words = [words[0], words[1], words[2], words[3]];
            let eight = s.f16x8(words);
            let wide: &[u8; 64] = &[*bytes; 2].concat().try_into().unwrap();
            let more = [s.i8_words(words), s.load_f32(wide), s.splat_f16(&[bytes[0], bytes[1]]), s.splat(s.largest(a))];
            let more = more.into_iter().chain([s.word_codes::<16, 255>(wide), s.word_codes::<4, 15>(wide)]);
            let eight = s.load(&[eight; 2].concat().try_into().unwrap());
            let powers = s.load(&std::array::from_fn(|i| 12_582_912.0 + [-127.0, -126.0, 0.0, 1.0, 127.0][i % 5]));
            let part = s.load_part(&floats[0][..5], 1.0);
            let limits = [s.max(a, b), s.min(a, b), s.div(a, b), s.power_of_two(powers), part, s.max_abs(a, b)];
            let vectors =
                exact.into_iter().chain(limits).chain(more).chain([eight]).chain(s.transpose(rows)).chain(close);
            vectors
                .map(|v| {
                    let mut out = [0.0; LANES];
                    s.store(v, &mut out);
                    out
                })
                .collect()
        }
    }

    /// Vectors at the start of the output of [`Everything`] that round nowhere, or once.
    const EXACT: usize = 18 + LANES;

    proptest! {
        #[test]
        fn every_level_computes_what_portable_does(
            bytes in prop::array::uniform32(any::<u8>()),
            floats in prop::array::uniform3(prop::array::uniform16(-100.0f32..100.0)),
            numbers in prop::array::uniform4(-10.0f32..10.0),
        ) {
            let [s0, m0, s1, m1] = numbers;
            let affine = [Affine { scale: s0, min: m0 }, Affine { scale: s1, min: m1 }];
            let expected = Level::PORTABLE.dispatch(Everything(&bytes, floats, affine));
            for level in Level::available() {
                let actual = level.dispatch(Everything(&bytes, floats, affine));
                prop_assert_eq!(actual.len(), expected.len());
                for (i, (a, e)) in actual.iter().flatten().zip(expected.iter().flatten()).enumerate() {
                    let same = a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan());
                    let close = i >= EXACT * LANES && (a - e).abs() <= 2e-3;
                    prop_assert!(same || close, "{} vector {} lane {}: {a} for {e}", level.name(), i / LANES, i % LANES);
                }
            }
        }
    }

    #[test]
    fn portable_transposes_and_sums() {
        let out = Level::PORTABLE.dispatch(Everything(&[0x21; 32], [std::array::from_fn(|i| i as f32); 3], {
            [Affine { scale: 2.0, min: 1.0 }, Affine::scale(0.5)]
        }));
        assert_eq!(out[8][..5], [0.0, f32::MIN_POSITIVE, 1.0, 2.0, 2.0f32.powi(127)]);
        assert_eq!(out[9][..6], [0.0, 1.0, 2.0, 3.0, 4.0, 1.0]);
        // Row r of the matrix is lane + r, so its transpose is the same.
        assert_eq!(out[18 + 3], std::array::from_fn(|i| i as f32 + 3.0));
        // Nibbles 1 and 2: 1·2+1 and 2·0.5; less eight: -7·2+1 and -6·0.5.
        assert_eq!(
            [out[EXACT + 2][0], out[EXACT + 3][5], out[EXACT + 4][0], out[EXACT + 5][5]],
            [3.0, 1.0, -13.0, -3.0]
        );
        assert_eq!(out[EXACT + 6], [120.0; LANES]);
    }

    /// Says which levels all tests went through, which `.ci/run` shows.
    #[test]
    fn levels_go_by_their_names() {
        println!("levels of this machine: {}", names());
        for level in Level::available() {
            assert_eq!(Level::named(level.name()), Ok(level));
        }
        let error = Level::named("mmx").unwrap_err().to_string();
        assert!(error.starts_with("this machine has no instruction set \"mmx\"; it has portable"), "{error}");
    }

    #[cfg(target_arch = "aarch64")]
    #[test]
    fn arm_has_neon_and_takes_its_dot_products() {
        let dot = std::arch::is_aarch64_feature_detected!("dotprod");
        assert_eq!(Level::best().name(), if dot { "neon-dotprod" } else { "neon" });
        assert_eq!(Level::named("neon").map(Level::has_byte_products), Ok(false));
    }

    #[test]
    fn portable_is_always_there_and_best_is_the_last() {
        assert_eq!(Level::available().next(), Some(Level::PORTABLE));
        assert_eq!(Level::available().last(), Some(Level::best()));
    }
}
