//! Key energies of an admission from a random-sign [sketch](crate::channel::sketch), a row at a time: it takes the memory of one.

use super::{HeadMut, KeyOrder, Rows};
use crate::{
    BLOCK, Error, MAX_HEAD_DIM,
    channel::random::bits,
    storage::{Element, elements, with_element},
};

impl HeadMut<'_> {
    /// Writes what a sketch of `lines` rows makes of the energies of the `held` tokens of the ring and then `new` rows: as
    /// [`add`](crate::channel::sketch::add) with `seed` from token 0 on and
    /// [`energy`](crate::channel::sketch::energy).
    ///
    /// # Errors
    /// [`Error::Length`] where rows do not fit.
    pub(super) fn sketch_keys(
        &self,
        (seed, lines): (u64, usize),
        held: usize,
        rows: Rows<'_>,
        new: usize,
        energy: &mut [f32],
    ) -> Result<(), Error> {
        let (head_dim, stride) = (energy.len(), self.layout.ring_stride());
        rows.check(new, head_dim)?;
        let mut sums = [0.0f32; MAX_HEAD_DIM];
        let (sums, mut memory) = (&mut sums[..head_dim], [0.0f32; BLOCK]);
        energy.fill(0.0);
        for line in 0..lines {
            // Signs are drawn once for all channels of a block of tokens.
            let mut signs = |first: usize, count: usize| {
                for (token, sign) in (first as u64..).zip(&mut memory[..count]) {
                    *sign = if bits(seed, token) >> line & 1 == 0 { 1.0 } else { -1.0 };
                }
                memory
            };
            sums.fill(0.0);
            with_element!(self.layout.keys.ring(), E => {
                let ring = elements::<E>(&self.bytes[self.layout.ring_keys(self.slot)])?;
                for first in (0..held).step_by(BLOCK) {
                    let count = BLOCK.min(held - first);
                    let signs = signs(first, count);
                    for (sum, lanes) in sums.iter_mut().zip(ring.chunks_exact(stride)) {
                        let lanes = lanes[first..first + count].iter();
                        *sum += signs.iter().zip(lanes).map(|(sign, x)| sign * x.load()).sum::<f32>();
                    }
                }
            });
            for first in (0..new).step_by(BLOCK) {
                let count = BLOCK.min(new - first);
                let signs = signs(held + first, count);
                match rows.order {
                    KeyOrder::Blocks => {
                        let block = rows.keys[first * head_dim..].chunks_exact(BLOCK);
                        sums.iter_mut().zip(block).for_each(|(sum, lanes)| *sum += product(&signs[..count], lanes));
                    }
                    KeyOrder::Rows => {
                        for (token, sign) in (first..).zip(&signs[..count]) {
                            let key = &rows.keys[token * rows.stride..][..head_dim];
                            sums.iter_mut().zip(key).for_each(|(sum, x)| *sum += sign * x);
                        }
                    }
                }
            }
            energy.iter_mut().zip(&*sums).for_each(|(energy, sum)| *energy += sum * sum / lines as f32);
        }
        Ok(())
    }
}

/// Σ a·b over what `a` has, in sums side by side: one alone would wait for its own latency.
fn product(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 8;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b[..a.len()].as_chunks::<LANES>());
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Head, HeadLayout, Scoring, Span, StorageKind, channel::score, channel::sketch, mass::tests::numbers,
        policy::Score,
    };
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    proptest! {
        /// However keys lie, in the ring and new, they are sketched as rows in a row are.
        #[test]
        fn equals_a_sketch_of_all_rows((held, new, lines, head, seed) in (0usize..40, 1usize..80, 1usize..=64, 0usize..9, any::<u64>())) {
            const D: usize = 6;
            let layout = HeadLayout::of::<Head<D, 0>>(BLOCK as u16, 0, StorageKind::F32, StorageKind::F32);
            let (all, queries) = (numbers(seed, (held + new) * D), numbers(seed ^ 1, 3 * D));
            let mut bytes = vec![0u64; layout.bytes().div_ceil(8)];
            let bytes = &mut bytemuck::cast_slice_mut(&mut bytes)[..layout.bytes()];
            let mut view = HeadMut::new(layout, bytes, 0).unwrap();
            view.add_query_energy(&queries, 3, D).unwrap();
            let first = Span::default().admit(held, layout.retention(), true);
            let rows = |keys| Rows { keys, order: KeyOrder::Rows, values: &all[held * D..], stride: D };
            view.admit(&first, &[], None, Rows { values: &all, ..rows(&all) }).unwrap();
            let second = first.after.admit(new, layout.retention(), false);

            let (mut lanes, mut energy, mut expected) = (vec![0.0; lines * D], [0.0; D], [0.0; D]);
            sketch::add(&all, held + new, D, D, [head as u64, 0], &mut lanes).unwrap();
            sketch::energy(&lanes, &mut energy).unwrap();
            let mut query = [0.0; D];
            score::add_energy(&queries, 3, D, &mut query).unwrap();
            score::score(&query, 3, &energy, held + new, &mut expected).unwrap();

            let keys = &all[held * D..];
            let mut blocks = vec![f32::NAN; new.next_multiple_of(BLOCK) * D];
            for (at, &x) in keys.iter().enumerate() {
                let (token, channel) = (at / D, at % D);
                blocks[(token / BLOCK * D + channel) * BLOCK + token % BLOCK] = x;
            }
            let scoring = Scoring { score: Score::Sketch { rows: lines as u32 }, head, queries: 3 };
            let most = expected.iter().copied().fold(0.0, f32::max);
            for rows in [rows(keys), Rows { order: KeyOrder::Blocks, ..rows(&blocks) }] {
                let mut scores = [0.0; D];
                view.score(&scoring, &second, rows, &mut scores).unwrap();
                let off: Vec<f32> = scores.iter().zip(&expected).map(|(a, b)| (a - b).abs()).collect();
                prop_assert!(off.iter().all(|&off| off <= 1e-4 * most), "{scores:?} instead of {expected:?}");
            }
        }
    }
}
