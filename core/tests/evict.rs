//! Caches that evict tokens by their ranks, against a model that lists the tokens of every lane.

use proptest::prelude::*;
use thinkey_core::{
    BLOCK, CachePlan, HeadMut, HeadRef, Kept, KeyOrder, Lambda, Masks, Partial, Plain, Rows, Scoring, Span,
    StorageKind,
    attend::{self, Queries},
    policy::Fix,
    storage::{Element, FloatKind},
    token::{Eviction, h2o::H2o},
};

/// A head's life: shape, and how many tokens come in at a time (the first is a prompt).
#[derive(Clone, Debug)]
struct Life {
    head_dim: usize,
    kept: usize,
    sinks: usize,
    recent: usize,
    /// Beyond what has to be.
    room: usize,
    group: usize,
    keys: StorageKind,
    values: StorageKind,
    steps: Vec<usize>,
    seed: u64,
}

/// Kinds for keys, all but those that are for values alone, and for values.
fn kinds() -> (impl Strategy<Value = StorageKind>, impl Strategy<Value = StorageKind>) {
    let keys: Vec<_> = StorageKind::ALL.into_iter().filter(|kind| !kind.turns() && !kind.mixed()).collect();
    let values: Vec<_> = StorageKind::ALL.into_iter().filter(|kind| !kind.mixed()).collect();
    (prop::sample::select(keys), prop::sample::select(values))
}

