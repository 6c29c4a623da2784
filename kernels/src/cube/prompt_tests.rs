//! What is a prompt's alone, on a software Vulkan against plain loops.

use super::{
    held::Held,
    launch::{Layer, Numbers, head_entry},
    layout::Shape,
    residual::Told,
    tests::{Client, client},
};
use crate::ops::Heads;
use thinkey_core::{
    ChannelMask, HeadLayout, StorageKind,
    channel::{
        compensate::{self, Correction},
        residual,
    },
    policy::Fix,
    storage::{Element, FloatKind},
};

/// Numbers between -1 and 1.
pub(super) fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

pub(super) fn floats(client: &Client, x: &[f32]) -> Numbers {
    Numbers::of(client, bytemuck::cast_slice(x))
}

pub(super) fn read(client: &Client, numbers: &Numbers) -> Vec<f32> {
    let bytes = client.read_one_unchecked(numbers.handle.clone());
    bytes.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).take(numbers.len).collect()
}

/// The attention of query head `query` of row `row` of a prompt's `fused` rows, in f64, over `past` (the largest logit, the
/// sum of weights and the mix of values) where there is one.
fn attend(
    fused: &[f32],
    heads: Heads,
    (row, query): (usize, usize),
    (window, sinks): (usize, usize),
    past: Option<(f32, f32, &[f32])>,
) -> Vec<f64> {
    let (dim, width) = (heads.head_dim, heads.width());
    let part = |row: usize, at: usize| &fused[row * width + at..][..dim];
    let head = query / heads.group();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let mut sum = past.map_or(0.0, |(top, sum, _)| f64::from(sum) * f64::from(top).exp());
    let mut mixed: Vec<f64> = (0..dim).map(|at| past.map_or(0.0, |(.., mix)| f64::from(mix[at]) * sum)).collect();
    for token in (0..=row).filter(|&token| token < sinks || token + window > row) {
        let logit = dot(part(row, query * dim), part(token, heads.keys() + head * dim)) / (dim as f64).sqrt();
        sum += logit.exp();
        let values = part(token, heads.values() + head * dim);
        mixed.iter_mut().zip(values).for_each(|(mixed, &x)| *mixed += f64::from(x) * logit.exp());
    }
    mixed.iter().map(|x| x / sum).collect()
}

/// Heads of every kind, prompts of one row, of a tile and of several runs, windows and sinks, and what a cache held before.
#[test]
fn prompts_attend_as_by_plain_loops() {
    let heads = |heads, kv_heads, head_dim| Heads { heads, kv_heads, head_dim };
    let cases = [
        (heads(9, 3, 64), vec![130, 67], 1000, 0, false),
        (heads(2, 2, 128), vec![64, 64, 1], 50, 3, true),
        (heads(8, 1, 80), vec![1, 95], usize::MAX, 0, true),
        (heads(7, 1, 32), vec![150], 20, 70, false),
        (heads(4, 2, 256), vec![33], 7, 0, true),
        (heads(3, 3, 6), vec![1], 1, 0, false),
    ];
    let client = client();
    for (case, (heads, runs, window, sinks, continued)) in cases.into_iter().enumerate() {
        let (rows, width, dim) = (runs.iter().sum(), heads.width(), heads.head_dim);
        let fused: Vec<f32> = random(case as u64, rows * width).iter().map(|x| 2.0 * x).collect();
        let mut held = Held::new(&client, 0, rows, 5, heads);
        let mut first = 0;
        for run in runs {
            let own = floats(&client, &fused[first * width..(first + run) * width]);
            held.take(&client, &own, run);
            let past = random(77, run * heads.keys());
            let ends: Vec<f32> =
                (0..run * heads.heads).flat_map(|at| [at as f32 % 3.0 - 1.0, at as f32 % 4.0]).collect();
            let (out, past_ends) = (floats(&client, &past), floats(&client, &ends));
            let seen = continued.then_some(&past_ends);
            held.attend(&client, (&own, run), (window, sinks), seen, &out);
            let actual = read(&client, &out);
            for (at, (actual, mix)) in actual.chunks(dim).zip(past.chunks(dim)).enumerate() {
                let (row, query) = (first + at / heads.heads, at % heads.heads);
                let past = continued.then_some((ends[at * 2], ends[at * 2 + 1], mix));
                let expected = attend(&fused, heads, (row, query), (window.min(1 << 40), sinks), past);
                for (x, y) in actual.iter().zip(expected) {
                    assert!(
                        (f64::from(*x) - y).abs() < 2e-5,
                        "case {case}, row {row}, query head {query}: {x}, not {y}"
                    );
                }
            }
            first += run;
        }
        // The queries of the newest rows are those that score.
        let newest = rows.min(5);
        let expected = fused.chunks(width).skip(rows - newest).flat_map(|row| &row[..heads.keys()]);
        assert!(read(&client, &held.queries).iter().eq(expected));
    }
}

