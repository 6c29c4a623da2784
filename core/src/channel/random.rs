//! Random channel scores: what any score has to beat, and a source of random signs for [sketches](super::sketch).
//!
//! The generator is SplitMix64 (Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), read
//! by counter: number n of a seed is the mix of seed + (n + 1)·γ, so any number can be had without those before, and the
//! same on every machine.

/// The odd constant by which SplitMix64 advances: 2⁶⁴ divided by the golden ratio.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Number `index` of the stream of `seed`, 64 random bits.
#[must_use]
pub const fn bits(seed: u64, index: u64) -> u64 {
    let z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Writes random scores in 0..1. `head` numbers the head among all of the model (layer · heads + head), so that each has
/// channels of its own.
pub fn random(seed: u64, head: usize, scores: &mut [f32]) {
    let own = bits(seed, head as u64);
    for (index, score) in (0u64..).zip(scores) {
        // 24 bits are what an f32 holds.
        *score = (bits(own, index) >> 40) as f32 / (1u32 << 24) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of Vigna's splitmix64.c for the seed 1234567, as published with other implementations.
    #[test]
    fn equals_the_published_numbers() {
        let numbers = core::array::from_fn(|n| bits(1_234_567, n as u64));
        assert_eq!(
            numbers,
            [
                6_457_827_717_110_365_317u64,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423,
                4_593_380_528_125_082_431,
                16_408_922_859_458_223_821
            ]
        );
    }

    #[test]
    fn heads_and_seeds_differ_and_repeat() {
        let of = |seed, head| {
            let mut scores = [0.0; 200];
            random(seed, head, &mut scores);
            scores
        };
        assert_eq!(of(1, 2), of(1, 2));
        assert!(of(1, 2) != of(1, 3) && of(1, 2) != of(2, 2));
        let mean = of(7, 0).iter().sum::<f32>() / 200.0;
        assert!(of(7, 0).iter().all(|x| (0.0..1.0).contains(x)) && (mean - 0.5).abs() < 0.1, "{mean}");
    }
}
