//! What the tokens that a prompt thins are like: mean and covariance of their keys, weighed by the attention that the
//! prompt's newest queries pay them, and how much of these queries' output each value channel is.
//!
//! The same as [`thinkey_core::mass`] and [`compensate::moments`] say, on tiles of packed keys: scores are products with
//! blocks of 32 tokens as attention has them, and the covariance is a sum of products of such blocks with themselves.

use super::{
    evict::{ROWS, Scaled, Sight},
    gemm::{Shape, Strided, StridedMut, gemm_panel},
    prompt::{Region, padded},
    simd::Level,
};
use thinkey_core::{
    BLOCK, ChannelMask, Error, Moments,
    channel::{
        compensate::{self, Correction},
        lowrank::Projection,
        residual, select,
    },
};

/// Tokens that are centred and multiplied at a time.
const TILE: usize = 4 * BLOCK;

/// One KV head of a prompt that is to be thinned for the first time.
pub(super) struct Lesson<'a, Q> {
    pub(super) level: Level,
    /// The newest queries of each of the group's heads, [W][D], unscaled.
    pub(super) queries: Q,
    /// Whole tokens, oldest first: sinks, ring, and the prompt's own.
    pub(super) regions: [&'a Region<'a>; 3],
    /// First tokens that are seen whatever the window, and are not thinned.
    pub(super) sinks: usize,
    /// Tokens thinned, from the first that is no sink on.
    pub(super) thinned: usize,
    /// Newest tokens that a query sees.
    pub(super) window: usize,
    /// Which of the tokens thinned stay, ascending, where others are evicted: these teach nothing.
    pub(super) kept: Option<&'a [u32]>,
    /// Whether mean and covariance are asked for.
    pub(super) moments: bool,
    /// Channels to be chosen by what regression on them [leaves](residual), if they are; only with moments.
    pub(super) choose: Option<usize>,
    /// Value channels to be chosen, if they are.
    pub(super) values: Option<usize>,
}

/// What has been learnt of a head, in the memory of the lesson.
#[derive(Default)]
pub(super) struct Learnt<'m> {
    /// Mean and covariance, where they were asked for.
    pub(super) moments: Option<Moments<'m>>,
    /// The channels, where they were to be chosen.
    pub(super) mask: Option<ChannelMask>,
    /// The value channels, where they were to be chosen.
    pub(super) values: Option<ChannelMask>,
}

/// Scratch that a correction or a projection is solved in, for the most channels.
const fn solver_len(head_dim: usize) -> usize {
    let (correction, projection) =
        (Correction::scratch_len(head_dim), Projection::scratch_len(head_dim) + Projection::len(head_dim, head_dim));
    if correction > projection { correction } else { projection }
}

/// Lanes of regions with `tokens` tokens, each in whole blocks.
fn lanes(tokens: impl IntoIterator<Item = usize>) -> usize {
    tokens.into_iter().map(|tokens| tokens.next_multiple_of(BLOCK)).sum()
}

/// Floats of memory that a lesson takes: for `tokens` tokens in any three regions, `queries` query rows of heads of
/// `head_dim` channels.
pub(super) const fn len(tokens: usize, queries: usize, head_dim: usize) -> usize {
    let lanes = tokens + 3 * BLOCK;
    queries * head_dim
        + (ROWS + 1) * lanes
        + TILE * (head_dim + padded(head_dim))
        + head_dim
        + head_dim * padded(head_dim)
        + solver_len(head_dim)
        + ROWS * padded(head_dim)
        + head_dim
        + 2 * head_dim * head_dim
        + head_dim
        + residual::scratch_len(head_dim)
        + head_dim
}

