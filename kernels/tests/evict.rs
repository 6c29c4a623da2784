//! Caches that evict tokens, through prompts, steps and further turns: which tokens stay, by what ranks, and what attention
//! makes of them, against softmaxes in f64 over lists of tokens.

use proptest::prelude::*;
use std::collections::HashMap;
use thinkey_core::{
    BLOCK, CachePlan, Lambda, StorageKind,
    policy::Fix,
    token::{
        Eviction,
        h2o::H2o,
        snapkv::{Pool as Pooling, SnapKv},
    },
};
use thinkey_kernels::cpu::{
    admit::admit,
    attention::{self, AttentionScratch, Fused},
    cache::ThinCache,
    evict,
    pool::Pool,
    prompt::Prompt,
    simd::Level,
};
use thinkey_kernels::ops::{Cache, Heads};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const GROUP: usize = HEADS / KV_HEADS;

#[derive(Clone, Debug)]
struct Case {
    head_dim: usize,
    kept: usize,
    sinks: usize,
    recent: usize,
    eviction: Eviction,
    corrected: bool,
    steps: Vec<usize>,
    /// Blocks of a prompt that attend at once.
    run: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let steps = prop::collection::vec(prop_oneof![4 => Just(1usize), 1 => 2usize..130], 1..40);
    let snapkv = (1usize..20, 0usize..4, any::<bool>()).prop_map(|(window, reach, max)| {
        let pool = if max { Pooling::Max } else { Pooling::Avg };
        Eviction::SnapKv(SnapKv { capacity: 0, window, kernel: 2 * reach + 1, pool })
    });
    let h2o = (0usize..20).prop_map(|recent| Eviction::H2o(H2o { capacity: 0, recent }));
    let sizes = (prop_oneof![Just(16usize), Just(24)], 0usize..6, 0usize..20, 0usize..120);
    (sizes, prop_oneof![snapkv, h2o], any::<bool>(), steps, 1usize..5, any::<u64>()).prop_flat_map(
        |((head_dim, sinks, more, room), mut eviction, corrected, steps, run, seed)| {
            let recent = eviction.recent() + more;
            let least = sinks + recent + 2 * BLOCK + room;
            match &mut eviction {
                Eviction::SnapKv(snapkv) => snapkv.capacity = least,
                Eviction::H2o(h2o) => h2o.capacity = least,
            }
            (head_dim / 2..=head_dim).prop_map(move |kept| Case {
                head_dim,
                kept,
                sinks,
                recent,
                eviction,
                corrected,
                steps: steps.clone(),
                run,
                seed,
            })
        },
    )
}

