//! A layer's cache and attention, through prompts, steps and further turns of several sequences in one pool, against
//! a dense softmax in f64.

use proptest::prelude::*;
use thinkey_core::{
    BLOCK, CachePlan, Error, Lambda, StorageKind,
    policy::{Fix, Life},
    storage::Form,
};
use thinkey_kernels::cpu::{
    admit::admit,
    attention::{self, AttentionScratch, Fused},
    cache::ThinCache,
    pool::Pool,
    prompt::Prompt,
    simd::Level,
};
use thinkey_kernels::ops::{Cache, Choosing, Heads};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const GROUP: usize = HEADS / KV_HEADS;

#[derive(Clone, Debug)]
struct Case {
    head_dim: usize,
    recent: usize,
    window: Option<usize>,
    kept: [usize; KV_HEADS],
    /// Share of value channels that the prefix lacks, in per mille.
    lost_values: u16,
    life: Life,
    keys: StorageKind,
    values: StorageKind,
    /// Tokens of each admission, and the slot it goes to.
    steps: Vec<(usize, usize)>,
    /// Blocks of a prompt that attend at once.
    run: usize,
    seed: u64,
}

/// Kinds for keys, all but those that are for values alone, and for values.
fn kinds() -> (impl Strategy<Value = StorageKind>, impl Strategy<Value = StorageKind>) {
    let keys: Vec<_> = StorageKind::ALL.into_iter().filter(|kind| !kind.turns() && !kind.mixed()).collect();
    let values: Vec<_> = StorageKind::ALL.into_iter().filter(|kind| !kind.mixed()).collect();
    (prop::sample::select(keys), prop::sample::select(values))
}

fn cases() -> impl Strategy<Value = Case> {
    let head_dim = prop_oneof![Just(16usize), Just(24), Just(64)];
    let steps = prop::collection::vec((prop_oneof![2 => Just(1usize), 1 => 1usize..200], 0usize..2), 1..16);
    let lost = prop_oneof![2 => Just(0u16), 1 => 1u16..1000];
    let life = prop_oneof![
        2 => Just(Life::Prompt),
        1 => Just(Life::Turn),
        1 => (1u32..100).prop_map(|tokens| Life::Every { tokens }),
    ];
    (head_dim, 0usize..40, prop::option::of(20usize..200), steps, kinds(), ((1usize..5, any::<u64>()), lost, life))
        .prop_flat_map(|(head_dim, recent, window, steps, (keys, values), ((run, seed), lost_values, life))| {
            // Turned values have all channels, a power of two.
            let (head_dim, lost_values) =
                if values.turns() { (head_dim.next_power_of_two(), 0) } else { (head_dim, lost_values) };
            [1..=head_dim, 1..=head_dim].prop_map(move |kept| Case {
                head_dim,
                recent,
                window,
                kept,
                lost_values,
                life,
                keys,
                values,
                steps: steps.clone(),
                run,
                seed,
            })
        })
}

/// How far an output may be off: by rounding; or, where queries and weights meet few codes as integers of 8 bits, by a part
/// in 254 of the largest a channel and token, of numbers between -2 and 2.
fn tolerance(case: &Case) -> f64 {
    let few = |kind: StorageKind| matches!(kind.form(), Form::Codes(kind) | Form::Turned(kind) if kind.largest() <= 15);
    if few(case.keys) || few(case.values) { 4e-2 } else { 2e-4 }
}