/// A layout of a head of `kept` channels, its queries corrected.
fn layout(dim: usize, kept: usize, keys: StorageKind) -> HeadLayout {
    HeadLayout {
        head_dim: dim as u16,
        kept: kept as u16,
        sinks: 4,
        recent: 32,
        fix: Fix::Compensated,
        kept_values: dim as u16,
        renews: false,
        slots: 2,
        pages: 3,
        keys,
        values: keys,
        ranked: 0,
    }
}

/// What a prompt tells of a head whose channels depend on each other: the mean of its keys, their covariance without ridge,
/// and queries; as the device gets it.
fn told(seed: u64, dim: usize, rows: usize) -> Vec<f32> {
    let tokens = 3 * dim;
    let mut keys = random(seed, tokens * dim);
    for row in keys.chunks_mut(dim) {
        (1..dim).for_each(|c| row[c] = 0.3 * row[c] * (1.0 + (c % 5) as f32) + 0.7 * row[c - 1] + c as f32 * 0.1);
    }
    let mut told = vec![0.0; (1 + dim) * dim];
    let (mean, products) = told.split_at_mut(dim);
    let share = 1.0 / tokens as f32;
    keys.chunks(dim).for_each(|row| mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x * share));
    for row in keys.chunks(dim) {
        for (at, sum) in products.iter_mut().enumerate() {
            *sum += (row[at / dim] - mean[at / dim]) * (row[at % dim] - mean[at % dim]) * share;
        }
    }
    told.extend(random(!seed, rows * dim).iter().enumerate().map(|(at, x)| x * (1.0 + (at % dim % 3) as f32)));
    told
}

/// What is left of the error of logits when the channels of `mask` are kept, tr(Q C′), by Gauss elimination in f64.
fn left(covariance: &[f32], moment: &[f32], mask: &ChannelMask) -> f64 {
    let d = mask.head_dim();
    let mut c: Vec<f64> = covariance.iter().map(|&x| f64::from(x)).collect();
    for p in mask.channels() {
        let line: Vec<f64> = c[p * d..][..d].to_vec();
        for i in 0..d {
            let factor = c[i * d + p] / line[p];
            (0..d).for_each(|j| c[i * d + j] -= factor * line[j]);
        }
    }
    c.iter().zip(moment).map(|(c, &q)| c * f64::from(q)).sum()
}