fn numbers(seed: &mut u64, len: usize) -> Vec<f32> {
    let next = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// What a KV head holds: tokens and their ranks.
#[derive(Clone, Default)]
struct Held {
    sinks: Vec<usize>,
    /// In the order of the lanes.
    thin: Vec<(usize, f64)>,
    ring: Vec<(usize, f64)>,
}

/// All keys and values of a KV head.
#[derive(Default)]
struct Story {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    /// Tokens by their names.
    tokens: HashMap<[u32; 2], usize>,
}

impl Story {
    /// The weights of `query` over tokens, of which those that are thin are seen by `logit`.
    fn softmax(
        &self,
        query: &[f32],
        tokens: &[usize],
        thin: std::ops::Range<usize>,
        logit: &dyn Fn(&[f32]) -> f64,
    ) -> Vec<f64> {
        let scale = (query.len() as f64).sqrt();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let logits: Vec<f64> = tokens
            .iter()
            .enumerate()
            .map(|(at, &token)| {
                let key = &self.keys[token];
                if thin.contains(&at) { logit(key) / scale } else { dot(query, key) / scale }
            })
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        logits.iter().map(|x| (x - max).exp() / sum).collect()
    }
}

/// How thin keys of a KV head are seen by a query: through its mask and its correction.
fn thin_logit(cache: &ThinCache, head: usize, query: &[f32], admitted: bool) -> impl Fn(&[f32]) -> f64 + use<> {
    let view = cache.head(0, head, 0, admitted).unwrap();
    let mut folded = vec![0.0f64; query.len()];
    let mut added = 0.0;
    if let Some(mask) = view.mask() {
        let mut thin = vec![0.0; mask.kept()];
        mask.gather(query, &mut thin);
        if let Some(bytes) = view.correction() {
            let numbers: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let correction = thinkey_core::channel::compensate::Correction::resume(mask, &numbers).unwrap();
            added = f64::from(correction.correct(query, &mut thin).unwrap());
        }
        mask.channels().zip(thin).for_each(|(channel, x)| folded[channel] = f64::from(x));
    }
    move |key| folded.iter().zip(key).map(|(a, &b)| a * f64::from(b)).sum::<f64>() + added
}

fn pool(snapkv: &SnapKv, votes: &[f64]) -> Vec<f64> {
    let reach = snapkv.kernel as isize / 2;
    (0..votes.len() as isize)
        .map(|at| {
            let near = (at - reach..=at + reach).filter_map(|i| votes.get(usize::try_from(i).ok()?)).copied();
            match snapkv.pool {
                Pooling::Avg => near.sum::<f64>() / snapkv.kernel as f64,
                Pooling::Max => near.fold(f64::NEG_INFINITY, f64::max),
            }
        })
        .collect()
}

/// What a token is known by: the first two numbers of its value. One is the same in two tokens now and then.
fn name(value: &[f32]) -> [u32; 2] {
    [value[0].to_bits(), value[1].to_bits()]
}

fn run(case: &Case, threads: usize, level: Level) -> Result<(), TestCaseError> {
    let d = case.head_dim;
    let plan = CachePlan {
        layers: 1,
        kv_heads: KV_HEADS,
        head_dim: d,
        sinks: case.sinks,
        recent: case.recent,
        copies: 1,
        flexible: false,
        renews: false,
        fix: if case.corrected { Fix::Compensated } else { Fix::None },
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: case.steps.iter().sum(),
        window: None,
        keys: StorageKind::F32,
        values: StorageKind::F32,
        eviction: Some(case.eviction),
    };
    let mut cache = ThinCache::new(plan, 8, |_, _| case.kept).unwrap();
    prop_assert_eq!(cache.allocated(), cache.planned().total());
    let (threads, mut scratch) = (Pool::new(threads).unwrap(), AttentionScratch::default());
    let heads = Heads { heads: HEADS, kv_heads: KV_HEADS, head_dim: d };
    let (stride, keys, values) = (heads.width(), heads.keys(), heads.values());
    let mut stories: Vec<Story> = (0..KV_HEADS).map(|_| Story::default()).collect();
    let mut held = vec![Held::default(); KV_HEADS];
    let mut seed = case.seed;
    for &new in &case.steps {
        let data = numbers(&mut seed, new * stride);
        let before = cache.position(0);
        for (kv, story) in stories.iter_mut().enumerate() {
            for (token, row) in (before..).zip(data.chunks(stride)) {
                story.keys.push(row[keys + kv * d..][..d].to_vec());
                story.values.push(row[values + kv * d..][..d].to_vec());
                story.tokens.insert(name(&row[values + kv * d..]), token);
            }
        }
        let query = |row: usize, kv: usize, member: usize| &data[row * stride + (kv * GROUP + member) * d..][..d];
        cache.begin(0, new, new > 1).unwrap();
        let admission = cache.step(0).unwrap();
        let mut out = vec![f32::NAN; new * HEADS * d];
        // What every row of a prompt pays to what was there and to the prompt, summed over the rows that count.
        let mut paid: Vec<HashMap<usize, f64>> = vec![HashMap::new(); KV_HEADS];
        if new > 1 {
            let voters = match case.eviction {
                Eviction::SnapKv(snapkv) => snapkv.window.min(new),
                Eviction::H2o(_) => new,
            };
            for kv in 0..KV_HEADS {
                for row in new - voters..new {
                    let tokens: Vec<usize> = held[kv]
                        .sinks
                        .iter()
                        .copied()
                        .chain(held[kv].thin.iter().map(|t| t.0))
                        .chain(held[kv].ring.iter().map(|t| t.0))
                        .chain(before..=before + row)
                        .collect();
                    let first = held[kv].sinks.len();
                    let thin = first..first + held[kv].thin.len();
                    for member in 0..GROUP {
                        let query = query(row, kv, member);
                        let logit = thin_logit(&cache, kv, query, false);
                        let weights = stories[kv].softmax(query, &tokens, thin.clone(), &logit);
                        tokens.iter().zip(weights).for_each(|(&token, w)| *paid[kv].entry(token).or_default() += w);
                    }
                }
                if matches!(case.eviction, Eviction::SnapKv(_)) {
                    paid[kv].values_mut().for_each(|sum| *sum /= (voters * GROUP) as f64);
                }
            }
            let mut prompt = Prompt::new(&cache, 0, new, cache.queries(), heads);
            let run = case.run * BLOCK;
            for (data, out) in data.chunks(run * stride).zip(out.chunks_mut(run * HEADS * d)) {
                let fused = Fused::new(data, heads);
                prompt.hold(&threads, &cache, 0, fused).unwrap();
                attention::prefill((&threads, level), &cache, 0, &prompt, fused, out, &mut scratch).unwrap();
                if cache.gathers() {
                    prompt.gather((&threads, level), &cache, 0, fused, &mut scratch).unwrap();
                }
            }
            prompt.admit((&threads, level), &mut cache, 0, &mut scratch).unwrap();
        } else {
            let fused = Fused::new(&data, heads);
            admit(&mut cache, 0, 0, fused).unwrap();
        }
        for kv in 0..KV_HEADS {
            let (story, held) = (&stories[kv], &mut held[kv]);
            let of = |token: usize| paid[kv].get(&token).copied().unwrap_or(0.0);
            // Ranks of all that compete.
            let mut thin = held.thin.clone();
            let sunk = admission.sunk;
            held.sinks.extend(before..before + sunk);
            let mut whole = held.ring.clone();
            whole.extend((before + sunk..before + new).map(|token| (token, 0.0)));
            match case.eviction {
                Eviction::H2o(_) => thin.iter_mut().chain(&mut whole).for_each(|(token, rank)| *rank += of(*token)),
                Eviction::SnapKv(snapkv) if new > 1 && admission.thinned > 0 => {
                    let votes: Vec<f64> = thin.iter().map(|t| of(t.0)).collect();
                    thin.iter_mut().zip(pool(&snapkv, &votes)).for_each(|(t, vote)| t.1 = vote);
                    let votes: Vec<f64> = whole[..admission.thinned].iter().map(|t| of(t.0)).collect();
                    whole.iter_mut().zip(pool(&snapkv, &votes)).for_each(|(t, vote)| t.1 = vote);
                }
                Eviction::SnapKv(_) if new > 1 => {}
                Eviction::SnapKv(_) => whole.iter_mut().for_each(|t| t.1 = (1 + t.0) as f64),
            }
            let mut candidates: HashMap<usize, f64> = thin.iter().copied().collect();
            candidates.extend(whole.drain(..admission.thinned));
            let view = cache.head(0, kv, 0, true).unwrap();
            let span = view.span();
            prop_assert!(span.tokens() <= case.eviction.capacity());
            prop_assert_eq!(span.prefix() + admission.evicted, candidates.len());
            let (mut key, mut value, mut part) = (vec![0.0; d], vec![0.0; d], vec![0.0; case.kept]);
            let mut stay = Vec::new();
            let (lane_ranks, ring_ranks) = view.ranks().unwrap();
            for at in 0..span.prefix() {
                view.read_prefix(at, &mut part, &mut value).unwrap();
                let token = story.tokens[&name(&value)];
                prop_assert_eq!(&value, &story.values[token]);
                for (channel, &x) in view.mask().unwrap().channels().zip(&part) {
                    prop_assert_eq!(x, story.keys[token][channel]);
                }
                let rank = candidates.remove(&token);
                prop_assert!(rank.is_some(), "token {token} did not compete, or is there twice");
                let (rank, ours) = (rank.unwrap(), f64::from(lane_ranks[span.hidden as usize + at]));
                prop_assert!((rank - ours).abs() <= 1e-4 * (1.0 + rank), "rank {ours} instead of {rank}");
                stay.push((token, rank));
            }
            let worst = stay.iter().map(|t| t.1).fold(f64::INFINITY, f64::min);
            let lost = candidates.values().copied().fold(f64::NEG_INFINITY, f64::max);
            prop_assert!(worst >= lost - 1e-4 * (1.0 + lost.abs()), "{worst} stays and {lost} goes");
            for (at, &(token, rank)) in whole.iter().enumerate() {
                view.read_recent(at, &mut key, &mut value).unwrap();
                prop_assert_eq!((&key, &value), (&story.keys[token], &story.values[token]));
                if cache.gathers() {
                    prop_assert!((rank - f64::from(ring_ranks[at])).abs() <= 1e-4 * (1.0 + rank));
                }
            }
            prop_assert_eq!(whole.len(), span.recent as usize);
            (held.thin, held.ring) = (stay, whole);
        }
        if new == 1 {
            let fused = Fused::new(&data, heads);
            attention::decode((&threads, level), &cache, 0, &[0], fused, &mut out, &mut scratch).unwrap();
            if cache.gathers() {
                evict::gather((&threads, level), &mut cache, 0, &[0], fused, &mut scratch).unwrap();
            }
            for (kv, held) in held.iter_mut().enumerate() {
                let story = &stories[kv];
                let tokens: Vec<usize> = held
                    .sinks
                    .iter()
                    .copied()
                    .chain(held.thin.iter().map(|t| t.0))
                    .chain(held.ring.iter().map(|t| t.0))
                    .collect();
                let first = held.sinks.len();
                for member in 0..GROUP {
                    let query = query(0, kv, member);
                    let logit = thin_logit(&cache, kv, query, true);
                    let weights = story.softmax(query, &tokens, first..first + held.thin.len(), &logit);
                    let ours = &out[(kv * GROUP + member) * d..][..d];
                    for (c, &x) in ours.iter().enumerate() {
                        let all = tokens.iter().zip(&weights);
                        let expected: f64 = all.map(|(&token, w)| w * f64::from(story.values[token][c])).sum();
                        prop_assert!((f64::from(x) - expected).abs() < 3e-4, "{x} instead of {expected}");
                    }
                    if matches!(case.eviction, Eviction::H2o(_)) {
                        let ranked = held.thin.iter_mut().chain(&mut held.ring);
                        ranked.zip(&weights[first..]).for_each(|(t, w)| t.1 += w);
                    }
                }
            }
        }
        cache.commit(0);
        prop_assert_eq!(cache.allocated(), cache.planned().total());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn caches_hold_what_ranks_highest(case in cases(), threads in 1usize..=3) {
        // One for each case: they differ in rounding alone.
        let levels: Vec<Level> = Level::available().collect();
        run(&case, threads, levels[case.seed as usize % levels.len()])?;
    }
}
