//! Attention over blocks against a dense brute force in f64, for any sequence of prompts and steps.

use proptest::prelude::*;
use thinkey_core::{
    BLOCK, CachePlan, ChannelMask, HeadMut, HeadRef, KeyOrder, Lambda, Masks, Moments, Plain, Rows, Scoring, Span,
    StorageKind, attend,
    channel::{compensate::Correction, select::select},
    policy::Fix,
    quant::mixed,
    storage::{Element, FloatKind},
};

/// A head's life: shape, and how many tokens come in at a time (the first is a prompt).
#[derive(Clone, Debug)]
struct Life {
    head_dim: usize,
    kept: usize,
    sinks: usize,
    fix: Fix,
    renews: bool,
    value_lambda: Lambda,
    recent: usize,
    group: usize,
    window: Option<usize>,
    keys: StorageKind,
    values: StorageKind,
    steps: Vec<usize>,
    seed: u64,
}

/// Kinds for keys, all but those that are for values alone, and for values.
fn kinds() -> (impl Strategy<Value = StorageKind>, impl Strategy<Value = StorageKind>) {
    let keys: Vec<_> = StorageKind::ALL.into_iter().filter(|kind| !kind.turns()).collect();
    let values: Vec<_> = StorageKind::ALL.into_iter().filter(|kind| !kind.mixed()).collect();
    (prop::sample::select(keys), prop::sample::select(values))
}