fn lives() -> impl Strategy<Value = Life> {
    let steps = prop::collection::vec(prop_oneof![3 => Just(1usize), 1 => 1usize..150], 1..120);
    let sizes = (1usize..=80, prop_oneof![Just(0usize), 1usize..6], 0usize..40, 0usize..150);
    (sizes, 1usize..=3, kinds(), steps, any::<u64>()).prop_flat_map(
        |((head_dim, sinks, recent, room), group, (keys, values), steps, seed)| {
            // Turned values have a power of two.
            let head_dim = if values.turns() { head_dim.next_power_of_two() } else { head_dim };
            (1..=head_dim).prop_map(move |kept| Life {
                head_dim,
                kept,
                sinks,
                recent,
                room,
                group,
                keys,
                values,
                steps: steps.clone(),
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

/// What the ring makes of a number.
fn stored(kind: StorageKind, x: f32) -> f32 {
    match kind.ring() {
        FloatKind::F16 => <half::f16 as Element>::store(x).load(),
        FloatKind::Bf16 => <half::bf16 as Element>::store(x).load(),
        FloatKind::F32 => x,
    }
}

/// Half a step of numbers between -2 and 2, or what is outside of the narrowest range.
fn tolerance(kind: StorageKind) -> f32 {
    match kind {
        StorageKind::Int8 => 4.02 / 255.0 / 2.0 + 1e-3,
        StorageKind::Int4 => 4.02 / 15.0 / 2.0 + 1e-3,
        StorageKind::Int3 => 4.02 * 0.2 + 1e-3,
        StorageKind::Int2 => 4.02 * 0.4 + 1e-3,
        // Of a turned value, all of it meets the error of all of its numbers.
        StorageKind::Turned4 => 1.0,
        StorageKind::Turned3 => 1.8,
        StorageKind::Turned2 => 3.5,
        StorageKind::Trellis2 => 2.8,
        _ => 0.0,
    }
}

/// The tokens that a head should hold, each with its rank.
#[derive(Default)]
struct Model {
    sinks: Vec<usize>,
    /// Lane by lane; hidden ones have none.
    thin: Vec<Option<(usize, f32)>>,
    ring: Vec<(usize, f32)>,
}

impl Model {
    fn admit(&mut self, life: &Life, most: usize, new: &[(usize, f32)], prompt: bool) {
        let sunk = (life.sinks - self.sinks.len()).min(new.len());
        self.sinks.extend(new[..sunk].iter().map(|token| token.0));
        self.ring.extend(&new[sunk..]);
        if self.ring.len() <= life.recent + BLOCK {
            return;
        }
        let over = self.ring.len() - life.recent;
        let over = if prompt && self.thin.is_empty() { over } else { over / BLOCK * BLOCK };
        let leaving: Vec<_> = self.ring.drain(..over).collect();
        let (blocks, more) = (self.thin.len() / BLOCK, over.div_ceil(BLOCK));
        if blocks + more <= most {
            self.thin.extend(std::iter::repeat_n(None, more * BLOCK - over));
            self.thin.extend(leaving.into_iter().map(Some));
            return;
        }
        // A stable sort: of equal ones the stored stay, then the older.
        let rank = |token: &Option<(usize, f32)>| token.map_or(f32::NEG_INFINITY, |token| token.1);
        let mut all: Vec<(usize, f32)> =
            self.thin.iter().map(rank).chain(leaving.iter().map(|t| t.1)).enumerate().collect();
        all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
        let mut best: Vec<usize> = all[..most * BLOCK].iter().map(|entry| entry.0).collect();
        best.sort_unstable();
        let lanes = self.thin.len();
        let mut stay = best.iter().filter(|&&at| at >= lanes).map(|&at| leaving[at - lanes]);
        for lane in (0..lanes).filter(|lane| !best.contains(lane)) {
            self.thin[lane] = stay.next();
        }
        self.thin.extend(stay.map(Some));
    }
}

/// One softmax over `keys`, `[tokens][D]`: the weights, [group][tokens], of queries that see zeros for what is not stored.
fn softmax(d: usize, keys: &[f32], queries: &[f32]) -> Vec<Vec<f64>> {
    let weights = |query: &[f32]| {
        let logit = |key: &[f32]| {
            query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() / (d as f64).sqrt()
        };
        let exp: Vec<f64> = keys.chunks(d).map(|key| logit(key).exp()).collect();
        let sum: f64 = exp.iter().sum();
        exp.iter().map(|x| x / sum).collect()
    };
    queries.chunks(d).map(weights).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn equals_lists_of_tokens(life in lives()) {
        let d = life.head_dim;
        let capacity = life.sinks + life.recent + 2 * BLOCK + life.room;
        let lost = if life.values.turns() { 0 } else { (life.seed % 900) as u16 / 2 };
        let plan = CachePlan {
            layers: 1, kv_heads: 1, head_dim: d, sinks: life.sinks, recent: life.recent, copies: 1, flexible: false,
            renews: false, fix: Fix::None, value_lambda: Lambda::from_per_mille(lost).unwrap(), slots: 2,
            tokens: life.steps.iter().sum(), window: None, keys: life.keys, values: life.values,
            eviction: Some(Eviction::H2o(H2o { capacity, recent: life.recent })),
        };
        let most = plan.retention().most_blocks().unwrap();
        let layout = plan.head(life.kept).unwrap();
        // A pool that held something else before: 0xff is NaN in every kind.
        let mut memory = vec![[u64::MAX; 8]; layout.bytes() / 64];
        let (mut seed, slot) = (life.seed, 1);
        let mut table: Vec<u32> = Vec::new();
        let mut free: Vec<u32> = (0..layout.pages).rev().step_by(2).chain((0..layout.pages).rev().skip(1).step_by(2)).collect();
        let (mut keys, mut values, mut model, mut span, mut masks) =
            (Vec::new(), Vec::new(), Model::default(), Span::default(), None);
        HeadMut::new(layout, bytemuck::cast_slice_mut(&mut memory), slot).unwrap().clear_energy();
        for (index, &new) in life.steps.iter().enumerate() {
            let (start, first) = (keys.len(), keys.len() / d);
            keys.extend(numbers(&mut seed, new * d));
            values.extend(numbers(&mut seed, new * d));
            // Some are equal.
            let ranks: Vec<f32> = numbers(&mut seed, new).into_iter().map(|x| ((x + 2.0) * 8.0).floor()).collect();
            let rows = Rows { keys: &keys[start..], order: KeyOrder::Rows, values: &values[start..], stride: d };
            let admission = span.admit(new, plan.retention(), index == 0);
            while table.len() < admission.after.blocks as usize {
                table.push(free.pop().expect("the plan has room"));
            }
            let mut head = HeadMut::new(layout, bytemuck::cast_slice_mut(&mut memory), slot).unwrap();
            let query = numbers(&mut seed, life.group * d);
            if masks.is_none() {
                head.add_query_energy(&query, life.group, d).unwrap();
            }
            let (mut tokens, mut lanes) = (vec![0; admission.thinned], vec![0; admission.thinned]);
            let unranked = &ranks[admission.sunk..];
            let kept = head.keep(&admission, unranked, &mut tokens, &mut lanes).unwrap();
            if admission.evicted > 0 && admission.fresh() > 0 {
                prop_assert!(head.admit(&admission, &table, masks.as_ref(), rows).is_err(), "which tokens stay is not said");
            }
            let mut head = head.keeping(kept);
            if masks.is_none() && admission.thinned > 0 {
                let scoring = Scoring { queries: 1, ..Scoring::default() };
                let keys = head.choose(&scoring, &admission, rows).unwrap();
                masks = Some(Masks { keys, values: head.choose_values(&admission, rows).unwrap() });
            }
            head.admit(&admission, &table, masks.as_ref(), rows).unwrap();
            head.move_ranks(&admission, unranked).unwrap();
            span = admission.after;
            let new: Vec<(usize, f32)> = (first..).zip(ranks).collect();
            model.admit(&life, most, &new, index == 0);

            let thin: Vec<(usize, f32)> = model.thin.iter().copied().flatten().collect();
            prop_assert_eq!((span.prefix(), span.recent as usize), (thin.len(), model.ring.len()));
            prop_assert!(span.tokens() <= capacity);
            let (lane_ranks, ring_ranks) = head.ranks(span).unwrap();
            let hidden = span.hidden as usize;
            prop_assert_eq!(lane_ranks[hidden..].to_vec(), thin.iter().map(|t| t.1).collect::<Vec<_>>());
            prop_assert_eq!(ring_ranks.to_vec(), model.ring.iter().map(|t| t.1).collect::<Vec<_>>());

            let head = HeadRef::new(layout, bytemuck::cast_slice(&memory), slot, &table, span, masks.as_ref()).unwrap();
            let (mut all_keys, mut all_values) = (Vec::<f32>::new(), Vec::<f32>::new());
            let (mut key, mut value, mut part) = (vec![0.0; d], vec![0.0; d], vec![0.0; life.kept]);
            let tokens = model.sinks.iter().chain(thin.iter().map(|t| &t.0)).chain(model.ring.iter().map(|t| &t.0));
            for (at, &token) in tokens.enumerate() {
                let (thin_at, sinks) = (at.wrapping_sub(model.sinks.len()), model.sinks.len());
                let is_thin = thin_at < thin.len();
                if at < sinks {
                    head.read_sink(at, &mut key, &mut value).unwrap();
                } else if is_thin {
                    head.read_prefix(thin_at, &mut part, &mut value).unwrap();
                    key.fill(0.0);
                    masks.unwrap().keys.channels().zip(&part).for_each(|(channel, &x)| key[channel] = x);
                } else {
                    head.read_recent(thin_at - thin.len(), &mut key, &mut value).unwrap();
                }
                for c in 0..d {
                    let from = token * d + c;
                    let is = if is_thin && !masks.unwrap().keys.contains(c) { 0.0 } else { stored(life.keys, keys[from]) };
                    // An admission stores a group anew once at most, and rounds by half a step again; that one number is
                    // always pushed the same way is not to be expected.
                    let rounded = (2.0 + index as f32).min(8.0);
                    let most = if is_thin { rounded * tolerance(life.keys) } else { 0.0 };
                    prop_assert!((key[c] - is).abs() <= most, "key {token} is off by {}", key[c] - is);
                    let most = if is_thin { tolerance(life.values) } else { 0.0 };
                    let gone = is_thin && !masks.unwrap().values.contains(c);
                    let is = if gone { 0.0 } else { stored(life.values, values[from]) };
                    let off = (value[c] - is).abs();
                    prop_assert!(off <= most, "value {token} is off by {off}");
                }
                all_keys.extend(&key);
                all_values.extend(&value);
            }
            // Attention sees them all, and each with its weight.
            let weights = softmax(d, &all_keys, &query);
            let mut scratch = vec![f32::NAN; Queries::scratch_len(life.group, d)];
            let mut memory = vec![f32::NAN; Partial::len(life.group, d)];
            let mut queries = Queries::new(&Plain, &head, &query, &mut scratch).unwrap();
            let mut total = Partial::new(&mut memory, life.group, d).unwrap();
            let blocks = 0..span.blocks as usize;
            attend::attend_prefix(&Plain, &head, &mut queries, blocks.clone(), usize::MAX, &mut total).unwrap();
            attend::attend_whole(&Plain, &head, &mut queries, usize::MAX, &mut total).unwrap();
            let mut out = vec![0.0; life.group * d];
            total.finish(&mut out).unwrap();
            for (weights, out) in weights.iter().zip(out.chunks(d)) {
                for (c, &x) in out.iter().enumerate() {
                    let expected: f64 =
                        weights.iter().zip(all_values.chunks(d)).map(|(w, value)| w * f64::from(value[c])).sum();
                    prop_assert!((f64::from(x) - expected).abs() < 2e-4, "{x} instead of {expected}");
                }
            }
            let (mut lanes, mut ring) = (vec![f32::NAN; blocks.len() * BLOCK], vec![f32::NAN; span.recent as usize]);
            // In two parts.
            let (half, rest) = lanes.split_at_mut(blocks.len() / 2 * BLOCK);
            let middle = blocks.len() / 2;
            attend::prefix_weights(&Plain, &head, &mut queries, 0..middle, &total, half).unwrap();
            attend::prefix_weights(&Plain, &head, &mut queries, middle..blocks.end, &total, rest).unwrap();
            attend::ring_weights(&Plain, &head, &mut queries, &total, &mut ring).unwrap();
            prop_assert!(lanes[..hidden].iter().all(|&weight| weight == 0.0));
            let ours = lanes[hidden..].iter().chain(&ring);
            for (at, &ours) in ours.enumerate() {
                let expected: f64 = weights.iter().map(|weights| weights[model.sinks.len() + at]).sum();
                prop_assert!((f64::from(ours) - expected).abs() < 1e-4, "{ours} instead of {expected}");
            }
        }
    }
}

#[test]
fn bad_lists_are_refused() {
    let eviction = Some(Eviction::H2o(H2o { capacity: 64, recent: 0 }));
    let (keys, values) = (StorageKind::F32, StorageKind::F32);
    let plan = CachePlan {
        layers: 1,
        kv_heads: 1,
        head_dim: 8,
        sinks: 0,
        recent: 0,
        copies: 1,
        flexible: false,
        renews: false,
        fix: Fix::None,
        value_lambda: Lambda::WHOLE,
        slots: 1,
        tokens: 500,
        window: None,
        keys,
        values,
        eviction,
    };
    let admission = Span::default().admit(70, plan.retention(), true);
    assert_eq!((admission.evicted, admission.fresh()), (38, 32));
    let tokens: Vec<u32> = (10..42).collect();
    let kept = |tokens, lanes| Kept { tokens, lanes }.check(&admission);
    assert_eq!(kept(&tokens, &[]), Ok(()));
    assert!(kept(&tokens[1..], &[]).is_err() && kept(&tokens, &[0]).is_err());
    let mut falling = tokens.clone();
    falling.swap(3, 4);
    assert!(kept(&falling, &[]).is_err());
    let far: Vec<u32> = (39..71).collect();
    assert!(kept(&far, &[]).is_err());
    let whole = Span::default().admit(20, plan.retention(), true);
    assert!(Kept { tokens: &tokens, lanes: &[] }.check(&whole).is_err() && Kept::ALL.check(&whole).is_ok());
    let layout = CachePlan { eviction: None, ..plan }.head(8).unwrap();
    let mut memory = vec![[0u64; 8]; layout.bytes() / 64];
    let head = HeadMut::new(layout, bytemuck::cast_slice_mut(&mut memory), 0).unwrap();
    assert!(head.keep(&admission, &[0.0; 70], &mut [0; 70], &mut [0; 70]).is_err(), "there are no ranks");
}