fn numbers(seed: &mut u64, len: usize) -> Vec<f32> {
    let next = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// What a sequence has seen: rows of keys and values of all KV heads.
#[derive(Default)]
struct Story {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Story {
    /// Rounds what the cache holds to what it made of it: that this is near is for the core's tests.
    fn round(&mut self, case: &Case, cache: &ThinCache, slot: usize, seen: usize) {
        let d = case.head_dim;
        for kv in 0..KV_HEADS {
            let view = cache.head(0, kv, slot, true).unwrap();
            let (mut thin, mut key, mut value) = (vec![0.0; case.kept[kv]], vec![0.0; d], vec![0.0; d]);
            let (prefix, first) = (view.span().prefix(), seen - view.span().tokens());
            for token in 0..view.span().tokens() {
                let at = ((first + token) * KV_HEADS + kv) * d;
                if token < prefix {
                    view.read_prefix(token, &mut thin, &mut value).unwrap();
                    let block = (token + view.span().hidden as usize) / BLOCK;
                    let channels = view.block_mask(block).unwrap().channels();
                    // What is not kept adds nothing.
                    self.keys[at..at + d].fill(0.0);
                    channels.zip(&thin).for_each(|(channel, &x)| self.keys[at + channel] = x);
                } else {
                    view.read_recent(token - prefix, &mut key, &mut value).unwrap();
                    self.keys[at..at + d].copy_from_slice(&key);
                }
                self.values[at..at + d].copy_from_slice(&value);
            }
        }
    }

    /// The attention output of query head `head` for the token at `position`.
    fn attend(&self, case: &Case, head: usize, query: &[f32], position: usize) -> Vec<f64> {
        let (d, kv) = (case.head_dim, head / GROUP);
        let at = |token: usize, c: usize| (token * KV_HEADS + kv) * d + c;
        let first = case.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let logits: Vec<f64> = (first..=position)
            .map(|t| {
                let dot: f64 = (0..d).map(|c| f64::from(query[c]) * f64::from(self.keys[at(t, c)])).sum();
                dot / (d as f64).sqrt()
            })
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        let weigh =
            |c| logits.iter().zip(first..).map(|(x, t)| (x - max).exp() / sum * f64::from(self.values[at(t, c)])).sum();
        (0..d).map(weigh).collect()
    }
}

fn run(case: &Case, threads: usize, level: Level) -> Result<(), TestCaseError> {
    let d = case.head_dim;
    let tokens = case.steps.iter().map(|step| step.0).sum();
    let plan = CachePlan {
        layers: 1,
        kv_heads: KV_HEADS,
        head_dim: d,
        sinks: 0,
        recent: case.recent,
        copies: 1,
        flexible: false,
        renews: case.life != Life::Prompt,
        fix: Fix::None,
        value_lambda: Lambda::from_per_mille(case.lost_values).unwrap(),
        slots: 2,
        tokens,
        window: case.window,
        keys: case.keys,
        values: case.values,
        eviction: None,
    };
    let mut cache = ThinCache::new(plan, 32, |_, head| case.kept[head]).unwrap();
    cache.choose_by(Choosing { life: case.life, ..Choosing::default() });
    prop_assert_eq!(cache.allocated(), cache.planned().total());
    let pool = Pool::new(threads).unwrap();
    let mut scratch = AttentionScratch::default();
    let mut stories = [Story::default(), Story::default()];
    let mut seed = case.seed;
    let heads = Heads { heads: HEADS, kv_heads: KV_HEADS, head_dim: d };
    let (stride, keys, values) = (heads.width(), heads.keys(), heads.values());
    for &(new, slot) in &case.steps {
        let data = numbers(&mut seed, new * stride);
        for row in data.chunks(stride) {
            stories[slot].keys.extend(&row[keys..values]);
            stories[slot].values.extend(&row[values..]);
        }
        let before = cache.position(slot);
        cache.begin(slot, new, true).unwrap();
        let mut out = vec![f32::NAN; new * HEADS * d];
        let exact = new > 1;
        if exact {
            let mut prompt = Prompt::new(&cache, slot, new, cache.window(), heads);
            let run = case.run * BLOCK;
            for (data, out) in data.chunks(run * stride).zip(out.chunks_mut(run * HEADS * d)) {
                let fused = Fused::new(data, heads);
                prompt.hold(&pool, &cache, 0, fused).unwrap();
                attention::prefill((&pool, level), &cache, 0, &prompt, fused, out, &mut scratch).unwrap();
            }
            prompt.admit((&pool, Level::best()), &mut cache, 0, &mut AttentionScratch::default()).unwrap();
        } else {
            let fused = Fused::new(&data, heads);
            admit(&mut cache, 0, slot, fused).unwrap();
            attention::decode((&pool, level), &cache, 0, &[slot], fused, &mut out, &mut scratch).unwrap();
            stories[slot].round(case, &cache, slot, before + new);
        }
        let after = before + new;
        for (row, out) in out.chunks(HEADS * d).enumerate() {
            for (head, out) in out.chunks(d).enumerate() {
                let query = &data[row * stride + head * d..][..d];
                let expected = stories[slot].attend(case, head, query, before + row);
                for (a, b) in out.iter().zip(expected) {
                    prop_assert!(
                        (f64::from(*a) - b).abs() < tolerance(case),
                        "{}, row {row} head {head}: {a} instead of {b}",
                        level.name()
                    );
                }
            }
        }
        if exact {
            stories[slot].round(case, &cache, slot, after);
        }
        cache.commit(slot);
        prop_assert_eq!(cache.position(slot), after);
        prop_assert_eq!(cache.allocated(), cache.planned().total());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.min(40)))]
    #[test]
    fn sequences_equal_a_dense_softmax(case in cases(), threads in 1usize..=3) {
        for level in Level::available() {
            run(&case, threads, level)?;
        }
    }
}

fn small() -> ThinCache {
    let plan = CachePlan {
        layers: 1,
        kv_heads: 1,
        head_dim: 16,
        sinks: 0,
        recent: 32,
        copies: 1,
        flexible: false,
        renews: false,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: 100,
        window: None,
        keys: StorageKind::F16,
        values: StorageKind::F16,
        eviction: None,
    };
    ThinCache::new(plan, 32, |_, _| 8).unwrap()
}

#[test]
fn a_sequence_that_outgrows_the_plan_is_refused_whole() {
    let mut cache = small();
    assert_eq!(
        cache.begin(0, 101, true).unwrap_err(),
        Error::Capacity { what: "context tokens", needed: 101, capacity: 100 }
    );
    let heads = Heads { heads: 1, kv_heads: 1, head_dim: 16 };
    let data = vec![0.5; 100 * heads.width()];
    cache.begin(0, 100, true).unwrap();
    let (pool, mut prompt) = (Pool::new(2).unwrap(), Prompt::new(&cache, 0, 100, 32, heads));
    prompt.hold(&pool, &cache, 0, Fused::new(&data, heads)).unwrap();
    prompt.admit((&pool, Level::best()), &mut cache, 0, &mut AttentionScratch::default()).unwrap();
    cache.commit(0);
    assert!(cache.begin(0, 1, false).is_err());
    assert_eq!(cache.position(0), 100);
    cache.clear(0);
    assert_eq!(cache.position(0), 0);
    cache.begin(0, 100, true).unwrap();
}

#[test]
fn a_cache_beyond_all_memory_is_an_error() {
    let plan = CachePlan { tokens: 1 << 40, ..*small().plan() };
    assert!(ThinCache::new(plan, 32, |_, _| 8).is_err());
}
