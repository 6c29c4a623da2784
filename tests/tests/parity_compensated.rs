//! The compensated mode and its budget against recorded reference tensors.

use std::collections::BTreeMap;
use thinkey_core::{
    ChannelMask, Plain, QueryWindow, TokenRows,
    channel::{
        adaptive::{self, Grid, MIN_KEPT},
        compensate::{self, Correction, SINKS},
        lowrank::Projection,
        score, select,
    },
    mass,
};
use thinkey_tests::recording::{Recording, Tensor};

const RECENT: usize = 32;

/// The largest difference seen of each quantity, by name; the assertion is at the end, so that a failure shows them all.
#[derive(Default)]
struct Worst(BTreeMap<&'static str, f32>);

impl Worst {
    fn see(&mut self, what: &'static str, ours: impl IntoIterator<Item = f32>, theirs: &[f32]) {
        let worst = self.0.entry(what).or_default();
        let mut compared = 0;
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            *worst = worst.max((ours - theirs).abs());
            compared += 1;
        }
        assert_eq!(compared, theirs.len(), "{what}");
    }
}

struct Layer {
    keys: Tensor<f32>,
    values: Tensor<f32>,
    queries: Tensor<f32>,
}

impl Layer {
    fn of(recording: &Recording, layer: usize) -> Self {
        let tensor = |name: &str| recording.floats(&format!("L{layer}.{name}"));
        Self { keys: tensor("K"), values: tensor("V"), queries: tensor("Qwin") }
    }

    fn group(&self) -> usize {
        self.queries.shape[0] / self.keys.shape[0]
    }

    fn head_dim(&self) -> usize {
        self.keys.shape[2]
    }

    fn rows(&self, head: usize) -> TokenRows<'_> {
        TokenRows::new(self.keys.part(head), self.keys.shape[1], self.head_dim(), self.head_dim()).unwrap()
    }

    fn window(&self, head: usize) -> QueryWindow<'_> {
        let (group, window, d) = (self.group(), self.queries.shape[1], self.head_dim());
        let data = &self.queries.data[head * group * window * d..];
        QueryWindow::new(data, [group, window * d], [window, d], d).unwrap()
    }
}

/// What a head's prompt says: m, C, M, the ordinary scores and the budget scores.
struct Statistics {
    mean: Vec<f32>,
    covariance: Vec<f32>,
    mass: f32,
    scores: Vec<f32>,
    budget_scores: Vec<f32>,
}

fn statistics(layer: &Layer, head: usize) -> Statistics {
    let (keys, queries, d) = (layer.rows(head), layer.window(head), layer.head_dim());
    let tokens = keys.tokens();
    let (mut scratch, mut weights) = (vec![0.0; tokens], vec![0.0; tokens]);
    mass::group_mass(&Plain, &queries, &keys, &mut scratch, &mut weights).unwrap();
    let prefix = tokens - RECENT;
    let weights = &mut weights[..prefix];
    let total = compensate::weigh(weights, SINKS).unwrap();
    let (mut mean, mut covariance) = (vec![0.0; d], vec![0.0; d * d]);
    let mut scratch = vec![0.0; compensate::moments_scratch(d)];
    compensate::moments(&keys.first(prefix).unwrap(), weights, &mut scratch, &mut mean, &mut covariance).unwrap();
    let (mut query_energy, mut key_energy) = (vec![0.0; d], vec![0.0; d]);
    for query in 0..queries.group() {
        let rows = layer.queries.part(head * queries.group() + query);
        score::add_energy(rows, queries.window(), d, &mut query_energy).unwrap();
    }
    score::add_energy(layer.keys.part(head), tokens, d, &mut key_energy).unwrap();
    let queries = queries.group() * queries.window();
    let (mut scores, mut budget_scores) = (vec![0.0; d], vec![0.0; d]);
    score::score(&query_energy, queries, &key_energy, tokens, &mut scores).unwrap();
    compensate::budget_scores(&query_energy, queries, &covariance, total, &mut budget_scores).unwrap();
    Statistics { mean, covariance, mass: total, scores, budget_scores }
}