impl<'a, Q: Iterator<Item = &'a [f32]> + Clone> Lesson<'a, Q> {
    /// Learns.
    ///
    /// # Errors
    /// Where attention is no number, or `memory` has fewer floats than [`len`] says.
    pub(super) fn run<'m>(&self, head_dim: usize, memory: &'m mut [f32]) -> Result<Learnt<'m>, Error> {
        let floats: usize = self.queries.clone().map(<[f32]>::len).sum();
        let (count, width) = (floats / head_dim, padded(head_dim));
        let lanes = lanes(self.regions.map(|region| region.lanes));
        let mut rest = memory;
        let mut part = |floats: usize| {
            let capacity = rest.len();
            rest.split_off_mut(..floats).ok_or(Error::Capacity { what: "lesson", needed: floats, capacity })
        };
        let (queries, scores, mass) = (part(count * head_dim)?, part(ROWS * lanes)?, part(lanes)?);
        let (centred, turned) = (part(TILE * head_dim)?, part(TILE * width)?);
        let (mean, covariance) = (part(head_dim)?, part(head_dim * width)?);
        let scratch = part(solver_len(head_dim))?;
        let (outputs, value_scores) = (part(ROWS * width)?, part(head_dim)?);
        let (left, moment) = (part(head_dim * head_dim)?, part(head_dim * head_dim)?);
        let (gains, choice) = (part(head_dim)?, part(residual::scratch_len(head_dim))?);
        let order: &mut [u16] = bytemuck::cast_slice_mut(part(head_dim)?);
        let scale = 1.0 / (head_dim as f32).sqrt();
        queries.iter_mut().zip(self.queries.clone().flatten()).for_each(|(scaled, &q)| *scaled = q * scale);
        value_scores.fill(0.0);
        self.mass(queries, head_dim, (scores, outputs), mass, value_scores);
        let values = self.values.map(|kept| select::select(value_scores, kept)).transpose()?;
        if !self.moments {
            return Ok(Learnt { values, ..Learnt::default() });
        }
        let weights = self.gather(mass);
        match self.kept {
            None => compensate::weigh(weights, 0)?,
            Some(kept) => weigh_kept(weights, kept)?,
        };
        self.mean(weights, mean);
        self.covariance(weights, mean, (centred, turned), covariance);
        // Rows without padding.
        for row in 1..head_dim {
            covariance.copy_within(row * width..row * width + head_dim, row * head_dim);
        }
        let covariance = &mut covariance[..head_dim * head_dim];
        compensate::complete(covariance, head_dim);
        let order = &mut order[..self.choose.unwrap_or(0)];
        let mask = match self.choose {
            None => None,
            Some(kept) => {
                left.copy_from_slice(covariance);
                residual::moment(queries, count, head_dim, head_dim, moment)?;
                Some(residual::choose(left, moment, kept, choice, gains, order)?)
            }
        };
        Ok(Learnt { moments: Some(Moments::Known { mean, covariance, order, scratch }), mask, values })
    }

    /// The attention that each lane gets, mean over all queries; `queries` are scaled. Where value channels are to be
    /// chosen, their [scores](thinkey_core::value::score::query), all times the same, are added to `value_scores`.
    fn mass(
        &self,
        queries: &[f32],
        head_dim: usize,
        (scores, outputs): (&mut [f32], &mut [f32]),
        mass: &mut [f32],
        value_scores: &mut [f32],
    ) {
        let (count, lanes) = (queries.len() / head_dim, mass.len());
        let window = count / self.queries.clone().count();
        let own = self.regions[2];
        let oldest = own.position + own.lanes as isize - window as isize;
        let sight = Sight { level: self.level, regions: &self.regions, sinks: self.sinks, window: self.window };
        mass.fill(0.0);
        for (index, whole) in queries.chunks(ROWS * head_dim).enumerate() {
            let position = |row| oldest + ((index * ROWS + row) % window) as isize;
            let rows = whole.len() / head_dim;
            let queries = Scaled { head_dim, whole, thin: &[], added: &[] };
            sight.add(queries, position, 1.0 / count as f32, scores, mass);
            if self.values.is_some() {
                self.outputs(&scores[..rows * lanes], lanes, head_dim, outputs);
                for output in outputs.chunks_exact(padded(head_dim)).take(rows) {
                    value_scores.iter_mut().zip(output).for_each(|(score, x)| *score += x * x);
                }
            }
        }
    }

    /// What each row of attention `weights` takes from the values, [rows][padded D].
    fn outputs(&self, weights: &[f32], lanes: usize, head_dim: usize, outputs: &mut [f32]) {
        let (rows, width, mut start) = (weights.len() / lanes, padded(head_dim), 0);
        outputs.fill(0.0);
        for region in self.regions.iter().filter(|region| region.lanes > 0) {
            for column in (0..width).step_by(BLOCK) {
                let shape = Shape { m: rows, k: region.lanes, n: BLOCK };
                let a = Strided { data: &weights[start..], stride: lanes };
                let b = Strided { data: &region.values[column..], stride: width };
                gemm_panel(self.level, shape, a, b, StridedMut { data: &mut outputs[column..], stride: width }, true);
            }
            start += region.lanes.next_multiple_of(BLOCK);
        }
    }

    /// The mass of the tokens thinned, moved to the front.
    fn gather<'m>(&self, mass: &'m mut [f32]) -> &'m mut [f32] {
        let (mut gathered, mut start) = (0, 0);
        for region in self.regions {
            let open = region.open(self.sinks);
            let count = (region.lanes - open).min(self.thinned - gathered);
            mass.copy_within(start + open..start + open + count, gathered);
            gathered += count;
            start += region.lanes.next_multiple_of(BLOCK);
        }
        &mut mass[..gathered]
    }

    /// Calls `each` with every block that has thinned tokens: its keys, [D][32], which lanes are such tokens, and their
    /// weights.
    fn blocks(&self, weights: &[f32], head_dim: usize, mut each: impl FnMut(&[f32], usize, &[f32])) {
        let mut rest = weights;
        for region in self.regions {
            let mut lane = region.open(self.sinks);
            while lane < region.lanes && !rest.is_empty() {
                let (block, first) = (lane / BLOCK, lane % BLOCK);
                let count = (BLOCK - first).min(region.lanes - lane).min(rest.len());
                let (weights, tail) = rest.split_at(count);
                // Of those evicted there may be whole blocks.
                if self.kept.is_none() || weights.iter().any(|&weight| weight != 0.0) {
                    each(&region.keys[block * BLOCK * head_dim..][..BLOCK * head_dim], first, weights);
                }
                (rest, lane) = (tail, lane + count);
            }
        }
    }

    fn mean(&self, weights: &[f32], mean: &mut [f32]) {
        const LANES: usize = 8;
        mean.fill(0.0);
        self.blocks(weights, mean.len(), |keys, first, weights| {
            let mut lanes = [0.0; BLOCK];
            lanes[first..first + weights.len()].copy_from_slice(weights);
            for (mean, keys) in mean.iter_mut().zip(keys.chunks_exact(BLOCK)) {
                let mut sums = [0.0f32; LANES];
                for (keys, weights) in keys.chunks_exact(LANES).zip(lanes.chunks_exact(LANES)) {
                    for ((sum, key), weight) in sums.iter_mut().zip(keys).zip(weights) {
                        *sum += key * weight;
                    }
                }
                *mean += sums.iter().sum::<f32>();
            }
        });
    }

    /// The upper triangle of Σ w (k−m)(k−m)ᵀ, rows padded.
    fn covariance(&self, weights: &[f32], mean: &[f32], memory: (&mut [f32], &mut [f32]), out: &mut [f32]) {
        let (head_dim, width) = (mean.len(), padded(mean.len()));
        // (k−m)·√w as [D][tokens] and as [tokens][D].
        let (centred, turned) = memory;
        turned.fill(0.0);
        out.fill(0.0);
        let mut multiply = |centred: &[f32], turned: &[f32], tokens: usize| {
            for column in (0..head_dim).step_by(BLOCK) {
                // Rows below the panel are the lower triangle.
                let shape = Shape { m: head_dim.min(column + BLOCK), k: tokens, n: BLOCK };
                let a = Strided { data: centred, stride: TILE };
                let b = Strided { data: &turned[column..], stride: width };
                gemm_panel(self.level, shape, a, b, StridedMut { data: &mut out[column..], stride: width }, true);
            }
        };
        let mut tokens = 0;
        self.blocks(weights, head_dim, |keys, first, weights| {
            if tokens + weights.len() > TILE {
                multiply(centred, turned, tokens);
                tokens = 0;
            }
            let mut roots = [0.0f32; BLOCK];
            roots.iter_mut().zip(weights).for_each(|(root, weight)| *root = weight.sqrt());
            for (channel, (keys, &mean)) in keys.chunks_exact(BLOCK).zip(mean).enumerate() {
                let to = &mut centred[channel * TILE + tokens..][..weights.len()];
                for ((to, &key), &root) in to.iter_mut().zip(&keys[first..]).zip(&roots) {
                    *to = (key - mean) * root;
                }
                for (lane, &x) in to.iter().enumerate() {
                    turned[(tokens + lane) * width + channel] = x;
                }
            }
            tokens += weights.len();
        });
        multiply(centred, turned, tokens);
    }
}

