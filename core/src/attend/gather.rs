//! The weights of a softmax, token by token: what heavy hitters gather.
//!
//! They are not there when attention is through, whose softmax is online; a second pass over the keys, with the largest
//! logit and the sum that it has found, makes them again.

use super::{KeyLanes, Loops, Partial, Queries, TILE, TILE_BLOCKS};
use crate::{BLOCK, Error, HeadRef, error::check_len};
use core::ops::Range;

/// Writes the weights of the tokens of the thin blocks `blocks` of `head`, summed over the group's query heads: one a lane, 0
/// for hidden lanes. `total` is what attention to all tokens of the head has gathered.
///
/// # Errors
/// [`Error::Index`] for blocks that are not there; [`Error::Length`] where parts do not fit.
pub fn prefix_weights<L: Loops>(
    loops: &L,
    head: &HeadRef<'_>,
    queries: &mut Queries<'_>,
    blocks: Range<usize>,
    total: &Partial<'_>,
    weights: &mut [f32],
) -> Result<(), Error> {
    let (layout, span) = (head.layout(), head.span());
    if blocks.end > span.blocks as usize {
        return Err(Error::Index { what: "block", index: blocks.end, limit: span.blocks as usize + 1 });
    }
    check_len("weights", blocks.len() * BLOCK, weights.len())?;
    for (weights, start) in weights.chunks_mut(TILE).zip(blocks.clone().step_by(TILE_BLOCKS)) {
        let key = |index: usize| KeyLanes {
            kind: layout.keys,
            bytes: head.key_block((start + index).min(blocks.end - 1)),
            channels: layout.kept as usize,
            stride: BLOCK,
            ahead: &[],
        };
        let keys: [KeyLanes<'_>; TILE_BLOCKS] = core::array::from_fn(key);
        let keys = &keys[..weights.len() / BLOCK];
        loops.tile_scores(
            keys,
            &queries.thin[..queries.group * layout.kept as usize],
            queries.group,
            queries.scores,
            TILE,
        )?;
        let hidden = if start == 0 { span.hidden as usize } else { 0 };
        add(loops, queries.scores, hidden..weights.len(), queries.added, total, weights);
    }
    Ok(())
}

/// Writes the weights of the tokens of the ring of `head`, as [`prefix_weights`] does.
///
/// # Errors
/// [`Error::Length`] where parts do not fit.
pub fn ring_weights<L: Loops>(
    loops: &L,
    head: &HeadRef<'_>,
    queries: &mut Queries<'_>,
    total: &Partial<'_>,
    weights: &mut [f32],
) -> Result<(), Error> {
    let layout = head.layout();
    check_len("weights", head.span().recent as usize, weights.len())?;
    let kind = layout.keys.ring();
    for (index, weights) in weights.chunks_mut(BLOCK).enumerate() {
        let keys = KeyLanes {
            kind: kind.into(),
            bytes: &head.ring_keys()[index * BLOCK * kind.bytes()..],
            channels: layout.head_dim as usize,
            stride: layout.ring_stride(),
            ahead: &[],
        };
        loops.key_scores(keys, queries.whole, queries.group, queries.scores, TILE)?;
        add(loops, queries.scores, 0..weights.len(), &[], total, weights);
    }
    Ok(())
}

/// Turns the scores of each query head into weights, those of the lanes that are `tokens`, and writes their sums.
fn add<L: Loops>(
    loops: &L,
    scores: &mut [f32],
    tokens: Range<usize>,
    added: &[f32],
    total: &Partial<'_>,
    weights: &mut [f32],
) {
    weights.fill(0.0);
    for (head, scores) in scores.chunks_exact_mut(TILE).take(total.max.len()).enumerate() {
        let shift = total.max[head] - added.get(head).copied().unwrap_or(0.0);
        let scores = &mut scores[tokens.clone()];
        // By rounding alone can one be above.
        scores.iter_mut().for_each(|score| *score = score.min(shift));
        loops.exponentials(scores, shift);
        let share = 1.0 / total.sum[head];
        for (weight, &score) in weights[tokens.clone()].iter_mut().zip(&*scores) {
            *weight += score * share;
        }
    }
}
