//! Attention that materialises its scores.

use super::ReferenceCache;
use crate::ops::{Cache, Heads};
use burn::tensor::{Tensor, TensorData, activation::softmax, backend::Backend};
use thinkey_core::CachePlan;

/// Query rows at once: bounds the scores that are held.
const ROWS: usize = 512;

/// The attention output of `fused`, rows of new tokens of `slot`: [rows, heads · D]. Where they are the last of the rows
/// `own`, keys and values of those come from there, else from the cache.
pub fn attend<B: Backend>(
    cache: &ReferenceCache<B>,
    layer: usize,
    slot: usize,
    fused: Tensor<B, 2>,
    own: Option<Tensor<B, 2>>,
    heads: Heads,
) -> Tensor<B, 2> {
    let (cached, copies) = (heads.cached(cache.plan()), cache.plan().copies);
    let (rows, dim, group) = (fused.dims()[0], heads.head_dim, cached.group());
    let first = cache.position(slot) + own.as_ref().map_or(0, |own| own.dims()[0] - rows);
    let column = |at: usize| fused.clone().narrow(1, at, dim);
    let mut outputs = Vec::with_capacity(heads.heads);
    for kv_head in 0..cached.kv_heads {
        let (mut whole_keys, mut values) = (Vec::new(), Vec::new());
        let past = cache.head(layer, kv_head, slot);
        let mut sink_keys = None;
        if let Some(sinks) = &past.sinks {
            sink_keys = Some(sinks.keys());
            values.push(sinks.values());
        }
        if let Some(prefix) = &past.prefix {
            values.push(prefix.values());
        }
        if let Some(recent) = &past.recent {
            whole_keys.push(recent.keys());
            values.push(recent.values());
        }
        if let Some(own) = &own {
            whole_keys.push(own.clone().narrow(1, heads.keys() + kv_head / copies * dim, dim));
            values.push(own.clone().narrow(1, heads.values() + kv_head / copies * dim, dim));
        }
        let whole_keys = (!whole_keys.is_empty()).then(|| Tensor::cat(whole_keys, 0));
        let values = Tensor::cat(values, 0);
        // Positions of the tokens at hand.
        let (tokens, sinks) = (values.dims()[0], sink_keys.as_ref().map_or(0, |keys| keys.dims()[0]));
        let positions: Vec<usize> = (0..sinks).chain(first + rows - (tokens - sinks)..first + rows).collect();
        for head in kv_head * group..(kv_head + 1) * group {
            let query = column(head * dim);
            let chunks = (0..rows).step_by(ROWS).map(|start| {
                let count = ROWS.min(rows - start);
                let query = query.clone().narrow(0, start, count);
                let mut scores = Vec::new();
                if let Some(keys) = &sink_keys {
                    scores.push(query.clone().matmul(keys.clone().transpose()));
                }
                if let (Some(prefix), Some(mask)) = (&past.prefix, &past.mask) {
                    let keys = prefix.keys().transpose();
                    scores.push(match &past.correction {
                        Some(by) => {
                            let added = query.clone().matmul(by.added.clone());
                            query.clone().matmul(by.queries.clone()).matmul(keys) + added
                        }
                        None if cache.plan().renews => query.clone().matmul(keys),
                        None => query.clone().select(1, mask.clone()).matmul(keys),
                    });
                }
                if let Some(keys) = &whole_keys {
                    scores.push(query.matmul(keys.clone().transpose()));
                }
                let scores = Tensor::cat(scores, 1) / (dim as f32).sqrt();
                let seen = seen(first + start, count, &positions, cache.plan());
                let hidden = Tensor::from_data(TensorData::new(seen, [count, tokens]), &fused.device());
                softmax(scores + hidden, 1).matmul(values.clone())
            });
            outputs.push(Tensor::cat(chunks.collect(), 0));
        }
    }
    Tensor::cat(outputs, 1)
}

/// What to add to the scores of `count` rows from position `first` on for tokens at `positions`: 0 where a row sees a
/// token, else -∞.
fn seen(first: usize, count: usize, positions: &[usize], plan: &CachePlan) -> Vec<f32> {
    let near = |row: usize, token: usize| plan.window.is_none_or(|window| token.saturating_add(window) > row);
    let sees = |row: usize, token: usize| token <= row && (token < plan.sinks || near(row, token));
    (first..first + count)
        .flat_map(|row| positions.iter().map(move |&token| if sees(row, token) { 0.0 } else { f32::NEG_INFINITY }))
        .collect()
}