/// [`compensate::weigh`] for the tokens `kept`; the others weigh nothing.
fn weigh_kept(weights: &mut [f32], kept: &[u32]) -> Result<f32, Error> {
    for (at, &token) in kept.iter().enumerate() {
        weights[at] = weights[token as usize];
    }
    let mass = compensate::weigh(&mut weights[..kept.len()], 0)?;
    // Back to their places, the last one first: none is before its own in the list.
    let mut end = weights.len();
    for (at, &token) in kept.iter().enumerate().rev() {
        let (weight, token) = (weights[at], token as usize);
        weights[token + 1..end].fill(0.0);
        weights[token] = weight;
        end = token;
    }
    weights[..end].fill(0.0);
    Ok(mass)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use thinkey_core::{Plain, QueryWindow, TokenRows, mass, value};

    fn numbers(seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    /// Tokens as packed blocks; lanes that are no tokens hold what must not matter.
    fn packed(rows: &[f32], d: usize) -> Vec<f32> {
        let tokens = rows.len() / d;
        let mut blocks = vec![f32::MAX; tokens.next_multiple_of(BLOCK) * d];
        for (at, &x) in rows.iter().enumerate() {
            let (token, channel) = (at / d, at % d);
            blocks[(token / BLOCK * d + channel) * BLOCK + token % BLOCK] = x;
        }
        blocks
    }

    proptest! {
        /// However the tokens are spread over sinks, ring and prompt.
        #[test]
        fn learns_what_the_loops_of_core_do(
            head_dim in 1usize..70,
            group in 1usize..4,
            window in 1usize..20,
            past_sinks in 0usize..6,
            more_sinks in 0usize..6,
            ring in 0usize..70,
            own in 20usize..300,
            share in 0.1f64..1.0,
            evicts in any::<bool>(),
            seed in any::<u64>(),
        ) {
            // The ring has tokens only once there are all sinks.
            let ring = if more_sinks > 0 { 0 } else { ring };
            let (d, sinks, tokens) = (head_dim, past_sinks + more_sinks, past_sinks + ring + own);
            let thinned = (((tokens - sinks) as f64 * share) as usize).max(1);
            let (keys, queries) = (numbers(seed, tokens * d), numbers(seed ^ 3, group * window * d));
            let rows = TokenRows::new(&keys, tokens, d, d).unwrap();
            let query_window = QueryWindow::new(&queries, [group, window * d], [window, d], d).unwrap();
            let (mut mass, mut scratch) = (vec![0.0; tokens], vec![0.0; tokens]);
            mass::group_mass(&Plain, &query_window, &rows, &mut scratch, &mut mass).unwrap();
            mass.truncate(sinks + thinned);
            // Of those thinned, about half; the others are as if they were not there.
            let stays = |token: usize| token == 0 || numbers(seed ^ token as u64, 3)[2] > 0.0;
            let kept: Vec<u32> = (0..thinned).filter(|&token| stays(token)).map(|token| token as u32).collect();
            let mut rows = rows.first(sinks + thinned).unwrap();
            let mut listed = keys[..sinks * d].to_vec();
            if evicts {
                kept.iter().for_each(|&token| listed.extend(&keys[(sinks + token as usize) * d..][..d]));
                rows = TokenRows::new(&listed, sinks + kept.len(), d, d).unwrap();
                kept.iter().enumerate().for_each(|(at, &token)| mass[sinks + at] = mass[sinks + token as usize]);
                mass.truncate(sinks + kept.len());
            }
            compensate::weigh(&mut mass, sinks).unwrap();
            let (mut mean, mut covariance) = (vec![0.0; d], vec![0.0; d * d]);
            let mut scratch = vec![0.0; compensate::moments_scratch(d)];
            compensate::moments(&rows, &mass, &mut scratch, &mut mean, &mut covariance).unwrap();

            let parts = [0..past_sinks, past_sinks..past_sinks + ring, past_sinks + ring..tokens];
            let blocks = parts.clone().map(|part| packed(&keys[part.start * d..part.end * d], d));
            let value_rows = numbers(!seed, tokens * d);
            let wide = parts.clone().map(|part| {
                let mut wide = vec![0.0; part.len().next_multiple_of(BLOCK) * padded(d)];
                for (row, value) in wide.chunks_exact_mut(padded(d)).zip(value_rows[part.start * d..part.end * d].chunks_exact(d)) {
                    row[..d].copy_from_slice(value);
                }
                wide
            });
            let region = |index: usize| Region {
                keys: &blocks[index], values: &wide[index], channels: d, lanes: parts[index].len(), hidden: 0,
                position: parts[index].start as isize, thin: false,
            };
            let kept_values = (seed as usize % d) + 1;
            let mut value_scores = vec![0.0; d];
            let all_values = TokenRows::new(&value_rows, tokens, d, d).unwrap();
            let mut row = vec![0.0; tokens];
            let all_keys = TokenRows::new(&keys, tokens, d, d).unwrap();
            value::score::query(&Plain, &query_window, &all_keys, &all_values, &mut row, &mut value_scores).unwrap();
            let regions = [region(0), region(1), region(2)];
            for level in Level::available() {
                let lesson = Lesson {
                    level, queries: queries.chunks(window * d), regions: regions.each_ref(), sinks, thinned, window: usize::MAX,
                    moments: true, choose: None, values: Some(kept_values), kept: evicts.then_some(&kept),
                };
                let mut memory = vec![f32::NAN; len(tokens, group * window, d)];
                let learnt = lesson.run(d, &mut memory).unwrap();
                // Of channels that score alike either may be kept.
                let least = |mask: &ChannelMask| mask.channels().map(|c| value_scores[c]).fold(f32::INFINITY, f32::min);
                let best = select::select(&value_scores, kept_values).unwrap();
                let (ours, theirs) = (least(&learnt.values.unwrap()), least(&best));
                prop_assert!((ours - theirs).abs() <= 1e-3 * theirs, "{ours} {theirs}");
                let Some(Moments::Known { mean: own_mean, covariance: own_covariance, .. }) = learnt.moments else {
                    panic!("moments were asked for");
                };
                for (ours, theirs) in own_mean.iter().zip(&mean) {
                    prop_assert!((ours - theirs).abs() < 1e-4, "{ours} {theirs}");
                }
                for (at, (ours, theirs)) in own_covariance.iter().zip(&covariance).enumerate() {
                    prop_assert!((ours - theirs).abs() < 2e-4, "{at}: {ours} {theirs}");
                }
            }
        }
    }
}