fn lives() -> impl Strategy<Value = Life> {
    let fix = prop::sample::select(&[Fix::None, Fix::Compensated, Fix::Lowrank, Fix::Predictive][..]);
    let value_lambda = prop_oneof![2 => Just(0u16), 1 => 1u16..1000];
    let fix = prop_oneof![3 => fix.prop_map(|fix| (fix, false)), 1 => Just((Fix::None, true))];
    let first = (prop_oneof![Just(0usize), 1usize..6, Just(40usize)], fix, value_lambda);
    (1usize..=80, first, 0usize..50, 1usize..=4, prop::option::of(1usize..250), kinds(), any::<u64>()).prop_flat_map(
        |(head_dim, (sinks, (fix, renews), value_lambda), recent, group, window, (keys, values), seed)| {
            // What is predicted are codes, and two kinds are of what is predicted.
            let (fix, renews) = if keys.mixed() { (Fix::Predictive, false) } else { (fix, renews) };
            let keys = match (fix, keys) {
                (Fix::Predictive, StorageKind::F32 | StorageKind::F16 | StorageKind::Bf16) => StorageKind::Int4,
                _ => keys,
            };
            // Turned values have all channels, a power of two.
            let (head_dim, value_lambda) =
                if values.turns() { (head_dim.next_power_of_two(), 0) } else { (head_dim, value_lambda) };
            let steps = prop::collection::vec(prop_oneof![3 => Just(1usize), 1 => 1usize..150], 1..40);
            (1..=head_dim, steps).prop_map(move |(kept, steps)| Life {
                head_dim,
                kept,
                sinks,
                fix,
                renews,
                value_lambda: Lambda::from_per_mille(value_lambda).unwrap(),
                recent,
                group,
                window,
                keys,
                values,
                steps,
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

/// Half a step of numbers between -2 and 2, rounding of scale and minimum included; 0 where numbers are stored as such.
fn tolerance(kind: StorageKind) -> f32 {
    match kind {
        StorageKind::Int8 => 4.02 / 255.0 / 2.0 + 1e-3,
        StorageKind::Int4 => 4.02 / 15.0 / 2.0 + 1e-3,
        // Or what the narrowest range leaves outside at each end, where that is more.
        StorageKind::Int3 => 4.02 * 0.2 + 1e-3,
        // And what a scale that does not shrink stretches.
        StorageKind::Int2 => 4.02 * 0.4 + 1e-3,
        // Of a turned value, all of it meets the error of all of its numbers.
        StorageKind::Turned4 => 1.0,
        StorageKind::Turned3 => 1.8,
        StorageKind::Turned2 => 3.5,
        StorageKind::Trellis2 => 2.8,
        _ => 0.0,
    }
}

/// Every token of a head as it is stored: whole keys (a thin one has zeros where nothing is kept, and of a projected one
/// the coordinates lie where channels would) and values.
fn contents(life: &Life, head: &HeadRef<'_>) -> (Vec<f32>, Vec<f32>) {
    let d = life.head_dim;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let (mut thin, mut key, mut value) = (vec![0.0; life.kept], vec![0.0; d], vec![0.0; d]);
    for token in 0..head.span().sinks as usize {
        head.read_sink(token, &mut key, &mut value).unwrap();
        keys.extend(&key);
        values.extend(&value);
    }
    for token in 0..head.span().prefix() {
        head.read_prefix(token, &mut thin, &mut value).unwrap();
        key.fill(0.0);
        let block = (token + head.span().hidden as usize) / BLOCK;
        head.block_mask(block).unwrap().channels().zip(&thin).for_each(|(channel, &x)| key[channel] = x);
        keys.extend(&key);
        values.extend(&value);
    }
    for token in 0..head.span().recent as usize {
        head.read_recent(token, &mut key, &mut value).unwrap();
        keys.extend(&key);
        values.extend(&value);
    }
    (keys, values)
}

/// The numbers of a head's correction or projection.
fn correction(head: &HeadRef<'_>) -> Option<Vec<f32>> {
    head.correction().map(|bytes| match head.layout().correction_kind() {
        FloatKind::F32 => bytemuck::cast_slice(bytes).to_vec(),
        _ => bytemuck::cast_slice::<_, half::f16>(bytes).iter().map(|x| x.to_f32()).collect(),
    })
}

/// The coordinates of `x` by the columns of a projection, [D][T+1], and its product with the mean, their last lane.
fn project(columns: &[f32], x: &[f32], coordinates: &mut [f32]) -> f32 {
    coordinates.fill(0.0);
    let mut product = 0.0;
    for (column, x) in columns.chunks(coordinates.len() + 1).zip(x) {
        coordinates.iter_mut().zip(column).for_each(|(sum, share)| *sum += share * x);
        product += column[coordinates.len()] * x;
    }
    product
}

/// Number `index` of those that are stored of a key, which [`contents`] has put where the channels of `mask` are.
fn stored_number(mask: &ChannelMask, key: &[f32], index: usize) -> f32 {
    mask.channels().nth(index).map_or(f32::NAN, |channel| key[channel])
}

/// By how much a coordinate may be off of a key that a ring of this kind has rounded.
fn rounding(kind: StorageKind) -> f32 {
    match kind.ring() {
        FloatKind::F32 => 1e-4,
        FloatKind::F16 => 0.02,
        FloatKind::Bf16 => 0.2,
    }
}

/// `query` as thin keys meet it, with zeros where nothing is kept, and what is added to their logits: by the definition of
/// the correction that the head has stored.
fn corrected(head: &HeadRef<'_>, query: &[f32]) -> (Vec<f32>, f32) {
    let Some(mask) = head.mask() else { return (query.to_vec(), 0.0) };
    if head.layout().renews {
        // Keys have zeros where their block keeps nothing.
        return (query.to_vec(), 0.0);
    }
    let (mut thin, mut added) = (vec![0.0; mask.kept()], 0.0);
    mask.gather(query, &mut thin);
    if let Some(numbers) = correction(head) {
        added = if head.layout().projects() {
            project(&numbers, query, &mut thin)
        } else {
            Correction::resume(mask, &numbers).unwrap().correct(query, &mut thin).unwrap()
        };
    }
    let mut whole = vec![0.0; query.len()];
    mask.channels().zip(thin).for_each(|(channel, x)| whole[channel] = x);
    (whole, added)
}

/// One softmax over all visible tokens of `keys` and `values`: the sinks, and of the others those in the window.
fn dense(
    life: &Life,
    span: Span,
    keys: &[f32],
    values: &[f32],
    query: &[f32],
    (thin, added): (&[f32], f32),
) -> Vec<f64> {
    let (d, sinks) = (life.head_dim, span.sinks as usize);
    let first = sinks + life.window.map_or(0, |window| span.run().saturating_sub(window));
    let logit = |token: usize| -> f64 {
        let is_thin = (sinks..sinks + span.prefix()).contains(&token);
        let (query, added) = if is_thin { (thin, added) } else { (query, 0.0) };
        let dot: f64 = (0..d).map(|c| f64::from(query[c]) * f64::from(keys[token * d + c])).sum();
        (dot + f64::from(added)) / (d as f64).sqrt()
    };
    let seen = || (0..sinks).chain(first..span.tokens());
    let logits: Vec<f64> = seen().map(logit).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let weigh = |c: usize| -> f64 {
        logits.iter().zip(seen()).map(|(x, t)| (x - max).exp() / sum * f64::from(values[t * d + c])).sum()
    };
    (0..d).map(weigh).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn blocks_equal_a_dense_softmax(life in lives()) {
        let (d, total) = (life.head_dim, life.steps.iter().sum());
        let plan = CachePlan {
            layers: 1, kv_heads: 1, head_dim: d, sinks: life.sinks, recent: life.recent, fix: life.fix, copies: 1, flexible: false, renews: life.renews,
            value_lambda: life.value_lambda, slots: 2, tokens: total, window: life.window, keys: life.keys, values: life.values, eviction: None,
        };
        let layout = plan.head(life.kept).unwrap();
        // A pool that held something else before: 0xff is NaN in every kind.
        let mut memory = vec![[u64::MAX; 8]; layout.bytes() / 64];
        let mut seed = life.seed;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut block_masks: Vec<ChannelMask> = Vec::new();
        let (mut span, mut table, mut masks, mut scored) = (Span::default(), Vec::new(), None::<Masks>, 0);
        let mut free: Vec<u32> = (0..layout.pages).rev().step_by(2).chain((0..layout.pages).rev().skip(1).step_by(2)).collect();
        let slot = 1;
        HeadMut::new(layout, bytemuck::cast_slice_mut(&mut memory), slot).unwrap().clear_energy();
        for (index, &new) in life.steps.iter().enumerate() {
            let (start, query) = (keys.len(), numbers(&mut seed, life.group * d));
            keys.extend(numbers(&mut seed, new * d));
            values.extend(numbers(&mut seed, new * d));
            // Keys come as they are computed by steps and by prompts, in turns.
            let mut blocks = vec![f32::NAN; new.next_multiple_of(BLOCK) * d];
            for (at, &x) in keys[start..].iter().enumerate() {
                let (token, channel) = (at / d, at % d);
                blocks[(token / BLOCK * d + channel) * BLOCK + token % BLOCK] = x;
            }
            let (order, new_keys) =
                if index % 2 == 0 { (KeyOrder::Blocks, &blocks[..]) } else { (KeyOrder::Rows, &keys[start..]) };
            let rows = Rows { keys: new_keys, order, values: &values[start..], stride: d };
            let admission = span.admit(new, plan.retention(), index == 0);
            let gone = admission.dropped.min(table.len());
            free.extend(table.drain(..gone));
            while table.len() < admission.after.blocks as usize {
                table.push(free.pop().expect("the plan has room"));
            }
            let mut head = HeadMut::new(layout, bytemuck::cast_slice_mut(&mut memory), slot).unwrap();
            if masks.is_none() {
                head.add_query_energy(&query, life.group, d).unwrap();
                scored += life.group;
                if admission.thinned > 0 {
                    let mut scores = vec![0.0; d];
                    let scoring = Scoring { queries: scored, ..Scoring::default() };
                    head.score(&scoring, &admission, rows, &mut scores).unwrap();
                    let chosen = select(&scores, life.kept).unwrap();
                    let values = head.choose_values(&admission, rows).unwrap();
                    masks = Some(Masks { keys: chosen, values });
                    // Any moments will do: attention has to do as the correction says.
                    if life.seed % 2 == 0 {
                        head.correct(&chosen, Moments::Tokens { admission: &admission, rows }).unwrap();
                    } else {
                        let (mean, mut covariance) = (numbers(&mut seed, d), vec![0.0; d * d]);
                        for (a, row) in covariance.chunks_exact_mut(d).enumerate() {
                            row.iter_mut().enumerate().for_each(|(b, x)| *x = if a == b { 2.0 } else { 0.5 });
                        }
                        let mut scratch = vec![f32::NAN; layout.scratch_len()];
                        // In the order of falling scores, as the best is chosen first.
                        let mut order: Vec<u16> = chosen.channels().map(|channel| channel as u16).collect();
                        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
                        let moments =
                            Moments::Known { mean: &mean, covariance: &covariance, order: &order, scratch: &mut scratch };
                        head.correct(&chosen, moments).unwrap();
                    }
                }
            }
            if let (true, Some(masks)) = (life.renews && !admission.new_blocks().is_empty(), &mut masks) {
                let scores = numbers(&mut seed, d);
                masks.keys = select(&scores, life.kept).unwrap();
                block_masks.drain(..admission.dropped.min(block_masks.len()));
                block_masks.truncate(admission.new_blocks().start);
                block_masks.resize(admission.new_blocks().end, masks.keys);
            } else if life.renews {
                block_masks.drain(..admission.dropped.min(block_masks.len()));
            }
            head.admit(&admission, &table, masks.as_ref(), rows).unwrap();
            span = admission.after;

            let bytes = bytemuck::cast_slice(&memory);
            let head = HeadRef::new(layout, bytes, slot, &table, span, masks.as_ref()).unwrap();
            let mut out = vec![0.0; life.group * d];
            let mut scratch = vec![f32::NAN; attend::attend_len(life.group, d)];
            let window = life.window.unwrap_or(usize::MAX);
            attend::attend(&Plain, &head, &query, window, &mut scratch, &mut out).unwrap();
            let mask_of = |block: usize| if life.renews { block_masks[block] } else { masks.unwrap().keys };
            // What is stored is what came in: a number of the ring as it stores it, a quantised one within half a step.
            let (stored_keys, stored_values) = contents(&life, &head);
            let (sinks, gone) = (span.sinks as usize, keys.len() / d - span.tokens());
            prop_assert_eq!(sinks, life.sinks.min(keys.len() / d));
            for token in 0..span.tokens() {
                let thin = (sinks..sinks + span.prefix()).contains(&token);
                let row = if token < sinks { token } else { gone + token } * d;
                let columns = if thin && layout.projects() { correction(&head) } else { None };
                if let (Some(columns), true) = (&columns, layout.predicts()) {
                    // One channel after the other, with what is stored: whatever rounding has taken is told to the next.
                    let own = |channel: usize| f64::from(columns[channel * (life.kept + 1) + life.kept]);
                    let mut left: Vec<f64> = (0..d).map(|c| f64::from(keys[row + c]) - own(c)).collect();
                    for (index, &channel) in columns[d * (life.kept + 1)..][..life.kept].iter().enumerate() {
                        let told = f64::from(stored_number(&masks.unwrap().keys, &stored_keys[token * d..], index));
                        let off = (left[channel as usize] - told).abs() as f32;
                        let kind = match life.keys {
                            StorageKind::Int4Int2 if index < mixed::fine(life.kept) => StorageKind::Int4,
                            StorageKind::Int4Int2 => StorageKind::Trellis2,
                            kind => kind,
                        };
                        // Keys, means and what is predicted of them reach as far as four times what keys do alone.
                        prop_assert!(off <= 4.0 * tolerance(kind) + 0.02, "{index} of {token} is off by {off}");
                        for (c, left) in left.iter_mut().enumerate() {
                            *left -= f64::from(columns[c * (life.kept + 1) + index]) * told;
                        }
                    }
                } else if let Some(columns) = &columns {
                    let (mask, mut coordinates) = (masks.unwrap().keys, vec![0.0; life.kept]);
                    let mean = columns.iter().skip(life.kept).step_by(life.kept + 1);
                    let centred: Vec<f32> = keys[row..row + d].iter().zip(mean).map(|(x, mean)| x - mean).collect();
                    project(columns, &centred, &mut coordinates);
                    // As far as a code reaches: no coordinate of numbers from -4 to 4 is larger.
                    let reach = 4.0 * (d as f32).sqrt();
                    for (channel, x) in mask.channels().zip(coordinates) {
                        let off = (stored_keys[token * d + channel] - x).abs();
                        let most = rounding(life.keys) + tolerance(life.keys) * reach / 2.0;
                        prop_assert!(off <= most, "coordinate of {token} is off by {off}");
                    }
                }
                for c in 0..d {
                    let (at, from) = (token * d + c, row + c);
                    let gone = |mask: fn(Masks) -> ChannelMask| thin && !mask(masks.unwrap()).contains(c);
                    let own = || mask_of((token - sinks + span.hidden as usize) / BLOCK);
                    let key = if thin && !own().contains(c) { 0.0 } else { stored(life.keys, keys[from]) };
                    if columns.is_none() {
                        let off = (stored_keys[at] - key).abs();
                        prop_assert!(off <= if thin { tolerance(life.keys) } else { 0.0 }, "key {token} is off by {off}");
                    }
                    let value = if gone(|masks| masks.values) { 0.0 } else { stored(life.values, values[from]) };
                    let off = (stored_values[at] - value).abs();
                    prop_assert!(off <= if thin { tolerance(life.values) } else { 0.0 }, "value {token} is off by {off}");
                }
            }
            for block in 0..span.blocks as usize {
                let (mut thin_keys, mut thin_values) = (vec![0.0; life.kept * BLOCK], vec![0.0; BLOCK * (d + 3)]);
                head.read_key_block(block, &mut thin_keys).unwrap();
                head.read_value_block(block, &mut thin_values, d + 3).unwrap();
                for lane in if block == 0 { span.hidden as usize } else { 0 }..BLOCK {
                    let token = sinks + block * BLOCK + lane - span.hidden as usize;
                    for (row, channel) in mask_of(block).channels().enumerate() {
                        prop_assert_eq!(thin_keys[row * BLOCK + lane], stored_keys[token * d + channel]);
                    }
                    prop_assert_eq!(&thin_values[lane * (d + 3)..][..d], &stored_values[token * d..][..d]);
                }
            }
            for (out, query) in out.chunks(d).zip(query.chunks(d)) {
                let (thin, added) = corrected(&head, query);
                let expected = dense(&life, span, &stored_keys, &stored_values, query, (&thin, added));
                for (a, b) in out.iter().zip(expected) {
                    prop_assert!((f64::from(*a) - b).abs() < if layout.projects() { 2e-3 } else { 2e-4 }, "{a} instead of {b} at {span:?}");
                }
            }
        }
        prop_assert!(span.recent as usize <= life.recent + BLOCK);
    }
}
