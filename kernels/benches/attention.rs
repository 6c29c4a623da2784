//! Decode attention over a thin cache, by depth and storage, in the shape of SmolLM2-135M: all layers of a step, so that
//! the cache is read from memory as in decoding.

#![allow(missing_docs, reason = "a benchmark")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use thinkey_core::{CachePlan, Lambda, StorageKind, policy::Fix};
use thinkey_kernels::{
    cpu::{
        attention::{self, AttentionScratch, Fused},
        cache::ThinCache,
        pool::Pool,
        prompt::Prompt,
        simd::Level,
    },
    ops::{Cache, Heads},
};

const LAYERS: usize = 30;
const HEADS: Heads = Heads { heads: 9, kv_heads: 3, head_dim: 64 };
const KEPT: usize = 32;

fn numbers(len: usize) -> Vec<f32> {
    let mut seed = 1u64;
    let next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn filled(kind: StorageKind, tokens: usize) -> ThinCache {
    let plan = CachePlan {
        layers: LAYERS,
        kv_heads: HEADS.kv_heads,
        head_dim: HEADS.head_dim,
        sinks: 0,
        recent: 32,
        copies: 1,
        flexible: false,
        renews: false,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: tokens + 1,
        window: None,
        keys: kind,
        values: kind,
        eviction: None,
    };
    let mut cache = ThinCache::new(plan, 32, |_, _| KEPT).expect("a plan");
    let (pool, data) = (Pool::new(2).expect("threads"), numbers(tokens * HEADS.width()));
    cache.begin(0, tokens, true).expect("room");
    let mut prompt = Prompt::new(&cache, 0, tokens, 32, HEADS);
    for layer in 0..LAYERS {
        prompt.hold(&pool, &cache, layer, Fused::new(&data, HEADS)).expect("room");
        prompt.admit((&pool, Level::best()), &mut cache, layer, &mut AttentionScratch::default()).expect("room");
    }
    cache.commit(0);
    cache
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode attention, 30 layers");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for threads in [1, 2] {
        let pool = Pool::new(threads).expect("threads");
        for depth in [4096, 8000] {
            for kind in StorageKind::ALL.into_iter().filter(|kind| !kind.turns() && !kind.mixed()) {
                let cache = filled(kind, depth);
                let row = numbers(HEADS.width());
                let mut out = vec![0.0; HEADS.keys()];
                let mut scratch = AttentionScratch::default();
                group.throughput(Throughput::Bytes(cache.planned().total() as u64));
                let id = BenchmarkId::new(format!("{}, {threads} threads", kind.name()), depth);
                group.bench_function(id, |b| {
                    b.iter(|| {
                        for layer in 0..LAYERS {
                            let machine = (&pool, Level::best());
                            attention::decode(
                                machine,
                                &cache,
                                layer,
                                &[0],
                                Fused::new(&row, HEADS),
                                &mut out,
                                &mut scratch,
                            )
                            .expect("shapes fit");
                        }
                    });
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