/// The decode step's attention of one query: sinks, the recent tokens and the decoded one whole, the others by the
/// corrected query. In f64.
fn attend(layer: &Layer, head: usize, decode: [&[f32]; 2], query: &[f32], correction: &Correction<'_>) -> Vec<f32> {
    let d = layer.head_dim();
    let (tokens, scale) = (layer.keys.shape[1], 1.0 / (d as f64).sqrt());
    let mut thin = vec![0.0; correction.mask().kept()];
    let added = f64::from(correction.correct(query, &mut thin).unwrap());
    let product = |a: &mut dyn Iterator<Item = (f32, f32)>| a.map(|(x, y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let mut logits: Vec<f64> = Vec::new();
    for (token, key) in layer.rows(head).rows().chain([decode[0]]).enumerate() {
        let whole = token < SINKS || token >= tokens - RECENT;
        logits.push(
            scale
                * if whole {
                    product(&mut query.iter().copied().zip(key.iter().copied()))
                } else {
                    product(&mut thin.iter().copied().zip(correction.mask().channels().map(|c| key[c]))) + added
                },
        );
    }
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let mut out = vec![0.0f64; d];
    for (logit, value) in logits.iter().zip(layer.values.part(head).chunks(d).chain([decode[1]])) {
        for (out, &v) in out.iter_mut().zip(value) {
            *out += (logit - max).exp() / sum * f64::from(v);
        }
    }
    out.into_iter().map(|x| x as f32).collect()
}

#[test]
fn moments_corrections_and_attention_equal_the_recordings() {
    let (mut worst, mut compared) = (Worst::default(), 0);
    for recording in Recording::all() {
        for index in recording.layers() {
            if !recording.has(&format!("L{index}.C.compensated")) {
                continue;
            }
            let layer = Layer::of(&recording, index);
            let (group, d) = (layer.group(), layer.head_dim());
            let recorded = |name: &str| recording.floats(&format!("L{index}.{name}"));
            let (query, key, value) = (recorded("decode_q"), recorded("decode_k"), recorded("decode_v"));
            for head in 0..layer.keys.shape[0] {
                let ours = statistics(&layer, head);
                worst.see("M", [ours.mass], recorded("mass.compensated").part(head));
                worst.see("m", ours.mean.iter().copied(), recorded("mean.compensated").part(head));
                worst.see("C", ours.covariance.iter().copied(), recorded("C.compensated").part(head));
                for lambda in ["0.5", "0.6", "0.7"] {
                    let keep = recording.integers(&format!("L{index}.keep_mask.compensated.{lambda}"));
                    let kept: Vec<usize> = (0..d).filter(|&c| keep.part(head)[c] == 1).collect();
                    let mask = select::select(&ours.scores, kept.len()).unwrap();
                    assert_eq!(mask, ChannelMask::from_channels(d, kept.iter().copied()).unwrap());
                    let mut scratch = vec![0.0; Correction::scratch_len(kept.len())];
                    let mut memory = vec![0.0; Correction::len(d, kept.len())];
                    let correction =
                        Correction::solve(&ours.mean, &ours.covariance, &mask, &mut scratch, &mut memory).unwrap();
                    // Unit queries read R out, column by column.
                    let r = recorded(&format!("R.compensated.{lambda}"));
                    let mut matrix = vec![0.0; d * d];
                    for channel in 0..d {
                        let (mut unit, mut column) = (vec![0.0; d], vec![0.0; kept.len()]);
                        unit[channel] = 1.0;
                        correction.correct(&unit, &mut column).unwrap();
                        for (&line, &x) in kept.iter().zip(&column) {
                            matrix[line * d + channel] = x;
                        }
                    }
                    worst.see("R", matrix, r.part(head));
                    let out = recorded(&format!("attn_out.compensated.{lambda}"));
                    let exact = recorded("attn_out.none");
                    for head_query in head * group..(head + 1) * group {
                        let decode = [key.part(head), value.part(head)];
                        let mixed = attend(&layer, head, decode, query.part(head_query), &correction);
                        worst.see("attention", mixed.iter().copied(), out.part(head_query));
                        worst.see("attention, against the whole cache", mixed, exact.part(head_query));
                        compared += 1;
                    }
                }
            }
        }
    }
    println!("{compared} attention outputs; largest differences: {:?}", worst.0);
    assert!(compared > 0, "no recording holds the compensated mode");
    for (what, limit) in [("M", 1e-5), ("m", 1e-5), ("C", 1e-4), ("R", 1e-2), ("attention", 1e-4)] {
        assert!(worst.0[what] <= limit, "{what}: off by {}", worst.0[what]);
    }
}

/// The budget was spread over all heads of the model; over those recorded it must be spread in the same way, given what
/// they got together.
#[test]
fn the_budget_is_spread_as_recorded() {
    for recording in Recording::all() {
        if !recording.has("T.compensated.0.5") {
            continue;
        }
        let layers = recording.layers();
        let (mut scores, mut d) = (Vec::new(), 0);
        for &index in &layers {
            let layer = Layer::of(&recording, index);
            d = layer.head_dim();
            (0..layer.keys.shape[0]).for_each(|head| scores.extend(statistics(&layer, head).budget_scores));
        }
        for lambda in ["0.5", "0.6", "0.7"] {
            let table = recording.integers(&format!("T.compensated.{lambda}"));
            let theirs: Vec<u16> = layers.iter().flat_map(|&layer| table.part(layer)).map(|&t| t as u16).collect();
            let channels = theirs.iter().map(|&t| usize::from(t)).sum();
            let grid = Grid { head_dim: d, minimum: MIN_KEPT, multiple: 1 };
            let mut ours = vec![0; theirs.len()];
            adaptive::spread(&scores, grid, channels, &mut ours).unwrap();
            assert_eq!(ours, theirs, "λ = {lambda}");
        }
    }
}

/// How far the attention logits of the window's queries are off, root mean square under the weights: low-rank keys
/// against as many channels, corrected.
#[test]
fn low_rank_keys_are_nearer_in_mean_square() {
    let recording = &Recording::all()[0];
    let index = recording.layers()[0];
    let layer = Layer::of(recording, index);
    let d = layer.head_dim();
    let ours = statistics(&layer, 0);
    let kept = d / 2;
    let mask = select::select(&ours.scores, kept).unwrap();
    let (mut scratch, mut memory) = (vec![0.0; Correction::scratch_len(kept)], vec![0.0; Correction::len(d, kept)]);
    let correction = Correction::solve(&ours.mean, &ours.covariance, &mask, &mut scratch, &mut memory).unwrap();
    let (mut scratch, mut memory) = (vec![0.0; Projection::scratch_len(d)], vec![0.0; Projection::len(d, kept)]);
    let projection = Projection::solve(&ours.mean, &ours.covariance, kept, &mut scratch, &mut memory).unwrap();
    // Unit queries ask for each channel of the keys.
    let (mut by_channels, mut by_rank) = (0.0, 0.0);
    for channel in 0..d {
        let mut unit = vec![0.0; d];
        unit[channel] = 1.0;
        let (mut corrected, mut projected, mut thin) = (vec![0.0; kept], vec![0.0; kept], vec![0.0; kept]);
        let added =
            [correction.correct(&unit, &mut corrected).unwrap(), projection.project(&unit, &mut projected).unwrap()];
        for key in layer.rows(0).rows() {
            let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
            mask.gather(key, &mut thin);
            by_channels += f64::from(sum(&corrected, &thin) + added[0] - key[channel]).powi(2);
            projection.store(key, &mut thin).unwrap();
            by_rank += f64::from(sum(&projected, &thin) + added[1] - key[channel]).powi(2);
        }
    }
    println!("squares left: {by_channels} with channels, {by_rank} with directions");
    assert!(by_rank < by_channels);
}