/// Channels chosen for what they leave, and corrections, of heads that keep different numbers of channels: core's.
#[test]
fn corrections_are_cores() {
    let client = client();
    for (dim, rows, kept, keys) in [
        (64, 30, vec![24, 64, 1, 33], StorageKind::F32),
        (128, 12, vec![64, 77], StorageKind::Int4),
        (80, 1, vec![79, 40], StorageKind::F16),
        // More would be more turns of loops than lavapipe has in a unit, some 65,000.
        (192, 5, vec![20], StorageKind::F32),
    ] {
        let layouts: Vec<_> = kept.iter().map(|&kept| layout(dim, kept, keys)).collect();
        let (mut table, mut starts, mut end) = (Vec::new(), Vec::new(), 0);
        for layout in &layouts {
            table.extend(head_entry(layout, end));
            starts.push(end);
            end += layout.bytes();
        }
        let heads = kept.len();
        let shape = Shape {
            dim,
            group: 1,
            keys,
            values: keys,
            sinks: 4,
            stride: layouts[0].ring_stride(),
            corrected: true,
            copies: 1,
            queries_width: heads * dim,
            width: 2 * heads * dim,
            keys_at: 0,
            values_at: heads * dim,
        };
        let parts: Vec<_> = (0..heads).map(|head| told(head as u64 + dim as u64, dim, rows)).collect();
        let numbers = floats(&client, &parts.concat());
        for (chooses, slot) in [(true, 1), (false, 0)] {
            let first: Vec<u32> = (0..2 * heads * dim).map(|at| (at % dim) as u32).collect();
            let layer = Layer {
                arena: Numbers::of(&client, &vec![0; end / 4]),
                heads: Numbers::of(&client, &table),
                channels: Numbers::of(&client, &first),
                count: heads,
                shape,
            };
            layer.learn(&client, slot, (&numbers, Told { dim, rows }), chooses);
            let arena: Vec<u32> = read(&client, &layer.arena).iter().map(|x| x.to_bits()).collect();
            let channels: Vec<u32> = read(&client, &layer.channels).iter().map(|x| x.to_bits()).collect();
            for (head, part) in parts.iter().enumerate() {
                let (kept, what) = (kept[head], format!("D = {dim}, head {head}, T = {}", kept[head]));
                let mut covariance = part[dim..dim + dim * dim].to_vec();
                compensate::complete(&mut covariance, dim);
                let listed = &channels[(slot * heads + head) * dim..][..dim];
                let kept_ones = listed[..kept].iter().map(|&channel| channel as usize);
                let mask = ChannelMask::from_channels(dim, kept_ones).unwrap();
                let lost = (0..dim).filter(|&channel| !mask.contains(channel));
                assert!(
                    mask.channels().chain(lost).eq(listed.iter().map(|&channel| channel as usize)),
                    "{what}: {listed:?}"
                );
                let expected = if chooses {
                    let (mut moment, mut scratch) = (vec![0.0; dim * dim], vec![0.0; dim * dim]);
                    residual::moment(&part[dim + dim * dim..], rows, dim, dim, &mut moment).unwrap();
                    let (mut gains, mut order) = (vec![0.0; dim], vec![0; kept]);
                    let chosen =
                        residual::choose(&mut covariance.clone(), &moment, kept, &mut scratch, &mut gains, &mut order);
                    // Of two that are as good either may be chosen.
                    let [ours, cores] = [&mask, chosen.as_ref().unwrap()].map(|mask| left(&covariance, &moment, mask));
                    let whole = left(&covariance, &moment, &ChannelMask::from_channels(dim, [0]).unwrap());
                    assert!((ours - cores).abs() <= 1e-3 * cores + 1e-5 * whole, "{what}: leaves {ours}, not {cores}");
                    let other = mask.channels().filter(|&channel| !chosen.as_ref().unwrap().contains(channel)).count();
                    assert!(other * 20 <= kept, "{what}: {other} channels are others");
                    mask
                } else {
                    ChannelMask::from_channels(dim, 0..kept).unwrap()
                };
                assert_eq!(mask, expected, "{what}");
                if kept == dim {
                    continue;
                }
                let mut expected = vec![0.0f32; Correction::len(dim, kept)];
                let mut scratch = vec![0.0; Correction::scratch_len(kept)];
                Correction::solve(&part[..dim], &covariance, &mask, &mut scratch, &mut expected).unwrap();
                let bytes: &[u8] = bytemuck::cast_slice(&arena);
                let own = &bytes[starts[head] + layouts[head].correction(slot).start..];
                let actual: Vec<f32> = match shape.correction() {
                    FloatKind::F32 => bytemuck::pod_collect_to_vec(&own[..expected.len() * 4]),
                    _ => own[..expected.len() * 2]
                        .chunks_exact(2)
                        .map(|x| half::f16::from_le_bytes([x[0], x[1]]).load())
                        .collect(),
                };
                let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                for (at, (x, y)) in actual.iter().zip(&expected).enumerate() {
                    assert!((x - y).abs() <= 1e-3 * most, "{what}: number {at}: {x}, not {y} of {most}");
                }
            }
        }
    }
}
