//! Attention that materialises its scores.

use super::ReferenceCache;
use crate::ops::{Cache, Heads};
use burn::tensor::{Tensor, TensorData, activation::softmax, backend::Backend};

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
    let (rows, dim, group) = (fused.dims()[0], heads.head_dim, heads.group());
    let first = cache.position(slot) + own.as_ref().map_or(0, |own| own.dims()[0] - rows);
    let column = |at: usize| fused.clone().narrow(1, at, dim);
    let mut outputs = Vec::with_capacity(heads.heads);
    for kv_head in 0..heads.kv_heads {
        let (mut whole_keys, mut values) = (Vec::new(), Vec::new());
        let past = cache.head(layer, kv_head, slot);
        if let Some(prefix) = &past.prefix {
            values.push(prefix.values());
        }
        if let Some(recent) = &past.recent {
            whole_keys.push(recent.keys());
            values.push(recent.values());
        }
        if let Some(own) = &own {
            whole_keys.push(own.clone().narrow(1, heads.keys() + kv_head * dim, dim));
            values.push(own.clone().narrow(1, heads.values() + kv_head * dim, dim));
        }
        let (whole_keys, values) = (Tensor::cat(whole_keys, 0), Tensor::cat(values, 0));
        let tokens = values.dims()[0];
        // Position of the oldest token at hand.
        let oldest = first + rows - tokens;
        for head in kv_head * group..(kv_head + 1) * group {
            let query = column(head * dim);
            let chunks = (0..rows).step_by(ROWS).map(|start| {
                let count = ROWS.min(rows - start);
                let query = query.clone().narrow(0, start, count);
                let mut scores = Vec::new();
                if let (Some(prefix), Some(mask)) = (&past.prefix, &past.mask) {
                    scores.push(query.clone().select(1, mask.clone()).matmul(prefix.keys().transpose()));
                }
                scores.push(query.matmul(whole_keys.clone().transpose()));
                let scores = Tensor::cat(scores, 1) / (dim as f32).sqrt();
                let seen = seen(first + start, count, oldest, tokens, cache.plan().window);
                let hidden = Tensor::from_data(TensorData::new(seen, [count, tokens]), &fused.device());
                softmax(scores + hidden, 1).matmul(values.clone())
            });
            outputs.push(Tensor::cat(chunks.collect(), 0));
        }
    }
    Tensor::cat(outputs, 1)
}

/// What to add to the scores of `count` rows from position `first` on for `tokens` tokens from `oldest` on: 0 where a
/// row sees a token, else -∞.
fn seen(first: usize, count: usize, oldest: usize, tokens: usize, window: Option<usize>) -> Vec<f32> {
    let sees = |row: usize, token: usize| token <= row && window.is_none_or(|window| token + window > row);
    (first..first + count)
        .flat_map(|row| {
            (oldest..oldest + tokens).map(move |token| if sees(row, token) { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect()
}
