//! How queries are corrected, by its definition: [`thinkey_core::channel::compensate`] has the formulas.

use burn::tensor::{Int, Tensor, TensorData, activation::softmax, backend::Backend};
use std::ops::Range;
use thinkey_core::channel::compensate::RIDGE;

/// What turns queries, as rows, into those that meet thin keys and into what is added to their logits: Rᵀ, [D, T], and b,
/// [D, 1].
#[derive(Clone, Debug)]
pub(super) struct Correction<B: Backend> {
    pub(super) queries: Tensor<B, 2>,
    pub(super) added: Tensor<B, 2>,
}

/// The attention that `queries` (the newest W, [W, G · D]) pay the tokens with `keys`, [S, D]: [W · G, S]. Of tokens from
/// `sinks` on, only the newest `window` are seen.
pub(super) fn probabilities<B: Backend>(
    queries: Tensor<B, 2>,
    keys: Tensor<B, 2>,
    window: usize,
    sinks: usize,
) -> Tensor<B, 2> {
    let ([newest, width], [tokens, dim]) = (queries.dims(), keys.dims());
    let group = width / dim;
    let sees = |row: usize, token: usize| token <= row && (token < sinks || token.saturating_add(window) > row);
    let hidden: Vec<f32> = (tokens - newest..tokens)
        .flat_map(|row| std::iter::repeat_n(row, group))
        .flat_map(|row| (0..tokens).map(move |token| if sees(row, token) { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    let shape = [newest * group, tokens];
    let hidden = Tensor::from_data(TensorData::new(hidden, shape), &keys.device());
    let logits = queries.reshape([newest * group, dim]).matmul(keys.transpose()) / (dim as f32).sqrt();
    softmax(logits + hidden, 1)
}

/// The mean of `probabilities` of the tokens `thinned`, half mixed with as much for all: they sum to 1.
pub(super) fn weights<B: Backend>(probabilities: Tensor<B, 2>, thinned: Range<usize>) -> Tensor<B, 1> {
    let [_, tokens] = probabilities.dims();
    let mass = probabilities.mean_dim(0).reshape([tokens]);
    let (first, count) = (thinned.start, thinned.len());
    let mass = mass.narrow(0, first, count);
    let total = mass.clone().sum().into_scalar();
    mass / total * 0.5 + 0.5 / count as f32
}

/// The correction for `mask` that regression on `keys`, [n, D], with `weights` gives.
pub(super) fn learn<B: Backend>(keys: Tensor<B, 2>, weights: Tensor<B, 1>, mask: &Tensor<B, 1, Int>) -> Correction<B> {
    let ([count, dim], [kept], device) = (keys.dims(), mask.dims(), keys.device());
    let weights = weights.reshape([count, 1]);
    let mean = (keys.clone() * weights.clone()).sum_dim(0);
    let centred = keys - mean.clone();
    let covariance = (centred.clone() * weights).transpose().matmul(centred);
    let floats = |tensor: Tensor<B, 2>| tensor.into_data().iter::<f64>().collect::<Vec<_>>();
    let (mean, mut covariance) = (floats(mean), floats(covariance));
    let ridge = f64::from(RIDGE) * (0..dim).map(|c| covariance[c * dim + c]).sum::<f64>() / dim as f64;
    (0..dim).for_each(|c| covariance[c * dim + c] += ridge);
    let channels: Vec<usize> = mask.to_data().iter::<i64>().map(|channel| channel as usize).collect();
    // [C_SS, C_S] becomes [I, R], row by row.
    let mut rows: Vec<Vec<f64>> = channels
        .iter()
        .map(|&a| {
            let row = &covariance[a * dim..][..dim];
            channels.iter().map(|&b| row[b]).chain(row.iter().copied()).collect()
        })
        .collect();
    for pivot in 0..kept {
        let scale = rows[pivot][pivot];
        rows[pivot].iter_mut().for_each(|x| *x /= scale);
        let line = rows[pivot].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(index, _)| *index != pivot) {
            let factor = row[pivot];
            row.iter_mut().zip(&line).for_each(|(x, y)| *x -= factor * y);
        }
    }
    let at = |channel: usize, row: usize| rows[row][kept + channel];
    let queries = (0..dim).flat_map(|channel| (0..kept).map(move |row| at(channel, row) as f32)).collect();
    let guessed = |channel| (0..kept).map(|row| at(channel, row) * mean[channels[row]]).sum::<f64>();
    let added = (0..dim).map(|channel| (mean[channel] - guessed(channel)) as f32).collect();
    Correction {
        queries: Tensor::from_data(TensorData::new::<f32, _>(queries, [dim, kept]), &device),
        added: Tensor::from_data(TensorData::new::<f32, _>(added, [dim, 1]), &device),
    }
}

/// The correction for `mask` that takes every other channel to be as it is in `keys`, [n, D], on average.
pub(super) fn means<B: Backend>(keys: Tensor<B, 2>, mask: &Tensor<B, 1, Int>) -> Correction<B> {
    let ([_, dim], [kept], device) = (keys.dims(), mask.dims(), keys.device());
    let channels: Vec<usize> = mask.to_data().iter::<i64>().map(|channel| channel as usize).collect();
    let (mut queries, mut lost) = (vec![0.0f32; dim * kept], vec![1.0f32; dim]);
    for (row, &channel) in channels.iter().enumerate() {
        queries[channel * kept + row] = 1.0;
        lost[channel] = 0.0;
    }
    let lost = Tensor::from_data(TensorData::new(lost, [dim, 1]), &device);
    Correction {
        queries: Tensor::from_data(TensorData::new(queries, [dim, kept]), &device),
        added: keys.mean_dim(0).reshape([dim, 1]) * lost,
    }
}
